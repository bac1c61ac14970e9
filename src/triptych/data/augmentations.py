"""Random changes of colours and geometry, for training.

Randomness comes from torch's global CPU generator alone, and torchvision is imported where it is used, as in
:mod:`triptych.data.transforms`. Its own RandAugment has other operations and magnitudes than either of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from PIL import Image, ImageEnhance, ImageOps

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


@dataclass(frozen=True)
class RandomAugment:
    """ALBEF's, BLIP's and mPLUG's RandomAugment(N, M) on an RGB picture (their randaugment.py).

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
            operation = self.operations[int(torch.randint(len(self.operations), ()))]
            if torch.rand(()) < self.probability:
                sign = 1 if torch.rand(()) < 0.5 else -1
                image = augment(image, operation, self.level, sign)
        return image


def augment(image: Image.Image, operation: Operation, level: float, sign: int = 1) -> Image.Image:
    """One operation of RandomAugment at `level` of 0..10; `sign` turns the geometric ones round."""
    from torchvision.transforms.v2 import functional

    share = level / 10
    match operation:
        case "Identity":
            return image
        case "AutoContrast":
            return functional.autocontrast(image)
        case "Equalize":
            return functional.equalize(image)
        case "Brightness":
            return functional.adjust_brightness(image, share * 1.8 + 0.1)
        case "Sharpness":
            return functional.adjust_sharpness(image, share * 1.8 + 0.1)
        case "ShearX":
            return _affine(image, shear=(-sign * share * 0.3, 0))
        case "ShearY":
            return _affine(image, shear=(0, -sign * share * 0.3))
        case "TranslateX":
            return _affine(image, translate=(-sign * share * 10, 0))
        case "TranslateY":
            return _affine(image, translate=(0, -sign * share * 10))
        case "Rotate":
            return _affine(image, -sign * share * 30, origin=(image.width / 2, image.height / 2))


def _affine(
    image: Image.Image,
    angle: float = 0.0,
    translate: tuple[float, float] = (0, 0),
    shear: tuple[float, float] = (0, 0),
    origin: tuple[float, float] = (0, 0),
) -> Image.Image:
    """`angle` in degrees clockwise and `shear` as slopes, about the pixel whose centre is `origin`.

    OpenCV, which the official code uses, counts from pixel centres and Pillow from corners, hence the halves.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional

    return functional.affine(
        image,
        angle,
        translate,
        scale=1.0,
        shear=[math.degrees(math.atan(slope)) for slope in shear],
        interpolation=InterpolationMode.BILINEAR,
        fill=GREY,
        center=[pixel + 0.5 for pixel in origin],
    )


Distortion = Literal[
    "AutoContrast",
    "Equalize",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
]
DISTORTIONS: tuple[Distortion, ...] = get_args(Distortion)


@dataclass(frozen=True)
class RandAugment:
    """METER's and BridgeTower's RandAugment(N, M) on an RGB picture (their transforms/randaug.py): much stronger.

    `count` of the 14 distortions are drawn with replacement and applied at `level` of 0..30; geometric ones take a
    random sign and fill with black. BridgeTower takes level 7 after a random crop, and 9 on the whole picture where
    nothing was pre-trained (``clip_randaug``, which distorts before it resizes).
    """

    count: int = 2
    level: float = 7

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 30:
            raise ValueError(f"level must be in 0..30, got {self.level}")

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.count):
            distortion = DISTORTIONS[int(torch.randint(len(DISTORTIONS), ()))]
            sign = 1 if torch.rand(()) < 0.5 else -1
            image = distort(image, distortion, self.level, sign)
        return image


@dataclass(frozen=True)
class ColourJitter:
    """VLMo's and EVE's retrieval: brightness, contrast and saturation, in a random order, of an RGB picture.

    Each is multiplied by a factor drawn from ``1 - x`` to ``1 + x`` (torchvision's ColorJitter, which they use).
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import v2

        jittered: Image.Image = v2.ColorJitter(self.brightness, self.contrast, self.saturation)(image)
        return jittered


Augmentation = RandomAugment | RandAugment | ColourJitter


def distort(image: Image.Image, distortion: Distortion, level: float, sign: int = 1) -> Image.Image:
    """One distortion of RandAugment at `level` of 0..30; `sign` turns the geometric ones round."""
    share = level / 30
    factor = 0.1 + 1.8 * share
    match distortion:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Rotate":
            return image.rotate(sign * share * 30)
        case "Posterize":
            return ImageOps.posterize(image, max(1, int(share * 4)))  # to 1 bit at level 7
        case "Solarize":
            return ImageOps.solarize(image, math.ceil(share * 256))
        case "SolarizeAdd":
            lighter = [min(255, int(value + share * 110)) for value in range(256)]
            return ImageOps.solarize(image.point(lighter * 3), 128)
        case "Color":
            return ImageEnhance.Color(image).enhance(factor)
        case "Contrast":
            return ImageEnhance.Contrast(image).enhance(factor)
        case "Brightness":
            return ImageEnhance.Brightness(image).enhance(factor)
        case "Sharpness":
            return ImageEnhance.Sharpness(image).enhance(factor)
        case "ShearX":
            return _map(image, (1, sign * share * 0.3, 0, 0, 1, 0))
        case "ShearY":
            return _map(image, (1, 0, 0, sign * share * 0.3, 1, 0))
        case "TranslateX":
            return _map(image, (1, 0, sign * share * 100, 0, 1, 0))
        case "TranslateY":
            return _map(image, (1, 0, 0, 0, 1, sign * share * 100))


def _map(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)
