"""Reading a whole data set to see what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from triptych.data.fields import exists
from triptych.data.samples import BrokenSample, Record, load_image
from triptych.data.sources import open_source

_LISTED = 20
_EXAMPLES = 3
_MISSING_LISTED = 5
_COUNTED = ("captions", "questions", "answers", "phrases", "boxes", "statements", "hypotheses", "texts", "labels")
_SHOWN = (
    *("question", "answers", "phrase", "box_xyxy", "statement", "hypothesis", "premise", "label"),
    *("text", "text_pair", "images", "video", "domain"),
)
_PLAIN = (str, bool, int, float, list)


def check(
    data: Sequence[str],
    image_root: str | None = None,
    splits: Sequence[str] | None = None,
    format: str | None = None,
) -> dict[str, Any]:
    """Decode every picture, look for every video, and count.

    Returns:
        "formats" of the first files; the numbers of "shards", "records" and "broken" ones, of different "pictures" that
        could be decoded and "videos" that are there, of "captions", "questions", "answers", "phrases", "boxes",
        "statements", "hypotheses", "texts" and "labels" of all records that are well formed, also if their picture is
        missing, and of "missing" pictures and videos; "first_missing" locations; "first_broken", a key and a reason
        each; the "smallest" and "largest" picture, (width, height); and "examples" of records.

    Raises:
        FileNotFoundError, ValueError: as `open_source`.
    """
    source = open_source(tuple(data), format=format, image_root=image_root, splits=splits)
    media, counts = _Media(), Counter[str]()
    broken: list[dict[str, str]] = []
    examples: list[dict[str, Any]] = []
    for record in (record for shard in source.shards for record in shard.read()):
        counts["records"] += 1
        if record.problem is None:
            counts.update(_counts(record))
            if len(examples) < _EXAMPLES:
                examples.append(_example(record))
        try:
            media.look(record)
        except BrokenSample as error:
            counts["broken"] += 1
            if len(broken) < _LISTED:
                broken.append({"key": error.key, "reason": error.reason})
    return {
        "formats": dict(islice(source.formats.items(), _LISTED)),
        "shards": len(source.shards),
        "records": counts["records"],
        "pictures": len(media.sizes),
        "videos": media.videos,
        **{name: counts[name] for name in _COUNTED},
        "missing": len(media.missing),
        "first_missing": media.missing[:_MISSING_LISTED],
        "broken": counts["broken"],
        "first_broken": broken,
        "smallest": min(media.sizes, default=None),
        "largest": max(media.sizes, default=None),
        "examples": examples,
    }


@dataclass
class _Media:
    """Pictures and videos as they are met; what several records share is looked at once.

    Attributes:
        sizes: (width, height) of each picture.
        missing: locations where nothing is.
        problems: of each location, or None.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    videos: int = 0
    missing: list[str] = field(default_factory=list)
    problems: dict[str, str | None] = field(default_factory=dict)

    def look(self, record: Record) -> None:
        """Look at all that a record shows; BrokenSample with the first reason not to use it."""
        if record.problem is not None:
            raise BrokenSample(record.key, record.problem)
        video, pair = record.extra.get("video"), record.extra.get("images")
        if isinstance(video, str):
            problems = [self._once(video, self._video)]
        elif record.image is None and isinstance(pair, list):
            problems = [self._once(image, self._picture) for image in pair]
        elif record.image is None and isinstance(record.extra.get("text"), str):  # of texts alone
            problems = []
        else:
            problems = [self._once(record.image, self._picture)]
        problem = next(filter(None, problems), None)
        if problem is not None:
            raise BrokenSample(record.key, problem)

    def _once(self, shown: Any, look: Callable[[Any], str | None]) -> str | None:
        """What is wrong with a picture or video, looked at only if it was not met before."""
        if not isinstance(shown, str):
            return look(shown)
        if shown not in self.problems:
            self.problems[shown] = look(shown)
        return self.problems[shown]

    def _picture(self, image: bytes | str | None) -> str | None:
        if image is None:
            return "the record has no image"
        try:
            self.sizes.append(load_image(image, "").size)
        except BrokenSample as error:
            if isinstance(image, str) and not _is_there(image):
                self.missing.append(image)
            return error.reason
        return None

    def _video(self, video: str) -> str | None:
        if _is_there(video):
            self.videos += 1
            return None
        self.missing.append(video)
        return f"there is no video {video!r}"


def _is_there(location: str) -> bool:
    try:
        return exists(location)
    except ValueError:  # a protocol that is unknown here
        return False


def _counts(record: Record) -> dict[str, int]:
    questions, phrases = _parts(record, "question", "questions"), _parts(record, "phrase", "phrases")
    return {
        "captions": len(record.captions),
        "questions": len(questions),
        "answers": sum(_answer_count(question) for question in questions),
        "phrases": len(phrases),
        "boxes": sum("box_xyxy" in phrase for phrase in phrases),
        "statements": len(_parts(record, "statement", "statements")),
        "hypotheses": len(_parts(record, "hypothesis", "entailment")),
        "texts": sum(name in record.extra for name in ("text", "text_pair")),
        "labels": int("label" in record.extra),
    }


def _parts(record: Record, one: str, several: str) -> list[Mapping[str, Any]]:
    """The record's `extra` if it is one such thing, and those of a list, which the built-in world's shards have."""
    listed = record.extra.get(several)
    parts = listed if isinstance(listed, list) else []
    own = [record.extra] if one in record.extra else []
    return [*own, *(part for part in parts if isinstance(part, dict))]


def _answer_count(question: Mapping[str, Any]) -> int:
    answers = question.get("answers", question.get("answer", []))
    return len(answers) if isinstance(answers, list) else 1


def _example(record: Record) -> dict[str, Any]:
    shown = {name: record.extra[name] for name in _SHOWN if isinstance(record.extra.get(name), _PLAIN)}
    return {"image_id": record.image_id, "captions": list(record.captions), **shown}
