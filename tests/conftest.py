"""What every test shares: a fixed seed, one thread, and the folder of shared data."""

import os
from pathlib import Path

import pytest
import torch

# Tests compute with tiny tensors, where a second thread only waits: five times slower on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data folder: ``TRIPTYCH_SHARED``, by default ``../shared`` beside the checkout."""
    folder = Path(os.environ.get("TRIPTYCH_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set TRIPTYCH_SHARED to the shared data")
    return folder
