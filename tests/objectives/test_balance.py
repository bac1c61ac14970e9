"""The auxiliary loss (equation 7). Shape legend: E experts, M modalities."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triptych.models.moe import MoEConfig, Routing, SoftMoE, record_routing
from triptych.objectives.balance import BalanceConfig, Balanced, balance_loss, has_soft_router, load_measures


def call(probability: list[list[float]], first: list[list[float]], chosen: list[list[float]] | None = None) -> Routing:
    return Routing(
        torch.tensor(probability, requires_grad=True),
        torch.tensor(first),
        torch.tensor(first if chosen is None else chosen),
        torch.zeros(()),
    )


def test_by_hand() -> None:
    """Five tokens, two experts: f = (3/5, 2/5), p = (2/5, 3/5), 2 (3/5 2/5 + 2/5 3/5) = 0.96."""
    one = call([[1.5, 1.5], [0.5, 1.5]], [[1, 2], [2, 0]])
    loss = balance_loss({"layer": [one]})
    torch.testing.assert_close(loss, torch.tensor(0.96))
    loss.backward()
    # d loss / d p of an expert is E f / T for every token, whichever its modality.
    torch.testing.assert_close(one.probability_ME.grad, torch.tensor([[0.24, 0.16]]).expand(2, 2))


def test_balanced_is_one_and_one_expert_for_all_is_their_number() -> None:
    even = call([[1.0] * 4, [2.0] * 4], [[1.0] * 4, [2.0] * 4])
    torch.testing.assert_close(balance_loss({"layer": [even]}), torch.tensor(1.0))
    uneven = call([[12.0, 0, 0, 0]], [[12.0, 0, 0, 0]])
    torch.testing.assert_close(balance_loss({"layer": [uneven]}), torch.tensor(4.0))


def test_all_choices_can_count() -> None:
    one = call([[3.0, 1.0]], [[4.0, 0.0]], chosen=[[4.0, 4.0]])
    torch.testing.assert_close(balance_loss({"layer": [one]}, "first"), torch.tensor(1.5))
    torch.testing.assert_close(balance_loss({"layer": [one]}, "all"), torch.tensor(1.0))


def test_means_over_the_calls_of_a_layer_then_over_layers() -> None:
    good, bad = call([[1.0, 1.0]], [[1.0, 1.0]]), call([[4.0, 0.0]], [[4.0, 0.0]])
    wide = call([[3.0, 0.0, 0.0]], [[3.0, 0.0, 0.0]])  # layers may differ in their number of experts
    found = balance_loss({"low": [good, bad], "high": [wide], "unused": []})
    torch.testing.assert_close(found, torch.tensor(((1 + 2) / 2 + 3) / 2))
    with pytest.raises(ValueError, match="no soft router was called"):
        balance_loss({"unused": []})


def test_a_call_without_tokens_is_no_trouble() -> None:
    assert balance_loss({"layer": [call([[0.0, 0.0]], [[0.0, 0.0]])]}) == 0


class Thing(nn.Module):
    """A task with a mixture in its network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"moe": SoftMoE(8, 8, MoEConfig(experts=4), "gelu")})
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.measures = {"right": torch.tensor(0.5)}

    @property
    def kept(self) -> nn.Module:
        return self.model

    def forward(self, batch: Tensor, step: int, part: int) -> dict[str, Tensor]:
        moe: Any = self.model["moe"]
        y_SD = moe(batch, torch.zeros(len(batch), dtype=torch.long))
        return {"loss": y_SD.square().mean() * (1 + step + part)}


def test_beside_a_task() -> None:
    task, batch = Thing(), torch.randn(12, 8)
    balanced = Balanced(task, BalanceConfig(weight=0.25))
    assert balanced.kept is task.kept
    losses = balanced(batch, 1, 2)
    with record_routing(task) as routings:
        alone = task(batch, 1, 2)
    assert list(losses) == ["loss", "balance"]
    torch.testing.assert_close(losses["loss"], alone["loss"])
    torch.testing.assert_close(losses["balance"], 0.25 * balance_loss(routings))
    assert balanced.measures["right"] == 0.5
    share_E = routings["model.moe"][0].chosen_ME.sum(0) / 24
    torch.testing.assert_close(balanced.measures["busiest"], share_E.max() * 4)
    assert balanced.measures["idle"] == (share_E == 0).float().mean()
    losses["balance"].backward()
    router: Any = task.model["moe"].router
    assert router.gate.weight.grad.any()
    assert all(p.grad is None for p in task.model["moe"].experts.parameters())


def test_without_weight_the_load_is_measured_all_the_same() -> None:
    task, batch = Thing(), torch.randn(12, 8)
    balanced = Balanced(task, BalanceConfig(weight=0))
    assert list(balanced(batch)) == ["loss"]
    assert {"right", "busiest", "idle"} == balanced.measures.keys()


def test_a_task_whose_router_was_not_called() -> None:
    task = Thing()
    task.forward = lambda batch, step, part: {"loss": batch.sum()}  # type: ignore[method-assign]
    balanced = Balanced(task, BalanceConfig())
    assert list(balanced(torch.randn(12, 8))) == ["loss"]
    assert balanced.measures.keys() == {"right"}


def test_padding_and_dropping() -> None:
    """Padding is in no sum; choices that are dropped count for the loss, and are measured per token."""
    task, real_S = Thing(), torch.tensor([True] * 7 + [False] * 5)
    moe: Any = task.model["moe"]
    moe.config = moe.router.config = MoEConfig(experts=4, capacity=0.01)  # room for four of each
    x_SD, modality_S = torch.randn(12, 8), torch.zeros(12, dtype=torch.long)
    with record_routing(task) as padded:
        moe(x_SD, modality_S, real_S)
    with record_routing(task) as alone:
        moe(x_SD[:7], modality_S[:7])
    torch.testing.assert_close(balance_loss(padded), balance_loss(alone))
    measures = load_measures(padded)
    assert measures["dropped"] > 0
    count_E = padded["model.moe"][0].chosen_ME.sum(0)
    torch.testing.assert_close(measures["dropped"], (count_E - 4).clamp(min=0).sum() / 7)
    assert measures.keys() == {"busiest", "idle", "dropped"}


def test_a_step_towards_the_loss_evens_the_load() -> None:
    task, batch = Thing(), torch.randn(200, 8)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.5)
    found = []
    for _ in range(60):
        with record_routing(task) as routings:
            task(batch, 0, 0)
        loss = balance_loss(routings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < found[0]
    assert found[-1] == pytest.approx(1, abs=0.1)


def test_who_has_something_to_balance() -> None:
    assert has_soft_router(Thing())
    assert not has_soft_router(nn.Linear(2, 2))
    assert load_measures({"layer": []}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"weight": -1.0}, "must not be negative"), ({"fractions": "some"}, "fractions must be one of first, all")],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalanceConfig(**changes)
