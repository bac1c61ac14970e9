"""What commands print: results as JSON to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys


def say(text: str) -> None:
    """A line for people."""
    sys.stderr.write(text + "\n")


def print_json(value: object) -> None:
    """A result for programs, on one line."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
