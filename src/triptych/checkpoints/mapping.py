"""From official tensor names to ours: a declared list of rules, and an exact report of what each did.

A :class:`NameMap` says where each of our tensors comes from. :func:`convert_tensors` applies it and accounts for every
tensor of the file and every tensor of the model: mapped, dropped on purpose, missing or unexpected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.reading import Tensors, same_tensor
from triptych.models.vision import resize_positions

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Rule:
    """Computes our tensors ``targets`` from the official ``sources``.

    ``unused`` says which part of the source is left out on purpose, and why.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    compute: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    unused: str = ""


def rename(target: str, source: str) -> Rule:
    """The same tensor under another name."""
    return Rule((target,), (source,), lambda tensors: tensors)


def linear(target: str, source: str) -> list[Rule]:
    """Weight and bias of a linear layer or of a norm."""
    return [rename(f"{target}.{part}", f"{source}.{part}") for part in ("weight", "bias")]


def concatenate(target: str, *sources: str) -> Rule:
    """Several tensors, one below the other."""
    return Rule((target,), sources, lambda tensors: [torch.cat(list(tensors))])


def stack(target: str, *sources: str) -> Rule:
    """Several equal tensors as one, along a new first dimension."""
    return Rule((target,), sources, lambda tensors: [torch.stack(list(tensors))])


def split(source: str, *targets: tuple[str, int]) -> Rule:
    """Cut a tensor along its rows into (target, share) pieces: shares 1 and 2 are a third and two thirds."""
    shares = [share for _, share in targets]

    def cut(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        unit = len(tensors[0]) // sum(shares)
        return torch.split(tensors[0], [unit * share for share in shares])

    return Rule(tuple(target for target, _ in targets), (source,), cut)


def row(target: str, source: str, index: int, reason: str) -> Rule:
    """One row of a table; ``reason`` says why the others are not needed."""
    return Rule((target,), (source,), lambda tensors: [tensors[0][index]], f"all rows but {index}: {reason}")


def positions(target: str, source: str, side: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Rule:
    """A position table (class token first), interpolated where its grid is not ``side`` x ``side`` patches."""
    return Rule((target,), (source,), lambda tensors: [resize_positions(tensors[0], (side, side), mode)])


@dataclass(frozen=True)
class Drop:
    """Official names (a glob) that are left out on purpose."""

    glob: str
    reason: str


@dataclass(frozen=True)
class Tie:
    """An official tensor that is a second name of another one, which is verified."""

    copy: str
    original: str


@dataclass
class NameMap:
    """Where every tensor of a model comes from."""

    rules: list[Rule] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)

    def add(self, *rules: Rule | Iterable[Rule]) -> None:
        """Append single rules and lists of them."""
        for rule in rules:
            self.rules.extend([rule] if isinstance(rule, Rule) else rule)

    def drop(self, reason: str, *globs: str) -> None:
        """Leave these official names out, for this reason."""
        self.drops.extend(Drop(glob, reason) for glob in globs)


@dataclass(frozen=True)
class Mapped:
    """One of our tensors and the official ones it came from."""

    name: str
    shape: Shape
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Dropped:
    """An official tensor, or a part of one, that was left out on purpose."""

    name: str
    shape: Shape
    reason: str


@dataclass(frozen=True)
class Entry:
    """A missing (our name) or unexpected (official name) tensor."""

    name: str
    shape: Shape


@dataclass
class Report:
    """What a conversion did with every tensor.

    ``missing`` tensors kept their initial values and ``unexpected`` ones were ignored: both only where the caller named
    them. ``notes`` tell what was assumed or changed.
    """

    mapped: list[Mapped] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    missing: list[Entry] = field(default_factory=list)
    unexpected: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Append another report."""
        self.mapped += other.mapped
        self.dropped += other.dropped
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.notes += other.notes

    def to_json(self) -> str:
        """All of it, as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{len(self.mapped)} tensors mapped"]
        if self.dropped:
            lines.append(f"{len(self.dropped)} dropped on purpose:")
            by_reason = sorted(self.dropped, key=lambda dropped: dropped.reason)
            for reason, group in groupby(by_reason, key=lambda dropped: dropped.reason):
                names = [dropped.name for dropped in group]
                lines.append(f"  {reason}: {_few(names)}")
        if self.missing:
            lines.append(f"{len(self.missing)} missing, left at their initial values:")
            lines += [f"  {entry.name} {list(entry.shape)}" for entry in self.missing]
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} unexpected, ignored:")
            lines += [f"  {entry.name} {list(entry.shape)}" for entry in self.unexpected]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def convert_tensors(
    tensors: Tensors,
    names: NameMap,
    expected: Shapes,
    source: str | Path,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    hint: str = "",
) -> tuple[Tensors, Report]:
    """Apply a name map to the tensors of a file.

    Args:
        tensors: by their official names.
        expected: name and shape of every tensor of our model.
        source: the file, for messages.
        allow_missing: globs of our names that the file need not provide.
        allow_unexpected: globs of official names to ignore.
        hint: what the file looks like, for the message about missing tensors.

    Returns:
        Our tensors, float32, and the report.

    Raises:
        CheckpointError: missing or unexpected tensors that were not allowed, other shapes than the model's, tied
            tensors that differ.
    """
    report, state = Report(), Tensors()
    used: set[str] = set()
    casts: set[str] = set()
    for rule in names.rules:
        if any(name not in tensors for name in rule.sources):
            continue
        used.update(rule.sources)
        casts.update(str(tensors[name].dtype) for name in rule.sources if tensors[name].dtype != torch.float32)
        for target, tensor in zip(rule.targets, _compute(rule, tensors, source), strict=True):
            assert target in expected, f"{target} is mapped but not part of the model"
            assert target not in state, f"{target} is mapped twice"
            _check_shape(target, tensor, rule, tensors, expected, source)
            state[target] = tensor
            report.mapped.append(Mapped(target, tuple(tensor.shape), rule.sources))
        if rule.unused:
            left = rule.sources[0]
            report.dropped.append(Dropped(left, tuple(tensors[left].shape), rule.unused))
    if casts:
        report.notes.append(f"{', '.join(sorted(casts)).replace('torch.', '')} cast to float32")

    _check_ties(tensors, names.ties, used, report, source)
    for name, tensor in tensors.items():
        if name in used:
            continue
        drop = next((drop for drop in names.drops if fnmatchcase(name, drop.glob)), None)
        if drop is not None:
            report.dropped.append(Dropped(name, tuple(tensor.shape), drop.reason))
        else:
            report.unexpected.append(Entry(name, tuple(tensor.shape)))
    report.missing = [Entry(name, shape) for name, shape in expected.items() if name not in state]

    _refuse_missing(report.missing, allow_missing, names, tensors, source, hint)
    _refuse_unexpected(report.unexpected, allow_unexpected, source)
    return state, report


def _compute(rule: Rule, tensors: Tensors, source: str | Path) -> list[Tensor]:
    inputs = [tensors[name] for name in rule.sources]
    for name, tensor in zip(rule.sources, inputs, strict=True):
        if not tensor.is_floating_point():
            raise CheckpointError(source, f"{name} holds {tensor.dtype}, not floating-point weights")
    try:
        # A copy of its own for each: views of one storage cannot be saved side by side.
        return [tensor.float().clone().contiguous() for tensor in rule.compute(inputs)]
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in rule.sources)
        raise CheckpointError(source, f"cannot make {rule.targets[0]} from {shapes}: {error}") from error


def _check_shape(
    target: str, tensor: Tensor, rule: Rule, tensors: Tensors, expected: Shapes, source: str | Path
) -> None:
    if tuple(tensor.shape) == expected[target]:
        return
    origin = ", ".join(f"{name} {list(tensors[name].shape)}" for name in rule.sources)
    raise CheckpointError(
        source,
        f"{target} is {list(tensor.shape)} in the file ({origin}) but {list(expected[target])} in the model: the "
        "file is of another size, or damaged",
    )


def _check_ties(tensors: Tensors, ties: Sequence[Tie], used: set[str], report: Report, source: str | Path) -> None:
    for tie in ties:
        if tie.copy not in tensors or tie.copy in used or tie.original not in tensors:
            continue
        if not same_tensor(tensors[tie.copy], tensors[tie.original]):
            raise CheckpointError(
                source,
                f"{tie.copy} should be the same tensor as {tie.original} but differs: the file was not written by the "
                "official code",
            )
        used.add(tie.copy)
        report.dropped.append(Dropped(tie.copy, tuple(tensors[tie.copy].shape), "tied, verified equal to its original"))


def _refuse_unexpected(entries: Sequence[Entry], allowed: Sequence[str], source: str | Path) -> None:
    refused = [entry for entry in entries if not _matches(entry.name, allowed)]
    if refused:
        raise CheckpointError(
            source,
            f"{len(refused)} tensors have no place in the model: {_entries(refused)}. If they can be ignored, "
            f"allow them: --allow-unexpected {_globs(refused)}",
        )


def _refuse_missing(
    entries: Sequence[Entry], allowed: Sequence[str], names: NameMap, tensors: Tensors, source: str | Path, hint: str
) -> None:
    refused = [entry for entry in entries if not _matches(entry.name, allowed)]
    if refused:
        first = refused[0].name
        rule = next((rule for rule in names.rules if first in rule.targets), None)
        absent = [name for name in rule.sources if name not in tensors] if rule else []
        origin = f" ({first} would come from {_few(absent)})" if absent else ""
        about = f". It looks like {hint}" if hint else ""
        raise CheckpointError(
            source,
            f"{len(refused)} tensors of the model are not in the file: {_entries(refused)}{origin}{about}. If they may "
            f"keep their initial values, allow it: --allow-missing {_globs(refused)}",
        )


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _entries(entries: Sequence[Entry], shown: int = 6) -> str:
    return _few([f"{entry.name} {list(entry.shape)}" for entry in entries], shown)


def _globs(entries: Sequence[Entry]) -> str:
    """The flags' values that would allow these entries: one glob for each part of the model."""
    parts = dict.fromkeys(f"'{entry.name.split('.')[0]}.*'" if "." in entry.name else entry.name for entry in entries)
    return " ".join(parts)


def _few(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
