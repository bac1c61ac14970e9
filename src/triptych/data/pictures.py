"""What a record shows, as pixels; and the pictures of a data set, once each and in order, for evaluation.

Shape legend: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.data.loader import read_once
from triptych.data.official_video import VIDEO_SUFFIXES
from triptych.data.samples import BrokenSample, Record, decode_image, load_image
from triptych.data.sources import Source
from triptych.data.transforms import FrameChoice, Preprocessing, Transform
from triptych.data.video import read_frames, transform_clip

Pictures = Iterator[tuple[Sequence[Record], Tensor]]


def show(record: Record, transform: Transform, frames: FrameChoice) -> Tensor:
    """The record's picture, ``[C, H, W]``; the frames of its video or its several pictures, ``[F, C, H, W]``; uint8.

    A random transform treats the frames of a video alike, and several pictures each by itself.

    Raises:
        BrokenSample: it has a problem, or what it shows cannot be read.
    """
    if record.problem is not None:
        raise BrokenSample(record.key, record.problem)
    if record.image is None and record.extra.get("video"):
        seen = read_frames(record.extra["video"], frames.count, record.key, frames.rule, decoder=frames.decoder)
        return transform_clip(seen, transform)
    if record.image is None and record.extra.get("images"):
        return torch.stack([transform(load_image(image, record.key)) for image in record.extra["images"]])
    return transform(decode_image(record))


def stack(pixels: Sequence[Tensor]) -> Tensor:
    """Pixels of several records as one batch.

    Raises:
        ValueError: some show one picture and others several.
    """
    shapes = {tuple(own.shape) for own in pixels}
    if len(shapes) > 1:
        raise ValueError(f"the records of one batch show unlike things (pixels {sorted(shapes)}): give them apart")
    return torch.stack(list(pixels))


def file_record(path: Path, *, extra: Mapping[str, Any] | None = None) -> Record:
    """A record of a picture file or of a video, told apart by the suffix."""
    if is_video(path):
        return Record(str(path), None, (), str(path), {**(extra or {}), "video": str(path)})
    return Record(str(path), str(path), (), str(path), extra or {})


def is_video(path: Path) -> bool:
    """Whether a file's name is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def alike(paths: Iterable[Path], *, at_once: int = 32) -> Iterator[tuple[Path, ...]]:
    """The paths in their order, a few at once, pictures and videos apart."""
    for _, same in groupby(paths, is_video):
        while some := tuple(islice(same, at_once)):
            yield some


def read_pictures(source: Source, preprocessing: Preprocessing, batch_size: int = 50, limit: int = 0) -> Pictures:
    """Records and their pixels (uint8), in order; ``limit`` stops after so many pictures."""
    shown = _Show(preprocessing.test_transform(), preprocessing.frames)
    batches = read_once(source, shown, _as_batch, batch_size=min(batch_size, limit) if limit else batch_size)
    seen = 0
    for records, pixels_BCHW in batches:
        left = limit - seen if limit else len(records)
        yield records[:left], pixels_BCHW[:left]
        seen += len(records)
        if limit and seen >= limit:
            return


@dataclass(frozen=True)
class _Show:
    transform: Transform
    frames: FrameChoice

    def __call__(self, record: Record, seed: int) -> tuple[Record, Tensor]:
        return replace(record, image=None), show(record, self.transform, self.frames)


def _as_batch(examples: list[tuple[Record, Tensor]]) -> tuple[list[Record], Tensor]:
    records, pixels = zip(*examples, strict=True)
    return list(records), stack(pixels)
