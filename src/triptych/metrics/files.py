"""Reading the JSON files that owners of data sets publish, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message names the file.
    """
    content = Path(path).read_bytes()
    try:
        return json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error


def read_texts(path: Path) -> list[str]:
    """A JSON list of texts, or the keys of a JSON object."""
    values = read_json(path)
    values = list(values) if isinstance(values, dict) else values
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{path} must be a JSON list of texts, or an object whose keys they are")
    return values
