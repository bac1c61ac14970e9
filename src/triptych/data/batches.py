"""What a training step receives: batches of tensors, moved between devices as a whole.

Shape legend: B batch, C channels, H height, W width, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Movable:
    """A dataclass whose tensor (and nested) fields move together."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            moved[item.name] = value.to(device) if isinstance(value, Tensor | Movable) else value
        return type(self)(**moved)


@dataclass(frozen=True)
class Tokens(Movable):
    """Padded token ids with a mask that is ``True`` where a token is real."""

    ids_BL: Tensor
    mask_BL: Tensor

    def __len__(self) -> int:
        return len(self.ids_BL)

    @staticmethod
    def stack(parts: Sequence[Tokens], pad: int) -> Tokens:
        """Rows of several batches under each other, padded to the longest."""
        length = max(part.ids_BL.shape[1] for part in parts)

        def widen(x_BL: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(x_BL, (0, length - x_BL.shape[1]), value=value)

        ids_BL = torch.cat([widen(part.ids_BL, pad) for part in parts])
        return Tokens(ids_BL, torch.cat([widen(part.mask_BL, 0) for part in parts]))


@dataclass(frozen=True)
class ImageTextBatch(Movable):
    """Pictures and one text each.

    Attributes:
        pixels_BCHW: uint8 RGB; of clips [B, F, C, H, W].
        text: as the model's encoder reads it (``ends_texts``).
        image_id_B: int64, equal for texts of one picture (see :func:`stable_id`).
    """

    pixels_BCHW: Tensor
    text: Tokens
    image_id_B: Tensor

    def __len__(self) -> int:
        return len(self.pixels_BCHW)


@dataclass(frozen=True)
class PretrainingBatch(ImageTextBatch):
    """Pictures with their text, whole and split in two.

    Attributes:
        prefix: ``[CLS] first words`` (may be ``[CLS]`` alone).
        target: ``[CLS] remaining words [SEP]``.
    """

    prefix: Tokens
    target: Tokens


def stable_id(name: str) -> int:
    """A 63-bit number for a name, the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
