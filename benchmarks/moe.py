"""EVE's mixture of experts: one soft layer beside a dense layer of as many operations and beside the einsum dispatch.

    python benchmarks/moe.py > benchmarks/results/moe.json
    python benchmarks/moe.py --dtype fp32 --tokens 948 3792 15168 --rounds 3
    python benchmarks/moe.py --device cuda --dtype bf16 autocast --tokens 15168 53088 --compile

32 experts of 768 and 3072, two a token, on 4 pairs of 197 image and 40 text tokens. ``ours`` is ``SoftMoE``: tokens
sorted by expert, grouped matrix products. ``dense`` is a feed-forward network whose hidden layer is as wide as those of
a token's experts together. ``einsum`` is the form of GShard and DeepSpeed, with the same weights: tokens come to the
experts and back by products with tensors of tokens x experts x capacity, and what exceeds the capacity, 1.0 x 2 x
tokens / experts, is dropped. It is seen to give what ours gives with that capacity before anything is timed.

Precisions: all in ``fp32``; weights and tokens in ``bf16``; ``autocast``, weights in fp32, as in training. The backward
pass gives the gradients of tokens and weights, in new memory, as after ``zero_grad(set_to_none=True)``. On a CPU the
allocator matters then, since memory that is touched for the first time costs page faults, and ours has gradients of all
experts. So everything is measured with huge pages, which the library asks for; without; and with glibc told to keep
what is freed, which it does not always find again.

What a dense layer cannot tell is the price of the weights: a token touches as many, a batch those of all experts.
"limit" is what would remain with everything else free: the dense layer's time, and that of reading, and writing, the
further weights, at the rate of reading a large tensor in turns with the rest; as a multiple of the dense layer's.
"by operations" is what the operations alone say of "times faster than einsum".
``memory``: the largest use, each in a process of its own, and the same without what torch and the weights take.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import (
    Options,
    Timings,
    Work,
    apart,
    count_flops,
    in_turns,
    options,
    page_faults,
    parser,
    reading,
    report,
    waited_for,
)
from triptych.models.layers import ACTIVATIONS, FeedForward
from triptych.models.moe import MoEConfig, SoftMoE, record_routing
from triptych.objectives.balance import load_measures
from triptych.training.flops import peak_memory_gb

Row = dict[str, Any]
Precision = Literal["fp32", "bf16", "autocast"]

OURS, DENSE, EINSUM = "ours", "dense", "einsum"
SIDES = (OURS, DENSE, EINSUM)
IMAGE, TEXT, SHORTEST = 197, 40, 8
CAPACITY = 1.0
_KEPT = f"{1 << 34}"
ALLOCATORS: dict[str, dict[str, str]] = {
    "huge pages": {},
    "small pages": {"THP_MEM_ALLOC_ENABLE": "0"},
    "keeping": {"MALLOC_MMAP_THRESHOLD_": _KEPT, "MALLOC_TRIM_THRESHOLD_": _KEPT, "MALLOC_TOP_PAD_": f"{1 << 26}"},
}
TARGETS = {"times dense": 1.6, "times faster than einsum": 5.0}


class EinsumMoE(nn.Module):
    """The dispatch of GShard (Lepikhin et al. 2020, algorithm 1) with the router and the experts of a layer of ours.

    Takes padding for tokens, as EVE's released code does, and records no routing.

    Shape legend: S tokens, E experts, C capacity, D width.
    """

    def __init__(self, layer: SoftMoE, capacity: float = CAPACITY) -> None:
        super().__init__()
        self.router, self.experts, self.config, self.capacity = layer.router, layer.experts, layer.config, capacity
        self.routings = None

    def mix(self, *args: Any) -> tuple[Tensor, None]:
        """As :meth:`SoftMoE.mix`, with nothing to record."""
        return self(*args), None

    def record(self, routing: None) -> None:
        """Nothing."""

    def forward(
        self, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None = None, real: int | None = None
    ) -> Tensor:
        combine_SEC = self._combine(x_SD, modality_S).to(self._arithmetic(x_SD))
        dispatch_SEC = (combine_SEC > 0).to(combine_SEC.dtype)
        rows_ECD = torch.einsum("sec,sd->ecd", dispatch_SEC, x_SD.to(combine_SEC.dtype))
        experts = self.experts
        hidden_ECF = self._batched(rows_ECD, experts.expand, experts.expand_bias)
        hidden_ECF = ACTIVATIONS[experts.activation](hidden_ECF)
        return torch.einsum(
            "sec,ecd->sd", combine_SEC, self._batched(hidden_ECF, experts.contract, experts.contract_bias)
        )

    def _combine(self, x_SD: Tensor, modality_S: Tensor) -> Tensor:
        """[S, E, C] weights: of a token's place at each of its experts, 0 elsewhere."""
        router, experts, S = self.router, self.config.experts, len(x_SD)
        room = max(4, math.ceil(self.capacity * self.config.top_k * S / experts))
        with torch.autocast(x_SD.device.type, enabled=False):
            x_SD = x_SD.float()
            if router.modality is not None:
                x_SD = x_SD + router.modality.float()[modality_S]
            gates_SE = F.linear(x_SD, router.gate.weight.float()).softmax(-1)
            left_SE = gates_SE.detach()
            taken_E = torch.zeros(experts, device=x_SD.device)
            weights, places = [], []
            for _ in range(self.config.top_k):
                chosen_SE = F.one_hot(left_SE.argmax(1), experts).float()
                left_SE = left_SE.masked_fill(chosen_SE.bool(), -1.0)
                place_SE = (chosen_SE.cumsum(0) - 1 + taken_E) * chosen_SE
                taken_E = taken_E + chosen_SE.sum(0)
                chosen_SE = chosen_SE * (place_SE < room)
                weights.append(gates_SE * chosen_SE)
                places.append((place_SE * chosen_SE).sum(1).long())
            if len(weights) > 1:
                total_S1 = torch.stack([weight_SE.sum(1) for weight_SE in weights]).sum(0)[:, None]
                weights = [weight_SE / total_S1.clamp(min=torch.finfo(torch.float32).eps) for weight_SE in weights]
            parts = [
                weight_SE[:, :, None] * F.one_hot(place_S, room).float()[:, None]
                for weight_SE, place_S in zip(weights, places, strict=True)
            ]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @staticmethod
    def _arithmetic(x: Tensor) -> torch.dtype:
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    @staticmethod
    def _batched(x_ECI: Tensor, weight_EOI: Tensor, bias_EO: Tensor) -> Tensor:
        """All experts at once, each on as many rows as it has room for."""
        return torch.baddbmm(bias_EO[:, None].to(x_ECI.dtype), x_ECI, weight_EOI.transpose(1, 2).to(x_ECI.dtype))


class Dense(nn.Module):
    """A feed-forward network that is called as the others."""

    def __init__(self, ffn: FeedForward) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(
        self, x_SD: Tensor, modality_S: Tensor, real_S: Tensor | None = None, real: int | None = None
    ) -> Tensor:
        return self.ffn(x_SD)


@dataclass(frozen=True)
class Sizes:
    """Of the layer, and of a batch.

    Attributes:
        skew: how unlike the experts are: the router's odds of the n-th are n ** -skew (for tokens of texts the last is
            the first); 0 leaves it as it was made.
        padding: texts have 8 to 40 tokens, and ours leaves the rest out.
    """

    tokens: int
    width: int = 768
    hidden: int = 3072
    experts: int = 32
    top_k: int = 2
    skew: float = 0.0
    padding: bool = False

    @property
    def room(self) -> int:
        return max(4, math.ceil(CAPACITY * self.top_k * self.tokens / self.experts))

    def operations(self, side: str, rows: int, backward: bool) -> float:
        """By formula, without the router; ``rows`` is what our experts compute."""
        passes = 3 if backward else 1
        if side != EINSUM:
            return 4.0 * passes * (self.top_k * self.tokens if side == DENSE else rows) * self.width * self.hidden
        experts = 4.0 * passes * self.experts * self.room * self.width * self.hidden
        # There and back; backward the way there is one product (it has no gradient itself), the way back two.
        return experts + 2.0 * (5 if backward else 2) * self.tokens * self.experts * self.room * self.width

    def weights(self, side: str, active: int, precision: Precision, backward: bool) -> int:
        """Bytes of weights that a pass reads and of gradients that it writes; ``active`` experts have tokens."""
        of_expert = (2 * self.width * self.hidden + self.width + self.hidden) * (2 if precision == "bf16" else 4)
        read = {OURS: active, DENSE: self.top_k, EINSUM: self.experts}[side] * of_expert
        written = (self.top_k if side == DENSE else self.experts) * of_expert
        return 2 * read + written if backward else read


@dataclass(frozen=True)
class Inputs:
    """Tokens of unit variance, as behind a norm, and a gradient of what becomes of them."""

    x_SD: Tensor
    gradient_SD: Tensor
    modality_S: Tensor
    real_S: Tensor | None
    real: int

    @classmethod
    def random(cls, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Inputs:
        place_S = torch.arange(sizes.tokens) % (IMAGE + TEXT)
        real_S = None
        if sizes.padding:
            pairs = math.ceil(sizes.tokens / (IMAGE + TEXT))
            length_S = torch.randint(SHORTEST, TEXT + 1, (pairs,)).repeat_interleave(IMAGE + TEXT)[: sizes.tokens]
            real_S = place_S < IMAGE + length_S
        real = sizes.tokens if real_S is None else int(real_S.sum())
        x_SD, gradient_SD = (torch.randn(sizes.tokens, sizes.width).to(device, dtype) for _ in range(2))
        real_S = None if real_S is None else real_S.to(device)
        return cls(x_SD, gradient_SD, (place_S >= IMAGE).long().to(device), real_S, real)


def make_sides(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, names: tuple[str, ...] = SIDES
) -> dict[str, nn.Module]:
    """The layers of these names, with random weights; ours and the einsum's are the same."""
    found: dict[str, nn.Module] = {}
    if set(names) & {OURS, EINSUM}:
        with device:
            moe = SoftMoE(sizes.width, sizes.hidden, MoEConfig(sizes.experts, sizes.top_k), "quick_gelu")
        for parameter in moe.parameters():
            nn.init.normal_(parameter, std=0.02)
        if sizes.skew:
            prefer(moe, sizes.skew)
        moe.to(dtype)
        found |= {OURS: moe, EINSUM: EinsumMoE(moe)}
    if DENSE in names:
        with device:
            found[DENSE] = Dense(FeedForward(sizes.width, sizes.top_k * sizes.hidden, "quick_gelu")).to(dtype)
    return {name: found[name] for name in names}


@torch.no_grad()
def prefer(moe: SoftMoE, skew: float) -> None:
    """Set the vectors of the modalities so that the router adds the logarithm of the odds that are wanted."""
    assert moe.router.modality is not None
    logit_E = -skew * torch.arange(1, moe.config.experts + 1, dtype=torch.float64).log()
    inverse_DE = torch.linalg.pinv(moe.router.gate.weight.double())
    wanted_ME = torch.stack([logit_E, logit_E.flip(0)]).to(inverse_DE)
    moe.router.modality.copy_(wanted_ME @ inverse_DE.T)


class Pass:
    """One pass of one side: forward without gradients, or forward and backward."""

    def __init__(self, side: nn.Module, inputs: Inputs, precision: Precision, backward: bool) -> None:
        self.side, self.inputs, self.precision, self.backward = side, inputs, precision, backward

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision != "autocast":
            return nullcontext()
        return torch.autocast(self.inputs.x_SD.device.type, dtype=torch.bfloat16)

    def __call__(self) -> None:
        inputs = self.inputs
        x_SD = inputs.x_SD.detach().requires_grad_(self.backward)
        with torch.set_grad_enabled(self.backward), self._autocast():
            y_SD = self.side(x_SD, inputs.modality_S, inputs.real_S, inputs.real)
        if self.backward:
            y_SD.backward(inputs.gradient_SD.to(y_SD.dtype))
            for parameter in self.side.parameters():
                parameter.grad = None


def check_equal(sizes: Sizes) -> dict[str, float]:
    """The largest differences between ours with a capacity and the einsum dispatch, in fp32: values and gradients.

    Raises:
        RuntimeError: they are not the same function.
    """
    sizes = replace(sizes, tokens=2 * (IMAGE + TEXT), width=64, hidden=96, padding=False)
    cpu = torch.device("cpu")
    sides = make_sides(sizes, cpu, torch.float32)
    moe = sides[OURS]
    assert isinstance(moe, SoftMoE)
    moe.config = moe.router.config = replace(moe.config, capacity=CAPACITY)
    inputs = Inputs.random(sizes, cpu, torch.float32)
    results = []
    for name in (OURS, EINSUM):
        x_SD = inputs.x_SD.clone().requires_grad_()
        y_SD = sides[name](x_SD, inputs.modality_S)
        results.append((y_SD, *torch.autograd.grad(y_SD, (x_SD, *moe.parameters()), inputs.gradient_SD)))
    names = ("values", "gradient of the tokens", *(f"gradient of {name}" for name, _ in moe.named_parameters()))
    found = {
        name: float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-12))
        for name, a, b in zip(names, *results, strict=True)
    }
    if max(found.values()) > 1e-4:
        raise RuntimeError(f"ours and the einsum dispatch differ: {found}")
    return found


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    sizes: tuple[Sizes, ...]
    precisions: tuple[Precision, ...]
    device: torch.device
    how: Options
    compile: bool

    @classmethod
    def of(cls, given: Namespace, how: Options) -> Bench:
        sizes = tuple(
            Sizes(tokens, experts=given.experts, top_k=given.top_k, skew=given.skew, padding=given.padding)
            for tokens in given.tokens
        )
        if how.quick:
            sizes = tuple(replace(own, tokens=237, width=64, hidden=128, experts=4) for own in sizes[:1])
        return cls(sizes, tuple(given.dtype), given.device, how, given.compile)

    def dtype(self, precision: Precision) -> torch.dtype:
        return torch.bfloat16 if precision == "bf16" else torch.float32


def timed(bench: Bench, allocator: str) -> dict[str, Any]:
    """All sides in turns, in this process and with its allocator."""
    rows: list[Row] = []
    loads: dict[str, Any] = {}
    for sizes in bench.sizes:
        for precision in bench.precisions:
            torch.manual_seed(0)
            dtype = bench.dtype(precision)
            sides = make_sides(sizes, bench.device, dtype)
            inputs = Inputs.random(sizes, bench.device, dtype)
            load = load_of(sides[OURS], inputs)
            loads[f"{sizes.tokens} tokens"] = load
            for backward in (False, True):
                timings = time(sides, inputs, precision, backward, bench)
                active = sizes.experts - round(load["idle"] * sizes.experts)
                for row in rows_of(timings, sizes, inputs.real * sizes.top_k, active, precision, backward):
                    faults = page_faults(timings.works[row["side"]].call)
                    rows.append({"part": "layer", "allocator": allocator, **row, "page faults": faults})
    return {"rows": rows, "loads": loads}


def time(sides: dict[str, nn.Module], inputs: Inputs, precision: Precision, backward: bool, bench: Bench) -> Timings:
    """One kind of pass of every side, and reading of memory."""
    works: dict[str, Work] = {}
    for name, side in sides.items():
        call = waited_for(Pass(side, inputs, precision, backward), bench.device)
        works[name] = Work(call, count_flops(call))
        if bench.compile:
            compiled: Any = torch.compile(side, dynamic=False)
            works[f"{name}, compiled"] = replace(
                works[name], call=waited_for(Pass(compiled, inputs, precision, backward), bench.device)
            )
    if bench.device.type == "cpu":
        works["reading"] = reading(bench.how.quick)
    for work in works.values():
        work.call()
        work.call()
    return in_turns(works, bench.how)


def rows_of(
    timings: Timings, sizes: Sizes, rows: int, active: int, precision: Precision, backward: bool
) -> Iterator[Row]:
    """One for each side."""
    moved = {side: sizes.weights(side, active, precision, backward) for side in SIDES}
    for name, work in timings.works.items():
        side = name.partition(",")[0]
        if side not in SIDES:
            continue
        row: Row = {
            "tokens": sizes.tokens,
            "precision": precision,
            "pass": "forward and backward" if backward else "forward",
            "side": name,
            "ms": 1000 * timings.median(name),
            "GFLOP": work.amount / 1e9,
            "by formula": sizes.operations(side, rows, backward) / 1e9,
            "GFLOP/s": timings.rate(name) / 1e9,
            "weights MB": moved[side] / 1e6,
        }
        if side != DENSE:
            row["times dense"] = timings.ratio(name, DENSE)
        if side != EINSUM:
            row["times faster than einsum"] = timings.ratio(EINSUM, name)
            row["by operations"] = timings.works[EINSUM].amount / work.amount
        if side == OURS and "reading" in timings.works:
            dense = timings.median(DENSE)
            row["limit"] = 1 + max(0, moved[OURS] - moved[DENSE]) / timings.rate("reading") / dense
        yield row


@torch.no_grad()
def load_of(side: nn.Module, inputs: Inputs) -> dict[str, float]:
    """How evenly the tokens are spread over our experts, and what share the einsum dispatch drops, without padding."""
    assert isinstance(side, SoftMoE)
    with record_routing(side) as routings:
        side(inputs.x_SD, inputs.modality_S, inputs.real_S, inputs.real)
    (routing,) = next(iter(routings.values()))
    load_E = routing.chosen_ME.sum(0)
    room = max(4, math.ceil(CAPACITY * side.config.top_k * len(inputs.x_SD) / side.config.experts))
    lost = float((load_E - room).clamp(min=0).sum() / load_E.sum())
    return {name: float(value) for name, value in load_measures(routings).items()} | {"einsum drops": lost}


def tokens_for(factor: float, sizes: Sizes) -> int:
    """From how many tokens the einsum dispatch needs so many times our operations, forward and backward.

    Its experts need as many as ours; the way there and back 10 K S^2 D, beside the experts' 12 K S D F.
    """
    return round((factor - 1) * 12 * sizes.hidden / 10)


def memory_alone(bench: Bench, name: str, precision: Precision, sizes: Sizes) -> Row:
    """Two passes, forward and backward, of one side."""
    dtype = bench.dtype(precision)
    (side,) = make_sides(sizes, bench.device, dtype, (name,)).values()
    inputs = Inputs.random(sizes, bench.device, dtype)
    before = peak_memory_gb(bench.device)
    for _ in range(2):
        waited_for(Pass(side, inputs, precision, True), bench.device)()
    after = peak_memory_gb(bench.device)
    row: Row = {"part": "memory", "tokens": sizes.tokens, "precision": precision, "pass": "forward and backward"}
    return row | {"side": name, "peak GB": after, "beyond weights GB": after - before}


def main() -> None:
    description = parser(__doc__, rounds=9)
    description.add_argument("--only", nargs="+", choices=("layer", "memory"), default=["layer", "memory"])
    description.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    description.add_argument("--tokens", nargs="+", type=int, default=[4 * (IMAGE + TEXT)])
    description.add_argument("--experts", type=int, default=32)
    description.add_argument("--top-k", type=int, choices=(1, 2), default=2)
    description.add_argument("--skew", type=float, default=0.0, help="the router's odds of the n-th expert: n ** -skew")
    description.add_argument("--padding", action="store_true", help="texts of 8 to 40 tokens, padded to 40")
    description.add_argument("--dtype", nargs="+", choices=get_args(Precision), default=list(get_args(Precision)))
    description.add_argument("--allocator", nargs="+", choices=ALLOCATORS, help="by default all on a CPU")
    description.add_argument("--compile", action="store_true", help="also compiled")
    description.add_argument("--timed", metavar="ALLOCATOR", help="only this, in this process")
    description.add_argument("--alone", nargs=3, metavar=("SIDE", "PRECISION", "NUMBER"), help="only its memory")
    given = description.parse_args()
    how = options(given)
    bench = Bench.of(given, how)
    torch.manual_seed(0)
    if given.timed:
        print(json.dumps(timed(bench, given.timed)))
        return
    if given.alone:
        side, precision, number = given.alone
        print(json.dumps(memory_alone(bench, side, precision, bench.sizes[int(number)])))
        return
    rows: list[Row] = []
    notes: dict[str, Any] = {"differences from the einsum dispatch": check_equal(bench.sizes[0])}
    allocators = given.allocator or (list(ALLOCATORS) if bench.device.type == "cpu" else ["huge pages"])
    for allocator in allocators if "layer" in given.only else []:
        found = apart("--timed", allocator, environment=ALLOCATORS[allocator])
        rows += found["rows"]
        notes["load"] = found["loads"]
    if "memory" in given.only:
        for number in range(len(bench.sizes)):
            for precision in bench.precisions:
                rows += [apart("--alone", side, precision, str(number)) for side in SIDES]
    notes["tokens for 5 times our operations"] = tokens_for(TARGETS["times faster than einsum"], bench.sizes[0])
    sizes = bench.sizes[0]
    settings = {
        "width": sizes.width,
        "hidden": sizes.hidden,
        "experts": sizes.experts,
        "top_k": sizes.top_k,
        "capacity of the einsum dispatch": CAPACITY,
        "skew": sizes.skew,
        "padding": sizes.padding,
        "gradients": "new ones in every pass",
        "asked for": TARGETS,
        "rounds": how.rounds,
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
    }
    report("moe", settings, rows, notes)


if __name__ == "__main__":
    main()
