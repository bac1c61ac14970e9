"""How the Shapes world is written: the same again, whole or not at all, and nothing twice.

What the shards hold is checked in ``test_shapes.py``, where the texts are judged.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from triptych.data import shapes
from triptych.data.check import check
from triptych.data.pictures import show
from triptych.data.shapes import Scene, ShapesConfig, Split
from triptych.data.sources import open_source
from triptych.data.transforms import FrameChoice, Preprocessing


def test_shards_are_identical_on_rewriting(tmp_path: Path) -> None:
    (once,) = shapes.write_shards(tmp_path / "once", Split.TRAIN, 12, seed=1)
    (again,) = shapes.write_shards(tmp_path / "again", Split.TRAIN, 12, seed=1)
    (other,) = shapes.write_shards(tmp_path / "other", Split.TRAIN, 12, seed=2)
    assert once.read_bytes() == again.read_bytes() != other.read_bytes()


def test_a_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = shapes.write_shards(tmp_path, Split.TRAIN, 2)
    before = shard.read_bytes()

    def fail(scene: Scene, size: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shapes, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        shapes.write_shards(tmp_path, Split.TRAIN, 4)
    assert list(tmp_path.iterdir()) == [shard]
    assert shard.read_bytes() == before


def test_shards_of_distinct_scenes(tmp_path: Path) -> None:
    config = ShapesConfig(max_objects=1)
    shards = shapes.write_shards(tmp_path, Split.TEST, 40, shard_size=15, seed=2, config=config, distinct=True)
    names: list[str] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names += [member.name for member in tar if member.name.endswith(".png")]
    expected = shapes.distinct_scenes(Split.TEST, 40, seed=2, config=config)
    assert names == [f"{scene.index:09d}.png" for scene in expected]
    assert expected[-1].index > 39  # or there would be nothing to leave out


def test_kept_shards_are_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = shapes.write_shards(tmp_path, Split.TRAIN, 6, shard_size=2)
    contents = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(b"kept")
    shards[1].unlink()
    assert shapes.write_shards(tmp_path, Split.TRAIN, 6, shard_size=2, keep=True, show_progress=True) == shards
    assert [shard.read_bytes() for shard in shards] == [b"kept", *contents[1:]]
    assert "2/2" in capsys.readouterr().err
    shapes.write_shards(tmp_path, Split.TRAIN, 6, shard_size=2, keep=True, show_progress=True)
    assert capsys.readouterr().err == ""
    shapes.write_shards(tmp_path, Split.TRAIN, 6, shard_size=2)
    assert shards[0].read_bytes() == contents[0]


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes.write_shards(tmp_path, Split.TRAIN, 3, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "images/s" in err


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"shard_size": 0}, {"start": 5}, {"start": -10}, {"image_format": "gif"}, {"size": 8}]
)
def test_arguments_of_write_shards_are_checked(tmp_path: Path, wrong: dict[str, object]) -> None:
    arguments = {"count": 2, "shard_size": 10, **wrong}
    with pytest.raises(ValueError, match=r"must be|at least"):
        shapes.write_shards(tmp_path, Split.TRAIN, **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_statements_are_read_with_their_pictures(tmp_path: Path) -> None:
    shapes.write_shards(tmp_path, Split.TRAIN, 6, shard_size=3, size=32, seed=3)
    path = shapes.write_statements(tmp_path, Split.TRAIN, 3, shard_size=3, seed=3)
    records = list(open_source(path))
    assert [record.extra["identifier"] for record in records] == ["train-0-0-0", "train-2-0-0", "train-4-0-0"]
    for number, record in enumerate(records):
        pixels_FCHW = show(record, Preprocessing(32).test_transform(), FrameChoice())
        pair = [shapes.render(shapes.generate_scene(3, 2 * number + side, Split.TRAIN), 32) for side in (0, 1)]
        assert torch.equal(pixels_FCHW, torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in pair]))
    found = check([str(path)])
    assert (found["formats"], found["pictures"], found["statements"]) == ({str(path): "statements"}, 6, 3)
    assert (found["missing"], found["broken"]) == (0, 0)


def test_several_statements_about_a_pair(tmp_path: Path) -> None:
    shapes.write_shards(tmp_path, Split.TRAIN, 4, size=32)
    once = list(open_source(shapes.write_statements(tmp_path, Split.TRAIN, 2)))
    several = list(open_source(shapes.write_statements(tmp_path, Split.TRAIN, 2, each=3)))
    names = [record.extra["identifier"] for record in several]
    assert names == [f"train-{pair}-0-{number}" for pair in (0, 2) for number in range(3)]
    assert [record.extra["statement"] for record in several[::3]] == [record.extra["statement"] for record in once]
    assert len({record.extra["statement"] for record in several}) > 2
    assert [record.extra["images"] for record in several] == [one.extra["images"] for one in once for _ in range(3)]


@pytest.mark.parametrize(
    ("wrong", "missing"),
    [
        ({"start": 6}, "train-00002.tar:000000006.png"),  # there is no such shard
        ({"start": 2}, "train-00001.tar:000000005.png"),  # it ends before
        ({"count": 3}, "train-00001.tar:000000005.png"),
        ({"shard_size": 2}, "train-00001.tar:000000002.png"),
        ({"image_format": "jpg"}, "train-00000.tar:000000000.jpg"),
    ],
)
def test_statements_need_their_pictures(tmp_path: Path, wrong: dict[str, object], missing: str) -> None:
    shapes.write_shards(tmp_path, Split.TRAIN, 5, shard_size=3, size=32)
    arguments = {"count": 2, "shard_size": 3, **wrong}
    with pytest.raises(FileNotFoundError, match=f"no picture .*{missing} for a statement"):
        shapes.write_statements(tmp_path, Split.TRAIN, **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "statements-train.jsonl").exists()


def test_kept_statements_are_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes.write_shards(tmp_path, Split.TRAIN, 4, size=32)
    path = shapes.write_statements(tmp_path, Split.TRAIN, 2, show_progress=True)
    assert "2/2" in capsys.readouterr().err
    content = path.read_bytes()
    path.write_bytes(b"kept")
    assert shapes.write_statements(tmp_path, Split.TRAIN, 2, keep=True, show_progress=True) == path
    assert (path.read_bytes(), capsys.readouterr().err) == (b"kept", "")
    shapes.write_statements(tmp_path, Split.TRAIN, 2)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"each": 0}, {"shard_size": 0}, {"start": -2}, {"image_format": "gif"}]
)
def test_arguments_of_write_statements_are_checked(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        shapes.write_statements(tmp_path, Split.TRAIN, **{"count": 2, **wrong})  # type: ignore[arg-type]
