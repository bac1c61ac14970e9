"""BridgeTower's and METER's pre-training, masked language modelling and image-text matching, for any model.

Source: Xu et al. 2023 (BridgeTower) section 3.4; microsoft/BridgeTower ``objectives.py:23-93`` (MLM, ITM) and
``config.py:168-179`` (``task_mlm_itm_itc`` and ``task_mlm_itm_itc_hard``, which the paper does not use).

Shape legend: B batch, G batch of all processes, L text tokens, D width, V vocabulary, X selected tokens or pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch, Tokens
from triptych.data.transforms import Triple
from triptych.models.protocol import Encoded, Part, VisionLanguageModel
from triptych.objectives.alignment import Alignment, AlignmentConfig, Contrast, Pairs
from triptych.objectives.distributed import StepNoise, mean_over_all
from triptych.objectives.matching import matching_loss
from triptych.objectives.pretraining import TextIds, mask_text

Passes = Literal["shared", "two"]
Contrasting = Literal["none", "itc"]
Matching = Literal["random", "hard"]
Negatives = Literal["all", "local"]


@dataclass(frozen=True)
class MaskedMatchingConfig:
    """Settings of MLM and ITM; the defaults are the paper's. The losses are added unweighted.

    Attributes:
        mlm_probability: share of the tokens that is chosen.
        passes: ``two`` (official) runs both encoders for MLM and again for ITM; ``shared`` runs the image encoder once,
            and the text encoder once on masked and whole texts together. Without dropout both give the same losses and
            gradients.
        contrast: ``itc`` adds ITC between the pictures and texts of all processes, without a teacher.
        matching: ``random`` shows half of the texts, of the whole batch exactly half, their own picture and each other
            text that of another record; ``hard`` (needs ITC) shows each text its own picture and one that ITC finds
            similar, and each picture such a text, as :class:`~triptych.objectives.alignment.Alignment` does.
        negatives: taken from all processes, and then the batch is that of all processes; or (cheaper, official for
            ``hard``) from this one.
    """

    mlm_probability: float = 0.15
    passes: Passes = "shared"
    contrast: Contrasting = "none"
    matching: Matching = "random"
    negatives: Negatives = "all"

    def __post_init__(self) -> None:
        named = {"passes": Passes, "contrast": Contrasting, "matching": Matching, "negatives": Negatives}
        for name, kinds in named.items():
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, not {getattr(self, name)!r}")
        if self.matching == "hard" and self.contrast == "none":
            raise ValueError("hard negatives are found by ITC: set contrast='itc' for matching='hard'")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be in (0, 1], not {self.mlm_probability}")


class MaskedMatching(Alignment):
    """One call is the forward pass of one step. Losses: ``mlm``, ``itm``, and with ITC ``itc``.

    Args:
        text_ids: the tokenizer's facts.
        mean, std, seed: as in :class:`Alignment`; masks and pairs depend on (seed, step) alone.

    Attributes:
        measures: ``mlm_accuracy`` and ``itm_accuracy`` of this process's last call, 0 to 1.
    """

    uses: ClassVar[tuple[Part, ...]] = ("image", "text", "fusion", "pooled", "matching", "masked")
    """And ``embedding`` with ITC."""

    def __init__(
        self,
        model: VisionLanguageModel,
        config: MaskedMatchingConfig,
        text_ids: TextIds,
        *,
        mean: Triple,
        std: Triple,
        seed: int = 0,
    ) -> None:
        without_teacher = AlignmentConfig(queue_size=0, momentum=None, alpha=0.0, negatives=config.negatives)
        super().__init__(model, without_teacher, mean=mean, std=std, seed=seed)
        if config.contrast == "itc":
            model.train_only(*self.uses, "embedding")
        self.settings = config
        self.text_ids = text_ids
        self.measures: dict[str, Tensor] = {}

    def forward(self, batch: ImageTextBatch, step: int, part: int = 0) -> dict[str, Tensor]:
        """Losses by name; their sum is what is minimised. ``part`` numbers the accumulated passes of a step."""
        model, settings = self.model, self.settings
        pixels_BCHW, _ = self._begin(batch, step, part)
        masked_noise, noise = StepNoise(self.seed, step, part, stream=1), StepNoise(self.seed, step, part)
        masked, chosen_BL = mask_text(batch.text, self.text_ids, settings.mlm_probability, masked_noise)
        if settings.passes == "two":
            seen = self._encode(pixels_BCHW, masked)
            image, text = self._encode(pixels_BCHW, batch.text)
        else:
            B = len(batch)
            image, both = self._encode(pixels_BCHW, Tokens.stack([masked, batch.text], self.text_ids.pad))
            seen, text = (image, both.rows(slice(0, B))), both.rows(slice(B, 2 * B))
        states_BLD = model.fuse_text(*seen)
        contrast = self._contrast(batch, image, text, None, 0.0) if settings.contrast == "itc" else None
        pairs = self._pairs(batch, image, text, contrast, noise)
        pooled_XP = model.pool(pairs.images, pairs.texts, pairs.image_rows)

        logits_XV, labels_X = model.masked_logits(states_BLD[chosen_BL]), batch.text.ids_BL[chosen_BL]
        logits_X2 = model.match_logits(pooled_XP)
        self.measures = {
            "mlm_accuracy": accuracy(logits_XV, labels_X),
            "itm_accuracy": accuracy(logits_X2[pairs.counts], pairs.matches[pairs.counts].long()),
        }
        losses = {
            "mlm": mean_over_all(F.cross_entropy(logits_XV.float(), labels_X, reduction="none")),
            "itm": matching_loss(logits_X2, pairs.matches, pairs.counts),
        }
        return losses if contrast is None else {**losses, "itc": contrast.loss}

    def _encode(self, pixels_BCHW: Tensor, text: Tokens) -> tuple[Encoded, Encoded]:
        return self.model.encode_image(pixels_BCHW), self.model.encode_text(text.ids_BL, text.mask_BL)

    def _pairs(
        self, batch: ImageTextBatch, image: Encoded, text: Encoded, contrast: Contrast | None, noise: StepNoise
    ) -> Pairs:
        """The pairs of ITM."""
        if self.settings.matching == "random":
            return self._draw_random(image, text, batch.image_id_B, noise)
        assert contrast is not None
        return self._draw_pairs(image, text, contrast, noise)


@torch.no_grad()
def accuracy(logits_XK: Tensor, labels_X: Tensor) -> Tensor:
    """Share of rows whose largest logit is the label's; 0 without rows."""
    return (logits_XK.argmax(-1) == labels_X).sum() / max(1, len(labels_X))
