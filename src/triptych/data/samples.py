"""One sample schema for all sources, the decoding of its picture, and caption cleaning."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Pictures that claim more pixels than this are refused before they are decoded (decompression bombs)."""

_INDEXED = 1_000_000
"""Files of tars whose places are kept in memory, about 200 bytes each."""
_indices: dict[str, dict[str, tuple[int, int]]] = {}
"""What `read_index` gave for each tar, the oldest first."""


class BrokenSample(ValueError):  # noqa: N818 - it names the sample, and loaders skip it rather than fail
    """A record that cannot be used; the message begins with the record's key."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)  # both in args, so that it survives the way back from a worker process
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """One record of a source, not yet decoded.

    Attributes:
        key: where it comes from, for messages: "shard.tar:member" or "file.json:17".
        image: encoded bytes; or a path, a URL, or "file.tar:member", read when it is decoded; or None.
        captions: none, one or more texts of the picture.
        image_id: the same for all records of one picture.
        extra: everything else the source says (boxes, questions, answers...).
        problem: why the record cannot be used; `decode_image` raises it.
    """

    key: str
    image: bytes | str | None
    captions: tuple[str, ...]
    image_id: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


def decode_image(record: Record) -> Image.Image:
    """The record's picture as an upright 8-bit RGB image.

    Raises:
        BrokenSample: the record has a problem or no picture, or its picture cannot be read or decoded.
    """
    if record.problem is not None:
        raise BrokenSample(record.key, record.problem)
    if record.image is None:
        raise BrokenSample(record.key, "the record has no image")
    return load_image(record.image, record.key)


def load_image(image: bytes | str, key: str) -> Image.Image:
    """Encoded bytes, or a location of them (see `Record.image`), as an upright 8-bit RGB image.

    The EXIF orientation is applied; transparent pixels are laid on white; 16-bit grey is scaled to 8 bits.

    Raises:
        BrokenSample: naming `key`, when the bytes cannot be read or decoded, are cut short, or claim more
            than `MAX_PIXELS`.
    """
    try:
        encoded = read_bytes(image) if isinstance(image, str) else image
    except (OSError, ValueError) as error:
        raise BrokenSample(key, f"cannot read {image!r}: {error}") from error
    try:
        opened = Image.open(BytesIO(encoded))
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise BrokenSample(key, f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
        opened.load()
        _turn_upright(opened)
        return _to_rgb(opened)
    except BrokenSample:
        raise
    except UnidentifiedImageError as error:
        raise BrokenSample(key, "the image is of no known format") from error
    except Exception as error:  # Pillow's decoders raise nearly any exception on damaged bytes
        raise BrokenSample(key, f"cannot decode the image: {error!r}") from error


def read_bytes(location: str) -> bytes:
    """The content of a path, of an fsspec URL, or of "file.tar:member".

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: the protocol of the URL is unknown.
    """
    tar, found, member = location.partition(".tar:")
    if found:
        return _read_member(tar + ".tar", member)
    with open_binary(location) as file:
        return bytes(file.read())


def open_binary(location: str) -> Any:
    """An open binary file for a path or an fsspec URL."""
    if "://" in location:
        return fsspec.open(location, "rb").open()
    return open(location, "rb")


def _read_member(tar: str, member: str) -> bytes:
    members = _members(tar)
    if member not in members:
        raise FileNotFoundError(f"{tar} has no member {member!r}")
    offset, size = members[member]
    with open_binary(tar) as file:
        file.seek(offset)
        return bytes(file.read(size))


def _members(tar: str) -> dict[str, tuple[int, int]]:
    """As `read_index`, but kept: lists name the files of many tars in any order."""
    members = _indices.get(tar)
    if members is None:
        members = _indices[tar] = read_index(tar)
        # First in, first out: an order of use would need a lock, which a forked worker could find closed for ever.
        while len(_indices) > 1 and sum(map(len, list(_indices.values()))) > _INDEXED:
            _indices.pop(next(iter(list(_indices))), None)
    return members


def read_index(tar: str) -> dict[str, tuple[int, int]]:
    """Name of each file of a tar -> (offset, size) of its bytes; OSError if it is not there or no tar."""
    try:
        with open_binary(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            return {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}
    except tarfile.TarError as error:
        raise OSError(f"{tar} is not a readable tar file: {error}") from error


def _turn_upright(image: Image.Image) -> None:
    # The pixels are already decoded: damaged EXIF data, of any kind, is no reason to lose them.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats; `convert` would clip it at 255, that is to white."""
    grey_HW = np.asarray(image).astype(np.float64)
    largest = grey_HW.max(initial=0)
    if image.mode == "F":
        limit = 1.0 if largest <= 1 else 255.0
    else:
        limit = 255.0 if largest <= 255 and image.mode == "I" else 65535.0
    scaled_HW = np.nan_to_num(grey_HW / limit * 255).clip(0, 255)
    return Image.fromarray(scaled_HW.round().astype(np.uint8))


_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_RUNS = re.compile(r"\s{2,}")


Cleaning = Literal["words", "lower", "none"]
"""What is done to a caption: :func:`pre_caption`; lower case (captions to generate, caption_mplug.py); or nothing."""


def clean_caption(text: str, cleaning: Cleaning, max_words: int = 30) -> str:
    """A caption, cleaned and cut after `max_words` words."""
    if cleaning == "words":
        return pre_caption(text, max_words)
    text = text.lower() if cleaning == "lower" else text
    words = text.split()
    return text.strip() if cleaning == "none" and len(words) <= max_words else " ".join(words[:max_words])


def pre_caption(text: str, max_words: int = 30) -> str:
    """A caption cleaned as ALBEF and mPLUG do it (`pre_caption` in their dataset/utils.py).

    Lower case; , . ' ! ? " ( ) * # : ; ~ removed; hyphens and slashes become spaces; "<person>" (in
    Conceptual Captions) becomes "person"; runs of white space become one space; cut after `max_words` words.
    """
    text = _DROPPED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = _RUNS.sub(" ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


_TEXTS = ("question", "answer", "answers", "phrase", "text", "text_pair", "statement", "hypothesis", "premise")
_LISTS = ("questions", "phrases", "entailment")


def all_texts(record: Record) -> list[str]:
    """Everything a record says in words: captions, questions and answers, phrases, statements, hypotheses.

    What a vocabulary is trained on, so that it serves every task.
    """
    found = list(record.captions)
    parts = [record.extra, *(part for name in _LISTS for part in _dictionaries(record.extra.get(name)))]
    for part in parts:
        for name in _TEXTS:
            value = part.get(name)
            found += [value] if isinstance(value, str) else map(str, value) if isinstance(value, list) else []
    return found


def _dictionaries(value: Any) -> list[Mapping[str, Any]]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []
