"""EVE's pre-training, masked signal modelling: predict hidden words given the picture, hidden pixels given the text.

Chen et al., AAAI 2024, arXiv 2308.11971, equations 8 to 10; the authors' pre-training was never released. Each pair
takes two passes, so that what one side hides the other side shows in full: masked text with the whole picture (MLM),
and a quarter of the patches with the whole text (MIM, as MAE: hidden patches are left out, not masked).

ITC and ITM on the same network are for the comparisons of the paper's tables 1 and 6.

Shape legend: B batch, C channels, H height, W width, L text tokens, P patches, K visible patches, D width, Y numbers of
a patch, V vocabulary, X selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch
from triptych.data.transforms import Triple
from triptych.models.protocol import Fused, Part, VisionLanguageModel
from triptych.objectives.alignment import Alignment, AlignmentConfig
from triptych.objectives.distributed import StepNoise, mean_over_all
from triptych.objectives.masked_language import Corruption
from triptych.objectives.masked_matching import Contrasting, Negatives, accuracy
from triptych.objectives.matching import matching_loss
from triptych.objectives.pretraining import TextIds, mask_text

SignalPasses = Literal["separate", "simultaneous"]
Hidden = Literal["both", "text", "image"]
HardMatching = Literal["none", "hard"]


@dataclass(frozen=True)
class MaskedSignalConfig:
    """Settings of MLM and MIM; the defaults are the paper's, where it gives any. The losses are added unweighted.

    Attributes:
        signals: what is hidden and predicted; one of the two alone is for the comparison of table 5.
        image_ratio: share of the patches that is hidden.
        text_ratio: share of the tokens that is chosen.
        passes: ``simultaneous`` hides both in one pass (table 5, where the paper took half of either).
        normalise_pixels: paint each patch with its own mean and variance taken out (MAE's option), not raw pixels.
        corruption: of the chosen tokens.
        contrast: ``itc`` adds ITC between the pictures and texts of all processes, without a teacher.
        matching: ``hard`` (needs ITC) adds ITM with negatives that ITC finds similar.
        negatives: taken from all processes, or from this one.
    """

    signals: Hidden = "both"
    image_ratio: float = 0.75
    text_ratio: float = 0.5
    passes: SignalPasses = "separate"
    normalise_pixels: bool = False
    corruption: Corruption = "bert"
    contrast: Contrasting = "none"
    matching: HardMatching = "none"
    negatives: Negatives = "all"

    def __post_init__(self) -> None:
        named = {
            "signals": Hidden,
            "passes": SignalPasses,
            "corruption": Corruption,
            "contrast": Contrasting,
            "matching": HardMatching,
            "negatives": Negatives,
        }
        for name, kinds in named.items():
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, not {getattr(self, name)!r}")
        if not 0 < self.image_ratio < 1:
            raise ValueError(f"image_ratio must be between 0 and 1, not {self.image_ratio}")
        if not 0 < self.text_ratio <= 1:
            raise ValueError(f"text_ratio must be in (0, 1], not {self.text_ratio}")
        if self.matching == "hard" and self.contrast == "none":
            raise ValueError("hard negatives are found by ITC: set contrast='itc' for matching='hard'")
        if self.passes == "simultaneous" and self.signals != "both":
            raise ValueError(f"one signal takes one pass anyway: passes='simultaneous' is for both, not {self.signals}")


class MaskedSignal(Alignment):
    """One call is the forward pass of one step. Losses: ``mlm``, ``mim``, and where asked for ``itc`` and ``itm``.

    Args:
        model: can read pictures in part and paint the rest (EVE with a ``pixel_decoder``).
        text_ids: the tokenizer's facts.
        mean, std, seed: as in :class:`Alignment`; masks and pairs depend on (seed, step) alone.

    Attributes:
        measures: ``mlm_accuracy`` and ``itm_accuracy`` of this process's last call, 0 to 1.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        config: MaskedSignalConfig,
        text_ids: TextIds,
        *,
        mean: Triple,
        std: Triple,
        seed: int = 0,
    ) -> None:
        if config.signals != "text" and getattr(model, "pixel_decoder", None) is None:
            raise ValueError(f"this {model.model_type} has no pixel_decoder to paint hidden patches with")
        without_teacher = AlignmentConfig(queue_size=0, momentum=None, alpha=0.0, negatives=config.negatives)
        super().__init__(model, without_teacher, mean=mean, std=std, seed=seed)
        model.train_only(*uses_of(config))
        self.settings = config
        self.text_ids = text_ids
        self.measures: dict[str, Tensor] = {}

    def forward(self, batch: ImageTextBatch, step: int, part: int = 0) -> dict[str, Tensor]:
        """Losses by name; their sum is what is minimised. ``part`` numbers the accumulated passes of a step."""
        settings = self.settings
        pixels_BCHW, _ = self._begin(batch, step, part)
        if pixels_BCHW.dim() != 4:
            raise ValueError("masked signal modelling is for pictures, and these are clips")
        self.measures = {}
        losses = self._signals(pixels_BCHW, batch, step, part)
        if settings.contrast == "itc":
            losses |= self._alignment(pixels_BCHW, batch, StepNoise(self.seed, step, part))
        return losses

    def _signals(self, pixels_BCHW: Tensor, batch: ImageTextBatch, step: int, part: int) -> dict[str, Tensor]:
        """MLM and MIM, in two passes or in one."""
        settings, model = self.settings, self.model
        text_noise = StepNoise(self.seed, step, part, stream=1)
        masked, chosen_BL = mask_text(
            batch.text, self.text_ids, settings.text_ratio, text_noise, corruption=settings.corruption
        )
        masked_text = model.encode_text(masked.ids_BL, masked.mask_BL)
        if settings.signals == "text":
            fused = model.fuse(model.encode_image(pixels_BCHW), masked_text)
            return {"mlm": self._text_loss(fused, batch, chosen_BL)}
        kept_BK, grid = self._visible(pixels_BCHW, StepNoise(self.seed, step, part, stream=2))
        visible = model.encode_visible(pixels_BCHW, kept_BK)
        if settings.passes == "simultaneous":
            fused = model.fuse(visible, masked_text)
            return {
                "mlm": self._text_loss(fused, batch, chosen_BL),
                "mim": self._image_loss(fused, pixels_BCHW, kept_BK, grid),
            }
        whole_text = model.encode_text(batch.text.ids_BL, batch.text.mask_BL)
        losses = {"mim": self._image_loss(model.fuse(visible, whole_text), pixels_BCHW, kept_BK, grid)}
        if settings.signals == "both":
            fused = model.fuse(model.encode_image(pixels_BCHW), masked_text)
            losses["mlm"] = self._text_loss(fused, batch, chosen_BL)
        return losses

    def _visible(self, pixels_BCHW: Tensor, noise: StepNoise) -> tuple[Tensor, tuple[int, int]]:
        """Which patches each picture shows, [B, K], in the order of the picture; and rows and columns of patches."""
        patch = self.model.patch
        grid = (pixels_BCHW.shape[2] // patch, pixels_BCHW.shape[3] // patch)
        uniform_BP = noise.uniform(len(pixels_BCHW), grid[0] * grid[1], device=pixels_BCHW.device)
        return visible_patches(uniform_BP, self.settings.image_ratio), grid

    def _text_loss(self, fused: Fused, batch: ImageTextBatch, chosen_BL: Tensor) -> Tensor:
        """Cross-entropy of the chosen tokens."""
        labels_X = batch.text.ids_BL[chosen_BL]
        logits_XV = self.model.masked_logits(fused.text_BLD[chosen_BL])
        self.measures["mlm_accuracy"] = accuracy(logits_XV, labels_X)
        return mean_over_all(F.cross_entropy(logits_XV.float(), labels_X, reduction="none"))

    def _image_loss(self, fused: Fused, pixels_BCHW: Tensor, kept_BK: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean squared error of the hidden patches."""
        target_BPY = patches_of(pixels_BCHW, self.model.patch)
        if self.settings.normalise_pixels:
            target_BPY = normalise_patches(target_BPY)
        painted_BPY = self.model.paint(fused, kept_BK, grid)
        error_BP = (painted_BPY.float() - target_BPY).square().mean(-1)
        return mean_over_all(error_BP, torch.ones_like(error_BP).scatter(1, kept_BK, 0.0))

    def _alignment(self, pixels_BCHW: Tensor, batch: ImageTextBatch, noise: StepNoise) -> dict[str, Tensor]:
        """ITC, and ITM if asked for, of whole pictures and texts."""
        model = self.model
        image = model.encode_image(pixels_BCHW)
        text = model.encode_text(batch.text.ids_BL, batch.text.mask_BL)
        contrast = self._contrast(batch, image, text, None, 0.0)
        if self.settings.matching == "none":
            return {"itc": contrast.loss}
        pairs = self._draw_pairs(image, text, contrast, noise)
        logits_X2 = model.match_logits(model.pool(pairs.images, pairs.texts, pairs.image_rows))
        self.measures["itm_accuracy"] = accuracy(logits_X2[pairs.counts], pairs.matches[pairs.counts].long())
        return {"itc": contrast.loss, "itm": matching_loss(logits_X2, pairs.matches, pairs.counts)}


def uses_of(config: MaskedSignalConfig) -> tuple[Part, ...]:
    """The parts of the model that run."""
    used: tuple[Part, ...] = ("image", "text", "fusion")
    if config.signals != "image":
        used += ("masked",)
    if config.signals != "text":
        used += ("fused_image", "pixels")
    if config.contrast == "itc":
        used += ("embedding",)
    if config.matching == "hard":
        used += ("pooled", "matching")
    return used


def visible_patches(uniform_BP: Tensor, ratio: float) -> Tensor:
    """Patches that stay, [B, K], ascending: of P patches ``int(P (1 - ratio))`` as MAE, but at least one.

    Args:
        uniform_BP: numbers that decide; those of the visible patches are the smallest of a picture.
        ratio: share of the patches that is hidden.
    """
    patches = uniform_BP.shape[1]
    count = max(1, min(patches - 1, int(patches * (1 - ratio) + 1e-6)))
    return uniform_BP.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def patches_of(pixels_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] to [B, P, Y], Y = patch * patch * C: a patch pixel by pixel, its colours together."""
    B, C, H, W = pixels_BCHW.shape
    patches = pixels_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, H // patch * (W // patch), patch * patch * C)


def picture_of(patches_BPY: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of :func:`patches_of`."""
    B, rows, columns = len(patches_BPY), *grid
    pixels = patches_BPY.reshape(B, rows, columns, patch, patch, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, columns * patch)


def normalise_patches(patches_BPY: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1 (facebookresearch/mae ``models_mae.py`` norm_pix_loss)."""
    variance_BP1, mean_BP1 = torch.var_mean(patches_BPY, dim=-1, keepdim=True)
    return (patches_BPY - mean_BP1) / (variance_BP1 + 1e-6).sqrt()
