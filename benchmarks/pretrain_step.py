"""One pre-training step: time, share of the processor's matrix products, peak memory, and where the time goes.

    python benchmarks/pretrain_step.py > benchmarks/results/pretrain_step.json

mPLUG with all four objectives, momentum teacher and full queue: forward, backward, clipping and AdamW, on random pixels
and words. The base size has its own sizes (256 pixels, 25 tokens) at batch 4, with and without recomputing activations;
the tiny size is a step of the recipe ``shapes_tiny`` (48 pixels, batch 64, up to 34 tokens). Each in fp32 and in bf16
autocast, in a process of its own so that its peak memory is its own.

"GFLOP" counts what was computed, recomputed activations included; norms, activations, softmax and the optimiser count
as none, their time does. The limit is the best rate of ``common.products`` in turns with the step. The breakdown is by
torch.profiler, of separate steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from common import Options, Work, count_flops, in_turns, options, parser, products, report
from triptych.data.batches import PretrainingBatch, Tokens
from triptych.models.mplug import MPlug
from triptych.objectives.pretraining import Pretraining, PretrainingConfig, TextIds
from triptych.recipes.mplug import mplug_base_4m
from triptych.recipes.shapes import shapes_tiny
from triptych.training.flops import peak_memory_gb
from triptych.training.optim import build_optimizer
from triptych.training.parallel import autocast, set_checkpointing
from triptych.training.runs import Recipe

BASE_BATCH = 4
VARIANTS = {
    f"{size} {precision}{' checkpointing' if checkpointing else ''}": (size, precision, checkpointing)
    for size, choices in {"base": (False, True), "tiny": (False,)}.items()
    for checkpointing in choices
    for precision in ("fp32", "bf16")
}
MATRIX_PRODUCTS = ("mm", "bmm", "conv", "scaled_dot_product")
"""Parts of the names of operators that multiply matrices."""


def random_batch(recipe: Recipe, size: int) -> PretrainingBatch:
    """Pixels and words with the recipe's shapes; texts are between half and the whole of the longest."""
    side, longest = recipe.data.preprocessing.image_size, recipe.data.max_tokens

    def tokens(low: int, high: int) -> Tokens:
        lengths_B = torch.randint(low, high + 1, (size, 1))
        mask_BL = torch.arange(int(lengths_B.max())) < lengths_B
        ids_BL = torch.randint(5, recipe.model.text.vocab_size, mask_BL.shape)
        return Tokens(ids_BL * mask_BL, mask_BL)

    return PretrainingBatch(
        pixels_BCHW=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        text=tokens(longest // 2, longest),
        image_id_B=torch.arange(size),
        prefix=tokens(1, longest // 2),
        target=tokens(longest // 2, longest),
    )


class Step:
    """One optimiser step, as :class:`triptych.training.loop.Trainer` makes it."""

    def __init__(self, recipe: Recipe, batch: PretrainingBatch, precision: str, *, checkpointing: bool) -> None:
        assert isinstance(recipe.objective, PretrainingConfig)
        self.batch, self.precision, self.recipe = batch, precision, recipe
        pixels, ids = recipe.data.preprocessing, TextIds(0, 4, (0, 1, 2, 3, 4), recipe.model.text.vocab_size)
        self.task = Pretraining(MPlug(recipe.model), recipe.objective, ids, mean=pixels.mean, std=pixels.std)
        self.task.train()
        queue = self.task.queue
        for features_QE in (queue.image_QE, queue.text_QE):
            features_QE.copy_(nn.functional.normalize(torch.randn_like(features_QE), dim=-1))
        queue.id_Q.fill_(-1)
        queue.filled.fill_(queue.size)
        set_checkpointing(self.task, checkpointing)
        self.optimizer = build_optimizer(self.task, recipe.optim)
        self.number = recipe.objective.alpha_warmup

    def __call__(self) -> None:
        with autocast(torch.device("cpu"), self.precision):
            losses = self.task(self.batch, self.number)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.task.parameters(), self.recipe.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1


def breakdown(step: Step, steps: int) -> dict[str, float]:
    """Share of the time of each operator: matrix products together, then whatever takes a hundredth."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    products_time = sum(e.self_cpu_time_total for e in events if any(part in e.key for part in MATRIX_PRODUCTS))
    rest = [e for e in events if not any(part in e.key for part in MATRIX_PRODUCTS)]
    rest.sort(key=lambda event: event.self_cpu_time_total, reverse=True)
    shares = {event.key: event.self_cpu_time_total / total for event in rest}
    return {"matrix products": products_time / total, **{key: x for key, x in shares.items() if x >= 0.01}}


def measure(variant: str, how: Options) -> dict[str, Any]:
    """One row of the report."""
    size, precision, checkpointing = VARIANTS[variant]
    torch.manual_seed(0)
    recipe = mplug_base_4m() if size == "base" else shapes_tiny()
    if how.quick:
        recipe = shapes_tiny()
    batch_size = BASE_BATCH if size == "base" or how.quick else recipe.train.batch_size
    step = Step(recipe, random_batch(recipe, batch_size), precision, checkpointing=checkpointing)
    limits = products(torch.float32 if precision == "fp32" else torch.bfloat16, how.quick)
    flops = count_flops(step)
    step()
    timings = in_turns({"step": Work(step, flops), **limits}, how)
    memory = peak_memory_gb(torch.device("cpu"))
    limit = timings.fastest(limits)
    return {
        "variant": variant,
        "batch": batch_size,
        "seconds": timings.median("step"),
        "GFLOP": flops / 1e9,
        "limit GFLOP/s": timings.rate(limit) / 1e9,
        "share": timings.share("step", limit),
        "peak GB": memory,
        "breakdown": breakdown(step, 1 if size == "base" else 5),
    }


def measure_apart(variant: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    description = parser(__doc__, rounds=5)
    description.add_argument("--variant", choices=VARIANTS, help="only this one, in this process")
    arguments = description.parse_args()
    how = options(arguments)
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, how)))
        return
    rows = [measure_apart(variant) for variant in VARIANTS]
    breakdowns = {row["variant"]: row.pop("breakdown") for row in rows}
    report("pretrain_step", {"quick": how.quick, "rounds": how.rounds}, rows, breakdowns)


if __name__ == "__main__":
    main()
