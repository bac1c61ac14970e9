"""Expert parallelism: each process keeps its share of a soft router's experts, and tokens travel to their experts.

Lepikhin et al. 2021 (GShard), section 3, here without a capacity: the processes tell each other how many rows they
send, exchange them (all-to-all), run their own experts, and send the results back. Everything else of a network is the
same in all processes, and the network knows nothing of it: :func:`spread_experts` exchanges its
:class:`~triptych.models.moe.Experts` for :class:`SpreadExperts`, which are called alike.

Shape legend: E experts of a layer, W processes, O = E / W experts of this process, R rows (tokens times choices) of
this process's batch, Q rows of all batches that are for this process's experts, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from triptych.models.moe import Experts, SoftMoE

if TYPE_CHECKING:
    from triptych.training.optim import Optimizers

_PATIENCE = timedelta(minutes=30)
"""A process waits so long for the others' rows: there is no evaluation between, only batches that come late."""


class Ranks:
    """The processes among which experts are spread; copies of a module share it, for a group cannot be copied."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def exchange(self, x_R: Tensor, leaving_W: list[int], arriving_W: list[int]) -> Tensor:
        """Rows to every process in order of rank, and those that come from them likewise."""
        y_Q = x_R.new_empty(sum(arriving_W), *x_R.shape[1:])
        dist.all_to_all_single(y_Q, x_R.contiguous(), arriving_W, leaving_W, group=self.group)
        return y_Q


class Journey:
    """The way of one call's rows to their experts and back.

    Rows come sorted by expert, so those of a process are together. From there they arrive sorted by expert within each
    sender, and are sorted by expert alone: rows of an expert stand in the order of one process with the whole batch.

    Attributes:
        counts_O: how many rows each of this process's experts gets.
    """

    def __init__(self, counts_E: Tensor, ranks: Ranks) -> None:
        self._ranks = ranks
        leaving_WO = counts_E.view(ranks.world, -1)
        arriving_WO = torch.empty_like(leaving_WO)
        dist.all_to_all_single(arriving_WO, leaving_WO.contiguous(), group=ranks.group)
        # Both at once: a GPU has to finish all that it was given before it can say how many rows there are.
        self._leaving_W, self._arriving_W = torch.stack([leaving_WO.sum(1), arriving_WO.sum(1)]).tolist()
        self.counts_O = arriving_WO.sum(0)
        own_WO = torch.arange(len(self.counts_O), device=counts_E.device).repeat(ranks.world)
        expert_Q = own_WO.repeat_interleave(arriving_WO.flatten(), output_size=sum(self._arriving_W))
        self._order_Q = expert_Q.argsort(stable=True)
        self._place_Q = torch.empty_like(self._order_Q)
        self._place_Q[self._order_Q] = torch.arange(len(expert_Q), device=counts_E.device)

    def there(self, x_RD: Tensor) -> Tensor:
        """This process's rows to the rows of this process's experts, [Q, D]."""
        return self._ranks.exchange(x_RD, self._leaving_W, self._arriving_W).index_select(0, self._order_Q)

    def back(self, y_QD: Tensor) -> Tensor:
        """What :meth:`there` gave to where it came from, [R, D]."""
        return self._ranks.exchange(y_QD.index_select(0, self._place_Q), self._arriving_W, self._leaving_W)


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.there(x_RD)

    @staticmethod
    def backward(ctx: Any, grad_QD: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.back(grad_QD), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_QD: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.back(y_QD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.there(grad_RD), None


class SpreadExperts(Experts):
    """This process's share of a layer's experts, called with rows for all of them.

    All processes must call it equally often, with any number of rows. Gradients are those of the mean of the processes'
    losses, as DDP's are: they need no averaging.
    """

    def __init__(self, whole: Experts, ranks: Ranks) -> None:
        experts, hidden, width = whole.expand.shape
        with torch.device("meta"):
            super().__init__(experts // ranks.world, width, hidden, whole.activation)
        self.ranks = ranks
        for name, parameter in whole.named_parameters():
            values = parameter.detach()
            dist.broadcast(values, 0, group=ranks.group)  # as DDP does: all begin with what the first has
            own = nn.Parameter(values.chunk(ranks.world)[ranks.rank].clone(), requires_grad=parameter.requires_grad)
            if own.requires_grad:
                own.register_hook(self._of_the_mean)  # type: ignore[no-untyped-call]
            setattr(self, name, own)

    def _of_the_mean(self, grad: Tensor) -> Tensor:
        """The rows of all processes bring the sum of what each one's loss wants."""
        return grad / self.ranks.world

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        kind = x_RD.device.type
        if torch.is_autocast_enabled(kind):  # the products would do it there, and so half the bytes travel
            x_RD = x_RD.to(torch.get_autocast_dtype(kind))
        journey = Journey(counts_E, self.ranks)
        x_QD = _There.apply(x_RD, journey)
        if len(x_QD):
            y_QD = super().forward(x_QD, journey.counts_O)
        else:  # the way back is waited for by the others, and gradients are 0 as those of any expert without a token
            nothing = 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
            y_QD = x_QD + nothing.to(x_QD.dtype)
        return _Back.apply(y_QD, journey)

    def gather(self) -> Experts | None:
        """All experts of the layer, on the first process; ``None`` on the others. All must call it."""
        parts: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            own = parameter.detach()
            found = [torch.empty_like(own) for _ in range(self.ranks.world)] if self.ranks.rank == 0 else None
            dist.gather(own, found, 0, group=self.ranks.group)
            if found is not None:
                parts[name] = torch.cat(found)
        if not parts:
            return None
        experts, hidden, width = parts["expand"].shape
        with torch.device("meta"):
            whole = Experts(experts, width, hidden, self.activation)
        whole.load_state_dict(parts, assign=True)
        return whole.requires_grad_(self.expand.requires_grad)


def check_spreads(module: nn.Module, world: int) -> None:
    """Whether the experts of every soft router can be spread evenly among so many processes.

    Raises:
        ValueError: they cannot, or there is none.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, SoftMoE)}
    if not layers:
        raise ValueError("expert_parallel spreads the experts of soft routers, and this model has none: turn it off")
    for name, layer in layers.items():
        if layer.config.experts % world:
            raise ValueError(
                f"expert_parallel: the {layer.config.experts} experts of {name} cannot be spread evenly among {world} "
                "processes: start a number of them that divides it, or turn expert_parallel off"
            )


def spread_experts(module: nn.Module) -> set[str]:
    """Leave each process its share of the experts of every soft router, in place, after :func:`check_spreads`.

    All processes must call it.

    Returns:
        Names of the parameters that differ between processes, which DDP must leave alone.
    """
    # Apart from DDP's, whose reductions of gradients go on while a backward pass exchanges rows.
    group = dist.new_group(timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    ranks = Ranks(group)
    for layer in module.modules():
        if isinstance(layer, SoftMoE):
            layer.experts = SpreadExperts(layer.experts, ranks)
    return spread_names(module)


def spread_names(module: nn.Module) -> set[str]:
    """Names of the parameters that differ between processes."""
    return {
        f"{prefix}.{name}"
        for prefix, experts in module.named_modules()
        if isinstance(experts, SpreadExperts)
        for name, _ in experts.named_parameters()
    }


@contextmanager
def whole_experts(module: nn.Module) -> Iterator[None]:
    """Within the block the first process has all experts, so that it can evaluate and save by itself.

    All processes must come here, and only the first may call the module inside.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SoftMoE)]
    spread = [(layer, layer.experts) for layer in layers if isinstance(layer.experts, SpreadExperts)]
    for layer, experts in spread:
        layer.experts = experts.gather() or experts
    try:
        yield
    finally:
        for layer, experts in spread:
            layer.experts = experts


def clip_gradients(module: nn.Module, largest: float) -> Tensor:
    """Cut the gradients to a norm over the parameters of all processes, which is returned; the same everywhere."""
    spread = [part for part in module.modules() if isinstance(part, SpreadExperts)]
    if not spread:
        return nn.utils.clip_grad_norm_(module.parameters(), largest)
    parameters = list(module.parameters())
    own = {id(parameter) for part in spread for parameter in part.parameters()}
    square = _square(parameter for parameter in parameters if id(parameter) in own).to(parameters[0].device)
    dist.all_reduce(square, group=spread[0].ranks.group)
    norm = (square + _square(parameter for parameter in parameters if id(parameter) not in own)).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _square(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of the norm of their gradients."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(grads).square()


def take_own(
    state: Mapping[str, Any], task: nn.Module, average: AveragedModel | None, optimizer: Optimizers
) -> dict[str, Any]:
    """Move what only this process has out of a checkpoint's state, and return it; empty where nothing is spread.

    Args:
        state: ``task``, ``average`` and ``optimizer``, each as its ``state_dict`` gave it.
    """
    if not spread_names(task):
        return {}
    parts = zip(state["optimizer"]["parts"], _spread_numbers(task, optimizer), strict=True)
    return {
        "task": _take(state["task"], spread_names(task)),
        "average": None if average is None else _take(state["average"], spread_names(average)),
        "optimizer": [_take(part["state"], numbers) for part, numbers in parts],
    }


def put_own(state: Mapping[str, Any], own: Mapping[str, Any], task: nn.Module, path: Path) -> None:
    """The opposite of :func:`take_own`.

    Raises:
        ValueError: the checkpoint was written with experts spread and is resumed without, or the other way round.
    """
    spread = bool(spread_names(task))
    if bool(own) != spread:
        raise ValueError(f"{path} was written with expert_parallel {'off' if spread else 'on'}: resume it like that")
    if not own:
        return
    state["task"].update(own["task"])
    if state["average"] is not None:
        state["average"].update(own["average"])
    for part, values in zip(state["optimizer"]["parts"], own["optimizer"], strict=True):
        part["state"].update(values)


def _take(values: dict[Any, Any], names: Iterable[Any]) -> dict[Any, Any]:
    return {name: values.pop(name) for name in names if name in values}


def _spread_numbers(task: nn.Module, optimizer: Optimizers) -> list[list[int]]:
    """By which numbers the state of each optimiser calls the parameters that differ between processes."""
    names = spread_names(task)
    own = {id(parameter) for name, parameter in task.named_parameters() if name in names}
    ordered = [[parameter for group in part.param_groups for parameter in group["params"]] for part in optimizer.parts]
    return [[number for number, parameter in enumerate(part) if id(parameter) in own] for part in ordered]
