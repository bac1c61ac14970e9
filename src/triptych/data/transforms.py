"""Picture transforms: random in training, fixed in evaluation, normalised on the device.

Shapes: B batch, C 3 colours, H and W height and width in pixels.

Everything up to the tensor is torchvision's v2 transforms on Pillow pictures: the official code resizes with
the same filter. Tensors leave as uint8 (a quarter of the bytes to move to the device); `normalize` runs there.
Randomness comes from torch's global CPU generator alone: run a training transform inside
`triptych.data.loader.seeded`. torchvision is imported where it is used, since that takes more than a second
and models, which say how they want their pictures, import this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from triptych.data.augmentations import Augmentation, RandomAugment

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of EVE (and of BEiT): pixels in -1..1."""

Triple = tuple[float, float, float]
Transform = Callable[[Image.Image], Tensor]
"""RGB picture of any size -> uint8 tensor (C, image_size, image_size)."""

FrameRule = Literal["uniform", "official"]
FrameDecoder = Literal["pyav", "torchcodec"]
Resize = Literal["squash", "crop", "port"]

_MPLUG = RandomAugment()


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

    ``decoder`` is what :func:`triptych.data.video.read_frames` decodes them with. It is asked for, never chosen by what
    is installed: of damaged files torchcodec gives other frames than PyAV.
    """

    count: int = 8
    rule: FrameRule = "uniform"
    decoder: FrameDecoder = "pyav"

    def __post_init__(self) -> None:
        if self.count < 1 or self.rule not in get_args(FrameRule):
            raise ValueError(f"frames need a count from 1 on and uniform or official, got {self.count}, {self.rule!r}")
        if self.decoder not in get_args(FrameDecoder):
            raise ValueError(f"frames are decoded by {' or '.join(get_args(FrameDecoder))}, not {self.decoder!r}")


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures.

    Attributes:
        image_size: height and width in pixels.
        mean, std: of each colour, for pixels in 0..1.
        resize: what evaluation does with other aspect ratios: "squash" to a square (mPLUG, ALBEF, EVE, BridgeTower's
            fine-tuning), or scale the shorter side and "crop" the centre (CLIP, BridgeTower's pre-training). "port" is
            what transformers does for BridgeTower, :func:`as_the_port`: only to reproduce its numbers.
        frames: what is seen of a video.
    """

    image_size: int
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    resize: Resize = "squash"
    frames: FrameChoice = field(default_factory=FrameChoice)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std above 0; got {self.mean} and {self.std}")
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize must be one of {', '.join(get_args(Resize))}, got {self.resize!r}")

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

        if self.resize == "port":
            return partial(as_the_port, image_size=self.image_size)
        return v2.Compose([*self._whole(), to_tensor])

    def train_transform(
        self,
        scale: tuple[float, float] | None = (0.2, 1.0),
        augment: Augmentation | None = _MPLUG,
        flip: bool = True,
    ) -> Transform:
        """The transform of training (mPLUG dataset/__init__.py; microsoft/BridgeTower src/transforms/transform.py).

        Args:
            scale: range of the random crop's share of the picture: (0.2, 1.0) in mPLUG's pre-training, (0.5, 1.0) in
                fine-tuning; None keeps the whole picture, resized as in evaluation ("port": as "crop").
            augment: what is done to colours and geometry, after crop and flip: mPLUG's RandomAugment(2, 7);
                RandomAugment(2, 5) for BridgeTower's VQA (``blip_randaug_wohf``), RandAugment(2, 7) for its other
                fine-tunings (``blip_randaug_wc``), None in its pre-training.
            flip: mirror every second picture; not where texts say left and right, and not in BridgeTower's VQA.
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
        if augment is not None:
            steps.append(augment)
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


def as_the_port(image: Image.Image, image_size: int) -> Tensor:
    """RGB picture -> uint8 tensor (C, image_size, image_size), as transformers' BridgeTowerImageProcessor makes it.

    The shorter side becomes `image_size` and the longer at most 1333/800 of it; both are squeezed to multiples of 32,
    and the centre is cropped. So most pictures lose their aspect, and those longer than 5:3 leave a part of the square
    black: the published weights were not trained with this. A side that would vanish, where transformers fails, keeps
    32 pixels.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional

    scale = image_size / min(image.height, image.width)
    height, width = scale * image.height, scale * image.width
    shrink = min(1.0, int(1333 / 800 * image_size) / max(height, width))
    height, width = (max(32, int(side * shrink + 0.5) // 32 * 32) for side in (height, width))
    pixels_CHW = functional.resize(to_tensor(image), [height, width], InterpolationMode.BICUBIC, antialias=True)
    top, left = (int((side - image_size) / 2) for side in (height, width))
    return functional.crop(pixels_CHW, top, left, image_size, image_size).contiguous()
