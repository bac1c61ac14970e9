"""Lists of records in JSON or JSON lines: as users write them, and as mPLUG, ALBEF and BLIP do.

| format | a row | what becomes of it |
|---|---|---|
| "captions" | image, caption or captions | captions; all other fields stay as they are |
| "questions" | image, question, answer or answers | "question", "question_id", "answers"... |
| "grounding" | image, phrase, box_xyxy or bbox_xywh | "phrase", "box_xyxy" |
| "statements" | image or images, statement or sentence, label (true, false) | "statement", "label", "images" |
| "entailment" | image, hypothesis or sentence, label (one of `ENTAILMENT`), premise | "hypothesis", "label" |

Fields that are not named here stay in `Record.extra` as they are. What no row of a file has (answers, boxes, labels) is
absent on purpose: a test set. Where only some rows lack it, those are broken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any

from triptych.data.fields import (
    Parsed,
    Place,
    Row,
    answers_of,
    captions_of,
    has_any,
    identifier,
    is_truth,
    listed,
    optional_texts,
    path,
    read_rows,
    required,
    text,
    true_or_false,
    wrong_field,
)
from triptych.data.samples import Record

ENTAILMENT = ("contradiction", "neutral", "entailment")

_CAPTION_FIELDS = frozenset({"caption", "captions", "image_id"})
QUESTION_FIELDS = (
    *("question", "question_id", "answer", "answers", "answer_weights", "answer_type", "question_type", "dataset"),
    *("ocr", "object_label", "object_labels"),
)
"""Fields of a row that `question_fields` reads."""
_HALF_WEIGHT = ("vg", "gqa")
"""Data sets whose one answer weighs 0.5 in mPLUG's training (dataset/vqa_dataset.py)."""


def read_captions(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Pictures with captions, and whatever else is in a list: see "captions" above."""

    def record(key: str, row: Row) -> Record:
        image = None if row.get("image") is None else place(path(row, "image"))
        extra = {"images": _paths(row, place)} if isinstance(row.get("images"), list) else {}
        return list_record(key, row, image, extra, ())

    return read_rows(parsed.rows(), record)


def read_questions(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Questions about pictures: see "questions" above."""
    rows = parsed.rows()
    answered = has_any(rows, "answers", "answer")

    def record(key: str, row: Row) -> Record:
        image = place(path(row, "image"))
        return list_record(key, row, image, question_fields(key, row, answered), ("image", *QUESTION_FIELDS))

    return read_rows(rows, record)


def read_grounding(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Phrases with their boxes: see "grounding" above."""
    rows = parsed.rows()
    boxed = has_any(rows, "box_xyxy", "bbox_xywh")

    def record(key: str, row: Row) -> Record:
        fields: dict[str, Any] = {"phrase": text(row, "phrase")}
        if boxed:
            fields["box_xyxy"] = _corners(row)
        return list_record(key, row, place(path(row, "image")), fields, ("image", "box_xyxy", "bbox_xywh"))

    return read_rows(rows, record)


def read_statements(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Statements that are true or false of two pictures, or of one: see "statements" above.

    Of two pictures, `Record.image` is None and `image_id` names both.
    """
    rows = parsed.rows()
    labelled = has_any(rows, "label")

    def record(key: str, row: Row) -> Record:
        fields: dict[str, Any] = {"statement": text(row, "statement", "sentence"), "identifier": _name(key, row)}
        if labelled:
            fields["label"] = true_or_false(row, "label")
        image = None
        if row.get("images") is not None:
            fields["images"] = _pair(row, place)
        else:
            image = place(path(row, "image", "images"))
        return list_record(key, row, image, fields, ("image", "images", "sentence", "label"))

    return read_rows(rows, record)


def read_entailment(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Hypotheses about pictures: see "entailment" above.

    ALBEF's lists name pictures of Flickr30k without ".jpg" (dataset/ve_dataset.py), which is added.
    """
    rows = parsed.rows()
    labelled = has_any(rows, "label")

    def record(key: str, row: Row) -> Record:
        fields = {"hypothesis": text(row, "hypothesis", "sentence"), **optional_texts(row, "premise")}
        if labelled:
            fields["label"] = entailment_label(row, "label")
        image = place(with_suffix(identifier(row, "image")))
        return list_record(key, row, image, fields, ("image", "sentence", "premise", "label"))

    return read_rows(rows, record)


# --------------------------------------------------------------------------------------------- parts of records


def list_record(key: str, row: Row, image: str | None, fields: Row, used: Collection[str]) -> Record:
    """A record of a list: its picture and captions, `fields`, and the row's other fields that are not `used`."""
    shown = image or fields.get("video") or " ".join(fields.get("images", ())) or key
    rest = {name: value for name, value in row.items() if name not in used and name not in _CAPTION_FIELDS}
    image_id = str(shown if row.get("image_id") is None else row["image_id"])
    return Record(key, image, captions_of(row), image_id, {**rest, **fields})


def question_fields(key: str, row: Row, answered: bool) -> dict[str, Any]:
    """The normalised fields of a question; its id is the record's key where the row has none."""
    fields: dict[str, Any] = {"question": text(row, "question")}
    fields["question_id"] = key if row.get("question_id") is None else identifier(row, "question_id")
    if answered:
        fields["answers"] = answers_of(row, "answers", "answer")
        fields |= _weights(row, len(fields["answers"]))
    fields |= optional_texts(row, "answer_type", "question_type", "dataset")
    if row.get("ocr"):
        fields["ocr"] = _words(row, "ocr")
    if row.get("object_labels") or row.get("object_label"):
        fields["object_labels"] = _words(row, "object_labels", "object_label").replace("&&", " ")
    return fields


def _weights(row: Row, count: int) -> dict[str, list[float]]:
    if row.get("answer_weights") is None:
        return {"answer_weights": [0.5] * count} if row.get("dataset") in _HALF_WEIGHT else {}
    weights = _numbers(row["answer_weights"], count)
    if weights is None or min(weights) < 0:
        raise wrong_field("answer_weights", f"{count} numbers from 0 on, one for each answer", row["answer_weights"])
    return {"answer_weights": weights}


def _words(row: Row, *names: str) -> str:
    """A text; or a list of texts or of mPLUG's pairs of place and text (dataset/vqa_dataset.py), joined by spaces."""
    name, value = required(row, *names)
    parts = value if isinstance(value, list) else [value]
    words = [part[-1] if isinstance(part, list) and len(part) == 2 else part for part in parts]
    if not all(isinstance(word, str) for word in words):
        raise wrong_field(name, "a text, a list of texts, or a list of [place, text]", value)
    return " ".join(words)


def _corners(row: Row) -> list[float]:
    """Left, top, right, bottom in pixels."""
    name, value = required(row, "box_xyxy", "bbox_xywh")
    box = _numbers(value, 4)
    if box is None:
        raise wrong_field(name, "four numbers", value)
    left, top, right, bottom = box
    if name == "bbox_xywh":
        right, bottom = left + right, top + bottom
    if right <= left or bottom <= top:
        raise wrong_field(name, "a box with an area", value)
    return [left, top, right, bottom]


def _numbers(values: Any, count: int) -> list[float] | None:
    """So many finite numbers, or None."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    try:
        numbers = [float(value) for value in values]
    except OverflowError:  # a whole number can be too large
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def entailment_label(row: Row, name: str) -> str:
    """One of `ENTAILMENT`; "-" of SNLI, where the annotators did not agree, is an error of its own."""
    _, value = required(row, name)
    if value == "-":
        raise ValueError(f"{name!r} is '-': the annotators did not agree")
    if value not in ENTAILMENT:
        raise wrong_field(name, f"one of {', '.join(ENTAILMENT)}", value)
    return str(value)


def with_suffix(image: int | str) -> str:
    """A picture's name with ".jpg" if it has no suffix."""
    return str(image) if PurePosixPath(str(image)).suffix else f"{image}.jpg"


def _pair(row: Row, place: Place) -> list[str]:
    images = _paths(row, place)
    if len(images) != 2:
        raise wrong_field("images", "two paths", row["images"])
    return images


def _paths(row: Row, place: Place) -> list[str]:
    images = listed(row, "images")
    if not all(isinstance(name, str) and name for name in images):
        raise wrong_field("images", "a list of paths", images)
    return [place(name) for name in images]


def _name(key: str, row: Row) -> str:
    return key if row.get("identifier") is None else str(identifier(row, "identifier"))


# ------------------------------------------------------------------------------------- what a row of a list is


def is_question(row: Row) -> bool:
    """Whether a row of a list is a question about a picture."""
    return "image" in row and "question" in row


def is_phrase(row: Row) -> bool:
    """Whether a row of a list is a phrase about a part of a picture."""
    return "image" in row and "phrase" in row and not is_question(row)


def is_statement(row: Row) -> bool:
    """Whether a row of a list is a statement about one or two pictures."""
    if is_question(row) or is_phrase(row):
        return False
    if "images" in row:
        return "statement" in row or "sentence" in row
    return "image" in row and ("statement" in row or ("sentence" in row and is_truth(row.get("label"))))


def is_hypothesis(row: Row) -> bool:
    """Whether a row of a list is a hypothesis about a picture."""
    if is_question(row) or is_phrase(row) or is_statement(row) or "image" not in row:
        return False
    return "hypothesis" in row or ("sentence" in row and "label" in row)
