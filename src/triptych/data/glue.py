"""Tables of labelled texts as GLUE's (gluebenchmark.com): tab-separated, a text or a pair of texts a line.

| data set | columns that are read |
|---|---|
| CoLA (train, dev: no header) | the 2nd is the label, the 4th the sentence |
| SST-2, the tests of CoLA and SST-2, and your own | sentence, label |
| MRPC | #1 String, #2 String, Quality |
| QQP | question1, question2, is_duplicate |
| STS-B | sentence1, sentence2, score |
| MNLI | sentence1, sentence2, gold_label |
| QNLI | question, sentence, label |
| RTE, WNLI, the diagnostic set, and your own | sentence1, sentence2, label |

The header tells which it is; test files have no label. A record has no picture; its `extra` has "text", for pairs
"text_pair", "label" (a text; of STS-B a number), "index" (of the column "index" or "id", or counted from 0), and
"split", which is the file's name ("dev_matched"). Quotation marks mean nothing in these files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from triptych.data.fields import broken
from triptych.data.samples import Record

_BINARY = ("0", "1")
_INDEX = ("index", "id")


@dataclass(frozen=True)
class _Layout:
    """Names of columns; `labels` are all there are, () for any text and None for numbers."""

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None = ()


_COLA = ("source", "label", "judgement", "sentence")
_LAYOUTS = (
    _Layout(("#1 String", "#2 String"), "Quality", _BINARY),
    _Layout(("question1", "question2"), "is_duplicate", _BINARY),
    _Layout(("question", "sentence"), "label", ("entailment", "not_entailment")),
    _Layout(("sentence1", "sentence2"), "score", None),
    _Layout(("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction")),
    _Layout(("sentence1", "sentence2"), "label"),
    _Layout(("sentence",), "label"),
)


def read_glue(file: str, content: str) -> list[Record]:
    """The lines of a table, in order; those that cannot be used have a `problem`.

    Args:
        file: where it is, for messages; its name is the split.
        content: the text of the file.

    Raises:
        ValueError: the header lacks columns.
    """
    lines = [(n, line.rstrip("\r").split("\t")) for n, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        return []
    if _is_cola(lines[0][1]):
        header, layout = list(_COLA), _Layout(("sentence",), "label", _BINARY)
    else:
        header, lines = lines[0][1], lines[1:]
        layout = _layout(file, header)
    split = PurePath(file).name.split(".")[0]
    return [
        _record(f"{file}:{number}", header, cells, layout, {"index": index, "split": split})
        for index, (number, cells) in enumerate(lines)
    ]


def write_submission(predictions: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Predictions ("index", "prediction") as the file that GLUE's server takes; numbers get three decimals.

    Raises:
        ValueError: an index occurs twice, as where MNLI's two parts are mixed.
    """
    seen: set[Any] = set()
    lines = ["index\tprediction"]
    for row in predictions:
        index, value = row["index"], row["prediction"]
        if index in seen:
            raise ValueError(f"index {index} is predicted twice: predict one file at a time for a submission")
        seen.add(index)
        lines.append(f"{index}\t{value:.3f}" if isinstance(value, float) else f"{index}\t{value}")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_cola(cells: Sequence[str]) -> bool:
    return len(cells) == len(_COLA) and cells[1] in _BINARY and cells[2] in ("", "*")


def _layout(file: str, header: Sequence[str]) -> _Layout:
    fitting = [layout for layout in _LAYOUTS if set(layout.texts) <= set(header)]
    if not fitting:
        known = ", ".join(sorted({" + ".join(layout.texts) for layout in _LAYOUTS}))
        raise ValueError(f"{file}:1: the header {', '.join(map(repr, header))[:200]} has no texts; known are {known}")
    return next((layout for layout in fitting if layout.label in header), fitting[0])


def _record(key: str, header: Sequence[str], cells: Sequence[str], layout: _Layout, extra: dict[str, Any]) -> Record:
    if len(cells) != len(header):  # a stray tab: what stands where is anyone's guess (QQP has such lines)
        return broken(key, f"it has {len(cells)} columns, not {len(header)}", {"split": extra["split"]})
    row = dict(zip(header, cells, strict=True))
    try:
        texts = [_cell(row, name) for name in layout.texts]
        if layout.label in row:
            extra["label"] = _label(_cell(row, layout.label), layout)
        name = next((name for name in _INDEX if name in row), None)
        if name is not None:
            extra["index"] = _index(_cell(row, name))
    except ValueError as error:
        return broken(key, str(error), {"split": extra["split"]})
    return Record(key, None, (), key, dict(zip(("text", "text_pair"), texts, strict=False)) | extra)


def _cell(row: Mapping[str, str], name: str) -> str:
    text = row[name].strip()
    if not text:
        raise ValueError(f"the column {name!r} is empty")
    return text


def _label(text: str, layout: _Layout) -> str | float:
    if layout.labels is None:
        return _number(text, layout.label)
    if layout.labels and text not in layout.labels:
        raise ValueError(f"{layout.label!r} must be one of {', '.join(layout.labels)}, not {text[:60]!r}")
    return text


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name!r} must be a number, not {text[:60]!r}")
    return value


def _index(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text
