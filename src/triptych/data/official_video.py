"""Readers of the video data sets: MSR-VTT, VATEX, MSVD, and questions about their clips.

A record has the clip's location in `extra["video"]` and no picture. Official files name clips without a suffix: it is
the one that the user's clips have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from triptych.data.fields import (
    Parsed,
    Place,
    Row,
    broken,
    captions_from,
    has_any,
    identifier,
    naming,
    objects,
    path,
    read_rows,
    split_of,
    text,
    use_rows,
)
from triptych.data.lists import QUESTION_FIELDS, list_record, question_fields
from triptych.data.samples import Record

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")

_CLIP_LINE = re.compile(r"(\S+_\d+_\d+)\s+(\S.*)")
_MAPPING_LINE = re.compile(r"(\S+_\d+_\d+)\s+vid(\d+)")


def read_videos(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Rows with "video" or "clip_name" and captions; the list of MSR-VTT's 1k-A test set is one."""
    rows = parsed.rows()
    locate = _clips(place, (row.get("video", row.get("clip_name")) for row in objects(rows)))

    def record(key: str, row: Row) -> Record:
        fields = {"video": locate(path(row, "video", "clip_name"))}
        return list_record(key, row, None, fields, ("clip_name",))

    return read_rows(rows, record)


def read_video_questions(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """Rows {"question", "answer", "video_id" or "video", "id" or "question_id"}: MSRVTT-QA, MSVD-QA, and users' lists.

    Where "video_id" is a number, clips are "video42" (MSR-VTT) or "vid42" (MSVD), by what lies there; or, with MSVD's
    youtube_mapping.txt as partner, the clips have the names that it gives.
    """
    rows = parsed.rows()
    answered = has_any(rows, "answers", "answer")
    clip_of = {number: clip for partner in partners for clip, number in _mapping(partner)}
    locate = _clips(place, (row.get("video", row.get("video_id")) for row in objects(rows)), clip_of)

    def record(key: str, row: Row) -> Record:
        named = row if row.get("question_id") is not None else {**row, "question_id": row.get("id")}
        fields = {"video": locate(identifier(row, "video", "video_id")), **question_fields(key, named, answered)}
        return list_record(key, row, None, fields, ("video_id", "id", *QUESTION_FIELDS))

    return read_rows(rows, record)


def read_msrvtt(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """MSR-VTT's videodatainfo: {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}."""
    videos = parsed.rows_of("videos")
    captions: dict[str, list[str]] = {str(row.get("video_id")): [] for row in objects(videos)}

    def sentence(key: str, row: Row) -> None:
        clip, caption = text(row, "video_id"), text(row, "caption")
        if clip not in captions:
            raise ValueError(f"the video {clip!r} is not among 'videos'")
        captions[clip].append(caption)

    unusable = use_rows(parsed.rows_of("sentences"), sentence)
    locate = _clips(place, (row.get("video_id") for row in objects(videos)))

    def record(key: str, row: Row) -> Record:
        clip = text(row, "video_id")
        return Record(key, None, tuple(captions.get(clip, ())), clip, {"video": locate(clip), **split_of(row)})

    return [*read_rows(videos, record), *unusable]


def read_vatex(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """VATEX: rows {"videoID", "enCap": English captions}; test sets have no captions."""
    rows = parsed.rows()
    locate = _clips(place, (row.get("videoID") for row in objects(rows)))

    def record(key: str, row: Row) -> Record:
        clip = text(row, "videoID")
        return Record(key, None, captions_from(row.get("enCap")), clip, {"video": locate(clip)})

    return read_rows(rows, record)


def read_msvd(parsed: Parsed, place: Place, partners: Sequence[Parsed] = ()) -> list[Record]:
    """MSVD's AllVideoDescriptions.txt: lines "clip caption", where a clip is "mv89psg6zh4_33_46"; a record a clip."""
    matches = [(key, _CLIP_LINE.fullmatch(str(line))) for key, line in parsed.rows()]
    captions: dict[str, list[str]] = {}
    keys: dict[str, str] = {}
    for key, match in matches:
        if match is not None:
            captions.setdefault(match[1], []).append(match[2].strip())
            keys.setdefault(match[1], key)
    locate = _clips(place, captions)
    records = [
        Record(keys[clip], None, tuple(texts), clip, {"video": locate(clip)}) for clip, texts in captions.items()
    ]
    return records + [broken(key, "not a clip and a caption") for key, match in matches if match is None]


# -------------------------------------------------------------------------------------------------- names of clips


def _clips(place: Place, clips: Iterable[Any], clip_of: Mapping[int, str] | None = None) -> Callable[[int | str], str]:
    """Locations of clips: names as they are if they have a suffix; others and numbers by what lies there."""
    known = [clip for clip in clips if isinstance(clip, int | str)]
    if clip_of:
        known = [clip_of[clip] for clip in known if isinstance(clip, int) and clip in clip_of]
    numbers = any(isinstance(clip, int) for clip in known)
    stems = ("video{clip}", "vid{clip}", "{clip}") if numbers else ("{clip}",)
    templates = [stem + suffix for stem in stems for suffix in (*VIDEO_SUFFIXES, "")]
    named = naming(place, templates, ({"clip": clip} for clip in known if not _has_suffix(clip)))

    def locate(clip: int | str) -> str:
        if clip_of and isinstance(clip, int):
            if clip not in clip_of:
                raise ValueError(f"the mapping of MSVD's clips has no vid{clip}")
            clip = clip_of[clip]
        return place(str(clip)) if _has_suffix(clip) else named(clip=clip)

    return locate


def _has_suffix(clip: int | str) -> bool:
    """Whether a name ends like ".mp4" or ".mpeg"; ids may hold points too, as in "bP5KfdFJzC4_660.0_810.0"."""
    return re.fullmatch(r"\.[A-Za-z]\w{1,3}", PurePosixPath(str(clip)).suffix) is not None


def _mapping(parsed: Parsed) -> list[tuple[str, int]]:
    """Clip and number of each line of MSVD's youtube_mapping.txt: "mv89psg6zh4_33_46 vid1"."""
    matches = [(key, _MAPPING_LINE.fullmatch(str(line).strip())) for key, line in parsed.rows()]
    wrong = next((key for key, match in matches if match is None), None)
    if wrong is not None:
        raise ValueError(f"{wrong}: not a clip and its number, such as 'mv89psg6zh4_33_46 vid1'")
    return [(match[1], int(match[2])) for _, match in matches if match is not None]


# ------------------------------------------------------------------------------------- what a row of a list is


def is_video(row: Row) -> bool:
    """Whether a row of a list is a video with captions."""
    return ("video" in row or "clip_name" in row) and "question" not in row and "image" not in row


def is_video_question(row: Row) -> bool:
    """Whether a row of a list is a question about a video."""
    return ("video" in row or "video_id" in row) and "question" in row and "image" not in row


def is_clip_line(line: str) -> bool:
    """Whether a line of text is of MSVD's captions."""
    return _CLIP_LINE.fullmatch(line) is not None and not is_mapping_line(line)


def is_mapping_line(line: str) -> bool:
    """Whether a line of text is of MSVD's mapping of clips to numbers."""
    return _MAPPING_LINE.fullmatch(line.strip()) is not None
