"""The second part of the demo in a tiny size: every task is trained and evaluated, and nothing is done twice."""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from triptych import demo, shapes_demo, shapes_tasks
from triptych.checkpoints.folder import load
from triptych.data.sources import Source, open_source
from triptych.data.video import read_frames
from triptych.models.eve import EveConfig
from triptych.shapes_tasks import TRIALS
from triptych.tasks.base import Task
from triptych.tasks.comparison import Comparison
from triptych.tasks.registry import task_for
from triptych.tasks.vqa import VqaConfig
from triptych.training.logs import read_log

pytest.importorskip("av")
TINY = shapes_demo.DemoConfig(train=64, test=6, compositions=2, steps=1, quick=True)
TRAINED = [name for name, trial in TRIALS.items() if trial.recipe is not None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder in which both parts were run once, and what was said."""
    folder, said = tmp_path_factory.mktemp("demo") / "demo", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(shapes_demo, "QUICK", TINY)
        assert demo.main(["--folder", str(folder), "--quick", "--tasks", "all"]) == 0, said.getvalue()
        yield folder, said.getvalue()


@pytest.fixture
def finished(whole: tuple[Path, str]) -> Path:
    return whole[0]


def scores(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    found = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what is there ------------------------------------------------------------------------------------------------


def test_every_task_is_trained(finished: Path) -> None:
    for name in TRAINED:
        assert len(read_log(finished / name)) == TINY.steps
        loaded = load(finished / name / "model")
        assert TRIALS[name].task in (loaded.task or {})


def test_the_other_network_does_every_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shapes_demo, "QUICK", TINY)
    assert demo.main(["--folder", str(tmp_path), "--model", "bridgetower", "--quick", "--tasks", "all"]) == 0
    assert scores(tmp_path).keys() == TRIALS.keys()
    loaded = load(tmp_path / "vqa" / "model")
    assert loaded.model_type == "bridgetower"
    assert loaded.task is not None
    assert loaded.task["vqa"]["answering"] == "classify"


@pytest.mark.parametrize("model", shapes_demo.NETWORKS)
def test_recipes_of_a_networks_own_are_for_the_same_tasks(model: str) -> None:
    """And what writes has a decoder to write with: EVE's pre-training leaves it none."""
    config = dataclasses.replace(TINY, model=model)
    table = shapes_tasks.trials(config)
    assert list(table) == list(TRIALS)
    trained = {name: trial.recipe() for name, trial in table.items() if trial.recipe is not None}
    assert list(trained) == TRAINED
    for name, trial in table.items():
        assert dataclasses.replace(trial, recipe=TRIALS[name].recipe) == TRIALS[name]
    for name, recipe in trained.items():
        assert task_for(recipe.objective).name == TRIALS[name].task
        if model == "eve":
            writes = name == "self_critical" or getattr(recipe.objective, "locating", "") == "tokens"
            assert isinstance(recipe.model, EveConfig)
            assert (recipe.model.decoder_layers > 0) == writes
    answers = trained["vqa"].objective
    assert isinstance(answers, VqaConfig)
    assert answers.answering == ("generate" if model == "mplug" else "classify")


def test_every_training_starts_from_what_its_trial_says(finished: Path) -> None:
    for name in TRAINED:
        start = finished / TRIALS[name].start / "model"
        begun = json.loads((finished / name / "recipe.json").read_text())
        assert begun["start"] == [str(start)]
        assert begun["data"]["evaluate"] == []


def test_the_numbers(finished: Path) -> None:
    found = scores(finished)
    assert list(found) == list(TRIALS)
    for name, trial in TRIALS.items():
        for column in ("model", "blind"):
            assert 0 <= found[name][column][trial.score] <= 100
            assert trial.task != "caption" or 0 <= found[name][column]["exact"] <= 100
        if trial.task == "caption":
            assert "majority" not in found[name]
            assert found[name]["model against blind"] == {}
        else:
            assert 0 <= found[name]["majority"][trial.score] <= 100
            assert found[name]["model against blind"]["test"] in ("McNemar", "paired bootstrap")
            assert 0 < float(found[name]["model against blind"]["p_value"]) <= 1
    assert found["grounding"]["metric"] == "accuracy"


def test_the_page(finished: Path) -> None:
    html = (finished / "tasks.html").read_text(encoding="utf-8")
    for trial in TRIALS.values():
        assert trial.title in html
    assert html.count("data:image/") == 3 * TINY.test  # questions, phrases, clips: of each test scene
    assert "Traceback" not in html
    assert not re.search(r">nan<|None", html)


def test_the_command_says_where_it_is(whole: tuple[Path, str]) -> None:
    for text in ("tasks.html", "tasks.json", "majority", "asked for", *(trial.title for trial in TRIALS.values())):
        assert text in whole[1]


# --- the data -----------------------------------------------------------------------------------------------------


def test_statements_are_about_training_pairs_and_other_test_pairs(finished: Path) -> None:
    data = finished / "data"
    for path, pairs in (
        (data / "statements-train.jsonl", TINY.train // 2),
        (data / "pairs" / "statements-test.jsonl", TINY.test),
    ):
        shown = {tuple(record.extra["images"]) for record in open_source(path)}
        assert len(shown) == pairs
        assert len({picture for pair in shown for picture in pair}) == 2 * pairs


def test_still_lists_have_nothing_of_motion(finished: Path) -> None:
    data = finished / "data"
    captions, asked = lines(data / "still-clips-test.jsonl"), lines(data / "still-clip-questions-test.jsonl")
    assert len(captions) == TINY.test
    assert captions
    assert asked
    moving = re.compile(r"\b(move[sd]?|moving|starts|ends|still)\b")
    for row in captions:
        assert row["captions"] == row["scene_captions"]
        assert row["captions"]
        assert not any(moving.search(str(caption)) for caption in row["captions"])  # type: ignore[attr-defined]
    assert not any(moving.search(str(row["question"])) for row in asked)
    assert not any(row["kind"] == "motion" for row in asked)
    everything = lines(data / "clip-questions-test.jsonl")
    assert any(row["kind"] == "motion" for row in everything)
    assert [row for row in everything if row["kind"] != "motion"] == asked
    assert any(moving.search(str(caption)) for row in lines(data / "clips-test.jsonl") for caption in row["captions"])  # type: ignore[attr-defined]


def test_clips_are_of_the_size_of_the_pictures(finished: Path) -> None:
    (record, *_) = open_source(finished / "data" / "still-clips-test.jsonl")
    frames = read_frames(record.extra["video"], 8, record.key, "uniform")
    assert len(frames) == 8


# --- going on -----------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_done(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> dict[str, object]:
        checkpoints = [path for name in TRAINED for path in (finished / name / "checkpoints").rglob("*")]
        data = [path for path in (finished / "data").rglob("*") if not path.name.startswith("still-")]
        logs = {name: (finished / name / "log.jsonl").read_bytes() for name in TRAINED}
        return {**logs, **{str(path): path.stat().st_mtime_ns for path in (*checkpoints, *data) if path.is_file()}}

    found, before = scores(finished), made()
    assert len(before) > 20
    del found["entailment"]
    (finished / "tasks.json").write_text(json.dumps(found), encoding="utf-8")
    (finished / "tasks.html").unlink()
    evaluated: list[str] = []
    evaluate = shapes_tasks.compare

    def noted(task: Task, source: Source, training: Source | None = None) -> Comparison:
        evaluated.append(task.name)
        return evaluate(task, source, training)

    monkeypatch.setattr(shapes_tasks, "compare", noted)
    assert shapes_tasks.run_tasks(finished, TINY)
    assert evaluated == ["entailment"]
    assert made() == before
    again = scores(finished)
    assert set(again) == set(TRIALS)
    assert {name: values for name, values in again.items() if name != "entailment"} == found
    assert (finished / "tasks.html").exists()


def test_a_stopped_training_stops_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = SimpleNamespace(outcome=SimpleNamespace(finished=False), model_folder=tmp_path)
    monkeypatch.setattr(shapes_tasks, "run_recipe", lambda *_: stopped)
    before = (finished / "tasks.json").read_bytes()
    (finished / "tasks.html").unlink(missing_ok=True)
    assert demo.main(["--folder", str(finished), "--quick", "--tasks", "all"]) == 130
    assert (finished / "tasks.json").read_bytes() == before
    assert not (finished / "tasks.html").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_more_test_scenes_than_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_tasks, "_CLIPS", 2)
    config = shapes_demo.DemoConfig(train=4, test=5, compositions=1, steps=1, quick=True)
    shapes_demo.write_world(tmp_path, config)
    shapes_tasks.write_data(tmp_path, config)
    assert len(lines(tmp_path / "still-clips-test.jsonl")) == 2
    assert len(lines(tmp_path / "pairs" / "statements-test.jsonl")) == 5
