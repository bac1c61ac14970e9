"""Sources of records: tar shards, annotation files that refer to pictures or videos, and labelled pictures and texts.

| format | file | a record |
|---|---|---|
| "webdataset" | .tar, as img2dataset writes them | the members of one name: a picture, and a .json or .txt |
| "arrow" | .arrow (BridgeTower) | see `triptych.data.arrow` |
| "refer" | refs(...).p, or the folder of one with its instances.json (RefCOCO, RefCOCO+, RefCOCOg) | a phrase |
| "transvg" | .pth, TransVG's lists of the same and of ReferItGame and Flickr30k | a phrase |
| "glue" | .tsv, GLUE's and others with its columns | a text or two, with a label and without a picture |
| "cifar" | the folder of an official archive (`triptych.data.cifar`) | a picture with a label |
| "json" | .json | by what is in it: see the tables of `triptych.data.official` and `triptych.data.lists` |
| "jsonl" | .jsonl, an object a line | the same |

Annotation files may be gzipped (.json.gz). What is missing or damaged as a whole is an error at once; a record that is
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, Protocol

import fsspec

from triptych.data.cifar import is_cifar, open_cifar
from triptych.data.fields import Parsed, Unreadable, broken, captions_of, exists
from triptych.data.glue import read_glue
from triptych.data.official import LAYOUTS, Layout, recognise
from triptych.data.samples import Record, open_binary, read_bytes

_SUFFIXES = {".tar": "webdataset", ".arrow": "arrow", ".p": "refer", ".pth": "transvg", ".tsv": "glue"}
FORMATS = (*_SUFFIXES.values(), "cifar", "json", "jsonl", *(layout.name for layout in LAYOUTS))
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
            return broken(key, "the shard has several members of this name")
        image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        try:
            values = json.loads(sample[".json"]) if ".json" in sample else {}
            captions = captions_of(values)
            if not captions and ".txt" in sample:
                captions = captions_of({"caption": sample[".txt"].decode("utf-8")})
        except (ValueError, RecursionError) as error:
            return broken(key, str(error))
        extra = {name: value for name, value in values.items() if name not in ("caption", "captions", "image_id")}
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
        formats: of each file; one of `FORMATS`, but what is in it rather than "json" or "jsonl".
    """

    shards: tuple[Shard, ...]
    formats: Mapping[str, str] = field(default_factory=dict)

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

    @property
    def size(self) -> int | None:
        """Number of records, unusable ones included, where they are all at hand."""
        return sum(1 for shard in self.shards for _ in shard.read()) if self.in_memory else None

    def count(self) -> int:
        """Number of usable records; reads all shards."""
        return sum(1 for _ in self)


def open_source(
    locations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    format: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    splits: Sequence[str] | None = None,
) -> Source:
    """Opens a data set; see the table at the top of the file for the formats.

    Args:
        locations: one or more paths or fsspec URLs, with globs (*, ?, [abc]) and braces ({000..099}, {a,b}). Files that
            complete each other, such as VQA's questions and annotations, are given together.
        format: of `FORMATS`; told from each file if None. "json" and "jsonl" say only how a file is written, the others
            what is in it; files that complete others are told from them all the same.
        image_root: what the paths of pictures and videos are relative to: a folder, a URL, or a tar file of pictures;
            by default the folder of the file. Paths from "/" and URLs stand as they are.
        splits: the splits to take of a file whose records name theirs, such as ("train", "restval") of Karpathy's;
            all if None.

    Raises:
        FileNotFoundError: a file, or `image_root`, is missing, or a glob matches nothing.
        ValueError: an unreadable file, an unknown format or split, files that need others, or no usable record.
    """
    given = [locations] if isinstance(locations, (str, os.PathLike)) else locations
    files = [file for location in given for file in expand(os.fspath(location))]
    if not files:
        raise ValueError("no location of a data set was given")
    root = None if image_root is None else os.fspath(image_root)
    if root is not None and "://" not in root and not os.path.exists(root):
        raise FileNotFoundError(f"the image root {root} does not exist")
    if format is not None and format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    with ThreadPoolExecutor(16) as pool:  # a remote store may hold thousands of shards
        opened = list(pool.map(partial(_open, format, root, splits), files))
    shards = [shard for one in opened for shard in _complete(one, opened, root, splits)]
    if not shards:
        raise ValueError(f"the data set is empty: no usable record in {_some(files)}")
    return Source(tuple(shards), {one.file: one.format for one in opened})


def expand(location: str) -> list[str]:
    """The files that a location with braces and globs means, in order.

    A name that exists as it stands means itself, whatever characters it has. Braces name each file, so that a
    missing shard is noticed later; a glob that matches nothing is a FileNotFoundError here.
    """
    if exists(location):
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
    if not re.search(r"[*?\[]", location) or exists(location):
        return [location]
    if "://" in location:
        system, path = fsspec.core.url_to_fs(location)
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    else:
        found = sorted(glob.glob(location, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file matches {location}")
    return found


@dataclass(frozen=True)
class _Opened:
    """A file that was opened, and its shards or, if other files complete it or it completes others, its content."""

    file: str
    format: str
    shards: Sequence[Shard] = ()
    parsed: Parsed | None = None


def _open(format: str | None, root: str | None, splits: Sequence[str] | None, file: str) -> _Opened:
    kind = format or _written_as(file)
    if kind in ("webdataset", "arrow") and splits is not None:
        raise ValueError(f"{_NO_SPLITS}; {file} is a {'tar shard' if kind == 'webdataset' else 'table'}")
    if kind == "webdataset":
        return _Opened(file, kind, [TarShard(file)] if _probe_tar(file) else [])
    if kind == "arrow":
        from triptych.data.arrow import open_arrow  # here, since it imports this module

        return _Opened(file, kind, open_arrow(file))
    if kind in ("refer", "transvg"):
        from triptych.data.refer import read_refer, read_transvg  # here, since it imports torch

        place = partial(_place, os.path.dirname(file) if root is None else root)
        records = read_refer(file, None, place) if kind == "refer" else read_transvg(file, place)
        return _Opened(file, kind, _cut(file, _of_splits(file, records, splits)))
    if kind == "cifar":
        return _Opened(file, kind, open_cifar(file, splits))
    if kind == "glue":
        return _Opened(file, kind, _cut(file, _of_splits(file, read_glue(file, _read_text(file)), splits)))
    parsed = _parse(file, format)
    layout = _layout(parsed, format)
    if layout.read is None or layout.partner:
        return _Opened(file, layout.name, parsed=parsed)
    return _Opened(file, layout.name, _read(layout, parsed, (), root, splits))


def _written_as(file: str) -> str | None:
    """The format that a name tells; what is in JSON and text files is told by the content."""
    if is_cifar(file):
        return "cifar"
    told = next((kind for suffix, kind in _SUFFIXES.items() if file.endswith(suffix)), None)
    return "refer" if told is None and os.path.isdir(file) else told


def _complete(
    one: _Opened, opened: Sequence[_Opened], root: str | None, splits: Sequence[str] | None
) -> Sequence[Shard]:
    """The shards of a file, now that all others are at hand too."""
    if one.parsed is None:
        return one.shards
    layout = _BY_NAME[one.format]
    if layout.read is not None:
        partners = [other.parsed for other in opened if other.format == layout.partner and other.parsed is not None]
        return _read(layout, one.parsed, partners, root, splits)
    needed = next(other.name for other in LAYOUTS if other.partner == one.format)
    if all(other.format != needed for other in opened):
        raise ValueError(f"{one.file} ({one.format}) only completes another file: give that ({needed}) too")
    return ()


def _read(
    layout: Layout, parsed: Parsed, partners: Sequence[Parsed], root: str | None, splits: Sequence[str] | None
) -> Sequence[Shard]:
    assert layout.read is not None
    place = partial(_place, os.path.dirname(parsed.file) if root is None else root)
    return _cut(parsed.file, _of_splits(parsed.file, layout.read(parsed, place, partners), splits))


_BY_NAME = {layout.name: layout for layout in LAYOUTS}
_NO_SPLITS = "splits are for Karpathy files and others whose records name theirs"


def _layout(parsed: Parsed, format: str | None) -> Layout:
    found = recognise(parsed.content)
    if format in _BY_NAME and not (found is not None and found.name == _BY_NAME[format].partner):
        return _BY_NAME[format]
    if found is not None:
        return found
    fields = list(parsed.content)[:5] if isinstance(parsed.content, dict) else []
    content = f"an object with the fields {', '.join(map(repr, fields))}" if fields else "no list of records"
    raise ValueError(f"cannot tell the format of {parsed.file}: it is {content}; formats are {', '.join(FORMATS)}")


def _of_splits(file: str, records: list[Record], splits: Sequence[str] | None) -> list[Record]:
    """The records of these splits, and broken ones that name none."""
    if splits is None:
        return records
    known = {str(record.extra["split"]) for record in records if "split" in record.extra}
    if not known:
        raise ValueError(f"{_NO_SPLITS}; those of {file} do not")
    if not set(splits) <= known:
        raise ValueError(f"{file} has the splits {', '.join(sorted(known))}, not {', '.join(splits)}")
    return [
        record
        for record in records
        if str(record.extra.get("split")) in splits or (record.problem is not None and "split" not in record.extra)
    ]


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


def _parse(file: str, format: str | None) -> Parsed:
    """The content of a file of JSON, JSON lines, or text."""
    name = file.removesuffix(".gz")
    if format is None and not name.endswith((".json", ".jsonl", ".txt")):
        raise ValueError(f"cannot guess the format of {file}; give format= one of {', '.join(FORMATS)}")
    text = _read_text(file)
    is_json = format in ("json", "jsonl") or name.endswith((".json", ".jsonl")) or text.lstrip().startswith(("{", "["))
    if not is_json:
        return _rows(file, [(number, line.strip()) for number, line in _lines(text) if not line.startswith("#")])
    if format == "jsonl" or (format != "json" and name.endswith(".jsonl")):
        return _json_lines(file, text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if format != "json" and isinstance(_json_line(text.lstrip().split("\n", 1)[0]), dict):
            return _json_lines(file, text)  # as NLVR2's .json files are
        raise ValueError(f"{file} is not JSON: {error}") from error
    if isinstance(content, list):
        return _rows(file, list(enumerate(content)))
    is_one_line = recognise(content) is None and recognise([content]) is not _BY_NAME["captions"]
    return _json_lines(file, text) if is_one_line and isinstance(content, dict) else Parsed(file, content)


def _json_lines(file: str, text: str) -> Parsed:
    return _rows(file, [(number, _json_line(line)) for number, line in _lines(text)])


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"not JSON: {error}")


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _rows(file: str, rows: Sequence[tuple[int, Any]]) -> Parsed:
    return Parsed(file, [row for _, row in rows], [f"{file}:{number}" for number, _ in rows])


def _place(root: str, image: str) -> str:
    if "://" in image or os.path.isabs(image) or not root:
        return image
    if root.endswith(".tar"):
        return f"{root}:{image}"
    return f"{root.rstrip('/')}/{image}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
