"""What a run of a task keeps: what it found out of the training data, and the head of the checkpoint it starts from."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch

from triptych.checkpoints.folder import load
from triptych.tasks.vqa import VisualQuestionAnswering, VqaConfig
from triptych.training.runs import Recipe, run_recipe

BUILD: Callable[..., Recipe] = run_path(str(Path(__file__).with_name("running.py")), {"JOB": None})["build"]


def recipe(shapes: Path, steps: int = 2, **changes: Any) -> Recipe:
    data, held_out = shapes / "train-*.tar", shapes / "test-*.tar"
    return dataclasses.replace(BUILD(data, held_out, objective="vqa", steps=steps, evaluate_every=0), **changes)


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
