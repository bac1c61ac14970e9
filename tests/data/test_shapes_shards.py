"""How the Shapes world is written: the same again, whole or not at all, and nothing twice.

What the shards hold is checked in ``test_shapes.py``, where the texts are judged.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from triptych.data import shapes
from triptych.data.shapes import Scene, ShapesConfig, Split


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
