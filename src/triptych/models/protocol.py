"""What every model offers, so that every objective and task works with every model.

Shape legend: B batch, N image tokens, L text tokens, D width, E embedding width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Encoded:
    """One modality, encoded once, to be fused many times.

    Attributes:
        hidden_BLD: the final states; token 0 summarises the whole.
        mask_BL: bool, ``True`` where a token is real; ``None`` when every token is.
        levels: states of earlier layers, lowest first, for models that connect levels.
    """

    hidden_BLD: Tensor
    mask_BL: Tensor | None = None
    levels: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.hidden_BLD.shape[0]

    def rows(self, index: Tensor | slice) -> Encoded:
        """The given rows of the batch, repeated or reordered as the index says."""
        mask_BL = None if self.mask_BL is None else self.mask_BL[index]
        return Encoded(self.hidden_BLD[index], mask_BL, tuple(level[index] for level in self.levels))

    def detach(self) -> Encoded:
        """The same states without their graph."""
        return Encoded(self.hidden_BLD.detach(), self.mask_BL, tuple(x.detach() for x in self.levels))

    def to(self, *args: Any, **kwargs: Any) -> Encoded:
        """States moved or cast as ``Tensor.to`` does; the mask only moved."""
        mask_BL = self.mask_BL
        hidden_BLD = self.hidden_BLD.to(*args, **kwargs)
        if mask_BL is not None:
            mask_BL = mask_BL.to(hidden_BLD.device)
        return Encoded(hidden_BLD, mask_BL, tuple(level.to(*args, **kwargs) for level in self.levels))

    @staticmethod
    def stack(parts: Sequence[Encoded]) -> Encoded:
        """Batches of the same length, one after the other."""
        masks = [part.mask_BL for part in parts]
        mask_BL = None
        if any(mask is not None for mask in masks):
            mask_BL = torch.cat([part.real_BL() for part in parts])
        levels = tuple(torch.cat(level) for level in zip(*(part.levels for part in parts), strict=True))
        return Encoded(torch.cat([part.hidden_BLD for part in parts]), mask_BL, levels)

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

    def states(self) -> Encoded:
        """``[image; text]``, what a decoder attends to (mPLUG: image first)."""
        image = Encoded(self.image_BND, self.image_mask_BN)
        text = Encoded(self.text_BLD, self.text_mask_BL)
        mask_BM = None
        if self.image_mask_BN is not None or self.text_mask_BL is not None:
            mask_BM = torch.cat([image.real_BL(), text.real_BL()], dim=1)
        return Encoded(torch.cat([self.image_BND, self.text_BLD], dim=1), mask_BM)


class VisionLanguageModel(nn.Module, ABC):
    """A network with an image side, a text side and a fusion of both.

    ``width`` is D of the fused states, ``pooled_width`` the width of ``Fused.pooled_BP``, ``embed_dim`` E.
    """

    model_type: ClassVar[str]
    width: int
    pooled_width: int
    embed_dim: int
    temperature: nn.Parameter

    @abstractmethod
    def encode_image(self, pixels_BCHW: Tensor) -> Encoded:
        """Normalised pixels (any resolution whose sides are multiples of the patch) to image states."""

    @abstractmethod
    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Encoded:
        """Token ids to text states."""

    @abstractmethod
    def embed_image(self, image: Encoded) -> Tensor:
        """Unit-length contrastive embeddings ``[B, E]``."""

    @abstractmethod
    def embed_text(self, text: Encoded) -> Tensor:
        """Unit-length contrastive embeddings ``[B, E]``."""

    @abstractmethod
    def fuse(self, image: Encoded, text: Encoded) -> Fused:
        """Fuse row b of the image with row b of the text."""

    @abstractmethod
    def match_logits(self, fused: Fused) -> Tensor:
        """``[B, 2]``: column 1 says that image and text belong together."""

    @abstractmethod
    def masked_logits(self, text_XD: Tensor) -> Tensor:
        """``[X, V]`` vocabulary logits for (selected) fused text states."""
