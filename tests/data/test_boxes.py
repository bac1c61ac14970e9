import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.data.boxes import (
    BINS,
    EvaluationTransform,
    Expression,
    TrainingTransform,
    bins_to_boxes,
    boxes_to_bins,
    mirror_phrase,
    record_expressions,
    to_picture,
)
from triptych.data.loader import seeded
from triptych.data.samples import BrokenSample, Record
from triptych.data.transforms import Preprocessing
from triptych.metrics.boxes import convert_boxes

sides = st.integers(20, 300)
fractions = st.floats(0, 1)


@st.composite
def boxed_pictures(draw, smallest=12):
    """A blue picture with a red box of whole pixels, at least `smallest` on each side."""
    width, height = draw(sides), draw(sides)
    box_width, box_height = draw(st.integers(smallest, width)), draw(st.integers(smallest, height))
    left, top = round(draw(fractions) * (width - box_width)), round(draw(fractions) * (height - box_height))
    box = (left, top, left + box_width, top + box_height)
    return painted(width, height, box), torch.tensor([box])


def painted(width, height, box):
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), box)
    return image


def red_box(pixels_CHW):
    """Where the canvas is more red than blue, as xyxy; jittered colours and the grey of the padding included."""
    red_HW = pixels_CHW[0].int() - pixels_CHW[2].int() > 40
    rows, columns = red_HW.any(dim=1).nonzero(), red_HW.any(dim=0).nonzero()
    return torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])


def pixel_boxes(grounded, size):
    return convert_boxes(grounded.boxes_N4, "cxcywh", "xyxy") * size


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxed_pictures(), st.sampled_from([48, 96, 336]), st.integers(0, 1000))
def test_training_keeps_the_box_around_the_same_pixels(boxed, size, seed):
    image, boxes_N4 = boxed
    with seeded(seed):
        grounded = TrainingTransform(Preprocessing(size))(image, boxes_N4, ["dog"])
    moved_N4 = pixel_boxes(grounded, size)
    left, top, right, bottom = grounded.extent
    assert grounded.pixels_CHW.shape == (3, size, size)
    assert grounded.pixels_CHW.dtype == torch.uint8
    assert grounded.boxes_N4.dtype == torch.float32
    assert type(grounded.boxes_N4) is torch.Tensor
    assert 0 <= left < right <= size
    assert 0 <= top < bottom <= size
    assert (moved_N4 >= torch.tensor([left, top, left, top]) - 1e-3).all()
    assert (moved_N4 <= torch.tensor([right, bottom, right, bottom]) + 1e-3).all()
    sides_N2 = moved_N4[:, 2:] - moved_N4[:, :2]
    scale = float((sides_N2 / (boxes_N4[:, 2:] - boxes_N4[:, :2])).max())
    if sides_N2.min() > 3:  # a thinner box pales into its surroundings, and an enlarged one has a wide edge
        assert (moved_N4 - red_box(grounded.pixels_CHW)).abs().max() < 1.2 + 0.2 * max(scale, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxed_pictures(), st.integers(0, 1000))
def test_crops_keep_whole_boxes(boxed, seed):
    """Neither crops nor scaling changes the aspect, but for the rounding of sides; a cut would."""
    image, boxes_N4 = boxed
    with seeded(seed):
        grounded = TrainingTransform(Preprocessing(336))(image, boxes_N4, ["dog"])
    _, _, width, height = (grounded.boxes_N4[0] * 336).tolist()
    left, top, right, bottom = boxes_N4[0].tolist()
    shorter = min(grounded.extent[2] - grounded.extent[0], grounded.extent[3] - grounded.extent[1])
    assert width / height == pytest.approx((right - left) / (bottom - top), rel=1 / shorter)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxed_pictures(), st.sampled_from([48, 96, 336]))
def test_evaluation_shows_the_whole_picture_in_the_middle(boxed, size):
    image, boxes_N4 = boxed
    preprocessing = Preprocessing(size)
    grounded = EvaluationTransform(preprocessing)(image, boxes_N4, ["Dog on the left"])
    left, top, right, bottom = grounded.extent
    assert max(right - left, bottom - top) == size
    assert 0 <= (size - right) - left <= 1
    assert 0 <= (size - bottom) - top <= 1
    assert (right - left) / (bottom - top) == pytest.approx(
        image.width / image.height, rel=1 / min(right - left, bottom - top)
    )
    assert grounded.phrases == ("Dog on the left",)
    padding_HW = torch.ones(size, size, dtype=torch.bool)
    padding_HW[top:bottom, left:right] = False
    if padding_HW.any():
        assert preprocessing.normalize(grounded.pixels_CHW)[:, padding_HW].abs().max() < 0.5 / 255 / 0.26
    back_N4 = to_picture(grounded.boxes_N4, grounded.extent, size, image.width, image.height)
    torch.testing.assert_close(back_N4, boxes_N4.float(), atol=0.01, rtol=0)


def test_evaluation_of_one_box_by_hand():
    grounded = EvaluationTransform(Preprocessing(100))(noise(200, 101), torch.tensor([[20, 10, 60, 60]]), ["dog"])
    assert grounded.extent == (0, 25, 100, 75)  # 50.5 rows, rounded to the even number
    centre_y = 25 + 35 * 50 / 101
    expected = torch.tensor([[20, centre_y, 20, 50 * 50 / 101]]) / 100
    torch.testing.assert_close(grounded.boxes_N4, expected)


def test_predictions_in_the_padding_are_cut_at_the_picture():
    boxes_N4 = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.2, 0.2], [0.5, 0.05, 0.2, 0.1]])
    pixels_N4 = to_picture(boxes_N4, (0, 25, 100, 75), 100, 200, 100)
    torch.testing.assert_close(pixels_N4, torch.tensor([[0, 0, 200, 100], [80, 30, 120, 70], [80, 0, 120, 0.0]]))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (5000, 2)])
def test_extreme_pictures(size):
    image, boxes_N4 = noise(*size), torch.tensor([[0.0, 0.0, *size]])
    for transform in (EvaluationTransform(Preprocessing(48)), TrainingTransform(Preprocessing(48))):
        grounded = transform(image, boxes_N4, ["dog"])
        assert grounded.pixels_CHW.shape == (3, 48, 48)
        left, top, right, bottom = grounded.extent
        torch.testing.assert_close(pixel_boxes(grounded, 48), torch.tensor([[left, top, right, bottom]]).float())


def test_several_boxes_of_a_picture_travel_together():
    boxes_N4 = torch.tensor([[10, 10, 40, 40], [100, 50, 160, 90]])
    for seed in range(20):
        with seeded(seed):
            grounded = TrainingTransform(Preprocessing(96))(noise(200, 100), boxes_N4, ["left cat", "right dog"])
        mirrored = grounded.phrases == ("right cat", "left dog")
        assert mirrored or grounded.phrases == ("left cat", "right dog")
        assert (grounded.boxes_N4[0, 0] > grounded.boxes_N4[1, 0]) == mirrored
        torch.testing.assert_close(grounded.boxes_N4[1, 2] / grounded.boxes_N4[0, 2], torch.tensor(2.0))


def test_same_seed_same_sample_and_workers_can_have_it():
    transform = TrainingTransform(Preprocessing(48))
    image, boxes_N4 = noise(90, 70), torch.tensor([[10.0, 10, 40, 40]])
    results = []
    for sent in (transform, pickle.loads(pickle.dumps(transform))):
        with seeded(5):
            results.append(sent(image, boxes_N4, ["dog"]))
    assert torch.equal(results[0].pixels_CHW, results[1].pixels_CHW)
    assert torch.equal(results[0].boxes_N4, results[1].boxes_N4)
    with seeded(6):
        assert not torch.equal(transform(image, boxes_N4, ["dog"]).pixels_CHW, results[0].pixels_CHW)


def draws(image, boxes_N4, phrase, count=150, **options):
    transform = TrainingTransform(Preprocessing(100), **options)
    with seeded(0):
        return [transform(image, boxes_N4, [phrase]) for _ in range(count)]


def test_scales_places_and_flips():
    image, boxes_N4 = noise(100, 50), torch.tensor([[0, 0, 20, 10]])
    found = draws(image, boxes_N4, "the left one")  # a place: no crop
    widths = [grounded.extent[2] - grounded.extent[0] for grounded in found]
    assert set(widths) == {100, 95, 90, 85, 80, 75, 70}
    assert {round(float(grounded.boxes_N4[0, 2] * 100)) for grounded in found} == {20, 19, 18, 17, 16, 15, 14}
    mirrored = [grounded for grounded in found if grounded.phrases == ("the right one",)]
    assert 50 < len(mirrored) < 100
    for grounded in mirrored:
        assert grounded.boxes_N4[0, 0] * 100 + grounded.boxes_N4[0, 2] * 50 == pytest.approx(
            grounded.extent[2], abs=1e-3
        )
    places = {grounded.extent[:2] for grounded in found}
    assert len(places) > 50
    assert min(top for _, top in places) < 5
    assert max(grounded.extent[3] for grounded in found) > 95


def test_half_of_the_pictures_are_cropped_unless_the_phrase_says_a_place():
    image, boxes_N4 = noise(400, 300), torch.tensor([[180, 130, 220, 170]])

    def cropped(phrase):
        found = draws(image, boxes_N4, phrase)
        aspects = [(g.extent[2] - g.extent[0]) / (g.extent[3] - g.extent[1]) for g in found]
        return sum(abs(aspect - 4 / 3) > 0.03 for aspect in aspects)

    assert 55 < cropped("the dog") < 85  # a few crops keep the aspect by chance
    for phrase in ("Left dog", "dog on the right", "TOP one", "bottom", "the middle one", "laptop"):
        assert cropped(phrase) == 0


def test_jitter_changes_four_of_five_pictures():
    image, boxes_N4 = Image.new("RGB", (100, 100), (200, 100, 50)), torch.tensor([[0, 0, 100, 100]])
    pixels = []
    for grounded in draws(image, boxes_N4, "left"):
        left, top, _, _ = grounded.extent
        pixels.append(tuple(grounded.pixels_CHW[:, top + 5, left + 5].tolist()))
    assert 15 < pixels.count((200, 100, 50)) < 50
    assert max(red for red, _, _ in pixels) > 230
    assert min(red for red, _, _ in pixels) < 150


def test_only_the_official_crop_cuts_boxes():
    image = noise(640, 480)
    boxes_N4 = torch.tensor([[500, 40, 630, 440]])  # right and tall: crops end left of it, or above its end

    def shapes(**options):
        return [float(g.boxes_N4[0, 2] / g.boxes_N4[0, 3]) for g in draws(image, boxes_N4, "dog", **options)]

    whole = 130 / 400
    assert all(shape == pytest.approx(whole, rel=0.03) for shape in shapes())
    assert sum(shape != pytest.approx(whole, rel=0.03) for shape in shapes(official=True)) > 20


def test_official_mirroring_swaps_letters():
    image, boxes_N4 = noise(40, 40), torch.tensor([[0, 0, 20, 10]])
    assert {g.phrases[0] for g in draws(image, boxes_N4, "a bright lamp", 20)} == {"a bright lamp"}
    assert {g.phrases[0] for g in draws(image, boxes_N4, "a bright lamp", 20, official=True)} == {
        "a bright lamp",
        "a bleft lamp",
    }


@pytest.mark.parametrize(
    ("phrase", "mirrored"),
    [
        ("left", "right"),
        ("the man on the right, left of Right St", "the man on the left, right of Left St"),
        ("leftmost cup", "rightmost cup"),
        ("RIGHT-hand side's left's", "LEFT-hand side's right's"),
        ("leftest rightiest lefty rightish leftside", "rightest leftiest righty leftish rightside"),
        ("leftover bright upright rightly aright cleft copyright", None),
        ("", None),
    ],
)
def test_mirrored_phrases(phrase, mirrored):
    assert mirror_phrase(phrase) == (phrase if mirrored is None else mirrored)


words = st.sampled_from(
    ["left", "Right", "LEFT", "leftmost", "rightly", "bright", "l", "eft", "-", " ", ".", "righ", "t"]
)


@settings(deadline=None, derandomize=True)
@given(st.lists(words).map("".join), st.booleans())
def test_mirroring_twice_is_nothing(phrase, whole_words):
    assert mirror_phrase(mirror_phrase(phrase, whole_words), whole_words) == phrase


@pytest.mark.parametrize(
    ("boxes", "phrases", "message"),
    [
        ([[50, 0, 60, 10]], ["dog"], r"\[50.0, 0.0, 60.0, 10.0\] has no area in the picture of 40 x 30"),
        ([[0, 0, 10, 10], [5, 5, 5, 9]], ["dog", "cat"], r"\[5.0, 5.0, 5.0, 9.0\] has no area"),
        ([[0, 0, float("nan"), 10]], ["dog"], "no area"),
        ([[0, 0, 10, 10]], ["dog", "cat"], "for 2"),
        ([0, 0, 10, 10], ["dog"], r"\(N, 4\)"),
    ],
)
def test_unusable_boxes(boxes, phrases, message):
    for transform in (EvaluationTransform(Preprocessing(48)), TrainingTransform(Preprocessing(48))):
        with pytest.raises(ValueError, match=message):
            transform(noise(40, 30), torch.tensor(boxes, dtype=torch.float32), phrases)


def test_boxes_beyond_the_picture_are_cut():
    boxes_N4 = torch.tensor([[-5.0, 10, 20, 45]])
    grounded = EvaluationTransform(Preprocessing(40))(noise(40, 40), boxes_N4, ["dog"])
    torch.testing.assert_close(pixel_boxes(grounded, 40), torch.tensor([[0.0, 10, 20, 40]]))
    assert boxes_N4.tolist() == [[-5, 10, 20, 45]]  # what was given is not changed


def record(**extra):
    return Record("here:1", b"", (), "1", extra)


def test_expressions_of_a_record():
    one = record(phrase="the dog", box_xyxy=[1, 2, 3.5, 4])
    assert record_expressions(one) == [Expression("the dog", (1.0, 2.0, 3.5, 4.0))]
    several = record(phrases=[{"text": "a", "box_xyxy": (0, 0, 1, 1)}, {"text": "b", "box_xyxy": [0, 0, 2, 2]}])
    assert [expression.text for expression in record_expressions(several)] == ["a", "b"]


def test_phrases_may_have_no_box():
    assert record_expressions(record(phrase="the dog")) == [Expression("the dog", None)]
    mixed = record(phrases=[{"text": "a"}, {"text": "b", "box_xyxy": [0, 0, 2, 2]}, {"text": "c", "box_xyxy": None}])
    assert [expression.box_xyxy for expression in record_expressions(mixed)] == [None, (0, 0, 2, 2), None]


def test_names_of_phrases():
    one = record(phrase="the dog", box_xyxy=[1, 2, 3.5, 4], ref_id="a", sent_id=7, split="val")
    assert record_expressions(one)[0].names == {"ref_id": "a", "sent_id": 7}
    several = record(phrases=[{"text": "a", "identifier": "x"}, {"text": "b"}], sent_id=1)
    assert [expression.names for expression in record_expressions(several)] == [{"identifier": "x"}, {}]


def test_pictures_without_phrases_are_put_on_the_canvas():
    """What evaluation does for phrases whose boxes are not known."""
    image = noise(200, 101)
    alone = EvaluationTransform(Preprocessing(100))(image, torch.empty(0, 4), [])
    boxed = EvaluationTransform(Preprocessing(100))(image, torch.tensor([[20, 10, 60, 60]]), ["dog"])
    assert alone.boxes_N4.shape == (0, 4)
    assert alone.extent == boxed.extent
    assert torch.equal(alone.pixels_CHW, boxed.pixels_CHW)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "phrase must be a text, got None"),
        ({"phrases": []}, "no phrases"),
        ({"phrases": ["dog"]}, "must have 'text' and 'box_xyxy', got 'dog'"),
        ({"phrase": " ", "box_xyxy": [0, 0, 1, 1]}, "must be a text"),
        ({"phrase": "dog", "box_xyxy": "none"}, "box of 'dog' must be four numbers, got 'none'"),
        ({"phrase": "dog", "box_xyxy": [0, 0, 1]}, "four numbers"),
        ({"phrase": "dog", "box_xyxy": [0, 0, 1, "1"]}, "four numbers"),
        ({"phrase": "dog", "box_xyxy": [0, 0, 0, 1]}, r"no area: \[0, 0, 0, 1\]"),
        ({"phrase": "dog", "box_xyxy": [0, 0, float("inf"), 1]}, "no area"),
    ],
)
def test_unusable_records(extra, message):
    with pytest.raises(BrokenSample, match=f"here:1: .*{message}"):
        record_expressions(record(**extra))


def test_bins_by_hand():
    numbers = torch.tensor([-1.0, 0.0, 0.5, 167.999 / 336, 0.99999, 1.0, 2.0])
    assert boxes_to_bins(numbers).tolist() == [0, 0, 168, 167, 335, 336, 336]
    assert bins_to_boxes(torch.tensor([0, 168, 336])).tolist() == [0, 0.5, 1]
    assert boxes_to_bins(torch.tensor([[0.25, 0.5, 0.75, 1.0]]).half(), bins=4).tolist() == [[1, 2, 3, 4]]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1, width=32), min_size=1), st.integers(1, 1000))
def test_bins_lose_less_than_one(numbers, bins):
    numbers_N = torch.tensor(numbers)
    lost_N = (numbers_N - bins_to_boxes(boxes_to_bins(numbers_N, bins), bins)) * bins
    assert lost_N.min() > -1e-3
    assert lost_N.max() < 1.001


def test_every_bin_comes_back_or_is_one_lower():
    bins_N = torch.arange(BINS + 1)
    lost_N = bins_N - boxes_to_bins(bins_to_boxes(bins_N))
    assert ((lost_N == 0) | (lost_N == 1)).all()
    assert lost_N.sum() == 14  # rounding of float32, as in the official code


def test_unusable_bins():
    with pytest.raises(ValueError, match=r"in 0\.\.336, got 3 to 337"):
        bins_to_boxes(torch.tensor([3, 337]))
    with pytest.raises(ValueError, match="got -1"):
        bins_to_boxes(torch.tensor([-1]))
    with pytest.raises(ValueError, match="at least 1"):
        boxes_to_bins(torch.zeros(1, 4), bins=0)
    with pytest.raises(ValueError, match="not finite"):
        boxes_to_bins(torch.tensor([float("nan")]))
