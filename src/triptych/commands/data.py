"""``triptych data``: make, check and convert data.

Imports of torch stand inside the commands: ``--help`` should not wait for it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from triptych.commands.output import print_json
from triptych.metrics.files import read_texts


def data_shapes(
    folder: Positional[Path],
    train: int = 20_000,
    test: int = 500,
    compositions: int = 500,
    size: int = 64,
    max_objects: int = 3,
    format: Literal["png", "jpg"] = "png",
    clips: int = 0,
    seed: int = 0,
) -> None:
    """Write the built-in world as tar shards: train, test and held-out compositions, two-picture statements, and clips.

    Args:
        folder: where to write.
        train: training scenes.
        test: scenes whose set of objects never occurs in training.
        compositions: scenes with a pair of colour and shape that never occurs in training.
        size: pixels of a side.
        max_objects: objects in a scene, 1 to this many.
        format: of the pictures.
        clips: short videos of each split, with captions and questions; they need the extra "video".
        seed: of the world.
    """
    from triptych.data.shapes import ShapesConfig, Split, write_shards, write_statements
    from triptych.data.shapes_clips import write_clips

    config = ShapesConfig(max_objects=max_objects)
    counts = {Split.TRAIN: train, Split.TEST: test, Split.COMPOSITIONS: compositions}
    written: dict[str, list[str]] = {}
    for split, count in counts.items():
        if count:
            shards = write_shards(
                folder, split, count, size=size, seed=seed, image_format=format, config=config, show_progress=True
            )
            written[str(split)] = [str(path) for path in shards]
        if count > 1:
            statements = write_statements(folder, split, count // 2, seed=seed, image_format=format, config=config)
            written[str(split)].append(str(statements))
        if count and clips:
            files = write_clips(folder, split, clips, size=size, seed=seed, config=config, show_progress=True)
            written[str(split)] += map(str, files)
    print_json(written)


def data_check(
    data: Positional[tuple[str, ...]],
    image_root: str | None = None,
    splits: tuple[str, ...] | None = None,
    format: str | None = None,
) -> None:
    """Read a whole data set: what it is, how many samples, what is missing or broken, and a few of its texts.

    Args:
        data: as for training.
        image_root: what the image paths of lists are relative to.
        splits: of a file whose records name theirs.
        format: what the files are, where their content does not tell.
    """
    from triptych.data.check import check

    print_json(check(data, image_root, splits, format))


def data_arrow(
    data: Positional[tuple[str, ...]],
    table: Annotated[Path, arg(name="to")],
    kind: Literal["captions", "vqa", "nlvr2", "snli"] = "captions",
    image_root: str | None = None,
    splits: tuple[str, ...] | None = None,
    answers: Path | None = None,
    split: str = "train",
) -> None:
    """Write a data set as an Arrow table in BridgeTower's layout. Needs the extra "arrow".

    Args:
        data: as for training.
        table: the file to write.
        kind: what the table holds.
        image_root: what the image paths of lists are relative to.
        splits: of a file whose records name theirs.
        answers: for vqa, a JSON list of the answers that are classes, in their order.
        split: what the column "split" says.
    """
    from triptych.data.arrow_writing import write_arrow
    from triptych.data.sources import open_source
    from triptych.metrics.vqa import normalize_answer

    classes = None if answers is None else read_texts(answers)
    source = open_source(data, image_root=image_root, splits=splits)
    total = source.count() if source.in_memory else None
    written = write_arrow(source, table, kind, answers=classes, normalize=normalize_answer, split=split, total=total)
    print_json(asdict(written) | {"path": str(written.path)})
