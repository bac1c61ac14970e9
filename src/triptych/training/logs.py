"""Logs of a run: JSON lines, TensorBoard, and a progress display."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"


class RunLog:
    """Writes records to ``log.jsonl`` and TensorBoard, and one line of progress to stderr.

    Args:
        resume_step: records after the checkpoint of this step are dropped: they will be written again.
        quiet: write nothing, for processes that do not lead.
    """

    def __init__(self, folder: Path, resume_step: int, *, quiet: bool = False) -> None:
        self._quiet = quiet
        if quiet:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOG_NAME
        kept = [json.dumps(record) + "\n" for record in read_log(folder) if _precedes(record, resume_step)]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        self._terminal = sys.stderr.isatty()

    def write(self, record: Mapping[str, Any]) -> None:
        """One record; it needs a ``step``."""
        if self._quiet:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in {**record, **record.get("losses", {}), **record.get("metrics", {})}.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, record["step"])

    def say(self, text: str, *, passing: bool = False) -> None:
        """A line for people; a ``passing`` one is overwritten by the next on a terminal."""
        if self._quiet:
            return
        if self._terminal:
            sys.stderr.write("\r\x1b[K" + text + ("" if passing else "\n"))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if not self._quiet:
            self._board.close()


def _precedes(record: Mapping[str, Any], checkpoint_step: int) -> bool:
    """Whether a record was written before the checkpoint of a step; evaluations of that step follow it."""
    return bool(record["step"] < checkpoint_step or (record["step"] == checkpoint_step and "metrics" not in record))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All records of a run's log; a last line cut off by a crash is left out."""
    path = folder / LOG_NAME
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class Clock:
    """Where the time of the steps since the last report went."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new report."""
        self._start = time.perf_counter()
        self.waiting = 0.0
        self.samples = 0
        self.steps = 0

    def report(self, steps_left: int, flops_per_step: float, peak_flops: float) -> dict[str, float]:
        """Samples a second, share of time spent waiting for data, MFU and seconds to the end."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return {
            "samples_per_s": round(self.samples / elapsed, 2),
            "data_share": round(self.waiting / elapsed, 4),
            "mfu": round(flops_per_step * self.steps / elapsed / peak_flops, 4) if peak_flops else 0.0,
            "eta_s": round(steps_left * elapsed / max(1, self.steps), 1),
        }


def describe(record: Mapping[str, Any], steps: int) -> str:
    """A record as one line for people."""
    parts = "  ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
    eta = timedelta(seconds=round(record["eta_s"]))
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.3f} ({parts})  lr {record['lr']:.1e}  "
        f"{record['samples_per_s']:.1f} samples/s  data {record['data_share']:.0%}  MFU {record['mfu']:.0%}  "
        f"{record['memory_gb']:.1f} GB  ETA {eta}"
    )
