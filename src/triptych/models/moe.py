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
        dropped: choices that found no room.
    """

    probability_ME: Tensor
    first_ME: Tensor
    chosen_ME: Tensor
    dropped: Tensor


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

    def forward(self, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None) -> tuple[Choice, Routing]:
        """``real_S`` says which tokens take part; ``None`` for all."""
        with torch.autocast(x_SD.device.type, enabled=False):
            logits_SE = self._logits(x_SD.float(), modality_S)
            probability_SE = logits_SE.softmax(-1)
            expert_SK = self._choose(logits_SE)
            weight_SK = probability_SE.gather(1, expert_SK)
            routing, kept_SK = self._account(probability_SE, expert_SK, modality_S, real_S)
            if kept_SK is not None:
                weight_SK = weight_SK * kept_SK
            if self.config.top_k > 1:
                weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        return Choice(expert_SK, weight_SK), routing

    def _logits(self, x_SD: Tensor, modality_S: Tensor) -> Tensor:
        """W (x + b) as W x + W b, which makes no second copy of the tokens."""
        gate_ED = self.gate.weight.float()
        logits_SE = F.linear(x_SD, gate_ED)
        if self.modality is None or self.config.modality_into_experts:  # then x has it already
            return logits_SE
        return logits_SE + F.linear(self.modality.float(), gate_ED)[modality_S]

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

    def _account(
        self, probability_SE: Tensor, expert_SK: Tensor, modality_S: Tensor, real_S: Tensor | None
    ) -> tuple[Routing, Tensor | None]:
        """Counts, and with a capacity which choices find room, [S, K]."""
        E = self.config.experts
        of_ME = F.one_hot(modality_S, MODALITIES).to(probability_SE.dtype)
        if real_S is not None:
            of_ME = of_ME * real_S[:, None]
        chosen_SKE = F.one_hot(expert_SK, E).to(probability_SE.dtype)
        first_ME, chosen_ME = of_ME.T @ chosen_SKE[:, 0], of_ME.T @ chosen_SKE.sum(1)
        kept_SK = None
        dropped = probability_SE.new_zeros(())
        if self.config.capacity is not None:
            kept_SK = self._with_room(chosen_SKE, of_ME.sum(1))
            dropped = (of_ME.sum(1)[:, None] * (1 - kept_SK)).sum()
        return Routing(of_ME.T @ probability_SE, first_ME, chosen_ME, dropped), kept_SK

    def _with_room(self, chosen_SKE: Tensor, real_S: Tensor) -> Tensor:
        """GShard's rule: first choices in the order of the batch, then second choices, until an expert is full.

        Source: microsoft/DeepSpeed ``deepspeed/moe/sharded_moe.py`` top2gating.
        """
        S, K, E = chosen_SKE.shape
        assert self.config.capacity is not None
        room = max(4, math.ceil(self.config.capacity * K * S / E))
        queue_XE = (chosen_SKE * real_S[:, None, None]).transpose(0, 1).reshape(K * S, E)
        before_X = ((queue_XE.cumsum(0) - queue_XE) * queue_XE).sum(1)
        return (before_X < room).view(K, S).T.to(chosen_SKE.dtype)


class Dispatch:
    """Where each choice of each token stands when choices are sorted by expert.

    Attributes:
        token_R: the token of each row.
        place_SK: the row of each choice; 0 for tokens that do not take part.
        counts_E: rows of each expert.
        real_S: tokens that take part, or None for all.
    """

    def __init__(self, expert_SK: Tensor, experts: int, real_S: Tensor | None, rows: int) -> None:
        """``rows`` is R, which is known before, so that a GPU need not be waited for."""
        S, K = expert_SK.shape
        if real_S is not None:
            expert_SK = torch.where(real_S[:, None], expert_SK, experts)  # the last, and cut off
        order_X = expert_SK.flatten().argsort(stable=True)
        place_X = torch.empty_like(order_X)
        place_X[order_X] = torch.arange(S * K, device=order_X.device)
        self.order_R = order_X[:rows]
        self.token_R = self.order_R // K
        self.place_SK = place_X.view(S, K)
        if real_S is not None:
            self.place_SK = torch.where(real_S[:, None], self.place_SK, 0)
        self.counts_E = torch.zeros(experts + 1, dtype=torch.long, device=order_X.device).scatter_add_(
            0, expert_SK.flatten(), torch.ones_like(order_X)
        )[:experts]
        self.real_S = real_S

    def rows(self, x_SD: Tensor) -> Tensor:
        """[S, D] tokens to [R, D] rows."""
        return _ToRows.apply(x_SD, self)

    def tokens(self, y_RD: Tensor, weight_SK: Tensor) -> Tensor:
        """[R, D] rows to [S, D] tokens: the weighted sum of a token's K rows; 0 where a token takes no part."""
        y_SKD = _FromRows.apply(y_RD, self)
        if self.real_S is not None:
            weight_SK = weight_SK * self.real_S[:, None]
        return torch.einsum("skd,sk->sd", y_SKD, weight_SK.to(y_SKD.dtype))


class _ToRows(torch.autograd.Function):
    """A gather whose gradient is a gather, too: adding into rows is slow, and on a GPU in no certain order."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x_SD.index_select(0, dispatch.token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        S, K = dispatch.place_SK.shape
        if len(grad_RD) == 0:
            return grad_RD.new_zeros(S, grad_RD.shape[1]), None
        grad_SD = grad_RD.index_select(0, dispatch.place_SK.flatten()).view(S, K, -1).sum(1)
        if dispatch.real_S is not None:
            grad_SD = grad_SD.masked_fill(~dispatch.real_S[:, None], 0)
        return grad_SD, None


class _FromRows(torch.autograd.Function):
    """The K rows of each token, [S, K, D]; the gradient, too, is a gather."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        S, K = dispatch.place_SK.shape
        if len(y_RD) == 0:  # yet with a graph: other processes may wait for this one's part of the backward pass
            return y_RD.new_zeros(S, K, y_RD.shape[1])
        return y_RD.index_select(0, dispatch.place_SK.flatten()).view(S, K, -1)

    @staticmethod
    def backward(ctx: Any, grad_SKD: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        return grad_SKD.flatten(0, 1).index_select(0, dispatch.order_R), None


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
        hidden_RF = self._linear(x_RD, self.expand, self.expand_bias, counts_E)
        hidden_RF = ACTIVATIONS[self.activation](hidden_RF)
        return self._linear(hidden_RF, self.contract, self.contract_bias, counts_E)

    @staticmethod
    def _linear(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, counts_E: Tensor) -> Tensor:
        dtype = x_RI.dtype
        if torch.is_autocast_enabled(x_RI.device.type):
            dtype = torch.get_autocast_dtype(x_RI.device.type)
        ends_E = counts_E.cumsum(0).to(torch.int32)
        y_RO = F.grouped_mm(x_RI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), offs=ends_E)
        return y_RO + bias_EO.to(dtype).repeat_interleave(counts_E, dim=0, output_size=len(x_RI))


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
        if real_S is None or self.config.route_padding:
            real_S, real = None, len(x_SD)
        elif real is None:
            real = int(real_S.sum())
        modality_MD = self.router.modality
        if modality_MD is not None and self.config.modality_into_experts:
            x_SD = x_SD + modality_MD[modality_S]
        choice, routing = self.router(x_SD, modality_S, real_S)
        self._record(routing)
        dispatch = Dispatch(choice.expert_SK, self.config.experts, real_S, real * self.config.top_k)
        y_RD = self.experts(dispatch.rows(x_SD), dispatch.counts_E)
        return dispatch.tokens(y_RD, choice.weight_SK)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, routing: Routing) -> None:
        """Apart from what is compiled: a block that is recomputed when nobody records must be the same code."""
        if self.routings is not None:
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
