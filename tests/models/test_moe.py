"""The mixture of experts against a dense one, in which every expert sees every token.

Shape legend: S tokens, E experts, K experts a token, R rows, D width, M modalities.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from triptych.models.layers import quick_gelu_
from triptych.models.moe import Dispatch, MoEConfig, Rows, SoftMoE, record_routing

D, HIDDEN, S = 16, 24, 14


def layer(**changes: Any) -> SoftMoE:
    torch.manual_seed(0)
    moe = SoftMoE(D, HIDDEN, MoEConfig(**{"experts": 4, **changes}), "quick_gelu").eval()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return moe


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(S, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def modality_S() -> Tensor:
    return torch.tensor([0] * 8 + [1] * 6)


@pytest.fixture
def real_S() -> Tensor:
    return torch.tensor([True] * 10 + [False] * 2 + [True] + [False])


def routed(moe: SoftMoE, x_SD: Tensor, modality_S: Tensor) -> Tensor:
    """What the router sees."""
    if moe.router.modality is None:
        return x_SD
    return x_SD + moe.router.modality[modality_S]


def dense(moe: SoftMoE, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None = None) -> Tensor:
    """Equation 5, with nothing left out: every expert on every token."""
    seen_SD = routed(moe, x_SD, modality_S)
    probability_SE = (seen_SD @ moe.router.gate.weight.T).softmax(-1)
    best_SK = probability_SE.topk(moe.config.top_k, dim=1).indices
    weight_SE = probability_SE * F.one_hot(best_SK, moe.config.experts).sum(1)
    if moe.config.top_k > 1:
        weight_SE = weight_SE / weight_SE.sum(1, keepdim=True)
    given_SD = seen_SD if moe.config.modality_into_experts else x_SD
    own = moe.experts
    y_SED = torch.stack(
        [
            quick_gelu_(given_SD @ own.expand[e].T + own.expand_bias[e]) @ own.contract[e].T + own.contract_bias[e]
            for e in range(moe.config.experts)
        ],
        dim=1,
    )
    y_SD = (weight_SE[:, :, None] * y_SED).sum(1)
    return y_SD if real_S is None else y_SD * real_S[:, None]


def values_and_gradients(moe: SoftMoE, x_SD: Tensor, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x_SD = x_SD.clone().requires_grad_()
    moe.zero_grad()
    y_SD = call(x_SD)
    weight_SD = torch.linspace(-1, 1, y_SD.numel()).view_as(y_SD)
    (y_SD * weight_SD).sum().backward()
    assert x_SD.grad is not None
    found = {"y": y_SD.detach(), "x": x_SD.grad}
    found |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in moe.named_parameters()}
    return found


def assert_dense(moe: SoftMoE, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None = None) -> None:
    found = values_and_gradients(moe, x_SD, lambda x: moe(x, modality_S, real_S))
    counted = None if moe.config.route_padding else real_S
    expected = values_and_gradients(moe, x_SD, lambda x: dense(moe, x, modality_S, counted))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 1},
        {"experts": 1, "top_k": 1},
        {"experts": 2},
        {"experts": 30},  # more than there are tokens: most have none
        {"modality_routing": False},
        {"modality_into_experts": True},
        {"route_padding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients_are_those_of_the_dense_form(
    changes: dict[str, Any], padded: bool, tokens: Tensor, modality_S: Tensor, real_S: Tensor
) -> None:
    assert_dense(layer(**changes), tokens, modality_S, real_S if padded else None)


def test_all_tokens_to_one_expert(tokens: Tensor, modality_S: Tensor) -> None:
    moe = layer(top_k=1)
    with torch.no_grad():
        moe.router.gate.weight.zero_()
        moe.router.gate.weight[2, 0] = 100.0
    x_SD = tokens.clone()
    x_SD[:, 0] = 5.0
    with record_routing(moe) as found:
        moe(x_SD, modality_S)
    assert found[""][0].first_ME.sum(0).tolist() == [0, 0, S, 0]
    assert_dense(moe, x_SD, modality_S)


def test_one_token_and_none(modality_S: Tensor, tokens: Tensor) -> None:
    moe = layer()
    assert_dense(moe, tokens[:1], modality_S[:1])
    nothing_S = torch.zeros(S, dtype=torch.bool)
    found = values_and_gradients(moe, tokens, lambda x: moe(x, modality_S, nothing_S))
    assert not any(value.any() for value in found.values())


def test_padding_is_left_out_of_result_gradient_and_counts(tokens: Tensor, modality_S: Tensor, real_S: Tensor) -> None:
    moe = layer()
    x_SD = tokens.clone().requires_grad_()
    with record_routing(moe) as found:
        y_SD = moe(x_SD, modality_S, real_S)
    y_SD.square().sum().backward()
    assert x_SD.grad is not None
    assert not y_SD[~real_S].any()
    assert not x_SD.grad[~real_S].any()
    (call,) = found[""]
    assert call.first_ME.sum(1).tolist() == [8, 3]
    assert call.chosen_ME.sum(1).tolist() == [16, 6]
    torch.testing.assert_close(call.probability_ME.sum(1), torch.tensor([8.0, 3.0]))
    with torch.no_grad():
        junk_SD = torch.where(real_S[:, None], tokens, 9 * torch.randn(S, D))
        torch.testing.assert_close(moe(junk_SD, modality_S, real_S), y_SD.detach())
        torch.testing.assert_close(moe(tokens, modality_S, real_S, real=11), y_SD.detach())


def test_nothing_is_recorded_outside_the_block(tokens: Tensor, modality_S: Tensor) -> None:
    moe = layer()
    with record_routing(moe) as found:
        moe(tokens, modality_S)
        moe(tokens, modality_S)
    moe(tokens, modality_S)
    assert len(found[""]) == 2


def test_the_weights_of_two_add_up_to_one(tokens: Tensor, modality_S: Tensor) -> None:
    choice, _ = layer().router(tokens, modality_S, None)
    torch.testing.assert_close(choice.weight_SK.sum(1), torch.ones(S))
    assert (choice.weight_SK[:, 0] >= choice.weight_SK[:, 1]).all()
    assert (choice.expert_SK[:, 0] != choice.expert_SK[:, 1]).all()
    single, _ = layer(top_k=1).router(tokens, modality_S, None)
    assert (single.weight_SK < 1).all()


def test_equals_go_to_the_lower_number(tokens: Tensor, modality_S: Tensor) -> None:
    moe = layer()
    with torch.no_grad():
        moe.router.gate.weight.zero_()
    choice, _ = moe.router(tokens, modality_S, None)
    assert choice.expert_SK.tolist() == [[0, 1]] * S


def test_the_modality_decides_who_is_chosen(tokens: Tensor, modality_S: Tensor) -> None:
    moe = layer()
    as_images, _ = moe.router(tokens, torch.zeros_like(modality_S), None)
    as_texts, _ = moe.router(tokens, torch.ones_like(modality_S), None)
    assert not torch.equal(as_images.expert_SK, as_texts.expert_SK)
    plain = layer(modality_routing=False)
    assert torch.equal(plain(tokens, modality_S), plain(tokens, 1 - modality_S))


def test_chance_is_in_training_alone(tokens: Tensor, modality_S: Tensor) -> None:
    moe = layer(noise="gumbel", experts=8)
    once, again = (moe(tokens, modality_S) for _ in range(2))
    assert torch.equal(once, again)
    moe.train()
    torch.manual_seed(3)
    first, _ = moe.router(tokens, modality_S, None)
    second, _ = moe.router(tokens, modality_S, None)
    assert torch.equal(first.expert_SK[:, 0], second.expert_SK[:, 0])
    assert not torch.equal(first.expert_SK[:, 1], second.expert_SK[:, 1])


@pytest.mark.parametrize("top_k", [1, 2])
def test_capacity_is_that_of_a_queue(top_k: int, modality_S: Tensor, real_S: Tensor) -> None:
    """First choices in the order of the batch, then second ones; weights of what is left add up to one again."""
    x_SD = torch.randn(S, D, generator=torch.Generator().manual_seed(5)).abs()
    free, tight = layer(top_k=top_k), layer(top_k=top_k, capacity=0.3)
    room = max(4, math.ceil(0.3 * top_k * S / 4))
    for real in (None, real_S):
        whole, _ = free.router(x_SD, modality_S, real)
        found, routing = tight.router(x_SD, modality_S, real)
        assert torch.equal(found.expert_SK, whole.expert_SK)
        taken, kept = [0] * 4, torch.zeros(S, top_k)
        for k in range(top_k):
            for s in range(S):
                expert = int(whole.expert_SK[s, k])
                if real is not None and not real[s]:
                    continue
                kept[s, k] = float(taken[expert] < room)
                taken[expert] += 1
        counts = torch.ones(S) if real is None else real.float()
        weight_SK = whole.weight_SK * kept
        if top_k == 2:
            weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=1e-9)
        torch.testing.assert_close(found.weight_SK * counts[:, None], weight_SK * counts[:, None])
        dropped = float(((1 - kept) * counts[:, None]).sum())
        assert routing.dropped == dropped
        assert dropped > 0


def test_the_same_again(tokens: Tensor, modality_S: Tensor, real_S: Tensor) -> None:
    moe = layer()
    first, second = (values_and_gradients(moe, tokens, lambda x: moe(x, modality_S, real_S)) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_without_gradients_it_counts_only_for_those_who_ask(tokens: Tensor, modality_S: Tensor, real_S: Tensor) -> None:
    moe = layer(capacity=0.3)
    expected = moe(tokens, modality_S, real_S)
    with record_routing(moe) as with_gradients:
        moe(tokens, modality_S, real_S)
    with torch.no_grad():
        assert torch.equal(moe(tokens, modality_S, real_S), expected)
        with record_routing(moe) as found:
            moe(tokens, modality_S, real_S)
    for name, value in vars(with_gradients[""][0]).items():
        assert torch.equal(getattr(found[""][0], name), value), name
    assert with_gradients[""][0].dropped > 0


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 1], [0, 0, 0]])
def test_both_ways_to_add_a_bias_are_the_same(counts: list[int]) -> None:
    """That of a GPU, too."""
    rows = Rows.of(torch.tensor(counts), sum(counts))
    assert rows.ends_E.tolist() == torch.tensor(counts).cumsum(0).tolist()
    y_RO, bias_EO = torch.randn(sum(counts), 5), torch.randn(3, 5, requires_grad=True)
    found = []
    for by_product in (False, True):
        out_RO = rows.add_bias(y_RO.clone(), bias_EO, by_product=by_product)
        (grad,) = torch.autograd.grad((out_RO * torch.linspace(-1, 1, out_RO.numel()).view_as(out_RO)).sum(), bias_EO)
        found.append((out_RO.detach(), grad))
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[0][0], y_RO + bias_EO.detach()[rows.expert_R])


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16(how: str, tokens: Tensor, modality_S: Tensor, real_S: Tensor) -> None:
    moe = layer()
    expected = values_and_gradients(moe, tokens, lambda x: moe(x, modality_S, real_S))
    x_SD = tokens
    if how == "weights":
        moe, x_SD = moe.bfloat16(), tokens.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        found = values_and_gradients(moe, x_SD, lambda x: moe(x, modality_S, real_S).float())
    for name, value in expected.items():
        assert found[name].isfinite().all()
        assert (found[name].float() - value).norm() <= 0.05 * value.norm() + 1e-6, name


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


def test_neither_memory_nor_calls_grow_with_tokens_times_experts() -> None:
    """No tensor of tokens x experts x capacity, and no loop over experts."""
    calls = []
    for experts in (4, 64):
        moe = layer(experts=experts)
        x_SD = torch.randn(400, D, requires_grad=True)
        modality_S = (torch.arange(400) > 200).long()
        with _Largest() as seen:
            moe(x_SD, modality_S).sum().backward()
        weights = moe.experts.expand.numel()
        assert seen.numbers <= max(weights, 400 * 2 * max(D, HIDDEN, experts))
        calls.append(seen.calls)
    assert calls[0] == calls[1]


@given(data=st.data(), experts=st.integers(1, 6), top_k=st.integers(1, 2), count=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_dispatch_sorts_and_brings_back(data: st.DataObject, experts: int, top_k: int, count: int) -> None:
    pick = st.integers(0, experts - 1)
    expert_SK = torch.tensor(
        data.draw(st.lists(st.lists(pick, min_size=top_k, max_size=top_k), min_size=count, max_size=count))
    )
    real = data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))
    real_S = None if real is None else torch.tensor(real)
    rows = top_k * (count if real_S is None else int(real_S.sum()))
    dispatch = Dispatch(expert_SK, experts, real_S, rows)
    real_SK = torch.ones(count, top_k) if real_S is None else real_S[:, None].expand(-1, top_k).float()
    counts = [int(((expert_SK == e) * real_SK).sum()) for e in range(experts)]
    assert dispatch.counts_E.tolist() == counts
    x_SD = torch.arange(count * 3.0).view(count, 3) + 1
    rows_RD = dispatch.rows(x_SD)
    assert rows_RD.shape == (rows, 3)
    # Row by row: which token, which expert, and that nothing is there twice.
    owners = torch.repeat_interleave(torch.arange(experts), dispatch.counts_E)
    seen = sorted(zip(dispatch.token_R.tolist(), owners.tolist(), strict=True))
    wanted = sorted((s, int(expert_SK[s, k])) for s in range(count) for k in range(top_k) if real_SK[s, k])
    assert seen == wanted
    assert torch.equal(rows_RD, x_SD[dispatch.token_R])
    back_SD = dispatch.tokens(rows_RD, torch.full((count, top_k), 1 / top_k))
    torch.testing.assert_close(back_SD, x_SD * real_SK[:, :1])


def test_hand_written_gradients(real_S: Tensor) -> None:
    expert_SK = torch.randint(0, 3, (S, 2), generator=torch.Generator().manual_seed(0))
    weight_SK = torch.rand(S, 2, dtype=torch.float64, requires_grad=True)
    x_SD = torch.randn(S, 3, dtype=torch.float64, requires_grad=True)
    for real in (None, real_S):
        rows = 2 * (S if real is None else int(real.sum()))
        dispatch = Dispatch(expert_SK, 3, real, rows)
        assert torch.autograd.gradcheck(dispatch.rows, x_SD)
        y_RD = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(dispatch.tokens, (y_RD, weight_SK))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "experts must be at least 1"),
        ({"experts": 1}, "top_k must be 1 or 2 and at most the 1 experts, not 2"),
        ({"top_k": 3}, "top_k must be 1 or 2"),
        ({"noise": "jitter"}, "noise must be one of none, gumbel, not 'jitter'"),
        ({"capacity": 0.0}, "capacity must be positive"),
        ({"modality_routing": False, "modality_into_experts": True}, "needs modality_routing"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**changes)
