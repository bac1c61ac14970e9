"""Cross-entropy of classes, some of which may be unknown.

Shape legend: Q items, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.objectives.distributed import mean_over_all

UNLABELLED = -100
"""The class of what has no label: such items are predicted, and neither learned from nor scored."""


def class_indices(labels: Iterable[int | None]) -> Tensor:
    """``[Q]``, int64: the index of each item's class, :data:`UNLABELLED` for None."""
    return torch.tensor([UNLABELLED if label is None else label for label in labels], dtype=torch.long)


def classification_loss(logits_QK: Tensor, class_Q: Tensor) -> Tensor:
    """Mean cross-entropy of what has a label; 0 where nothing has."""
    known_Q = class_Q != UNLABELLED
    return mean_over_all(F.cross_entropy(logits_QK[known_Q], class_Q[known_Q], reduction="none"))
