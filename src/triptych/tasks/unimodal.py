"""What tasks on one encoder share: a head on its pooled states, labels, and the linear probe of a frozen encoder.

Source: microsoft/BridgeTower ``run_cifar.py`` and ``run_glue.py``, which check what each encoder can do by itself after
vision-language pre-training. Their linear classifier of pictures is never trained (its parameters are not given to the
optimiser); ours is.

Shape legend: B batch, L tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from triptych.data.samples import BrokenSample, Record
from triptych.models.heads import ClassifierHead
from triptych.models.layers import init_weights
from triptych.models.protocol import Encoded, Part
from triptych.tasks.base import Task

Pooling = Literal["first", "mean"]
Head = Literal["linear", "hidden"]


@dataclass(frozen=True)
class UnimodalConfig:
    """How the states of one encoder are classified.

    Attributes:
        labels: the classes. Empty: all that the training data have, numbers by size and texts by the alphabet.
        pooling: what the head reads: the ``first`` token (BridgeTower, BERT), or the ``mean`` of all.
        linear_probe: train the head alone, on an encoder that stays as it is.
        head: one ``linear`` layer; or one with a ``hidden`` layer (:class:`triptych.models.heads.ClassifierHead`).
        head_scale, head_dropout: of a head with a hidden layer.
    """

    labels: tuple[str, ...] = ()
    pooling: Pooling = "first"
    linear_probe: bool = False
    head: Head = "linear"
    head_scale: float = 1.0
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, not {self.pooling!r}")
        if self.head not in get_args(Head):
            raise ValueError(f"head must be one of {', '.join(get_args(Head))}, not {self.head!r}")
        if self.linear_probe and self.head != "linear":
            raise ValueError("a linear probe has a linear head: give head='linear'")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"a label occurs twice among {', '.join(self.labels)}")

    def completed(self, records: Iterable[Record]) -> Self:
        """With the labels of the training data, where none are given."""
        return self if self.labels else replace(self, labels=collect_labels(records))


def collect_labels(records: Iterable[Record]) -> tuple[str, ...]:
    """The different labels of some records, numbers by size and texts by the alphabet; unusable ones are left out.

    Raises:
        ValueError: fewer than two.
    """
    found: set[str] = set()
    reason = "no record has a field 'label'"
    for record in records:
        try:
            label = _label(record)
        except BrokenSample as error:
            reason = str(error)
            continue
        found |= set() if label is None else {label}
    if len(found) < 2:
        what = f"only the label {found.pop()!r}" if found else f"no labels: {reason}"
        raise ValueError(f"the training data have {what}; classes must be two at least")
    with suppress(ValueError):
        return tuple(sorted(sorted(found), key=int))
    return tuple(sorted(found))


def class_of(record: Record, labels: Sequence[str]) -> int | None:
    """The index of the record's label among ``labels``; None if it has none.

    Raises:
        BrokenSample: its label is another.
    """
    label = _label(record)
    if label is not None and label not in labels:
        known = ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
        raise BrokenSample(record.key, f"its label must be one of {known}, not {label[:60]!r}")
    return None if label is None else labels.index(label)


def _label(record: Record) -> str | None:
    label = record.extra.get("label")
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise BrokenSample(record.key, f"its label must be a text or a whole number, not {str(label)[:60]!r}")
    return str(label)


def pool(encoded: Encoded, pooling: Pooling) -> Tensor:
    """``[B, D]``: token 0, or the mean of the real tokens. Frames of a clip are averaged first."""
    encoded = encoded.mean_frame()
    if pooling == "first":
        return encoded.hidden_BLD[:, 0]
    real_BL1 = encoded.real_BL().unsqueeze(2)
    return encoded.hidden_BLD.masked_fill(~real_BL1, 0).sum(1) / real_BL1.sum(1)


class UnimodalTask(Task):
    """A head on one encoder."""

    part: ClassVar[Part]
    """The encoder."""
    config: Any

    def build(self) -> None:
        self.head = self._build_head()

    @property
    def outputs(self) -> int:
        """Numbers that the head gives: one a class."""
        if len(self.config.labels) < 2:
            raise ValueError(f"{self.name} needs two labels at least: collect them from training data, or give them")
        return len(self.config.labels)

    @property
    def uses(self) -> tuple[Part, ...]:
        return () if self.config.linear_probe else (self.part,)

    @classmethod
    def complete(cls, config: Any, records: Iterable[Record]) -> Any:
        return config.completed(records)

    @abstractmethod
    def encode(self, batch: Any) -> Encoded:
        """States of the encoder."""

    def logits(self, batch: Any) -> Tensor:
        """``[B, outputs]`` in float32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.linear_probe):
            pooled_BD = pool(self.encode(batch), self.config.pooling)
        return self.head(pooled_BD).float()

    def train(self, mode: bool = True) -> Self:
        """Training mode; a probed encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.config.linear_probe:
            self.model.eval()
        return self

    def _build_head(self) -> nn.Module:
        width, config = self.model.width, self.config
        if config.head == "hidden":
            return ClassifierHead(width, self.outputs, scale=config.head_scale, dropout=config.head_dropout)
        head = nn.Linear(width, self.outputs)
        init_weights(head, width)
        return head
