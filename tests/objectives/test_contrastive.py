"""ITC against loops over rows and keys, and the queue against a list."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from triptych.objectives.contrastive import FeatureQueue, Keys, contrastive_loss

E = 4


def unit(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, E), dim=-1)


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def naive_direction(
    rows: Tensor, keys: Tensor, same: list[list[bool]], temperature: float, teacher: Tensor | None, alpha: float
) -> float:
    losses = []
    for b in range(len(rows)):
        positives = sum(same[b])
        targets = [1 / positives if yes else 0.0 for yes in same[b]]
        if teacher is not None:
            soft = softmax([float(teacher[b] @ key) / temperature for key in keys])
            targets = [alpha * s + (1 - alpha) * hard for s, hard in zip(soft, targets, strict=True)]
        predicted = softmax([float(rows[b] @ key) / temperature for key in keys])
        losses.append(-sum(target * math.log(p) for target, p in zip(targets, predicted, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 2, 1, 0, 7]], ids=["distinct", "several positives"])
def test_loss_equals_a_loop(alpha: float, ids: list[int]) -> None:
    image_BE, text_BE, image_m_BE, text_m_BE = unit(3), unit(3), unit(3), unit(3)
    keys = Keys(torch.cat([image_m_BE, unit(4)]), torch.cat([text_m_BE, unit(4)]), torch.tensor(ids))
    same_BK = keys.id_K[:3, None] == keys.id_K
    temperature = torch.tensor(0.2)
    loss, i2t_BK, t2i_BK = contrastive_loss(
        image_BE, text_BE, keys, same_BK, temperature, teacher=(image_m_BE, text_m_BE), alpha=alpha
    )
    forth = naive_direction(image_BE, keys.text_KE, same_BK.tolist(), 0.2, image_m_BE, alpha)
    back = naive_direction(text_BE, keys.image_KE, same_BK.tolist(), 0.2, text_m_BE, alpha)
    assert float(loss) == pytest.approx((forth + back) / 2, abs=1e-5)
    torch.testing.assert_close(i2t_BK, image_BE @ keys.text_KE.T / 0.2)
    torch.testing.assert_close(t2i_BK, text_BE @ keys.image_KE.T / 0.2)


def test_without_teacher_and_duplicates_it_is_cross_entropy() -> None:
    image_BE, text_BE = unit(5), unit(5)
    keys = Keys(image_BE, text_BE, torch.arange(5))
    loss, i2t_BK, t2i_BK = contrastive_loss(image_BE, text_BE, keys, torch.eye(5).bool(), torch.tensor(0.07))
    own_B = torch.arange(5)
    torch.testing.assert_close(loss, (F.cross_entropy(i2t_BK, own_B) + F.cross_entropy(t2i_BK, own_B)) / 2)


def test_gradient_reaches_rows_and_temperature_but_not_the_teacher() -> None:
    image_BE, text_BE, image_m_BE, text_m_BE = (unit(3).requires_grad_() for _ in range(4))
    temperature = torch.tensor(0.1, requires_grad=True)
    keys = Keys(image_m_BE.detach(), text_m_BE.detach(), torch.arange(3))
    loss, *_ = contrastive_loss(
        image_BE, text_BE, keys, torch.eye(3).bool(), temperature, teacher=(image_m_BE, text_m_BE), alpha=0.4
    )
    loss.backward()
    for tensor in (image_BE, text_BE, temperature):
        assert tensor.grad is not None
        assert tensor.grad.any()
    assert image_m_BE.grad is None
    assert text_m_BE.grad is None


def test_loss_is_finite_in_bf16_at_the_lowest_temperature() -> None:
    image_BE, text_BE = unit(4).bfloat16(), unit(4).bfloat16()
    keys = Keys(image_BE, text_BE, torch.arange(4))
    temperature = torch.tensor(0.001, dtype=torch.bfloat16)
    loss, *_ = contrastive_loss(
        image_BE, text_BE, keys, torch.eye(4).bool(), temperature, teacher=(image_BE, text_BE), alpha=0.4
    )
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, 7), batches=st.lists(st.integers(1, 17), max_size=6))
def test_queue_keeps_the_newest_rows_of_any_batches(size: int, batches: list[int]) -> None:
    queue, history = FeatureQueue(size, E), 0
    for batch in batches:
        ids_B = torch.arange(history, history + batch)
        rows_BE = ids_B[:, None].expand(-1, E) + 0.25
        queue.enqueue(rows_BE, -rows_BE, ids_B)
        history += batch
        image_QE, text_QE, id_Q = queue.contents()
        assert sorted(id_Q.tolist()) == list(range(max(0, history - size), history))
        assert torch.equal(image_QE, id_Q[:, None].expand(-1, E) + 0.25)
        assert torch.equal(text_QE, -image_QE)


def test_oldest_rows_fall_out_first() -> None:
    queue = FeatureQueue(5, E)
    for first in (0, 3, 6):
        queue.enqueue(torch.zeros(3, E), torch.zeros(3, E), torch.arange(first, first + 3))
    assert queue.id_Q.tolist() == [5, 6, 7, 8, 4]
    assert int(queue.position) == 4


def test_slots_never_filled_take_no_part() -> None:
    queue = FeatureQueue(8, E)
    assert [len(part) for part in queue.contents()] == [0, 0, 0]
    queue.enqueue(unit(3), unit(3), torch.tensor([0, 0, 0]))
    assert [len(part) for part in queue.contents()] == [3, 3, 3]


def test_queue_is_saved_with_the_run() -> None:
    queue, other = FeatureQueue(4, E), FeatureQueue(4, E)
    queue.enqueue(unit(6), unit(6), torch.arange(6))
    other.load_state_dict(queue.state_dict())
    for mine, theirs in zip(queue.contents(), other.contents(), strict=True):
        assert torch.equal(mine, theirs)
    for part in (queue, other):
        part.enqueue(torch.ones(1, E), torch.ones(1, E), torch.tensor([9]))
    assert queue.id_Q.tolist() == other.id_Q.tolist()


def test_contents_that_a_loss_holds_survive_the_next_rows() -> None:
    """The step contrasts with the queue, then overwrites it, then goes backward."""
    queue = FeatureQueue(4, E)
    queue.enqueue(unit(4), unit(4), torch.arange(4))
    image_QE, text_QE, id_Q = queue.contents()
    rows_BE = unit(2).requires_grad_()
    keys = Keys(torch.cat([unit(2), image_QE]), torch.cat([unit(2), text_QE]), torch.cat([torch.tensor([7, 8]), id_Q]))
    loss, *_ = contrastive_loss(rows_BE, rows_BE, keys, torch.eye(2, 6).bool(), torch.tensor(0.1))
    queue.enqueue(unit(3), unit(3), torch.arange(3))
    loss.backward()


def test_a_queue_of_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="queue size must not be negative: -1"):
        FeatureQueue(-1, E)
