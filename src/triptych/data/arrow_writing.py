"""Writing BridgeTower's Arrow tables; `triptych.data.arrow` says what is in them and reads them."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import IO, Any, get_args

from PIL import Image, UnidentifiedImageError

from triptych.data.arrow import ANSWERS, LAYOUTS, Kind, import_pyarrow
from triptych.data.lists import ENTAILMENT
from triptych.data.samples import BrokenSample, Record, read_bytes
from triptych.data.sources import Source
from triptych.data.writing import replacing
from triptych.progress import progress

BATCH_ROWS, BATCH_BYTES = 1000, 64 << 20
"""A record batch is written as soon as it has so many rows, or pictures of so many bytes."""
LISTED = 100
"""Skipped records that are listed; all are counted."""

logger = logging.getLogger(__name__)


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
    import_pyarrow()
    written = Written(Path(path))
    rows = _Rows(kind, answers, normalize, split, written)
    label = f"writing {written.path.name}"
    with (
        progress(label, total or 0, unit="records", shown=total is not None) as advance,
        replacing(written.path) as file,
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
        pa = import_pyarrow()
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
        self._writer.write_table(import_pyarrow().Table.from_batches(self._rows).combine_chunks())
        self._rows, self._bytes = [], 0


def _schema(kind: Kind, row: Mapping[str, Any]) -> Any:
    """Official names and types; ids are numbers or texts as in the first row."""
    pa = import_pyarrow()

    def data_type(official: str, value: Any) -> Any:
        if official.startswith("list<"):
            return pa.list_(data_type(official[5:-1], value[0] if value else None))
        if official == "id":
            official = "string" if isinstance(value, str) else "int64"
        return pa.type_for_alias(official)

    types = LAYOUTS[kind].types
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
        self._layout = LAYOUTS[kind]
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
            # The models read the hypothesis alone, and not all lists have the premise.
            pair = [extra.get("premise") or "", _given(record, extra, "hypothesis")]
            return {"sentences": [pair], "labels": [ENTAILMENT.index(extra["label"])]}
        return self._questions(record)

    def _questions(self, record: Record) -> dict[str, list[Any]]:
        listed = record.extra.get("questions")
        lists: dict[str, list[Any]] = {name: [] for name in ("questions", *ANSWERS, "question_id")}
        for values in listed if isinstance(listed, list) else [record.extra]:
            question = _given(record, values, "question")
            scored = self._scored_answers(record, values)
            if scored == []:
                self._written.unanswerable += 1
                continue
            if scored is not None:
                for name, column in zip(ANSWERS, zip(*scored, strict=True), strict=True):
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
        if not all(isinstance(each, list | tuple) and len(each) == len(given) for each in (labels, scores)):
            raise BrokenSample(record.key, "'labels' and 'scores' must be lists as long as 'answers'")
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
