"""CIFAR-10 and CIFAR-100 (cs.toronto.edu/~kriz/cifar.html) through torchvision, from a folder that is at hand.

The folders are those that the archives for Python unpack to, ``cifar-10-batches-py`` and ``cifar-100-python``. They
hold pickles. torchvision reads one only if its checksum is that of the official file, so that nothing else is ever
unpickled.

A record's `extra` has "label" (the class's name) and "split" ("train" or "test").

Shapes: N pictures, H and W 32 pixels, C colours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triptych.data.samples import Record

_CLASSES = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
"""torchvision's class for each folder."""
_SPLITS = ("train", "test")
_PPM = b"P6 32 32 255\n"  # uncompressed: what a record holds is these bytes and the pixels


def is_cifar(location: str) -> bool:
    """Whether a location has the name of an official folder, be it there or not."""
    return _split(location)[1] in (*_CLASSES, "cifar-10-batches-bin", "cifar-100-binary")


def open_cifar(folder: str, splits: Sequence[str] | None = None) -> list[CifarShard]:
    """A shard for each of the splits ("train", "test"); for both if None.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message says what to download.
        ValueError: another name than an official folder's for Python, or an unknown split.
    """
    from torchvision import datasets  # a second to import

    root, name = _split(folder)
    if name not in _CLASSES:
        raise ValueError(f"{folder} is no folder of CIFAR for Python: keep the names {', '.join(_CLASSES)}")
    splits = _SPLITS if splits is None else splits
    if not set(splits) <= set(_SPLITS):
        raise ValueError(f"{folder} has the splits {', '.join(_SPLITS)}, not {', '.join(splits)}")
    dataset = getattr(datasets, _CLASSES[name])
    for file in (dataset.meta["filename"], *(file for file, _ in dataset.train_list + dataset.test_list)):
        if not os.path.exists(os.path.join(folder, file)):
            raise FileNotFoundError(
                f"{os.path.join(folder, file)} does not exist: download {dataset.filename} from "
                f"https://www.cs.toronto.edu/~kriz/cifar.html and unpack it in {root or '.'}"
            )
    return [CifarShard(os.path.join(folder, split), root, dataset, split) for split in _SPLITS if split in splits]


@dataclass(frozen=True)
class CifarShard:
    """The pictures of one split."""

    name: str
    root: str
    dataset: type[Any]
    split: str

    def read(self) -> list[Record]:
        """Its records.

        Raises:
            ValueError: a file is not the official one, by its checksum.
        """
        try:
            pictures = self.dataset(self.root, train=self.split == "train")
        except RuntimeError as error:
            folder = os.path.dirname(self.name)
            raise ValueError(
                f"{folder} is damaged or not the official one (its checksums differ): unpack "
                f"{self.dataset.filename} again"
            ) from error
        return [
            Record(
                f"{self.name}:{number}",
                _PPM + pixels_HWC.tobytes(),
                (),
                f"{self.split}:{number}",
                {"split": self.split, "label": pictures.classes[label]},
            )
            for number, (pixels_HWC, label) in enumerate(zip(pictures.data, pictures.targets, strict=True))
        ]


def _split(location: str) -> tuple[str, str]:
    return os.path.split(location.rstrip("/"))
