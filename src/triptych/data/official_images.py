"""Readers of the official annotation files of pictures; `triptych.data.official` tells which file is which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import starmap
from pathlib import PurePosixPath
from typing import Any

from triptych.data.fields import (
    Parsed,
    Place,
    Row,
    Unreadable,
    answers_of,
    as_object,
    captions_from,
    has_any,
    identifier,
    listed,
    naming,
    objects,
    optional_texts,
    path,
    read_rows,
    required,
    split_of,
    text,
    true_or_false,
    use_rows,
    whole_number,
    wrong_field,
)
from triptych.data.lists import entailment_label, with_suffix
from triptych.data.samples import Record

DOMAINS = ("in-domain", "near-domain", "out-domain")

_COCO_NAMES = ("COCO_{split}_{id:012d}.jpg", "{id:012d}.jpg")
_VG_FOLDERS = ("VG_100K/{id}.jpg", "VG_100K_2/{id}.jpg")
_FLICKR_IDS = ("Flickr30K_ID", "Flikr30kID")


# ------------------------------------------------------------------------------------------ questions about pictures


def read_vqa_v2(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """VQA v2 (visualqa.org/download): questions, with the answers of annotation files where there are any.

    Pictures are "COCO_val2014_000000000042.jpg" or "000000000042.jpg", perhaps in a folder "val2014"; those of
    test-dev2015 are of test2015.
    """
    rows = parsed.rows_of("questions")
    split = re.sub("-(dev|std)", "", str(parsed.top().get("data_subtype") or ""))
    named = _coco_naming(place, split, (row.get("image_id") for row in objects(rows)))
    annotations, unusable = _by_question(partners)

    def record(key: str, row: Row) -> Record:
        image_id = whole_number(row, "image_id")
        question_id = identifier(row, "question_id")
        fields = {"question": text(row, "question"), "question_id": question_id, "dataset": "vqa", **split_of(row)}
        if partners:
            fields |= _annotation(annotations, question_id, image_id)
        return Record(key, named(id=image_id, split=split), (), str(image_id), fields)

    return [*read_rows(rows, record), *unusable]


def _coco_naming(place: Place, split: str, image_ids: Iterable[Any]) -> Callable[..., str]:
    names = _COCO_NAMES if split else _COCO_NAMES[1:]
    templates = [*names, *(f"{{split}}/{name}" for name in names if split)]
    numbers = (number for number in image_ids if isinstance(number, int))
    return naming(place, templates, ({"id": number, "split": split} for number in numbers))


def _by_question(partners: Sequence[Parsed]) -> tuple[dict[str, tuple[str, Row]], list[Record]]:
    """Key and row of the annotation of each question, and broken records for annotations that cannot be used.

    Ids are compared as texts, as some files write them so.
    """
    found: dict[str, tuple[str, Row]] = {}

    def annotation(key: str, row: Row) -> None:
        question_id = str(identifier(row, "question_id"))
        if question_id in found:
            raise ValueError(f"question {question_id} has another annotation, {found[question_id][0]}")
        found[question_id] = key, row

    return found, use_rows((entry for partner in partners for entry in partner.rows_of("annotations")), annotation)


def _annotation(annotations: dict[str, tuple[str, Row]], question_id: int | str, image_id: int) -> dict[str, Any]:
    if str(question_id) not in annotations:
        raise ValueError(f"the annotations have no answers to question {question_id}")
    key, row = annotations[str(question_id)]
    try:
        if row.get("image_id", image_id) != image_id:
            raise ValueError(f"'image_id' is {row['image_id']}, but {image_id} in the questions")
        return {"answers": answers_of(row, "answers"), **optional_texts(row, "answer_type", "question_type")}
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def read_gqa(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """GQA (cs.stanford.edu/people/dorarad/gqa/download.html): questions by id; test files have no answers."""
    start = f"{parsed.file}:"
    rows = [(f"{start}{question_id}", row) for question_id, row in parsed.top().items()]
    answered = has_any(rows, "answer")

    def record(key: str, row: Row) -> Record:
        image_id = str(identifier(row, "imageId"))
        fields: dict[str, Any] = {"question": text(row, "question"), "question_id": key.removeprefix(start)}
        if answered:
            fields["answers"] = answers_of(row, "answer")
        types = row.get("types")
        if isinstance(types, dict) and types.get("structural") is not None:
            fields["question_type"] = text(types, "structural")
        return Record(key, place(f"{image_id}.jpg"), (), image_id, {**fields, "dataset": "gqa"})

    return read_rows(rows, record)


def read_visual_genome_qa(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Visual Genome's question_answers.json, a record for each question.

    Pictures lie in one folder, or in VG_100K and VG_100K_2 as they are published.
    """
    rows = [pair for key, row in parsed.rows() for pair in _pairs(key, row)]
    named = naming(place, ("{id}.jpg", _VG_FOLDERS), ({"id": row.get("image_id")} for row in objects(rows)))

    def record(key: str, row: Row) -> Record:
        image_id = whole_number(row, "image_id")
        fields = {"question": text(row, "question"), "question_id": identifier(row, "qa_id")}
        answers = {"answers": answers_of(row, "answer"), "dataset": "vg"}
        return Record(key, named(id=image_id), (), str(image_id), {**fields, **answers})

    return read_rows(rows, record)


def _pairs(key: str, row: Any) -> list[tuple[str, Any]]:
    pairs = row.get("qas") if isinstance(row, dict) else None
    if not isinstance(pairs, list):
        return [(key, Unreadable("it has no list 'qas'"))]
    return [(f"{key}.qas[{index}]", pair) for index, pair in enumerate(pairs)]


# ------------------------------------------------------------------------------------------------- captions of pictures


def read_coco_captions(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """COCO's captions_val2017.json and files like it, a record for each picture.

    Pictures lie in one folder, or in the folder that "coco_url" or the file name tells, such as val2017.
    """
    return _pictures(parsed, place, lambda row: {})


def read_nocaps(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """NoCaps (nocaps.org/download): as COCO's, with a domain for each picture; test files have no captions."""

    def domain(row: Row) -> dict[str, str]:
        found = optional_texts(row, "domain")
        if found and found["domain"] not in DOMAINS:
            raise wrong_field("domain", f"one of {', '.join(DOMAINS)}", found["domain"])
        return found

    return _pictures(parsed, place, domain)


def _pictures(parsed: Parsed, place: Place, fields: Callable[[Row], dict[str, str]]) -> list[Record]:
    images = parsed.rows_of("images")
    captions: dict[str, list[str]] = {str(row.get("id")): [] for row in objects(images)}

    def annotation(key: str, row: Row) -> None:
        image_id, caption = str(identifier(row, "image_id")), text(row, "caption")
        if image_id not in captions:
            raise ValueError(f"the picture {image_id} is not among 'images'")
        captions[image_id].append(caption)

    has_captions = parsed.top().get("annotations") is not None
    unusable = use_rows(parsed.rows_of("annotations") if has_captions else [], annotation)
    named = naming(place, ("{name}", "{folder}/{name}"), (_file_name(row) for row in objects(images)))

    def picture(key: str, row: Row) -> Record:
        image_id = str(identifier(row, "id"))
        path(row, "file_name")
        return Record(key, named(**_file_name(row)), tuple(captions[image_id]), image_id, fields(row))

    return [*read_rows(images, picture), *unusable]


def _file_name(row: Row) -> dict[str, str]:
    """Name and folder: val2017 of "http://.../val2017/42.jpg", val2014 of "COCO_val2014_42.jpg"."""
    name = str(row.get("file_name"))
    parts = name.split("_")
    folder = parts[1] if len(parts) == 3 else PurePosixPath(str(row.get("coco_url", ""))).parent.name
    return {"name": name, "folder": folder or "."}


def read_karpathy(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Karpathy's splits of COCO and Flickr30k, a record for each picture; `extra` has all but the sentences."""

    def record(key: str, row: Row) -> Record:
        folder = path(row, "filepath") if row.get("filepath") else ""
        image = place(str(PurePosixPath(folder, path(row, "filename"))))
        captions = captions_from([required(as_object(one), "raw")[1] for one in listed(row, "sentences")])
        image_id = str(identifier(row, "cocoid", "imgid"))
        extra = {name: value for name, value in row.items() if name != "sentences"}
        return Record(key, image, captions, image_id, extra)

    return read_rows(parsed.rows_of("images"), record)


# ------------------------------------------------------------------------------------------ statements, entailment


def read_nlvr2(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """NLVR2 (github.com/lil-lab/nlvr, nlvr2/README.md): statements about two pictures.

    The pictures of "dev-850-0-1" are "dev-850-0-img0.png" (left) and "dev-850-0-img1.png", which lie in one folder, or
    below dev, train/DIRECTORY, or images/train/DIRECTORY. `image_id` is that of the pair, "dev-850-0".
    """
    rows = parsed.rows()
    labelled = has_any(rows, "label")
    folders = ["", "{split}/"]
    if has_any(rows, "directory"):
        folders += ["{directory}/", "{split}/{directory}/", "images/{split}/{directory}/"]
    identifiers = ((row, str(row.get("identifier"))) for row in objects(rows))
    named = naming(place, [folder + "{pair}-img{side}.png" for folder in folders], starmap(_pair, identifiers))

    def record(key: str, row: Row) -> Record:
        name = text(row, "identifier")
        pair = _pair(row, name)
        images = [named(**{**pair, "side": side}) for side in (0, 1)]
        fields = {"images": images, "statement": text(row, "sentence"), "identifier": name}
        label = {"label": true_or_false(row, "label")} if labelled else {}
        return Record(key, None, (), pair["pair"], {**fields, **label})

    return read_rows(rows, record)


def _pair(row: Row, name: str) -> dict[str, Any]:
    pair = name.rpartition("-")[0]
    return {"pair": pair, "side": 0, "split": name.split("-")[0], "directory": str(row.get("directory"))}


def read_snli_ve(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """SNLI-VE (github.com/necla-ml/SNLI-VE): hypotheses about Flickr30k's pictures, with the premise in words."""
    rows = parsed.rows()
    names = (_flickr_name(row) for row in objects(rows))
    named = naming(place, ("{name}", "flickr30k-images/{name}"), ({"name": name} for name in names))

    def record(key: str, row: Row) -> Record:
        image_id = str(identifier(row, *_FLICKR_IDS))
        fields = {"hypothesis": text(row, "sentence2"), "label": entailment_label(row, "gold_label")}
        premise = {"premise": text(row, "sentence1")} if row.get("sentence1") else {}
        return Record(key, named(name=_flickr_name(row)), (), image_id.removesuffix(".jpg"), {**fields, **premise})

    return read_rows(rows, record)


def _flickr_name(row: Row) -> str:
    return with_suffix(next((str(row[name]) for name in _FLICKR_IDS if row.get(name)), ""))
