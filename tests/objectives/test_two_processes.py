"""Two processes with half a batch each must do what one process does with the whole batch.

This file is also the program of those processes: ``python test_two_processes.py <folder> <world> <rank>`` writes its
results to a file in the folder. World 1 is the reference.

Shape legend: B rows of this process, G rows of all processes, L text tokens, D width.
"""

import dataclasses
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from triptych.data.batches import ImageTextBatch, PretrainingBatch, Tokens
from triptych.models.bridgetower import BridgeTower, BridgeTowerConfig
from triptych.models.eve import Eve, EveConfig, PixelDecoderConfig
from triptych.models.moe import MoEConfig
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.protocol import Encoded
from triptych.models.text import TextConfig, pad_ids
from triptych.models.vision import VisionConfig
from triptych.objectives.alignment import Alignment, AlignmentConfig, Contrast, OfficialBehaviour, Pairs
from triptych.objectives.balance import BalanceConfig, Balanced
from triptych.objectives.distributed import (
    StepNoise,
    gather_encoded,
    gather_rows,
    mean_over_all,
    rank,
    world_size,
)
from triptych.objectives.masked_matching import MaskedMatching, MaskedMatchingConfig
from triptych.objectives.masked_signal import MaskedSignal, MaskedSignalConfig
from triptych.objectives.pretraining import Pretraining, PretrainingConfig, TextIds

TIMEOUT = 120  # seconds; a run takes about five
WORLD, G = 2, 6
PAD, CLS, SEP, MASK, VOCAB = 0, 1, 2, 3, 40
LENGTHS = [3, 9, 1, 70, 5, 12]
"""Words of each row. The second process has a text longer than any of the first's."""
IDS = [[11, 12, 11, 13, 12, 14], [13, 15, 16, 17, 15, 18]]
"""Pictures of two steps: some repeat in the batch, in the other process, and in the queue."""


def whole_batch(step: int) -> PretrainingBatch:
    generator = torch.Generator().manual_seed(step)
    texts = [torch.randint(4, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    cuts = [length // 3 for length in LENGTHS]
    return PretrainingBatch(
        torch.randint(0, 256, (G, 3, 16, 16), dtype=torch.uint8, generator=generator),
        tokens([[CLS, *text] for text in texts]),
        torch.tensor(IDS[step]),
        tokens([[CLS, *text[:cut]] for text, cut in zip(texts, cuts, strict=True)]),
        tokens([[CLS, *text[cut:], SEP] for text, cut in zip(texts, cuts, strict=True)]),
    )


def tokens(rows: list[list[int]]) -> Tokens:
    return Tokens(pad_ids(rows, PAD), pad_ids([[1] * len(row) for row in rows], 0).bool())


def own_part(batch: PretrainingBatch) -> PretrainingBatch:
    """The rows of this process, padded to the longest of them alone."""
    B = G // world_size()
    own = slice(B * rank(), B * (rank() + 1))

    def cut(part: Tokens) -> Tokens:
        length = int(part.mask_BL[own].sum(1).max())
        return Tokens(part.ids_BL[own, :length], part.mask_BL[own, :length])

    text, prefix, target = cut(batch.text), cut(batch.prefix), cut(batch.target)
    return PretrainingBatch(batch.pixels_BCHW[own], text, batch.image_id_B[own], prefix, target)


VISION = VisionConfig(32, layers=1, heads=2, patch=8, image_size=16)
TEXT = TextConfig(VOCAB, 32, 2, 48, max_positions=80, dropout=0.0, attention_dropout=0.0)


def tiny_model(**changes: Any) -> MPlug:
    torch.manual_seed(0)
    config = MPlugConfig(VISION, TEXT, text_layers=1, fusion_layers=3, decoder_layers=1, embed_dim=16, stride=2)
    model = MPlug(dataclasses.replace(config, **changes))
    stir(model)
    return model


def tiny_bridgetower() -> BridgeTower:
    torch.manual_seed(0)
    vision = dataclasses.replace(VISION, layers=2)
    model = BridgeTower(BridgeTowerConfig(vision, TEXT, text_layers=2, fusion_layers=2, embed_dim=16))
    stir(model)
    return model


def tiny_eve() -> Eve:
    torch.manual_seed(0)
    vision = dataclasses.replace(VISION, layers=2)
    decoder = PixelDecoderConfig(16, layers=1, heads=2)
    config = EveConfig(vision, TEXT, 1, moe=MoEConfig(3), drop_path=0.0, embed_dim=16, pixel_decoder=decoder)
    model = Eve(config)
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


class Counting(Pretraining):
    """Remembers what it masked, and what it drew negatives from."""

    masked = 0
    candidates: tuple[Encoded, Encoded, Contrast] | None = None

    def _mask(self, text: Tokens, noise: StepNoise) -> tuple[Tokens, Tensor]:
        result = super()._mask(text, noise)
        self.masked = int(result[1].sum())
        return result

    def _draw_pairs(self, image: Encoded, text: Encoded, contrast: Contrast, noise: StepNoise) -> Pairs:
        self.candidates = image, text, contrast
        return super()._draw_pairs(image, text, contrast, noise)

    def negatives(self) -> tuple[Tensor, Tensor]:
        """Of many draws: which of this process's own texts and images each negative is (-1: none of them)."""
        assert self.candidates is not None
        image, text, _ = self.candidates
        B, texts, images = len(text), [], []
        for step in range(40):
            pairs = super()._draw_pairs(*self.candidates, StepNoise(0, step))
            texts.append(own_rows(pairs.texts.rows(slice(B, 2 * B)), text))
            images.append(own_rows(pairs.images.rows(pairs.image_rows[2 * B :]), image))
            assert pairs.counts.all()
        return torch.stack(texts), torch.stack(images)


def own_rows(found: Encoded, own: Encoded) -> Tensor:
    """Rows are told apart by their first token."""
    distance_BB = torch.cdist(found.hidden_BLD[:, 0], own.hidden_BLD[:, 0])
    return torch.where(distance_BB.amin(1) < 1e-6, distance_BB.argmin(1), -1)


def parallel(task: nn.Module) -> nn.Module:
    return DistributedDataParallel(task, broadcast_buffers=False) if world_size() > 1 else task


def train(task: Alignment | Balanced, batches: list[ImageTextBatch]) -> dict[str, Any]:
    """Two steps of plain gradient descent: losses and gradients of each, and the state afterwards."""
    module = parallel(task.train())
    steps = []
    for number, batch in enumerate(batches):
        losses = module(batch, 8 + number)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        grads = {name: p.grad.clone() for name, p in task.kept.named_parameters() if p.grad is not None}
        steps.append({"losses": {name: loss.detach() for name, loss in losses.items()}, "grads": grads})
        if isinstance(task, Counting):
            steps[-1]["masked"] = task.masked
        with torch.no_grad():
            for parameter in task.kept.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        task.zero_grad(set_to_none=True)
    return {"steps": steps, "state": {name: value.clone() for name, value in task.state_dict().items()}}


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SETTINGS: dict[str, Any] = {"queue_size": 8, "momentum": 0.9, "alpha": 0.4, "alpha_warmup": 20}


def pretraining(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = PretrainingConfig(**{**SETTINGS, "mlm_probability": 0.3, **changes})
    task = Counting(tiny_model(**model), config, TextIds(PAD, MASK, (PAD, CLS, SEP), VOCAB), mean=MEAN, std=STD, seed=3)
    result = train(task, [own_part(whole_batch(step)) for step in range(2)])
    with torch.no_grad():
        result["negatives"] = task.negatives()
    return result


def alignment() -> dict[str, Any]:
    task = Alignment(tiny_model(), AlignmentConfig(**SETTINGS), mean=MEAN, std=STD, seed=3)
    return train(task, [own_part(whole_batch(step)) for step in range(2)])


def masked_matching(**changes: Any) -> dict[str, Any]:
    config = MaskedMatchingConfig(**{"mlm_probability": 0.3, **changes})
    ids = TextIds(PAD, MASK, (PAD, CLS, SEP), VOCAB)
    task = MaskedMatching(tiny_bridgetower(), config, ids, mean=MEAN, std=STD, seed=3)
    return train(task, [own_part(whole_batch(step)) for step in range(2)])


def masked_signal(**changes: Any) -> dict[str, Any]:
    """And what the process that leads evaluates meanwhile: it would wait for ever for the others if it asked them."""
    config = MaskedSignalConfig(**changes)
    ids = TextIds(PAD, MASK, (PAD, CLS, SEP), VOCAB)
    task = MaskedSignal(tiny_eve(), config, ids, mean=MEAN, std=STD, seed=3)
    scores = task.evaluate([whole_batch(0), whole_batch(1)]) if rank() == 0 else {}
    return {"scores": scores, **train(task, [own_part(whole_batch(step)) for step in range(2)])}


def balanced(**changes: Any) -> dict[str, Any]:
    """With a weight that its gradients cannot be overlooked by."""
    ids = TextIds(PAD, MASK, (PAD, CLS, SEP), VOCAB)
    task = MaskedSignal(tiny_eve(), MaskedSignalConfig(), ids, mean=MEAN, std=STD, seed=3)
    return train(
        Balanced(task, BalanceConfig(weight=5.0, **changes)), [own_part(whole_batch(step)) for step in range(2)]
    )


def gathering() -> dict[str, Any]:
    """Gathered rows of this process's share of fixed values, and the gradient of a loss that differs by rank."""
    generator = torch.Generator().manual_seed(1)
    x_GD, weight_2GD = torch.randn(G, 4, generator=generator), torch.randn(2, G, 4, generator=generator)
    B = G // world_size()
    own = slice(B * rank(), B * (rank() + 1))
    x_BD = x_GD[own].clone().requires_grad_()
    gathered_GD = gather_rows(x_BD)
    weight_GD = weight_2GD[rank()] if world_size() > 1 else weight_2GD.mean(0)
    (gathered_GD.square() * weight_GD).sum().backward()
    length = 3 + 2 * rank() if world_size() > 1 else 5
    mask_BL = (torch.arange(length) < 2 + rank()).expand(B, -1)
    states_BLD = torch.full((B, length, 4), float(rank()))
    encoded = gather_encoded(Encoded(states_BLD, mask_BL, (states_BLD + 1,)))
    unmasked = gather_encoded(Encoded(states_BLD[:, :2]))
    return {
        "rows": gathered_GD.detach(),
        "grad": x_BD.grad,
        "bool": gather_rows(x_GD[own] > 0),
        "long": gather_rows(torch.arange(G)[own]),
        "transposed": gather_rows(torch.arange(2 * G).view(2, G).T[own]),
        "hidden": encoded.hidden_BLD,
        "levels": encoded.levels,
        "mask": encoded.mask_BL,
        "unmasked": unmasked.mask_BL,
        "unmasked_hidden": unmasked.hidden_BLD,
    }


def means() -> dict[str, Any]:
    """Means of a different number of values in each process, also of none."""
    values = torch.arange(10.0).requires_grad_()
    weight = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1, 1, 0])
    parts = {"uneven": [values[:3], values[3:]], "one empty": [values, values[:0]], "none": [values[:0], values[:0]]}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        mine = part[rank()] if world_size() > 1 else torch.cat(part)
        mean = mean_over_all(mine)
        (grad,) = torch.autograd.grad(mean, values)
        found[name] = (mean.detach(), grad)
    half = [slice(0, 3), slice(3, 10)][rank()] if world_size() > 1 else slice(None)
    found["weighted"] = (mean_over_all(values[half], weight[half]).detach(), None)
    found["weights of zero"] = (mean_over_all(values[half], 0 * weight[half]).detach(), None)
    return found


def noise() -> dict[str, Tensor]:
    B, device = G // world_size(), torch.device("cpu")
    draws = StepNoise(4, 9)
    alone = StepNoise(4, 9, alone=True).uniform(3, 2, device=device)
    return {
        "first": draws.uniform(B, 5, 3, device=device),
        "second": draws.uniform(B, 2, device=device),
        "alone": alone,
    }


def work(folder: Path, world: int, number: int) -> None:
    """What each process runs."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            world_size=world,
            rank=number,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
    result = {
        "skip": pretraining({}),
        "asymmetric": pretraining(
            {"fusion": "asymmetric"}, distill_language=False, official=OfficialBehaviour(diagonal_targets=True)
        ),
        "local": pretraining({}, negatives="local"),
        "alone": pretraining({}, queue_size=0, momentum=None, alpha=0.0, distill_language=False),
        "alignment": alignment(),
        "masked_matching": masked_matching(),
        "masked_matching_hard": masked_matching(contrast="itc", matching="hard"),
        "masked_matching_two": masked_matching(contrast="itc", passes="two"),
        "masked_matching_local": masked_matching(negatives="local"),
        "masked_signal": masked_signal(),
        "masked_signal_simultaneous": masked_signal(passes="simultaneous", image_ratio=0.5, corruption="mask"),
        "masked_signal_hard": masked_signal(contrast="itc", matching="hard", normalise_pixels=True),
        "masked_signal_random": masked_signal(matching="random"),
        "balanced": balanced(),
        "balanced_all": balanced(fractions="all"),
        "masked_signal_local": masked_signal(contrast="itc", matching="hard", negatives="local"),
        "gathering": gathering(),
        "means": means(),
        "noise": noise(),
    }
    torch.save(result, folder / f"{world}-{number}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process found, and what each of two found."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine may have no other, or one that leads nowhere
    runs = [(1, 0), *((WORLD, number) for number in range(WORLD))]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(world), str(number)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{world}-{number}.log").open("w"),
        )
        for world, number in runs
    ]
    try:
        for process in processes:
            process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for (world, number), process in zip(runs, processes, strict=True):
        if process.returncode != 0:
            log = (folder / f"{world}-{number}.log").read_text()[-3000:]
            pytest.fail(f"process {number} of {world} ended with {process.returncode} (timeout {TIMEOUT} s):\n{log}")
    alone, *together = (torch.load(folder / f"{world}-{number}.pt", weights_only=True) for world, number in runs)
    return alone, together


Results = tuple[dict[str, Any], list[dict[str, Any]]]


MASKED_MATCHING = ["masked_matching", "masked_matching_hard", "masked_matching_two"]


MASKED_SIGNAL = [f"masked_signal{name}" for name in ("", "_simultaneous", "_hard", "_random")]
BALANCED = ["balanced", "balanced_all"]


@pytest.mark.parametrize(
    "task", ["skip", "asymmetric", "alignment", "alone", *MASKED_MATCHING, *MASKED_SIGNAL, *BALANCED]
)
@pytest.mark.parametrize("step", [0, 1])
def test_losses_and_gradients_are_those_of_the_whole_batch(task: str, step: int, results: Results) -> None:
    """DDP is told of no unused parameters; the second step would fail if there were any."""
    alone, together = (results[0][task]["steps"][step], [part[task]["steps"][step] for part in results[1]])
    for name, expected in alone["losses"].items():
        mean = torch.stack([part["losses"][name] for part in together]).mean()
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert alone["grads"]
    for part in together:
        assert part["grads"].keys() == alone["grads"].keys()
        for name, expected in alone["grads"].items():
            torch.testing.assert_close(
                part["grads"][name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_work_was_uneven(results: Results) -> None:
    """Otherwise the comparison above would show little."""
    for step in range(2):
        masked = [part["skip"]["steps"][step]["masked"] for part in results[1]]
        assert masked[0] != masked[1]
        assert sum(masked) == results[0]["skip"]["steps"][step]["masked"]
        losses = [part["skip"]["steps"][step]["losses"]["mlm"] for part in results[1]]
        assert not torch.isclose(*losses)


def test_every_parameter_of_pre_training_has_a_gradient(results: Results) -> None:
    names = {name for name, _ in tiny_model().named_parameters()}
    for result in (results[0], *results[1]):
        assert set(result["skip"]["steps"][1]["grads"]) == names


@pytest.mark.parametrize("task", ["skip", "asymmetric", "alignment"])
def test_model_teacher_and_queue_end_the_same(task: str, results: Results) -> None:
    expected = results[0][task]["state"]
    assert sorted(expected["queue.id_Q"].tolist()) == sorted([*IDS[0][4:], *IDS[1]])
    for part in results[1]:
        assert part[task]["state"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(part[task]["state"][name], value, rtol=1e-4, atol=1e-5)
    for name in expected:
        assert torch.equal(*(part[task]["state"][name] for part in results[1])), f"{name} differs between processes"


def test_negatives_of_all_processes_and_of_one(results: Results) -> None:
    """Never the row's own picture, whichever process it is in."""
    ids = torch.tensor(IDS[1]).view(WORLD, -1)
    for number, part in enumerate(results[1]):
        for drawn in part["skip"]["negatives"]:
            assert (drawn == -1).any(), "no negative came from the other process"
            assert (drawn >= 0).any(), "no negative came from this process"
        for drawn in part["local"]["negatives"]:
            assert (drawn >= 0).all()
            assert (ids[number][drawn] != ids[number]).all()


@pytest.mark.parametrize("task", ["local", "masked_matching_local", "masked_signal_local"])
def test_local_negatives_keep_processes_equal(task: str, results: Results) -> None:
    first, second = (part[task]["state"] for part in results[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gathered_rows_are_in_order_of_rank(results: Results) -> None:
    alone, together = results[0]["gathering"], [part["gathering"] for part in results[1]]
    for part in together:
        for name in ("rows", "bool", "long", "transposed"):
            assert torch.equal(part[name], alone[name]), name
            assert part[name].dtype == alone[name].dtype
        assert part["hidden"].shape == (G, 5, 4)
        assert part["hidden"][:, :, 0].tolist() == [[0, 0, 0, 0, 0]] * 3 + [[1] * 5] * 3
        assert [level[:, 0, 0].tolist() for level in part["levels"]] == [[1, 1, 1, 2, 2, 2]]
        assert part["mask"].sum(1).tolist() == [2, 2, 2, 3, 3, 3]
        assert part["unmasked"] is None
        assert part["unmasked_hidden"].shape == (G, 2, 4)


def test_gradient_of_gathered_rows_is_the_sum_over_processes(results: Results) -> None:
    """With DDP's averaging: the gradient of the mean loss."""
    found = torch.cat([part["gathering"]["grad"] for part in results[1]]) / WORLD
    torch.testing.assert_close(found, results[0]["gathering"]["grad"])


def test_means_over_all_values(results: Results) -> None:
    alone, together = results[0]["means"], [part["means"] for part in results[1]]
    expected = {"uneven": 4.5, "one empty": 4.5, "none": 0.0, "weighted": 26 / 6, "weights of zero": 0.0}
    for name, value in expected.items():
        assert float(alone[name][0]) == pytest.approx(value)
        assert float(sum(part[name][0] for part in together)) / WORLD == pytest.approx(value), name
        if alone[name][1] is not None:
            torch.testing.assert_close(sum(part[name][1] for part in together) / WORLD, alone[name][1])


def test_processes_draw_the_rows_of_one(results: Results) -> None:
    for name in ("first", "second"):
        assert torch.equal(torch.cat([part["noise"][name] for part in results[1]]), results[0]["noise"][name])


def test_an_evaluation_is_that_of_one_process(results: Results) -> None:
    alone, (leading, other) = results[0], results[1]
    for part in (leading, other):
        assert torch.equal(part["noise"]["alone"], alone["noise"]["alone"])
    for task in MASKED_SIGNAL:
        assert {"mlm", "mlm_accuracy", "mim"} <= leading[task]["scores"].keys()
        assert leading[task]["scores"] == alone[task]["scores"]


def test_noise_depends_on_seed_step_part_and_stream_and_not_on_the_length() -> None:
    def draw(seed: int = 1, step: int = 2, part: int = 0, stream: int = 0, length: int = 6) -> Tensor:
        return StepNoise(seed, step, part, stream=stream).uniform(4, length, 3, device=torch.device("cpu"))

    before = torch.get_rng_state()
    assert torch.equal(draw(), draw())
    assert torch.equal(torch.get_rng_state(), before)
    for other in (draw(seed=2), draw(step=3), draw(part=1), draw(stream=1)):
        assert not torch.isclose(other, draw()).any()
    assert torch.equal(draw(length=90)[:, :6], draw())
    assert draw().shape == (4, 6, 3)
    assert ((draw(length=5000) >= 0) & (draw(length=5000) < 1)).all()


def test_alone_nothing_is_gathered() -> None:
    assert (world_size(), rank()) == (1, 0)
    x_BD = torch.randn(2, 3)
    assert gather_rows(x_BD) is x_BD
    encoded = Encoded(x_BD[None])
    assert gather_encoded(encoded) is encoded


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
