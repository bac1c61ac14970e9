"""CIFAR-10 and CIFAR-100 (cs.toronto.edu/~kriz/cifar.html), from the folder that an official archive unpacks to.

| folder | training | test | names of classes |
|---|---|---|---|
| cifar-10-batches-bin | data_batch_1.bin to data_batch_5.bin | test_batch.bin | batches.meta.txt |
| cifar-100-binary | train.bin | test.bin | fine_label_names.txt, coarse_label_names.txt |
| cifar-10-batches-py | data_batch_1 to data_batch_5 | test_batch | batches.meta |
| cifar-100-python | train | test | meta |

A record's `extra` has "label" (the class's name), "split" ("train" or "test") and, of CIFAR-100, "coarse_label". The
folders for Python hold pickles. Nothing in them is ever run: unpickling makes plain values, and arrays as their bytes.

Shapes: N pictures, H and W 32 pixels, C colours.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triptych.data.fields import broken, exists
from triptych.data.samples import Record, read_bytes

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
_PPM = b"P6 %d %d 255\n" % (SIDE, SIDE)  # uncompressed: what a record holds is these bytes and the pixels


@dataclass(frozen=True)
class _Layout:
    """An official folder.

    Attributes:
        archive: what it is unpacked from.
        splits: files of each.
        names: of each field of a record, the file with the classes' names and, in a pickle, the key of the list.
        labels: of each field, the key of the list of labels in a pickle; binary files have a byte each, in this order.
    """

    archive: str
    splits: Mapping[str, tuple[str, ...]]
    names: Mapping[str, tuple[str, str]]
    labels: Mapping[str, str]
    binary: bool


def _layout(archive: str, suffix: str, names: Mapping[str, tuple[str, str]]) -> _Layout:
    if "10-" in archive:
        splits = {"train": tuple(f"data_batch_{n}{suffix}" for n in range(1, 6)), "test": (f"test_batch{suffix}",)}
        labels = {"label": "labels"}
    else:
        splits = {"train": (f"train{suffix}",), "test": (f"test{suffix}",)}
        labels = {"coarse_label": "coarse_labels", "label": "fine_labels"}
    return _Layout(archive, splits, names, labels, suffix == ".bin")


_LAYOUTS = {
    "cifar-10-batches-bin": _layout("cifar-10-binary.tar.gz", ".bin", {"label": ("batches.meta.txt", "")}),
    "cifar-100-binary": _layout(
        "cifar-100-binary.tar.gz",
        ".bin",
        {"coarse_label": ("coarse_label_names.txt", ""), "label": ("fine_label_names.txt", "")},
    ),
    "cifar-10-batches-py": _layout("cifar-10-python.tar.gz", "", {"label": ("batches.meta", "label_names")}),
    "cifar-100-python": _layout(
        "cifar-100-python.tar.gz",
        "",
        {"coarse_label": ("meta", "coarse_label_names"), "label": ("meta", "fine_label_names")},
    ),
}


def is_cifar(location: str) -> bool:
    """Whether a location has the name of one of the official folders, be it there or not."""
    return _name(location) in _LAYOUTS


def open_cifar(folder: str, splits: Sequence[str] | None = None) -> list[CifarShard]:
    """A shard for each file of the splits ("train", "test"); of both if None.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message says what to download.
        ValueError: another name than an official folder's, an unknown split, or damaged names of classes.
    """
    layout = _LAYOUTS.get(_name(folder))
    if layout is None:
        raise ValueError(f"{folder} is no folder of CIFAR: keep the names {', '.join(_LAYOUTS)}")
    splits = tuple(layout.splits) if splits is None else splits
    if not set(splits) <= set(layout.splits):
        raise ValueError(f"{folder} has the splits {', '.join(layout.splits)}, not {', '.join(splits)}")
    files = [(split, f"{folder}/{file}") for split in layout.splits if split in splits for file in layout.splits[split]]
    needed = [f"{folder}/{file}" for file, _ in layout.names.values()] + [file for _, file in files]
    for file in needed:
        if not exists(file):
            raise FileNotFoundError(
                f"{file} does not exist: download {layout.archive} from https://www.cs.toronto.edu/~kriz/cifar.html "
                f"and unpack it in {os.path.dirname(folder.rstrip('/')) or '.'}"
            )
    names = {field: _read_names(f"{folder}/{file}", key) for field, (file, key) in layout.names.items()}
    return [CifarShard(file, split, layout, names) for split, file in files]


@dataclass(frozen=True)
class CifarShard:
    """One file of pictures."""

    name: str
    split: str
    layout: _Layout
    names: Mapping[str, Sequence[str]]

    def read(self) -> list[Record]:
        """Its records; ValueError or OSError if it is damaged or unreadable."""
        read = _read_binary if self.layout.binary else _read_pickle
        labels, pixels_NX = read(self.name, self.layout.labels)
        pixels_NHWC = pixels_NX.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        pictures = pixels_NHWC.tobytes()
        return [
            self._record(number, {field: own[number] for field, own in labels.items()}, pictures)
            for number in range(len(pixels_NX))
        ]

    def _record(self, number: int, labels: Mapping[str, int], pictures: bytes) -> Record:
        key = f"{self.name}:{number}"
        extra: dict[str, Any] = {"split": self.split}
        for field, label in labels.items():
            if not 0 <= label < len(self.names[field]):
                return broken(key, f"{field} {label} is none of the {len(self.names[field])} classes", extra)
            extra[field] = self.names[field][label]
        image = _PPM + pictures[number * _PIXELS : (number + 1) * _PIXELS]
        return Record(key, image, (), f"{os.path.basename(self.name)}:{number}", extra)


_Batch = tuple[Mapping[str, Sequence[int]], NDArray[np.uint8]]
"""Labels by field, and pixels [N, 3 * 32 * 32]: all reds, all greens, all blues."""


def _read_binary(file: str, labels: Mapping[str, str]) -> _Batch:
    content, length = read_bytes(file), len(labels) + _PIXELS
    if not content or len(content) % length:
        raise ValueError(f"{file} is damaged or no file of CIFAR: {len(content)} bytes are not records of {length}")
    rows_NX = np.frombuffer(content, np.uint8).reshape(-1, length)
    return {field: rows_NX[:, place].tolist() for place, field in enumerate(labels)}, rows_NX[:, len(labels) :]


def _read_pickle(file: str, labels: Mapping[str, str]) -> _Batch:
    content = _load_pickle(file)
    array = content.get("data")
    found: dict[str, Any] = {field: content.get(key) for field, key in labels.items()}
    pixels = array.content("u1") if isinstance(array, _Array) else None
    if pixels is None or not pixels or len(pixels) % _PIXELS:
        raise ValueError(f"{file} is damaged or no file of CIFAR: its 'data' are not rows of {_PIXELS} bytes")
    pixels_NX = np.frombuffer(pixels, np.uint8).reshape(-1, _PIXELS)
    for field, own in found.items():
        if not isinstance(own, list) or len(own) != len(pixels_NX) or not all(type(label) is int for label in own):
            raise ValueError(f"{file} is damaged: {labels[field]!r} must be {len(pixels_NX)} whole numbers")
    return found, pixels_NX


def _read_names(file: str, key: str) -> list[str]:
    """Names of classes, one a line or in a pickle."""
    if key:
        names = _load_pickle(file).get(key)
    else:
        names = [line.strip() for line in read_bytes(file).decode("utf-8", "replace").split("\n") if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{file} is damaged: it has no list of names of classes")
    return names


class _Array:
    """What stands for a NumPy array, type or dtype in a pickle: it only keeps what it is given."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def content(self, dtype: str) -> bytes | None:
        """The bytes of an array in C order of this type; None if it is anything else."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, _, kind, is_fortran, content = self.state
        if not isinstance(kind, _Array) or kind.given[:1] != (dtype,) or is_fortran:
            return None
        return content.encode("latin-1") if isinstance(content, str) else None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Array]:
        if f"{module}.{name}" not in ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            raise pickle.UnpicklingError(f"it tries to load {f'{module}.{name}'!r}, which is no plain value")
        return _Array


def _load_pickle(file: str) -> Mapping[str, Any]:
    """A dictionary as Python 2 wrote it; texts and bytes come as Latin-1."""
    encoded = BytesIO(read_bytes(file))
    try:
        content = _PlainUnpickler(encoded, encoding="latin-1").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{file} is not a pickle of CIFAR: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a pickle of CIFAR but of a {type(content).__name__}")
    return content


def _name(location: str) -> str:
    return os.path.basename(location.rstrip("/"))
