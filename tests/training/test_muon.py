"""Muon against torch's, which iterates in bf16."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from triptych.training import muon
from triptych.training.muon import Muon, orthogonalized

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 24)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(muon, "fast_bf16", lambda device: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)])
def test_singular_values_become_nearly_one(shape: tuple[int, int], fast: bool) -> None:
    torch.manual_seed(0)
    x_MRC = torch.randn(3, *shape)
    found_MRC = orthogonalized(x_MRC)
    assert found_MRC.dtype == torch.float32
    values = torch.linalg.svdvals(found_MRC)
    assert values.min() > 0.4
    assert values.max() < 1.4
    for x_RC, found_RC in zip(x_MRC, found_MRC, strict=True):
        alone_RC = orthogonalized(x_RC[None])[0]
        torch.testing.assert_close(found_RC, alone_RC, rtol=0, atol=2e-2 if fast else 1e-5)
        # The singular vectors stay.
        u, _, vh = torch.linalg.svd(x_RC, full_matrices=False)
        torch.testing.assert_close(
            torch.diag(torch.diag(u.T @ found_RC @ vh.T)), u.T @ found_RC @ vh.T, rtol=0, atol=0.05
        )


def test_zero_gradients_move_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_steps_are_those_of_torch(fast: bool) -> None:
    own, theirs = parameters(), parameters()
    mine = Muon([{"params": own, "lr": 0.02, "weight_decay": 0.1}])
    reference = torch.optim.Muon([{"params": theirs, "lr": 0.02, "weight_decay": 0.1}])
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for one, other in zip(own, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()  # type: ignore[no-untyped-call]
    for one, other, start in zip(own, theirs, parameters(), strict=True):
        moved = (other - start).norm()
        assert moved > 0.1
        assert (one - other).norm() < 0.02 * moved  # bf16 has 8 bits


def test_a_stack_is_so_many_matrices() -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    stack = nn.Parameter(start.clone())
    stack.grad = grad.clone()
    apart = [nn.Parameter(matrix.clone()) for matrix in start]
    for one, own in zip(apart, grad, strict=True):
        one.grad = own.clone()
    Muon([stack], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(stack.data, torch.stack([one.data for one in apart]))


def test_what_has_no_gradient_stays() -> None:
    first, second = parameters()[:2]
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer = Muon([first, second])
    optimizer.step()
    assert torch.equal(second, before)
    assert second not in optimizer.state


def test_a_saved_state_goes_on_exactly() -> None:
    def steps(own: list[nn.Parameter], optimizer: Muon, numbers: range) -> None:
        for number in numbers:
            for index, one in enumerate(own):
                one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(10 * number + index))
            optimizer.step()

    own = parameters()
    optimizer = Muon(own)
    steps(own, optimizer, range(2))
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(one.detach().clone()) for one in own]
    other = Muon(resumed)
    other.load_state_dict(state)
    steps(own, optimizer, range(2, 4))
    steps(resumed, other, range(2, 4))
    for one, again in zip(own, resumed, strict=True):
        assert torch.equal(one, again)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"Muon is for matrices, and this parameter is \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])
