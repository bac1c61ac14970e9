"""Image-text contrastive learning with a queue of momentum features.

Source: Li et al. 2021 (ALBEF) section 3.2; mPLUG section 3.3.

Shape legend: B batch, G batch of all processes, K keys (G + Q), Q queue, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.objectives.distributed import mean_over_all


class FeatureQueue(nn.Module):
    """The newest ``size`` momentum embeddings of images and texts, with the ids of their pictures.

    Any batch size fits: it wraps around. Slots that were never filled do not take part.
    """

    image_QE: Tensor
    text_QE: Tensor
    id_Q: Tensor
    filled: Tensor
    position: Tensor

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        if size < 0:
            raise ValueError(f"queue size must not be negative: {size}")
        self.size = size
        self.register_buffer("image_QE", torch.zeros(size, embed_dim))
        self.register_buffer("text_QE", torch.zeros(size, embed_dim))
        self.register_buffer("id_Q", torch.zeros(size, dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def contents(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings, text embeddings and picture ids of the filled slots."""
        filled = int(self.filled)
        return self.image_QE[:filled], self.text_QE[:filled], self.id_Q[:filled]

    @torch.no_grad()
    def enqueue(self, image_GE: Tensor, text_GE: Tensor, id_G: Tensor) -> None:
        """Add the rows of all processes; the oldest ones fall out."""
        if self.size == 0:
            return
        image_GE, text_GE, id_G = image_GE[-self.size :], text_GE[-self.size :], id_G[-self.size :]
        slots_G = (self.position + torch.arange(len(id_G), device=id_G.device)) % self.size
        self.image_QE[slots_G] = image_GE.to(self.image_QE.dtype)
        self.text_QE[slots_G] = text_GE.to(self.text_QE.dtype)
        self.id_Q[slots_G] = id_G
        self.position.copy_((self.position + len(id_G)) % self.size)
        self.filled.copy_((self.filled + len(id_G)).clamp(max=self.size))


@dataclass(frozen=True)
class Keys:
    """What the batch is contrasted with: first the batch of all processes, then the queue."""

    image_KE: Tensor
    text_KE: Tensor
    id_K: Tensor


def contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    keys: Keys,
    same_BK: Tensor,
    temperature: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    alpha: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of image-to-text and text-to-image cross-entropy with soft targets.

    Args:
        image_BE, text_BE: unit-length embeddings.
        same_BK: bool, which keys are positives; every row has at least one.
        teacher: momentum embeddings of the batch, for soft targets.
        alpha: weight of the teacher's distribution in the targets.

    Returns:
        The loss, and both similarity matrices ``[B, K]`` already divided by the temperature.
    """
    image_to_text_BK = image_BE @ keys.text_KE.T / temperature
    text_to_image_BK = text_BE @ keys.image_KE.T / temperature
    hard_BK = same_BK.float() / same_BK.sum(1, keepdim=True)
    targets_i2t_BK = targets_t2i_BK = hard_BK
    if teacher is not None and alpha > 0:
        with torch.no_grad():
            soft_i2t_BK = (teacher[0] @ keys.text_KE.T / temperature).float().softmax(-1)
            soft_t2i_BK = (teacher[1] @ keys.image_KE.T / temperature).float().softmax(-1)
            targets_i2t_BK = alpha * soft_i2t_BK + (1 - alpha) * hard_BK
            targets_t2i_BK = alpha * soft_t2i_BK + (1 - alpha) * hard_BK
    loss_i2t_B = -(F.log_softmax(image_to_text_BK.float(), dim=-1) * targets_i2t_BK).sum(1)
    loss_t2i_B = -(F.log_softmax(text_to_image_BK.float(), dim=-1) * targets_t2i_BK).sum(1)
    loss = (mean_over_all(loss_i2t_B) + mean_over_all(loss_t2i_B)) / 2
    return loss, image_to_text_BK, text_to_image_BK
