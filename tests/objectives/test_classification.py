"""Cross-entropy of classes, some of which are unknown."""

import pytest
import torch
from torch.nn import functional as F

from triptych.objectives.classification import UNLABELLED, class_indices, classification_loss


def test_indices_of_known_and_unknown_classes() -> None:
    found_Q = class_indices([2, None, True, False])
    assert found_Q.dtype == torch.int64
    assert found_Q.tolist() == [2, UNLABELLED, 1, 0]
    assert class_indices([]).dtype == torch.int64


def test_the_unknown_neither_count_nor_teach() -> None:
    logits_QK = torch.randn(4, 3, requires_grad=True)
    loss = classification_loss(logits_QK, class_indices([0, None, 2, None]))
    assert loss.item() == pytest.approx(F.cross_entropy(logits_QK[[0, 2]], torch.tensor([0, 2])).item())
    loss.backward()
    assert logits_QK.grad is not None
    assert logits_QK.grad.any(1).tolist() == [True, False, True, False]


def test_nothing_is_lost_where_nothing_is_known() -> None:
    logits_QK = torch.randn(2, 3, requires_grad=True)
    loss = classification_loss(logits_QK, class_indices([None, None]))
    assert loss.item() == 0
    loss.backward()
    assert logits_QK.grad is not None
    assert not logits_QK.grad.any()
