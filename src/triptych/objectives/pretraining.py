"""mPLUG's pre-training: ITC, ITM, MLM and PrefixLM in one step, for any model with a decoder.

The image is encoded once a step, the three forms of the text (whole, masked, prefix) in one pass, and all pairs that
need fusing are fused in one pass.

Source: mPLUG section 3.3. The authors' code was never released; the order of the step follows X-PLUG/Youku-mPLUG
``models/mplug.py:151-322`` and TiMiX. Where those err, the default here is correct and :class:`OfficialBehaviour` has
the original.

Shape legend: B batch, G batch of all processes, K keys (G and the queue), L text tokens, D width, E embedding width,
V vocabulary, X selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.batches import PretrainingBatch, Tokens
from triptych.models.protocol import Encoded, Fused, VisionLanguageModel
from triptych.objectives.contrastive import FeatureQueue, Keys, contrastive_loss
from triptych.objectives.distributed import (
    StepNoise,
    gather_encoded,
    gather_rows,
    mean_over_all,
    rank,
    world_size,
)
from triptych.objectives.masked_language import distillation, mask_tokens, sequence_distillation
from triptych.objectives.matching import draw_negatives, matching_loss
from triptych.objectives.momentum import MomentumTeacher


@dataclass(frozen=True)
class OfficialBehaviour:
    """What the official (and derived) code does differently; each is off by default. See ``docs/parity.md``.

    Attributes:
        diagonal_targets: in ITC only the diagonal is positive, even where the queue holds the same picture.
        frozen_fusion_teacher: the teacher's fusion network never follows the model.
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
class PretrainingConfig:
    """Settings of the objectives; the defaults are the paper's.

    Attributes:
        alpha: share of the teacher in the targets, reached linearly after ``alpha_warmup`` steps.
        distill_language: whether MLM and PrefixLM have a teacher (ITC always has).
        negatives: draw hard negatives from all processes, or (cheaper, official) from this one.
        weights: of ITC, ITM, MLM and PrefixLM; the paper's sum is unweighted.
    """

    queue_size: int = 65536
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_warmup: int = 2000
    mlm_probability: float = 0.15
    distill_language: bool = True
    negatives: Literal["all", "local"] = "all"
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    official: OfficialBehaviour = field(default_factory=OfficialBehaviour)


@dataclass(frozen=True)
class TextIds:
    """The tokenizer's facts that the objectives need."""

    pad: int
    mask: int
    special: tuple[int, ...]
    vocab_size: int


class Pretraining(nn.Module):
    """Model, momentum teacher and queue; one call is the forward pass of one step.

    Args:
        model: needs a ``decoder`` for PrefixLM.
        mean, std: of the pixels, in units of 0..1.
        seed: of hard negatives and masks, which depend on (seed, step) alone.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: VisionLanguageModel,
        config: PretrainingConfig,
        text_ids: TextIds,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.text_ids = text_ids
        self.seed = seed
        official = config.official
        self.teacher = MomentumTeacher(
            model,
            config.momentum,
            frozen=("fusion",) if official.frozen_fusion_teacher else (),
            dropout=official.teacher_dropout,
        )
        self.queue = FeatureQueue(config.queue_size, model.embed_dim)
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, batch: PretrainingBatch, step: int) -> dict[str, Tensor]:
        """Losses by name, each already weighted; their sum is what is minimised."""
        model, teacher, config = self.model, self.teacher.model, self.config
        noise = StepNoise(self.seed, step)
        alpha = config.alpha * min(1.0, step / max(1, config.alpha_warmup))
        B = len(batch)
        whole, masked, prefix = slice(0, B), slice(B, 2 * B), slice(2 * B, 3 * B)
        with torch.no_grad():
            model.temperature.clamp_(0.001, 0.5)
        if self.training:
            self.teacher.update(model)

        pixels_BCHW = (batch.pixels_BCHW.float() - self._mean) / self._std
        masked_text, chosen_BL = self._mask(batch.text, noise)
        texts = Tokens.stack([batch.text, masked_text, batch.prefix], self.text_ids.pad)
        image = model.encode_image(pixels_BCHW)
        text = model.encode_text(texts.ids_BL, texts.mask_BL)
        with torch.no_grad():
            image_m = teacher.encode_image(pixels_BCHW)
            rows_m = slice(0, 3 * B) if config.distill_language else whole
            text_m = teacher.encode_text(texts.ids_BL[rows_m], texts.mask_BL[rows_m])

        contrast = self._contrast(batch, image, text.rows(whole), image_m, text_m.rows(whole), alpha)
        pairs = self._draw_pairs(image, text.rows(whole), contrast, noise)
        own_B = pairs.image_rows[:B]
        fused = model.fuse(
            pairs.images,
            Encoded.stack([pairs.texts, text.rows(masked), text.rows(prefix)]),
            torch.cat([pairs.image_rows, own_B, own_B]),
        )
        fused_m = None
        if config.distill_language:
            with torch.no_grad():
                local_B = torch.arange(B, device=own_B.device)
                fused_m = teacher.fuse(image_m, text_m.rows(slice(B, 3 * B)), local_B.repeat(2))
        fused_masked, fused_prefix = fused.rows(slice(3 * B, 4 * B)), fused.rows(slice(4 * B, 5 * B))
        masked_m = None if fused_m is None else fused_m.rows(slice(0, B))
        prefix_m = None if fused_m is None else fused_m.rows(slice(B, 2 * B))

        losses = {
            "itc": contrast.loss,
            "itm": matching_loss(model.match_logits(fused.rows(slice(0, 3 * B))), pairs.matches, pairs.counts),
            "mlm": self._masked_loss(fused_masked, masked_m, batch.text, chosen_BL, alpha),
            "prefix": self._prefix_loss(fused_prefix, prefix_m, batch.target, alpha),
        }
        return {name: loss * weight for (name, loss), weight in zip(losses.items(), config.weights, strict=True)}

    def _mask(self, text: Tokens, noise: StepNoise) -> tuple[Tokens, Tensor]:
        """The text with masked tokens, and which were chosen."""
        length = text.ids_BL.shape[1]
        # Drawn for a fixed length, so that how far a batch is padded does not change the draw.
        uniform = noise.uniform(len(text), max(length, 64), 3, device=text.ids_BL.device)
        ids_BL, chosen_BL = mask_tokens(
            text.ids_BL,
            uniform[:, :length],
            special=self.text_ids.special,
            mask_id=self.text_ids.mask,
            vocab_size=self.text_ids.vocab_size,
            probability=self.config.mlm_probability,
        )
        return Tokens(ids_BL, text.mask_BL), chosen_BL & text.mask_BL

    def _contrast(
        self, batch: PretrainingBatch, image: Encoded, text: Encoded, image_m: Encoded, text_m: Encoded, alpha: float
    ) -> _Contrast:
        """ITC against the batch of all processes and the queue."""
        B, teacher = len(batch), self.teacher.model
        with torch.no_grad():
            image_m_BE, text_m_BE = teacher.embed_image(image_m), teacher.embed_text(text_m)
            image_GE, text_GE, id_G = (gather_rows(x) for x in (image_m_BE, text_m_BE, batch.image_id_B))
            image_QE, text_QE, id_Q = self.queue.contents()
            keys = Keys(torch.cat([image_GE, image_QE]), torch.cat([text_GE, text_QE]), torch.cat([id_G, id_Q]))
            same_BK = batch.image_id_B[:, None] == keys.id_K
            positive_BK = same_BK
            if self.config.official.diagonal_targets:
                own_B = torch.arange(B, device=id_G.device) + B * rank()
                positive_BK = F.one_hot(own_B, len(keys.id_K)).bool()
        loss, image_to_text_BK, text_to_image_BK = contrastive_loss(
            self.model.embed_image(image),
            self.model.embed_text(text),
            keys,
            positive_BK,
            self.model.temperature,
            teacher=(image_m_BE, text_m_BE),
            alpha=alpha,
        )
        if self.training:
            self.queue.enqueue(image_GE, text_GE, id_G)
        G = len(id_G)
        return _Contrast(loss, image_to_text_BK[:, :G].detach(), text_to_image_BK[:, :G].detach(), same_BK[:, :G])

    def _draw_pairs(self, image: Encoded, text: Encoded, contrast: _Contrast, noise: StepNoise) -> _Pairs:
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
        return _Pairs(
            images.rows(used),
            Encoded.stack([text, texts.rows(text_B), text]),
            image_rows,
            matches=torch.cat([ones_B, ~ones_B, ~ones_B]),
            counts=torch.cat([ones_B, text_exists_B, image_exists_B]),
        )

    def _masked_loss(
        self, fused: Fused, fused_m: Fused | None, text: Tokens, chosen_BL: Tensor, alpha: float
    ) -> Tensor:
        """MLM at the chosen positions."""
        length = text.ids_BL.shape[1]  # the other texts of the pass may be longer
        states_BLD = fused.text_BLD[:, :length]
        labels_X = text.ids_BL[chosen_BL]
        if fused_m is None:
            return mean_over_all(_cross_entropy(self.model.masked_logits(states_BLD[chosen_BL]), labels_X))
        states_m_BLD, teacher = fused_m.text_BLD[:, :length], self.teacher.model
        if self.config.official.sequence_softmax:
            logits_BLV = self.model.masked_logits(states_BLD)
            logits_XV = logits_BLV[chosen_BL]
            with torch.no_grad():
                teacher_BLV = teacher.masked_logits(states_m_BLD)
            soft_X = sequence_distillation(logits_BLV, teacher_BLV)[chosen_BL]
        else:
            logits_XV = self.model.masked_logits(states_BLD[chosen_BL])
            with torch.no_grad():
                teacher_XV = teacher.masked_logits(states_m_BLD[chosen_BL])
            soft_X = distillation(logits_XV, teacher_XV)
        return mean_over_all((1 - alpha) * _cross_entropy(logits_XV, labels_X) + alpha * soft_X)

    def _prefix_loss(self, fused: Fused, fused_m: Fused | None, target: Tokens, alpha: float) -> Tensor:
        """PrefixLM over ``[image; prefix]``: every token of the target from those before it."""
        next_BL = target.mask_BL[:, 1:]
        labels_X = target.ids_BL[:, 1:][next_BL]
        logits_XV = _decode(self.model, fused, target, next_BL)
        hard_X = _cross_entropy(logits_XV, labels_X)
        if fused_m is None or self.config.official.unweighted_prefix:
            return mean_over_all(hard_X)
        with torch.no_grad():
            teacher_XV = _decode(self.teacher.model, fused_m, target, next_BL)
        return mean_over_all((1 - alpha) * hard_X + alpha * distillation(logits_XV, teacher_XV))


@dataclass(frozen=True)
class _Contrast:
    """ITC's loss, the similarities that choose hard negatives, and which candidates are the row's own picture."""

    loss: Tensor
    image_to_text_BG: Tensor
    text_to_image_BG: Tensor
    same_BG: Tensor


@dataclass(frozen=True)
class _Pairs:
    """The pairs of ITM: text row x goes with image row ``image_rows[x]``; ``counts`` leaves out missing negatives."""

    images: Encoded
    texts: Encoded
    image_rows: Tensor
    matches: Tensor
    counts: Tensor


def _cross_entropy(logits_XV: Tensor, labels_X: Tensor) -> Tensor:
    return F.cross_entropy(logits_XV.float(), labels_X, reduction="none")


def _decode(model: VisionLanguageModel, fused: Fused, target: Tokens, next_BL: Tensor) -> Tensor:
    """Vocabulary logits of the positions before the real target tokens."""
    assert model.decoder is not None
    hidden_BLD = model.decoder(target.ids_BL[:, :-1], fused.states())
    return model.decoder.logits(hidden_BLD[next_BL])
