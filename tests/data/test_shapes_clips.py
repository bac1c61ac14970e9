"""Clips of the Shapes world as files: lossless videos, and lists that are read back as any data set is.

What the captions and questions about the motion say is judged in ``test_shapes.py``, where texts are judged.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triptych.data import shapes, shapes_clips
from triptych.data.check import check
from triptych.data.pictures import show
from triptych.data.samples import Record
from triptych.data.shapes import Object, Scene, ShapesConfig, Split
from triptych.data.shapes_clips import Clip, clip, write_clips
from triptych.data.sources import open_source
from triptych.data.transforms import FrameChoice, Preprocessing
from triptych.data.video import read_frames

pytest.importorskip("av", reason="writing videos needs PyAV")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
PHRASE = (
    r"(?:the |an? )?(?:(small|large) )?(?:(red|green|blue|yellow|purple|orange) )?(object|circle|square|triangle|star)"
)
CROWDED = ShapesConfig(max_objects=8)


def made(count: int, split: Split = Split.TEST, config: ShapesConfig | None = None, frames: int = 2) -> list[Clip]:
    """The clips that are written, with the default seed and 32 pixels."""
    scenes = [shapes.generate_scene(0, index, split, config) for index in range(count)]
    return [clip(scene, frames, shapes.scene_generator(0, scene.index, split, 3), 32) for scene in scenes]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is said of the scene ------------------------------------------------------------------------------


def find(phrase: str, scene: Scene) -> list[Object]:
    match = re.fullmatch(PHRASE, phrase.removesuffix("s"))
    assert match, phrase
    size, colour, noun = match.groups()
    return [
        item
        for item in scene.objects
        if size in (None, item.size) and colour in (None, item.colour) and noun in ("object", item.shape)
    ]


def judge(text: str, scene: Scene) -> str:
    """The answer by (size, colour, shape) alone, so that it holds wherever the objects are."""
    if match := re.fullmatch(r"how many (.+) are there", text):
        return NUMBERS[len(find(match[1], scene))]
    if match := re.fullmatch(r"what (colour|shape|size) is (.+)", text):
        (item,) = find(match[2], scene)
        return str(getattr(item, match[1]))
    if match := re.fullmatch(r"is there (.+)", text):
        true = bool(find(match[1], scene))
    elif match := re.fullmatch(r"are there more (.+) than (.+)", text):
        true = len(find(match[1], scene)) > len(find(match[2], scene))
    elif match := re.fullmatch(r"is (.+) larger than (.+)", text):
        (one,), (other,) = find(match[1], scene), find(match[2], scene)
        true = one.radius > 1.3 * other.radius
    else:
        match = re.fullmatch(r"is (the .+?) (?:a )?(\w+)", text)
        assert match, text
        (item,) = find(match[1], scene)
        true = match[2] in item.kind
    return "yes" if true else "no"


def test_questions_for_image_models_have_one_answer_in_all_frames() -> None:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for one in made(500) + made(100, Split.COMPOSITIONS, CROWDED):
        for question in one.scene_questions:
            assert judge(question.text, one.scene) == question.answer, (question, one.scene)
            answers[question.kind][question.answer] += 1
    kinds = {"existence", "colour", "shape", "size", "count", "comparison", "verification"}
    assert set(answers) == kinds
    assert min(counts.total() for counts in answers.values()) > 150
    assert all(0.4 < counts["yes"] / counts.total() < 0.6 for counts in answers.values() if "yes" in counts)


def test_captions_for_image_models_name_the_objects_alone() -> None:
    elsewhere = "|".join((*shapes.PLACES, *shapes.DIRECTIONS, "above", "below", "moves?", "stays?"))
    for one in made(100) + made(100, Split.COMPOSITIONS, CROWDED):
        assert len(one.scene_captions) == 3
        for text in one.scene_captions:
            assert shapes.names_exactly(text, one.scene)
            assert not re.search(rf"\b({elsewhere})\b", text), text
    (one,) = made(1)
    named = " and ".join(f"a {' '.join(item.kind)}" for item in one.scene.objects)
    assert one.scene_captions[:2] == (named, f"there is {named}")


# --- files --------------------------------------------------------------------------------------------------


def test_videos_are_the_clips_without_loss(tmp_path: Path) -> None:
    config = ShapesConfig(min_objects=2, max_objects=4)
    files = write_clips(tmp_path, Split.TEST, 12, frames=5, size=32, config=config)
    assert [path.name for path in files] == ["clips-test.tar", "clips-test.jsonl", "clip-questions-test.jsonl"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for row, one in zip(rows_of(files.captions), made(12, config=config, frames=5), strict=True):
        assert row["video"] == f"clips-test.tar:{one.scene.index:09d}.mkv"
        frames = read_frames(f"{tmp_path}/{row['video']}", 5, "k")
        assert np.array_equal(np.stack(frames), one.frames_THWC)
        assert row["captions"] == list(one.captions)
        assert row["scene_captions"] == list(one.scene_captions)
        assert [tuple(item.values()) for item in row["objects"]] == [
            (*item.kind, item.place) for item in one.scene.objects
        ]
        moving = one.scene.objects[row["mover"]]
        assert row["captions"][0].startswith(f"a {' '.join(moving.kind)} moves {row['direction']}")
        assert row["captions"][1].startswith(
            f"a {' '.join(moving.kind)} moves from the {moving.place} to the {one.end_place}"
        )
        assert row["end_place"] == one.end_place


@pytest.mark.parametrize("size", [33, 128])
def test_any_size_is_without_loss(size: int) -> None:
    one = clip(shapes.generate_scene(1, 2, Split.TRAIN), 20, np.random.default_rng(0), size)
    frames = read_frames(shapes_clips.encode_video(one.frames_THWC), 20, "k")
    assert np.array_equal(np.stack(frames), one.frames_THWC)


def test_a_question_a_line(tmp_path: Path) -> None:
    files = write_clips(tmp_path, Split.TRAIN, 9, frames=2, size=32)
    rows = rows_of(files.questions)
    expected = [(one, q) for one in made(9, Split.TRAIN) for q in (*one.scene_questions, *one.questions)]
    assert len(expected) > 100
    for row, (one, question) in zip(rows, expected, strict=True):
        assert row["video"] == f"clips-train.tar:{one.scene.index:09d}.mkv"
        assert (row["question"], row["answer"], row["kind"]) == (question.text, question.answer, question.kind)
    assert len({row["question_id"] for row in rows}) == len(rows)
    assert all(question.kind == "motion" for one in made(9, Split.TRAIN) for question in one.questions)


def shown(record: Record) -> torch.Tensor:
    return show(record, Preprocessing(32).test_transform(), FrameChoice(4))


def test_lists_are_read_as_any_data_set(tmp_path: Path) -> None:
    files = write_clips(tmp_path, Split.TEST, 3, frames=4, size=32)
    pixels = [torch.from_numpy(one.frames_THWC).permute(0, 3, 1, 2) for one in made(3, frames=4)]
    clips, asked = list(open_source(files.captions)), list(open_source(files.questions))
    for record, one, pixels_TCHW in zip(clips, made(3, frames=4), pixels, strict=True):
        assert torch.equal(shown(record), pixels_TCHW)
        assert record.captions == one.captions
        assert record.extra["scene_captions"] == list(one.scene_captions)
    assert {record.extra["video"] for record in asked} == {record.extra["video"] for record in clips}
    for record, row in zip(asked, rows_of(files.questions), strict=True):
        assert [record.extra[name] for name in ("question", "answers", "kind", "question_id")] == [
            row["question"],
            [row["answer"]],
            row["kind"],
            row["question_id"],
        ]
    assert torch.equal(shown(asked[-1]), pixels[-1])
    found = check([str(files.captions), str(files.questions)])
    assert list(found["formats"].values()) == ["videos", "video_questions"]
    assert (found["videos"], found["captions"], found["questions"]) == (3, 9, len(asked))
    assert (found["missing"], found["broken"]) == (0, 0)


def test_clips_are_identical_on_rewriting(tmp_path: Path) -> None:
    once, again, other = (
        [path.read_bytes() for path in write_clips(tmp_path / name, Split.TRAIN, 4, size=32, seed=seed)]
        for name, seed in (("once", 1), ("again", 1), ("other", 2))
    )
    assert once == again
    assert all(one != two for one, two in zip(once, other, strict=True))


def test_clips_are_kept_when_all_files_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_clips(tmp_path, Split.TRAIN, 3, frames=2, size=32, show_progress=True)
    err = capsys.readouterr().err
    assert "3/3" in err
    assert "clips/s" in err
    contents = [path.read_bytes() for path in files]
    files.videos.write_bytes(b"kept")
    assert write_clips(tmp_path, Split.TRAIN, 3, frames=2, size=32, keep=True, show_progress=True) == files
    assert files.videos.read_bytes() == b"kept"
    assert capsys.readouterr().err == ""
    files.questions.unlink()
    write_clips(tmp_path, Split.TRAIN, 3, frames=2, size=32, keep=True)
    assert [path.read_bytes() for path in files] == contents
    files.videos.write_bytes(b"replaced")
    write_clips(tmp_path, Split.TRAIN, 3, frames=2, size=32)
    assert [path.read_bytes() for path in files] == contents


def test_a_broken_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_clips(tmp_path, Split.TRAIN, 2, frames=2, size=32)
    contents = [path.read_bytes() for path in files]

    def fail(frames_THWC: np.ndarray) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr(shapes_clips, "encode_video", fail)
    with pytest.raises(OSError, match="disk full"):
        write_clips(tmp_path, Split.TRAIN, 4, frames=2, size=32)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert [path.read_bytes() for path in files] == contents


def test_distinct_clips_show_different_objects(tmp_path: Path) -> None:
    one = ShapesConfig(max_objects=1)
    files = write_clips(tmp_path, Split.TEST, 6, frames=2, size=32, config=one, distinct=True)
    rows = rows_of(files.captions)
    assert len({row["scene_captions"][0] for row in rows}) == 6 == len(rows)
    assert rows[-1]["video"] > "clips-test.tar:000000005.mkv"  # or there would be nothing to leave out
    with pytest.raises(ValueError, match="found only 6 of 7"):
        write_clips(tmp_path / "more", Split.TEST, 7, frames=2, size=32, config=one, distinct=True)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"frames": 1}, {"size": 8}, {"seed": -1}])
def test_arguments_of_write_clips_are_checked(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be|at least"):
        write_clips(tmp_path, Split.TRAIN, **{"count": 2, "frames": 2, "size": 32, **wrong})
    assert not list(tmp_path.iterdir())


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"triptych-vl\[video\]"):
        write_clips(tmp_path, Split.TRAIN, 2)
    assert not list(tmp_path.iterdir())
