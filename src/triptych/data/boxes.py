"""Pictures with phrases and the boxes they refer to: the transforms of visual grounding, and boxes as tokens.

Shapes: N phrases with a box each, C 3 colours, H and W height and width in pixels. Boxes are xyxy (left, top, right,
bottom) in pixels of a picture; or cxcywh (centre x, centre y, width, height), normalised to 0..1 on the canvas, the
padded square that the network sees.

The augmentation is that of TransVG (datasets/transforms.py), which mPLUG took over (dataset/vg_transforms.py and
dataset/grounding_dataset.py). Where ours differs from theirs:

1. Crops hold all boxes whole. Theirs need only a box's centre x to exceed the crop's *top*, and its centre y the crop's
   *left* edge, so that boxes are cut, or lost.
2. Mirrored phrases change sides in words that say a side; theirs wherever the letters are: "bright" becomes "bleft".
3. A picture is resampled once, not twice where it is cropped, and the geometry of crops does not depend on the canvas.
4. Boxes are scaled exactly as their picture, whose sides are rounded to whole pixels; theirs by the unrounded factor.
5. Padding is the mean colour; theirs is 0 after normalisation, from which ours differs by at most half a step of 255.
6. Mean and standard deviation are those of the `Preprocessing`, always; mPLUG trains with CLIP's and evaluates with
   ImageNet's. To evaluate as they do, give a `Preprocessing` that says so.
7. Phrases keep their case, which BERT's tokenisers lower anyway.

`TrainingTransform(..., official=True)` has 1 and 2 as they were. Kept from theirs: a phrase with "left", "right",
"top", "bottom" or "middle" anywhere in it, also in "laptop", is never cropped; that costs some crops, no more. And
mirroring does not know that the "right" of "right behind" says no side.

Randomness comes from torch's global CPU generator alone: run a `TrainingTransform` in `triptych.data.loader.seeded`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from triptych.data.samples import BrokenSample, Record
from triptych.data.transforms import Preprocessing, to_tensor

BINS = 336
"""mPLUG's coordinate tokens stand for 0/336, 1/336 ... 336/336 of the canvas, which makes 337 of them."""

Extent = tuple[int, int, int, int]
"""Left, top, right and bottom of the picture proper in the canvas, in pixels; around it is padding."""

_SCALES = 7  # long sides to choose from: 20, 19 ... 14 twentieths of the canvas
_SHORT_SIDES = (400, 500, 600)  # a crop takes 384 to 600 pixels of a picture whose short side has so many
_CROP_SIDES = (384, 600)
_CROP_TRIES = 20
_PLACES = ("left", "right", "top", "bottom", "middle")
_MIRRORED = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "right": "left", "Right": "Left", "RIGHT": "LEFT"}
_NAMES = ("identifier", "ref_id", "sent_id")
_SIDES = re.compile("|".join(_MIRRORED))
_SIDE_WORDS = re.compile(rf"\b(?:{_SIDES.pattern})(?=(?:most|est|iest|ish|side|hand|y)?\b)")


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Expression:
    """A referring expression: a phrase, and the box, in pixels, of what it refers to; None where that is not said.

    `names` has what the source calls it by: "ref_id", "sent_id" and "identifier", those there are.
    """

    text: str
    box_xyxy: Box | None
    names: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grounded:
    """A picture on its canvas.

    Attributes:
        pixels_CHW: uint8, square.
        boxes_N4: float32, cxcywh, normalised on the canvas.
        phrases: N texts; sides are swapped where the picture was mirrored.
        extent: where the canvas is picture and not padding.
    """

    pixels_CHW: Tensor
    boxes_N4: Tensor
    phrases: tuple[str, ...]
    extent: Extent


def record_expressions(record: Record) -> list[Expression]:
    """What a record's `extra` refers to: its "phrase" and "box_xyxy", or all "phrases", each {"text", "box_xyxy"}.

    A phrase without a box is one to be located: those of a test set, or of a user.

    Raises:
        BrokenSample: there are none, or one has no text, or a box without an area.
    """
    entries = record.extra.get("phrases")
    if entries is None:
        entries = [{**record.extra, "text": record.extra.get("phrase")}]
    if not isinstance(entries, Sequence) or not entries:
        raise BrokenSample(record.key, "it has no phrases")
    try:
        return [_expression(entry) for entry in entries]
    except (ValueError, OverflowError) as error:  # a whole number can be too large for a float
        raise BrokenSample(record.key, str(error)) from error


def _expression(entry: Any) -> Expression:
    if not isinstance(entry, Mapping):
        raise ValueError(f"a phrase must have 'text' and 'box_xyxy', got {str(entry)[:60]!r}")
    text, box = entry.get("text"), entry.get("box_xyxy")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the phrase must be a text, got {text!r}")
    names = {name: entry[name] for name in _NAMES if name in entry}
    return Expression(text, None if box is None else _box(text, box), names)


def _box(text: str, box: Any) -> Box:
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(number, int | float) for number in box):
        raise ValueError(f"the box of {text!r} must be four numbers, got {str(box)[:60]!r}")
    left, top, right, bottom = map(float, box)
    if not all(map(math.isfinite, (left, top, right, bottom))) or right <= left or bottom <= top:
        raise ValueError(f"the box of {text!r} has no area: {list(box)}")
    return left, top, right, bottom


@dataclass(frozen=True)
class EvaluationTransform:
    """The whole picture, its long side scaled to the canvas (bilinear), in the middle of padding; nothing random.

    A call takes an RGB picture of any size, its boxes [N, 4] (xyxy, pixels) and N phrases.

    Raises:
        ValueError (in the call): a box does not overlap the picture, or the numbers of boxes and phrases differ.
    """

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image, boxes_N4: Tensor, phrases: Sequence[str]) -> Grounded:
        size = self.preprocessing.image_size
        image, boxes = _resize_long_side(*_pair(image, boxes_N4, phrases), size)
        left, top = (size - image.width) // 2, (size - image.height) // 2
        return _on_canvas(self.preprocessing, image, boxes, phrases, left, top)


@dataclass(frozen=True)
class TrainingTransform:
    """TransVG's and mPLUG's augmentation; see the top of the file. Call and errors as of `EvaluationTransform`.

    A crop for every second picture whose phrases speak of no place, of 0.64 to 1.5 times the short side and at most the
    picture, that holds all boxes (none in 20 tries: no crop). Then the long side becomes 0.7 to 1 of the canvas;
    brightness, contrast and saturation change by up to 40 % in 4 of 5 pictures; every second one is mirrored, its
    phrases with it; and it goes anywhere on the canvas.

    Args:
        preprocessing: its `image_size` is the canvas, its `mean` the colour of the padding.
        official: choose crops and mirror phrases as the official code does, faults included: crops cut boxes, and a few
            lose them. For repeating a published training.
    """

    preprocessing: Preprocessing
    official: bool = False

    def __call__(self, image: Image.Image, boxes_N4: Tensor, phrases: Sequence[str]) -> Grounded:
        from torchvision.transforms.v2 import functional

        size = self.preprocessing.image_size
        image, boxes = _pair(image, boxes_N4, phrases)
        if not any(_speaks_of_place(phrase) for phrase in phrases) and torch.rand(()) < 0.5:
            image, boxes = self._crop(image, boxes)
        image, boxes = _resize_long_side(image, boxes, size - size // 20 * _random(0, _SCALES - 1))
        image = _jitter(image)
        if torch.rand(()) < 0.5:
            image, boxes = functional.horizontal_flip(image), functional.horizontal_flip(boxes)
            phrases = [mirror_phrase(phrase, whole_words=not self.official) for phrase in phrases]
        left, top = _random(0, size - image.width), _random(0, size - image.height)
        return _on_canvas(self.preprocessing, image, boxes, phrases, left, top)

    def _crop(self, image: Image.Image, boxes: Any) -> tuple[Image.Image, Any]:
        from torchvision.transforms.v2 import functional

        unit = min(image.size) / _SHORT_SIDES[_random(0, len(_SHORT_SIDES) - 1)]
        smallest, largest = (round(side * unit) for side in _CROP_SIDES)
        for _ in range(_CROP_TRIES):
            width = _random(smallest, min(image.width, largest))
            height = _random(smallest, min(image.height, largest))
            left, top = _random(0, image.width - width), _random(0, image.height - height)
            if self._accepts(left, top, width, height, boxes):
                region = (top, left, height, width)
                return functional.crop(image, *region), functional.crop(boxes, *region)
        return image, boxes

    def _accepts(self, left: int, top: int, width: int, height: int, boxes_N4: Tensor) -> bool:
        start_N2, end_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
        if self.official:  # x against the top and y against the left: the two are swapped in the original
            return bool(((start_N2 + end_N2) / 2 > torch.tensor([top, left])).all())
        inside = (start_N2 >= torch.tensor([left, top])) & (end_N2 <= torch.tensor([left + width, top + height]))
        return bool(inside.all())


def mirror_phrase(phrase: str, whole_words: bool = True) -> str:
    """The phrase for the mirrored picture: left and right change places; twice gives the phrase again.

    By default in the words left, leftmost, leftest, leftish, leftside, lefthand, lefty and their counterparts, so that
    "bright", "upright" and "leftover" stay; otherwise wherever the letters occur (TransVG).
    """
    pattern = _SIDE_WORDS if whole_words else _SIDES
    return pattern.sub(lambda side: _MIRRORED[side[0]], phrase)


def to_picture(boxes_N4: Tensor, extent: Extent, canvas: int, width: int, height: int) -> Tensor:
    """Boxes on the canvas (cxcywh, normalised) as xyxy in pixels of the picture, cut at its edges: for predictions.

    All are of one picture of `width` x `height` pixels that fills `extent` of a canvas of `canvas` pixels, whole, not
    mirrored, as in evaluation.
    """
    from torchvision.ops import box_convert, clip_boxes_to_image

    left, top, right, bottom = extent
    offset_4 = boxes_N4.new_tensor([left, top, left, top])
    scale_4 = boxes_N4.new_tensor([width / (right - left), height / (bottom - top)]).repeat(2)
    pixels_N4 = (box_convert(boxes_N4, "cxcywh", "xyxy") * canvas - offset_4) * scale_4
    return clip_boxes_to_image(pixels_N4, (height, width))


def boxes_to_bins(boxes_N4: Tensor, bins: int = BINS) -> Tensor:
    """Normalised numbers (any shape) as whole numbers 0..bins: floor(clamp(number, 0, 1) * bins); int64.

    mPLUG's coordinate tokens (models/model_grounding_mplug.py). Only 1 itself falls into the last bin. In float32 a
    number of `bins_to_boxes` can come back one bin lower, as in the official code.

    Raises:
        ValueError: a number is not finite, or bins is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not boxes_N4.isfinite().all():
        raise ValueError("boxes hold numbers that are not finite")
    return (boxes_N4.float().clamp(0, 1) * bins).floor().long()


def bins_to_boxes(bins_N4: Tensor, bins: int = BINS) -> Tensor:
    """Whole numbers 0..bins as normalised numbers, float32: the lower edge of each bin.

    Raises:
        ValueError: a number is outside 0..bins.
    """
    if ((bins_N4 < 0) | (bins_N4 > bins)).any():
        raise ValueError(f"bins must be in 0..{bins}, got {int(bins_N4.min())} to {int(bins_N4.max())}")
    return bins_N4.float() / bins


def _speaks_of_place(phrase: str) -> bool:
    return any(place in phrase.lower() for place in _PLACES)


def _pair(image: Image.Image, boxes_N4: Tensor, phrases: Sequence[str]) -> tuple[Image.Image, Any]:
    """The picture, and its boxes as torchvision transforms them, cut at the picture's edges."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    if boxes_N4.shape != (len(phrases), 4):
        raise ValueError(f"boxes must be (N, 4) for N phrases, got {tuple(boxes_N4.shape)} for {len(phrases)}")
    canvas = (image.height, image.width)
    boxes = functional.clamp_bounding_boxes(
        tv_tensors.BoundingBoxes(boxes_N4.float(), format="XYXY", canvas_size=canvas)
    )
    usable_N = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if not usable_N.all():
        box = boxes_N4[int(usable_N.int().argmin())].tolist()
        raise ValueError(f"the box {box} has no area in the picture of {image.width} x {image.height} pixels")
    return image, boxes


def _resize_long_side(image: Image.Image, boxes: Any, long_side: int) -> tuple[Image.Image, Any]:
    from torchvision.transforms.v2 import functional

    ratio = long_side / max(image.size)
    size = [max(1, round(side * ratio)) for side in (image.height, image.width)]
    return functional.resize(image, size), functional.resize(boxes, size)


def _jitter(image: Image.Image) -> Image.Image:
    from torchvision.transforms import v2

    return v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.8)(image)


def _on_canvas(
    preprocessing: Preprocessing, image: Image.Image, boxes: Any, phrases: Sequence[str], left: int, top: int
) -> Grounded:
    from torchvision.transforms.v2 import functional

    size = preprocessing.image_size
    extent = (left, top, left + image.width, top + image.height)
    padding = [left, top, size - extent[2], size - extent[3]]
    fill = [round(255 * mean) for mean in preprocessing.mean]
    boxes = functional.convert_bounding_box_format(functional.pad(boxes, padding), new_format="CXCYWH")
    pixels_CHW = to_tensor(functional.pad(image, padding, fill=fill))
    return Grounded(pixels_CHW, boxes.as_subclass(Tensor) / size, tuple(phrases), extent)


def _random(smallest: int, largest: int) -> int:
    """A whole number from `smallest` to `largest`, both included."""
    return int(torch.randint(smallest, largest + 1, ()))
