"""The demo from end to end in a tiny size, its baselines, and that an interrupted one goes on."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from triptych import demo, shapes_demo
from triptych.data import shapes
from triptych.data.samples import Record
from triptych.data.shapes import Split
from triptych.data.sources import open_source
from triptych.predict import Predictor
from triptych.training.logs import read_log

TINY = shapes_demo.DemoConfig(train=64, test=6, compositions=6, steps=2, quick=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the tiny demo was run once."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_demo, "QUICK", TINY)
        assert demo.main(["--folder", str(folder), "--quick"]) == 0
        yield folder


def record(name: str, kinds: list[str], *captions: str) -> Record:
    objects = [dict(zip(("size", "colour", "shape"), kind.split(), strict=True)) for kind in kinds]
    return Record(name, None, captions, name, {"objects": objects})


# --- all of it --------------------------------------------------------------------------------------------------


def test_everything_is_there(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"data", "demo.json", "pretraining", "captioning", "pictures", "results.json", "report.html"}
    assert len(read_log(finished / "pretraining")) == len(read_log(finished / "captioning")) == 2
    pictures = sorted((finished / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"test-{number}.png" for number in range(1, 7)]
    first = shapes.distinct_scenes(Split.TEST, 1, config=shapes.ShapesConfig(max_objects=TINY.max_objects))[0]
    size = TINY.pretraining().data.preprocessing.image_size
    assert np.array_equal(np.asarray(Image.open(pictures[0])), shapes.render(first, size))


def test_the_model_captions_the_pictures(finished: Path) -> None:
    predictor = Predictor.load(finished / "captioning" / "model")
    paths = sorted((finished / "pictures").iterdir())
    assert [path for path, _ in predictor.caption_files(paths)] == paths


def test_results_have_baselines(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["quick"] is True
    assert [training["steps"] for training in results["trainings"].values()] == [2, 2]
    assert "--quick" in results["command"]
    assert set(results["splits"]) == {"test", "compositions"}
    for split in results["splits"].values():
        assert split["pictures"] == 6
        for scores in (split["model"], split["blind"], split["chance"]):
            names = {"exact", "Bleu_4", "CIDEr", "t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10"}
            assert names <= set(scores)
        assert split["chance"]["t2i_r1"] == pytest.approx(100 / 6)
        assert split["chance"]["i2t_r10"] == 100
        # All grey pictures are alike, and ties count against the model.
        assert split["blind"]["t2i_r1"] == 0


def test_the_report_says_what_it_is(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "A smoke test (--quick)" in html
    assert "Where the words look" in html
    assert "the same model shown a grey picture" in html
    assert (
        shapes.captions(
            shapes.distinct_scenes(Split.TEST, 1, config=shapes.ShapesConfig(max_objects=TINY.max_objects))[0]
        )[0]
        in html
    )


def test_the_end_says_what_to_do_next(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--folder", str(finished), "--quick"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("all objects right", "chance", "report.html", "predict caption", "pretrain flickr8k", "smoke test"):
        assert text in err
    assert err.count("6/6 ") == err.count("36/36 ") == 4  # pictures captioned, and pairs matched


def test_again_nothing_is_made_twice(finished: Path) -> None:
    def made() -> dict[str, int]:
        runs = (finished / "pretraining" / "checkpoints", finished / "captioning" / "checkpoints")
        kept = [path for folder in (finished / "data", *runs) for path in folder.iterdir()]
        return {str(path): path.stat().st_mtime_ns for path in kept}

    before, log = made(), (finished / "captioning" / "log.jsonl").read_text()
    assert len(before) == 5
    assert demo.main(["--folder", str(finished), "--quick"]) == 0
    assert made() == before
    assert (finished / "captioning" / "log.jsonl").read_text() == log


def test_a_folder_of_another_size_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--folder", str(finished)]) == 2
    assert "holds a demo of another size" in capsys.readouterr().err


# --- a network that is pre-trained by masked signals alone ------------------------------------------------------


def test_eve_is_fine_tuned_for_all_that_it_is_judged_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pre-training neither retrieves nor writes, so nothing of that is shown; what it paints is."""
    monkeypatch.setattr(shapes_demo, "QUICK", TINY)
    assert demo.main(["--folder", str(tmp_path), "--model", "eve", "--quick"]) == 0
    assert "pretrain flickr8k_eve" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["trainings"]) == ["pretraining", "retrieval", "captioning"]
    assert len(list((tmp_path / "data").iterdir())) == 3
    for name in ("retrieval", "captioning"):
        assert json.loads((tmp_path / name / "recipe.json").read_text())["start"] == [
            str(tmp_path / "pretraining" / "model")
        ]
    pretrained, matcher, captioner = (
        Predictor.load(tmp_path / name / "model") for name in ("pretraining", "retrieval", "captioning")
    )
    assert pretrained.model.decoder is None
    for task in ("caption", "retrieval"):
        with pytest.raises(ValueError, match=f"not trained for {task}"):
            pretrained.check(task)
    matcher.check("retrieval")
    captioner.check("caption")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "EVE with 2.",
        "Retrieval and attention are of the network fine-tuned for retrieval",
        "block 4, joint",
        "What it paints",
        "Masked image (MIM)",
        "Training curves: retrieval",
        "Training curves: captions",
    ):
        assert text in html
    assert html.count("what is seen</figcaption>") == html.count("painted</figcaption>") == TINY.test


# --- interruption -----------------------------------------------------------------------------------------------


def test_an_interrupted_world_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shapes_demo.write_world(tmp_path / "whole", TINY)
    render, calls = shapes.render, 0

    def interrupted(scene: shapes.Scene, size: int = 64) -> object:
        nonlocal calls
        calls += 1
        if calls > TINY.train + 2:
            raise KeyboardInterrupt
        return render(scene, size)

    monkeypatch.setattr(shapes, "render", interrupted)
    monkeypatch.setattr(shapes_demo, "QUICK", TINY)
    assert demo.main(["--folder", str(tmp_path / "demo"), "--quick"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    data = tmp_path / "demo" / "data"
    assert [path.name for path in data.iterdir()] == ["train-00000.tar"]
    calls = -(10**6)
    train = (data / "train-00000.tar").stat().st_mtime_ns
    shards = shapes_demo.write_world(data, TINY)
    assert calls == TINY.test + TINY.compositions - 10**6
    assert (data / "train-00000.tar").stat().st_mtime_ns == train
    for split, paths in shards.items():
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in whole[split]]


def test_stopped_training_makes_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = SimpleNamespace(outcome=SimpleNamespace(finished=False))
    monkeypatch.setattr(shapes_demo, "run_recipe", lambda *_: stopped)
    monkeypatch.setattr(shapes_demo, "QUICK", TINY)
    assert demo.main(["--folder", str(tmp_path), "--quick"]) == 130
    assert not (tmp_path / "report.html").exists()
    assert "Traceback" not in capsys.readouterr().err


# --- parts ------------------------------------------------------------------------------------------------------


def test_the_splits_to_evaluate_have_different_captions(tmp_path: Path) -> None:
    config = shapes_demo.DemoConfig(train=1, test=40, compositions=40, max_objects=1)
    for split, shards in shapes_demo.write_world(tmp_path, config).items():
        captions = [record.captions[0] for record in open_source(shards)]
        assert len(captions) == len(set(captions)) == (1 if split is Split.TRAIN else 40)


def test_names_exactly() -> None:
    two = record("1", ["small red star", "small red star", "large blue circle"])
    assert shapes_demo.names_exactly("two small red stars at the top left and the centre and a large blue circle", two)
    assert shapes_demo.names_exactly("a small red star and a large blue circle below it and a small red star", two)
    assert not shapes_demo.names_exactly("a small red star and a large blue circle", two)
    assert not shapes_demo.names_exactly("", two)


def test_exact_share_and_its_chance() -> None:
    star, circle = "a small red star", "a large blue circle"
    records = [
        record("1", ["small red star"], star),
        record("2", ["small red star"], f"{star} at the top"),
        record("3", ["large blue circle"], circle),
        record("4", ["large blue circle", "small red star"], f"{circle} and {star}"),
    ]
    assert shapes_demo.exact_share({"1": star, "2": circle, "3": circle, "4": f"{star} and {circle}"}, records) == 75
    references = {record.image_id: record.captions for record in records}
    chance = shapes_demo.chance_level(records, references)
    assert chance["exact"] == pytest.approx(100 * 2 / 12)  # of the pairs of pictures, 1-2 and 2-1 are alike
    assert chance["t2i_r1"] == chance["i2t_r1"] == 25
    assert chance["t2i_r10"] == 100
    assert 0 < chance["Bleu_1"] < 1


def test_fewer_steps_have_a_shorter_warmup() -> None:
    whole = shapes_demo.DemoConfig().pretraining()
    short = shapes_demo.DemoConfig(steps=whole.train.steps // 10).pretraining()
    assert short.train.steps == whole.train.steps // 10
    assert short.optim.warmup_steps == round(whole.optim.warmup_steps / 10)
    assert {recipe.train.steps for recipe in shapes_demo.QUICK.recipes().values()} == {shapes_demo.QUICK.steps}
