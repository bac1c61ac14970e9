"""Samples per second of the loader with the pre-training transform.

    python benchmarks/loader.py > benchmarks/results/loader.json  # generated JPEGs
    python benchmarks/loader.py --source 'shared/flickr8k/*.tar' --image-size 128

"per_core" divides by the processes that decode (at least one). Without
--source it makes JPEGs of 128, 192 and 256 pixels in a temporary folder.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import report
from triptych.data.loader import Loader, seeded
from triptych.data.samples import Record, decode_image
from triptych.data.sources import open_source
from triptych.data.transforms import Preprocessing, Transform


@dataclass(frozen=True)
class Prepare:
    transform: Transform

    def __call__(self, record: Record, seed: int) -> Tensor:
        with seeded(seed):
            return self.transform(decode_image(record))


def write_shards(folder: Path, image_size: int, count: int = 500) -> str:
    """Two tars of smooth noise, which compresses about as photographs do."""
    draw = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{image_size}-{shard}.tar", "w") as archive:
            for index in range(count):
                coarse = draw.integers(0, 256, (image_size // 8, image_size // 8, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((image_size, image_size), Image.Resampling.BICUBIC)
                file = BytesIO()
                image.save(file, "JPEG", quality=90)
                for suffix, content in (("jpg", file.getvalue()), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, BytesIO(content))
    return str(folder / f"{image_size}-*.tar")


def measure(location: str, image_size: int, workers: int, seconds: float) -> dict[str, object]:
    prepare = Prepare(Preprocessing(image_size).train_transform())
    loader = Loader(open_source(location), prepare, torch.stack, batch_size=64, seed=0, workers=workers)
    batches = iter(loader)
    for _ in range(3 + 2 * workers):  # until the workers are up and what they had prepared is used
        next(batches)
    samples, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        samples += len(next(batches))
    rate = samples / (time.perf_counter() - start)
    return {
        "image_size": image_size,
        "workers": workers,
        "samples_per_s": round(rate, 1),
        "per_core": round(rate / max(1, workers), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="location of tar shards; generated ones if not given")
    parser.add_argument("--image-size", type=int, nargs="+", default=[128, 192, 256])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for image_size in arguments.image_size:
            location = arguments.source or write_shards(Path(folder), image_size)
            for workers in arguments.workers:
                rows.append(measure(location, image_size, workers, arguments.seconds))
    report("loader", {"source": arguments.source or "generated", "seconds": arguments.seconds}, rows, {})


if __name__ == "__main__":
    main()
