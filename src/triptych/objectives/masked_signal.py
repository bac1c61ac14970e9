"""EVE's pre-training, masked signal modelling: predict hidden words given the picture, hidden pixels given the text.

Chen et al., AAAI 2024, arXiv 2308.11971, equations 8 to 10; the authors' pre-training was never released. Each pair
takes two passes, so that what one side hides the other side shows in full: masked text with the whole picture (MLM),
and a quarter of the patches with the whole text (MIM, as MAE: hidden patches are left out, not masked).

ITC and ITM on the same network are for the comparisons of the paper's tables 1 and 6.

Shape legend: B batch, C channels, H height, W width, L text tokens, P patches, K visible patches, D width, Y numbers of
a patch, V vocabulary, X selected tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch, Tokens
from triptych.data.transforms import Triple
from triptych.models.protocol import Encoded, Fused, Part, VisionLanguageModel
from triptych.objectives.alignment import Alignment, AlignmentConfig
from triptych.objectives.distributed import StepNoise, mean_over_all
from triptych.objectives.masked_language import Corruption
from triptych.objectives.masked_matching import Contrasting, Matching, Negatives, accuracy
from triptych.objectives.matching import matching_loss
from triptych.objectives.pretraining import TextIds, mask_text

SignalPasses = Literal["separate", "simultaneous"]
Hidden = Literal["both", "text", "image"]
Draw = Callable[..., StepNoise]
"""``draw(stream=...)`` gives the random numbers of a stream of this step."""

_TEXT, _IMAGE = 1, 2
"""Streams that decide what is hidden; stream 0 draws the pairs of ITM."""


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
        matching: ``random`` and ``hard`` (needs ITC) add ITM with pairs drawn as of
            :class:`~triptych.objectives.masked_matching.MaskedMatchingConfig`.
        negatives: taken from all processes, or from this one.
    """

    signals: Hidden = "both"
    image_ratio: float = 0.75
    text_ratio: float = 0.5
    passes: SignalPasses = "separate"
    normalise_pixels: bool = False
    corruption: Corruption = "bert"
    contrast: Contrasting = "none"
    matching: Matching | Literal["none"] = "none"
    negatives: Negatives = "all"

    def __post_init__(self) -> None:
        named = {
            "signals": get_args(Hidden),
            "passes": get_args(SignalPasses),
            "corruption": get_args(Corruption),
            "contrast": get_args(Contrasting),
            "matching": ("none", *get_args(Matching)),
            "negatives": get_args(Negatives),
        }
        for name, kinds in named.items():
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, not {getattr(self, name)!r}")
        if not 0 < self.image_ratio < 1:
            raise ValueError(f"image_ratio must be between 0 and 1, not {self.image_ratio}")
        if not 0 < self.text_ratio <= 1:
            raise ValueError(f"text_ratio must be in (0, 1], not {self.text_ratio}")
        if self.matching == "hard" and self.contrast == "none":
            raise ValueError("hard negatives are found by ITC: set contrast='itc' for matching='hard'")
        if self.passes == "simultaneous" and self.signals != "both":
            raise ValueError(f"one signal takes one pass anyway: passes='simultaneous' is for both, not {self.signals}")

    @property
    def ranks(self) -> bool:
        """Whether something is trained that retrieval can rank by."""
        return self.contrast == "itc" or self.matching != "none"


class Whole:
    """The pictures and texts of a batch with nothing hidden; either is encoded once, when it is first looked at."""

    def __init__(self, model: VisionLanguageModel, pixels_BCHW: Tensor, tokens: Tokens) -> None:
        self._model = model
        self.pixels_BCHW = pixels_BCHW
        self.tokens = tokens

    @cached_property
    def image(self) -> Encoded:
        return self._model.encode_image(self.pixels_BCHW)

    @cached_property
    def text(self) -> Encoded:
        return self._model.encode_text(self.tokens.ids_BL, self.tokens.mask_BL)


@dataclass(frozen=True)
class HiddenWords:
    """Texts with masked tokens; which were chosen, as rows of all tokens of the batch, and what they were, [X]."""

    text: Encoded
    row_X: Tensor
    label_X: Tensor


@dataclass(frozen=True)
class HiddenPatches:
    """Pictures seen in part: the patches that stayed, in the order of the picture, of so many rows and columns."""

    visible: Encoded
    kept_BK: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class GuessedWords:
    """Cross-entropy of each chosen token, and whether its likeliest word is the right one."""

    loss_X: Tensor
    right_X: Tensor


@dataclass(frozen=True)
class GuessedPatches:
    """Mean squared error of each patch, and 1 for the hidden ones, which count, else 0."""

    error_BP: Tensor
    hidden_BP: Tensor


class MaskedSignal(Alignment):
    """One call is the forward pass of one step. Losses: ``mlm``, ``mim``, and where asked for ``itc`` and ``itm``.

    Args:
        model: can read pictures in part and paint the rest (EVE with a ``pixel_decoder``); any for MLM alone.
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
        if config.signals != "text":
            check_paints(model)
        without_teacher = AlignmentConfig(queue_size=0, momentum=None, alpha=0.0, negatives=config.negatives)
        super().__init__(model, without_teacher, mean=mean, std=std, seed=seed)
        model.train_only(*uses_of(config))
        self.settings = config
        self.text_ids = text_ids
        self.measures: dict[str, Tensor] = {}

    @property
    def metric(self) -> str:
        """The score (larger is better) that chooses among the weights of a run: recall, where something is ranked."""
        return "mean" if self.settings.ranks else "minus_loss"

    def forward(self, batch: ImageTextBatch, step: int, part: int = 0) -> dict[str, Tensor]:
        """Losses by name; their sum is what is minimised. ``part`` numbers the accumulated passes of a step."""
        whole = self._whole(batch, step, part)
        words, patches = self._guess(whole, partial(StepNoise, self.seed, step, part))
        losses, self.measures = {}, {}
        if words is not None:
            losses["mlm"] = mean_over_all(words.loss_X)
            self.measures["mlm_accuracy"] = words.right_X.sum() / max(1, len(words.right_X))
        if patches is not None:
            losses["mim"] = mean_over_all(patches.error_BP, patches.hidden_BP)
        if self.settings.ranks:
            losses |= self._alignment(whole, batch, StepNoise(self.seed, step, part))
        return losses

    @torch.no_grad()
    def evaluate(self, batches: Iterable[ImageTextBatch]) -> dict[str, float]:
        """How well the hidden part of data is predicted; what is hidden depends on the seed and the data alone.

        A process does it by itself, and the model should be in evaluation mode.

        Returns:
            ``mlm`` (mean cross-entropy of the chosen tokens), ``mlm_accuracy`` (percent), ``mim`` (mean squared error
            of the hidden patches), and ``minus_loss``, minus the sum of both losses, which is better when larger.

        Raises:
            ValueError: there is no batch.
        """
        sums: dict[str, float] = defaultdict(float)
        number = -1
        for number, batch in enumerate(batches):
            whole = self._whole(batch.to(self._mean.device), number, 0)
            words, patches = self._guess(whole, partial(StepNoise, self.seed, number, alone=True))
            if words is not None:
                sums["tokens"] += len(words.loss_X)
                sums["loss"] += float(words.loss_X.sum())
                sums["right"] += int(words.right_X.sum())
            if patches is not None:
                sums["patches"] += int(patches.hidden_BP.sum())
                sums["error"] += float((patches.error_BP * patches.hidden_BP).sum())
        if number < 0:
            raise ValueError("no picture with a caption to evaluate on")
        scores: dict[str, float] = {}
        if self.settings.signals != "image":
            tokens = max(1, sums["tokens"])
            scores |= {"mlm": sums["loss"] / tokens, "mlm_accuracy": 100 * sums["right"] / tokens}
        if self.settings.signals != "text":
            scores["mim"] = sums["error"] / sums["patches"]
        return scores | {"minus_loss": -sum(scores.get(name, 0.0) for name in ("mlm", "mim"))}

    def _whole(self, batch: ImageTextBatch, step: int, part: int) -> Whole:
        pixels_BCHW, _ = self._begin(batch, step, part)
        if pixels_BCHW.dim() != 4:
            raise ValueError("masked signal modelling is for pictures, and these are clips: give data without videos")
        return Whole(self.model, pixels_BCHW, batch.text)

    def _guess(self, whole: Whole, draw: Draw) -> tuple[GuessedWords | None, GuessedPatches | None]:
        """MLM and MIM, in two passes or in one; ``None`` for what is not predicted."""
        settings, model = self.settings, self.model
        words = self._hide_words(whole.tokens, draw(stream=_TEXT)) if settings.signals != "image" else None
        patches = self._hide_patches(whole.pixels_BCHW, draw(stream=_IMAGE)) if settings.signals != "text" else None
        if settings.passes == "simultaneous":
            assert words is not None
            assert patches is not None
            fused = model.fuse(patches.visible, words.text)
            return self._read(fused.text_BLD, words), self._paint(fused, whole, patches)
        read = painted = None
        if words is not None:
            read = self._read(model.fuse_text(whole.image, words.text), words)
        if patches is not None:
            painted = self._paint(model.fuse(patches.visible, whole.text), whole, patches)
        return read, painted

    def _hide_words(self, tokens: Tokens, noise: StepNoise) -> HiddenWords:
        settings = self.settings
        masked, chosen_BL = mask_text(tokens, self.text_ids, settings.text_ratio, noise, corruption=settings.corruption)
        # Found before the passes: a GPU has to finish all it was given before it can say how many there are.
        row_X = chosen_BL.flatten().nonzero().squeeze(1)
        label_X = tokens.ids_BL.flatten().index_select(0, row_X)
        return HiddenWords(self.model.encode_text(masked.ids_BL, masked.mask_BL), row_X, label_X)

    def _hide_patches(self, pixels_BCHW: Tensor, noise: StepNoise) -> HiddenPatches:
        patch = self.model.patch
        grid = (pixels_BCHW.shape[2] // patch, pixels_BCHW.shape[3] // patch)
        uniform_BP = noise.uniform(len(pixels_BCHW), grid[0] * grid[1], device=pixels_BCHW.device)
        kept_BK = visible_patches(uniform_BP, self.settings.image_ratio)
        return HiddenPatches(self.model.encode_visible(pixels_BCHW, kept_BK), kept_BK, grid)

    def _read(self, states_BLD: Tensor, words: HiddenWords) -> GuessedWords:
        logits_XV = self.model.masked_logits(states_BLD.flatten(0, 1).index_select(0, words.row_X))
        loss_X = F.cross_entropy(logits_XV.float(), words.label_X, reduction="none")
        return GuessedWords(loss_X, logits_XV.argmax(-1) == words.label_X)

    def _paint(self, fused: Fused, whole: Whole, patches: HiddenPatches) -> GuessedPatches:
        target_BPY = patches_of(whole.pixels_BCHW, self.model.patch)
        if self.settings.normalise_pixels:
            target_BPY = normalise_patches(target_BPY)
        painted_BPY = self.model.paint(fused, patches.kept_BK, patches.grid)
        error_BP = (painted_BPY.float() - target_BPY).square().mean(-1)
        return GuessedPatches(error_BP, torch.ones_like(error_BP).scatter(1, patches.kept_BK, 0.0))

    def _alignment(self, whole: Whole, batch: ImageTextBatch, noise: StepNoise) -> dict[str, Tensor]:
        """ITC and ITM, whichever is asked for, of whole pictures and texts."""
        model, losses, contrast = self.model, {}, None
        if self.settings.contrast == "itc":
            contrast = self._contrast(batch, whole.image, whole.text, None, 0.0)
            losses["itc"] = contrast.loss
        if self.settings.matching == "none":
            return losses
        if self.settings.matching == "hard":
            assert contrast is not None
            pairs = self._draw_pairs(whole.image, whole.text, contrast, noise)
        else:
            pairs = self._draw_random(whole.image, whole.text, batch.image_id_B, noise)
        logits_X2 = model.match_logits(model.pool(pairs.images, pairs.texts, pairs.image_rows))
        self.measures["itm_accuracy"] = accuracy(logits_X2[pairs.counts], pairs.matches[pairs.counts].long())
        return losses | {"itm": matching_loss(logits_X2, pairs.matches, pairs.counts)}


def check_paints(model: VisionLanguageModel) -> None:
    """Whether a model can paint what it does not see.

    Raises:
        ValueError: it has no decoder of pixels.
    """
    if getattr(model, "pixel_decoder", None) is None:
        raise ValueError(f"this {model.model_type} has no pixel_decoder to paint hidden patches with")


def uses_of(config: MaskedSignalConfig) -> tuple[Part, ...]:
    """The parts of the model that run."""
    used: tuple[Part, ...] = ("image", "text", "fusion")
    if config.signals != "image":
        used += ("masked",)
    if config.signals != "text":
        used += ("pixels",)
    if config.contrast == "itc":
        used += ("embedding",)
    if config.matching != "none":
        used += ("pooled", "matching")
    return used


def visible_patches(uniform_BP: Tensor, ratio: float) -> Tensor:
    """Patches that stay, [B, K], ascending: of P patches ``int(P (1 - ratio))`` as MAE, but neither none nor all.

    Args:
        uniform_BP: numbers that decide; those of the visible patches are the smallest of a picture.
        ratio: share of the patches that is hidden.

    Raises:
        ValueError: there is only one patch.
    """
    patches = uniform_BP.shape[1]
    if patches < 2:
        raise ValueError("a picture of a single patch cannot be shown in part: take larger pictures")
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
    mean_BP1, deviation_BP1 = _statistics(patches_BPY)
    return (patches_BPY - mean_BP1) / deviation_BP1


def restore_patches(normalised_BPY: Tensor, patches_BPY: Tensor) -> Tensor:
    """The inverse of :func:`normalise_patches`: the mean and the variance of ``patches_BPY`` put back."""
    mean_BP1, deviation_BP1 = _statistics(patches_BPY)
    return normalised_BPY * deviation_BP1 + mean_BP1


def _statistics(patches_BPY: Tensor) -> tuple[Tensor, Tensor]:
    variance_BP1, mean_BP1 = torch.var_mean(patches_BPY, dim=-1, keepdim=True)
    return mean_BP1, (variance_BP1 + 1e-6).sqrt()
