"""A progress bar on stderr for work that takes more than a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

Batch = TypeVar("Batch")


class Advance(Protocol):
    """Called with how many units were done, by default one."""

    def __call__(self, count: int = 1, /) -> None: ...


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        # The mean so far: Rich's own speed needs several calls, and a batch may be all there is.
        elapsed = task.finished_time or task.elapsed or 0.0
        rate = task.completed / elapsed if elapsed else 0.0
        return Text(f"{rate:.{0 if rate >= 10 else 1}f} {self._unit}/s")


@contextmanager
def progress(label: str, total: int | None, *, unit: str = "images", shown: bool = True) -> Iterator[Advance]:
    """Show how far work has come, its rate and the remaining time.

    The block gets a function to call for each unit done, or for several at once. Without a ``total`` there is no
    remaining time.
    """
    if not shown:
        yield lambda count=1, /: None
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count=1, /: bar.advance(task, count)


def counted(
    batches: Iterable[Batch], label: str, total: int | None, size: Callable[[Batch], int], *, unit: str = "images"
) -> Iterator[Batch]:
    """The batches as they are, with :func:`progress` of how many units they hold."""
    with progress(label, total, unit=unit) as advance:
        for batch in batches:
            yield batch
            advance(size(batch))
