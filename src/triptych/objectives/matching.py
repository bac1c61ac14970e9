"""Image-text matching with hard negatives.

Source: Li et al. 2021 (ALBEF) section 3.2; mPLUG section 3.3.

Shape legend: B batch, G candidates (the batch of all processes).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.objectives.distributed import mean_over_all


@torch.no_grad()
def draw_negatives(similarity_BG: Tensor, same_BG: Tensor, uniform_BG: Tensor) -> tuple[Tensor, Tensor]:
    """One candidate a row, drawn with probability ~ softmax(similarity) among those that do not match.

    One batched draw (Gumbel maximum), so there is no zero-sum multinomial to crash on: a similarity that is not finite
    counts as 0, and a row whose candidates all match gets none.

    Args:
        same_BG: bool, candidates that must never be drawn (the row's own picture and its duplicates).
        uniform_BG: numbers in [0, 1) that decide the draw.

    Returns:
        The drawn candidate of each row (0 where there is none), and a bool ``[B]`` that says where there is one.
    """
    logits_BG = torch.where(similarity_BG.isfinite(), similarity_BG, 0.0).float()
    gumbel_BG = -torch.log(-torch.log(uniform_BG.double().clamp(1e-12, 1 - 1e-12)))
    scores_BG = (logits_BG.double() + gumbel_BG).masked_fill(same_BG, float("-inf"))
    exists_B = ~same_BG.all(dim=1)
    drawn_B = scores_BG.argmax(dim=1)
    return torch.where(exists_B, drawn_B, 0), exists_B


def matching_loss(logits_X2: Tensor, matches_X: Tensor, counts_X: Tensor) -> Tensor:
    """Cross-entropy over positives and negatives; rows that do not count (no negative existed) are left out."""
    loss_X = F.cross_entropy(logits_X2.float(), matches_X.long(), reduction="none")
    return mean_over_all(loss_X, counts_X.float())
