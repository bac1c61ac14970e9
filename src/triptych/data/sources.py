"""Sources of records: tar shards, and lists in JSON that refer to pictures.

| format | file | a record |
|---|---|---|
| "webdataset" | .tar, as img2dataset writes them | the members of one name: a picture, and a .json or .txt |
| "json" | .json, a list (mPLUG, ALBEF) | {"image": path, "caption": text or texts, "image_id": ...} |
| "jsonl" | .jsonl | the same, one object a line |
| "karpathy" | .json, {"images": [...]} | Karpathy's splits of COCO and Flickr30k |

Lists may be gzipped (.json.gz). What is missing or damaged as a whole is an error at once; a record that is
damaged is given with its `problem`, so that whoever decodes it can skip and count it.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol, get_args

import fsspec

from triptych.data.samples import Record, open_binary, read_bytes

Format = Literal["webdataset", "json", "jsonl", "karpathy"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LIST_SHARD = 1000
"""References in one virtual shard of a list."""

logger = logging.getLogger(__name__)


class Shard(Protocol):
    """A part of a source that is read at once."""

    @property
    def name(self) -> str:
        """Where it is, for messages; costs nothing."""

    def read(self) -> list[Record]:
        """All its records, damaged ones with their `problem`; ValueError or OSError if it is unreadable."""


@dataclass(frozen=True)
class TarShard:
    """A WebDataset tar; its records hold the encoded pictures."""

    name: str

    def read(self) -> list[Record]:
        samples: dict[str, dict[str, bytes]] = {}
        twice: set[str] = set()
        try:
            with tarfile.open(fileobj=BytesIO(read_bytes(self.name)), mode="r:") as archive:
                for member in archive:
                    stem, suffix = os.path.splitext(member.name)
                    suffix = suffix.lower()
                    if not member.isfile() or suffix not in (*IMAGE_SUFFIXES, ".json", ".txt"):
                        continue
                    file = archive.extractfile(member)
                    assert file is not None
                    sample = samples.setdefault(stem, {})
                    if suffix in sample:
                        twice.add(stem)
                    sample[suffix] = file.read()
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"the shard {self.name} is damaged: {error}") from error
        return [self._record(stem, sample, stem in twice) for stem, sample in samples.items()]

    def _record(self, stem: str, sample: Mapping[str, bytes], twice: bool) -> Record:
        key = f"{self.name}:{stem}"
        if twice:
            return _broken(key, "the shard has several members of this name")
        image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        try:
            values = json.loads(sample[".json"]) if ".json" in sample else {}
            captions = _captions(values)
            if not captions and ".txt" in sample:
                captions = _captions({"caption": sample[".txt"].decode("utf-8")})
        except (ValueError, RecursionError) as error:
            return _broken(key, str(error))
        extra = {name: value for name, value in values.items() if name not in _FIELDS}
        return Record(key, image, captions, str(values.get("image_id", key)), extra)


@dataclass(frozen=True)
class ListShard:
    """Records that refer to their pictures."""

    name: str
    records: tuple[Record, ...]

    def read(self) -> list[Record]:
        return list(self.records)


@dataclass(frozen=True)
class Source:
    """A data set as a list of shards.

    Attributes:
        shards: at least one.
    """

    shards: tuple[Shard, ...]

    @property
    def in_memory(self) -> bool:
        """True if all records are at hand, as references: reading them costs nothing."""
        return all(isinstance(shard, ListShard) for shard in self.shards)

    def __iter__(self) -> Iterator[Record]:
        """All usable records, in order; others are logged."""
        for shard in self.shards:
            for record in shard.read():
                if record.problem is None:
                    yield record
                else:
                    logger.warning("skipped %s: %s", record.key, record.problem)

    def count(self) -> int:
        """Number of usable records; reads all shards."""
        return sum(1 for _ in self)


def open_source(
    locations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: Format | None = None,
    image_root: str | os.PathLike[str] | None = None,
    splits: Sequence[str] | None = None,
) -> Source:
    """Opens a data set; see the table at the top of the file for the formats.

    Args:
        locations: one or more paths or fsspec URLs, with globs (*, ?, [abc]) and braces ({000..099}, {a,b}).
        format: guessed from each file if None.
        image_root: what the image paths of lists are relative to: a folder, a URL, or a tar file of pictures;
            by default the folder of the list. Paths from "/" and URLs stand as they are.
        splits: the splits of a Karpathy file to take, such as ("train", "restval"); all if None.

    Raises:
        FileNotFoundError: a file, or `image_root`, is missing, or a glob matches nothing.
        ValueError: an unreadable file, an unknown format or split, or no usable record.
    """
    given = [locations] if isinstance(locations, (str, os.PathLike)) else locations
    files = [file for location in given for file in expand(os.fspath(location))]
    if not files:
        raise ValueError("no location of a data set was given")
    root = None if image_root is None else os.fspath(image_root)
    if root is not None and "://" not in root and not os.path.exists(root):
        raise FileNotFoundError(f"the image root {root} does not exist")
    if format is not None and format not in get_args(Format):
        raise ValueError(f"unknown format {format!r}; there are {', '.join(get_args(Format))}")
    with ThreadPoolExecutor(16) as pool:  # a remote store may hold thousands of shards
        shards = [shard for part in pool.map(partial(_open, format, root, splits), files) for shard in part]
    if not shards:
        raise ValueError(f"the data set is empty: no usable record in {_some(files)}")
    return Source(tuple(shards))


def expand(location: str) -> list[str]:
    """The files that a location with braces and globs means, in order.

    A name that exists as it stands means itself, whatever characters it has. Braces name each file, so that a
    missing shard is noticed later; a glob that matches nothing is a FileNotFoundError here.
    """
    if _exists(location):
        return [location]
    return [file for name in _expand_braces(location) for file in _expand_glob(name)]


def _expand_braces(location: str) -> list[str]:
    if re.search(r"\{[^{}]*\{[^{}]*\}[^{}]*\}", location):
        raise ValueError(f"nested braces in {location}")
    match = re.search(r"\{([^{}]*)\}", location)
    if match is None or not re.search(r"\.\.|,", match[1]):
        return [location]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span is None:
        choices = match[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"the range {match[0]} of {location} is empty")
        choices = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    before, after = location[: match.start()], location[match.end() :]
    return [name for choice in choices for name in _expand_braces(before + choice + after)]


def _expand_glob(location: str) -> list[str]:
    if not re.search(r"[*?\[]", location) or _exists(location):
        return [location]
    if "://" in location:
        system, path = fsspec.core.url_to_fs(location)
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    else:
        found = sorted(glob.glob(location, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file matches {location}")
    return found


def _exists(location: str) -> bool:
    if "://" not in location:
        return os.path.exists(location)
    try:
        system, path = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {location}: {error}") from error
    return bool(system.exists(path))


def _open(format: Format | None, root: str | None, splits: Sequence[str] | None, file: str) -> list[Shard]:
    """The shards of one file, none if it is empty."""
    name = file.removesuffix(".gz")
    if format == "webdataset" or (format is None and file.endswith(".tar")):
        if splits is not None:
            raise ValueError(f"splits are for Karpathy files; {file} is a tar shard")
        return [TarShard(file)] if _probe_tar(file) else []
    if format is None and not name.endswith((".json", ".jsonl")):
        raise ValueError(f"cannot guess the format of {file}; give format= one of {', '.join(get_args(Format))}")
    text = _read_text(file)
    place = partial(_place, os.path.dirname(file) if root is None else root)
    if format == "jsonl" or (format is None and name.endswith(".jsonl")):
        records = _jsonl_records(file, text, place)
    else:
        content = _parse(file, text)
        if format == "karpathy" or (format is None and isinstance(content, dict) and "images" in content):
            return _cut(file, _karpathy_records(file, content, place, splits))
        if not isinstance(content, list):
            raise ValueError(f"{file} is neither a list of records nor a Karpathy file with 'images'")
        records = [_list_record(f"{file}:{index}", values, place) for index, values in enumerate(content)]
    if splits is not None:
        raise ValueError(f"splits are for Karpathy files; {file} is a list of records")
    return _cut(file, records)


def _cut(file: str, records: Sequence[Record]) -> list[Shard]:
    problems = [f"{record.key}: {record.problem}" for record in records if record.problem is not None]
    if problems:
        logger.warning("%d of %d records of %s are broken: %s", len(problems), len(records), file, _some(problems))
    if problems and len(problems) == len(records):
        raise ValueError(f"no usable record in {file}: {_some(problems)}")
    starts = range(0, len(records), LIST_SHARD)
    return [ListShard(f"{file}#{start}", tuple(records[start : start + LIST_SHARD])) for start in starts]


def _probe_tar(file: str) -> bool:
    """Whether the tar has a member; it reads only the first header."""
    try:
        with open_binary(file) as opened:
            header = opened.read(tarfile.BLOCKSIZE)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the shard {file} does not exist") from error
    except OSError as error:
        raise ValueError(f"the shard {file} cannot be read: {error}") from error
    if len(header) == tarfile.BLOCKSIZE and not header.strip(b"\0"):
        return False
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise ValueError(f"{file} is not a tar file: {error}") from error
    return True


def _read_text(file: str) -> str:
    try:
        content = read_bytes(file)
        return (gzip.decompress(content) if file.endswith(".gz") else content).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the file {file} does not exist") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _parse(file: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _jsonl_records(file: str, text: str, place: Callable[[str], str]) -> list[Record]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        key = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            records.append(_broken(key, f"not JSON: {error}"))
        else:
            records.append(_list_record(key, values, place))
    return records


_FIELDS = frozenset({"caption", "captions", "image_id"})


def _list_record(key: str, values: Any, place: Callable[[str], str]) -> Record:
    """A record of a JSON list. `extra["images"]`, the pictures of NLVR2, are placed like `image`."""
    try:
        captions = _captions(values)
        image = values.get("image")
        if image is not None and not isinstance(image, str):
            raise ValueError(f"'image' must be a path, got {image!r}")
        extra = {name: value for name, value in values.items() if name not in _FIELDS}
        if isinstance(extra.get("images"), list):
            extra["images"] = [place(name) for name in extra["images"]]
    except (ValueError, TypeError) as error:
        return _broken(key, str(error))
    placed = None if image is None else place(image)
    return Record(key, placed, captions, str(values.get("image_id", placed or key)), extra)


def _karpathy_records(
    file: str, content: Any, place: Callable[[str], str], splits: Sequence[str] | None
) -> list[Record]:
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{file} is not a Karpathy file: it has no list 'images'")
    pictures = content["images"]
    known = {str(picture.get("split")) for picture in pictures if isinstance(picture, dict)}
    if splits is not None and not set(splits) <= known:
        raise ValueError(f"{file} has the splits {', '.join(sorted(known))}, not {', '.join(splits)}")
    records = []
    for index, picture in enumerate(pictures):
        key = f"{file}:{index}"
        try:
            if splits is not None and picture["split"] not in splits:
                continue
            image = place(str(PurePosixPath(picture.get("filepath", ""), picture["filename"])))
            captions = _captions({"captions": [sentence["raw"] for sentence in picture["sentences"]]})
            image_id = str(picture["cocoid"] if "cocoid" in picture else picture["imgid"])
        except KeyError as error:
            records.append(_broken(key, f"the field {error} is missing"))
        except (ValueError, TypeError, AttributeError) as error:
            records.append(_broken(key, str(error)))
        else:
            extra = {name: value for name, value in picture.items() if name != "sentences"}
            records.append(Record(key, image, captions, image_id, extra))
    return records


def _captions(values: Any) -> tuple[str, ...]:
    """The captions of a JSON object, without empty ones."""
    if not isinstance(values, dict):
        raise ValueError(f"not a JSON object but {str(values)[:60]!r}")
    texts = values.get("captions", values.get("caption"))
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("the caption is neither a text nor a list of texts")
    return tuple(text.strip() for text in texts if text.strip())


def _place(root: str, image: str) -> str:
    if "://" in image or os.path.isabs(image) or not root:
        return image
    if root.endswith(".tar"):
        return f"{root}:{image}"
    return f"{root.rstrip('/')}/{image}"


def _broken(key: str, problem: str) -> Record:
    return Record(key, None, (), key, {}, problem)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
