"""Triptych: mPLUG, BridgeTower and EVE in one library.

``triptych.load`` and ``triptych.Predictor`` are imported when they are first used: ``import triptych`` does not wait
for torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.checkpoints.folder import load
    from triptych.predict import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__", "load"]

# torch asks for huge pages where it is told to before its first allocation. On a CPU most of a step's memory is touched
# for the first time, page by page: training mPLUG-small is a fifth faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {"load": "triptych.checkpoints.folder", "Predictor": "triptych.predict"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
