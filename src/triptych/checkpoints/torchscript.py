"""Read the tensors of a TorchScript archive (how OpenAI publishes CLIP) without executing it.

The archive is a zip: ``NAME/data.pkl`` describes the module tree, ``NAME/data/KEY`` holds the bytes of each storage,
and ``NAME/code`` the program, which is not touched. The unpickler here knows module objects (as bags of attributes),
tensors (as descriptions, turned into tensors afterwards) and lists; it refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from triptych.checkpoints.errors import CheckpointError

_ELEMENT_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether a zip was written by ``torch.jit.save``."""
    names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def read_torchscript(archive: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    """Parameters and buffers, named as in the module's ``state_dict``.

    Raises:
        CheckpointError: the archive holds something this reader does not know.
    """
    try:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        module = _Unpickler(archive.read(f"{root}data.pkl")).load()
        storages: dict[str, Tensor] = {}
        return {name: described.tensor(archive, root, storages) for name, described in _described(module, "")}
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise nearly anything
        raise CheckpointError(
            path,
            f"this TorchScript archive cannot be read without running it ({error}); if you trust it, save its state "
            "dict: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW)",
        ) from error


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    elements: int

    def flat(self, archive: zipfile.ZipFile, root: str, read: dict[str, Tensor]) -> Tensor:
        if self.key not in read:
            record = archive.getinfo(f"{root}data/{self.key}")
            if record.file_size != self.elements * self.dtype.itemsize:
                raise ValueError(f"storage {self.key} has {record.file_size} bytes")
            data = bytearray(archive.read(record))
            read[self.key] = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return read[self.key]


@dataclass(frozen=True, slots=True)
class _Described:
    """A tensor as the pickle describes it: a view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, archive: zipfile.ZipFile, root: str, read: dict[str, Tensor]) -> Tensor:
        flat = self.storage.flat(archive, root, read)
        return flat.as_strided(self.size, self.stride, self.offset).clone()


class _Module:
    """A module object of the script: nothing but its attributes."""


class _DescribeTensor:
    __slots__ = ()

    def __call__(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> _Described:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without storage")
        return _Described(storage, offset, size, stride)


class _FirstArgument:
    """``build_intlist([1, 2])`` and ``restore_type_tag(value, type)`` are their first argument."""

    __slots__ = ()

    def __call__(self, value: object, *_: object) -> object:
        return value


class _NoHooks:
    __slots__ = ()

    def __call__(self) -> None:
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._module_class = type("_ScriptModule", (_Module,), {})  # of its own: a pickle can change the class

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "__torch__":
            return self._module_class
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _DescribeTensor()
        if module == "torch" and name in _ELEMENT_TYPES:
            return _ELEMENT_TYPES[name]
        if module == "torch.jit._pickle" and name in _LISTS:
            return _FirstArgument()
        if (module, name) == ("collections", "OrderedDict"):
            return _NoHooks()
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(elements)):
                return _Storage(key, dtype, elements)
        raise pickle.UnpicklingError(f"unknown record {pid!r}")


def _described(module: object, prefix: str) -> Iterator[tuple[str, _Described]]:
    """Every tensor below a module with its dotted name."""
    for name, value in vars(module).items():
        if isinstance(value, _Described):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _described(value, f"{prefix}{name}.")
