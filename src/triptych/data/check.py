"""Reading a whole data set to see what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triptych.data.samples import BrokenSample, decode_image
from triptych.data.sources import open_source

_LISTED = 20


def check(data: Sequence[str], image_root: str | None = None, splits: Sequence[str] | None = None) -> dict[str, Any]:
    """Decode every picture: counts, the first broken records, sizes, and a few captions."""
    source = open_source(tuple(data), image_root=image_root, splits=splits)
    pictures, captions, broken_count = 0, 0, 0
    broken: list[dict[str, str]] = []
    examples: list[dict[str, Any]] = []
    sides: list[tuple[int, int]] = []
    for shard in source.shards:
        for record in shard.read():
            try:
                sides.append(decode_image(record).size)
            except BrokenSample as error:
                broken_count += 1
                if len(broken) < _LISTED:
                    broken.append({"key": error.key, "reason": error.reason})
                continue
            pictures += 1
            captions += len(record.captions)
            if len(examples) < 3:
                examples.append({"image_id": record.image_id, "captions": list(record.captions)})
    return {
        "shards": len(source.shards),
        "pictures": pictures,
        "captions": captions,
        "broken": broken_count,
        "first_broken": broken,
        "smallest": min(sides, default=None),
        "largest": max(sides, default=None),
        "examples": examples,
    }
