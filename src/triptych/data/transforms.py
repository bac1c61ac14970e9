"""Picture transforms: random in training, fixed in evaluation, normalised on the device.

Shapes: B batch, C 3 colours, H and W height and width in pixels.

Everything up to the tensor is torchvision's v2 transforms on Pillow pictures: the official code resizes with
the same filter. Tensors leave as uint8 (a quarter of the bytes to move to the device); `normalize` runs there.
Randomness comes from torch's global CPU generator alone: run a training transform inside
`triptych.data.loader.seeded`. torchvision is imported where it is used, since that takes more than a second
and models, which say how they want their pictures, import this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of EVE (and of BEiT): pixels in -1..1."""

Triple = tuple[float, float, float]
Transform = Callable[[Image.Image], Tensor]
"""RGB picture of any size -> uint8 tensor (C, image_size, image_size)."""

FrameRule = Literal["uniform", "official"]

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
class FrameChoice:
    """Which frames of a clip are looked at: ``count``, chosen by ``rule`` (:func:`triptych.data.video.frame_indices`).

    mPLUG's paper takes 8 for retrieval; its code 12 for retrieval, 16 for questions and 8 for captions.
    """

    count: int = 8
    rule: FrameRule = "uniform"

    def __post_init__(self) -> None:
        if self.count < 1 or self.rule not in get_args(FrameRule):
            raise ValueError(f"frames need a count from 1 on and uniform or official, got {self.count}, {self.rule!r}")


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures.

    Attributes:
        image_size: height and width in pixels.
        mean, std: of each colour, for pixels in 0..1.
        resize: what evaluation does with other aspect ratios: "squash" to a square (mPLUG, ALBEF, EVE), or
            scale the shorter side and "crop" the centre (CLIP, BridgeTower's pre-training).
        frames: what is seen of a video.
    """

    image_size: int
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    resize: Literal["squash", "crop"] = "squash"
    frames: FrameChoice = field(default_factory=FrameChoice)

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
            frames = named.frames if isinstance(named.frames, FrameChoice) else FrameChoice(**named.frames)
        except TypeError as error:
            raise ValueError(f"not a preprocessing configuration: {error}") from error
        mean, std = tuple(map(float, named.mean)), tuple(map(float, named.std))
        return cls(named.image_size, mean, std, named.resize, frames)  # type: ignore[arg-type]

    def test_transform(self) -> Transform:
        """The transform of evaluation: the whole picture, nothing random."""
        from torchvision.transforms import v2

        return v2.Compose([*self._whole(), to_tensor])

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
        from torchvision.transforms import v2

        if scale is None:
            steps = self._whole()
        elif 0 < scale[0] <= scale[1] <= 1:
            steps = [v2.RandomResizedCrop(self.image_size, scale, interpolation=v2.InterpolationMode.BICUBIC)]
        else:
            raise ValueError(f"scale must be (smallest, largest) with 0 < smallest <= largest <= 1: {scale}")
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if augment:
            steps.append(RandomAugment())
        return v2.Compose([*steps, to_tensor])

    def normalize(self, pixels_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`normalize` with this mean and std."""
        return normalize(pixels_BCHW, self.mean, self.std, dtype)

    def _whole(self) -> list[Callable[[Image.Image], Image.Image]]:
        """The steps that make a square of the whole picture."""
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        if self.resize == "squash":
            return [v2.Resize((self.image_size, self.image_size), bicubic)]
        return [v2.Resize(self.image_size, bicubic), v2.CenterCrop(self.image_size)]


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 tensor (C, H, W)."""
    from torchvision.transforms.v2 import functional

    return functional.pil_to_tensor(image).contiguous()


@dataclass(frozen=True)
class RandomAugment:
    """ALBEF's and mPLUG's RandomAugment(N, M) on an RGB picture (their dataset/randaugment.py).

    `count` operations are drawn with replacement from `operations`, and each is applied with probability
    `probability` at `level` of 0..10; geometric ones take a random sign and fill with grey. torchvision's own
    RandAugment has other operations and magnitudes.
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
