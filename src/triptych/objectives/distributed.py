"""Rows from all processes, with gradients, and randomness that does not depend on how many there are.

Shape legend: B rows of this process, G rows of all processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triptych.models.protocol import Encoded


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Forward: rows of all processes. Backward: this process's rows of the gradient summed over all processes."""

    @staticmethod
    def forward(ctx: Any, x_B: Tensor) -> Tensor:
        parts = [torch.empty_like(x_B) for _ in range(world_size())]
        dist.all_gather(parts, x_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_G = grads[0].contiguous()
        dist.all_reduce(grad_G)
        return grad_G.chunk(world_size())[rank()]


def gather_rows(x_B: Tensor) -> Tensor:
    """[B, ...] of every process, in order of rank: [G, ...]. B must be the same everywhere.

    Together with the averaging of gradients over processes this gives exactly the gradient of the mean loss over
    all rows.
    """
    if world_size() == 1:
        return x_B
    if x_B.dtype == torch.bool:
        return gather_rows(x_B.byte()).bool()
    return _Gather.apply(x_B)


def gather_encoded(encoded: Encoded) -> Encoded:
    """Encoded rows of every process. Texts are padded to the longest first."""
    if world_size() == 1:
        return encoded
    if encoded.mask_BL is not None:
        length = torch.tensor(encoded.mask_BL.shape[1], device=encoded.mask_BL.device)
        dist.all_reduce(length, dist.ReduceOp.MAX)
        encoded = encoded.pad(int(length))
    mask_BL = None if encoded.mask_BL is None else gather_rows(encoded.mask_BL)
    levels = tuple(gather_rows(level) for level in encoded.levels)
    return Encoded(gather_rows(encoded.hidden_BLD), mask_BL, levels, encoded.frames)


def mean_over_all(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of this process's values such that averaging over processes gives the mean over all of them.

    Args:
        values: any shape; may be empty here and not elsewhere.
        weight: same shape, how much each value counts.
    """
    weight = torch.ones_like(values) if weight is None else weight
    count = weight.sum().detach().float()
    if world_size() > 1:
        dist.all_reduce(count)
        count = count / world_size()
    return (values * weight).sum() / count.clamp_min(1e-6 if count > 0 else 1.0)


class StepNoise:
    """Random numbers as a function of (seed, step, part, rows of all processes) alone.

    Every process draws for all rows and keeps its own, so that two processes with half a batch each draw what one
    process with the whole batch draws; and a resumed run draws what an uninterrupted one does.

    Args:
        part: which of the accumulated passes of the step.
        stream: numbers of different streams have nothing to do with each other.
        alone: the rows are of one process, whatever the others do: an evaluation.
    """

    def __init__(self, seed: int, step: int, part: int = 0, *, stream: int = 0, alone: bool = False) -> None:
        number = ((seed * 1_000_003 + step) * 1_009 + part) * 8 + stream
        self._generator = torch.Generator().manual_seed(number % 2**63)
        self._rank, self._world = (0, 1) if alone else (rank(), world_size())

    def uniform(self, rows: int, length: int, *shape: int, device: torch.device) -> Tensor:
        """[rows, length, *shape] in [0, 1) for this process's rows; a greater length only adds numbers at the end.

        Where processes draw different lengths, as for texts, it must be the only draw of its stream.
        """
        everything = torch.rand(length, *shape, rows * self._world, generator=self._generator).movedim(-1, 0)
        return everything[rows * self._rank : rows * (self._rank + 1)].to(device, non_blocking=True)
