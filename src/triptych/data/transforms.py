"""Picture transforms: random in training, fixed in evaluation, normalised on the device.

Shapes: B batch, C 3 colours, H and W height and width in pixels.

Everything up to the tensor runs in Pillow, as the official code's resizing does, so numbers agree with it and
no compiled image library has to match the installed torch. Tensors leave as uint8 (a quarter of the bytes to
move to the device); `normalize` runs there. Randomness comes from torch's global CPU generator alone: run a
training transform inside `triptych.data.loader.seeded`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of EVE (and of BEiT): pixels in -1..1."""

Triple = tuple[float, float, float]
Transform = Callable[[Image.Image], Tensor]
"""RGB picture of any size -> uint8 tensor (C, image_size, image_size)."""

Operation = Literal[
    "Identity",
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
GREY = (128, 128, 128)


def normalize(
    pixels_BCHW: Tensor, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD, dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 pixels (..., 3, H, W) as (pixel / 255 - mean) / std, computed in float32 and cast to `dtype`."""
    if pixels_BCHW.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 pixels, got {pixels_BCHW.dtype}: are they normalised already?")
    mean_C11 = torch.tensor(mean, device=pixels_BCHW.device).view(3, 1, 1)
    std_C11 = torch.tensor(std, device=pixels_BCHW.device).view(3, 1, 1)
    return pixels_BCHW.float().div_(255).sub_(mean_C11).div_(std_C11).to(dtype)


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures.

    Attributes:
        image_size: height and width in pixels.
        mean, std: of each colour, for pixels in 0..1.
        resize: what evaluation does with other aspect ratios: "squash" to a square (mPLUG, ALBEF, EVE), or
            scale the shorter side and "crop" the centre (CLIP, BridgeTower's pre-training).
    """

    image_size: int
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    resize: Literal["squash", "crop"] = "squash"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std above 0; got {self.mean} and {self.std}")
        if self.resize not in ("squash", "crop"):
            raise ValueError(f"resize must be 'squash' or 'crop', got {self.resize!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`; unknown or missing fields are a ValueError."""
        try:
            named = cls(**values)
        except TypeError as error:
            raise ValueError(f"not a preprocessing configuration: {error}") from error
        mean, std = tuple(map(float, named.mean)), tuple(map(float, named.std))
        return cls(named.image_size, mean, std, named.resize)  # type: ignore[arg-type]

    def test_transform(self) -> Transform:
        """The transform of evaluation: the whole picture, nothing random."""
        return TestTransform(self.image_size, self.resize)

    def train_transform(
        self, scale: tuple[float, float] | None = (0.2, 1.0), augment: bool = True, flip: bool = True
    ) -> Transform:
        """The transform of training (mPLUG dataset/__init__.py).

        Args:
            scale: range of the random crop's share of the picture: (0.2, 1.0) in pre-training, (0.5, 1.0) in
                fine-tuning; None keeps the whole picture, resized as in evaluation.
            augment: RandomAugment with 2 operations of magnitude 7.
            flip: mirror every second picture; not where texts say left and right.
        """
        return TrainTransform(self.image_size, self.resize, scale, RandomAugment() if augment else None, flip)

    def normalize(self, pixels_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`normalize` with this mean and std."""
        return normalize(pixels_BCHW, self.mean, self.std, dtype)


@dataclass(frozen=True)
class TestTransform:
    """See `Preprocessing.test_transform`."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    image_size: int
    resize: Literal["squash", "crop"]

    def __call__(self, image: Image.Image) -> Tensor:
        return to_tensor(resize_whole(image, self.image_size, self.resize))


@dataclass(frozen=True)
class TrainTransform:
    """See `Preprocessing.train_transform`."""

    image_size: int
    resize: Literal["squash", "crop"]
    scale: tuple[float, float] | None
    augment: RandomAugment | None
    flip: bool

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (smallest, largest) with 0 < smallest <= largest <= 1: {self.scale}")

    def __call__(self, image: Image.Image) -> Tensor:
        if self.scale is None:
            image = resize_whole(image, self.image_size, self.resize)
        else:
            image = random_resized_crop(image, self.image_size, self.scale)
        if self.flip and _uniform() < 0.5:
            image = ImageOps.mirror(image)
        if self.augment is not None:
            image = self.augment(image)
        return to_tensor(image)


@dataclass(frozen=True)
class RandomAugment:
    """ALBEF's and mPLUG's RandomAugment(N, M) on an RGB picture (their dataset/randaugment.py).

    `count` operations are drawn with replacement from `operations`, and each is applied with probability
    `probability` at `level` of 0..10; geometric ones take a random sign and fill with grey.
    """

    count: int = 2
    level: float = 7
    operations: tuple[Operation, ...] = OPERATIONS
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 10:
            raise ValueError(f"level must be in 0..10, got {self.level}")
        if not set(self.operations) <= set(OPERATIONS) or not self.operations:
            raise ValueError(f"operations must be among {OPERATIONS}, got {self.operations}")

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.count):
            operation = self.operations[_integer(len(self.operations))]
            if _uniform() < self.probability:
                sign = 1 if _uniform() < 0.5 else -1
                image = augment(image, operation, self.level, sign)
        return image


def augment(image: Image.Image, operation: Operation, level: float, sign: int = 1) -> Image.Image:
    """One operation of RandomAugment at `level` of 0..10; `sign` turns the geometric ones round."""
    share = level / 10
    match operation:
        case "Identity":
            return image
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Brightness":
            return ImageEnhance.Brightness(image).enhance(share * 1.8 + 0.1)
        case "Sharpness":
            return ImageEnhance.Sharpness(image).enhance(share * 1.8 + 0.1)
        case "ShearX":
            return _affine(image, (1, -sign * share * 0.3, 0), (0, 1, 0))
        case "ShearY":
            return _affine(image, (1, 0, 0), (-sign * share * 0.3, 1, 0))
        case "TranslateX":
            return _affine(image, (1, 0, sign * share * 10), (0, 1, 0))
        case "TranslateY":
            return _affine(image, (1, 0, 0), (0, 1, sign * share * 10))
        case "Rotate":
            angle = math.radians(sign * share * 30)
            cos, sin = math.cos(angle), math.sin(angle)
            x, y = image.width / 2, image.height / 2
            return _affine(image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def random_resized_crop(image: Image.Image, image_size: int, scale: tuple[float, float]) -> Image.Image:
    """A random part of the picture, `scale` of its area and 3/4 to 4/3 in shape, as a square (bicubic).

    The crop is drawn as torchvision's RandomResizedCrop draws it: ten tries, then the central crop.
    """
    left, upper, width, height = _draw_crop(image.width, image.height, scale)
    part = image.crop((left, upper, left + width, upper + height))
    return part.resize((image_size, image_size), Image.Resampling.BICUBIC)


def _draw_crop(full_width: int, full_height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, upper, width, height) in pixels."""
    narrow, wide = 3 / 4, 4 / 3
    for _ in range(10):
        area = full_width * full_height * _uniform(*scale)
        shape = math.exp(_uniform(math.log(narrow), math.log(wide)))
        width, height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < width <= full_width and 0 < height <= full_height:
            left, upper = _integer(full_width - width + 1), _integer(full_height - height + 1)
            return left, upper, width, height
    width = min(full_width, max(1, round(full_height * wide)))
    height = min(full_height, max(1, round(full_width / narrow)))
    return (full_width - width) // 2, (full_height - height) // 2, width, height


def resize_whole(image: Image.Image, image_size: int, resize: Literal["squash", "crop"]) -> Image.Image:
    """The picture as a square of `image_size`, bicubic; see `Preprocessing.resize`."""
    if resize == "squash":
        return image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, upper = round((width - image_size) / 2), round((height - image_size) / 2)
    return image.crop((left, upper, left + image_size, upper + image_size))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 tensor (C, H, W)."""
    pixels_HWC = np.array(image)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()


def _affine(image: Image.Image, x_row: tuple[float, float, float], y_row: tuple[float, float, float]) -> Image.Image:
    """Output pixel (x, y) shows the input at (x_row . (x, y, 1), y_row . (x, y, 1)); outside it is grey.

    Coordinates are those of pixel centres, as in OpenCV, which the official code uses. Pillow counts from
    pixel corners, hence the halves.
    """
    (a, b, c), (d, e, f) = x_row, y_row
    matrix = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _uniform(low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))


def _integer(end: int) -> int:
    return int(torch.randint(end, ()))
