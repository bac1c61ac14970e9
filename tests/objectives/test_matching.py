"""Hard negatives: never a match, never a crash, drawn as the softmax says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from triptych.objectives.matching import draw_negatives, matching_loss

NUMBERS = st.one_of(st.floats(-30, 30), st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 0.0, -0.0]))
UNIFORM = st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([0.0, 1 - 2**-24]))


@st.composite
def draws(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities, matches and uniform numbers, of any awkward kind."""
    rows, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    size = rows * candidates

    def table(values: st.SearchStrategy[float]) -> Tensor:
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).view(rows, candidates)

    same = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return table(NUMBERS).float(), torch.tensor(same).view(rows, candidates), table(UNIFORM).float()


@settings(deadline=None, max_examples=200)
@given(draws())
def test_a_match_is_never_drawn(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    similarity_BG, same_BG, uniform_BG = problem
    drawn_B, exists_B = draw_negatives(similarity_BG, same_BG, uniform_BG)
    assert drawn_B.dtype == torch.long
    assert exists_B.tolist() == [not all(row) for row in same_BG.tolist()]
    for row, (drawn, exists) in enumerate(zip(drawn_B.tolist(), exists_B.tolist(), strict=True)):
        assert not same_BG[row, drawn] if exists else drawn == 0


@settings(deadline=None, max_examples=50)
@given(draws())
def test_a_row_does_not_depend_on_the_others(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    together, _ = draw_negatives(*problem)
    for row in range(len(together)):
        alone, _ = draw_negatives(*(part[row : row + 1] for part in problem))
        assert alone[0] == together[row]


def test_a_batch_of_one_has_no_negative() -> None:
    drawn_B, exists_B = draw_negatives(torch.randn(1, 1), torch.ones(1, 1).bool(), torch.rand(1, 1))
    assert drawn_B.tolist() == [0]
    assert exists_B.tolist() == [False]


def test_a_batch_of_one_picture_has_no_negative() -> None:
    _, exists_B = draw_negatives(torch.randn(4, 4), torch.ones(4, 4).bool(), torch.rand(4, 4))
    assert not exists_B.any()


def test_nan_and_infinite_similarities_count_as_zero() -> None:
    same_BG, uniform_BG = torch.zeros(2000, 5).bool(), torch.rand(2000, 5)
    broken = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0]).expand(2000, 5)
    repaired = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).expand(2000, 5)
    drawn_B, _ = draw_negatives(broken, same_BG, uniform_BG)
    assert torch.equal(drawn_B, draw_negatives(repaired, same_BG, uniform_BG)[0])
    assert set(drawn_B.tolist()) == {0, 1, 2, 3, 4}


def test_draws_follow_the_softmax_over_what_does_not_match() -> None:
    draws = 40000
    similarity_G = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0])
    same_G = torch.tensor([False, False, False, True, False])
    drawn_B, _ = draw_negatives(similarity_G.expand(draws, 5), same_G.expand(draws, 5), torch.rand(draws, 5))
    share_G = similarity_G.masked_fill(same_G, -math.inf).softmax(0)
    error_G = (torch.bincount(drawn_B, minlength=5) / draws - share_G).abs()
    assert (error_G <= 5 * (share_G * (1 - share_G) / draws).sqrt()).all()


def test_the_same_numbers_draw_the_same() -> None:
    problem = torch.randn(6, 6), torch.eye(6).bool(), torch.rand(6, 6)
    assert torch.equal(draw_negatives(*problem)[0], draw_negatives(*problem)[0])
    other, _ = draw_negatives(*problem[:2], torch.rand(6, 6))
    assert not torch.equal(draw_negatives(*problem)[0], other)


def test_bf16_similarities() -> None:
    drawn_B, _ = draw_negatives(torch.randn(6, 6).bfloat16(), torch.eye(6).bool(), torch.rand(6, 6))
    assert (drawn_B != torch.arange(6)).all()


def test_no_gradient_flows_through_the_choice() -> None:
    similarity_BG = torch.randn(3, 3, requires_grad=True)
    drawn_B, _ = draw_negatives(similarity_BG, torch.eye(3).bool(), torch.rand(3, 3))
    assert not drawn_B.requires_grad


def test_missing_negatives_are_left_out() -> None:
    logits_X2 = torch.randn(6, 2, requires_grad=True)
    matches_X = torch.tensor([True, True, False, False, False, False])
    counts_X = torch.tensor([True, True, True, False, True, False])
    loss = matching_loss(logits_X2, matches_X, counts_X)
    labels_X = torch.tensor([1, 1, 0, 0])
    torch.testing.assert_close(loss, F.cross_entropy(logits_X2[counts_X], labels_X))
    loss.backward()
    assert logits_X2.grad is not None
    assert not logits_X2.grad[~counts_X].any()
    assert logits_X2.grad[counts_X].any(1).all()


def test_positives_alone_still_give_a_loss() -> None:
    logits_X2 = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    loss = matching_loss(logits_X2, torch.tensor([True, False]), torch.tensor([True, False]))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1)))


def test_nothing_that_counts_gives_zero() -> None:
    assert float(matching_loss(torch.randn(2, 2), torch.zeros(2).bool(), torch.zeros(2).bool())) == 0
