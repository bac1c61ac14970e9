"""What stands beside a weights file: configurations and vocabularies."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

from triptych.checkpoints.errors import CheckpointError


class Beside:
    """Values of a JSON configuration next to the weights, type-checked when they are read.

    Attributes:
        path: the file they come from; None where there is none, and then every value is None.
    """

    def __init__(self, weights: Path, *names: str) -> None:
        folder = weights if weights.is_dir() else weights.parent
        self.path = next((folder / name for name in names if (folder / name).is_file()), None)
        self._values: dict[str, Any] = {}
        if self.path is not None:
            self._values = read_json(self.path)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def part(self, key: str) -> Beside:
        """The configuration nested under ``key``; an empty one where there is none."""
        inner = self._values.get(key)
        part = copy(self)
        part._values = inner if isinstance(inner, dict) else {}
        return part

    def integer(self, *keys: str) -> int | None:
        """The first of these keys that is there, an integer of at least 1."""
        value = self._first(keys)
        if value is None:
            return None
        if type(value) is not int or value < 1:
            raise CheckpointError(str(self.path), f"{keys[0]} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str) -> float | None:
        """A number of at least 0."""
        value = self._first((key,))
        if value is None:
            return None
        if type(value) not in (int, float) or value < 0:
            raise CheckpointError(str(self.path), f"{key} must be a number of at least 0, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool | None:
        """True or false."""
        value = self._first((key,))
        if value is None or isinstance(value, bool):
            return value
        raise CheckpointError(str(self.path), f"{key} must be true or false, not {value!r}")

    def text(self, *keys: str) -> str | None:
        """The first of these keys that is there, a string."""
        value = self._first(keys)
        if value is None or isinstance(value, str):
            return value
        raise CheckpointError(str(self.path), f"{keys[0]} must be a string, not {value!r}")

    def _first(self, keys: tuple[str, ...]) -> Any:
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(path, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(path, f"must hold a JSON object, not a {type(values).__name__}")
    return values
