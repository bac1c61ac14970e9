"""The pictures of a data set, once each and in order, for evaluation.

Shape legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from triptych.data.loader import read_once
from triptych.data.samples import Record, decode_image
from triptych.data.sources import Source
from triptych.data.transforms import Preprocessing

Pictures = Iterator[tuple[Sequence[Record], Tensor]]


def read_pictures(source: Source, preprocessing: Preprocessing, batch_size: int = 50, limit: int = 0) -> Pictures:
    """Records and their pixels (uint8), in order; ``limit`` stops after so many pictures."""
    transform = preprocessing.test_transform()
    batches = read_once(source, _Show(transform), _as_batch, batch_size=min(batch_size, limit) if limit else batch_size)
    seen = 0
    for records, pixels_BCHW in batches:
        left = limit - seen if limit else len(records)
        yield records[:left], pixels_BCHW[:left]
        seen += len(records)
        if limit and seen >= limit:
            return


@dataclass(frozen=True)
class _Show:
    transform: Any

    def __call__(self, record: Record, seed: int) -> tuple[Record, Tensor]:
        return replace(record, image=None), self.transform(decode_image(record))


def _as_batch(examples: list[tuple[Record, Tensor]]) -> tuple[list[Record], Tensor]:
    records, pixels = zip(*examples, strict=True)
    return list(records), torch.stack(pixels)
