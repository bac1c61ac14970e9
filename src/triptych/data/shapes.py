"""Shapes, the built-in world: generated images with exact ground truth, for the demo, tests and ablations.

`generate_scene` draws scene number `index` of a split, `render` paints it, and
`triptych.data.shapes_language` says what is true of it. `write_shards` writes WebDataset tars as img2dataset lays
them out, `write_statements` a list of statements about pairs of their pictures. `triptych.data.shapes_clips` makes
short videos of the scenes.

The three splits share one distribution of scenes, restricted by `split_admits`:

- train and test never share a multiset of (size, colour, shape): a stable hash of it gives 15 % to test;
- certain (colour, shape) pairs, `HELD_OUT_PAIRS`, occur in neither; each compositions scene has at least one.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from triptych.data.samples import read_index
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
    questions,
    statement,
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
    object_box,
    render,
)
from triptych.data.writing import add_member, replacing, replacing_tar
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

    Purpose 0 is the scene itself, 1 its ground truth, 2 statements, 3 clips; others are free.

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


def _first_caption(scene: Scene) -> str:
    return captions(scene)[0]


def distinct_scenes(
    split: Split,
    count: int,
    *,
    seed: int = 0,
    start: int = 0,
    config: ShapesConfig | None = None,
    key: Callable[[Scene], Hashable] = _first_caption,
) -> list[Scene]:
    """The first `count` scenes from index `start` on whose first captions differ, to evaluate retrieval.

    `key` is what differs, if not the first caption.

    Raises:
        ValueError: if the split does not seem to have so many.
    """
    found: dict[Hashable, Scene] = {}
    index = last = start
    while len(found) < count:
        scene = generate_scene(seed, index, split, config)
        if found.setdefault(key(scene), scene) is scene:
            last = index
        elif index - last > 1000 + 10 * count:
            raise ValueError(f"found only {len(found)} of {count} different scenes in the {split} split")
        index += 1
    return list(found.values())


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
    _check_arguments(count, shard_size, start, image_format)
    if start % shard_size:
        raise ValueError(f"start must be a multiple of shard_size {shard_size}, not {start}")
    folder = Path(folder)
    chosen = distinct_scenes(split, count, seed=seed, start=start, config=config) if distinct else None
    parts = {
        folder / _shard_name(split, first, shard_size): range(first, min(first + shard_size, start + count))
        for first in range(start, start + count, shard_size)
    }
    missing = {shard: indices for shard, indices in parts.items() if not (keep and shard.exists())}
    total = sum(map(len, missing.values()))
    with progress(f"shapes {split}", total, shown=show_progress and total > 0) as advance:
        for shard, indices in missing.items():
            with replacing_tar(shard) as tar:
                for index in indices:
                    scene = chosen[index - start] if chosen else generate_scene(seed, index, split, config)
                    for ending, data in _sample_files(scene, size, image_format):
                        add_member(tar, f"{scene.index:09d}.{ending}", data)
                    advance()
    return list(parts)


def write_statements(
    folder: str | Path,
    split: Split,
    count: int,
    *,
    shard_size: int = 1000,
    seed: int = 0,
    image_format: ImageFormat = "png",
    start: int = 0,
    config: ShapesConfig | None = None,
    each: int = 1,
    keep: bool = False,
    show_progress: bool = False,
) -> Path:
    """Write statements about `count` pairs of scenes to `statements-<split>.jsonl`, beside the shards of the scenes.

    Pair i is scenes `start + 2 i` and `start + 2 i + 1`, which `write_shards` has written with the same arguments (and
    not `distinct`). A line holds "identifier", "images" (the two pictures, as locations in the shards),
    "statement" and "label" (bool), as `triptych.data.lists` reads them. Identifiers are as in NLVR2, "test-12-0-0" for
    scenes 12 and 13, "test-12-0-1" for their second statement: each is a group of its own when consistency is counted.

    Args:
        folder, split, shard_size, seed, image_format, config: as `write_shards` was given them.
        count: how many pairs, at least 1: half as many as scenes.
        each: statements about a pair, at least 1.
        start: the first scene.
        keep: leave the file as it is if it is there; it must be of the same arguments. By default it is replaced.
        show_progress: show a progress bar with rate and remaining time on stderr.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if a picture is not there.
    """
    _check_arguments(count, shard_size, start, image_format)
    if each < 1:
        raise ValueError(f"each must be at least 1, not {each}")
    folder = Path(folder)
    path = folder / f"statements-{split}.jsonl"
    if keep and path.exists():
        return path
    pictures = {
        index: f"{_shard_name(split, index, shard_size)}:{index:09d}.{image_format}"
        for index in range(start, start + 2 * count)
    }
    _find_pictures(folder, pictures.values())
    with (
        progress(f"statements {split}", count, unit="pairs", shown=show_progress) as advance,
        replacing(path) as file,
    ):
        for index in range(start, start + 2 * count, 2):
            left, right = (generate_scene(seed, i, split, config) for i in (index, index + 1))
            rng = scene_generator(seed, index, split, purpose=2)
            for number in range(each):
                text, label = statement(left, right, rng)
                line = {
                    "identifier": f"{split}-{index}-0-{number}",
                    "images": [pictures[index], pictures[index + 1]],
                    "statement": text,
                    "label": label,
                }
                file.write(json.dumps(line).encode() + b"\n")
            advance()
    return path


def _find_pictures(folder: Path, pictures: Iterable[str]) -> None:
    """FileNotFoundError if one of the pictures, which are in the order of their shards, is not there."""
    for shard, inside in itertools.groupby(pictures, lambda picture: picture.partition(":")[0]):
        tar = folder / shard
        there = read_index(str(tar)) if tar.exists() else {}
        missing = next((picture for picture in inside if picture.partition(":")[2] not in there), None)
        if missing is not None:
            raise FileNotFoundError(f"there is no picture {folder / missing} for a statement: write the shards first")


def _shard_name(split: Split, index: int, shard_size: int) -> str:
    """The shard of scene `index`."""
    return f"{split}-{index // shard_size:05d}.tar"


def _check_arguments(count: int, shard_size: int, start: int, image_format: str) -> None:
    if count < 1 or shard_size < 1 or start < 0:
        raise ValueError(f"{count=} and {shard_size=} must be at least 1 and {start=} at least 0")
    if image_format not in get_args(ImageFormat):
        raise ValueError(f"image_format must be 'png' or 'jpg', not {image_format!r}")


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
