"""Muon: momentum whose matrices are made orthogonal before they are added.

Jordan et al. 2024 (KellerJordan/Muon). The arithmetic is that of ``torch.optim.Muon`` with its defaults, which always
iterates in bf16, one matrix at a time. On a processor without bf16 arithmetic that took 3.6 s a step of mPLUG-tiny,
twice the rest of it, and takes 0.2 s so: here matrices of one shape are iterated together, in fp32 where bf16 is slow.
A stack of matrices, such as the weights of experts, is a parameter like any other.

Shape legend: M matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from triptych.training.parallel import fast_bf16

_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices_MRC: Tensor) -> Tensor:
    """Nearly the orthogonal matrix nearest to each, by Newton and Schulz's iteration: singular values of about 1.

    In the dtype of the input, or in bf16 where the processor is fast in it.
    """
    dtype = matrices_MRC.dtype
    x_MRC = matrices_MRC.bfloat16() if fast_bf16(matrices_MRC.device) else matrices_MRC
    tall = x_MRC.shape[1] > x_MRC.shape[2]
    if tall:
        x_MRC = x_MRC.transpose(1, 2)
    x_MRC = x_MRC / x_MRC.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram_MRR = x_MRC @ x_MRC.transpose(1, 2)
        gram_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, gram_MRR, x_MRC, beta=a)
    return (x_MRC.transpose(1, 2) if tall else x_MRC).to(dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; for matrices [R, C] and stacks of them [M, R, C].

    Args:
        params: parameters or groups of them; a group's ``lr`` and ``weight_decay`` are as in AdamW. Matrices with more
            rows than columns take steps larger by the root of that ratio.
        momentum: of the average of gradients.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon is for matrices, and this parameter is {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[Any, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = (parameter.shape[-2:], parameter.device, parameter.dtype)
                    by_shape.setdefault(shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters whose matrices have one shape."""
        rows, columns = parameters[0].shape[-2:]
        updates = [self._momentum(parameter, group["momentum"]).view(-1, rows, columns) for parameter in parameters]
        counts = [len(update_MRC) for update_MRC in updates]
        directions = orthogonalized(torch.cat(updates)).split_with_sizes(counts)
        rate = group["lr"] * math.sqrt(max(1, rows / columns))
        for parameter, direction_MRC in zip(parameters, directions, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction_MRC.view_as(parameter), alpha=-rate)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """What is made orthogonal."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)
