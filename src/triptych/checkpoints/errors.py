"""The one error of this package."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or written: one line that names the file and says what to do."""

    def __init__(self, where: str | Path, problem: str) -> None:
        super().__init__(" ".join(f"{where}: {problem}".split()))
