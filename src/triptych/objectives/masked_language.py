"""Masked language modelling, and distillation over the vocabulary.

Source: Devlin et al. 2019 (15 %, 80/10/10); Li et al. 2021 (ALBEF) for the distillation.

Shape legend: B batch, L tokens, V vocabulary, X selected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Corruption = Literal["bert", "mask"]
"""What becomes of a chosen token: BERT's mixture, or always the mask."""


def mask_tokens(
    ids_BL: Tensor,
    uniform_BL3: Tensor,
    *,
    special: Sequence[int],
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
    corruption: Corruption = "bert",
) -> tuple[Tensor, Tensor]:
    """Corrupt tokens for prediction: of the chosen ones 80 % become the mask, 10 % a random token, 10 % stay (BERT).

    Args:
        uniform_BL3: numbers in [0, 1): whether to choose, what to do, and which random token.
        special: ids that are never chosen (padding, start, end...).
        corruption: ``mask`` makes every chosen token the mask.

    Returns:
        The corrupted ids, and a bool ``[B, L]`` of the chosen positions.
    """
    choose_BL, action_BL, token_BL = uniform_BL3.unbind(-1)
    allowed_BL = ~torch.isin(ids_BL, torch.tensor(list(special), device=ids_BL.device))
    chosen_BL = (choose_BL < probability) & allowed_BL
    if corruption == "mask":
        return torch.where(chosen_BL, mask_id, ids_BL), chosen_BL
    random_BL = (token_BL * vocab_size).long().clamp(max=vocab_size - 1)
    corrupted_BL = torch.where(action_BL < 0.8, mask_id, torch.where(action_BL < 0.9, random_BL, ids_BL))
    return torch.where(chosen_BL, corrupted_BL, ids_BL), chosen_BL


def distillation(logits_XV: Tensor, teacher_XV: Tensor) -> Tensor:
    """[X] cross-entropy of each token against the teacher's distribution over the vocabulary."""
    return -(F.log_softmax(logits_XV.float(), dim=-1) * teacher_XV.float().softmax(-1)).sum(-1)


def sequence_distillation(logits_BLV: Tensor, teacher_BLV: Tensor) -> Tensor:
    """[B, L], as the official code computes it: the student's softmax runs over the *sequence*, not the vocabulary.

    Source: X-PLUG/mPLUG ``modeling_mplug.py:2044`` (``dim=1``), inherited from ALBEF. For comparison only.
    """
    return -(F.log_softmax(logits_BLV.float(), dim=1) * teacher_BLV.float().softmax(-1)).sum(-1)
