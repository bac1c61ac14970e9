"""Training checkpoints: complete, atomic, and resumed exactly.

A checkpoint is a folder ``step-00001200``: ``state.pt`` (weights, teacher, queue, optimiser, step) and one
``rank-0.pt`` a process (random state, loader position; where experts are spread, its own). It is written under another
name and renamed when every byte is on disk, so whatever has the final name is whole.

The order of resuming: build everything from the recipe, load the newest whole checkpoint into it, cut the log after
that step, restore the random state last.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from triptych.training.parallel import Process

_NAME = re.compile(r"step-(\d{8})")


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the ones before it are intact."""


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], own: Mapping[str, Any], process: Process, keep: int
) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``.

    Args:
        state: what all processes share; written by the first.
        own: what each process has of its own.

    Raises:
        CheckpointWriteError: no space, no permission... The partial files are removed.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".writing-{step:08d}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write(partial / f"rank-{process.rank}.pt", own)
        if process.leads:
            _write(partial / "state.pt", state)
        if process.world > 1:
            dist.barrier()
        if process.leads:
            _sync(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync(folder)
            for old in sorted(_complete(folder))[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointWriteError(
            f"could not write the checkpoint {final}: {error}. Earlier checkpoints are intact; "
            "free some space and give the same command again"
        ) from error
    if process.world > 1:
        dist.barrier()
    return final


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, if there is one. Leftovers of interrupted writes are removed."""
    if not folder.is_dir():
        return None
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return max(_complete(folder), default=None)


def load_checkpoint(path: Path, process: Process) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all processes share, and what this one has of its own.

    Raises:
        ValueError: another number of processes wrote it.
    """
    saved = len(list(path.glob("rank-*.pt")))
    if saved != process.world:
        raise ValueError(f"{path} was written by {saved} processes and cannot be resumed by {process.world}")
    shared = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    return shared, torch.load(path / f"rank-{process.rank}.pt", map_location="cpu", weights_only=True)


def _complete(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(dict(values), file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
