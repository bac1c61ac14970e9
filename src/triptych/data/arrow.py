"""BridgeTower's Arrow tables and how they are read (microsoft/BridgeTower: src/utils/write_*.py, src/datasets).

`triptych.data.arrow_writing` writes them.

One row a picture (NLVR2: a pair of pictures) with lists of its texts. Columns in the official order:

| kind | columns | a record |
|---|---|---|
| "captions" | image, caption, image_id, split; Visual Genome: width, height, x, y too | a row |
| "vqa" | image, questions, answers, answer_labels, answer_scores, image_id, question_id, split | a question |
| "nlvr2" | image_0, image_1, questions, answers, identifier | a statement |
| "snli" | image, sentences, labels | a pair of premise and hypothesis |

The `extra` of the records:

- captions: "split"; in Visual Genome's table "width", "height", "x", "y" as well, lists with the box of each
  caption in pixels.
- vqa: "question", "question_id", "split"; except in test tables also "answers" (the different right ones), "labels"
  (their classes) and "scores" (0 to 1).
- nlvr2: "images" (two encoded pictures), "statement", "label" (bool), "identifier" (of the pair).
- snli: "premise", "hypothesis", "label" (one of `ENTAILMENT`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

from triptych.data.lists import ENTAILMENT
from triptych.data.samples import Record, open_binary
from triptych.data.sources import Shard

Kind = Literal["captions", "vqa", "nlvr2", "snli"]
SHARD_ROWS = 1000
"""Rows of a table in one virtual shard."""


class Layout(NamedTuple):
    """The columns of one kind of table.

    Attributes:
        types: of each column, in the official order; "id" stands for integers or texts.
        optional: columns that may be missing.
        pictures: columns of encoded pictures.
        identity: column that tells one picture, or pair, from another; SNLI-VE's tables have none.
        texts: column of the texts.
        beside: columns of lists with one entry for each text.
    """

    types: Mapping[str, str]
    optional: tuple[str, ...]
    pictures: tuple[str, ...]
    identity: str | None
    texts: str
    beside: tuple[str, ...]


_BOX = ("width", "height", "x", "y")
ANSWERS = {"answers": "answers", "answer_labels": "labels", "answer_scores": "scores"}
"""Column -> field of `extra`."""
LAYOUTS: Mapping[Kind, Layout] = {
    "captions": Layout(
        {
            "image": "binary",
            "caption": "list<string>",
            **dict.fromkeys(_BOX, "list<double>"),
            "image_id": "id",
            "split": "string",
        },
        optional=(*_BOX, "split"),
        pictures=("image",),
        identity="image_id",
        texts="caption",
        beside=_BOX,
    ),
    "vqa": Layout(
        {
            "image": "binary",
            "questions": "list<string>",
            "answers": "list<list<string>>",
            "answer_labels": "list<list<int64>>",
            "answer_scores": "list<list<double>>",
            "image_id": "id",
            "question_id": "list<id>",
            "split": "string",
        },
        optional=(*ANSWERS, "split"),
        pictures=("image",),
        identity="image_id",
        texts="questions",
        beside=(*ANSWERS, "question_id"),
    ),
    "nlvr2": Layout(
        {
            "image_0": "binary",
            "image_1": "binary",
            "questions": "list<string>",
            "answers": "list<string>",
            "identifier": "id",
        },
        optional=(),
        pictures=("image_0", "image_1"),
        identity="identifier",
        texts="questions",
        beside=("answers",),
    ),
    "snli": Layout(
        {"image": "binary", "sentences": "list<list<string>>", "labels": "list<int64>"},
        optional=(),
        pictures=("image",),
        identity=None,
        texts="sentences",
        beside=("labels",),
    ),
}
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
_TEXTS = ("string", "large_string", "string_view")
_ACCEPTED = {
    "binary": ("binary", "large_binary", "binary_view"),
    "string": _TEXTS,
    "int64": _INTEGERS,
    "double": ("double", "float", *_INTEGERS),
    "id": (*_INTEGERS, *_TEXTS),
}
"""Scalar type of the official tables -> those that other writers may use for it."""


# ------------------------------------------------------------------------------------------------------- reading


class Part(NamedTuple):
    """Consecutive rows of one record batch: `length` from `first` on; the first one is `row` of the table."""

    batch: int
    first: int
    length: int
    row: int


@dataclass(frozen=True)
class ArrowShard:
    """Some rows of a table. Each `read` opens and maps the file anew, in whatever process that is."""

    location: str
    kind: Kind
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return f"{self.location}#{self.parts[0].row}"

    def read(self) -> list[Record]:
        records: list[Record] = []
        with _opened(self.location) as table:
            parts = {part.batch: part for part in self.parts}
            for number, batch in table.batches(_columns(table, self.kind), list(parts)):
                rows = batch.slice(parts[number].first, parts[number].length)
                rows.validate(full=True)  # or a damaged offset would be followed out of the file
                for row, values in enumerate(rows.to_pylist(), start=parts[number].row):
                    records += _records(self.kind, f"{self.location}:{row}", values)
                if rows.num_rows == parts[number].length:
                    del parts[number]
        if parts:
            raise ValueError(f"the table {self.location} has fewer rows than when it was opened")
        return records


def open_arrow(location: str | os.PathLike[str], *, shard_rows: int = SHARD_ROWS) -> list[Shard]:
    """The virtual shards of a table; none if it has no rows.

    Both formats of Arrow IPC are read: files, as the official tables are, and streams. Local ones are mapped into
    memory; of URLs only the record batches and columns that a shard needs are fetched.

    Args:
        location: a path or an fsspec URL.
        shard_rows: rows in a shard, whose pictures are in memory at the same time.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no Arrow table, is damaged or cut off, is of no known kind, or lacks a column.
        ImportError: pyarrow is missing.
    """
    location = os.fspath(location)
    if shard_rows < 1:
        raise ValueError(f"shard_rows must be at least 1, not {shard_rows}")
    with _opened(location) as table:
        kind = _kind(table)
        _columns(table, kind)
        small = LAYOUTS[kind].identity or "labels"  # of a URL only this column is fetched
        counts = {number: batch.num_rows for number, batch in table.batches([small])}
    return [ArrowShard(location, kind, parts) for parts in _cut(counts, shard_rows)]


def _cut(counts: Mapping[int, int], shard_rows: int) -> Iterator[tuple[Part, ...]]:
    """The parts of each shard, from the number of rows of each batch."""
    parts: list[Part] = []
    row, room = 0, shard_rows
    for batch, count in counts.items():
        first = 0
        while first < count:
            taken = min(room, count - first)
            parts.append(Part(batch, first, taken, row))
            first, row, room = first + taken, row + taken, room - taken
            if room == 0:
                yield tuple(parts)
                parts, room = [], shard_rows
    if parts:
        yield tuple(parts)


class _Table:
    """An open table in one of the two formats of Arrow IPC."""

    def __init__(self, location: str, source: Any) -> None:
        self.location = location
        self._source = source
        start, end = source.read(6), b""
        if source.size() >= 8:
            source.seek(source.size() - 8)
            end = source.read(8)
        self._is_file = start == b"ARROW1"
        if not self._is_file and start[:4] != b"\xff" * 4:
            raise ValueError(f"{location} is not an Arrow table")
        if not (end.endswith(b"ARROW1") if self._is_file else end == b"\xff" * 4 + b"\0" * 4):
            raise ValueError(f"the table {location} is cut off: its end is missing")
        self.schema = self._reader().schema

    def batches(self, columns: Sequence[str], wanted: Sequence[int] | None = None) -> Iterator[tuple[int, Any]]:
        """(number, record batch) of the wanted batches or of all, with these columns only."""
        fields = [self.schema.get_field_index(name) for name in columns]
        reader = self._reader(included_fields=fields, use_threads=False)
        if self._is_file:
            for number in range(reader.num_record_batches):
                if wanted is None or number in wanted:
                    yield number, reader.get_batch(number)
        else:
            for number, batch in enumerate(reader):
                if wanted is None or number in wanted:
                    yield number, batch
                if wanted is not None and number == wanted[-1]:
                    break

    def _reader(self, **options: Any) -> Any:
        ipc = import_pyarrow().ipc
        self._source.seek(0)
        open_table = ipc.open_file if self._is_file else ipc.open_stream
        return open_table(self._source, options=ipc.IpcReadOptions(**options))


@contextmanager
def _opened(location: str) -> Iterator[_Table]:
    """The table; whatever goes wrong with the file in the block is said of the file."""
    pa = import_pyarrow()
    try:
        if "://" in location:
            with open_binary(location) as file, pa.PythonFile(file, mode="r") as source:
                yield _Table(location, source)
        else:
            with pa.memory_map(location) as source:
                yield _Table(location, source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the table {location} does not exist") from error
    except (pa.ArrowException, UnicodeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the table {location} is damaged, cut off, or cannot be read: {reason}") from error


def import_pyarrow() -> Any:
    try:
        return import_module("pyarrow")
    except ImportError as error:
        raise ImportError('Arrow tables need pyarrow: pip install "triptych-vl[arrow]"') from error


def _kind(table: _Table) -> Kind:
    names = table.schema.names
    if "image_0" in names or "image_1" in names:
        return "nlvr2"
    for kind in ("vqa", "snli", "captions"):
        if LAYOUTS[kind].texts in names:
            return kind
    known = "; ".join(f"{kind}: {', '.join(layout.types)}" for kind, layout in LAYOUTS.items())
    raise ValueError(
        f"{table.location} is no table of BridgeTower: it has the columns {', '.join(names)}; known: {known}"
    )


def _columns(table: _Table, kind: Kind) -> list[str]:
    """The columns to read; ValueError if one is missing or of another type."""
    layout, names = LAYOUTS[kind], table.schema.names
    missing = [name for name in layout.types if name not in names and name not in layout.optional]
    if missing:
        raise ValueError(f"{table.location} lacks the column {', '.join(map(repr, missing))} of a {kind!r} table")
    present = [name for name in layout.types if name in names]
    for name in present:
        found = [entry.type for entry in table.schema if entry.name == name]
        if len(found) > 1 or not _fits(found[0], layout.types[name]):
            types = " and ".join(map(str, found))
            raise ValueError(f"the column {name!r} of {table.location} is of type {types}, not {layout.types[name]}")
    return present


def _fits(found: Any, official: str) -> bool:
    types = import_pyarrow().types
    while official.startswith("list<") and (types.is_list(found) or types.is_large_list(found)):
        found, official = found.value_type, official[5:-1]
    # Where all lists are empty, as in test tables, their entries are of the type "null".
    return types.is_null(found) or str(found) in _ACCEPTED.get(official, ())


def _records(kind: Kind, key: str, row: Mapping[str, Any]) -> list[Record]:
    """The records of a row; with its `problem` what is broken, be it the row or one of its texts."""
    layout = LAYOUTS[kind]
    try:
        pictures = [_picture(row, name) for name in layout.pictures]
        count = _count_texts(layout, row)
    except ValueError as error:
        return [_broken(key, str(error))]
    identity = None if layout.identity is None else row[layout.identity]
    image_id = key if identity is None else str(identity)
    if kind == "captions":
        return [_caption_record(key, pictures[0], image_id, row)]
    image, images = (pictures[0], {}) if len(pictures) == 1 else (None, {"images": pictures})
    records = []
    for index in range(count):
        own_key = f"{key}#{index}"
        try:
            extra = {**images, **_EXTRA[kind](row, index)}
        except ValueError as error:
            records.append(_broken(own_key, str(error)))
        else:
            records.append(Record(own_key, image, (), image_id, extra))
    return records


def _picture(row: Mapping[str, Any], name: str) -> bytes:
    encoded = row[name]
    if not encoded:
        raise ValueError(f"the row has no picture in {name!r}")
    assert isinstance(encoded, bytes)
    return encoded


def _count_texts(layout: Layout, row: Mapping[str, Any]) -> int:
    """The number of texts; ValueError if a list beside them has another length."""
    if row[layout.texts] is None:
        raise ValueError(f"{layout.texts!r} is null")
    count = len(row[layout.texts])
    for name in layout.beside:
        if name in layout.optional and not row.get(name):
            continue
        found = 0 if row[name] is None else len(row[name])
        if found != count:
            raise ValueError(f"{found} entries in {name!r} for {count} in {layout.texts!r}")
    return count


def _caption_record(key: str, image: bytes, image_id: str, row: Mapping[str, Any]) -> Record:
    texts = row["caption"]
    good = [index for index, text in enumerate(texts) if text is not None and text.strip()]
    extra: dict[str, Any] = {name: [row[name][index] for index in good] for name in _BOX if row.get(name)}
    return Record(key, image, tuple(texts[index].strip() for index in good), image_id, extra | _split(row))


def _question(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    extra: dict[str, Any] = {"question": _text(row["questions"][index], "question"), **_split(row)}
    if row["question_id"][index] is not None:
        extra["question_id"] = row["question_id"][index]
    lengths = set()
    for column, name in ANSWERS.items():
        if not row.get(column):
            continue
        values = row[column][index]
        if values is None or None in values:
            raise ValueError(f"{column!r} of question {index} holds null")
        lengths.add(len(values))
        extra[name] = values
    if len(lengths) > 1:
        raise ValueError(f"question {index} has lists of different length in {', '.join(ANSWERS)}")
    return extra


def _statement(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    answer = row["answers"][index]
    if answer not in ("True", "False"):
        raise ValueError(f"the answer must be 'True' or 'False', not {answer!r}")
    statement = _text(row["questions"][index], "statement")
    return {"statement": statement, "label": answer == "True", "identifier": row["identifier"]}


def _entailment(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    pair, label = row["sentences"][index], row["labels"][index]
    if pair is None or len(pair) != 2 or None in pair:
        raise ValueError(f"'sentences' must hold pairs of premise and hypothesis, not {pair!r}")
    if label is None or not 0 <= label < len(ENTAILMENT):
        raise ValueError(f"the label must be 0, 1 or 2, not {label!r}")
    return {"premise": pair[0].strip(), "hypothesis": _text(pair[1], "hypothesis"), "label": ENTAILMENT[label]}


_EXTRA: Mapping[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "vqa": _question,
    "nlvr2": _statement,
    "snli": _entailment,
}


def _split(row: Mapping[str, Any]) -> dict[str, str]:
    return {} if row.get("split") is None else {"split": row["split"]}


def _text(value: str | None, what: str) -> str:
    if value is None or not value.strip():
        raise ValueError(f"the {what} is empty")
    return value.strip()


def _broken(key: str, problem: str) -> Record:
    return Record(key, None, (), key, {}, problem)
