"""What a model's pictures are worth: it beside itself shown grey ones, and beside the commonest answer of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triptych.data.sources import Source
from triptych.metrics.significance import mcnemar, paired_bootstrap
from triptych.tasks.base import ItemTask, Report, Task


@dataclass(frozen=True)
class Comparison:
    """Three evaluations on the same data.

    Attributes:
        model: with its pictures.
        blind: the same model, shown a grey picture for each.
        majority: what always giving the commonest answer of the training data scores, where a task has such an answer.
        test: a paired test of the model against ``blind`` on single items, where they have credits.
    """

    metric: str
    model: Report
    blind: Report
    majority: Report | None
    test: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        majority = {} if self.majority is None else {"majority": self.majority.scores}
        scores = {"model": self.model.scores, "blind": self.blind.scores, **majority}
        return {"metric": self.metric, **scores, "model against blind": self.test}


def compare(task: Task, source: Source, training: Source | None = None, *, limit: int = 0) -> Comparison:
    """Evaluate a task with its pictures, blind, and without a model.

    Args:
        source: the data to evaluate on.
        training: what the commonest answer is taken from; without it there is no such comparison.
        limit: pictures of ``source`` to look at; 0 for all.
    """
    model = task.evaluate(source, limit=limit)
    blind = task.evaluate(source, limit=limit, blank=True)
    majority = None
    if training is not None and isinstance(task, ItemTask):
        asked = task.read_items(source, limit=limit)
        guess = task.commonest(task.known_items(training))
        majority = task.report(asked, [guess(item) for item in asked])
    return Comparison(task.metric, model, blind, majority, paired_test(model.credits, blind.credits))


def paired_test(credits: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """McNemar's exact test of items that are right or wrong, the paired bootstrap of others; nothing without items."""
    if not credits:
        return {}
    if set(credits) | set(others) <= {0.0, 1.0}:
        return {"test": "McNemar", **mcnemar(credits, others)._asdict()}
    return {"test": "paired bootstrap", **paired_bootstrap(credits, others)._asdict()}
