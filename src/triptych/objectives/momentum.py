"""The momentum teacher: an exponential moving average of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from triptych.models.protocol import VisionLanguageModel


class MomentumTeacher(nn.Module):
    """A copy of a model that follows it slowly: ``teacher = momentum * teacher + (1 - momentum) * model``.

    Args:
        frozen: parts (module names) that keep their first values. The official code forgets the fusion encoder
            (X-PLUG/mPLUG ``model_retrieval_mplug.py:168-177``), of which the MLM head is a part there;
            ``("fusion", "masked_head")`` reproduces it.
        dropout: keep dropout on in the teacher, as the official code does.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        momentum: float = 0.995,
        *,
        frozen: Sequence[str] = (),
        dropout: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], not {momentum}")
        names = {name for name, _ in model.named_modules()}
        if unknown := set(frozen) - names:
            raise ValueError(f"the model has no part called {', '.join(sorted(unknown))} to keep frozen in the teacher")
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.momentum = momentum
        self._frozen = tuple(frozen)
        self._dropout = dropout
        self.train(model.training)

    def train(self, mode: bool = True) -> MomentumTeacher:
        """The teacher stays in evaluation mode unless it was asked to keep dropout."""
        super().train(mode and self._dropout)
        return self

    @torch.no_grad()
    def update(self, model: VisionLanguageModel) -> None:
        """One step towards the model."""
        mine, theirs = self._pairs(model)
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        theirs = dict(model.named_parameters())
        followed = [
            name
            for name, _ in self.model.named_parameters()
            if not any(name == part or name.startswith(f"{part}.") for part in self._frozen)
        ]
        mine = dict(self.model.named_parameters())
        return [mine[name].data for name in followed], [theirs[name].data for name in followed]
