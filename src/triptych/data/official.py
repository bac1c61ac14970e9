"""The official annotation files of the field's data sets, and how files are recognised by what is in them.

| format | file | a row |
|---|---|---|
| "vqa_v2" | {"questions": [...], "data_subtype"} | question_id, image_id, question |
| "vqa_v2_annotations" | {"annotations": [...]}, together with its questions | question_id, answers: [{"answer"}] |
| "gqa" | {question id: {...}} | imageId, question, answer |
| "visual_genome_qa" | [...] (question_answers.json) | id, qas: [{"qa_id", "question", "answer"}] |
| "coco_captions" | {"images": [...], "annotations": [...]} | id, file_name; image_id, caption |
| "nocaps" | the same, annotations perhaps missing | the same, open_images_id, domain |
| "karpathy" | {"images": [...]} (COCO, Flickr30k) | filename, filepath, split, sentences: [{"raw"}] |
| "nlvr2" | JSON lines | identifier, sentence, label |
| "snli_ve" | JSON lines | Flickr30K_ID or Flikr30kID, sentence1, sentence2, gold_label |
| "msrvtt" | {"videos": [...], "sentences": [...]} | video_id, split; video_id, caption |
| "vatex" | [...] | videoID, enCap: [caption] |
| "msvd_captions" | text (AllVideoDescriptions.txt) | clip caption |
| "video_questions" | [...] (MSRVTT-QA, MSVD-QA) | video_id or video, question, answer, id |
| "msvd_mapping" | text (youtube_mapping.txt), together with MSVD-QA's questions | clip vid42 |
| "videos" | [...] (MSR-VTT's 1k-A list) | clip_name or video, caption |
| "questions", "grounding", "statements", "entailment", "captions" | [...] | see `triptych.data.lists` |

Lists may be JSON or JSON lines. What becomes of the rows is the same for all, see docs/data.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from triptych.data import lists, official_images, official_video
from triptych.data.fields import Parsed, Place, Row
from triptych.data.samples import Record

VQA_ANSWERS, MSVD_CLIPS = "vqa_v2_annotations", "msvd_mapping"

_LOOKED_AT = 100
"""Rows of a list that tell what it is."""

Reader = Callable[[Parsed, Place, Sequence[Parsed]], list[Record]]
"""(file, place, files read together with it) -> records; ValueError if the file as a whole is not what it should be."""


@dataclass(frozen=True)
class Layout:
    """One kind of file.

    Attributes:
        matches: whether parsed content is of this kind.
        read: the records; None if such a file only completes others.
        partner: the format of the files that complete this one.
    """

    name: str
    matches: Callable[[Any], bool]
    read: Reader | None
    partner: str = ""


def recognise(content: Any) -> Layout | None:
    """The first layout that parsed content (an object, or a list of rows or lines) is of, or None."""
    return next((layout for layout in LAYOUTS if layout.matches(content)), None)


def _is_object(**rows: str) -> Callable[[Any], bool]:
    """Whether content is an object with these lists, and most of their rows have these fields (see `_has`)."""

    def matches(content: Any) -> bool:
        return isinstance(content, dict) and all(
            isinstance(content.get(name), list) and _mostly(content[name], _has(fields))
            for name, fields in rows.items()
        )

    return matches


def _is_list(is_row: Callable[[Row], bool]) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, list) and _mostly(content, is_row)


def _is_lines(is_line: Callable[[str], bool]) -> Callable[[Any], bool]:
    def matches(content: Any) -> bool:
        lines = content[:_LOOKED_AT] if isinstance(content, list) else []
        known = [isinstance(line, str) and is_line(line) for line in lines]
        return sum(known) * 2 > len(known)

    return matches


def _has(fields: str) -> Callable[[Row], bool]:
    """Whether a row has all of the fields; of "a|b" one is enough."""
    needed = [names.split("|") for names in fields.split()]
    return lambda row: all(any(name in row for name in names) for names in needed)


def _mostly(rows: Sequence[Any], is_one: Callable[[Row], bool]) -> bool:
    """Whether most of the first rows that are objects are such."""
    known = [is_one(row) for row in rows[:_LOOKED_AT] if isinstance(row, dict)]
    return sum(known) * 2 > len(known)


def _is_coco(is_nocaps: bool) -> Callable[[Any], bool]:
    """Whether content is an object with pictures and, unless it is a test set, annotations that are captions."""

    def is_image(row: Row) -> bool:
        return "file_name" in row and ("open_images_id" in row) == is_nocaps

    def matches(content: Any) -> bool:
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            return False
        annotations = content.get("annotations") or []
        captions = isinstance(annotations, list) and (not annotations or _mostly(annotations, _has("caption")))
        return captions and _mostly(content["images"], is_image)

    return matches


def _is_karpathy(content: Any) -> bool:
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and (not images or _mostly(images, _has("filename")))


def _is_gqa(content: Any) -> bool:
    return isinstance(content, dict) and _mostly(list(islice(content.values(), _LOOKED_AT)), _has("imageId question"))


def _is_captions(content: Any) -> bool:
    """Whether content is a list of anything but texts, also an empty one: what is left."""
    return isinstance(content, list) and not (content and all(isinstance(row, str) for row in content))


LAYOUTS = (
    Layout("vqa_v2", _is_object(questions="question_id image_id question"), official_images.read_vqa_v2, VQA_ANSWERS),
    Layout(VQA_ANSWERS, _is_object(annotations="question_id answers"), None),
    Layout("gqa", _is_gqa, official_images.read_gqa),
    Layout("visual_genome_qa", _is_list(_has("qas")), official_images.read_visual_genome_qa),
    Layout("coco_captions", _is_coco(is_nocaps=False), official_images.read_coco_captions),
    Layout("nocaps", _is_coco(is_nocaps=True), official_images.read_nocaps),
    Layout("karpathy", _is_karpathy, official_images.read_karpathy),
    Layout("nlvr2", _is_list(_has("identifier sentence left_url|right_url")), official_images.read_nlvr2),
    Layout("snli_ve", _is_list(_has("sentence2 gold_label Flickr30K_ID|Flikr30kID")), official_images.read_snli_ve),
    Layout("msrvtt", _is_object(videos="video_id", sentences="video_id caption"), official_video.read_msrvtt),
    Layout("vatex", _is_list(_has("videoID")), official_video.read_vatex),
    Layout("msvd_captions", _is_lines(official_video.is_clip_line), official_video.read_msvd),
    Layout(
        "video_questions", _is_list(official_video.is_video_question), official_video.read_video_questions, MSVD_CLIPS
    ),
    Layout(MSVD_CLIPS, _is_lines(official_video.is_mapping_line), None),
    Layout("videos", _is_list(official_video.is_video), official_video.read_videos),
    Layout("questions", _is_list(lists.is_question), lists.read_questions),
    Layout("grounding", _is_list(lists.is_phrase), lists.read_grounding),
    Layout("statements", _is_list(lists.is_statement), lists.read_statements),
    Layout("entailment", _is_list(lists.is_hypothesis), lists.read_entailment),
    Layout("captions", _is_captions, lists.read_captions),
)
