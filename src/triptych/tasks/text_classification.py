"""Classification of texts and of pairs of them with a model's text encoder alone: GLUE's tasks, or any labels.

Source: microsoft/BridgeTower ``run_glue.py``; GLUE (Wang et al. 2018, arXiv 1804.07461) for the scores.

Shape legend: B texts or pairs, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import Movable, Tokens
from triptych.data.loader import read_once
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import Source
from triptych.data.tokenizers import ROBERTA, Tokenizer
from triptych.data.transforms import Transform
from triptych.metrics.classification import accuracy, f1, matthews, pearson, spearman
from triptych.models.protocol import Encoded, Part
from triptych.objectives.classification import class_indices, classification_loss
from triptych.objectives.distributed import mean_over_all
from triptych.progress import counted
from triptych.tasks.base import Pipeline, Report, at_most
from triptych.tasks.unimodal import UnimodalConfig, UnimodalTask, class_of

Kind = Literal["classify", "regress"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
_OF_NUMBERS = ("pearson", "spearman")


@dataclass(frozen=True)
class TextClassificationConfig(UnimodalConfig):
    """How texts are classified.

    Attributes:
        kind: ``classify``; or ``regress``, where labels are numbers (STS-B).
        score: the metric that "score" is, by which the weights of a run are chosen. In BridgeTower's code matthews for
            CoLA, accuracy for SST-2, QNLI, RTE and MNLI, f1 for MRPC and QQP, spearman for STS-B. ``f1`` is that of
            the second of two classes.
    """

    kind: Kind = "classify"
    score: Metric = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        fitting = [name for name in get_args(Metric) if (name in _OF_NUMBERS) == (self.kind == "regress")]
        if self.score not in fitting:
            raise ValueError(f"the score to {self.kind} by must be one of {', '.join(fitting)}, not {self.score!r}")
        if self.score == "f1" and self.labels and len(self.labels) != 2:
            raise ValueError(f"f1 is a score of two classes, not of {len(self.labels)}: {', '.join(self.labels[:10])}")


@dataclass(frozen=True)
class LabelledText:
    """One text, or a pair, as the model reads it.

    Attributes:
        index: of a submission.
        target: index of the class, or a number; None where it is only predicted.
        split: which part of the data it is of, if they say so.
    """

    index: int | str
    first: str
    second: str | None
    target: int | float | None
    split: str | None = None


@dataclass(frozen=True)
class ReadText:
    """The text, or the pair, of a record (see ``docs/tasks.md``)."""

    labels: tuple[str, ...]
    kind: Kind

    def __call__(self, record: Record) -> LabelledText:
        if record.problem is not None:
            raise BrokenSample(record.key, record.problem)
        texts = record.extra.get("text"), record.extra.get("text_pair")
        for name, text in zip(("text", "text_pair"), texts, strict=True):
            if (text is not None or name == "text") and not (isinstance(text, str) and text.strip()):
                raise BrokenSample(record.key, f"its {name!r} must be a text, not {str(text)[:60]!r}")
        target = _number(record) if self.kind == "regress" else class_of(record, self.labels)
        split = record.extra.get("split")
        index = record.extra.get("index", record.key)
        return LabelledText(index, str(texts[0]), texts[1], target, None if split is None else str(split))


def _number(record: Record) -> float | None:
    label = record.extra.get("label")
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
        raise BrokenSample(record.key, f"its label must be a number, not {str(label)[:60]!r}")
    return float(label)


@dataclass(frozen=True)
class TextBatch(Movable):
    """Texts or pairs.

    Attributes:
        text: see :func:`encode_texts`.
        target_B: index of the class (int64), or a number (float32); of what has no label -100 or NaN.
    """

    text: Tokens
    target_B: Tensor

    def __len__(self) -> int:
        return len(self.target_B)


@dataclass(frozen=True)
class TextPipeline:
    """Records to batches of texts."""

    read: Callable[[Record], LabelledText]
    batch: Callable[[Sequence[LabelledText]], TextBatch]

    def prepare(self, record: Record, seed: int) -> LabelledText:
        """Read; nothing is random."""
        return self.read(record)

    def collate(self, examples: list[LabelledText]) -> TextBatch:
        """One batch."""
        return self.batch(examples)


class TextClassification(UnimodalTask):
    """Names the class of texts, or says how alike two texts are."""

    name: ClassVar[str] = "text_classification"
    metric: ClassVar[str] = "score"
    config_type: ClassVar[type[Any]] = TextClassificationConfig
    part: ClassVar[Part] = "text"
    config: TextClassificationConfig

    @property
    def outputs(self) -> int:
        return 1 if self.config.kind == "regress" else super().outputs

    @classmethod
    def complete(cls, config: TextClassificationConfig, records: Iterable[Record]) -> TextClassificationConfig:
        return config if config.kind == "regress" else config.completed(records)

    def training_pipeline(self, transform: Transform, max_words: int, max_tokens: int) -> Pipeline:
        """Texts are cut by tokens alone, and pictures are not looked at."""
        return self._pipeline(max_tokens)

    def batch(self, items: Sequence[LabelledText], *, max_tokens: int) -> TextBatch:
        """One batch on the CPU; longer inputs are cut to ``max_tokens``, and to what the model can read."""
        tokens = encode_texts(
            self.tokenizer, [(item.first, item.second) for item in items], min(max_tokens, self.model.max_text)
        )
        if self.config.kind == "regress":
            numbers = [math.nan if item.target is None else item.target for item in items]
            return TextBatch(tokens, torch.tensor(numbers, dtype=torch.float32))
        return TextBatch(tokens, class_indices(None if item.target is None else int(item.target) for item in items))

    def encode(self, batch: TextBatch) -> Encoded:
        return self.model.text_states(self.model.encode_text(batch.text.ids_BL, batch.text.mask_BL))

    def forward(self, batch: TextBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Mean cross-entropy of the labels, or mean squared error of the numbers."""
        logits = self.logits(batch)
        if self.config.kind == "classify":
            return {self.name: classification_loss(logits, batch.target_B)}
        known_B = ~batch.target_B.isnan()
        return {self.name: mean_over_all(F.mse_loss(logits[known_B, 0], batch.target_B[known_B], reduction="none"))}

    @torch.no_grad()
    def predict(self, batch: TextBatch) -> list[Any]:
        """A label, or a number, for each text or pair."""
        logits = self.logits(batch)
        if self.config.kind == "regress":
            return [float(value) for value in logits[:, 0].tolist()]
        return [self.config.labels[index] for index in logits.argmax(1).tolist()]

    def answer(self, records: Sequence[Record]) -> list[Any]:
        """A prediction for each of some records, encoded at once."""
        pipeline = self._pipeline(self.model.max_text)
        return self.predict(pipeline.collate([pipeline.prepare(record, 0) for record in records]).to(self.device))

    def evaluate(self, source: Source, *, limit: int = 0, blank: bool = False, texts: int = 64) -> Report:
        """Predict for every text of a data set and score; ``texts`` are encoded at once.

        Raises:
            ValueError: ``blank``: there are no pictures that could be grey.
        """
        if blank:
            raise ValueError("text classification looks at no pictures: evaluate it without blank")
        pipeline = self._pipeline(self.model.max_text)
        asked: list[LabelledText] = []
        predictions: list[Any] = []
        batches = read_once(source, pipeline.prepare, list, batch_size=texts)
        for items in counted(batches, f"evaluating {self.name}", at_most(source.size, limit), len, unit="texts"):
            items = items[: limit - len(asked)] if limit else items
            predictions += self.predict(pipeline.collate(items).to(self.device))
            asked += items
            if limit and len(asked) >= limit:
                break
        return self.report(asked, predictions)

    def report(self, items: Sequence[LabelledText], predictions: Sequence[Any]) -> Report:
        """All metrics of the labelled items, times 100, and "score": that of the configuration.

        Where the items are of several splits, as MNLI's matched and mismatched, "score" is the mean of theirs, which
        are given too. Predictions are rows of a submission (:func:`triptych.data.glue.write_submission`). Numbers have
        no credits: correlation is not a mean over items.
        """
        results = [{"index": item.index, "prediction": own} for item, own in zip(items, predictions, strict=True)]
        judged: list[tuple[Any, Any]] = []
        of_split: dict[str, list[tuple[Any, Any]]] = {}
        for item, own in zip(items, predictions, strict=True):
            if item.target is not None:
                judged.append((self._expected(item.target), own))
                of_split.setdefault(item.split or "", []).append(judged[-1])
        if not judged:
            return Report({}, results)
        wanted = self.config.score
        parts = {f"{wanted}/{split}": self._metrics(pairs)[wanted] for split, pairs in sorted(of_split.items())}
        scores = {
            "score": sum(parts.values()) / len(parts),
            **self._metrics(judged),
            **(parts if len(parts) > 1 else {}),
        }
        credits = [] if self.config.kind == "regress" else [float(expected == own) for expected, own in judged]
        return Report({name: round(100 * value, 4) for name, value in scores.items()}, results, credits)

    def _metrics(self, judged: Sequence[tuple[Any, Any]]) -> dict[str, float]:
        expected, predicted = [pair[0] for pair in judged], [pair[1] for pair in judged]
        if self.config.kind == "regress":
            return {"pearson": pearson(expected, predicted), "spearman": spearman(expected, predicted)}
        found = {"accuracy": accuracy(expected, predicted), "matthews": matthews(expected, predicted)}
        if len(self.config.labels) == 2:
            found["f1"] = f1(expected, predicted, self.config.labels[1])
        return found

    def _expected(self, target: int | float) -> str | float:
        return target if self.config.kind == "regress" else self.config.labels[int(target)]

    def _pipeline(self, max_tokens: int) -> TextPipeline:
        return TextPipeline(ReadText(self.config.labels, self.config.kind), partial(self.batch, max_tokens=max_tokens))


def encode_texts(tokenizer: Tokenizer, texts: Sequence[tuple[str, str | None]], max_tokens: int) -> Tokens:
    """``[CLS] a [SEP]``, and pairs as ``[CLS] a [SEP] b [SEP]``; between RoBERTa's stand two of its ``</s>``.

    A text that is too long loses its last tokens; of a pair the longer one loses them until both fit. BERT's second
    segment is not told apart: no model of ours was trained with it.

    Raises:
        ValueError: ``max_tokens`` is too small to hold a token of each text.
    """
    between = [tokenizer.eos_id] * (2 if tokenizer.special == ROBERTA else 1)
    room = max_tokens - 2
    if room - len(between) < 2:
        raise ValueError(f"max_tokens must be at least {4 + len(between)} for pairs of texts, got {max_tokens}")
    first, second = (_ids(tokenizer, [pair[side] or "" for pair in texts]) for side in (0, 1))
    rows = []
    for (_, other), a, b in zip(texts, first, second, strict=True):
        if other is None:
            inner = a[:room]
        else:
            fitting = room - len(between)
            kept = min(len(b), max(fitting - len(a), fitting // 2))
            inner = [*a[: fitting - kept], *between, *b[:kept]]
        rows.append(torch.tensor([tokenizer.bos_id, *inner, tokenizer.eos_id]))
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
    length_B = torch.tensor([len(row) for row in rows])
    return Tokens(ids_BL, torch.arange(ids_BL.shape[1]) < length_B[:, None])


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without special ones around them."""
    ids_BL, mask_BL = tokenizer.encode_batch(texts, max_length=None, end=False)
    return [row_L[mask_L][1:].tolist() for row_L, mask_L in zip(ids_BL, mask_BL, strict=True)]
