"""Overlap of boxes, and the accuracy of visual grounding.

Shapes: N boxes, of 4 numbers each; ... any leading dimensions. "xyxy" is left, top, right, bottom; "xywh" is left, top,
width, height; "cxcywh" is centre x, centre y, width, height. All functions take pixels and normalised numbers alike,
unless they say otherwise; boxes must be finite.

Conversions are torchvision's. Its IoUs are not used: `box_iou` compares all boxes with all (N x N), and the row-by-row
`generalized_box_iou_loss` adds a constant to the denominator, which moves small boxes across the threshold of 0.5.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]


def convert_boxes(boxes_N4: Tensor, source: BoxFormat, target: BoxFormat) -> Tensor:
    """Boxes (..., 4) of the format `source` in the format `target`; a ValueError if there is no such format."""
    from torchvision.ops import box_convert  # takes more than a second to import

    return box_convert(boxes_N4, source, target)


def paired_iou(boxes_N4: Tensor, others_N4: Tensor) -> Tensor:
    """Intersection over union of each box and the one in the same row, both xyxy; (..., 4) -> (...), in 0..1.

    A box without area (also one whose right is left of its left) shares nothing with any: 0, also where both are.
    """
    overlap, union = _overlap_and_union(*_as_floats(boxes_N4, others_N4))
    return _ratio(overlap, union)


def paired_giou(boxes_N4: Tensor, others_N4: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of each box and the one in the same row; (..., 4) -> (...), in -1..1.

    IoU less the share of the smallest box around both that neither covers: below 0 for boxes far apart. Where even that
    box has no area it is 0.
    """
    boxes_N4, others_N4 = _as_floats(boxes_N4, others_N4)
    overlap, union = _overlap_and_union(boxes_N4, others_N4)
    start = torch.minimum(boxes_N4[..., :2], others_N4[..., :2])
    end = torch.maximum(boxes_N4[..., 2:], others_N4[..., 2:])
    hull = (end - start).clamp(min=0).prod(-1)
    return _ratio(overlap, union) - _ratio(hull - union, hull)


def grounding_correct(predicted_N4: Tensor, expected_N4: Tensor, threshold: float = 0.5) -> Tensor:
    """Whether each predicted box is right: IoU with the expected one of at least `threshold`; N booleans.

    Boxes are xyxy, normalised: 0..1 from the left to the right, and from the top to the bottom, of the same picture.
    Predictions are cut at the edges of the picture first (X-PLUG/mPLUG vgTools/utils/eval_utils.py, as TransVG; there
    the "picture" is the padded square that the network sees). For tests of significance use these, item by item.

    Raises:
        ValueError: shapes that do not fit or are not (N, 4), no boxes, a number that is not finite, expected boxes that
            are not normalised, or a threshold outside 0..1.
    """
    _check_pairs(predicted_N4, expected_N4)
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be above 0 and at most 1, got {threshold}")
    return paired_iou(predicted_N4.clamp(0, 1), expected_N4) >= threshold


def grounding_accuracy(predicted_N4: Tensor, expected_N4: Tensor, threshold: float = 0.5) -> float:
    """Percentage of predicted boxes that are right ("Acc@0.5"); arguments and errors as in `grounding_correct`."""
    correct_N = grounding_correct(predicted_N4, expected_N4, threshold)
    return 100.0 * int(correct_N.sum()) / len(correct_N)


def _overlap_and_union(boxes_N4: Tensor, others_N4: Tensor) -> tuple[Tensor, Tensor]:
    start = torch.maximum(boxes_N4[..., :2], others_N4[..., :2])
    end = torch.minimum(boxes_N4[..., 2:], others_N4[..., 2:])
    overlap = (end - start).clamp(min=0).prod(-1)
    return overlap, _area(boxes_N4) + _area(others_N4) - overlap


def _area(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[..., 2:] - boxes_N4[..., :2]).clamp(min=0).prod(-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the whole is 0; gradients stay finite, too."""
    nothing = whole <= 0
    return torch.where(nothing, 0.0, part / torch.where(nothing, 1.0, whole))


def _as_floats(boxes_N4: Tensor, others_N4: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 or wider: areas of half-precision boxes overflow or lose too much."""
    if boxes_N4.shape != others_N4.shape or boxes_N4.shape[-1:] != (4,):
        raise ValueError(f"boxes must be pairs of (..., 4), got {_shapes(boxes_N4, others_N4)}")
    dtype = torch.promote_types(torch.promote_types(boxes_N4.dtype, others_N4.dtype), torch.float32)
    return boxes_N4.to(dtype), others_N4.to(dtype)


def _check_pairs(predicted_N4: Tensor, expected_N4: Tensor) -> None:
    if predicted_N4.shape != expected_N4.shape or predicted_N4.ndim != 2 or predicted_N4.shape[1] != 4:
        raise ValueError(f"predicted and expected boxes must be (N, 4), got {_shapes(predicted_N4, expected_N4)}")
    if not len(expected_N4):
        raise ValueError("there are no boxes to compare")
    for name, boxes_N4 in (("predicted", predicted_N4), ("expected", expected_N4)):
        broken_N = ~boxes_N4.isfinite().all(dim=1)
        if broken_N.any():
            row = int(broken_N.int().argmax())
            raise ValueError(f"{name} box {row} is not finite: {boxes_N4[row].tolist()}")
    # A little slack for what rounding adds in going from one format to another.
    outside_N = ((expected_N4 < -1e-3) | (expected_N4 > 1 + 1e-3)).any(dim=1)
    if outside_N.any():
        row = int(outside_N.int().argmax())
        raise ValueError(f"expected box {row} is not normalised to 0..1: {expected_N4[row].tolist()}")


def _shapes(boxes_N4: Tensor, others_N4: Tensor) -> str:
    return f"{tuple(boxes_N4.shape)} and {tuple(others_N4.shape)}"
