"""A shuffling loader whose order depends on the seed alone and that resumes in the middle of an epoch.

How a sample travels:

1. `_Order` lays out an epoch: shards in windows, the records of a window permuted. It is a pure function of
   (seed, epoch, rank, world), so (epoch, window, offset) says all about the position.
2. A background thread reads the next window (encoded bytes, or references) while this one is used.
3. Chunks of records go to the worker processes, which decode: bytes are shuffled, pictures are not.
4. The chunks come back in order; the main process drops what was broken and assembles batches.

So neither the number of workers nor what is still on its way changes a batch, and resuming re-reads no more
than one window.
"""

from __future__ import annotations

import io
import logging
import multiprocessing.connection
import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import count, islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import Shard, Source

Example = TypeVar("Example")
Batch = TypeVar("Batch")
T = TypeVar("T")
K = TypeVar("K")

Prepare = Callable[[Record, int], Example]
"""(record, seed) -> example. Picklable; all its randomness comes from the seed (see `seeded`)."""

CHUNK = 8
"""Records that go to a worker at once."""
LISTED = 100
"""Skipped records that are listed; all are counted."""
LONGEST_BROKEN_RUN = 10_000
"""So many broken records in a row mean that something else is wrong."""

logger = logging.getLogger(__name__)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator for the block, and restores its state afterwards.

    Only that one, which random transforms draw from: `torch.manual_seed` would also reseed the accelerators.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def mix(*numbers: int) -> int:
    """A seed of 63 bits that depends on all the numbers and their order."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Position(NamedTuple):
    """The next record: epoch, window of the epoch, offset in the window."""

    epoch: int
    window: int
    offset: int


@dataclass(frozen=True)
class _Order:
    """What, besides the source and the epoch, determines the order."""

    seed: int
    rank: int
    world: int
    window: int
    shuffle: bool
    per_caption: bool

    def windows(self, source: Source, epoch: int) -> list[list[Shard]]:
        """The shards of this rank, in groups that are shuffled together."""
        shards = self._permute(list(source.shards), epoch, -1)
        if source.in_memory:
            return [shards]
        if self._deals(source):
            shards = shards[self.rank :: self.world]
        return [shards[start : start + self.window] for start in range(0, len(shards), self.window)]

    def read(self, source: Source, shards: list[Shard], epoch: int, window: int) -> list[Record]:
        """The records of a window in the order of this rank."""
        records = [record for shard in shards for record in shard.read()]
        if self.per_caption:
            records = [part for record in records for part in split_captions(record)]
        dealt = self._deals(source)
        # Ranks that share a window must permute it alike; others need not.
        records = self._permute(records, epoch, window, self.rank if dealt else -1)
        return records if dealt else records[self.rank :: self.world]

    def _deals(self, source: Source) -> bool:
        """Whether each rank has shards of its own; otherwise it takes every world-th record."""
        return not source.in_memory and len(source.shards) >= self.world

    def _permute(self, items: list[T], *purpose: int) -> list[T]:
        if not self.shuffle:
            return items
        order = np.random.default_rng(mix(self.seed, *purpose)).permutation(len(items))
        return [items[index] for index in order]


def split_captions(record: Record) -> list[Record]:
    """One record a caption; a record with fewer than two stands as it is."""
    if len(record.captions) < 2:
        return [record]
    return [
        replace(record, key=f"{record.key}#{index}", captions=(caption,))
        for index, caption in enumerate(record.captions)
    ]


class _Task(NamedTuple):
    record: Record
    seed: int
    epoch: int
    after: Position


class _Outcome(NamedTuple):
    """A prepared example, or the reason why there is none."""

    example: Any
    key: str
    reason: str | None
    epoch: int
    after: Position


class Loader(Generic[Example, Batch]):
    """Batches for training, for ever; see the top of the file.

    Attributes:
        epoch: the epoch of the next record.
        skipped: (key, reason) of the first `LISTED` records skipped since the loader was made.
        skipped_count: all skipped records; part of the state.
    """

    def __init__(
        self,
        source: Source,
        prepare: Prepare[Example],
        collate: Callable[[list[Example]], Batch],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        window: int = 4,
        shuffle: bool = True,
        per_caption: bool = False,
    ) -> None:
        """Makes a loader; nothing is read before the first batch.

        Args:
            source: where the records come from.
            prepare: decodes a record in a worker process; a record for which it raises BrokenSample, another
                ValueError or an OSError is skipped and replaced by the next one.
            collate: makes a batch of exactly `batch_size` examples, in the main process.
            batch_size: examples in a batch of this rank.
            seed: determines the order and the seeds that `prepare` gets.
            workers: processes that prepare; 0 prepares in this process. The batches are the same.
            rank, world: this process among those that train together. With at least `world` shards each rank
                reads its own; with fewer, all read all and keep every world-th record. A position belongs to
                its rank.
            window: shards read and shuffled together; two windows are in memory. Lists, which are in memory
                anyway, are shuffled whole.
            shuffle: False for the order of the source.
            per_caption: one sample for each caption instead of one for each picture.
        """
        if batch_size < 1 or workers < 0 or window < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size and window must be at least 1, workers at least 0 and rank in 0..world-1; got "
                f"batch_size={batch_size}, window={window}, workers={workers}, rank={rank}, world={world}"
            )
        self.source = source
        self.prepare = prepare
        self.collate = collate
        self.batch_size = batch_size
        self.workers = workers
        self.skipped: list[tuple[str, str]] = []
        self.skipped_count = 0
        self._order = _Order(seed, rank, world, window, shuffle, per_caption)
        self._position = Position(0, 0, 0)
        self._iteration = 0

    @property
    def epoch(self) -> int:
        return self._position.epoch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, and what it refers to; plain JSON values.

        Every rank has its own.
        """
        return {**self._position._asdict(), "skipped_count": self.skipped_count, "order": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; iterate anew afterwards. Batch size and workers may have changed.

        Raises:
            ValueError: the state is of a loader with another order.
        """
        settings = self._settings()
        other = [name for name in settings if state["order"].get(name) != settings[name]]
        if other:
            saved = {name: state["order"].get(name) for name in other}
            now = {name: settings[name] for name in other}
            raise ValueError(f"cannot resume the loader: it was saved with {saved} and has {now} now")
        self._position = Position(state["epoch"], state["window"], state["offset"])
        self.skipped_count = state["skipped_count"]
        self._iteration += 1

    def _settings(self) -> dict[str, int | bool]:
        return {**vars(self._order), "shards": len(self.source.shards)}

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, for ever; it ends only an earlier iteration.

        Raises:
            ValueError: an unreadable shard; or not a single usable record in a whole epoch, or among
                `LONGEST_BROKEN_RUN` in a row.
        """
        self._iteration += 1
        return self._batches(self._iteration)

    def _batches(self, iteration: int) -> Iterator[Batch]:
        examples: list[Example] = []
        fruitful = self._position.epoch - (self._position[1:] == (0, 0))
        run = 0
        tasks = _endless_tasks(self.source, self._order, self._position)
        with closing(_prepared(tasks, self.prepare, self.workers)) as outcomes:
            for outcome in outcomes:
                if iteration != self._iteration:
                    raise ValueError("this iteration is over: the loader was iterated anew or given a state")
                self._position = outcome.after
                if outcome.reason is None:
                    fruitful, run = outcome.epoch, 0
                    examples.append(outcome.example)
                else:
                    run += 1
                    self._skip(outcome.key, outcome.reason)
                if run >= LONGEST_BROKEN_RUN or outcome.epoch > fruitful + 1:
                    raise ValueError(f"no usable record among the last {run}; the last: {outcome.reason}")
                if len(examples) == self.batch_size:
                    yield self.collate(examples)
                    examples = []

    def _skip(self, key: str, reason: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < LISTED:
            self.skipped.append((key, reason))


def read_once(
    source: Source,
    prepare: Prepare[Example],
    collate: Callable[[list[Example]], Batch],
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    per_caption: bool = False,
    seed: int = 0,
) -> Iterator[Batch]:
    """Every record once, in the order of the source, for evaluation; the last batch may be short.

    Ranks take every world-th record. Skipped records are logged. Arguments as for `Loader`.

    Raises:
        ValueError: an unreadable shard, or none of the records is usable.
    """
    if batch_size < 1 or workers < 0 or not 0 <= rank < world:
        raise ValueError(f"bad batch_size={batch_size}, workers={workers}, rank={rank} or world={world}")
    examples: list[Example] = []
    found, skipped, reason = 0, 0, None
    tasks = _tasks_once(source, rank, world, per_caption, seed)
    with closing(_prepared(tasks, prepare, workers)) as outcomes:
        for outcome in outcomes:
            if outcome.reason is not None:
                logger.warning("skipped %s: %s", outcome.key, outcome.reason)
                skipped, reason = skipped + 1, f"{outcome.key}: {outcome.reason}"
                continue
            found += 1
            examples.append(outcome.example)
            if len(examples) == batch_size:
                yield collate(examples)
                examples = []
    if examples:
        yield collate(examples)
    if not found and reason is not None:
        raise ValueError(f"no usable record; the last: {reason}")
    if skipped:
        logger.warning("skipped %d of %d records", skipped, found + skipped)


def _endless_tasks(source: Source, order: _Order, start: Position) -> Generator[_Task]:
    """The records from `start` on."""
    empty = 0
    for (epoch, window, windows), records in _read_ahead(_plan(source, order, start)):
        empty = 0 if records else empty + 1
        if empty == 2 * windows:  # with one that is not empty, 2 * windows - 2 may follow each other
            raise ValueError(f"no records for rank {order.rank} of {order.world} in {source.shards[0].name}...")
        end = Position(epoch + 1, 0, 0) if window + 1 == windows else Position(epoch, window + 1, 0)
        first = start.offset if (epoch, window) == start[:2] else 0
        for offset in range(first, len(records)):
            after = end if offset + 1 == len(records) else Position(epoch, window, offset + 1)
            seed = mix(order.seed, order.rank, epoch, window, offset)
            yield _Task(records[offset], seed, epoch, after)


def _plan(
    source: Source, order: _Order, start: Position
) -> Iterator[tuple[tuple[int, int, int], Callable[[], list[Record]]]]:
    """(epoch, window, windows in the epoch) and what reads the window, from the window of `start` on."""
    for epoch in count(start.epoch):
        windows = order.windows(source, epoch)
        for window in range(start.window if epoch == start.epoch else 0, len(windows)):
            yield (epoch, window, len(windows)), partial(order.read, source, windows[window], epoch, window)


def _tasks_once(source: Source, rank: int, world: int, per_caption: bool, seed: int) -> Generator[_Task]:
    jobs = ((shard.name, shard.read) for shard in source.shards)
    records = (record for _, part in _read_ahead(jobs) for record in part)
    if per_caption:
        records = (part for record in records for part in split_captions(record))
    for index, record in islice(enumerate(records), rank, None, world):
        yield _Task(record, mix(seed, index), 0, Position(0, 0, index + 1))


def _read_ahead(jobs: Iterable[tuple[K, Callable[[], T]]]) -> Generator[tuple[K, T]]:
    """Runs the jobs in order in a thread, one ahead of what was taken."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        waiting: tuple[K, Future[T]] | None = None
        for name, job in jobs:
            following = name, pool.submit(job)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepared(tasks: Generator[_Task], prepare: Prepare[Any], workers: int) -> Generator[_Outcome]:
    """The outcomes of the tasks, in order."""
    failures: list[Exception] = []
    loader = DataLoader(
        _Preparation(prepare),
        batch_size=None,
        sampler=_chunks(tasks, failures),  # the "indices" are the records themselves
        num_workers=workers,
        collate_fn=_pack if workers else _same,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    iterator = iter(loader)
    try:
        for outcomes in iterator:
            yield from pickle.loads(outcomes) if workers else outcomes
        if failures:
            raise failures[0]
    finally:
        # Let go, the iterator would end its workers as well, but the traceback of an error keeps hold of it.
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
        tasks.close()


def _end_with_parent(worker: int) -> None:
    """In a worker: end when the training process does, even if it was killed.

    Otherwise a worker whose results nobody reads any more waits for ever to hand them over.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _chunks(tasks: Iterator[_Task], failures: list[Exception]) -> Iterator[list[_Task]]:
    """Ends at an exception and leaves it in `failures`, to be raised when what came before is used up."""
    chunk: list[_Task] = []
    try:
        for task in tasks:
            chunk.append(task)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    except Exception as error:
        failures.append(error)
    if chunk:
        yield chunk


class _Preparation(Dataset[Any]):
    def __init__(self, prepare: Prepare[Any]) -> None:
        self.prepare = prepare

    def __getitem__(self, chunk: list[_Task]) -> list[_Outcome]:
        return [self._outcome(task) for task in chunk]

    def _outcome(self, task: _Task) -> _Outcome:
        example, reason = None, task.record.problem
        if reason is None:
            try:
                example = self.prepare(task.record, task.seed)
            except BrokenSample as error:
                reason = error.reason
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                reason = f"{type(error).__name__}: {error}"
        return _Outcome(example, task.record.key, reason, task.epoch, task.after)


class _TensorPickler(pickle.Pickler):
    """Pickles tensors by value.

    By default a tensor leaves a worker as a file in shared memory: small in containers ("bus error"), and
    short of file descriptors when each example has several tensors.
    """

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and not value.requires_grad and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _pack(outcomes: list[_Outcome]) -> bytes:
    packed = io.BytesIO()
    _TensorPickler(packed, protocol=5).dump(outcomes)
    return packed.getvalue()


def _same(outcomes: list[_Outcome]) -> list[_Outcome]:
    return outcomes
