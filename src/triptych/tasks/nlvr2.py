"""Is a statement true of two pictures (NLVR2), or of one (NLVR)?

Three ways to judge a pair:

- ``passes``: the statement is fused with each picture by itself and a classifier reads both pooled states
  (microsoft/BridgeTower ``objectives.py:535-590``);
- ``merged``: one fusion with both pictures (mPLUG section 5.2.5, whose code was not released; salesforce/BLIP
  ``models/nlvr_encoder.py``);
- ``biattention``: two fusions whose states attend to each other (ssyze/EVE ``models/model_nlvr_beit.py``; Chen et al.,
  UNITER, section 4.2).

Shape legend: B records, S pictures of each (1 or 2), Q statements, T tokens of a fused state (pictures' and text's),
D its width, P pooled width, L tokens, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.batches import Tokens
from triptych.data.boxes import mirror_phrase
from triptych.data.fields import text, true_or_false
from triptych.data.loader import mix, seeded
from triptych.data.samples import BrokenSample, Record
from triptych.data.transforms import Transform
from triptych.metrics.nlvr2 import consistency, sentence_group
from triptych.models.heads import ClassifierHead
from triptych.models.layers import Attention, init_weights
from triptych.models.protocol import Encoded, Part, VisionLanguageModel
from triptych.objectives.classification import class_indices, classification_loss
from triptych.tasks.base import ItemBatch, ItemPipeline, ItemTask, Pipeline, Report, Shown, mean_credits, most_common

Variant = Literal["passes", "merged", "biattention"]

_HEAD_WIDTH = 64  # of one attention head, as in every published size


@dataclass(frozen=True)
class Nlvr2Config:
    """How statements are judged.

    Attributes:
        variant: see the top of the file. ``merged`` is for models that can fuse two pictures at once.
        pictures: that each record shows: 2, or 1 with ``passes``.
        picture_types: a learned vector for the first picture and one for the second, added to their tokens before
            fusion. They start at zero, so that with BridgeTower, which has a type of its own for all pictures, both
            start as that type (bt_module.py:185-190).
        swap: in training, half of the pairs change places, and with them "left" and "right" in the statement
            (X-PLUG/mPLUG ``dataset/nlvr_dataset.py``, which does it in evaluation too).
        head_scale: hidden width of the classifier, times P; not of ``biattention``.
        head_dropout: of the classifier, or within ``biattention``.
    """

    variant: Variant = "passes"
    pictures: Literal[1, 2] = 2
    picture_types: bool = False
    swap: bool = False
    head_scale: float = 1.5
    head_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, not {self.variant!r}")
        if self.pictures not in (1, 2):
            raise ValueError(f"pictures must be 1 or 2, not {self.pictures!r}")
        wants_two = {"picture_types": self.picture_types, "swap": self.swap, self.variant: self.variant != "passes"}
        if self.pictures == 1 and any(wants_two.values()):
            raise ValueError(f"{next(name for name, wants in wants_two.items() if wants)} is for two pictures")


@dataclass(frozen=True)
class Statement:
    """One statement as the model reads it.

    Attributes:
        label: whether it is true; None in a test set.
        group: of those of the same sentence, see :func:`triptych.metrics.nlvr2.sentence_group`.
        split: scores are also given by it.
    """

    name: str
    text: str
    label: bool | None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class ReadStatement:
    """The statement of a record that shows so many pictures (see ``docs/data.md``)."""

    pictures: int

    def __call__(self, record: Record) -> list[Statement]:
        listed = record.extra.get("images")
        shown = 1 if record.image is not None else len(listed) if isinstance(listed, list | tuple) else 0
        if shown != self.pictures:
            raise BrokenSample(record.key, f"it shows {shown} pictures, not {self.pictures} (Nlvr2Config.pictures)")
        try:
            sentence = text(record.extra, "statement")
            label = None if record.extra.get("label") is None else true_or_false(record.extra, "label")
        except ValueError as error:
            raise BrokenSample(record.key, str(error)) from error
        name = str(record.extra.get("identifier", record.key))
        split = record.extra.get("split")
        return [Statement(name, sentence, label, sentence_group(name, sentence), None if split is None else str(split))]


@dataclass(frozen=True)
class SwappingPipeline(ItemPipeline[Statement]):
    """Half of the pairs with the second picture first, and "left" and "right" exchanged in the statement."""

    def prepare(self, record: Record, seed: int) -> Shown[Statement]:
        shown = super().prepare(record, seed)
        with seeded(mix(seed, 1)):  # the transforms have used the numbers of the seed itself
            swapped = bool(torch.rand(()) < 0.5)
        if not swapped:
            return shown
        return Shown(shown.pixels.flip(0), tuple(replace(item, text=mirror_phrase(item.text)) for item in shown.items))


@dataclass(frozen=True)
class StatementBatch(ItemBatch):
    """Pairs of pictures ``[B, 2, C, H, W]``, or single ones ``[B, C, H, W]``, and statements.

    Attributes:
        statement: ``[CLS] statement``.
        label_Q: 1 for true, 0 for false.
    """

    statement: Tokens
    label_Q: Tensor


class AttentionPooling(nn.Module):
    """A mean of states, weighted by what a linear layer and ReLU say of each; ``[B, T, D]`` to ``[B, D]``."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Encoded) -> Tensor:
        scores_BT = F.relu(self.score(states.hidden_BLD)).squeeze(2).float().masked_fill(~states.real_BL(), -torch.inf)
        weights_BT = self.dropout(scores_BT.softmax(1)).to(states.hidden_BLD.dtype)
        return (weights_BT.unsqueeze(1) @ states.hidden_BLD).squeeze(1)


class BiAttentionHead(nn.Module):
    """Two fused states look at each other; logits ``[Q, 2]`` of false and true."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        heads = width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else 1
        self.first_to_second = Attention(width, heads, dropout=dropout)
        self.second_to_first = Attention(width, heads, dropout=dropout)
        self.join = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.pool = AttentionPooling(width, dropout)
        self.classify = nn.Linear(2 * width, 2)
        init_weights(self, width)

    def forward(self, first: Encoded, second: Encoded) -> Tensor:
        first_QD = self.pool(self._joined(self.first_to_second, first, second))
        second_QD = self.pool(self._joined(self.second_to_first, second, first))
        return self.classify(torch.cat([first_QD, second_QD], dim=1))

    def _joined(self, attention: Attention, own: Encoded, other: Encoded) -> Encoded:
        """Own states with what they saw of the other's."""
        seen_QTD = attention(own.hidden_BLD, other.hidden_BLD, other.mask_BL)
        joined_QTD = self.dropout(F.relu(self.join(torch.cat([seen_QTD, own.hidden_BLD], dim=2))))
        return Encoded(joined_QTD, own.mask_BL)


class Nlvr2(ItemTask[Statement, StatementBatch]):
    """Judges statements about pictures."""

    name: ClassVar[str] = "nlvr2"
    metric: ClassVar[str] = "accuracy"
    config_type: ClassVar[type[Any]] = Nlvr2Config
    config: Nlvr2Config

    def build(self) -> None:
        """Raises ValueError where ``merged`` is asked of a model that cannot fuse two pictures, or tell them apart."""
        self.head = self._build_head(self.model)
        if self.config.variant == "merged":  # kept with the head: no other task has a use for it
            self.second_attention = self.model.pair_attention()
            if len(self.second_attention) == 0 and not self.config.picture_types:
                raise ValueError("this fusion sees two pictures alike, whatever their order: set picture_types=True")
        if self.config.picture_types:
            self.picture_types = nn.Parameter(torch.zeros(2, self.model.width))

    @property
    def uses(self) -> tuple[Part, ...]:
        shared: tuple[Part, ...] = ("image", "text", "fusion")
        return (*shared, "fused_image" if self.config.variant == "biattention" else "pooled")

    def _build_head(self, model: VisionLanguageModel) -> nn.Module:
        config = self.config
        if config.variant == "biattention":
            return BiAttentionHead(model.width, config.head_dropout)
        states = config.pictures if config.variant == "passes" else 1
        scale = config.head_scale / states  # BridgeTower's hidden width is a multiple of one pooled state
        return ClassifierHead(states * model.pooled_width, 2, scale=scale, dropout=config.head_dropout)

    def items(self) -> Callable[[Record], Sequence[Statement]]:
        return ReadStatement(self.config.pictures)

    def batch(
        self, pixels: Tensor, picture_Q: Tensor, items: Sequence[Statement], *, max_tokens: int
    ) -> StatementBatch:
        shown = pixels.shape[1] if pixels.dim() == 5 else 1
        if shown != self.config.pictures:
            raise ValueError(f"the records show {shown} pictures each, not {self.config.pictures}")
        tokens = self.tokens([item.text for item in items], max_tokens)
        return StatementBatch(pixels, picture_Q, tokens, class_indices(item.label for item in items))

    def training_pipeline(self, transform: Transform, max_words: int, max_tokens: int) -> Pipeline:
        kind = SwappingPipeline if self.config.swap else ItemPipeline[Statement]
        return kind(self.items(), transform, partial(self.batch, max_tokens=max_tokens))

    def forward(self, batch: StatementBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Mean cross-entropy of the labels."""
        return {"nlvr2": classification_loss(self._logits(batch), batch.label_Q)}

    @torch.no_grad()
    def predict(self, batch: StatementBatch) -> list[bool]:
        """Whether each statement is true."""
        return [bool(index) for index in self._logits(batch).argmax(1).tolist()]

    def report(self, items: Sequence[Statement], predictions: Sequence[Any]) -> Report:
        """Accuracy in percent, of all and of each split; and consistency, the share of sentences always judged rightly.

        Consistency is that of the statements whose identifiers tell which have the same sentence, if there are any.
        """
        results = [
            {"identifier": item.name, "prediction": prediction}
            for item, prediction in zip(items, predictions, strict=True)
        ]
        judged = [
            (item, item.label == prediction)
            for item, prediction in zip(items, predictions, strict=True)
            if item.label is not None
        ]
        scores = mean_credits([(item.split, float(right)) for item, right in judged], "accuracy")
        grouped = [(item.group, right) for item, right in judged if item.group is not None]
        if grouped:
            groups, right = zip(*grouped, strict=True)
            scores["consistency"] = round(100 * consistency(groups, right), 4)
        return Report(scores, results, [float(right) for _, right in judged])

    def commonest(self, seen: Sequence[Statement]) -> Callable[[Statement], bool]:
        label = most_common(item.label for item in seen)
        return lambda item: bool(label)

    def _logits(self, batch: StatementBatch) -> Tensor:
        """``[Q, 2]``: column 1 says that the statement is true."""
        image = self._encode(batch)
        statement = self.model.encode_text(batch.statement.ids_BL, batch.statement.mask_BL)
        side_S = torch.arange(self.config.pictures, device=batch.picture_Q.device)
        rows_QS = self.config.pictures * batch.picture_Q[:, None] + side_S
        if self.config.variant == "merged":
            first, second = (image.rows(rows_Q) for rows_Q in rows_QS.unbind(1))
            fused = self.model.fuse_pair(first, second, statement, self.second_attention)
            return self.head(fused.pooled_BP).float()
        # Every statement with each of its pictures, those of a statement under each other: S Q rows.
        statement_QS = torch.arange(len(batch), device=rows_QS.device).repeat_interleave(rows_QS.shape[1])
        passes = (image, statement.rows(statement_QS), rows_QS.flatten())
        if self.config.variant == "biattention":
            fused = self.model.fuse(*passes)
            first, second = (fused.rows(slice(side, None, 2)).states() for side in (0, 1))
            return self.head(first, second).float()
        return self.head(self.model.pool(*passes).reshape(len(batch), -1)).float()

    def _encode(self, batch: StatementBatch) -> Encoded:
        """All pictures, those of a record under each other: S B rows."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image = self.model.encode_image(pixels.flatten(0, 1) if pixels.dim() == 5 else pixels)
        if not self.config.picture_types:
            return image
        widths = {x_BND.shape[2] for x_BND in (image.hidden_BLD, *image.levels)}
        if widths != {self.model.width}:
            raise ValueError(f"picture_types need picture states of width {self.model.width}, not {sorted(widths)}")
        types_B1D = self.picture_types.repeat(len(batch.pixels), 1).unsqueeze(1)
        levels = tuple(level_BND + types_B1D for level_BND in image.levels)
        return replace(image, hidden_BLD=image.hidden_BLD + types_B1D, levels=levels)
