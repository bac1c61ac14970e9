"""BridgeTower's Arrow tables, read and written (microsoft/BridgeTower: src/utils/write_*.py, src/datasets).

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
- vqa: "question", "question_id", "split"; but in test tables "answers" (the different right ones), "labels" (their
  classes) and "scores" (0 to 1) too.
- nlvr2: "images" (two encoded pictures), "statement", "label" (bool), "identifier" (of the pair).
- snli: "premise", "hypothesis", "label" (one of `ENTAILMENT`).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

from PIL import Image, UnidentifiedImageError

from triptych.data.samples import BrokenSample, Record, open_binary, read_bytes
from triptych.data.sources import Shard, Source
from triptych.progress import progress

Kind = Literal["captions", "vqa", "nlvr2", "snli"]
ENTAILMENT = ("contradiction", "neutral", "entailment")
"""SNLI-VE's labels in the order of their numbers (write_snli.py)."""
SHARD_ROWS = 1000
"""Rows of a table in one virtual shard."""
BATCH_ROWS, BATCH_BYTES = 1000, 64 << 20
"""A record batch is written as soon as it has so many rows, or pictures of so many bytes."""
LISTED = 100
"""Skipped records that are listed; all are counted."""

logger = logging.getLogger(__name__)


class _Layout(NamedTuple):
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
_ANSWERS = {"answers": "answers", "answer_labels": "labels", "answer_scores": "scores"}
"""Column -> field of `extra`."""
_LAYOUTS: Mapping[Kind, _Layout] = {
    "captions": _Layout(
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
    "vqa": _Layout(
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
        optional=(*_ANSWERS, "split"),
        pictures=("image",),
        identity="image_id",
        texts="questions",
        beside=(*_ANSWERS, "question_id"),
    ),
    "nlvr2": _Layout(
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
    "snli": _Layout(
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
        small = _LAYOUTS[kind].identity or "labels"  # of a URL only this column is fetched
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
            for number in range(reader.num_record_batches) if wanted is None else wanted:
                yield number, reader.get_batch(number)
        else:
            for number, batch in enumerate(reader):
                if wanted is None or number in wanted:
                    yield number, batch
                if wanted is not None and number == wanted[-1]:
                    break

    def _reader(self, **options: Any) -> Any:
        ipc = _pyarrow().ipc
        self._source.seek(0)
        open_table = ipc.open_file if self._is_file else ipc.open_stream
        return open_table(self._source, options=ipc.IpcReadOptions(**options))


@contextmanager
def _opened(location: str) -> Iterator[_Table]:
    """The table; whatever goes wrong with the file in the block is said of the file."""
    pa = _pyarrow()
    try:
        if "://" in location:
            with open_binary(location) as file, pa.PythonFile(file, mode="r") as source:
                yield _Table(location, source)
        else:
            with pa.memory_map(location) as source:
                yield _Table(location, source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the table {location} does not exist") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the table {location} is damaged, cut off, or cannot be read: {reason}") from error


def _pyarrow() -> Any:
    try:
        return import_module("pyarrow")
    except ImportError as error:
        raise ImportError('Arrow tables need pyarrow: pip install "triptych-vl[arrow]"') from error


def _kind(table: _Table) -> Kind:
    names = table.schema.names
    if "image_0" in names or "image_1" in names:
        return "nlvr2"
    for kind in ("vqa", "snli", "captions"):
        if _LAYOUTS[kind].texts in names:
            return kind
    known = "; ".join(f"{kind}: {', '.join(layout.types)}" for kind, layout in _LAYOUTS.items())
    raise ValueError(
        f"{table.location} is no table of BridgeTower: it has the columns {', '.join(names)}; known: {known}"
    )


def _columns(table: _Table, kind: Kind) -> list[str]:
    """The columns to read; ValueError if one is missing or of another type."""
    layout, names = _LAYOUTS[kind], table.schema.names
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
    types = _pyarrow().types
    while official.startswith("list<") and (types.is_list(found) or types.is_large_list(found)):
        found, official = found.value_type, official[5:-1]
    # Where all lists are empty, as in test tables, their entries are of the type "null".
    return types.is_null(found) or str(found) in _ACCEPTED.get(official, ())


def _records(kind: Kind, key: str, row: Mapping[str, Any]) -> list[Record]:
    """The records of a row; with its `problem` what is broken, be it the row or one of its texts."""
    layout = _LAYOUTS[kind]
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


def _count_texts(layout: _Layout, row: Mapping[str, Any]) -> int:
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
    for column, name in _ANSWERS.items():
        if not row.get(column):
            continue
        values = row[column][index]
        if values is None or None in values:
            raise ValueError(f"{column!r} of question {index} holds null")
        lengths.add(len(values))
        extra[name] = values
    if len(lengths) > 1:
        raise ValueError(f"question {index} has lists of different length in {', '.join(_ANSWERS)}")
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


# ------------------------------------------------------------------------------------------------------- writing


@dataclass
class Written:
    """What became of the records.

    Attributes:
        path: the table.
        rows: pictures, or pairs of them.
        texts: captions, questions, statements or hypotheses.
        unanswerable: questions left out because none of their answers is a class.
        skipped: (key, reason) of the first `LISTED` records that could not be used.
        skipped_count: all such records.
    """

    path: Path
    rows: int = 0
    texts: int = 0
    unanswerable: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    skipped_count: int = 0

    def skip(self, key: str, reason: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < LISTED:
            self.skipped.append((key, reason))


def write_arrow(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    kind: Kind,
    *,
    answers: Sequence[str] | None = None,
    normalize: Callable[[str], str] | None = None,
    split: str = "train",
    total: int | None = None,
) -> Written:
    """Writes a table that BridgeTower's own code can read: one row for each picture, with all its texts.

    Records are as the top of the file says; their pictures may be locations, and are stored as they are encoded.
    Those of one picture have one `image_id`; for NLVR2 one "identifier", of the statement ("dev-12-0-1") or of the
    pair ("dev-12-0"). Records that are in memory anyway (a sequence, or a Source of lists) may come in any order.
    Others are written as they come, with one record batch in memory: of them, those of a picture must come together.

    VQA (write_vqa.py, write_vgqa.py): "answers" are all that humans gave, or "answer" is the only one. One given by 1,
    2, 3 or more humans scores 0.3, 0.6, 0.9 or 1, and an only one 1; where there are "scores" they are kept. Questions
    without an answer among the classes are left out, as in the official tables; without any, they are a test table's.
    A record may hold several questions, in a list "questions".

    Args:
        records: those with a `problem`, without a readable picture, or without what `kind` needs are skipped.
        path: of the table. It appears when it is complete; until then, and if writing fails, an old one stays.
        kind: of the table.
        answers: the classes of VQA in their order; not needed for records with "labels" and "scores".
        normalize: applied to what humans answered before it is counted (as for the official tables "..._fix").
        split: of records that do not say theirs in "split".
        total: the number of records; if given, progress is shown on stderr.

    Raises:
        ValueError: a bad argument, no usable record, `answers` are needed, or records of a picture are apart.
        ImportError: pyarrow is missing.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(get_args(Kind))}")
    if "://" in os.fspath(path):
        raise ValueError(f"a table is written to a local path, not to {os.fspath(path)}")
    if answers is not None and (not answers or len(set(answers)) < len(answers)):
        raise ValueError("`answers` must be at least one and all different")
    _pyarrow()
    written = Written(Path(path))
    rows = _Rows(kind, answers, normalize, split, written)
    label = f"writing {written.path.name}"
    with (
        progress(label, total or 0, unit="records", shown=total is not None) as advance,
        _replacing(written.path) as file,
    ):
        table = _TableWriter(file, kind)
        for group in _by_picture(records, kind):
            rows.write(group, table)
            advance(len(group))
        if not written.rows:
            reasons = "; ".join(f"{key}: {reason}" for key, reason in written.skipped[:3])
            raise ValueError(f"no usable record for {path}" + (f": {reasons}" if reasons else ""))
        table.close()
    if written.skipped_count:
        logger.warning("%d records are not in %s: %s", written.skipped_count, path, written.skipped[:3])
    return written


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _by_picture(records: Iterable[Record], kind: Kind) -> Iterator[list[Record]]:
    in_memory = isinstance(records, Sequence)
    if isinstance(records, Source):  # whose own iteration leaves out broken records, which are to be counted
        in_memory = records.in_memory
        records = (record for shard in records.shards for record in shard.read())
    if in_memory:
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(_identity(record, kind), []).append(record)
        yield from groups.values()
        return
    seen = set()
    for identity, group in groupby(records, lambda record: _identity(record, kind)):
        if identity in seen:
            raise ValueError(f"the records of picture {identity!r} do not follow each other: sort them, or give a list")
        seen.add(identity)
        yield list(group)


def _identity(record: Record, kind: Kind) -> str:
    if kind != "nlvr2":
        return record.image_id
    identifier = str(record.extra.get("identifier", record.image_id))
    of_statement = re.fullmatch(r"(\w+-\d+-\d+)-\d+", identifier)
    return of_statement[1] if of_statement else identifier


class _TableWriter:
    """Collects rows and writes them in record batches of bounded size."""

    def __init__(self, file: IO[bytes], kind: Kind) -> None:
        self._file, self._kind = file, kind
        self._rows: list[Any] = []
        self._bytes = 0
        self._schema: Any = None
        self._writer: Any = None

    def add(self, row: dict[str, Any]) -> None:
        """ValueError if a value does not fit its column."""
        pa = _pyarrow()
        if self._schema is None:
            self._schema = _schema(self._kind, row)
            self._writer = pa.ipc.new_file(self._file, self._schema)
        try:
            self._rows.append(pa.RecordBatch.from_pylist([row], schema=self._schema))
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError) as error:
            raise ValueError(f"a value does not fit its column: {error}") from error
        self._bytes += self._rows[-1].nbytes
        if len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(_pyarrow().Table.from_batches(self._rows).combine_chunks())
        self._rows, self._bytes = [], 0


def _schema(kind: Kind, row: Mapping[str, Any]) -> Any:
    """Official names and types; ids are numbers or texts as in the first row."""
    pa = _pyarrow()

    def data_type(official: str, value: Any) -> Any:
        if official.startswith("list<"):
            return pa.list_(data_type(official[5:-1], value[0] if value else None))
        if official == "id":
            official = "string" if isinstance(value, str) else "int64"
        return pa.type_for_alias(official)

    types = _LAYOUTS[kind].types
    return pa.schema([(name, data_type(types[name], row[name])) for name in types if name in row])


class _Rows:
    """Makes the row of a picture from its records."""

    def __init__(
        self,
        kind: Kind,
        answers: Sequence[str] | None,
        normalize: Callable[[str], str] | None,
        split: str,
        written: Written,
    ) -> None:
        self._layout = _LAYOUTS[kind]
        self._kind: Kind = kind
        self._class_of = None if answers is None else {answer: number for number, answer in enumerate(answers)}
        self._normalize = normalize or str
        self._split = split
        self._written = written
        self._numeric: dict[str, bool] = {}

    def write(self, group: Sequence[Record], table: _TableWriter) -> None:
        """Adds the row, and counts what is in it and what is not."""
        used: list[Record] = []
        row: dict[str, Any] = {}
        for record in group:
            try:
                lists = self._lists(record)
                if used and _pictures(record, self._kind) != _pictures(used[0], self._kind):
                    raise BrokenSample(record.key, f"{used[0].key} has the same id and another picture")
            except BrokenSample as error:
                self._written.skip(error.key, error.reason)
                continue
            used.append(record)
            for name, values in lists.items():
                row.setdefault(name, []).extend(values)
        if not row.get(self._layout.texts):
            return
        try:
            table.add(self._complete(row, used[0]))
        except ValueError as error:
            reason = error.reason if isinstance(error, BrokenSample) else str(error)
            for record in used:
                self._written.skip(record.key, reason)
        else:
            self._written.rows += 1
            self._written.texts += len(row[self._layout.texts])

    def _complete(self, row: dict[str, Any], first: Record) -> dict[str, Any]:
        if 0 < len(row.get("answers", ())) < len(row[self._layout.texts]):
            raise ValueError("some questions of this picture have answers and others have none")
        pictures = [_encoded(picture, first.key) for picture in _pictures(first, self._kind)]
        row |= zip(self._layout.pictures, pictures, strict=True)
        if self._layout.identity is not None:
            identity = _identity(first, self._kind)
            row[self._layout.identity] = self._id("image_id", identity, first.key) if self._kind == "vqa" else identity
        if "split" in self._layout.types:
            row["split"] = str(first.extra.get("split", self._split))
        return row

    def _lists(self, record: Record) -> dict[str, list[Any]]:
        """What the record adds to the lists of its row."""
        if record.problem is not None:
            raise BrokenSample(record.key, record.problem)
        extra = record.extra
        if self._kind == "captions":
            if not record.captions:
                raise BrokenSample(record.key, "it has no caption")
            return {"caption": list(record.captions)}
        if self._kind == "nlvr2":
            if not isinstance(extra.get("label"), bool):
                raise BrokenSample(record.key, f"'label' must be true or false, not {extra.get('label')!r}")
            return {"questions": [_given(record, extra, "statement")], "answers": [str(extra["label"])]}
        if self._kind == "snli":
            if extra.get("label") not in ENTAILMENT:
                raise BrokenSample(record.key, f"'label' must be one of {ENTAILMENT}, not {extra.get('label')!r}")
            # Models read the hypothesis alone, and not all lists have the premise.
            premise = _given(record, extra, "premise") if "premise" in extra else ""
            pair = [premise, _given(record, extra, "hypothesis")]
            return {"sentences": [pair], "labels": [ENTAILMENT.index(extra["label"])]}
        return self._questions(record)

    def _questions(self, record: Record) -> dict[str, list[Any]]:
        listed = record.extra.get("questions")
        lists: dict[str, list[Any]] = {name: [] for name in ("questions", *_ANSWERS, "question_id")}
        for values in listed if isinstance(listed, list) else [record.extra]:
            question = _given(record, values, "question")
            scored = self._scored_answers(record, values)
            if scored == []:
                self._written.unanswerable += 1
                continue
            if scored is not None:
                for name, column in zip(_ANSWERS, zip(*scored, strict=True), strict=True):
                    lists[name].append(list(column))
            lists["questions"].append(question)
            number = values.get("question_id")
            lists["question_id"].append(None if number is None else self._id("question_id", str(number), record.key))
        return lists

    def _id(self, column: str, identity: str, key: str) -> int | str:
        """A number, as in the official tables, unless the column began with one that is none."""
        number = _number(identity)
        if not self._numeric.setdefault(column, isinstance(number, int)):
            return identity
        if isinstance(number, str):
            raise BrokenSample(key, f"its {column} {identity!r} is no number, as the first one is")
        return number

    def _scored_answers(self, record: Record, values: Mapping[str, Any]) -> list[tuple[str, int, float]] | None:
        """Each different answer that is a class, the class, and the score; None for a question of a test set."""
        given = values.get("answers", values.get("answer"))
        given = [given] if isinstance(given, str) else given
        if not given:
            return None
        if not isinstance(given, list | tuple) or not all(isinstance(answer, str) for answer in given):
            raise BrokenSample(record.key, f"'answers' must be a list of texts, not {given!r}")
        scores, labels = values.get("scores"), values.get("labels")
        if scores is None:
            counts = Counter(map(self._normalize, given))
            given = list(counts)
            scores = [_score(count, counts.total()) for count in counts.values()]
            labels = None
        if self._class_of is not None:
            labels = [self._class_of.get(answer) for answer in given]
        elif labels is None:
            raise ValueError(f"{record.key}: the classes of its answers are not known: give answers=")
        if not len(given) == len(scores) == len(labels):
            raise BrokenSample(record.key, "'answers', 'labels' and 'scores' are of different length")
        return [entry for entry in zip(given, labels, scores, strict=True) if entry[1] is not None]


def _score(count: int, total: int) -> float:
    """Of an answer that `count` of `total` humans gave."""
    return 1.0 if total == 1 else (0.3, 0.6, 0.9, 1.0)[min(count, 4) - 1]


def _number(identity: str) -> int | str:
    """The number that the official tables have for a picture or question, if it has one."""
    of_coco = re.search(r"(?:^|[/_])(\d{12})\.jpg$", identity)
    if of_coco:
        return int(of_coco[1])
    return int(identity) if re.fullmatch(r"0|[1-9]\d{0,17}", identity) else identity


def _given(record: Record, values: Any, name: str) -> str:
    text = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise BrokenSample(record.key, f"{name!r} must be a text, not {text!r}")
    return text.strip()


def _pictures(record: Record, kind: Kind) -> list[Any]:
    """Encoded pictures or their locations, as many as a row has."""
    if kind != "nlvr2":
        return [record.image]
    images = record.extra.get("images")
    if not isinstance(images, list | tuple) or len(images) != 2:
        raise BrokenSample(record.key, "'images' must be two pictures")
    return list(images)


def _encoded(picture: Any, key: str) -> bytes:
    """The bytes of a picture whose header can be read; BrokenSample otherwise."""
    if not isinstance(picture, bytes | str):
        raise BrokenSample(key, "the record has no image")
    try:
        encoded = read_bytes(picture) if isinstance(picture, str) else picture
    except (OSError, ValueError) as error:
        raise BrokenSample(key, f"cannot read {picture!r}: {error}") from error
    try:
        Image.open(BytesIO(encoded)).close()
    except UnidentifiedImageError as error:
        raise BrokenSample(key, "the image is of no known format") from error
    except Exception as error:  # Pillow's decoders raise nearly any exception on damaged bytes
        raise BrokenSample(key, f"cannot open the image: {error!r}") from error
    return encoded
