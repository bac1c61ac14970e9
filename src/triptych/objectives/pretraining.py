"""mPLUG's pre-training: ITC, ITM, MLM and PrefixLM in one step, for any model with a decoder.

The image is encoded once a step, the three forms of the text (whole, masked, prefix) in one pass, and all pairs that
need fusing are fused in one pass.

Source: mPLUG section 3.3. The authors' code was never released; the order of the step follows X-PLUG/Youku-mPLUG
``models/mplug.py:151-322`` and TiMiX. Where those err, the default here is correct and
:class:`~triptych.objectives.alignment.OfficialBehaviour` has the original.

Shape legend: B batch, G batch of all processes, K keys (G and the queue), L text tokens, D width, E embedding width,
V vocabulary, X selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch, PretrainingBatch, Tokens
from triptych.models.protocol import Encoded, Fused, Part, VisionLanguageModel
from triptych.objectives.alignment import Alignment, AlignmentConfig
from triptych.objectives.distributed import StepNoise, mean_over_all
from triptych.objectives.masked_language import Corruption, distillation, mask_tokens, sequence_distillation
from triptych.objectives.matching import matching_loss


@dataclass(frozen=True)
class PretrainingConfig(AlignmentConfig):
    """Settings of the four objectives; the defaults are the paper's.

    Attributes:
        distill_language: whether MLM and PrefixLM, too, learn from the teacher.
        weights: of ITC, ITM, MLM and PrefixLM; the paper's sum is unweighted.
    """

    mlm_probability: float = 0.15
    distill_language: bool = True
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is None and self.distill_language:
            raise ValueError("without a teacher (momentum None) distill_language must be off")


@dataclass(frozen=True)
class TextIds:
    """The tokenizer's facts that the objectives need."""

    pad: int
    mask: int
    special: tuple[int, ...]
    vocab_size: int


def mask_text(
    text: Tokens, text_ids: TextIds, probability: float, noise: StepNoise, corruption: Corruption = "bert"
) -> tuple[Tokens, Tensor]:
    """The text with masked tokens, and a bool ``[B, L]`` of those that were chosen."""
    ids_BL, chosen_BL = mask_tokens(
        text.ids_BL,
        noise.uniform(*text.ids_BL.shape, 3, device=text.ids_BL.device),
        special=text_ids.special,
        mask_id=text_ids.mask,
        vocab_size=text_ids.vocab_size,
        probability=probability,
        corruption=corruption,
    )
    return Tokens(ids_BL, text.mask_BL), chosen_BL & text.mask_BL


class Pretraining(Alignment):
    """The model, its momentum teacher and the queue; one call is the forward pass of one step.

    Args:
        model: needs a ``decoder`` for PrefixLM.
        text_ids: the tokenizer's facts.
        mean, std, seed: as in :class:`Alignment`; masks, too, depend on (seed, step) alone.
    """

    uses: ClassVar[tuple[Part, ...]] = (*Alignment.uses, "masked", "decoder")
    config: PretrainingConfig

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
        if model.decoder is None:
            raise ValueError(f"PrefixLM needs a model with a decoder; this {model.model_type} has none")
        super().__init__(model, config, mean=mean, std=std, seed=seed)
        self.text_ids = text_ids

    def forward(self, batch: ImageTextBatch, step: int, part: int = 0) -> dict[str, Tensor]:
        """Losses by name, each already weighted; their sum is what is minimised."""
        model, config = self.model, self.config
        assert isinstance(batch, PretrainingBatch)
        pixels_BCHW, alpha = self._begin(batch, step, part)
        B = len(batch)
        whole, masked, prefix = slice(0, B), slice(B, 2 * B), slice(2 * B, 3 * B)
        masked_text, chosen_BL = self._mask(batch.text, StepNoise(self.seed, step, part, stream=1))
        texts = Tokens.stack([batch.text, masked_text, batch.prefix], self.text_ids.pad)
        image = model.encode_image(pixels_BCHW)
        text = model.encode_text(texts.ids_BL, texts.mask_BL)
        taught = self._taught(pixels_BCHW, texts if config.distill_language else batch.text)

        contrast = self._contrast(batch, image, text.rows(whole), taught, alpha)
        pairs = self._draw_pairs(image, text.rows(whole), contrast, StepNoise(self.seed, step, part))
        own_B = pairs.image_rows[:B]
        fused = model.fuse(
            pairs.images,
            Encoded.stack([pairs.texts, text.rows(masked), text.rows(prefix)]),
            torch.cat([pairs.image_rows, own_B, own_B]),
        )
        fused_m = None
        if taught is not None and config.distill_language:
            with torch.no_grad():
                local_B = torch.arange(B, device=own_B.device)
                fused_m = taught.model.fuse(taught.image, taught.text.rows(slice(B, 3 * B)), local_B.repeat(2))
        fused_masked, fused_prefix = fused.rows(slice(3 * B, 4 * B)), fused.rows(slice(4 * B, 5 * B))
        masked_m = None if fused_m is None else fused_m.rows(slice(0, B))
        prefix_m = None if fused_m is None else fused_m.rows(slice(B, 2 * B))

        losses = {
            "itc": contrast.loss,
            "itm": matching_loss(model.match_logits(fused.pooled_BP[: 3 * B]), pairs.matches, pairs.counts),
            "mlm": self._masked_loss(fused_masked, masked_m, batch.text, chosen_BL, alpha),
            "prefix": self._prefix_loss(fused_prefix, prefix_m, batch.target, alpha),
        }
        return {name: loss * weight for (name, loss), weight in zip(losses.items(), config.weights, strict=True)}

    def _mask(self, text: Tokens, noise: StepNoise) -> tuple[Tokens, Tensor]:
        """As :func:`mask_text`."""
        return mask_text(text, self.text_ids, self.config.mlm_probability, noise)

    def _masked_loss(
        self, fused: Fused, fused_m: Fused | None, text: Tokens, chosen_BL: Tensor, alpha: float
    ) -> Tensor:
        """MLM at the chosen positions."""
        length = text.ids_BL.shape[1]  # the other texts of the pass may be longer
        states_BLD = fused.text_BLD[:, :length]
        labels_X = text.ids_BL[chosen_BL]
        if fused_m is None:
            return mean_over_all(_cross_entropy(self.model.masked_logits(states_BLD[chosen_BL]), labels_X))
        assert self.teacher is not None
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
        assert self.teacher is not None
        with torch.no_grad():
            teacher_XV = _decode(self.teacher.model, fused_m, target, next_BL)
        return mean_over_all((1 - alpha) * hard_X + alpha * distillation(logits_XV, teacher_XV))


def _cross_entropy(logits_XV: Tensor, labels_X: Tensor) -> Tensor:
    return F.cross_entropy(logits_XV.float(), labels_X, reduction="none")


def _decode(model: VisionLanguageModel, fused: Fused, target: Tokens, next_BL: Tensor) -> Tensor:
    """Vocabulary logits of the positions before the real target tokens."""
    assert model.decoder is not None
    hidden_BLD = model.decoder(target.ids_BL[:, :-1], fused.states())
    return model.decoder.logits(hidden_BLD[next_BL])
