"""What every downstream task has: a loss to fine-tune with, and an evaluation.

Shape legend: B pictures (or clips, of F frames), Q items (questions, statements...), C channels, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from triptych.data.batches import Movable, Tokens
from triptych.data.loader import read_once, seeded
from triptych.data.pictures import show, stack
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import Source
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import FrameChoice, Preprocessing, Transform
from triptych.models.protocol import Encoded, Fused, Part, VisionLanguageModel
from triptych.progress import counted

_AT_ONCE = 32

Item = TypeVar("Item")
Batch = TypeVar("Batch", bound="ItemBatch")


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        scores: by metric, in the units of the field.
        predictions: one JSON object an item, as the task's owners want results.
        credits: what each item scored, 0 to 1, in the same order: for paired tests between two systems.
    """

    scores: dict[str, float]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    credits: list[float] = field(default_factory=list)


class Pipeline(Protocol):
    """From records to batches: ``prepare`` runs in the loader's workers, ``collate`` in the main process."""

    def prepare(self, record: Record, seed: int) -> Any: ...
    def collate(self, examples: list[Any]) -> Any: ...


class Task(nn.Module, ABC):
    """A model with a task to learn and to be judged by; a call with a batch gives its losses by name.

    Attributes:
        name: on the command line and in a checkpoint's description.
        metric: the score (larger is better) that chooses among the weights of a run.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    config_type: ClassVar[type[Any]]
    model: VisionLanguageModel
    config: Any

    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, preprocessing: Preprocessing, config: Any = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.config = self.config_type() if config is None else config
        self.build()

    def build(self) -> None:
        """Make what the task adds to the model: its head; ``config`` is set.

        Raises:
            ValueError: the model cannot do the task so.
        """

    @classmethod
    def complete(cls, config: Any, records: Iterable[Record]) -> Any:
        """The configuration with what only the training data can say, such as a list of answers."""
        return config

    def study(self, records: Iterable[Record], file: Path) -> None:
        """What training needs to know of its data and no checkpoint holds; found once and kept in ``file``."""

    @property
    def kept(self) -> nn.Module:
        """What training averages, evaluates and saves."""
        return self

    @property
    @abstractmethod
    def uses(self) -> tuple[Part, ...]:
        """The parts of the model that run: training freezes the others, which would never get a gradient."""

    def freeze_rest(self) -> None:
        """Freeze what the task never runs. Training calls it: a task also evaluates models that are being trained."""
        self.model.train_only(*self.uses)

    @abstractmethod
    def forward(self, batch: Any, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Losses by name; their sum is what is minimised."""

    @abstractmethod
    def training_pipeline(self, transform: Transform, max_words: int, max_tokens: int) -> Pipeline:
        """How training reads records; longer texts are cut."""

    @abstractmethod
    def evaluate(self, source: Source, *, limit: int = 0, blank: bool = False) -> Report:
        """Predict for every item of a data set and score.

        Args:
            limit: stop after so many pictures; 0 for all.
            blank: show the model a grey picture instead of each, to see what it answers without looking.
        """

    def own_state(self) -> dict[str, Tensor]:
        """The parameters of the task itself: those of its head."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`own_state`.

        Raises:
            ValueError: a head of another shape, or none.
        """
        own = self.own_state()
        if state.keys() != own.keys():
            raise ValueError(f"the checkpoint has not the head that the task {self.name!r} needs: fine-tune it first")
        for name, value in state.items():
            if value.shape != own[name].shape:
                shapes = f"{name} is {list(value.shape)} and not {list(own[name].shape)}"
                raise ValueError(f"the checkpoint's head does not fit the task {self.name!r}: {shapes}")
        self.load_state_dict(state, strict=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Shown(Generic[Item]):
    """A picture as uint8 pixels, ``[C, H, W]``, or a clip, ``[F, C, H, W]``, with what is asked of it."""

    pixels: Tensor
    items: tuple[Item, ...]


@dataclass(frozen=True)
class ItemBatch(Movable):
    """Pictures ``[B, C, H, W]`` or clips ``[B, F, C, H, W]``, and items: item q is about picture ``picture_Q[q]``."""

    pixels: Tensor
    picture_Q: Tensor

    def __len__(self) -> int:
        return len(self.picture_Q)


@dataclass(frozen=True)
class ItemPipeline(Generic[Item]):
    """Pictures with some of their items.

    Args:
        items: what a record has to ask; raises BrokenSample where that is nothing.
        batch: makes a batch of ``(pixels, picture_Q, items)``.
        per_picture: so many of a picture's items are drawn each time; 0 takes all. The picture is encoded once for
            them.
    """

    items: Callable[[Record], Sequence[Item]]
    transform: Transform
    batch: Callable[[Tensor, Tensor, Sequence[Item]], Any]
    per_picture: int = 1
    frames: FrameChoice = field(default_factory=FrameChoice)

    def prepare(self, record: Record, seed: int) -> Shown[Item]:
        """Decode, transform and draw items."""
        items = list(self.items(record))
        with seeded(seed):
            pixels = show(record, self.transform, self.frames)
            items = draw(items, self.per_picture)
        return Shown(pixels, tuple(items))

    def collate(self, examples: list[Shown[Item]]) -> Any:
        """One batch."""
        return self.batch(*gather(examples))


def draw(items: list[Item], count: int) -> list[Item]:
    """So many of a picture's items in a random order; all, as they are, for 0 or where there are no more."""
    if not 0 < count < len(items):
        return items
    return [items[index] for index in torch.randperm(len(items))[:count].tolist()]


def gather(examples: Sequence[Shown[Item]]) -> tuple[Tensor, Tensor, list[Item]]:
    """Pixels of all pictures, which picture each item is about, and the items."""
    counts_B = torch.tensor([len(example.items) for example in examples])
    picture_Q = torch.arange(len(examples)).repeat_interleave(counts_B)
    items = [item for example in examples for item in example.items]
    return stack([example.pixels for example in examples]), picture_Q, items


class ItemTask(Task, Generic[Item, Batch]):
    """A task that asks one or more things of each picture and predicts something for each."""

    @abstractmethod
    def items(self) -> Callable[[Record], Sequence[Item]]:
        """What reads a record's items; it goes to worker processes, so it holds no model."""

    @abstractmethod
    def batch(self, pixels: Tensor, picture_Q: Tensor, items: Sequence[Item], *, max_tokens: int) -> Batch:
        """One batch on the CPU, with inputs cut to ``max_tokens``."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[Any]:
        """A prediction for each item, in the order of the batch."""

    @abstractmethod
    def report(self, items: Sequence[Item], predictions: Sequence[Any]) -> Report:
        """Score predictions."""

    @abstractmethod
    def commonest(self, seen: Sequence[Item]) -> Callable[[Item], Any]:
        """What predicts, without a model, the commonest answer of items of the training data.

        Raises:
            ValueError: none of them has an answer.
        """

    def known_items(self, source: Source) -> list[Item]:
        """All items of training data, for :meth:`commonest`: pictures are not looked at, unusable records left out."""
        found: list[Item] = []
        read = self.items()
        for record in source:
            with suppress(BrokenSample):
                found += read(record)
        return found

    def read_items(self, source: Source, *, limit: int = 0) -> list[Item]:
        """The items of a data set, or of so many of its pictures, as :meth:`evaluate` meets them."""
        pipeline = self._evaluation_pipeline()
        batches = _first(read_once(source, pipeline.prepare, list, batch_size=_AT_ONCE), limit)
        return [item for shown in batches for example in shown for item in example.items]

    def training_pipeline(self, transform: Transform, max_words: int, max_tokens: int) -> Pipeline:
        batch = partial(self.batch, max_tokens=max_tokens)
        return ItemPipeline(self.items(), transform, batch, self.config.per_picture, self.preprocessing.frames)

    def evaluate(self, source: Source, *, limit: int = 0, blank: bool = False, pictures: int = _AT_ONCE) -> Report:
        """Predict for every item of a data set and score; ``pictures`` are encoded at once."""
        pipeline = self._evaluation_pipeline()
        asked: list[Item] = []
        predictions: list[Any] = []
        batches = _first(read_once(source, pipeline.prepare, list, batch_size=pictures), limit)
        for shown in counted(batches, f"evaluating {self.name}", at_most(source.size, limit), len):
            batch = pipeline.collate(shown)
            if blank:
                batch = replace(batch, pixels=torch.full_like(batch.pixels, 128))
            predictions += self.predict(batch.to(self.device))
            asked += [item for example in shown for item in example.items]
        return self.report(asked, predictions)

    def tokens(self, texts: Sequence[str], max_tokens: int) -> Tokens:
        """Texts as the model's encoder reads them."""
        return Tokens(*self.tokenizer.encode_batch(texts, max_length=max_tokens, end=self.model.ends_texts))

    def encode_items(
        self, batch: Batch, text: Tokens, preprocessing: Preprocessing | None = None
    ) -> tuple[Encoded, Encoded, Tensor]:
        """Pictures, each once, the text of each item, and which picture an item has: what ``model.fuse`` takes.

        ``preprocessing`` says how pixels are normalised, where that is not the task's own.
        """
        image = self.model.encode_image((preprocessing or self.preprocessing).normalize(batch.pixels))
        return image, self.model.encode_text(text.ids_BL, text.mask_BL), batch.picture_Q

    def fuse(self, batch: Batch, text: Tokens, preprocessing: Preprocessing | None = None) -> Fused:
        """The text of each item with its picture."""
        return self.model.fuse(*self.encode_items(batch, text, preprocessing))

    def pool(self, batch: Batch, text: Tokens, preprocessing: Preprocessing | None = None) -> Tensor:
        """The pooled state alone, [Q, P], of what :meth:`fuse` gives: what a classifier reads."""
        return self.model.pool(*self.encode_items(batch, text, preprocessing))

    def answer(self, records: Sequence[Record]) -> list[Any]:
        """A prediction for every item of some records, encoded at once."""
        pipeline = self._evaluation_pipeline()
        batch = pipeline.collate([pipeline.prepare(record, 0) for record in records])
        return self.predict(batch.to(self.device))

    def _evaluation_pipeline(self) -> Pipeline:
        """All items of a picture, with inputs as long as the model can read."""
        batch = partial(self.batch, max_tokens=self.model.max_text)
        transform, frames = self.preprocessing.test_transform(), self.preprocessing.frames
        return ItemPipeline(self.items(), transform, batch, 0, frames)


def most_common(answers: Iterable[Any]) -> Any:
    """The commonest of some answers, the earliest of equals; those that are None do not count.

    Raises:
        ValueError: there are none.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        raise ValueError("the training data have no answers: there is no commonest one")
    return counts.most_common(1)[0][0]


def mean_credits(judged: Sequence[tuple[str | None, float]], name: str) -> dict[str, float]:
    """Mean credits in percent, to four decimals: of all, called ``name``, then of each kind; none of nothing."""
    kinds = sorted({kind for kind, _ in judged if kind is not None})
    groups = {name: [credit for _, credit in judged]}
    groups |= {kind: [credit for own, credit in judged if own == kind] for kind in kinds}
    return {key: round(100 * sum(values) / len(values), 4) for key, values in groups.items() if values}


def at_most(size: int | None, limit: int) -> int | None:
    """How many pictures an evaluation looks at, if that is known; a limit of 0 is none."""
    return min(size, limit) if size is not None and limit else size


def _first(batches: Iterator[list[Shown[Item]]], limit: int) -> Iterator[list[Shown[Item]]]:
    """The first ``limit`` pictures, or all."""
    left = limit
    for shown in batches:
        yield shown[:left] if limit else shown
        left -= len(shown)
        if limit and left <= 0:
            return
