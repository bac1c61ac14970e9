"""What every model offers, so that every objective and task works with every model.

Shape legend: B batch, N image tokens, L text tokens, D width, E embedding width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from triptych.models.text import TextDecoder


@dataclass(frozen=True)
class Encoded:
    """One modality, encoded once, to be fused many times.

    Attributes:
        hidden_BLD: the final states; token 0 summarises the whole.
        mask_BL: bool, ``True`` where a token is real; ``None`` when every token is.
        levels: states of earlier layers, lowest first, for models that connect levels.
        frames: F; of how many pictures the tokens are, one after the other (a clip; token 0 is that of the first).
    """

    hidden_BLD: Tensor
    mask_BL: Tensor | None = None
    levels: tuple[Tensor, ...] = ()
    frames: int = 1

    def __len__(self) -> int:
        return self.hidden_BLD.shape[0]

    def rows(self, index: Tensor | slice) -> Encoded:
        """The given rows of the batch, repeated or reordered as the index says."""
        mask_BL = None if self.mask_BL is None else self.mask_BL[index]
        return Encoded(self.hidden_BLD[index], mask_BL, tuple(level[index] for level in self.levels), self.frames)

    def detach(self) -> Encoded:
        """The same states without their graph."""
        return Encoded(self.hidden_BLD.detach(), self.mask_BL, tuple(x.detach() for x in self.levels), self.frames)

    def to(self, *args: Any, **kwargs: Any) -> Encoded:
        """States moved or cast as ``Tensor.to`` does; the mask only moved."""
        mask_BL = self.mask_BL
        hidden_BLD = self.hidden_BLD.to(*args, **kwargs)
        if mask_BL is not None:
            mask_BL = mask_BL.to(hidden_BLD.device)
        levels = tuple(level.to(*args, **kwargs) for level in self.levels)
        return Encoded(hidden_BLD, mask_BL, levels, self.frames)

    def as_clips(self, frames: int) -> Encoded:
        """Every ``frames`` consecutive rows, pictures of equal size, as one row."""
        hidden_BLD, *levels = (x.reshape(-1, frames * x.shape[1], x.shape[2]) for x in (self.hidden_BLD, *self.levels))
        return Encoded(hidden_BLD, None, tuple(levels), frames)

    def mean_frame(self) -> Encoded:
        """The mean over the frames of each row."""
        if self.frames == 1:
            return self
        sides = (self.hidden_BLD, *self.levels)
        hidden_BLD, *levels = (x.view(len(x), self.frames, -1, x.shape[2]).mean(1) for x in sides)
        return Encoded(hidden_BLD, None, tuple(levels))

    @staticmethod
    def stack(parts: Sequence[Encoded]) -> Encoded:
        """Several batches under each other, shorter ones padded to the longest."""
        length = max(part.hidden_BLD.shape[1] for part in parts)
        parts = [part.pad(length) for part in parts]
        mask_BL = None
        if any(part.mask_BL is not None for part in parts):
            mask_BL = torch.cat([part.real_BL() for part in parts])
        levels = tuple(torch.cat(level) for level in zip(*(part.levels for part in parts), strict=True))
        return Encoded(torch.cat([part.hidden_BLD for part in parts]), mask_BL, levels, parts[0].frames)

    def pad(self, length: int) -> Encoded:
        """Padding at the end, up to ``length`` tokens."""
        extra = length - self.hidden_BLD.shape[1]
        if extra == 0:
            return self
        hidden_BLD, *levels = (F.pad(x_BLD, (0, 0, 0, extra)) for x_BLD in (self.hidden_BLD, *self.levels))
        return Encoded(hidden_BLD, F.pad(self.real_BL(), (0, extra)), tuple(levels), self.frames)

    @staticmethod
    def join(first: Encoded, second: Encoded) -> Encoded:
        """The tokens of two sequences, one after the other, in every row."""
        mask_BL = None
        if first.mask_BL is not None or second.mask_BL is not None:
            mask_BL = torch.cat([first.real_BL(), second.real_BL()], dim=1)
        return Encoded(torch.cat([first.hidden_BLD, second.hidden_BLD], dim=1), mask_BL)

    def real_BL(self) -> Tensor:
        """The mask, written out where it is ``None``."""
        if self.mask_BL is not None:
            return self.mask_BL
        return torch.ones(self.hidden_BLD.shape[:2], dtype=torch.bool, device=self.hidden_BLD.device)


@dataclass(frozen=True)
class Fused:
    """An image and a text after fusion.

    Attributes:
        image_BND: image states (for models whose fusion leaves them untouched: the encoder's).
        text_BLD: text states.
        pooled_BP: what a classifier reads (mPLUG: text token 0).
        image_mask_BN, text_mask_BL: as in :class:`Encoded`.
    """

    image_BND: Tensor
    text_BLD: Tensor
    pooled_BP: Tensor
    image_mask_BN: Tensor | None = None
    text_mask_BL: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Fused:
        """The given rows of the batch."""
        masks = (None if mask is None else mask[index] for mask in (self.image_mask_BN, self.text_mask_BL))
        return Fused(self.image_BND[index], self.text_BLD[index], self.pooled_BP[index], *masks)

    def states(self) -> Encoded:
        """``[image; text]``, what a decoder attends to (mPLUG: image first)."""
        image, text = Encoded(self.image_BND, self.image_mask_BN), Encoded(self.text_BLD, self.text_mask_BL)
        return Encoded.join(image, text)


Part = Literal[
    "image", "text", "fusion", "fused_image", "pooled", "embedding", "matching", "masked", "pixels", "decoder"
]
"""A use of a model. ``fused_image``: a head of a task's own reads :attr:`Fused.image_BND`, as decoders do; ``pooled``:
one reads :attr:`Fused.pooled_BP`, as matching does too."""


class VisionLanguageModel(nn.Module, ABC):
    """A network with an image side, a text side and a fusion of both.

    ``width`` is D of the fused states, ``pooled_width`` the width of ``Fused.pooled_BP``, ``embed_dim`` E, and
    ``max_text`` how many tokens the text side can read; a picture's sides are multiples of ``patch`` pixels.
    """

    model_type: ClassVar[str]
    parts: ClassVar[Mapping[Part, tuple[str, ...]]]
    """Which attributes each use of the model needs; none has ``fused_image``, whose are those of ``fusion``."""
    ends_texts: ClassVar[bool] = False
    """Whether the texts it encodes end with the end token ("<s> a cat </s>"), or not ("[CLS] a cat")."""
    cleaning: ClassVar[Literal["words", "none"]] = "words"
    """What is done to the captions it encodes: as :func:`triptych.data.samples.clean_caption` says."""
    width: int
    pooled_width: int
    embed_dim: int
    max_text: int
    patch: int
    temperature: nn.Parameter
    decoder: TextDecoder | None

    def encode_image(self, pixels: Tensor) -> Encoded:
        """Normalised pixels (any resolution whose sides are multiples of the patch) to image states.

        ``[B, C, H, W]``; or clips, ``[B, F, C, H, W]``, each frame of which is encoded by itself: their tokens follow
        one another (mPLUG section 5.3; X-PLUG/mPLUG ``models/model_vqa_mplug_video.py``).
        """
        if pixels.dim() == 4:
            return self.encode_picture(pixels)
        return self.encode_picture(pixels.flatten(0, 1)).as_clips(pixels.shape[1])

    @abstractmethod
    def resize_images(self, image_size: int) -> None:
        """Interpolate the position table once and for all, for training at another resolution."""

    def add_decoder(self, layers: int) -> None:
        """Give a model that has none a decoder, which starts from its text encoder.

        Raises:
            ValueError: it has one, or cannot have one.
        """
        raise ValueError(f"this {self.model_type} cannot be given a decoder")

    @abstractmethod
    def encode_picture(self, pixels_BCHW: Tensor) -> Encoded:
        """What :meth:`encode_image` does with single pictures."""

    def encode_visible(self, pixels_BCHW: Tensor, kept_BK: Tensor) -> Encoded:
        """As :meth:`encode_picture`, of the class token and the patches ``kept_BK`` alone, [B, 1 + K, D].

        Raises:
            ValueError: this network always reads whole pictures.
        """
        raise ValueError(f"a {self.model_type} cannot read a picture of which patches are hidden")

    @abstractmethod
    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Encoded:
        """Token ids to text states."""

    def image_states(self, image: Encoded) -> Encoded:
        """What the image by itself becomes: what a decoder or a classifier reads, where there is no text.

        Where encoding runs a tower of its own that is what it gave.
        """
        return image

    def text_states(self, text: Encoded) -> Encoded:
        """What the text by itself becomes."""
        return text

    def embed_image(self, image: Encoded) -> Tensor:
        """Unit-length contrastive embeddings ``[B, E]``; of a clip that of the mean over its frames (official)."""
        return self.embed_picture(image.mean_frame())

    @abstractmethod
    def embed_picture(self, image: Encoded) -> Tensor:
        """What :meth:`embed_image` does with single pictures."""

    @abstractmethod
    def embed_text(self, text: Encoded) -> Tensor:
        """Unit-length contrastive embeddings ``[B, E]``."""

    @abstractmethod
    def fuse(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Fused:
        """Fuse row b of the text with row b of the image, or with row ``image_rows_B[b]`` of it.

        Giving the rows instead of copied images lets work that depends on the image alone be done once an image.
        """

    def pool(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Tensor:
        """:attr:`Fused.pooled_BP` of what :meth:`fuse` gives, for whoever needs nothing else of it.

        A model can leave out what only the other states need.
        """
        return self.fuse(image, text, image_rows_B).pooled_BP

    def fuse_text(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Tensor:
        """:attr:`Fused.text_BLD` of what :meth:`fuse` gives, likewise."""
        return self.fuse(image, text, image_rows_B).text_BLD

    def pair_attention(self) -> nn.ModuleList:
        """What :meth:`fuse_pair` needs beside the model: a copy of each cross-attention, for the second picture.

        Raises:
            ValueError: this kind of fusion takes one picture.
        """
        raise self._takes_one_picture()

    def fuse_pair(self, first: Encoded, second: Encoded, text: Encoded, attention: nn.ModuleList) -> Fused:
        """Fuse each text with two pictures at once; ``image_BND`` has the tokens of both, one after the other.

        Args:
            attention: of the second picture, from :meth:`pair_attention`; whoever asked for it trains and saves it.

        Raises:
            ValueError: as of :meth:`pair_attention`.
        """
        raise self._takes_one_picture()

    def _takes_one_picture(self) -> ValueError:
        return ValueError(f"the fusion of this {self.model_type} takes one picture: fuse a text with each by itself")

    @abstractmethod
    def match_logits(self, pooled_BP: Tensor) -> Tensor:
        """``[B, 2]`` from :attr:`Fused.pooled_BP`: column 1 says that image and text belong together."""

    @abstractmethod
    def masked_logits(self, text_XD: Tensor) -> Tensor:
        """``[X, V]`` vocabulary logits for (selected) fused text states."""

    def paint(self, fused: Fused, kept_BK: Tensor, grid: tuple[int, int]) -> Tensor:
        """Colours [B, P, Y] of every patch of pictures that :meth:`encode_visible` read in part, after fusion.

        Args:
            kept_BK: which patches were read.
            grid: rows and columns of patches.

        Raises:
            ValueError: the network has no decoder of pixels.
        """
        raise ValueError(f"this {self.model_type} has no decoder of pixels")

    def for_fused_image(self) -> Sequence[nn.Module]:
        """What of the fusion :attr:`Fused.image_BND` alone depends on, and neither the text states nor the pooled."""
        return ()

    def train_only(self, *used: Part) -> None:
        """Freeze every parameter that would never get a gradient: those outside the parts that a task runs.

        Where neither a decoder (of words or of pixels) nor ``fused_image`` reads the fused image states, what only
        makes these, too.
        """
        names = {name for part in used for name in self.parts.get(part, ())}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] in names)
        if not {"decoder", "pixels", "fused_image"} & set(used):
            for module in self.for_fused_image():
                module.requires_grad_(False)
