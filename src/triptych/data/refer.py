"""Readers of the referring-expression data sets: RefCOCO, RefCOCO+, RefCOCOg, ReferItGame and Flickr30k Entities.

Two layouts, both lists of phrases with a box each:

- REFER's (github.com/lichengunc/refer): a pickle `refs(unc).p`, `refs(google).p` or `refs(umd).p` of all splits, beside
  an `instances.json` in COCO's format with boxes and file names;
- TransVG's (github.com/djiajunustc/TransVG), which mPLUG reads: a `.pth` for each split, such as `unc/unc_testA.pth`.

A record is one phrase: its `extra` has "phrase", "box_xyxy" (left, top, right, bottom in pixels of the picture),
"split", "ref_id" (what is referred to) and "sent_id" (the phrase). Nothing in these files is ever run: unpickling makes
plain values only, and anything else is an error.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Any

import numpy as np
import torch

from triptych.data.samples import Record, read_bytes

Place = Callable[[str], str]
"""From a picture's name in a file to its location."""

_LIST_NAME = re.compile(r"(?P<data_set>.+)_(?P<split>trainval|train|val|testA|testB|test)\.pth")
_XYWH = {"unc": True, "unc+": True, "gref": True, "gref_umd": True, "referit": False, "flickr": False}
"""TransVG's data sets (RefCOCO, RefCOCO+, RefCOCOg twice, ReferItGame, Flickr30k): are boxes xywh, or else xyxy?"""


def read_refer(
    location: str,
    instances: str | None,
    place: Place,
    splits: Sequence[str] | None = None,
    *,
    whole_pixels: bool = False,
) -> list[Record]:
    """The phrases of a REFER data set, in the order of the file.

    Args:
        location: the pickle; or a local folder with exactly one `refs(...).p`.
        instances: the `instances.json`; if None, the one beside the pickle.
        place: makes a location of a file name of `instances.json` ("COCO_train2014_000000581857.jpg").
        splits: RefCOCO and RefCOCO+ have train, val, testA, testB; RefCOCOg has train, val and, by "umd", test. All if
            None.
        whole_pixels: cut the numbers of boxes down to whole pixels, as TransVG and mPLUG do, for targets and results
            that are exactly theirs.

    Returns:
        one record a phrase; those that cannot be used have a `problem`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unreadable file, one that would run code, or an unknown split.
    """
    file = _refs_file(location)
    refs = load_plain_pickle(file)
    if not isinstance(refs, list):
        raise ValueError(f"{file} is not a list of references but a {type(refs).__name__}")
    known = {str(ref["split"]) for ref in refs if isinstance(ref, dict) and "split" in ref}
    if splits is not None and not set(splits) <= known:
        raise ValueError(f"{file} has the splits {', '.join(sorted(known))}, not {', '.join(splits)}")
    if instances is None:
        instances = os.path.join(os.path.dirname(file), "instances.json")
    reader = _RefReader(_Instances.read(instances), place, splits, whole_pixels)
    return [record for index, ref in enumerate(refs) for record in reader.records(f"{file}:{index}", ref)]


def read_transvg(path: str, place: Place, xywh: bool | None = None, *, whole_pixels: bool = False) -> list[Record]:
    """The phrases of one of TransVG's lists, in its order.

    An entry is (file name, name of a mask, box, phrase, attributes) or, for Flickr30k, (file name, box, phrase).
    "sent_id" is its place in the list; "ref_id" the mask's name without suffix (for the RefCOCO family "482127", an
    annotation of COCO), or else the place again; "split" None where the file's name does not say it.

    Args:
        path: a `.pth`; a name such as "unc+_testA.pth" says the data set and the split.
        place: makes a location of a file name of the list.
        xywh: whether boxes are left, top, width, height (the RefCOCO family), or left, top, right, bottom (ReferItGame,
            Flickr30k); if None, the name says it.
        whole_pixels: as in `read_refer`.

    Returns and raises as `read_refer` does; ValueError also where `xywh` is None and the name says nothing.
    """
    name = _LIST_NAME.fullmatch(os.path.basename(path))
    if xywh is None:
        xywh = _XYWH.get(name["data_set"]) if name else None
    if xywh is None:
        raise ValueError(f"the name of {path} does not say how it writes boxes (as unc_val.pth does): give xywh")
    split = name["split"] if name else None
    entries = _load_torch_list(path)
    return [
        _transvg_record(f"{path}:{index}", index, entry, place, split, xywh, whole_pixels)
        for index, entry in enumerate(entries)
    ]


# ---------------------------------------------------------------------------------------------------- plain pickles

# By the name in the pickle, of Python 2 or 3. All are built-in types, which cannot be altered by an unpickler either.
_PLAIN_TYPES: Mapping[tuple[str, str], type] = {
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): bytes,  # how Python 3 writes bytes for Python 2: encode(text, "latin1")
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        try:
            return _PLAIN_TYPES[module, name]
        except KeyError:
            full_name = f"{module}.{name}"
            raise pickle.UnpicklingError(f"it tries to load {full_name!r}, which is no plain value") from None


def load_plain_pickle(file: str) -> Any:
    """What a pickle of plain values holds: containers, texts, numbers, bytes, None; texts of Python 2 are UTF-8.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no pickle, is cut short, or holds anything else, such as code to run.
    """
    content = BytesIO(_read(file))
    try:
        return _PlainUnpickler(content, encoding="utf-8", errors="replace").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{file} is not a pickle of plain values: {error or type(error).__name__}") from error


# ------------------------------------------------------------------------------------------------------------ REFER


@dataclass(frozen=True)
class _Instances:
    """COCO's annotations: file names and boxes by id."""

    file: str
    pictures: Mapping[Any, Any]
    annotations: Mapping[Any, Any]

    @classmethod
    def read(cls, file: str) -> _Instances:
        text = _read(file)
        try:
            content = json.loads(text)
            tables = [{entry["id"]: entry for entry in content[name]} for name in ("images", "annotations")]
        except KeyError as error:
            raise ValueError(f"{file} is not a file of COCO annotations: the field {error} is missing") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is not a file of COCO annotations: {error}") from error
        return cls(file, *tables)

    def file_name(self, image_id: Any) -> str:
        name = self._find(self.pictures, image_id, "image").get("file_name")
        if not isinstance(name, str):
            raise ValueError(f"{self.file} has no file name for the image {image_id}")
        return name

    def box_xywh(self, annotation_id: Any, image_id: Any) -> Any:
        annotation = self._find(self.annotations, annotation_id, "annotation")
        if annotation.get("image_id", image_id) != image_id:
            raise ValueError(f"the annotation {annotation_id} of {self.file} is of another image than {image_id}")
        return annotation.get("bbox")

    def _find(self, table: Mapping[Any, Any], number: Any, what: str) -> Any:
        if not isinstance(number, int | str) or number not in table:
            raise ValueError(f"{self.file} has no {what} {reprlib.repr(number)}")
        return table[number]


@dataclass(frozen=True)
class _RefReader:
    instances: _Instances
    place: Place
    splits: Sequence[str] | None
    whole_pixels: bool

    def records(self, key: str, ref: Any) -> list[Record]:
        """A record for each phrase of a reference; none if it is of another split."""
        try:
            if not isinstance(ref, dict):
                raise ValueError(f"a reference must be a dictionary, got {reprlib.repr(ref)}")
            if self.splits is not None and ref["split"] not in self.splits:
                return []
            image_id = ref["image_id"]
            image = self.place(self.instances.file_name(image_id))
            box = _corners(self.instances.box_xywh(ref["ann_id"], image_id), True, self.whole_pixels)
            common = {"box_xyxy": box, "split": ref["split"], "ref_id": ref["ref_id"]}
            sentences = list(ref["sentences"])
        except KeyError as error:
            return [_broken(key, f"the field {error} is missing")]
        except (ValueError, TypeError, OverflowError) as error:
            return [_broken(key, str(error))]
        return [
            self._record(f"{key}.{number}", sentence, image, str(image_id), common)
            for number, sentence in enumerate(sentences)
        ]

    def _record(self, key: str, sentence: Any, image: str, image_id: str, common: Mapping[str, Any]) -> Record:
        try:
            phrase = _phrase(sentence["sent"])
            return Record(key, image, (), image_id, {"phrase": phrase, **common, "sent_id": sentence["sent_id"]})
        except KeyError as error:
            return _broken(key, f"the field {error} is missing")
        except (ValueError, TypeError, OverflowError) as error:
            return _broken(key, str(error))


def _refs_file(location: str) -> str:
    if not os.path.isdir(location):
        return location
    found = sorted(name for name in os.listdir(location) if re.fullmatch(r"refs\(.+\)\.p", name))
    if not found:
        raise FileNotFoundError(f"the folder {location} has no refs(...).p")
    if len(found) > 1:
        raise ValueError(f"the folder {location} has several reference files; give one of {', '.join(found)}")
    return os.path.join(location, found[0])


# ---------------------------------------------------------------------------------------------------------- TransVG

# Flickr30k's boxes are NumPy arrays, which torch refuses unless told not to; plain numbers in an array run nothing.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ARRAY_GLOBALS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),  # as NumPy 1 writes it
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(letter)) for letter in "bhilqBHILQefd"},
]
_safe_globals_lock = Lock()  # torch's list of them is one for all threads


def _load_torch_list(path: str) -> list[Any]:
    content = BytesIO(_read(path))
    try:
        with _safe_globals_lock, torch.serialization.safe_globals(_ARRAY_GLOBALS):
            entries = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise nearly anything
        refused = re.search(r"(?:GLOBAL|class) '?([\w.]+)", str(error))
        # torch's own text goes on for a page, and advises to switch the protection off.
        reason = f"tries to load {refused[1]}, which is no plain value" if refused else "is damaged or of another kind"
        raise ValueError(f"{path} is not one of TransVG's lists: it {reason}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not one of TransVG's lists but a {type(entries).__name__}")
    return entries


def _transvg_record(
    key: str, index: int, entry: Any, place: Place, split: str | None, xywh: bool, whole_pixels: bool
) -> Record:
    try:
        if not isinstance(entry, tuple | list) or len(entry) not in (3, 5):
            raise ValueError(f"an entry must have 5 parts, or 3 in Flickr30k's lists, got {reprlib.repr(entry)}")
        name, mask, box, phrase = entry[:4] if len(entry) == 5 else (entry[0], None, *entry[1:])
        if not isinstance(name, str):
            raise ValueError(f"the file name must be a text, got {reprlib.repr(name)}")
        extra = {
            "phrase": _phrase(phrase),
            "box_xyxy": _corners(box, xywh, whole_pixels),
            "split": split,
            "ref_id": index if mask is None else os.path.splitext(str(mask))[0],
            "sent_id": index,
        }
    except (ValueError, OverflowError) as error:
        return _broken(key, str(error))
    image = place(name)
    return Record(key, image, (), image, extra)


# ------------------------------------------------------------------------------------------------------------- both


def _corners(box: Any, xywh: bool, whole_pixels: bool) -> list[float]:
    """Four numbers of a file as left, top, right, bottom."""
    if isinstance(box, np.ndarray):
        box = box.tolist()
    if not isinstance(box, tuple | list) or len(box) != 4 or not all(isinstance(number, int | float) for number in box):
        raise ValueError(f"the box must be four numbers, got {reprlib.repr(box)}")
    if not all(map(math.isfinite, box)):
        raise ValueError(f"the box must be four finite numbers, got {box}")
    left, top, right, bottom = (float(math.trunc(number)) if whole_pixels else float(number) for number in box)
    if xywh:
        right, bottom = left + right, top + bottom
    if right <= left or bottom <= top:
        raise ValueError(f"the box {list(box)} has no area")
    return [left, top, right, bottom]


def _phrase(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the phrase must be a text, got {reprlib.repr(text)}")
    return text.strip()


def _read(file: str) -> bytes:
    try:
        return read_bytes(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the file {file} does not exist") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _broken(key: str, problem: str) -> Record:
    return Record(key, None, (), key, {}, problem)
