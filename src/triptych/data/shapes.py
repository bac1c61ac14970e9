"""Shapes, the built-in world: generated images with exact ground truth, for the demo, tests and ablations.

`generate_scene` draws scene number `index` of a split, `render` paints it, and
`triptych.data.shapes_language` says what is true of it. `clip` makes a short video, `write_shards` writes
WebDataset tars as img2dataset lays them out.

The three splits share one distribution of scenes, restricted by `split_admits`:

- train and test never share a multiset of (size, colour, shape): a stable hash of it gives 15 % to test;
- certain (colour, shape) pairs, `HELD_OUT_PAIRS`, occur in neither; each compositions scene has at least one.

Shape legend: T frames, H height, W width, C colour channels (RGB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.data.shapes_language import (
    DIRECTIONS,
    LABELS,
    VOCABULARY,
    Hypothesis,
    Phrase,
    Question,
    captions,
    entailment,
    names_exactly,
    parse_caption,
    phrases,
    pick,
    questions,
    statement,
    toss,
    unique_descriptions,
)
from triptych.data.shapes_render import (
    COLOUR_RGB,
    COLOURS,
    GRID,
    HELD_OUT_PAIRS,
    MAX_OBJECTS,
    PLACES,
    RADII,
    SHAPES,
    SIZES,
    Background,
    Box,
    Kind,
    Object,
    Scene,
    Split,
    draw,
    object_box,
    render,
    render_background,
)
from triptych.progress import progress

__all__ = [
    "COLOURS",
    "COLOUR_RGB",
    "DIRECTIONS",
    "HELD_OUT_PAIRS",
    "KINDS",
    "LABELS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "VOCABULARY",
    "Background",
    "Box",
    "Clip",
    "Hypothesis",
    "ImageFormat",
    "Kind",
    "Object",
    "Phrase",
    "Question",
    "Scene",
    "ShapesConfig",
    "Split",
    "captions",
    "clip",
    "distinct_scenes",
    "entailment",
    "generate_scene",
    "ground_truth",
    "names_exactly",
    "object_box",
    "parse_caption",
    "phrases",
    "questions",
    "render",
    "scene_generator",
    "split_admits",
    "statement",
    "write_shards",
    "write_statements",
]

KINDS: tuple[Kind, ...] = tuple(itertools.product(SIZES, COLOURS, SHAPES))
TEST_PERCENT = 15
# The first number for which the six single objects of test cover all colours, shapes and both sizes.
SPLIT_SALT = b"shapes-v2306"
USTAR = tarfile.USTAR_FORMAT

ImageFormat = Literal["png", "jpg"]


@dataclass(frozen=True, slots=True)
class ShapesConfig:
    """The distribution of scenes: each number of objects from `min_objects` to `max_objects` is as likely."""

    min_objects: int = 1
    max_objects: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(
                f"ShapesConfig needs 1 <= min_objects <= max_objects <= {MAX_OBJECTS}, "
                f"not min_objects={self.min_objects}, max_objects={self.max_objects}"
            )


# --- scenes and splits --------------------------------------------------------------------------------------


def split_admits(split: Split, kinds: Sequence[Kind]) -> bool:
    """Whether a scene made of these (size, colour, shape) belongs to `split`; the order does not matter."""
    held_out = any((colour, shape) in HELD_OUT_PAIRS for _, colour, shape in kinds)
    if split is Split.COMPOSITIONS or held_out:
        return split is Split.COMPOSITIONS and held_out
    text = ";".join(sorted(" ".join(kind) for kind in kinds))
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=SPLIT_SALT).digest()
    return (int.from_bytes(digest, "big") % 100 < TEST_PERCENT) == (split is Split.TEST)


def scene_generator(seed: int, index: int, split: Split, purpose: int = 0) -> np.random.Generator:
    """The random numbers that belong to one scene, independent of every other scene and `purpose`.

    Purpose 0 is the scene itself, 1 its ground truth, 2 statements; others are free.

    Raises:
        ValueError: unless `seed` and `index` are 0 to 2**32 - 1.
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name} must be 0 to 2**32 - 1, not {value}")
    entropy = (seed, list(Split).index(split), index, purpose)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def generate_scene(seed: int, index: int, split: Split, config: ShapesConfig | None = None) -> Scene:
    """Scene number `index` of `split`: a function of its arguments alone.

    Args:
        seed: which world, 0 to 2**32 - 1.
        index: which scene, 0 to 2**32 - 1.
        split: what the scene may contain, see `split_admits`.
        config: how many objects; by default 1 to 3.

    Raises:
        ValueError: if `seed` or `index` is out of range.
    """
    config = config or ShapesConfig()
    rng = scene_generator(seed, index, split)
    count = config.min_objects + int(rng.random() * (config.max_objects - config.min_objects + 1))
    kinds = _draw_kinds(rng, count, split)
    cells = sorted(np.argsort(rng.random(GRID * GRID), kind="stable")[:count].tolist())
    objects = tuple(_place(kind, cell, rng) for kind, cell in zip(kinds, cells, strict=True))
    return Scene(split, seed, index, objects, _draw_background(rng))


def _draw_kinds(rng: np.random.Generator, count: int, split: Split) -> list[Kind]:
    """Draw until the split admits the result: 1.5 times for train, 4 for compositions, 9 for test."""
    while True:
        kinds = [KINDS[int(number * len(KINDS))] for number in rng.random(count).tolist()]
        if split_admits(split, kinds):
            return kinds


def _place(kind: Kind, cell: int, rng: np.random.Generator) -> Object:
    """An object of about its size's radius, somewhere in its cell, 1 % of the image or more from the edge."""
    offset_x, offset_y, scale = (2.0 * rng.random(3) - 1.0).tolist()
    radius = RADII[kind[0]] * (1.0 + 0.05 * scale)
    room = 0.5 / GRID - radius - 0.01
    x = (cell % GRID + 0.5) / GRID + room * offset_x
    y = (cell // GRID + 0.5) / GRID + room * offset_y
    return Object(*kind, cell=cell, x=x, y=y, radius=radius)


def _draw_background(rng: np.random.Generator) -> Background:
    level, red, green, blue, slope_x, slope_y, noise = rng.random(7).tolist()
    base = 222.0 + 16.0 * level
    rgb = (base + 6.0 * red, base + 6.0 * green, base + 6.0 * blue)
    return Background(rgb, 12.0 * slope_x - 6.0, 12.0 * slope_y - 6.0, noise_seed=int(noise * 2**32))


def distinct_scenes(
    split: Split, count: int, *, seed: int = 0, start: int = 0, config: ShapesConfig | None = None
) -> list[Scene]:
    """The first `count` scenes from index `start` on whose first captions differ, to evaluate retrieval.

    Raises:
        ValueError: if the split does not seem to have so many captions.
    """
    found: dict[str, Scene] = {}
    index = last = start
    while len(found) < count:
        scene = generate_scene(seed, index, split, config)
        if found.setdefault(captions(scene)[0], scene) is scene:
            last = index
        elif index - last > 1000 + 10 * count:
            raise ValueError(f"found only {len(found)} of {count} different captions in the {split} split")
        index += 1
    return list(found.values())


# --- clips --------------------------------------------------------------------------------------------------

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A short video in which one object moves into a free neighbouring cell and everything else stays.

    `scene` is the first frame, `mover` the position of the moving object in `scene.objects`, `end_place`
    where it ends.
    """

    scene: Scene
    frames_THWC: NDArray[np.uint8]
    mover: int
    direction: str
    end_place: str
    captions: tuple[str, ...]
    questions: tuple[Question, ...]


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
        _clip_captions(scene, item, direction, end_place),
        _clip_questions(scene, item, direction, end_place, rng),
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


def _clip_captions(scene: Scene, item: Object, direction: str, end_place: str) -> tuple[str, ...]:
    """Three paraphrases; each names every object once."""
    name = f"a {' '.join(item.kind)}"
    others = [f"a {' '.join(other.kind)}" for other in scene.objects if other is not item]
    still = f" while {' and '.join(others)} {'stays' if len(others) == 1 else 'stay'} still" if others else ""
    return (
        f"{name} moves {direction}{still}",
        f"{name} moves from the {item.place} to the {end_place}{still}",
        f"{name} starts at the {item.place} and ends at the {end_place}{still}",
    )


def _clip_questions(
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


# --- files --------------------------------------------------------------------------------------------------


def ground_truth(scene: Scene, size: int = 64) -> dict[str, object]:
    """All ground truth of a scene as JSON types; boxes are in pixels of an image of `size`."""
    rng = scene_generator(scene.seed, scene.index, scene.split, purpose=1)
    return {
        "image_id": scene.image_id,
        "split": str(scene.split),
        "width": size,
        "height": size,
        "captions": list(captions(scene)),
        "objects": [
            {
                "size": item.size,
                "colour": item.colour,
                "shape": item.shape,
                "place": item.place,
                "box_xyxy": object_box(item, size),
            }
            for item in scene.objects
        ],
        "questions": [{"question": q.text, "answer": q.answer, "kind": q.kind} for q in questions(scene, rng)],
        "phrases": [{"text": p.text, "box_xyxy": p.box_xyxy} for p in phrases(scene, size)],
        "entailment": [{"hypothesis": h.text, "label": h.label} for h in entailment(scene, rng)],
    }


def write_shards(
    folder: str | Path,
    split: Split,
    count: int,
    *,
    shard_size: int = 1000,
    size: int = 64,
    seed: int = 0,
    image_format: ImageFormat = "png",
    start: int = 0,
    config: ShapesConfig | None = None,
    distinct: bool = False,
    keep: bool = False,
    show_progress: bool = False,
) -> list[Path]:
    """Write scenes `start` to `start + count - 1` of `split` as WebDataset tars, as img2dataset does.

    Shard `train-00002.tar` holds scenes `2 * shard_size` and on. Scene 7 is `000000007.png` (or .jpg),
    `.json` (see `ground_truth`) and `.txt` (the first caption). The bytes depend on the arguments and the
    Pillow version alone. A shard appears under its name only when complete.

    Args:
        folder: where to write; made if missing.
        split: which scenes.
        count: how many scenes, at least 1.
        shard_size: scenes a shard, at least 1; the last shard may hold fewer.
        size: width and height in pixels, 32 to 512.
        seed: which world.
        image_format: "png" (exact) or "jpg" (quality 95, full chroma).
        start: the first scene, a multiple of `shard_size`.
        config: how many objects a scene; by default 1 to 3.
        distinct: leave out scenes whose first caption an earlier one has, and go on until there are `count`
            (see `distinct_scenes`): for retrieval with one right answer.
        keep: leave the shards that are already there as they are, so that an interrupted writing goes on;
            they must be of the same arguments. By default they are replaced.
        show_progress: show a progress bar with rate and remaining time on stderr.

    Returns:
        The shards in order.

    Raises:
        ValueError: if an argument is out of range, or there are not so many distinct scenes.
    """
    _check_counts(count, shard_size, start)
    if image_format not in ("png", "jpg"):
        raise ValueError(f"image_format must be 'png' or 'jpg', not {image_format!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = distinct_scenes(split, count, seed=seed, start=start, config=config) if distinct else None
    parts = {
        folder / f"{split}-{first // shard_size:05d}.tar": range(first, min(first + shard_size, start + count))
        for first in range(start, start + count, shard_size)
    }
    missing = {shard: indices for shard, indices in parts.items() if not (keep and shard.exists())}
    total = sum(map(len, missing.values()))
    with progress(f"shapes {split}", total, shown=show_progress and total > 0) as advance:
        for shard, indices in missing.items():
            with _replacing(shard) as file, tarfile.TarFile(fileobj=file, mode="w", format=USTAR) as tar:
                for index in indices:
                    scene = chosen[index - start] if chosen else generate_scene(seed, index, split, config)
                    for ending, data in _sample_files(scene, size, image_format):
                        _add(tar, f"{scene.index:09d}.{ending}", data)
                    advance()
    return list(parts)


def write_statements(
    folder: str | Path,
    split: Split,
    count: int,
    *,
    seed: int = 0,
    start: int = 0,
    config: ShapesConfig | None = None,
) -> Path:
    """Write `count` statements about pairs of scenes to `statements-<split>.jsonl`.

    Statement i is about scenes `start + 2 i` and `start + 2 i + 1`, which `write_shards` writes when given
    the same `seed` and `config`. A line holds "left" and "right" (image ids), "statement", "label" (bool).

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_counts(count, 1, start)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"statements-{split}.jsonl"
    with _replacing(path) as file:
        for index in range(start, start + 2 * count, 2):
            left, right = (generate_scene(seed, i, split, config) for i in (index, index + 1))
            text, label = statement(left, right, scene_generator(seed, index, split, purpose=2))
            line = {"left": left.image_id, "right": right.image_id, "statement": text, "label": label}
            file.write(json.dumps(line).encode() + b"\n")
    return path


def _check_counts(count: int, shard_size: int, start: int) -> None:
    if count < 1 or shard_size < 1:
        raise ValueError(f"count and shard_size must be at least 1, not {count} and {shard_size}")
    if start < 0 or start % shard_size:
        raise ValueError(f"start must be 0 or a positive multiple of shard_size {shard_size}, not {start}")


def _sample_files(scene: Scene, size: int, image_format: ImageFormat) -> Iterator[tuple[str, bytes]]:
    image = io.BytesIO()
    picture = Image.fromarray(render(scene, size))
    if image_format == "png":
        picture.save(image, "PNG", compress_level=1)
    else:
        picture.save(image, "JPEG", quality=95, subsampling=0)
    record = ground_truth(scene, size)
    yield image_format, image.getvalue()
    yield "json", json.dumps(record).encode()
    yield "txt", captions(scene)[0].encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file with no trace of time or user."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
