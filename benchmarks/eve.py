"""EVE's pre-training step: time, share of the processor's arithmetic, memory, beside the einsum dispatch; its passes.

    python benchmarks/eve.py > benchmarks/results/eve.json
    python benchmarks/eve.py --device cuda --precision bf16 --batch 64 128 224 --compile
    python benchmarks/eve.py --only passes --batch 4 --precision fp32

``step``: MLM and MIM with the auxiliary loss, forward, backward, clipping and AdamW, of random pictures of 224 px and
texts of 8 to 40 tokens, padded to 40. ``einsum`` is the same step with the dispatch of GShard (``benchmarks/moe.py``)
in the same network: it drops what exceeds the capacity, routes padding, and has no auxiliary loss. "tokens/s" counts
image and text tokens of both passes, padding included (237 and 90 a pair). "MFU" is the model's operations, those that
ours needs without recomputing anything, as a share of what the processor could do: of a GPU the bf16 peak that its
maker states, of a CPU the best matrix product (``common.products``), in turns with the step. "GFLOP" is what each
computes itself, "by operations" what that says of "times faster than einsum". Memory is measured in a process of its
own.

``passes``: the network forward and backward, of the whole picture and of a quarter of its patches, each with the whole
text; and the latter with the decoder that paints the rest. To be compared with their operations.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import Options, Timings, Work, apart, count_flops, in_turns, options, parser, products, report, waited_for
from moe import EINSUM, OURS, EinsumMoE
from triptych.data.batches import ImageTextBatch, Tokens
from triptych.data.transforms import HALF
from triptych.models.eve import SIZES, Eve, EveConfig, PixelDecoderConfig, SoftRouter
from triptych.models.protocol import Encoded, Fused, Part
from triptych.objectives.balance import BalanceConfig, Balanced
from triptych.objectives.masked_signal import MaskedSignal, MaskedSignalConfig, uses_of, visible_patches
from triptych.objectives.pretraining import TextIds
from triptych.training.flops import peak_flops, peak_memory_gb
from triptych.training.parallel import Precision, autocast, compile_blocks, set_checkpointing

Row = dict[str, Any]

TOKENS, SHORTEST = 40, 8
SPECIAL = 5
CLIP = 1.0
WHOLE = "whole picture"
CONFIGS: dict[str, EveConfig] = {
    name: config if config.pixel_decoder is not None else replace(config, pixel_decoder=PixelDecoderConfig())
    for name, config in SIZES.items()
}
"""The sizes with a decoder of pixels; base and large get the recipes', which is MAE's."""
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"MFU on a GPU": 0.3, "aim": 0.4}


def random_batch(config: EveConfig, size: int, device: torch.device, longest: int = TOKENS) -> ImageTextBatch:
    """Pictures of noise; texts of 8 tokens or more, of which one is as long as any."""
    side = config.vision.image_size
    lengths_B = torch.randint(SHORTEST, longest + 1, (size,))
    lengths_B[0] = longest
    mask_BL = torch.arange(longest) < lengths_B[:, None]
    ids_BL = torch.randint(SPECIAL, config.text.vocab_size, mask_BL.shape) * mask_BL
    pixels_BCHW = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    return ImageTextBatch(pixels_BCHW, Tokens(ids_BL, mask_BL), torch.arange(size)).to(device)


def tokens_of(config: EveConfig, size: int) -> int:
    """Image and text tokens, padding included, of both passes of a batch."""
    whole = config.vision.tokens + TOKENS
    return size * (2 * whole - (config.vision.tokens - 1) + int((config.vision.tokens - 1) * 0.25))


class Trained:
    """A network and its optimiser, which several kinds of step can share: memory has room for one."""

    def __init__(self, config: EveConfig, device: torch.device) -> None:
        with device:
            self.model = Eve(config)
        self.config, self.device = config, device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
        routers = (block.ffn for block in self.model.network.blocks)
        soft = [router for router in routers if isinstance(router, SoftRouter)]
        self._layers = [(router, router.moe, EinsumMoE(router.moe)) for router in soft]

    def dispatch(self, name: str) -> None:
        """Run its experts by our dispatch or by einsum's."""
        for router, ours, einsum in self._layers:
            router.moe = ours if name == OURS else einsum  # type: ignore[assignment]


class Step:
    """One optimiser step, as :class:`triptych.training.loop.Trainer` makes it."""

    def __init__(
        self,
        trained: Trained,
        objective: MaskedSignalConfig,
        batch: ImageTextBatch,
        precision: Precision,
        dispatch: str = OURS,
    ) -> None:
        ids = TextIds(0, SPECIAL - 1, tuple(range(SPECIAL)), trained.config.text.vocab_size)
        task = MaskedSignal(trained.model, objective, ids, mean=HALF, std=HALF).to(trained.device)
        self.task = Balanced(task, BalanceConfig()).train()
        self.trained, self.objective, self.batch, self.precision = trained, objective, batch, precision
        self.name, self.number = dispatch, 0

    def __call__(self) -> None:
        trained = self.trained
        trained.dispatch(self.name)
        trained.model.train_only(*uses_of(self.objective))
        with autocast(trained.device, self.precision):
            losses = self.task(self.batch, self.number)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained.model.parameters(), CLIP)
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        self.number += 1


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    size: str
    device: torch.device
    precision: Precision
    how: Options
    compile: bool
    checkpointing: bool

    @classmethod
    def of(cls, given: Namespace, how: Options) -> Bench:
        size = "tiny" if how.quick else given.size
        return cls(size, given.device, given.precision, how, given.compile, given.checkpointing)

    @property
    def config(self) -> EveConfig:
        return CONFIGS[self.size]

    def trained(self) -> Trained:
        """A new network, prepared as the options say."""
        trained = Trained(self.config, self.device)
        set_checkpointing(trained.model, self.checkpointing)
        if self.compile:
            compile_blocks(trained.model)
        return trained

    def count(self, call: Callable[[], object], trained: Trained) -> int:
        """Operations, without those that are done again because activations were not kept."""
        set_checkpointing(trained.model, False)
        with torch.compiler.set_stance("force_eager"):
            flops = count_flops(call)
        set_checkpointing(trained.model, self.checkpointing)
        return flops

    def warm(self, call: Callable[[], object], flops: int) -> Work:
        """Something of known operations that has run before, and is waited for."""
        work = Work(waited_for(call, self.device), flops)
        for _ in range(3 if self.compile else 1):  # compiled anew where the second call is unlike the first
            work.call()
        return work

    def limits(self) -> dict[str, Work]:
        """Products to compare a CPU with."""
        return products(DTYPES[self.precision], self.how.quick) if self.device.type == "cpu" else {}


def steps(bench: Bench, trained: Trained, batch: int, dispatches: list[str]) -> Iterator[Row]:
    """The step by each dispatch, in turns."""
    data = random_batch(bench.config, batch, bench.device)
    own = {name: Step(trained, MaskedSignalConfig(), data, bench.precision, name) for name in dispatches}
    works: dict[str, Work] = {}
    for name, call in own.items():
        try:
            works[name] = bench.warm(call, bench.count(call, trained))
        except torch.OutOfMemoryError:
            trained.optimizer.zero_grad(set_to_none=True)
            yield {"part": "step", "batch": batch, "dispatch": name, "fits": False}
    if OURS not in works:
        return
    flops = works[OURS].amount
    limits = bench.limits()
    timings = in_turns(works | limits, bench.how)
    for name, work in works.items():
        seconds = timings.median(name)
        row: Row = {"part": "step", "batch": batch, "dispatch": name, "seconds": seconds, "samples/s": batch / seconds}
        row |= {"tokens/s": tokens_of(bench.config, batch) / seconds, "GFLOP": work.amount / 1e9}
        row |= {"model GFLOP": flops / 1e9, "MFU": mfu(bench, timings, name, flops)}
        if EINSUM in works:
            row |= {"times faster than einsum": timings.ratio(EINSUM, name)}
            row |= {"by operations": works[EINSUM].amount / work.amount}
        yield row


def mfu(bench: Bench, timings: Timings, name: str, flops: float) -> float:
    """The rate of the model's operations as a share of the processor's."""
    if bench.device.type == "cuda":
        return flops / timings.median(name) / peak_flops(bench.device, DTYPES[bench.precision])
    limit = timings.fastest(limit for limit in timings.works if limit not in (OURS, EINSUM))
    return flops / timings.works[name].amount * timings.share(name, limit)


def memory_alone(bench: Bench, name: str, batch: int) -> Row:
    """Two steps, if there is room for them."""
    trained = bench.trained()
    step = Step(trained, MaskedSignalConfig(), random_batch(bench.config, batch, bench.device), bench.precision, name)
    row: Row = {"part": "memory", "batch": batch, "dispatch": name}
    try:
        for _ in range(2):
            step()
    except torch.OutOfMemoryError:
        return row | {"fits": False}
    return row | {"peak GB": peak_memory_gb(bench.device)}


def passes(bench: Bench, trained: Trained, batch: int) -> Iterator[Row]:
    """The network on whole and on masked pictures, in turns."""
    model, text = trained.model.train(), random_batch(bench.config, batch, bench.device).text
    trained.dispatch(OURS)
    vision = bench.config.vision
    grid = (vision.image_size // vision.patch, vision.image_size // vision.patch)
    pixels_BCHW = torch.randn(batch, 3, vision.image_size, vision.image_size, device=bench.device)
    kept_BK = visible_patches(torch.rand(batch, grid[0] * grid[1], device=bench.device), 0.75)

    def fused(image: Encoded) -> Fused:
        return model.fuse(image, model.encode_text(text.ids_BL, text.mask_BL))

    def states(found: Fused) -> Tensor:
        return torch.cat([found.image_BND, found.text_BLD], dim=1)

    used: tuple[Part, ...] = ("image", "text", "fusion", "fused_image")
    calls: dict[str, tuple[tuple[Part, ...], Callable[[], Tensor]]] = {
        WHOLE: (used, lambda: states(fused(model.encode_image(pixels_BCHW)))),
        "a quarter": (used, lambda: states(fused(model.encode_visible(pixels_BCHW, kept_BK)))),
        "a quarter, and painting": (
            (*used, "pixels"),
            lambda: model.paint(fused(model.encode_visible(pixels_BCHW, kept_BK)), kept_BK, grid),
        ),
    }
    works: dict[str, Work] = {}
    for name, (parts, call) in calls.items():
        run = partial(forward_and_backward, trained, parts, call, bench.precision)
        works[name] = bench.warm(run, bench.count(run, trained))
    timings = in_turns(works, bench.how)
    for name, work in works.items():
        row: Row = {"part": "passes", "batch": batch, "pass": name, "seconds": timings.median(name)}
        row |= {"GFLOP": work.amount / 1e9, "time": timings.ratio(name, WHOLE)}
        yield row | {"operations": work.amount / works[WHOLE].amount}


def forward_and_backward(
    trained: Trained, parts: tuple[Part, ...], call: Callable[[], Tensor], precision: Precision
) -> None:
    """Gradients of whatever the call needs, and forgets them."""
    trained.model.train_only(*parts)
    with autocast(trained.device, precision):
        found = call()
    found.float().square().mean().backward()
    trained.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    description = parser(__doc__, rounds=5)
    description.add_argument("--only", nargs="+", choices=("step", "memory", "passes"), help="these parts alone")
    description.add_argument("--size", choices=CONFIGS, default="base")
    description.add_argument("--batch", nargs="+", type=int, default=[4])
    description.add_argument("--precision", choices=DTYPES, default="fp32", help="bf16: arithmetic, not the weights")
    description.add_argument("--dispatch", nargs="+", choices=(OURS, EINSUM), default=[OURS, EINSUM])
    description.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    description.add_argument("--compile", action="store_true", help="the blocks, as training can")
    description.add_argument("--checkpointing", action="store_true", help="recompute the activations of blocks")
    description.add_argument("--alone", nargs=2, metavar=("DISPATCH", "BATCH"), help="only its memory")
    given = description.parse_args()
    how = options(given)
    bench = Bench.of(given, how)
    torch.manual_seed(0)
    if given.alone:
        print(json.dumps(memory_alone(bench, given.alone[0], int(given.alone[1]))))
        return
    wanted = given.only or ["step", "memory", "passes"]
    rows: list[Row] = []
    if "memory" in wanted:
        rows += [apart("--alone", name, str(batch)) for batch in given.batch for name in given.dispatch]
    if {"step", "passes"} & set(wanted):
        trained = bench.trained()
        for batch in given.batch:
            if "passes" in wanted:
                rows += passes(bench, trained, batch)
            if "step" in wanted:
                rows += steps(bench, trained, batch, given.dispatch)
    settings = {
        "size": bench.size,
        "image": bench.config.vision.image_size,
        "text": TOKENS,
        "precision": bench.precision,
        "compiled": bench.compile,
        "recomputing": bench.checkpointing,
        "rounds": how.rounds,
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
        "asked for": TARGETS,
    }
    report("eve", settings, rows, {"time, operations": "as a multiple of the whole picture's"})


if __name__ == "__main__":
    main()
