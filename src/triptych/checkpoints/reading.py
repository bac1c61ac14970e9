"""Read the tensors of any weights file without running any of its code.

Pickles go through ``torch.load(weights_only=True)`` and nothing else; TorchScript archives through
:mod:`triptych.checkpoints.torchscript`.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.torchscript import is_torchscript, read_torchscript

Tensors = dict[str, Tensor]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""What a folder of weights holds, in the order in which we prefer them."""

_WRAPPERS = ("model", "module", "state_dict")
_PREFIXES = ("module.", "model.")
_AGAIN = "download or copy it again"


def read_tensors(source: str | Path) -> Tensors:
    """All tensors of a weights file, by their official names, on the CPU.

    Args:
        source: ``.safetensors``, a sharded ``*.index.json``, anything ``torch.save`` wrote (``.pth``, ``.bin``,
            ``.ckpt``, ``.tar``...), a TorchScript archive, or a folder that holds one of :data:`WEIGHT_FILES`. What
            decides is the content, not the suffix.

    Wrappers (``{"model": ...}``, ``{"module": ...}``, ``{"state_dict": ...}``, nested too) are opened, and the name
    prefixes ``module.`` and ``model.`` taken off.

    Raises:
        CheckpointError: the file is missing, empty, damaged, no checkpoint, or a pickle that holds more than tensors.
    """
    path = find_weights(source)
    return _without_prefixes(_read(path), path)


def find_weights(source: str | Path) -> Path:
    """The weights file itself: ``source``, or the one inside the folder ``source``."""
    path = Path(source)
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            path, f"this folder has no weights file ({', '.join(WEIGHT_FILES)}); name the file itself"
        )
    if not path.exists():
        raise CheckpointError(path, "no such file")
    if not path.is_file():
        raise CheckpointError(path, "not a regular file")
    return path


def _read(path: Path) -> Tensors:
    with _open(path) as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(path, f"the file is empty; {_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(path, "a Git LFS pointer, not the weights; run `git lfs pull`")
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if head.lstrip()[:1] in (b"<", b"{", b"["):
        raise CheckpointError(
            path, f"a text file (web page or JSON), not a checkpoint: did the download fail? {_AGAIN}"
        )
    if head[257:262] == b"ustar":
        raise CheckpointError(path, "an archive of files: unpack it (`tar xf`) and name the weights file")
    if head[:1] != b"\x80":
        raise CheckpointError(path, "not a checkpoint (neither safetensors nor a file of torch.save)")
    return _read_pickle(path)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error


def _read_safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"damaged or no safetensors file ({error}); {_AGAIN}") from error


def _read_sharded(path: Path) -> Tensors:
    """A ``*.index.json`` says which shard, a file beside it, holds which tensor."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        names = [(path.parent / shard, Path(shard).name == shard) for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(path, f"not an index of shards ({error!r}); {_AGAIN}") from error
    tensors: Tensors = {}
    for shard, beside in names:
        if not beside:
            raise CheckpointError(path, f"names the shard {shard}, which is not beside it")
        if not shard.is_file():
            raise CheckpointError(path, f"needs {shard.name}, which is not beside it; download all shards")
        tensors.update(_read(shard))
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise CheckpointError(path, f"lists tensors that are in no shard: {', '.join(lost[:5])}; {_AGAIN}")
    return tensors


def _read_zip(path: Path) -> Tensors:
    try:
        with zipfile.ZipFile(path) as archive:
            if is_torchscript(archive):
                return read_torchscript(archive, path)
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                raise CheckpointError(path, "a zip archive without weights; unpack it and name the file")
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(path, f"the file is cut off or damaged ({error}); {_AGAIN}") from error
    return _read_pickle(path)


def _read_pickle(path: Path) -> Tensors:
    """Everything ``torch.save`` writes, new (zip) and old (bare pickle) format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(path) and path.suffix != ".safetensors":
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:  # by handle: torch.load believes the suffix .safetensors
                with path.open("rb") as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _foreign_name(path, str(error))
        if foreign is None:
            raise CheckpointError(path, f"damaged, or not a checkpoint; {_AGAIN}") from error
        raise CheckpointError(
            path,
            f"refused: its pickle asks for {foreign}, which is code and not a tensor. The file may be malicious; "
            "nothing of it was run. If you trust its author, ask for the bare state dict, saved as safetensors",
        ) from error
    except Exception as error:  # torch.load raises nearly anything for damaged files
        raise CheckpointError(path, f"the file is cut off or damaged; {_AGAIN}") from error
    return _unwrap(content, path)


def _foreign_name(path: Path, message: str) -> str | None:
    """The first name that a refused pickle asks for and that has no place among tensors."""
    named = re.search(r"GLOBAL ([\w.]+)", message)
    if named:
        return named[1]
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return next(_foreign_names(file), None)
        with zipfile.ZipFile(path) as archive:
            record = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(record) as inner:
                return next(_foreign_names(inner), None)
    except Exception:  # damaged on the way: the caller says so
        return None


def _foreign_names(file: IO[bytes]) -> Iterator[str]:
    """What the pickles of a file would import beside torch; reading their instructions runs none of them."""
    strings: list[str] = []
    for _ in range(4):  # the old format: magic number, version, machine, content
        for opcode, argument, _ in pickletools.genops(file):
            if isinstance(argument, str):
                strings.append(argument)
            name = ""
            if opcode.name in ("GLOBAL", "INST"):
                name = strings[-1].replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(strings[-2:])
            if name and name.split(".")[0] not in ("torch", "collections"):
                yield name


def _unwrap(content: object, path: Path) -> Tensors:
    """The state dict inside whatever a training script saved around it."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(path, f"holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(path, "holds no tensors; is it the optimiser's state or another part of a run?")
    return tensors


def _without_prefixes(tensors: Tensors, path: Path) -> Tensors:
    stripped: Tensors = {}
    for name, tensor in tensors.items():
        short = name
        while short.startswith(_PREFIXES):
            short = short.split(".", 1)[1]
        if short in stripped and not same_tensor(stripped[short], tensor):
            raise CheckpointError(
                path, f"holds {short} twice, with and without a prefix, and the two differ: keep one of them"
            )
        stripped[short] = tensor
    return stripped


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, type and every value."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
