"""Visual question answering: generated, ranked among a list of answers, or classified.

Source: mPLUG section 4 and appendix; X-PLUG/mPLUG ``models/model_vqa_mplug.py``, ``dataset/vqa_dataset.py``. The
classifier: BridgeTower ``objectives.py:496-533``, EVE's paper.

Shape legend: B pictures, Q questions, A answers (of all questions of a batch), K classes, L tokens, V vocabulary,
D width of states, C channels, H height, W width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import Tokens
from triptych.data.fields import Row, answers_of, identifier, listed, optional_texts, text, wrong_field
from triptych.data.samples import BrokenSample, Record, pre_caption
from triptych.generation import BeamSearch, RankRule, SpecialIds, generate, rank_texts
from triptych.metrics.vqa import Rules, normalize_answer, vqa_accuracy
from triptych.models.heads import ClassifierHead
from triptych.models.protocol import Part
from triptych.objectives.distributed import mean_over_all
from triptych.tasks.base import ItemBatch, ItemTask, Report, mean_credits, most_common
from triptych.tasks.nested import read_nested

Answering = Literal["generate", "rank", "classify"]

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class VqaConfig:
    """How questions are answered.

    Attributes:
        answering: ``generate`` decodes freely (mPLUG's released inference), ``rank`` chooses among ``answers`` by the
            decoder's probability (ALBEF), ``classify`` puts a classifier on the fused state (BridgeTower, EVE). The
            first two are trained alike.
        answers: to rank, or the classes. Empty: collected from the training data, those given at least ``min_count``
            times (official: 9, which gives 3,129 on VQA v2), in the order in which they first occur.
        search: released settings: beam 5, at most 10 tokens.
        candidates: ranked answers, those with the most probable first tokens (official: 128); 0 ranks all.
        rank_rule: see :func:`triptych.generation.rank_texts`.
        ocr, objects: put the words read in the picture, and the labels of its objects, after the question (mPLUG).
        per_picture: questions of a picture in one step, for which it is encoded once.
        head_scale, head_dropout: of the classifier.
        rules: answers are compared as the official scorer of this year does it.
    """

    answering: Answering = "generate"
    answers: tuple[str, ...] = ()
    min_count: int = 9
    search: BeamSearch = field(default_factory=lambda: BeamSearch(5, 1, 10))
    candidates: int = 128
    rank_rule: RankRule = "chain"
    ocr: bool = False
    objects: bool = False
    per_picture: int = 1
    head_scale: float = 2.0
    head_dropout: float = 0.0
    rules: Rules = "2021"

    def __post_init__(self) -> None:
        if self.answering not in get_args(Answering):
            raise ValueError(f"answering must be one of {', '.join(get_args(Answering))}, not {self.answering!r}")

    def completed(self, records: Iterable[Record]) -> VqaConfig:
        """With the list of answers that training data give, where one is needed and there is none.

        Answers that the scorer takes for the same ("2" and "two") are one, in the spelling that is given most: where
        all humans agree the scorer compares letter by letter.
        """
        if self.answers or self.answering == "generate":
            return self
        spellings: dict[str, Counter[str]] = {}
        for record in records:
            for given in _known_answers(record):
                answer = Counter(given).most_common(1)[0][0]
                spellings.setdefault(normalize_answer(answer), Counter())[answer] += 1
        found = (own.most_common(1)[0][0] for own in spellings.values() if own.total() >= self.min_count)
        answers = tuple(found)
        if not answers:
            raise ValueError(f"no answer occurs {self.min_count} times in the training data: lower min_count")
        return replace(self, answers=answers)


@dataclass(frozen=True)
class Question:
    """One question as the model reads it.

    Attributes:
        text: with the words and labels of the picture, where they are used.
        answers: of the humans asked; empty in test sets.
        weights: of the answers in training.
        scores: how right each answer is, 0 to 1, where the source says it (BridgeTower's tables).
    """

    question_id: int | str
    text: str
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    answer_type: str | None = None
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ReadQuestions:
    """The questions of a record (see ``docs/data.md``)."""

    separator: str
    ocr: bool
    objects: bool

    def __call__(self, record: Record) -> list[Question]:
        found = _questions(record)
        if not found:
            raise BrokenSample(record.key, "it has no question")
        beside = []
        if self.ocr:
            beside.append(pre_caption(str(record.extra.get("ocr", ""))))
        if self.objects:
            beside.append(str(record.extra.get("object_labels", "")))
        return [replace(item, text=f" {self.separator} ".join([item.text, *beside])) for item in found]


def _questions(record: Record) -> list[Question]:
    """The questions of a record, without the words and labels of its picture; BrokenSample where a field is wrong."""
    return read_nested(record, "questions", "question", partial(_question, record.image_id))


def _question(image: str, number: int, row: Row) -> Question:
    """Weights are the official share of the humans, unless the source says others."""
    name = f"{image}#{number}" if row.get("question_id") is None else identifier(row, "question_id")
    given = row.get("answers") if row.get("answers") is not None else row.get("answer")
    answers = () if given is None or given == [] else tuple(answers_of(row, "answers", "answer"))
    scores = _numbers(row, "scores", len(answers))
    weights = _numbers(row, "answer_weights", len(answers))
    if scores and not any(scores):
        raise wrong_field("scores", "above 0 for one answer at least", row["scores"])
    if weights is None:
        shares = scores or (1.0,) * len(answers)
        weights = tuple(share / sum(shares) for share in shares)
    kinds = optional_texts(row, "answer_type", "kind")
    return Question(name, text(row, "question"), answers, weights, kinds.get("answer_type", kinds.get("kind")), scores)


def _numbers(row: Row, name: str, count: int) -> tuple[float, ...] | None:
    """A number for each answer, if the field is there."""
    if row.get(name) is None:
        return None
    values = listed(row, name)
    usable = [isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= _LARGEST for one in values]
    if len(values) != count or not all(usable):
        raise wrong_field(name, f"{count} numbers from 0 on, one for each answer", values)
    return tuple(values)


def _known_answers(record: Record) -> list[tuple[str, ...]]:
    """The answers of each question that has some; none of a broken record, which training counts."""
    try:
        return [item.answers for item in _questions(record) if item.answers]
    except BrokenSample:
        return []


@dataclass(frozen=True)
class VqaBatch(ItemBatch):
    """Pictures and questions.

    Attributes:
        question: ``[CLS] question``.
        answer: ``[CLS] answer [SEP]`` of each different answer; empty rows where the task does not decode.
        question_A, weight_A: which question an answer belongs to, and what it counts.
        target_QK: how right each class is, 0 to 1.
    """

    question: Tokens
    answer: Tokens
    question_A: Tensor
    weight_A: Tensor
    target_QK: Tensor


class VisualQuestionAnswering(ItemTask[Question, VqaBatch]):
    """Answers questions about pictures."""

    name: ClassVar[str] = "vqa"
    metric: ClassVar[str] = "overall"
    config_type: ClassVar[type[Any]] = VqaConfig
    config: VqaConfig

    def build(self) -> None:
        if self.config.answering == "classify":
            self.head = ClassifierHead(
                self.model.pooled_width,
                len(self.config.answers),
                scale=self.config.head_scale,
                dropout=self.config.head_dropout,
            )
        elif self.model.decoder is None:
            raise ValueError(f"this {self.model.model_type} has no decoder: answer with answering='classify'")
        if self.config.answering != "generate" and not self.config.answers:
            raise ValueError(f"answering={self.config.answering!r} needs a list of answers")
        self._class_of = {normalize_answer(answer): index for index, answer in enumerate(self.config.answers)}
        self._special = SpecialIds(self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id)

    @property
    def uses(self) -> tuple[Part, ...]:
        shared: tuple[Part, ...] = ("image", "text", "fusion")
        return (*shared, "pooled" if self.config.answering == "classify" else "decoder")

    @classmethod
    def complete(cls, config: VqaConfig, records: Iterable[Record]) -> VqaConfig:
        return config.completed(records)

    def items(self) -> Callable[[Record], Sequence[Question]]:
        return ReadQuestions(self.tokenizer.special.eos, self.config.ocr, self.config.objects)

    def batch(self, pixels: Tensor, picture_Q: Tensor, items: Sequence[Question], *, max_tokens: int) -> VqaBatch:
        question = self.tokens([item.text for item in items], max_tokens)
        weights = [(row, answer, weight) for row, item in enumerate(items) for answer, weight in _merged(item).items()]
        rows, texts, values = zip(*weights, strict=True) if weights else ((), (), ())
        return VqaBatch(
            pixels,
            picture_Q,
            question,
            Tokens(*self.tokenizer.encode_batch(texts, max_length=None, end=True)),
            torch.tensor(rows, dtype=torch.long),
            torch.tensor(values, dtype=torch.float32),
            torch.stack([self._targets(item) for item in items]),
        )

    def forward(self, batch: VqaBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Generation: each answer's summed cross-entropy times its weight, averaged over questions (official).

        Classification: binary cross-entropy of every class with its soft score, summed over classes.
        """
        if self.config.answering == "classify":
            logits_QK = self.head(self.pool(batch, batch.question)).float()
            loss_QK = F.binary_cross_entropy_with_logits(logits_QK, batch.target_QK, reduction="none")
            return {"vqa": mean_over_all(loss_QK.sum(1))}
        decoder = self.model.decoder
        assert decoder is not None
        fused = self.fuse(batch, batch.question)
        memory = [own.select(batch.question_A) for own in decoder.remember(fused.states())]
        hidden_ALD = decoder(batch.answer.ids_BL[:, :-1], memory)
        next_AL = batch.answer.mask_BL[:, 1:]
        logits_XV = decoder.logits(hidden_ALD[next_AL])
        loss_X = F.cross_entropy(logits_XV.float(), batch.answer.ids_BL[:, 1:][next_AL], reduction="none")
        answer_X = next_AL.nonzero()[:, 0]
        loss_Q = torch.zeros(len(batch), device=loss_X.device)
        loss_Q = loss_Q.index_add(0, batch.question_A[answer_X], loss_X * batch.weight_A[answer_X])
        return {"vqa": mean_over_all(loss_Q)}

    @torch.no_grad()
    def predict(self, batch: VqaBatch) -> list[str]:
        """An answer for each question."""
        if self.config.answering == "classify":
            best_Q = self.head(self.pool(batch, batch.question)).argmax(1)
            return [self.config.answers[index] for index in best_Q.tolist()]
        fused = self.fuse(batch, batch.question)
        decoder = self.model.decoder
        assert decoder is not None
        if self.config.answering == "generate":
            found = generate(decoder, fused.states(), self.config.search, self._special)
            return [self.tokenizer.decode(hypotheses[0].ids) for hypotheses in found]
        texts = Tokens(*self.tokenizer.encode_batch(self.config.answers, max_length=None, end=True))
        best_QK, _ = rank_texts(
            decoder, fused.states(), texts, candidates=self.config.candidates, rule=self.config.rank_rule
        )
        return [self.config.answers[index] for index in best_QK[:, 0].tolist()]

    def report(self, items: Sequence[Question], predictions: Sequence[Any]) -> Report:
        """Soft accuracy in percent, overall and by type of answer; questions without answers are only answered."""
        results = [
            {"question_id": item.question_id, "answer": answer} for item, answer in zip(items, predictions, strict=True)
        ]
        judged = [
            (item.answer_type, vqa_accuracy(item.answers, answer, self.config.rules))
            for item, answer in zip(items, predictions, strict=True)
            if item.answers
        ]
        return Report(mean_credits(judged, "overall"), results, [credit for _, credit in judged])

    def commonest(self, seen: Sequence[Question]) -> Callable[[Question], str]:
        given = (Counter(item.answers).most_common(1)[0][0] for item in seen if item.answers)
        answer = most_common(map(normalize_answer, given))
        return lambda item: str(answer)

    def _targets(self, item: Question) -> Tensor:
        """Soft scores of the classes, ``[K]``: 0.3, 0.6, 0.9, 1 for 1, 2, 3, 4 humans; 1 where only one was asked."""
        target_K = torch.zeros(len(self.config.answers))
        if self.config.answering != "classify":
            return target_K
        counts = Counter(map(normalize_answer, item.answers))
        scores = {answer: 1.0 if len(item.answers) == 1 else min(1.0, 0.3 * n) for answer, n in counts.items()}
        if item.scores is not None:
            scores = dict(zip(map(normalize_answer, item.answers), item.scores, strict=True))
        for answer, score in scores.items():
            if answer in self._class_of:
                target_K[self._class_of[answer]] = score
        return target_K


def _merged(item: Question) -> dict[str, float]:
    """The different answers and the sum of their weights."""
    merged: dict[str, float] = {}
    for answer, weight in zip(item.answers, item.weights, strict=True):
        merged[answer] = merged.get(answer, 0.0) + weight
    return merged
