"""Ranking a picture's text among others by the matching head alone: retrieval without contrastive embeddings.

Source: microsoft/BridgeTower ``objectives.py:592-632`` (``irtr``, after ViLT), whose released function crashes;
zdou0830/METER ``meter/modules/objectives.py``.

Shape legend: B batch, K false texts, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch
from triptych.data.transforms import Triple, normalize
from triptych.models.protocol import Encoded, Part, VisionLanguageModel
from triptych.objectives.distributed import StepNoise, mean_over_all
from triptych.objectives.matching import matching_loss


@dataclass(frozen=True)
class RankingConfig:
    """Settings of ranking.

    Attributes:
        false_texts: K, random texts of other pictures of the batch, for each picture (official: 15, of the data set).
            Where the batch has fewer, all of them.
    """

    false_texts: int = 15

    def __post_init__(self) -> None:
        if self.false_texts < 1:
            raise ValueError(f"false_texts must be at least 1, not {self.false_texts}")


class TextRanking(nn.Module):
    """One call is the forward pass of one step.

    Losses: ``rank``, the cross-entropy of a picture's own text among K + 1 by the matching logit (official: by a head
    that begins as a copy of it); and ``itm`` on the own text and the first false one.

    Args:
        mean, std: of the pixels, in units of 0..1.
        seed: of the false texts, which depend on (seed, step) alone.
    """

    uses: ClassVar[tuple[Part, ...]] = ("image", "text", "fusion", "pooled", "matching")

    def __init__(
        self,
        model: VisionLanguageModel,
        config: RankingConfig,
        *,
        mean: Triple,
        std: Triple,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.mean, self.std = mean, std
        self.seed = seed
        model.train_only(*self.uses)

    @property
    def kept(self) -> nn.Module:
        """What training averages, evaluates and saves."""
        return self.model

    def forward(self, batch: ImageTextBatch, step: int, part: int = 0) -> dict[str, Tensor]:
        """Losses by name; their sum is what is minimised. ``part`` numbers the accumulated passes of a step."""
        B, device = len(batch), batch.image_id_B.device
        image = self.model.encode_image(normalize(batch.pixels_BCHW, self.mean, self.std))
        text = self.model.encode_text(batch.text.ids_BL, batch.text.mask_BL)
        same_BB = batch.image_id_B[:, None] == batch.image_id_B
        uniform_BB = StepNoise(self.seed, step, part).uniform(B, B, device=device)
        false_BK, exists_BK = draw_false(same_BB, uniform_BB, self.config.false_texts)
        own_B1 = torch.arange(B, device=device)[:, None]
        logits_BT2 = self._match(image, text, torch.cat([own_B1, false_BK], dim=1))
        real_BT = torch.cat([torch.ones_like(own_B1, dtype=torch.bool), exists_BK], dim=1)
        score_BT = logits_BT2[..., 1].float().masked_fill(~real_BT, float("-inf"))
        first_B = torch.zeros(B, dtype=torch.long, device=device)
        matches_B2 = torch.tensor([True, False], device=device).expand(B, 2)
        return {
            "rank": mean_over_all(F.cross_entropy(score_BT, first_B, reduction="none")),
            "itm": matching_loss(logits_BT2[:, :2].flatten(0, 1), matches_B2.flatten(), real_BT[:, :2].flatten()),
        }

    def _match(self, image: Encoded, text: Encoded, text_BT: Tensor) -> Tensor:
        """Matching logits ``[B, T, 2]`` of each picture with T texts of the batch."""
        picture_X = torch.arange(len(text_BT), device=text_BT.device).repeat_interleave(text_BT.shape[1])
        pooled_XP = self.model.pool(image, text.rows(text_BT.flatten()), picture_X)
        return self.model.match_logits(pooled_XP).view(*text_BT.shape, 2)


def draw_false(same_BB: Tensor, uniform_BB: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each picture ``count`` different texts of others, all equally likely; or as many as the batch has.

    Args:
        same_BB: bool, texts of the same picture.
        uniform_BB: numbers in [0, 1) that decide the draw.

    Returns:
        Rows of texts ``[B, K]``, and a bool ``[B, K]`` that is ``False`` where there is no such text.
    """
    order_BB = uniform_BB.masked_fill(same_BB, float("inf"))
    drawn_BK, false_BK = order_BB.topk(min(count, len(same_BB)), dim=1, largest=False)
    return false_BK, drawn_BK.isfinite()
