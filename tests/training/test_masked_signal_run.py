"""EVE's pre-training from end to end: what a run logs, how it is judged, and what it saves."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch

from triptych.checkpoints.folder import load
from triptych.models.eve import Eve
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.predict import Predictor
from triptych.tasks.retrieval import RetrievalConfig
from triptych.training.runs import Recipe, evaluate_model, run_recipe

BUILD: Callable[..., Recipe] = run_path(str(Path(__file__).with_name("running.py")), {"JOB": None})["build"]
RECALLS = {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)} | {"mean"}
SIGNALS = {"mlm", "mlm_accuracy", "mim", "minus_loss"}


def recipe(shapes: Path, candidates: int | None = 2, steps: int = 3, **settings: Any) -> Recipe:
    data, held_out = shapes / "train-*.tar", shapes / "test-*.tar"
    built = BUILD(data, held_out, objective="masked_signal", steps=steps, evaluate_every=1, batch_size=4)
    objective = MaskedSignalConfig(image_ratio=0.5, **settings)
    return dataclasses.replace(built, objective=objective, retrieval=RetrievalConfig(candidates, max_tokens=34))


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps with the paper's objective."""
    return run_recipe(recipe(shapes), tmp_path_factory.mktemp("signals")).folder


def test_losses_and_measures_are_logged(run: Path) -> None:
    steps = records(run, "losses")
    assert [set(step["losses"]) for step in steps] == [{"mlm", "mim", "balance"}] * 3
    assert all({"mlm_accuracy", "busiest", "idle"} <= step.keys() for step in steps)


def test_what_is_hidden_of_the_evaluation_data_is_predicted(run: Path, shapes: Path) -> None:
    """Nothing that is not trained is reported; the best weights are those of the smallest loss."""
    evaluations = [record["metrics"] for record in records(run, "metrics")]
    assert [set(metrics) for metrics in evaluations] == [SIGNALS] * 3
    assert all(metrics["minus_loss"] == -metrics["mlm"] - metrics["mim"] for metrics in evaluations)
    best = max(evaluations, key=lambda metrics: metrics["minus_loss"])
    for name, expected in (("model", evaluations[-1]), ("best", best)):
        loaded = load(run / name)
        assert isinstance(loaded.model, Eve)
        assert loaded.tokenizer is not None
        assert evaluate_model(recipe(shapes), loaded.model, loaded.tokenizer) == pytest.approx(expected, rel=1e-4)


def test_an_evaluation_looks_at_as_many_pictures_as_it_is_told(
    run: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(run / "model")
    assert isinstance(loaded.model, Eve)
    assert loaded.tokenizer is not None
    seen: list[int] = []
    encode, begun = loaded.model.encode_visible, recipe(shapes)
    monkeypatch.setattr("triptych.training.runs._HELD_OUT_BATCH", 2)
    monkeypatch.setattr(loaded.model, "encode_visible", lambda *args: seen.append(len(args[0])) or encode(*args))
    for limit, expected in ((0, [2, 2, 1]), (3, [2, 1]), (4, [2, 2])):
        evaluate_model(begun, loaded.model, loaded.tokenizer, limit=limit)
        assert seen == expected
        seen.clear()


def test_the_saved_model_paints_and_says_how_it_was_trained(run: Path, shapes: Path) -> None:
    loaded = load(run / "model")
    assert isinstance(loaded.model, Eve)
    assert loaded.model.pixel_decoder is not None
    state = torch.load(run / "checkpoints" / "step-00000003" / "state.pt", weights_only=True)["task"]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, state[f"task.model.{name}"]), name
    assert loaded.task == {"recipe": "tiny", "masked_signal": dataclasses.asdict(recipe(shapes).objective)}
    with pytest.raises(ValueError, match="this checkpoint was not trained for retrieval, only for: nothing"):
        Predictor.load(run / "model").check("retrieval")


@pytest.mark.parametrize(
    ("settings", "candidates", "losses"),
    [
        ({"contrast": "itc"}, 0, {"itc"}),
        ({"matching": "random"}, None, {"itm"}),
        ({"contrast": "itc", "matching": "hard"}, 2, {"itc", "itm"}),
    ],
)
def test_with_something_to_rank_by_retrieval_is_evaluated_too(
    settings: dict[str, str], candidates: int | None, losses: set[str], shapes: Path, tmp_path: Path
) -> None:
    found = run_recipe(recipe(shapes, candidates, steps=1, **settings), tmp_path)
    assert set(records(tmp_path, "losses")[0]["losses"]) == {"mlm", "mim", "balance"} | losses
    assert found.outcome.metrics.keys() == SIGNALS | RECALLS
    predictor = Predictor.load(found.model_folder, precision="fp32")
    assert predictor.retrieval.candidates == candidates
    scores = predictor.evaluate("retrieval", [str(shapes / "test-*.tar")]).scores
    assert scores == pytest.approx({name: found.outcome.metrics[name] for name in RECALLS})


@pytest.mark.parametrize(
    ("settings", "candidates", "message"),
    [
        ({"contrast": "itc"}, 2, r"no matching is trained that could re-rank candidates: set retrieval\.candidates=0"),
        ({"matching": "random"}, 2, r"could choose candidates: set retrieval\.candidates=None"),
        ({"matching": "random"}, 0, r"could choose candidates: set retrieval\.candidates=None"),
    ],
)
def test_ranking_by_what_is_not_trained_is_refused(
    settings: dict[str, str], candidates: int, message: str, shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe(shapes, candidates, **settings), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_network_without_a_decoder_of_pixels_is_refused(shapes: Path, tmp_path: Path) -> None:
    begun = recipe(shapes)
    blind = dataclasses.replace(begun, model=dataclasses.replace(begun.model, pixel_decoder=None))
    with pytest.raises(ValueError, match="this eve has no pixel_decoder to paint hidden patches with"):
        run_recipe(blind, tmp_path)
