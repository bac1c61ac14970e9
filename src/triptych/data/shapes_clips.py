"""Clips of Shapes scenes, in which one object moves.

`clip` moves an object of a scene. `write_clips` writes videos, a list of captions and one of questions: about the
motion, and those that images are asked too, for models that have seen images alone.

Shape legend: T frames, H height, W width, C colour channels (RGB).
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from triptych.data.shapes import ShapesConfig, distinct_scenes, generate_scene, scene_generator
from triptych.data.shapes_language import (
    DIRECTIONS,
    NUMBERS,
    Question,
    pick,
    questions,
    toss,
    unique_descriptions,
)
from triptych.data.shapes_render import GRID, PLACES, Object, Scene, Split, draw, render_background
from triptych.data.video import import_av
from triptych.data.writing import add_member, replacing, replacing_tar
from triptych.progress import progress

FRAMES_PER_SECOND = 8

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A short video in which one object moves into a free neighbouring cell and everything else stays.

    Attributes:
        scene: the first frame.
        frames_THWC: the frames.
        mover: the position of the moving object in `scene.objects`.
        direction: one of `DIRECTIONS`.
        end_place: where the moving object ends.
        captions: three paraphrases; each names every object once and says what moves where.
        scene_captions: three paraphrases that name the objects without places, which is true of every frame.
        questions: about the motion, of kind "motion".
        scene_questions: about the scene, as `questions` asks them of images; the answer is the same for every frame.
    """

    scene: Scene
    frames_THWC: NDArray[np.uint8]
    mover: int
    direction: str
    end_place: str
    captions: tuple[str, ...]
    scene_captions: tuple[str, ...]
    questions: tuple[Question, ...]
    scene_questions: tuple[Question, ...]


class ClipFiles(NamedTuple):
    """What `write_clips` writes."""

    videos: Path
    captions: Path
    questions: Path


def clip(scene: Scene, frames: int, rng: np.random.Generator, size: int = 64) -> Clip:
    """Let an object of `scene` move left, right, up or down by one cell.

    Args:
        scene: the first frame.
        frames: how many frames, at least 2.
        rng: chooses the object, the direction and the questions.
        size: width and height in pixels, 32 to 512.

    Raises:
        ValueError: if `frames` or `size` is out of range.
    """
    if frames < 2:
        raise ValueError(f"a clip needs at least 2 frames, not {frames}")
    mover, direction = _choose_move(scene, rng)
    item, (step_x, step_y) = scene.objects[mover], _STEPS[direction]
    empty_HWC = render_background(scene.background, size)
    for position, other in enumerate(scene.objects):
        if position != mover:
            draw(empty_HWC, other)
    frames_THWC = np.stack([empty_HWC] * frames)
    for number, frame_HWC in enumerate(frames_THWC):
        way = number / (frames - 1) / GRID
        draw(frame_HWC, dataclasses.replace(item, x=item.x + step_x * way, y=item.y + step_y * way))
    end_place = PLACES[item.cell + step_x + GRID * step_y]
    return Clip(
        scene,
        frames_THWC,
        mover,
        direction,
        end_place,
        captions=_captions(scene, item, direction, end_place),
        scene_captions=_scene_captions(scene),
        questions=_motion_questions(scene, item, direction, end_place, rng),
        scene_questions=_scene_questions(scene, rng),
    )


def _choose_move(scene: Scene, rng: np.random.Generator) -> tuple[int, str]:
    """A direction in which something can move, then an object that can: directions are nearly balanced."""
    taken = {item.cell for item in scene.objects}
    movers: dict[str, list[int]] = {}
    for direction, (step_x, step_y) in _STEPS.items():
        for position, item in enumerate(scene.objects):
            inside = 0 <= item.column + step_x < GRID and 0 <= item.row + step_y < GRID
            if inside and item.cell + step_x + GRID * step_y not in taken:
                movers.setdefault(direction, []).append(position)
    direction = pick(rng, list(movers))
    return pick(rng, movers[direction]), direction


def _captions(scene: Scene, item: Object, direction: str, end_place: str) -> tuple[str, ...]:
    name = f"a {' '.join(item.kind)}"
    others = [f"a {' '.join(other.kind)}" for other in scene.objects if other is not item]
    still = f" while {' and '.join(others)} {'stays' if len(others) == 1 else 'stay'} still" if others else ""
    return (
        f"{name} moves {direction}{still}",
        f"{name} moves from the {item.place} to the {end_place}{still}",
        f"{name} starts at the {item.place} and ends at the {end_place}{still}",
    )


def _scene_captions(scene: Scene) -> tuple[str, ...]:
    named = " and ".join(f"a {' '.join(item.kind)}" for item in scene.objects)
    counted = " and ".join(
        f"{NUMBERS[count]} {' '.join(kind)}{'s' if count > 1 else ''}" for kind, count in scene.kinds.items()
    )
    return named, f"there is {named}", counted


def _motion_questions(
    scene: Scene, item: Object, direction: str, end_place: str, rng: np.random.Generator
) -> tuple[Question, ...]:
    found = [
        ("what moves", " ".join(item.kind)),
        ("what colour is the moving object", item.colour),
        ("what shape is the moving object", item.shape),
        ("which way does the moving object go", direction),
        ("where does the moving object start", item.place),
        ("where does the moving object end", end_place),
    ]
    wrong = pick(rng, [other for other in DIRECTIONS if other != direction])
    asked = toss(rng)
    found.append((f"does the moving object go {direction if asked else wrong}", "yes" if asked else "no"))
    names = {other: unique_descriptions(scene, other) for other in scene.objects}
    still = [other for other in scene.objects if other is not item and names[other]]
    if names[item] and still:
        asked = toss(rng)
        name = pick(rng, names[item] if asked else names[pick(rng, still)])
        found.append((f"does the {name.text()} move", "yes" if asked else "no"))
    return tuple(Question(text, answer, "motion") for text, answer in found)


def _scene_questions(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """Those that name no place and no relation: nothing else changes when an object moves."""
    return tuple(
        question
        for question in questions(scene, rng)
        if question.kind not in ("position", "relation") and " at the " not in question.text
    )


# --- files --------------------------------------------------------------------------------------------------


def write_clips(
    folder: str | Path,
    split: Split,
    count: int,
    *,
    frames: int = 8,
    size: int = 64,
    seed: int = 0,
    config: ShapesConfig | None = None,
    distinct: bool = False,
    keep: bool = False,
    show_progress: bool = False,
) -> ClipFiles:
    """Write clips of the first `count` scenes of `split`, with captions and questions.

    - `clips-<split>.tar` holds the videos: `000000007.mkv` begins with scene 7 and is encoded without loss (FFV1).
    - `clips-<split>.jsonl`, a line a clip: "video" (its location), "captions" (of the motion), "scene_captions"
      (without motion and places), "objects" (at the start), "mover" (which of them moves), "direction", "end_place".
    - `clip-questions-<split>.jsonl`, a line a question: "video", "question_id", "question", "answer" and "kind". Kind
      "motion" asks about the motion; all others are what images are asked too, and have the same answer for any frame.

    What is written depends on the arguments and PyAV's version alone. The files appear under their names when complete.

    Args:
        folder: where to write; made if missing.
        split: which scenes.
        count: how many clips, at least 1.
        frames: of a clip, at least 2.
        size: width and height in pixels, 32 to 512.
        seed: which world.
        config: how many objects a scene; by default 1 to 3.
        distinct: leave out scenes with the same objects as an earlier one, wherever they are, and go on until there are
            `count`: for retrieval with one right answer, also by "scene_captions".
        keep: leave the files as they are if all are there already; they must be of the same arguments. By default they
            are replaced.
        show_progress: show a progress bar with rate and remaining time on stderr.

    Raises:
        ValueError: if an argument is out of range, or there are not so many distinct scenes.
        ImportError: PyAV is missing.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    name = f"clips-{split}"
    files = ClipFiles(
        *(Path(folder) / file for file in (f"{name}.tar", f"{name}.jsonl", f"clip-questions-{split}.jsonl"))
    )
    if keep and all(path.exists() for path in files):
        return files
    with (
        progress(f"clips {split}", count, unit="clips", shown=show_progress) as advance,
        replacing(files.questions) as question_list,
        replacing(files.captions) as caption_list,
        replacing_tar(files.videos) as tar,
    ):
        for scene in _scenes(split, count, seed, config, distinct):
            made = clip(scene, frames, scene_generator(seed, scene.index, split, purpose=3), size)
            video = f"{scene.index:09d}.mkv"
            add_member(tar, video, encode_video(made.frames_THWC))
            location = f"{files.videos.name}:{video}"
            caption_list.write(_line(_caption_row(made, location)))
            question_list.writelines(map(_line, _question_rows(made, location)))
            advance()
    return files


def _scenes(split: Split, count: int, seed: int, config: ShapesConfig | None, distinct: bool) -> Iterator[Scene]:
    if distinct:
        yield from distinct_scenes(
            split, count, seed=seed, config=config, key=lambda scene: frozenset(scene.kinds.items())
        )
    else:
        yield from (generate_scene(seed, index, split, config) for index in range(count))


def _caption_row(made: Clip, video: str) -> dict[str, Any]:
    return {
        "video": video,
        "captions": made.captions,
        "scene_captions": made.scene_captions,
        "objects": [
            {"size": item.size, "colour": item.colour, "shape": item.shape, "place": item.place}
            for item in made.scene.objects
        ],
        "mover": made.mover,
        "direction": made.direction,
        "end_place": made.end_place,
    }


def _question_rows(made: Clip, video: str) -> Iterator[dict[str, Any]]:
    for number, question in enumerate((*made.scene_questions, *made.questions)):
        yield {
            "video": video,
            "question_id": f"{made.scene.image_id}-{number}",
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
        }


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def encode_video(frames_THWC: NDArray[np.uint8]) -> bytes:
    """Frames as a Matroska video without loss.

    The codec is FFV1, which is part of FFmpeg itself: encoders of H.264 are not in every build of it.

    Raises:
        ImportError: PyAV is missing.
    """
    av = import_av()
    file = io.BytesIO()
    # Without "bitexact" the file has random identifiers and the version of FFmpeg in it.
    with av.open(file, "w", format="matroska", container_options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "bgr0"  # with YUV colours would change
        stream.codec_context.thread_count = 1
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
