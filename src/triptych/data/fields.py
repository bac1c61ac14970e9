"""What readers of annotation files share: parsed files, checks of fields, and where pictures lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import fsspec

from triptych.data.samples import Record, read_bytes

Place = Callable[[str], str]
"""From a name in a file to a location (see `Record.image`)."""
Row = Mapping[str, Any]

_TRIED = 1000
_TRIED_FAR = 5
"""Pictures that are looked for to choose between namings; each costs a request where they are not at hand."""


@dataclass(frozen=True)
class Unreadable:
    """A line that could not be parsed."""

    problem: str


@dataclass(frozen=True)
class Parsed:
    """A file as it was parsed.

    Attributes:
        content: an object; or a list of rows, in which an `Unreadable` stands for a line that is not JSON.
        keys: where each row of a list is, for messages: "file.json:17".
    """

    file: str
    content: dict[str, Any] | list[Any]
    keys: Sequence[str] = ()

    def rows(self) -> list[tuple[str, Any]]:
        """Key and value of each row of a list; ValueError for an object."""
        if not isinstance(self.content, list):
            raise ValueError(f"{self.file} is not a list of records")
        return list(zip(self.keys, self.content, strict=True))

    def top(self) -> Row:
        """The object; ValueError for a list."""
        if not isinstance(self.content, dict):
            raise ValueError(f"{self.file} is a list of records and no object")
        return self.content

    def rows_of(self, name: str) -> list[tuple[str, Any]]:
        """Key and value of each row of a list in an object; ValueError if there is no such list."""
        rows = self.top().get(name)
        if not isinstance(rows, list):
            raise ValueError(f"{self.file} has no list {name!r}")
        return [(f"{self.file}:{name}[{index}]", row) for index, row in enumerate(rows)]


def read_rows(rows: Iterable[tuple[str, Any]], read: Callable[[str, Row], Record]) -> list[Record]:
    """Each row as a record; what is wrong with a row becomes the record's problem."""
    return [_read_row(key, row, read) for key, row in rows]


def _read_row(key: str, row: Any, read: Callable[[str, Row], Record]) -> Record:
    try:
        return read(key, as_object(row))
    except ValueError as error:
        return broken(key, str(error), split_of(row) if isinstance(row, dict) else {})


def use_rows(rows: Iterable[tuple[str, Any]], use: Callable[[str, Row], None]) -> list[Record]:
    """Hands rows that belong to others to `use`; gives a broken record for each that it refuses."""

    def read(key: str, row: Row) -> Record:
        use(key, row)
        return Record(key, None, (), key)

    return [record for record in read_rows(rows, read) if record.problem is not None]


def broken(key: str, problem: str, extra: Row | None = None) -> Record:
    """A record that cannot be used."""
    return Record(key, None, (), key, extra or {}, problem)


def as_object(row: Any) -> Row:
    """A row that is an object, or ValueError."""
    if isinstance(row, Unreadable):
        raise ValueError(row.problem)
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {str(row)[:60]!r}")
    return row


def objects(rows: Iterable[tuple[str, Any]]) -> Iterable[Row]:
    """Those rows that are objects."""
    return (row for _, row in rows if isinstance(row, dict))


def has_any(rows: Iterable[tuple[str, Any]], *names: str) -> bool:
    """Whether any row has one of the fields: what no row has is absent on purpose, as the answers of test sets are."""
    return any(row.get(name) is not None for row in objects(rows) for name in names)


# ---------------------------------------------------------------------------------------------- fields of a row


def required(row: Row, *names: str) -> tuple[str, Any]:
    """Name and value of the first of the fields that is there, or ValueError."""
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    raise ValueError(f"the field {' or '.join(map(repr, names))} is missing")


def text(row: Row, *names: str) -> str:
    """A text that says something."""
    name, value = required(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise wrong_field(name, "a text", value)
    return value.strip()


def optional_texts(row: Row, *names: str) -> dict[str, str]:
    """Those of the fields that are there."""
    return {name: text(row, name) for name in names if row.get(name) is not None}


def path(row: Row, *names: str) -> str:
    """The name of a picture or video."""
    name, value = required(row, *names)
    if not isinstance(value, str) or not value:
        raise wrong_field(name, "a path", value)
    return value


def identifier(row: Row, *names: str) -> int | str:
    """A number or a text that tells one thing from another."""
    name, value = required(row, *names)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise wrong_field(name, "a whole number or a text", value)
    return value


def whole_number(row: Row, name: str) -> int:
    """A whole number."""
    _, value = required(row, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_field(name, "a whole number", value)
    return value


def listed(row: Row, *names: str) -> list[Any]:
    """A list."""
    name, value = required(row, *names)
    if not isinstance(value, list):
        raise wrong_field(name, "a list", value)
    return value


def captions_of(row: Any) -> tuple[str, ...]:
    """The captions of a JSON object, without empty ones."""
    row = as_object(row)
    return captions_from(row.get("captions", row.get("caption")))


def captions_from(texts: Any) -> tuple[str, ...]:
    """None, one, or a list of captions, without empty ones."""
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(caption, str) for caption in texts):
        raise ValueError("the caption is neither a text nor a list of texts")
    return tuple(caption.strip() for caption in texts if caption.strip())


def split_of(row: Row) -> dict[str, str]:
    """The row's split, if it names one."""
    return {"split": row["split"]} if isinstance(row.get("split"), str) else {}


def answers_of(row: Row, *names: str) -> list[str]:
    """Answers as they are written: one text, a list of texts, or VQA's list of {"answer": text}; at least one."""
    name, value = required(row, *names)
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list):
        values = [one.get("answer") if isinstance(one, dict) else one for one in values]
    if not isinstance(values, list) or not values or not all(isinstance(one, str) for one in values):
        raise wrong_field(name, "a text or a list of texts", value)
    return values


def true_or_false(row: Row, name: str) -> bool:
    """A truth value, or the word for it."""
    _, value = required(row, name)
    if not is_truth(value):
        raise wrong_field(name, "true or false", value)
    return value if isinstance(value, bool) else value.lower() == "true"


def is_truth(value: Any) -> bool:
    """Whether a value is a truth value or the word for one."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def wrong_field(name: str, expected: str, value: Any) -> ValueError:
    """The error for a field that is not what it should be."""
    return ValueError(f"{name!r} must be {expected}, got {str(value)[:60]!r}")


# --------------------------------------------------------------------------------------- where pictures lie


def naming(
    place: Place, templates: Sequence[str | tuple[str, ...]], examples: Iterable[Mapping[str, Any]]
) -> Callable[..., str]:
    """The location of each picture from what identifies it, by the naming that the user's pictures follow.

    Decided once for a file: the first template by which one of the first examples exists, or the first of all.

    Args:
        place: makes a location of a name.
        templates: such as "COCO_{split}_{id:012d}.jpg". Several together are for pictures that lie in several
            folders; each picture is looked for in all of them, and so not where looking is a request.
        examples: what identifies each picture: {"split": "val2014", "id": 42}.

    Returns:
        A function of the same values as keywords.
    """
    far = "://" in place("")
    tried = list(islice(examples, _TRIED_FAR if far else _TRIED))
    usable = [template for template in templates if not far or isinstance(template, str)]

    def found(template: str | tuple[str, ...]) -> bool:
        return any(exists(_locate(place, template, values)) for values in tried)

    chosen = next(filter(found, usable), templates[0])
    return cache(lambda **values: _locate(place, chosen, values))  # the records of a picture share one string


def _locate(place: Place, template: str | tuple[str, ...], values: Mapping[str, Any]) -> str:
    if isinstance(template, str):
        return place(template.format_map(values))
    locations = [place(one.format_map(values)) for one in template]
    return next(filter(exists, locations), locations[0])


def exists(location: str) -> bool:
    """Whether something is at a path, an fsspec URL or a "file.tar:member"; ValueError if that cannot be asked."""
    if ".tar:" in location:
        try:
            read_bytes(location)
        except OSError:
            return False
        return True
    if "://" not in location:
        return os.path.exists(location)
    try:
        system, inside = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {location}: {error}") from error
    return bool(system.exists(inside))
