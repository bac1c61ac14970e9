"""An interrupted run goes on exactly: same losses to the last bit, same weights, same evaluations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Launch = Callable[..., Any]
ReadLog = Callable[[Path], list[dict[str, Any]]]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"ema": 0.7},
    "muon": {"muon_lr": 0.02},
    "accumulated in a worker": {"accumulate": 2, "workers": 1, "evaluate_every": 0},
    "captioning": {"objective": "captioning"},
    "retrieval": {"objective": "retrieval", "dropout": 0.0},
    "ranking": {"objective": "ranking"},
    "self-critical": {"objective": "self_critical"},
    "a head and its average": {"objective": "vqa", "ema": 0.7},
    "masked signal": {"objective": "masked_signal", "accumulate": 2},
}


@pytest.fixture(scope="module")
def uninterrupted(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a variant that nothing interrupted."""
    folders: dict[str, Path] = {}

    def folder_of(variant: str) -> Path:
        if variant not in folders:
            folders[variant] = tmp_path_factory.mktemp("whole") / "run"
            ended = launch(folders[variant], **VARIANTS[variant])
            assert ended.code == 0, ended.output
        return folders[variant]

    return folder_of


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def last_state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / checkpoints(folder)[-1] / "state.pt", weights_only=True)


def assert_same(found: Path, expected: Path, log_of: ReadLog) -> None:
    """Logs, saved models, and everything of the last checkpoint: teacher, queue, optimiser, average."""
    assert log_of(found) == log_of(expected)
    for name in ("model", "best"):
        ours, theirs = (
            {path.name: path.read_bytes() for path in (folder / name).glob("*.safetensors")}
            for folder in (found, expected)
        )
        assert ours == theirs, name
    torch.testing.assert_close(last_state(found), last_state(expected), rtol=0, atol=0)
    assert checkpoints(found) == checkpoints(expected) == ["step-00000004", "step-00000006"]


def test_an_uninterrupted_run(uninterrupted: Any, log_of: ReadLog) -> None:
    """What the tests below compare with is worth comparing with."""
    folder = uninterrupted("plain")
    records = log_of(folder)
    assert [(record["step"], "metrics" in record) for record in records] == [
        *[(step, False) for step in (1, 2, 3)],
        (3, True),
        *[(step, False) for step in (4, 5, 6)],
        (6, True),
    ]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(set(losses)) == 6
    assert set(records[0]["losses"]) == {"itc", "itm", "mlm", "prefix"}
    assert {"mean", "t2i_r1", "CIDEr"} <= set(records[3]["metrics"])
    task = last_state(folder)["task"]
    assert int(task["queue.filled"]) == 12
    assert not torch.equal(task["model.text.embeddings.word.weight"], task["teacher.model.text.embeddings.word.weight"])


def test_dropout_matters(uninterrupted: Any, launch: Launch, log_of: ReadLog, tmp_path: Path) -> None:
    """Otherwise the random state would not be tested."""
    assert launch(tmp_path, dropout=0.0).code == 0
    assert log_of(tmp_path)[0]["loss"] != log_of(uninterrupted("plain"))[0]["loss"]


KILLED: dict[str, tuple[Any, ...]] = {
    "before the first checkpoint": ("signal_after", 1, "SIGKILL"),
    "between checkpoints": ("signal_after", 5, "SIGKILL"),
    "before the last checkpoint": ("signal_after", 6, "SIGKILL"),
    "evaluating between checkpoints": ("killed_evaluating", 3),
    "evaluating at the end": ("killed_evaluating", 6),
    "writing the first checkpoint": ("killed_writing", 2, "state.pt", 0.5),
    "writing a checkpoint": ("killed_writing", 4, "state.pt", 0.5),
    "with a file of no bytes": ("killed_writing", 4, "rank-0.pt", 0),
    "with all bytes but no name": ("killed_before_renaming", 4),
    "removing an old checkpoint": ("killed_removing",),
}


@pytest.mark.parametrize("moment", KILLED)
def test_killed(moment: str, launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path) -> None:
    assert launch(tmp_path, KILLED[moment]).code == -9
    ended = launch(tmp_path)
    assert ended.code == 0, ended.output
    assert_same(tmp_path, uninterrupted("plain"), log_of)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_killed_in_other_trainings(
    variant: str, launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path
) -> None:
    assert launch(tmp_path, ("signal_after", 5, "SIGKILL"), **VARIANTS[variant]).code == -9
    ended = launch(tmp_path, **VARIANTS[variant])
    assert ended.code == 0, ended.output
    assert "resumed from" in ended.output
    assert_same(tmp_path, uninterrupted(variant), log_of)


def test_killed_again_and_again(launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path) -> None:
    """Also with a torn last line in the log, as a crash of the machine leaves it."""
    for step, name in ((2, "SIGKILL"), (3, "SIGTERM"), (4, "SIGKILL"), (5, "SIGKILL")):
        launch(tmp_path, ("signal_after", step, name))
        with (tmp_path / "log.jsonl").open("a") as log:
            log.write('{"step": 5, "loss": 1.')
    assert launch(tmp_path).code == 0
    assert_same(tmp_path, uninterrupted("plain"), log_of)


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 3), ("SIGINT", 5), ("SIGTERM", 6)])
def test_a_signal_saves_and_ends_well(
    name: str, step: int, launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path
) -> None:
    """At step 3 an evaluation is due, at step 6 the run would end anyway: what is missing is made up for."""
    ended = launch(tmp_path, ("signal_after", step, name))
    assert ended.code == 0
    assert f"stopped by a signal at step {step}; the same command goes on from there" in ended.output
    assert json.loads(ended.output.splitlines()[-1]) == {"finished": False, "step": step}
    assert checkpoints(tmp_path)[-1] == f"step-{step:08d}"
    assert not (tmp_path / "model").exists()
    ended = launch(tmp_path)
    assert ended.code == 0, ended.output
    assert json.loads(ended.output.splitlines()[-1]) == {"finished": True, "step": 6}
    assert log_of(tmp_path) == log_of(uninterrupted("plain"))
    torch.testing.assert_close(last_state(tmp_path), last_state(uninterrupted("plain")), rtol=0, atol=0)


def test_a_signal_with_workers(launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path) -> None:
    variant = "accumulated in a worker"
    ended = launch(tmp_path, ("signal_after", 3, "SIGINT"), **VARIANTS[variant])
    assert ended.code == 0
    assert "Traceback" not in ended.output
    assert launch(tmp_path, **VARIANTS[variant]).code == 0
    assert log_of(tmp_path) == log_of(uninterrupted(variant))


def test_a_finished_run_does_nothing_again(launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path) -> None:
    before = log_of(uninterrupted("plain"))
    ended = launch(uninterrupted("plain"))
    assert ended.code == 0
    assert log_of(uninterrupted("plain")) == before


@pytest.mark.parametrize("kind", ["OSError", "RuntimeError"])
def test_a_full_disk(kind: str, launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path) -> None:
    ended = launch(tmp_path, ("full_disk", 4, kind))
    assert ended.code == 2
    (line,) = [line for line in ended.output.splitlines() if line.startswith("CheckpointWriteError: ")]
    assert "could not write the checkpoint" in line
    assert "step-00000004" in line
    assert "Earlier checkpoints are intact; free some space and give the same command again" in line
    assert "Traceback" not in ended.output
    assert checkpoints(tmp_path) == ["step-00000002"]
    assert launch(tmp_path).code == 0
    assert_same(tmp_path, uninterrupted("plain"), log_of)


def test_a_limit_on_files(launch: Launch, tmp_path: Path) -> None:
    """The error is a real one of the file system, raised in the middle of torch.save."""
    ended = launch(tmp_path, ("limited_files", 200_000))
    assert ended.code == 2
    assert "CheckpointWriteError: could not write the checkpoint" in ended.output
    assert "Traceback" not in ended.output
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"width": 48}, "model: text: width: it was 32 and is 48"),
        ({"dropout": 0.0}, "model: text: dropout: it was 0.1 and is 0.0"),
        ({"objective": "captioning"}, "objective: context: it was None and is 'image'"),
    ],
)
def test_another_recipe(changes: dict[str, Any], where: str, launch: Launch, uninterrupted: Any) -> None:
    folder = uninterrupted("plain")
    before = (folder / "recipe.json").read_bytes()
    ended = launch(folder, **changes)
    assert ended.code == 2
    assert ended.output == (
        f"ValueError: {folder} has a run of another recipe ({where}): "
        "give the command it was begun with, or another folder\n"
    )
    assert (folder / "recipe.json").read_bytes() == before


def test_another_seed_or_average(launch: Launch, uninterrupted: Any) -> None:
    ended = launch(uninterrupted("plain"), seed=1)
    assert ended.code == 2
    assert "cannot resume the loader: it was saved with {'seed': 0} and has {'seed': 1} now" in ended.output
    ended = launch(uninterrupted("plain"), ema=0.9)
    assert ended.code == 2
    assert "does not fit this model, optimiser or average; use another folder" in ended.output


def test_what_may_change_in_a_run(launch: Launch, uninterrupted: Any, log_of: ReadLog, tmp_path: Path) -> None:
    """Workers, and how often things are written; more steps, too, but these have another schedule."""
    assert launch(tmp_path, ("signal_after", 5, "SIGKILL"), log_every=1).code == -9
    assert launch(tmp_path, workers=1, checkpoint_every=5).code == 0
    records = [{name: value for name, value in record.items() if name != "skipped"} for record in log_of(tmp_path)]
    expected = [record | {} for record in log_of(uninterrupted("plain"))]
    for record in expected:
        record.pop("skipped", None)
    assert records == expected
    assert launch(tmp_path, steps=7).code == 0
    assert log_of(tmp_path)[-2]["step"] == 7
