import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, generalized_box_iou

from triptych.metrics.boxes import convert_boxes, grounding_accuracy, grounding_correct, paired_giou, paired_iou

UNIT = [0.0, 0.0, 1.0, 1.0]

numbers = st.integers(-8, 8).map(lambda number: number / 8) | st.floats(-100, 100, width=32)
any_boxes = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=8)


def tensor(boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def proper(boxes_N4):
    """The same boxes with their corners in order and a minimum of area."""
    start, end = boxes_N4.unflatten(1, (2, 2)).sort(dim=1).values.unbind(1)
    return torch.cat([start, end + 0.25], dim=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_boxes, any_boxes)
def test_proper_boxes_score_as_in_torchvision(first, second):
    rows = min(len(first), len(second))
    boxes_N4, others_N4 = proper(tensor(first[:rows])), proper(tensor(second[:rows]))
    torch.testing.assert_close(paired_iou(boxes_N4, others_N4), box_iou(boxes_N4, others_N4).diag())
    expected_N = generalized_box_iou(boxes_N4, others_N4).diag()
    torch.testing.assert_close(paired_giou(boxes_N4, others_N4), expected_N, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_boxes, any_boxes)
def test_any_boxes_score_within_range_and_the_same_both_ways(first, second):
    rows = min(len(first), len(second))
    boxes_N4, others_N4 = tensor(first[:rows]), tensor(second[:rows])
    iou_N, giou_N = paired_iou(boxes_N4, others_N4), paired_giou(boxes_N4, others_N4)
    assert ((iou_N >= 0) & (iou_N <= 1.00001)).all()
    assert ((giou_N >= -1.00001) & (giou_N <= iou_N + 1e-5)).all()
    assert torch.equal(iou_N, paired_iou(others_N4, boxes_N4))
    assert torch.equal(giou_N, paired_giou(others_N4, boxes_N4))


@pytest.mark.parametrize("flat", [[0.5, 0.5, 0.5, 0.5], [0.2, 0.1, 0.2, 0.9], [0.7, 0.7, 0.3, 0.3], [0.0] * 4])
def test_boxes_without_area_overlap_nothing(flat):
    assert paired_iou(tensor([flat, flat, UNIT]), tensor([UNIT, flat, flat])).tolist() == [0, 0, 0]
    assert paired_giou(tensor([flat]), tensor([flat])).tolist() == [0]


def test_gradients_of_boxes_without_area_are_finite():
    flat = [0.5, 0.4, 0.5, 0.8]
    boxes_N4 = tensor([flat, [0.2, 0.2, 0.4, 0.4]]).requires_grad_()
    paired_giou(boxes_N4, tensor([flat, [0.3, 0.3, 0.6, 0.6]])).sum().backward()
    assert boxes_N4.grad.isfinite().all()
    assert boxes_N4.grad[1].abs().sum() > 0


def test_giou_falls_with_distance():
    near, far = [0.2, 0.0, 0.3, 0.1], [0.8, 0.0, 0.9, 0.1]
    scores = paired_giou(tensor([[0.0, 0.0, 0.1, 0.1]] * 2), tensor([near, far]))
    torch.testing.assert_close(scores, torch.tensor([2 / 3 - 1, 2 / 9 - 1]))


def test_whole_numbers_and_half_precision_count_in_float32():
    boxes_N4 = torch.tensor([[0, 0, 600, 400]])
    assert paired_iou(boxes_N4, torch.tensor([[0, 0, 300, 400]])).item() == 0.5
    assert paired_iou(boxes_N4.half(), boxes_N4.half()).item() == 1.0  # the area is more than float16 can hold


def test_any_leading_dimensions():
    assert paired_iou(torch.rand(2, 3, 4), torch.rand(2, 3, 4)).shape == (2, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(any_boxes, st.permutations(["xyxy", "xywh", "cxcywh"]))
def test_conversions_go_round(boxes, formats):
    boxes_N4 = proper(tensor(boxes))
    there = convert_boxes(convert_boxes(boxes_N4, formats[0], formats[1]), formats[1], formats[2])
    torch.testing.assert_close(convert_boxes(there, formats[2], formats[0]), boxes_N4, atol=1e-4, rtol=1e-5)


def test_conversions_of_one_box():
    box_14 = torch.tensor([[10.0, 20.0, 40.0, 60.0]])
    assert convert_boxes(box_14, "xyxy", "xywh").tolist() == [[10, 20, 30, 40]]
    assert convert_boxes(box_14, "xyxy", "cxcywh").tolist() == [[25, 40, 30, 40]]


def test_an_overlap_of_exactly_the_threshold_is_right():
    expected_N4 = tensor([UNIT, UNIT, UNIT])
    half = 0.5
    below = torch.nextafter(torch.tensor(half), torch.tensor(0.0)).item()
    predicted_N4 = tensor([[0.0, 0.0, 1.0, half], [0.0, 0.0, 1.0, below], [half, 0.0, 1.0, 1.0]])
    assert grounding_correct(predicted_N4, expected_N4).tolist() == [True, False, True]
    assert grounding_accuracy(predicted_N4, expected_N4) == pytest.approx(200 / 3)


def test_other_thresholds():
    predicted_N4 = tensor([[0.0, 0.0, 1.0, 0.75]])
    assert grounding_accuracy(predicted_N4, tensor([UNIT]), threshold=0.75) == 100.0
    assert grounding_accuracy(predicted_N4, tensor([UNIT]), threshold=0.76) == 0.0


def test_predictions_are_cut_at_the_edges():
    expected_N4 = tensor([[0.5, 0.0, 1.0, 1.0]])
    predicted_N4 = tensor([[0.5, -1.0, 3.0, 2.0]])
    assert paired_iou(predicted_N4, expected_N4).item() < 0.5
    assert grounding_accuracy(predicted_N4, expected_N4) == 100.0


@pytest.mark.parametrize(
    ("predicted", "expected", "message"),
    [
        (torch.zeros(0, 4), torch.zeros(0, 4), "no boxes"),
        (torch.zeros(2, 4), torch.zeros(1, 4), r"\(2, 4\) and \(1, 4\)"),
        (torch.zeros(4), torch.zeros(4), r"\(N, 4\)"),
        (tensor([UNIT, [0, 0, float("nan"), 1]]), tensor([UNIT, UNIT]), "predicted box 1 is not finite"),
        (tensor([UNIT]), tensor([[0, 0, float("inf"), 1]]), "expected box 0 is not finite"),
        (tensor([UNIT, UNIT]), tensor([UNIT, [0, 0, 30, 40]]), "expected box 1 is not normalised"),
    ],
)
def test_unusable_boxes(predicted, expected, message):
    with pytest.raises(ValueError, match=message):
        grounding_accuracy(predicted, expected)


def test_unusable_arguments():
    with pytest.raises(ValueError, match="threshold"):
        grounding_correct(tensor([UNIT]), tensor([UNIT]), threshold=50)
    with pytest.raises(ValueError, match="pairs"):
        paired_iou(torch.zeros(3, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="pairs"):
        paired_giou(torch.zeros(3, 5), torch.zeros(3, 5))
