"""What a run of a task keeps: what it found out of the training data, and the head of the checkpoint it starts from.

And the objectives that only ``run_recipe`` sets up: self-critical captions, and ranking by matching alone.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch

from triptych.checkpoints.folder import load
from triptych.data.samples import Record
from triptych.data.sources import open_source
from triptych.metrics.cider import DocumentFrequencies
from triptych.metrics.ptb import ptb_tokenize
from triptych.models.protocol import VisionLanguageModel
from triptych.objectives.ranking import TextRanking
from triptych.predict import Predictor
from triptych.tasks.self_critical import SelfCritical
from triptych.tasks.vqa import VisualQuestionAnswering, VqaConfig
from triptych.training.runs import Recipe, run_recipe

BUILD: Callable[..., Recipe] = run_path(str(Path(__file__).with_name("running.py")), {"JOB": None})["build"]


def recipe(shapes: Path, steps: int = 2, objective: str | Any = "vqa", **changes: Any) -> Recipe:
    """``objective`` is the name of one of ``running.py``, or a configuration."""
    data, held_out = shapes / "train-*.tar", shapes / "test-*.tar"
    name = objective if isinstance(objective, str) else "vqa"
    built = BUILD(data, held_out, objective=name, steps=steps, evaluate_every=0)
    return dataclasses.replace(built, **({} if isinstance(objective, str) else {"objective": objective}), **changes)


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(recipe(shapes), tmp_path_factory.mktemp("trained")).model_folder


def test_the_training_data_are_asked_for_answers_once(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(recipe(shapes), tmp_path)
    answers = json.loads((tmp_path / "task.json").read_text())["answers"]
    assert "yes" in answers

    def again(config: VqaConfig, records: object) -> VqaConfig:
        raise AssertionError("the answers are known")

    monkeypatch.setattr(VisualQuestionAnswering, "complete", again)
    run = run_recipe(recipe(shapes, steps=3), tmp_path)
    assert run.outcome.step == 3
    assert load(run.model_folder).task["vqa"]["answers"] == answers


def test_before_the_first_checkpoint_they_are_asked_again(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text('{"answers": ["of another data set"], "answering": "classify"}')
    run_recipe(recipe(shapes), tmp_path)
    assert "yes" in json.loads((tmp_path / "task.json").read_text())["answers"]


def test_a_trained_head_goes_on(shapes: Path, trained: Path, tmp_path: Path) -> None:
    begun = recipe(shapes, 1, start=(str(trained),))
    still = dataclasses.replace(begun, optim=dataclasses.replace(begun.optim, lr=0.0, warmup_lr=0.0, min_lr=0.0))
    head = load(run_recipe(still, tmp_path).model_folder).task_state
    for name, value in load(trained).task_state.items():
        torch.testing.assert_close(head[name], value)


def test_a_head_of_another_shape_begins_anew(
    shapes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = VqaConfig(answering="classify", answers=("yes", "no"))
    run = run_recipe(recipe(shapes, 1, start=(str(trained),), objective=objective), tmp_path)
    assert "a new head" in capsys.readouterr().err
    assert load(run.model_folder).task_state["head.classify.weight"].shape[0] == 2


# --- self-critical captions ---------------------------------------------------------------------------------------


def test_the_training_data_are_studied_once(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studied: list[Path] = []
    study = SelfCritical.study

    def noted(self: SelfCritical, records: Iterable[Record], file: Path) -> None:
        studied.append(file)
        study(self, records, file)

    monkeypatch.setattr(SelfCritical, "study", noted)
    run_recipe(recipe(shapes, objective="self_critical"), tmp_path)
    assert studied == [tmp_path / "study.json.gz"]
    found = DocumentFrequencies.read(studied[0])
    captions = [record.captions for record in open_source(str(shapes / "train-*.tar"))]
    expected = DocumentFrequencies.count(map(ptb_tokenize, captions))
    assert (found.pictures, found.counts) == (expected.pictures, expected.counts)
    assert found.counts
    before = studied[0].read_bytes()

    def again(*_: object) -> None:
        raise AssertionError("the frequencies are known")

    monkeypatch.setattr(DocumentFrequencies, "count", again)
    longer = recipe(shapes, steps=3, objective="self_critical")
    longer = dataclasses.replace(longer, data=dataclasses.replace(longer.data, evaluate=()))  # which counts its own
    assert run_recipe(longer, tmp_path).outcome.step == 3
    assert studied[0].read_bytes() == before


def test_before_the_first_checkpoint_they_are_studied_again(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "study.json.gz").write_bytes(b"of another data set")
    run_recipe(recipe(shapes, objective="self_critical"), tmp_path)
    assert DocumentFrequencies.read(tmp_path / "study.json.gz").pictures == 12


def test_a_damaged_study_is_named(shapes: Path, tmp_path: Path) -> None:
    run_recipe(recipe(shapes, objective="self_critical"), tmp_path)
    (tmp_path / "study.json.gz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"study\.json\.gz"):
        run_recipe(recipe(shapes, steps=3, objective="self_critical"), tmp_path)


def test_other_tasks_study_nothing(shapes: Path, trained: Path) -> None:
    assert not list(trained.parent.glob("study*"))


def test_self_critical_training_leaves_a_captioner(shapes: Path, tmp_path: Path) -> None:
    run = run_recipe(recipe(shapes, objective="self_critical"), tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "losses" in line]
    assert [set(line["losses"]) for line in steps] == [{"self_critical"}] * 2
    assert all(0 <= line["reward"] <= 10 for line in steps)
    assert "CIDEr" in run.outcome.metrics
    loaded = load(run.model_folder)
    assert set(loaded.task or {}) == {"recipe", "caption"}
    assert not loaded.task_state
    report = Predictor.load(run.model_folder, precision="fp32").evaluate("caption", [str(shapes / "test-*.tar")])
    assert report.scores["CIDEr"] == pytest.approx(run.outcome.metrics["CIDEr"])


def test_self_critical_training_needs_all_captions_of_a_picture(shapes: Path, tmp_path: Path) -> None:
    begun = recipe(shapes, objective="self_critical")
    apart = dataclasses.replace(begun, data=dataclasses.replace(begun.data, per_caption=True))
    with pytest.raises(ValueError, match=r"set data\.per_caption=False"):
        run_recipe(apart, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


# --- ranking by matching ------------------------------------------------------------------------------------------


def test_ranking_trains_what_matches(shapes: Path, trained: Path, tmp_path: Path) -> None:
    begun = recipe(shapes, objective="ranking", start=(str(trained),))
    run = run_recipe(begun, tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["losses"] for line in logged if "losses" in line]
    assert [set(line) for line in losses] == [{"rank", "itm"}] * 2
    assert all(value > 0 for line in losses for value in line.values())
    assert {"mean", "t2i_r1", "i2t_r1"} <= set(run.outcome.metrics)
    before, after = load(trained).model.state_dict(), load(run.model_folder).model.state_dict()
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    model = load(trained).model
    assert isinstance(model, VisionLanguageModel)
    used = {name for part in TextRanking.uses for name in model.parts.get(part, ())}
    assert changed == used & {name.partition(".")[0] for name in before}
    scores = (
        Predictor.load(run.model_folder, precision="fp32").evaluate("retrieval", [str(shapes / "test-*.tar")]).scores
    )
    assert scores == pytest.approx({name: run.outcome.metrics[name] for name in scores})
