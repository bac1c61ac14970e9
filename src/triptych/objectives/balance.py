"""The auxiliary loss that keeps the experts of a soft router busy, beside any objective or task.

EVE section "Modality-Aware MoE", equation 7; the means over calls and layers as ssyze/EVE ``models/sharded_moe.py`` and
``multiway_transformer.py``.

Shape legend: E experts, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.moe import Routing, SoftMoE, record_routing
from triptych.objectives.distributed import world_size

Fractions = Literal["first", "all"]


@dataclass(frozen=True)
class BalanceConfig:
    """The auxiliary loss of networks with a soft router; others have none.

    Attributes:
        weight: alpha; 0 for none, where the load of the experts is measured all the same.
        fractions: whether f counts the first choice of each token (the released code) or all K of them.
    """

    weight: float = 0.001
    fractions: Fractions = "first"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"the weight of the auxiliary loss must not be negative: {self.weight}")
        if self.fractions not in get_args(Fractions):
            raise ValueError(f"fractions must be one of {', '.join(get_args(Fractions))}, not {self.fractions!r}")


def balance_loss(routings: Mapping[str, Sequence[Routing]], fractions: Fractions = "first") -> Tensor:
    """E sum_e f_e p_e of each call of each router: the mean over a layer's calls, then over layers. 1 is balanced.

    Fractions f are of the tokens of all processes, so that the gradients that these average are those of one process
    with all the data; f has no gradient.

    Raises:
        ValueError: no router was called.
    """
    layers = [calls for calls in routings.values() if calls]
    if not layers:
        raise ValueError("no soft router was called, so there is nothing to balance")
    flat = [call for calls in layers for call in calls]
    with torch.no_grad():
        # One row a call; layers can have different numbers of experts.
        widest = max(call.first_ME.shape[1] for call in flat)
        counted = [call.first_ME if fractions == "first" else call.chosen_ME for call in flat]
        rows = [F.pad(counts_ME.sum(0), (0, widest - counts_ME.shape[1])) for counts_ME in counted]
        tokens = torch.stack([call.first_ME.sum() for call in flat])
        sums = torch.cat([torch.stack(rows), tokens[:, None]], dim=1)
        if world_size() > 1:
            dist.all_reduce(sums)
    losses = iter(_call_loss(call, row) for call, row in zip(flat, sums, strict=True))
    return torch.stack([torch.stack([next(losses) for _ in calls]).mean() for calls in layers]).mean()


def _call_loss(call: Routing, counted: Tensor) -> Tensor:
    """``counted``: f before division for every expert, and last the tokens, of all processes."""
    E = call.probability_ME.shape[1]
    tokens = counted[-1].clamp(min=1)
    share_E = counted[:E] / counted[:E].sum().clamp(min=1)
    probability_E = call.probability_ME.sum(0) * world_size() / tokens
    return E * (share_E * probability_E).sum()


class Balanced(nn.Module):
    """A task together with the auxiliary loss of its network's soft routers.

    Attributes:
        measures: the task's, and ``busiest`` (how many times its equal share the busiest expert has, in the worst
            layer), ``idle`` (share of experts without a token) and with a capacity ``dropped`` (choices per token).
    """

    def __init__(self, task: nn.Module, config: BalanceConfig) -> None:
        super().__init__()
        self.task = task
        self.config = config
        self.measures: dict[str, Tensor] = {}

    @property
    def kept(self) -> nn.Module:
        """The task's."""
        return self.task.kept  # type: ignore[return-value]

    def forward(self, batch: Any, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """The task's losses, and ``balance``, already weighted, unless its weight is 0."""
        with record_routing(self.task) as routings:
            losses: dict[str, Tensor] = dict(self.task(batch, step, part))
        self.measures = dict(getattr(self.task, "measures", {})) | load_measures(routings)
        if self.config.weight and any(routings.values()):
            losses["balance"] = self.config.weight * balance_loss(routings, self.config.fractions)
        return losses


def has_soft_router(model: nn.Module) -> bool:
    """Whether there is something to balance."""
    return any(isinstance(module, SoftMoE) for module in model.modules())


@torch.no_grad()
def load_measures(routings: Mapping[str, Sequence[Routing]]) -> dict[str, Tensor]:
    """How evenly this process's tokens are spread; empty where no router was called."""
    loads = [sum(call.chosen_ME.sum(0) for call in calls) for calls in routings.values() if calls]
    if not loads:
        return {}
    shares = [load_E / load_E.sum().clamp(min=1) for load_E in loads]  # type: ignore[union-attr]
    measures = {
        "busiest": torch.stack([share_E.max() * len(share_E) for share_E in shares]).max(),
        "idle": torch.cat([(share_E == 0).float() for share_E in shares]).mean(),
    }
    counted = [(call.dropped, call.first_ME) for calls in routings.values() for call in calls]
    dropped = [lost for lost, _ in counted if lost is not None]
    if dropped:
        tokens = torch.stack([first_ME.sum() for lost, first_ME in counted if lost is not None]).sum()
        measures["dropped"] = torch.stack(dropped).sum() / tokens.clamp(min=1)
    return measures
