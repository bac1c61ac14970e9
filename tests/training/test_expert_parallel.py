"""Two processes with half of the experts each must do what one process with all of them does (``spreading.py``)."""

import json
import os
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from triptych.checkpoints.folder import load_folder
from triptych.models.moe import Experts, MoEConfig, SoftMoE
from triptych.training.expert_parallel import check_spreads, clip_gradients, put_own, spread_names, whole_experts
from triptych.training.parallel import Process, parallelize

SCRIPT = Path(__file__).with_name("spreading.py")
SPREADING = runpy.run_path(str(SCRIPT))
LAYERS, RUNS, CUT = SPREADING["LAYERS"], SPREADING["RUNS"], SPREADING["CUT"]
TIMEOUT, WORLD = 120, 2

Results = dict[int, list[dict[str, Any]]]
"""What each process found, by how many there were."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def results(folder: Path, shapes: Path, processes: Any) -> Results:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    together["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    children = []
    for world, rank in [(1, 0), *((WORLD, rank) for rank in range(WORLD))]:
        environment = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        output = folder / f"output-{world}-{rank}.txt"
        job = {"folder": str(folder), "shapes": str(shapes), "output": str(output), "environment": environment}
        child = processes.Process(target=runpy.run_path, args=(str(SCRIPT), {"JOB": job}, "__main__"))
        child.start()
        children.append((child, output, world, rank))
    for child, *_ in children:
        child.join(TIMEOUT)
    codes = [child.exitcode for child, *_ in children]
    for child, *_ in children:
        child.kill()
    assert codes == [0] * len(children), "".join(output.read_text()[-3000:] for _, output, *_ in children)
    found_by: Results = {1: [], WORLD: []}
    for *_, world, rank in children:
        found_by[world].append(torch.load(folder / f"{world}-{rank}.pt", weights_only=True))
    return found_by


# --- a layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYERS)
def test_outputs_and_gradients_are_those_of_one_process(case: str, results: Results) -> None:
    (alone,), together = ([part["layers"][case] for part in results[world]] for world in (1, WORLD))
    close = {"rtol": 1e-2, "atol": 1e-2} if case == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    for name in ("y", "x grad"):
        torch.testing.assert_close(torch.cat([part[name] for part in together]), alone[name], **close)
    assert alone["grads"]
    for name, expected in alone["grads"].items():
        parts = [part["grads"][name] for part in together]
        found = torch.cat(parts) if name.startswith("experts.") else torch.stack(parts).mean(0)
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(found / scale, expected / scale, **close, msg=lambda text, n=name: f"{n}: {text}")


def test_the_cases_are_what_they_say(results: Results) -> None:
    chosen = {case: torch.stack([part["layers"][case]["chosen"] for part in results[WORLD]]) for case in LAYERS}
    assert all(len(parts[0]["layers"][case]["grads"]) == 6 for parts in results.values() for case in LAYERS)
    assert chosen["uneven"].sum(1).tolist() == [2 * CUT, 2 * (24 - CUT)]
    assert len(set(chosen["uneven"].sum(0).tolist())) > 1
    assert chosen["an idle expert"][:, 2].tolist() == [0, 0]
    assert chosen["all to one process"][:, 2:].sum() == 0
    assert chosen["nothing but padding in a process"][1].sum() == 0
    assert results[1][0]["layers"]["an idle expert"]["grads"]["experts.expand"][2].abs().max() == 0
    assert not torch.equal(results[1][0]["layers"]["bf16"]["y"], results[1][0]["layers"]["uneven"]["y"])


# --- a network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_training_goes_as_in_one_process(name: str, results: Results) -> None:
    """Norms are of all parameters; what is not spread ends the same in both processes, bit for bit."""
    (alone,), together = ([part["runs"][name] for part in results[world]] for world in (1, WORLD))
    assert (alone["own experts"], [part["own experts"] for part in together]) == (4, [2, 2])
    for part in together:
        assert part["norms"] == pytest.approx(alone["norms"], rel=1e-3)
    assert len(set(alone["norms"])) == 4
    clip = RUNS[name][2]["clip"]
    assert clip is None or max(alone["norms"]) > clip
    for parameter, value in together[0]["shared"].items():
        assert torch.equal(value, together[1]["shared"][parameter]), parameter


@pytest.mark.parametrize("name", RUNS)
def test_the_first_process_evaluates_and_saves_the_whole(name: str, folder: Path, results: Results) -> None:
    alone, (first, second) = results[1][0]["runs"][name], [part["runs"][name] for part in results[WORLD]]
    assert (first["metrics"], second["metrics"]) == ({"experts": 4}, {})
    torch.testing.assert_close(first["seen"], alone["seen"], rtol=1e-3, atol=1e-3)
    model, expected = (load_folder(folder / str(world) / name / "model").model for world in (WORLD, 1))
    begun = SPREADING["eve"]().state_dict()
    for parameter, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[parameter], value, rtol=1e-3, atol=1e-3, msg=parameter)
        if ".experts." in parameter:
            moved = (value - begun[parameter]).flatten(1).abs().amax(1)
            assert (moved > 3e-4).sum() >= 3, f"{parameter} was hardly trained, and the comparison says little"


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_an_uninterrupted_one(name: str, folder: Path, results: Results) -> None:
    """Everything of the last checkpoint, of both processes: experts, their optimiser, their average or teacher."""
    last = "checkpoints/step-00000004"
    states = []
    for run in (name, f"{name}, resumed"):
        files = sorted((folder / str(WORLD) / run / last).iterdir())
        assert [file.name for file in files] == ["rank-0.pt", "rank-1.pt", "state.pt"]
        states.append([torch.load(file, weights_only=True) for file in files])
    (first, second, shared), resumed = states
    shared["metrics"], resumed[2]["metrics"] = {}, {}
    torch.testing.assert_close(resumed, states[0], rtol=0, atol=0)
    assert not any(".experts." in key for key in shared["task"])
    trained = [key for key in first["experts"]["task"] if key.endswith(".experts.expand")]
    assert len(trained) == (2 if name == "masked signals" else 4)  # with those of the teacher
    for key in trained:
        assert first["experts"]["task"][key].shape == (2, 48, 32)
        assert not torch.equal(first["experts"]["task"][key], second["experts"]["task"][key])
    assert sum(map(len, first["experts"]["optimizer"])) == 2 * 4
    if RUNS[name][1].get("ema"):
        assert set(first["experts"]["average"]) == {
            key.replace("task.model.", "module.") for key in first["experts"]["task"]
        }


def test_what_is_said(results: Results) -> None:
    for part in results[WORLD]:
        for said in part["resumed"].values():
            assert "step-00000002 was written with expert_parallel on: resume it like that" in said
        assert (
            "the 3 experts of model.network.blocks.0.ffn.moe cannot be spread evenly among 2 processes"
            in part["too few"]
        )
    first, second = (part["overflow"] for part in results[WORLD])
    assert "the loss of another process is not finite at step 1" in first
    assert "the loss sum is not finite at step 1" in second


def test_a_recipe(folder: Path, results: Results) -> None:
    """Spread experts and copied ones train alike, and leave folders that any process can load."""
    spread, copied = (results[WORLD][0]["recipes"][name] for name in ("spread", "copied"))
    assert spread == pytest.approx(copied, rel=1e-3)
    assert {"mlm", "mim"} <= set(spread)
    for saved in ("model", "best"):
        ours, theirs = (
            load_file(folder / str(WORLD) / name / saved / "model.safetensors") for name in ("spread", "copied")
        )
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-3, msg=key)
    recipe = json.loads((folder / str(WORLD) / "spread" / "recipe.json").read_text())
    assert recipe["train"]["expert_parallel"] is True


# --- without other processes ------------------------------------------------------------------------------------------


def small() -> SoftMoE:
    torch.manual_seed(0)
    moe = SoftMoE(8, 16, MoEConfig(experts=4), "gelu")
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    return moe


def test_one_process_keeps_all_experts() -> None:
    moe = small()
    assert parallelize(moe, Process(), checkpointing=False, compile=False, expert_parallel=True) is moe
    assert type(moe.experts) is Experts
    assert spread_names(moe) == set()
    with whole_experts(moe):
        assert type(moe.experts) is Experts


@pytest.mark.parametrize("world", [1, 2, 4])
def test_numbers_of_processes_that_divide_the_experts(world: int) -> None:
    check_spreads(nn.Sequential(small()), world)


@pytest.mark.parametrize("world", [3, 8])
def test_numbers_of_processes_that_do_not(world: int) -> None:
    with pytest.raises(ValueError, match=rf"the 4 experts of 0 cannot be spread evenly among {world} processes"):
        check_spreads(nn.Sequential(small()), world)


def test_no_experts_to_spread() -> None:
    with pytest.raises(ValueError, match="this model has none: turn it off"):
        parallelize(nn.Linear(2, 2), Process(), checkpointing=False, compile=False, expert_parallel=True)


def test_a_checkpoint_of_copied_experts_is_resumed_so(tmp_path: Path) -> None:
    put_own({}, {}, small(), tmp_path)
    with pytest.raises(ValueError, match="was written with expert_parallel on: resume it like that"):
        put_own({}, {"task": {}}, small(), tmp_path)


def test_nothing_but_padding_has_gradients() -> None:
    """Zeros, not none: DDP, and processes that share experts, wait for those of all."""
    moe = small()
    x_SD = torch.randn(3, 8, requires_grad=True)
    y_SD = moe(x_SD, torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.bool))
    y_SD.sum().backward()
    assert torch.equal(y_SD, torch.zeros(3, 8))
    for grad in (x_SD.grad, *(parameter.grad for parameter in moe.parameters())):
        assert grad is not None
        assert not grad.any()


def test_clipping_without_spread_experts() -> None:
    moe, other = small(), small()
    for module in (moe, other):
        module(torch.ones(3, 8), torch.zeros(3, dtype=torch.long)).sum().backward()
    norm = clip_gradients(moe, 0.1)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(other.parameters(), 0.1))
    found: list[Tensor | None] = [parameter.grad for parameter in moe.parameters()]
    torch.testing.assert_close(found, [parameter.grad for parameter in other.parameters()])
