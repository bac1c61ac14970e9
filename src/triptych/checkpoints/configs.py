"""Configuration dataclasses to JSON and back, strictly: every field there, of its type, and no others."""

from __future__ import annotations

import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from triptych.checkpoints.errors import CheckpointError

T = TypeVar("T")


def to_json(config: Any) -> dict[str, Any]:
    """Plain values of a (nested) dataclass."""
    return asdict(config)


def from_json(kind: type[T], values: Any, where: str) -> T:
    """The dataclass ``kind`` from what :func:`to_json` gave.

    Args:
        where: the file and field, for messages: ``runs/vqa/config.json: model``.

    Raises:
        CheckpointError: an unknown or missing field, a value of another type, or one that the dataclass refuses.
    """
    assert is_dataclass(kind)
    if not isinstance(values, dict):
        raise CheckpointError(where, f"must be an object, not {values!r}")
    hints = get_type_hints(kind)
    known = {spec.name: spec for spec in fields(kind)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise CheckpointError(where, f"unknown field {unknown[0]!r}; known are {', '.join(known)}")
    given: dict[str, Any] = {}
    for name, spec in known.items():
        if name in values:
            given[name] = _value(hints[name], values[name], f"{where}.{name}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise CheckpointError(where, f"field {name!r} is missing")
    try:
        return kind(**given)
    except ValueError as error:
        raise CheckpointError(where, str(error)) from error


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return from_json(hint, value, where)
    if origin in (Union, types.UnionType):
        return _optional(inner, value, where)
    if origin is Literal:
        if value not in inner or isinstance(value, bool) != any(isinstance(choice, bool) for choice in inner):
            raise CheckpointError(where, f"must be one of {', '.join(map(repr, inner))}, not {value!r}")
        return value
    if origin is tuple:
        return _tuple(inner, value, where)
    if hint is float and type(value) is int:
        return float(value)
    assert hint in (int, float, str, bool), f"{where}: no rule for {hint}"
    if type(value) is not hint:
        raise CheckpointError(where, f"must be {_NAMES[hint]}, not {value!r}")
    return value


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _optional(inner: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in inner:
        return None
    choices = [choice for choice in inner if choice is not type(None)]
    for choice in choices[:-1]:
        try:
            return _value(choice, value, where)
        except CheckpointError:
            continue
    return _value(choices[-1], value, where)


def _tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise CheckpointError(where, f"must be a list, not {value!r}")
    hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(hints) != len(value):
        raise CheckpointError(where, f"must have {len(hints)} items, not {len(value)}")
    return tuple(_value(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))
