"""Networks with soft routers in one process, or with their experts spread over two; started with ``JOB`` set.

JOB: ``folder`` (results go to ``WORLD-RANK.pt`` there), ``shapes`` (shards), ``world``, ``rank``, ``environment``.

Shape legend: S tokens of the whole batch, of which a process has a part, D width, G rows of the whole batch.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import torch
from torch import nn

from triptych.checkpoints.folder import save_folder
from triptych.data.batches import ImageTextBatch, Tokens
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.eve import Eve, EveConfig, PixelDecoderConfig
from triptych.models.layers import run_block
from triptych.models.moe import MoEConfig, SoftMoE
from triptych.models.text import TextConfig, pad_ids
from triptych.models.vision import VisionConfig
from triptych.objectives.alignment import Alignment, AlignmentConfig
from triptych.objectives.balance import BalanceConfig, Balanced
from triptych.objectives.distributed import rank, world_size
from triptych.objectives.masked_signal import MaskedSignal, MaskedSignalConfig
from triptych.objectives.pretraining import TextIds
from triptych.training import flops
from triptych.training.expert_parallel import spread_experts, whole_experts
from triptych.training.loop import TrainConfig, Trainer, TrainingStopped
from triptych.training.optim import OptimConfig
from triptych.training.parallel import process_group
from triptych.training.runs import DataConfig, Recipe, run_recipe

# --- a layer ----------------------------------------------------------------------------------------------------

S, D, CUT = 24, 16, 15
"""The first process has more of the tokens than the second."""

LAYERS = {
    "uneven": {},
    "one choice": {"top_k": 1},
    "an expert of each process": {"experts": 2, "top_k": 1},
    "an idle expert": {"shunned": (2,)},
    "all to one process": {"shunned": (2, 3)},
    "padding": {"padding": (3, 4, 14, 15, 22)},
    "nothing but padding in a process": {"padding": range(CUT, S)},
    "recomputed": {"recomputed": True},
    "bf16": {"autocast": True},
}


def layer(experts=4, top_k=2, shunned=(), padding=(), recomputed=False, autocast=False):
    """Outputs and gradients of this process's part, and how many rows each expert got from it."""
    generator = torch.Generator().manual_seed(5)
    moe = SoftMoE(D, 32, MoEConfig(experts, top_k=top_k), "quick_gelu")
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        moe.router.gate.weight[list(shunned), 0] = -1000
    if world_size() > 1:
        spread_experts(moe)
    x_SD, wish_SD = torch.randn(2, S, D, generator=generator).unbind()
    x_SD[:, 0] = 1
    modality_S = torch.arange(S) % 3 // 2
    real_S = ~torch.isin(torch.arange(S), torch.tensor(list(padding), dtype=torch.long)) if padding else None
    own = [slice(0, CUT), slice(CUT, S)][rank()] if world_size() > 1 else slice(None)
    x_SD, wish_SD, modality_S = x_SD[own].clone().requires_grad_(), wish_SD[own], modality_S[own]
    real_S = None if real_S is None else real_S[own]
    moe.routings = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y_SD = run_block(moe, x_SD, modality_S, real_S, checkpointing=recomputed)
    # The mean over processes is the sum over all tokens.
    (world_size() * (y_SD * wish_SD).sum()).backward()
    grads = {name: parameter.grad for name, parameter in moe.named_parameters()}
    chosen_E = moe.routings[0].chosen_ME.sum(0)
    return {"y": y_SD.detach(), "x grad": x_SD.grad / world_size(), "grads": grads, "chosen": chosen_E}


# --- a network ----------------------------------------------------------------------------------------------------

G, PAD, CLS, SEP, MASK, VOCAB = 6, 0, 1, 2, 3, 40
LENGTHS = (3, 9, 1, 20, 5, 12)


def eve(experts=4):
    torch.manual_seed(0)
    vision = VisionConfig(32, layers=2, heads=2, patch=8, image_size=32, layer_norm_eps=1e-6)
    text = TextConfig(VOCAB, 32, 2, 48, max_positions=32, dropout=0.0, activation="quick_gelu")
    return Eve(
        EveConfig(
            vision,
            text,
            deep_layers=2,
            moe=MoEConfig(experts),
            layer_scale=1.0,
            drop_path=0.0,
            embed_dim=16,
            pixel_decoder=PixelDecoderConfig(width=16, layers=1, heads=2),
        )
    )


def tokens(rows):
    return Tokens(pad_ids(rows, PAD), pad_ids([[1] * len(row) for row in rows], 0).bool())


def own_batch(number):
    """This process's rows of a batch; texts are padded to the longest of them."""
    generator = torch.Generator().manual_seed(number)
    texts = [[CLS, *torch.randint(4, VOCAB, (n,), generator=generator).tolist(), SEP] for n in LENGTHS]
    pixels = torch.randint(0, 256, (G, 3, 32, 32), dtype=torch.uint8, generator=generator)
    B = G // world_size()
    own = slice(B * rank(), B * (rank() + 1))
    return ImageTextBatch(pixels[own], tokens(texts[own]), torch.arange(G)[own] + G * number)


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    pass


class Batches:
    """The batches of a run; before number ``until`` it is interrupted."""

    skipped_count = 0

    def __init__(self, until=None):
        self.number, self.until = 0, until

    def __iter__(self):
        while True:
            if self.number == self.until:
                raise Interrupted
            self.number += 1
            yield own_batch(self.number)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def masked_signal(model):
    ids = TextIds(PAD, MASK, (PAD, CLS, SEP), VOCAB)
    return MaskedSignal(model, MaskedSignalConfig(), ids, mean=HALF, std=HALF, seed=3)


def alignment(model):
    """Has a teacher with experts, which are spread, too."""
    config = AlignmentConfig(queue_size=8, momentum=0.9, alpha_warmup=2)
    return Alignment(model, config, mean=HALF, std=HALF, seed=3)


RUNS = {
    "masked signals": (masked_signal, {"ema": 0.7, "checkpointing": True}, {"clip": 0.5}),
    "alignment": (alignment, {"accumulate": 2}, {"muon_lr": 0.01, "clip": None}),
}


def trainer(folder, process, name, until=None, spread=None, evaluate=None):
    objective, train, optim = RUNS[name]
    spread = world_size() > 1 if spread is None else spread
    config = TrainConfig(
        4, G // process.world, precision="fp32", checkpoint_every=2, log_every=1, expert_parallel=spread, **train
    )
    rates = OptimConfig(lr=1e-3, vision_lr=None, warmup_steps=1, **optim)
    task = Balanced(objective(eve()), BalanceConfig(0.1))
    made = Trainer(task, Batches(until), folder, config, rates, process, evaluate=evaluate)
    made.flops_per_step = 1.0  # counting them takes as long as all steps; recipes do it here
    return made


def training(folder, process, name):
    """What a run ends with, and what it is when evaluated."""
    seen = []

    def evaluate(kept, step):
        """What the first process can do by itself."""
        with torch.no_grad():
            batch = own_batch(0)
            image = kept.encode_image(batch.pixels_BCHW[:2] / 255)
            text = kept.encode_text(batch.text.ids_BL[:2, :3])
            seen.append(kept.fuse(image, text).text_BLD)
        return {"experts": len(kept.network.blocks[-1].ffn.moe.experts.expand)}

    run = trainer(folder, process, name, evaluate=evaluate)
    metrics = dict(run.run().metrics)
    with whole_experts(run.kept):
        if process.leads:
            save_folder(folder / "model", run.kept)
    own = len(run.kept.network.blocks[-1].ffn.moe.experts.expand)
    shared = {n: p.detach().clone() for n, p in run.task.named_parameters() if ".experts." not in n}
    norms = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "metrics": metrics,
        "seen": seen,
        "own experts": own,
        "shared": shared,
        "norms": [record["norm"] for record in norms if "norm" in record],
    }


def resumed(folder, process, name):
    """A run that is interrupted after the checkpoint of step 2; and what is said when it is resumed otherwise."""
    accumulate = RUNS[name][1].get("accumulate", 1)
    with contextlib.suppress(Interrupted):
        trainer(folder, process, name, until=3 * accumulate).run()
    try:
        trainer(folder, process, name, spread=False).run()
    except ValueError as error:
        said = str(error)
    trainer(folder, process, name).run()
    return said


class Overflowing(nn.Module):
    """Of the second process alone the loss is not finite, while all gradients are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    @property
    def kept(self):
        return self

    def forward(self, batch, step, part):
        return {"sum": self.weight.sum() + (float("inf") if rank() else 0.0)}


def overflow(folder, process):
    try:
        Trainer(Overflowing(), Batches(), folder, TrainConfig(2, 3), OptimConfig(vision_lr=None), process).run()
    except TrainingStopped as error:
        return str(error)


def too_few(folder, process):
    """Three experts cannot be spread over two processes."""
    task = masked_signal(eve(experts=3))
    config = TrainConfig(2, 3, expert_parallel=True)
    try:
        Trainer(task, Batches(), folder, config, OptimConfig(vision_lr=None), process)
    except ValueError as error:
        return str(error)


# --- a recipe -------------------------------------------------------------------------------------------------------


def recipe(folder, shapes, process, spread):
    """Data, training, evaluation and the saved model."""
    model = eve().config
    data = DataConfig(
        train=(str(shapes / "train-*.tar"),),
        evaluate=(str(shapes / "test-*.tar"),),
        preprocessing=Preprocessing(32, HALF, HALF),
        max_tokens=24,
    )
    train = TrainConfig(3, 3, precision="fp32", checkpoint_every=3, log_every=1, expert_parallel=spread)
    small = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=256))
    optim = OptimConfig(lr=1e-3, vision_lr=None, warmup_steps=1)
    run = run_recipe(Recipe("tiny", MaskedSignalConfig(), small, data, train, optim), folder, process)
    return dict(run.outcome.metrics)


def main(job):
    torch.set_num_threads(1)
    flops.matmul_rate.__defaults__ = (64, 0.0)  # what it measures is of no interest here
    os.environ.update(job["environment"])
    folder, shapes = Path(job["folder"]), Path(job["shapes"])
    with process_group() as process:
        here = folder / str(process.world)
        result = {"layers": {name: layer(**settings) for name, settings in LAYERS.items()}}
        result["runs"] = {name: training(here / name, process, name) for name in RUNS}
        if process.world > 1:
            result["resumed"] = {name: resumed(here / f"{name}, resumed", process, name) for name in RUNS}
            result["overflow"] = overflow(here / "overflow", process)
            result["too few"] = too_few(here / "too few", process)
            result["recipes"] = {
                name: recipe(here / name, shapes, process, spread)
                for name, spread in (("spread", True), ("copied", False))
            }
        torch.save(result, folder / f"{process.world}-{process.rank}.pt")


if __name__ == "__main__":
    with (
        open(JOB["output"], "a", buffering=1) as output,  # noqa: F821 - set by who runs this file
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        main(JOB)  # noqa: F821
