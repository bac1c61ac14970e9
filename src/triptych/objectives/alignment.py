"""Contrastive alignment and matching (ITC + ITM): the half of pre-training that retrieval fine-tuning shares.

Source: Li et al. 2021 (ALBEF) section 3.2; mPLUG section 3.3; X-PLUG/mPLUG ``models/model_retrieval_mplug.py``.

Shape legend: B batch, G batch of all processes, K keys (G and the queue), Q queue, L text tokens, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch, Tokens
from triptych.models.protocol import Encoded, Part, VisionLanguageModel
from triptych.objectives.contrastive import FeatureQueue, Keys, contrastive_loss
from triptych.objectives.distributed import StepNoise, gather_encoded, gather_rows, rank, world_size
from triptych.objectives.matching import draw_negatives, matching_loss
from triptych.objectives.momentum import MomentumTeacher


@dataclass(frozen=True)
class OfficialBehaviour:
    """What the official (and derived) code does differently; each is off by default. See ``docs/parity.md``.

    Attributes:
        diagonal_targets: in ITC only the diagonal is positive, even where the queue holds the same picture.
        frozen_fusion_teacher: the teacher's fusion network, MLM head included, never follows the model.
        sequence_softmax: the MLM distillation normalises the student over the sequence.
        unweighted_prefix: PrefixLM ignores its teacher (alpha is never passed on).
        teacher_dropout: the teacher runs with dropout.
    """

    diagonal_targets: bool = False
    frozen_fusion_teacher: bool = False
    sequence_softmax: bool = False
    unweighted_prefix: bool = False
    teacher_dropout: bool = False


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of ITC and ITM; the defaults are the paper's.

    Attributes:
        queue_size: momentum features kept, of any batch size.
        momentum: of the teacher. ``None`` trains without one: a batch is contrasted with itself, with gradients to both
            sides (as CLIP does), which needs ``queue_size`` and ``alpha`` 0.
        alpha: share of the teacher in the targets, reached linearly after ``alpha_warmup`` steps.
        negatives: draw hard negatives from all processes, or (cheaper, official) from this one.
    """

    queue_size: int = 65536
    momentum: float | None = 0.995
    alpha: float = 0.4
    alpha_warmup: int = 2000
    negatives: Literal["all", "local"] = "all"
    official: OfficialBehaviour = field(default_factory=OfficialBehaviour)

    def __post_init__(self) -> None:
        if self.momentum is None and (self.queue_size or self.alpha):
            raise ValueError(
                f"without a teacher (momentum None) queue_size and alpha must be 0, not {self.queue_size}, {self.alpha}"
            )


@dataclass(frozen=True)
class Contrast:
    """ITC's loss, the similarities that choose hard negatives, and which candidates are the row's own picture."""

    loss: Tensor
    image_to_text_BG: Tensor
    text_to_image_BG: Tensor
    same_BG: Tensor


@dataclass(frozen=True)
class Pairs:
    """The pairs of ITM: text row x goes with image row ``image_rows[x]``; ``counts`` leaves out missing negatives."""

    images: Encoded
    texts: Encoded
    image_rows: Tensor
    matches: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Taught:
    """What a teacher encoded: the batch's images, and its texts, of which the first are whole."""

    model: VisionLanguageModel
    image: Encoded
    text: Encoded

    @torch.no_grad()
    def embeddings(self, rows: int) -> tuple[Tensor, Tensor]:
        """[B, E] of the images and of the whole texts."""
        return self.model.embed_image(self.image), self.model.embed_text(self.text.rows(slice(0, rows)))


class Alignment(nn.Module):
    """Model, momentum teacher and queue; one call is the forward pass of one step.

    Args:
        mean, std: of the pixels, in units of 0..1.
        seed: of the hard negatives, which depend on (seed, step) alone.
    """

    uses: ClassVar[tuple[Part, ...]] = ("image", "text", "fusion", "pooled", "embedding", "matching")
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: VisionLanguageModel,
        config: AlignmentConfig,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.seed = seed
        model.train_only(*self.uses)
        official = config.official
        self.teacher: MomentumTeacher | None = None
        if config.momentum is not None:
            self.teacher = MomentumTeacher(
                model,
                config.momentum,
                frozen=("fusion", "masked_head") if official.frozen_fusion_teacher else (),
                dropout=official.teacher_dropout,
            )
        self.queue = FeatureQueue(config.queue_size, model.embed_dim)
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    @property
    def kept(self) -> nn.Module:
        """What training averages, evaluates and saves: not the teacher, not the queue."""
        return self.model

    def forward(self, batch: ImageTextBatch, step: int, part: int = 0) -> dict[str, Tensor]:
        """Losses by name; their sum is what is minimised. ``part`` numbers the accumulated passes of a step."""
        model = self.model
        pixels_BCHW, alpha = self._begin(batch, step, part)
        image = model.encode_image(pixels_BCHW)
        text = model.encode_text(batch.text.ids_BL, batch.text.mask_BL)
        contrast = self._contrast(batch, image, text, self._taught(pixels_BCHW, batch.text), alpha)
        pairs = self._draw_pairs(image, text, contrast, StepNoise(self.seed, step, part))
        pooled_XP = model.pool(pairs.images, pairs.texts, pairs.image_rows)
        return {
            "itc": contrast.loss,
            "itm": matching_loss(model.match_logits(pooled_XP), pairs.matches, pairs.counts),
        }

    def _begin(self, batch: ImageTextBatch, step: int, part: int) -> tuple[Tensor, float]:
        """What precedes a step: the teacher moves, pixels are normalised, alpha rises."""
        with torch.no_grad():
            self.model.temperature.clamp_(0.001, 0.5)
        if self.teacher is not None and self.training and part == 0:  # once a step, however many passes it accumulates
            self.teacher.update(self.model)
        alpha = self.config.alpha * min(1.0, step / max(1, self.config.alpha_warmup))
        return (batch.pixels_BCHW.float() - self._mean) / self._std, alpha

    @torch.no_grad()
    def _taught(self, pixels_BCHW: Tensor, text: Tokens) -> Taught | None:
        """What the teacher makes of a batch, if there is a teacher."""
        if self.teacher is None:
            return None
        teacher = self.teacher.model
        return Taught(teacher, teacher.encode_image(pixels_BCHW), teacher.encode_text(text.ids_BL, text.mask_BL))

    def _contrast(
        self, batch: ImageTextBatch, image: Encoded, text: Encoded, taught: Taught | None, alpha: float
    ) -> Contrast:
        """ITC against the batch of all processes and the queue; the teacher embeds the keys, where there is one."""
        B = len(batch)
        image_BE, text_BE = self.model.embed_image(image), self.model.embed_text(text)
        targets = None if taught is None else taught.embeddings(B)
        image_key_BE, text_key_BE = targets or (image_BE, text_BE)
        image_GE, text_GE, id_G = (gather_rows(x) for x in (image_key_BE, text_key_BE, batch.image_id_B))
        image_QE, text_QE, id_Q = self.queue.contents()
        keys = Keys(torch.cat([image_GE, image_QE]), torch.cat([text_GE, text_QE]), torch.cat([id_G, id_Q]))
        positive_BK = same_BK = batch.image_id_B[:, None] == keys.id_K
        if self.config.official.diagonal_targets:
            own_B = torch.arange(B, device=id_G.device) + B * rank()
            positive_BK = F.one_hot(own_B, len(keys.id_K)).bool()
        loss, image_to_text_BK, text_to_image_BK = contrastive_loss(
            image_BE, text_BE, keys, positive_BK, self.model.temperature, teacher=targets, alpha=alpha
        )
        if self.training:
            self.queue.enqueue(image_GE, text_GE, id_G)
        G = len(id_G)
        return Contrast(loss, image_to_text_BK[:, :G].detach(), text_to_image_BK[:, :G].detach(), same_BK[:, :G])

    def _draw_pairs(self, image: Encoded, text: Encoded, contrast: Contrast, noise: StepNoise) -> Pairs:
        """Each text with its image, each image with a hard negative text, each text with a hard negative image."""
        B, G, device = len(image), contrast.same_BG.shape[1], image.hidden_BLD.device
        own_B = torch.arange(B, device=device) + B * rank()
        uniform_B2G = noise.uniform(B, 2, G, device=device)
        images, texts, same_BG = image, text, contrast.same_BG
        if self.config.negatives == "all":
            images, texts = gather_encoded(image), gather_encoded(text)
        elif world_size() > 1:
            elsewhere_G = torch.arange(G, device=device) // B != rank()
            same_BG = same_BG | elsewhere_G
        text_B, text_exists_B = draw_negatives(contrast.image_to_text_BG, same_BG, uniform_B2G[:, 0])
        image_B, image_exists_B = draw_negatives(contrast.text_to_image_BG, same_BG, uniform_B2G[:, 1])
        if self.config.negatives == "local":
            own_B, text_B, image_B = (index % B for index in (own_B, text_B, image_B))
        # Only the images that take part: with many processes most of the gathered ones do not.
        used, image_rows = torch.unique(torch.cat([own_B, own_B, image_B]), return_inverse=True)
        ones_B = torch.ones_like(text_exists_B)
        return Pairs(
            images.rows(used),
            Encoded.stack([text, texts.rows(text_B), text]),
            image_rows,
            matches=torch.cat([ones_B, ~ones_B, ~ones_B]),
            counts=torch.cat([ones_B, text_exists_B, image_exists_B]),
        )

    def _draw_random(self, image: Encoded, text: Encoded, image_id_B: Tensor, noise: StepNoise) -> Pairs:
        """Half of the texts with their own picture; the others each with one of another record, all equally likely."""
        B, device = len(image), image_id_B.device
        gathers = self.config.negatives == "all" and world_size() > 1
        own_B = torch.arange(B, device=device) + B * rank() * gathers
        id_G = gather_rows(image_id_B) if gathers else image_id_B
        G = len(id_G)
        uniform = noise.uniform(B, 1 + G, device=device)
        lot_B, uniform_BG = uniform[:, 0], uniform[:, 1:]
        lot_G = gather_rows(lot_B) if gathers else lot_B
        matches_B = (lot_G.argsort(stable=True).argsort() < G // 2)[own_B]
        false_B, exists_B = draw_negatives(torch.zeros_like(uniform_BG), image_id_B[:, None] == id_G, uniform_BG)
        shown_B = torch.where(matches_B, own_B, false_B)
        counts_B = matches_B | exists_B
        if not gathers:
            return Pairs(image, text, shown_B, matches_B, counts_B)
        # Only the images that take part: with many processes most of the gathered ones do not.
        used, rows = torch.unique(shown_B, return_inverse=True)
        return Pairs(gather_encoded(image).rows(used), text, rows, matches_B, counts_B)
