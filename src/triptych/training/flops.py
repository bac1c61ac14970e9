"""How much arithmetic a step is, and how much the processor can do."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets.
_GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}


def _grouped_flops(x: Sequence[int], y: Sequence[int], *_: Any, **__: Any) -> int:
    """Of a grouped matrix product, from the shapes of its factors; of two matrices, the groups share what is summed."""
    groups = x[0] if len(x) == len(y) == 3 else 1
    return 2 * groups * x[-2] * x[-1] * y[-1]


UNCOUNTED: dict[Any, Callable[..., int]] = {torch.ops.aten._grouped_mm: _grouped_flops}
"""What torch's own counter of operations (2.15) takes for nothing, and what it is."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The stated bf16 peak of a known GPU; elsewhere the rate of a large matrix product, measured in a moment."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in _GPU_PEAKS.items():
            if known in name:
                return peak
    return matmul_rate(device, dtype)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1536, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product."""
    # Constants: random numbers would come from the generator whose state a resumed run has just restored.
    x, y = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    F.linear(x, y)
    rounds, start = 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - start < seconds:
        F.linear(x, y)
        rounds += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 2 * size**3 * rounds / (time.perf_counter() - start)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory use so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
