"""EVE's modality-aware mixture of experts: a soft router, dropless dispatch, and the experts side by side.

Chen et al., AAAI 2024, arXiv 2308.11971, section "Modality-Aware MoE", equations 4 to 7.

Tokens are sorted by their expert, so that all experts are two grouped matrix products; nothing of size
S x E x capacity is ever made, and no token is dropped unless a capacity is asked for.

Shape legend: S tokens of a whole batch, E experts, K experts a token (1 or 2), R rows that experts compute (real tokens
times K), D width, F hidden width of an expert, M modalities (0 image, 1 text).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from triptych.models.layers import ACTIVATIONS, Activation

MODALITIES = 2
Noise = Literal["none", "gumbel"]


@dataclass(frozen=True)
class MoEConfig:
    """How tokens choose experts; the defaults are the paper's, or where it says nothing the safe choice.

    Attributes:
        experts: E.
        top_k: K, 1 or 2. The weights of two are made to add up to one; a single one keeps its probability, from which
            the router learns.
        modality_routing: the router sees tokens with a learned vector of their modality added (equation 6).
        modality_into_experts: the experts see that vector, too, as in the released code, whose weights need it.
        route_padding: padding is routed and counted, as in the released code, where it would otherwise be left out.
        noise: ``gumbel`` draws the second expert at random, in training only (the released code: always).
        capacity: with a number c an expert takes at most ``c * K * S / E`` tokens (at least 4) and the others lose it
            (GShard; the released code: 1.0). The paper keeps all tokens: ``None``.
    """

    experts: int = 32
    top_k: int = 2
    modality_routing: bool = True
    modality_into_experts: bool = False
    route_padding: bool = False
    noise: Noise = "none"
    capacity: float | None = None

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1, not {self.experts}")
        if not 1 <= self.top_k <= min(2, self.experts):
            raise ValueError(f"top_k must be 1 or 2 and at most the {self.experts} experts, not {self.top_k}")
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, not {self.noise!r}")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity must be positive or None, not {self.capacity}")
        if self.modality_into_experts and not self.modality_routing:
            raise ValueError("modality_into_experts needs modality_routing: there is no vector of a modality without")


@dataclass(frozen=True)
class Routing:
    """What one call of a router decided, for the auxiliary loss and for looking at the load of experts.

    Attributes:
        probability_ME: sums over the tokens of a modality of the probabilities of each expert, with gradients.
        first_ME: how many tokens have this expert as their first choice.
        chosen_ME: how many tokens have it as any choice, before dropping.
        dropped: choices that found no room; ``None`` without a capacity.
    """

    probability_ME: Tensor
    first_ME: Tensor
    chosen_ME: Tensor
    dropped: Tensor | None


@dataclass(frozen=True)
class Choice:
    """The experts of each token and their weights, [S, K]; a choice of weight 0 was dropped."""

    expert_SK: Tensor
    weight_SK: Tensor


class Router(nn.Module):
    """Chooses experts: softmax of a linear map of (token + vector of its modality), equations 4 to 6, in fp32."""

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(width, config.experts, bias=False)
        self.modality = nn.Parameter(torch.zeros(MODALITIES, width)) if config.modality_routing else None

    def forward(
        self, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None, *, count: bool = True
    ) -> tuple[Choice, Routing | None]:
        """Choices and, where they are to be counted, the counts.

        Args:
            real_S: which tokens take part; ``None`` for all.
        """
        of_SM = one_hot(modality_S, MODALITIES, torch.float32)
        with torch.autocast(x_SD.device.type, enabled=False):
            logits_SE = self._logits(x_SD.float(), of_SM)
            probability_SE = logits_SE.softmax(-1)
            expert_SK = self._choose(logits_SE)
            weight_SK = probability_SE.gather(1, expert_SK)
            kept_SK = None if self.config.capacity is None else self._with_room(expert_SK, real_S)
            if kept_SK is not None:
                weight_SK = weight_SK * kept_SK
            if self.config.top_k > 1:
                weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
            routing = self._count(probability_SE, expert_SK, of_SM, real_S, kept_SK) if count else None
        return Choice(expert_SK, weight_SK), routing

    def add_modality(self, x_SD: Tensor, modality_S: Tensor) -> Tensor:
        """x + b, for experts that see what the router sees."""
        if self.modality is None:
            return x_SD
        image_D, text_D = self.modality
        return x_SD + torch.where(modality_S[:, None] == 0, image_D, text_D)

    def _logits(self, x_SD: Tensor, of_SM: Tensor) -> Tensor:
        """W (x + b) as W x + W b, which makes no second copy of the tokens."""
        gate_ED = self.gate.weight.float()
        logits_SE = F.linear(x_SD, gate_ED)
        if self.modality is None or self.config.modality_into_experts:  # then x has it already
            return logits_SE
        return torch.addmm(logits_SE, of_SM, F.linear(self.modality.float(), gate_ED))

    @torch.no_grad()
    def _choose(self, logits_SE: Tensor) -> Tensor:
        """The K best experts of each token; the lower number among equals, so that a choice never depends on luck."""
        first_S = logits_SE.argmax(1)
        if self.config.top_k == 1:
            return first_S[:, None]
        if self.training and self.config.noise == "gumbel":
            uniform_SE = torch.rand_like(logits_SE).clamp(1e-9, 1 - 1e-7)
            logits_SE = logits_SE - torch.log(-torch.log(uniform_SE))
        second_S = logits_SE.scatter(1, first_S[:, None], -math.inf).argmax(1)
        return torch.stack([first_S, second_S], dim=1)

    def _count(
        self,
        probability_SE: Tensor,
        expert_SK: Tensor,
        of_SM: Tensor,
        real_S: Tensor | None,
        kept_SK: Tensor | None,
    ) -> Routing:
        if real_S is not None:
            of_SM = of_SM * real_S[:, None]
        chosen_SKE = one_hot(expert_SK, self.config.experts, of_SM.dtype)
        first_ME, chosen_ME = of_SM.T @ chosen_SKE[:, 0], of_SM.T @ chosen_SKE.sum(1)
        dropped = None if kept_SK is None else (of_SM.sum(1, keepdim=True) * (1 - kept_SK)).sum()
        return Routing(of_SM.T @ probability_SE, first_ME, chosen_ME, dropped)

    def _with_room(self, expert_SK: Tensor, real_S: Tensor | None) -> Tensor:
        """Which choices find room, [S, K], by GShard's rule: first choices in the order of the batch, then second ones.

        Source: microsoft/DeepSpeed ``deepspeed/moe/sharded_moe.py`` top2gating.
        """
        S, K = expert_SK.shape
        assert self.config.capacity is not None
        room = max(4, math.ceil(self.config.capacity * K * S / self.config.experts))
        queue_XE = one_hot(expert_SK.T.flatten(), self.config.experts, torch.float32)
        if real_S is not None:
            queue_XE = queue_XE * real_S.repeat(K)[:, None]
        before_X = ((queue_XE.cumsum(0) - queue_XE) * queue_XE).sum(1)
        return (before_X < room).view(K, S).T.to(queue_XE.dtype)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One more dimension: 1 where it is the index, else 0. Products with it take the place of looking up in few rows.

    To those gradients would be added one by one, which takes long, and on a GPU comes in no certain order.
    """
    return (index[..., None] == torch.arange(classes, device=index.device)).to(dtype)


class Dispatch:
    """Where each choice of each token stands when choices are sorted by expert.

    Attributes:
        choice_R: which choice each row is, of S K: those of a token are next to each other.
        token_R: its token.
        place_KS: the row of the k-th choice of each token; 0 for tokens that do not take part.
        counts_E: rows of each expert.
        real_S: tokens that take part, or None for all.
    """

    def __init__(self, expert_SK: Tensor, experts: int, real_S: Tensor | None, rows: int) -> None:
        """``rows`` is R, which is known before, so that a GPU need not be waited for."""
        S, K = expert_SK.shape
        if real_S is not None:
            expert_SK = torch.where(real_S[:, None], expert_SK, experts)  # the last, and cut off
        expert_X = expert_SK.flatten()
        order_X = expert_X.argsort(stable=True)
        place_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(S * K, device=order_X.device))
        self.choice_R = order_X[:rows]
        self.token_R = self.choice_R // K
        self.place_KS = place_X.view(S, K).T.contiguous()
        if real_S is not None:
            self.place_KS = self.place_KS * real_S
        self.counts_E = torch.zeros(experts + 1, dtype=torch.long, device=order_X.device).scatter_add_(
            0, expert_X, torch.ones_like(order_X)
        )[:experts]
        self.real_S = real_S

    def rows(self, x_SD: Tensor) -> Tensor:
        """[S, D] tokens to [R, D] rows."""
        return _ToRows.apply(x_SD, self.token_R, self.place_KS, self.real_S)

    def tokens(self, y_RD: Tensor, weight_SK: Tensor) -> Tensor:
        """[R, D] rows to [S, D] tokens: the weighted sum of a token's K rows; 0 where a token takes no part."""
        if self.real_S is not None:
            weight_SK = weight_SK * self.real_S[:, None]
        return _FromRows.apply(y_RD, weight_SK.to(y_RD.dtype), self.choice_R, self.token_R, self.place_KS)


class _ToRows(torch.autograd.Function):
    """A gather whose gradient is a gather, too: adding into rows is slow, and on a GPU in no certain order."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, token_R: Tensor, place_KS: Tensor, real_S: Tensor | None) -> Tensor:
        ctx.save_for_backward(place_KS, real_S)
        return x_SD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        place_KS, real_S = ctx.saved_tensors
        grad_SD = _gathered(grad_RD, place_KS, None)
        if real_S is not None:
            grad_SD = grad_SD.masked_fill_(~real_S[:, None], 0)
        return grad_SD, None, None, None


class _FromRows(torch.autograd.Function):
    """The weighted sum of the rows of each token. Nothing of size S x K x D is made or kept."""

    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_SK: Tensor, choice_R: Tensor, token_R: Tensor, place_KS: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weight_SK, choice_R, token_R)
        return _gathered(y_RD, place_KS, weight_SK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_RD, weight_SK, choice_R, token_R = ctx.saved_tensors
        grad_RD = grad_SD.index_select(0, token_R)
        grad_R = torch.linalg.vecdot(grad_RD, y_RD)
        grad_SK = torch.zeros_like(weight_SK).flatten().scatter_(0, choice_R, grad_R).view_as(weight_SK)
        weight_R1 = weight_SK.flatten().index_select(0, choice_R)[:, None]
        return grad_RD.mul_(weight_R1), grad_SK, None, None, None


def _gathered(x_RD: Tensor, place_KS: Tensor, weight_SK: Tensor | None) -> Tensor:
    """[S, D]: the (weighted) sum of each token's rows."""
    if len(x_RD) == 0:  # nobody takes part
        return x_RD.new_zeros(place_KS.shape[1], x_RD.shape[1])
    first_S, *others = place_KS
    sum_SD = x_RD.index_select(0, first_S)
    if weight_SK is not None:
        sum_SD.mul_(weight_SK[:, :1])
    for k, place_S in enumerate(others, start=1):
        own_SD = x_RD.index_select(0, place_S)
        if weight_SK is None:
            sum_SD.add_(own_SD)
        else:
            sum_SD.addcmul_(own_SD, weight_SK[:, k : k + 1])
    return sum_SD


class Experts(nn.Module):
    """E feed-forward networks; each has its rows of one tensor."""

    def __init__(self, experts: int, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.expand = nn.Parameter(torch.empty(experts, hidden, width))
        self.expand_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.contract = nn.Parameter(torch.empty(experts, width, hidden))
        self.contract_bias = nn.Parameter(torch.zeros(experts, width))
        self.activation = activation

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, of which each expert has ``counts_E``, to rows."""
        rows = Rows.of(counts_E, len(x_RD))
        hidden_RF = ACTIVATIONS[self.activation](rows.linear(x_RD, self.expand, self.expand_bias))
        return rows.linear(hidden_RF, self.contract, self.contract_bias)


@dataclass(frozen=True)
class Rows:
    """Rows sorted by expert: where those of each expert end, int32, and whose each is."""

    ends_E: Tensor
    expert_R: Tensor

    @staticmethod
    def of(counts_E: Tensor, rows: int) -> Rows:
        """``rows``, the sum of the counts, is given, so that a GPU need not be waited for."""
        number_E = torch.arange(len(counts_E), device=counts_E.device)
        expert_R = number_E.repeat_interleave(counts_E, output_size=rows)
        return Rows(counts_E.cumsum(0, dtype=torch.int32), expert_R)

    def linear(self, x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor) -> Tensor:
        """Each row times the matrix of its expert, plus its bias."""
        dtype = arithmetic(x_RI)
        y_RO = F.grouped_mm(x_RI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), offs=self.ends_E)
        return self.add_bias(y_RO, bias_EO.to(dtype), by_product=y_RO.is_cuda)

    def add_bias(self, y_RO: Tensor, bias_EO: Tensor, *, by_product: bool) -> Tensor:
        """In place; ``by_product`` for a GPU, where a product adds up the gradients of a bias, as :func:`one_hot` says.

        A CPU adds them up well, and without AVX512-BF16 is slow at products in bf16.
        """
        if by_product:
            return y_RO.addmm_(one_hot(self.expert_R, len(bias_EO), y_RO.dtype), bias_EO)
        return y_RO.add_(bias_EO.index_select(0, self.expert_R))


def arithmetic(x: Tensor) -> torch.dtype:
    """In which precision matrix products are done: that of autocast, or the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class SoftMoE(nn.Module):
    """Routes every token to its experts and adds up what they make of it (equation 5)."""

    def __init__(self, width: int, hidden: int, config: MoEConfig, activation: Activation) -> None:
        super().__init__()
        self.config = config
        self.router = Router(width, config)
        self.experts = Experts(config.experts, width, hidden, activation)
        self.routings: list[Routing] | None = None

    def forward(
        self, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None = None, real: int | None = None
    ) -> Tensor:
        """[S, D] tokens to [S, D]; padding, which takes no part, becomes 0.

        Args:
            modality_S: 0 for image tokens, 1 for text tokens.
            real_S: bool, ``False`` for padding; ``None`` where there is none.
            real: how many tokens are real, where the caller knows it.
        """
        y_SD, routing = self.mix(x_SD, modality_S, real_S, real)
        self.record(routing)
        return y_SD

    def mix(
        self, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None = None, real: int | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The same, and what :meth:`record` wants, for a caller that is compiled, or recomputed in the backward pass.

        It depends on nobody's recording then, and nothing is recorded twice.
        """
        if real_S is None or self.config.route_padding:
            real_S, real = None, len(x_SD)
        elif real is None:
            real = int(real_S.sum())
        if self.config.modality_into_experts:
            x_SD = self.router.add_modality(x_SD, modality_S)
        count = torch.is_grad_enabled() or self.routings is not None
        choice, routing = self.router(x_SD, modality_S, real_S, count=count)
        dispatch = Dispatch(choice.expert_SK, self.config.experts, real_S, real * self.config.top_k)
        rows_RD = dispatch.rows(x_SD.to(arithmetic(x_SD)))  # cast before there are K rows of each
        return dispatch.tokens(self.experts(rows_RD, dispatch.counts_E), choice.weight_SK), routing

    def record(self, routing: Routing | None) -> None:
        """Tell whoever is inside :func:`record_routing`."""
        if self.routings is not None and routing is not None:
            self.routings.append(routing)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect what every soft router decides inside the block, by the name of its layer: one entry a call."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SoftMoE)}
    found: dict[str, list[Routing]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.routings = found[name]
    try:
        yield found
    finally:
        for layer in layers.values():
            layer.routings = None
