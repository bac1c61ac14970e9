"""Visual entailment (SNLI-VE): does a picture entail a hypothesis, contradict it, or leave it open?

Source: mPLUG section 5.2.5 (picture, premise and hypothesis go in; no code was released); BridgeTower
``objectives.py:443-494`` (hypothesis alone).

Shape legend: B pictures, Q hypotheses, L tokens, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from triptych.data.batches import Tokens
from triptych.data.fields import Row, identifier, text
from triptych.data.lists import ENTAILMENT, entailment_label
from triptych.data.samples import BrokenSample, Record
from triptych.models.heads import ClassifierHead
from triptych.models.protocol import Part
from triptych.objectives.classification import class_indices, classification_loss
from triptych.tasks.base import ItemBatch, ItemTask, Report, mean_credits, most_common
from triptych.tasks.nested import read_nested


@dataclass(frozen=True)
class EntailmentConfig:
    """How entailment is judged.

    Attributes:
        premise: put the premise, a caption of the picture, before the hypothesis (mPLUG); by default the picture is
            the only premise (BridgeTower, ALBEF).
        per_picture: hypotheses of a picture in one step, for which it is encoded once.
        head_scale, head_dropout: of the classifier.
    """

    premise: bool = False
    per_picture: int = 1
    head_scale: float = 2.0
    head_dropout: float = 0.0


@dataclass(frozen=True)
class Hypothesis:
    """One hypothesis as the model reads it; ``label`` indexes :data:`ENTAILMENT`, or is None in a test set."""

    name: str
    text: str
    label: int | None


@dataclass(frozen=True)
class ReadHypotheses:
    """The hypotheses of a record (see ``docs/tasks.md``)."""

    separator: str
    premise: bool

    def __call__(self, record: Record) -> list[Hypothesis]:
        found = read_nested(record, "entailment", "hypothesis", partial(self._hypothesis, record.key))
        if not found:
            raise BrokenSample(record.key, "it has no hypothesis")
        return found

    def _hypothesis(self, key: str, number: int, row: Row) -> Hypothesis:
        name = f"{key}#{number}" if row.get("identifier") is None else str(identifier(row, "identifier"))
        label = None if row.get("label") is None else ENTAILMENT.index(entailment_label(row, "label"))
        return Hypothesis(name, self._text(row), label)

    def _text(self, row: Row) -> str:
        hypothesis = text(row, "hypothesis")
        if not self.premise:
            return hypothesis
        if not row.get("premise"):
            raise ValueError("it has no premise: judge it with premise=False")
        return f"{text(row, 'premise')} {self.separator} {hypothesis}"


@dataclass(frozen=True)
class EntailmentBatch(ItemBatch):
    """Pictures and hypotheses.

    Attributes:
        hypothesis: ``[CLS] hypothesis``.
        label_Q: index into :data:`ENTAILMENT`.
    """

    hypothesis: Tokens
    label_Q: Tensor


class Entailment(ItemTask[Hypothesis, EntailmentBatch]):
    """Judges hypotheses about pictures."""

    name: ClassVar[str] = "entailment"
    metric: ClassVar[str] = "accuracy"
    config_type: ClassVar[type[Any]] = EntailmentConfig
    uses: ClassVar[tuple[Part, ...]] = ("image", "text", "fusion", "pooled")
    config: EntailmentConfig

    def build(self) -> None:
        self.head = ClassifierHead(
            self.model.pooled_width, len(ENTAILMENT), scale=self.config.head_scale, dropout=self.config.head_dropout
        )

    def items(self) -> Callable[[Record], Sequence[Hypothesis]]:
        return ReadHypotheses(self.tokenizer.special.eos, self.config.premise)

    def batch(
        self, pixels: Tensor, picture_Q: Tensor, items: Sequence[Hypothesis], *, max_tokens: int
    ) -> EntailmentBatch:
        tokens = self.tokens([item.text for item in items], max_tokens)
        return EntailmentBatch(pixels, picture_Q, tokens, class_indices(item.label for item in items))

    def forward(self, batch: EntailmentBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Mean cross-entropy of the labels."""
        return {"entailment": classification_loss(self._logits(batch), batch.label_Q)}

    @torch.no_grad()
    def predict(self, batch: EntailmentBatch) -> list[str]:
        """A label for each hypothesis."""
        return [ENTAILMENT[index] for index in self._logits(batch).argmax(1).tolist()]

    def report(self, items: Sequence[Hypothesis], predictions: Sequence[Any]) -> Report:
        """Accuracy in percent, of all and of the hypotheses of each label."""
        results = [{"id": item.name, "label": label} for item, label in zip(items, predictions, strict=True)]
        judged = [
            (ENTAILMENT[item.label], float(ENTAILMENT[item.label] == label))
            for item, label in zip(items, predictions, strict=True)
            if item.label is not None
        ]
        return Report(mean_credits(judged, "accuracy"), results, [credit for _, credit in judged])

    def commonest(self, seen: Sequence[Hypothesis]) -> Callable[[Hypothesis], str]:
        label = most_common(item.label for item in seen)
        return lambda item: ENTAILMENT[label]

    def _logits(self, batch: EntailmentBatch) -> Tensor:
        return self.head(self.pool(batch, batch.hypothesis)).float()
