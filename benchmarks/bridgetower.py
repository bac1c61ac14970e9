"""BridgeTower beside its port in transformers: forward pass, training step, peak memory, and ranking of pairs.

    python benchmarks/bridgetower.py > benchmarks/results/bridgetower.json
    python benchmarks/bridgetower.py --only step --device cuda --batch 32
    python benchmarks/bridgetower.py --only forward --compile --breakdown

Both have the same weights (the port's, converted), and are seen to give the same before anything is timed. The base
size, batch 4, 288 pixels, texts of 50 tokens, all of them real; attention of the port as only it is right, "eager".

``forward``: all states and the pooled one, in inference mode, with all weights in fp32 or in bf16. ``step``: forward
pass, ITM's and MLM's cross-entropy, backward pass and AdamW (fused, on both sides), in fp32 or in bf16 autocast, with
the dropout of training; the words to predict are 15 %. The port computes logits of all words, ours those that the loss
reads; "all logits" is ours with the port's. ``memory``: the largest use of such steps, each in a process of its own.
``pretrain``: the same with a step of pre-training, MLM on the true pairs and ITM on pairs of which half are false. The
port needs two passes, as the official code; ours is ``MaskedMatchingConfig(passes="shared")``: the picture encoder
once, the text encoder once on masked and whole texts, and of the last layer only what each loss reads.
``rank``: all pairs of 64 images and 64 texts. Ours encodes each once and fuses every pair as far as its score needs;
the port runs all of itself for every pair. Of both a part is timed and multiplied, as every pair costs the same.
``--compile``: ours as by ``triptych evaluate --compile``; the port by ``torch.compile``, in the part forward.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bridgetower import modeling_bridgetower as hf

from common import Call, Options, Timings, Work, count_flops, in_turns, options, parser, report
from pretrain_step import breakdown
from triptych.checkpoints.bridgetower_hf import port_config
from triptych.checkpoints.convert import convert
from triptych.checkpoints.folder import load
from triptych.models.bridgetower import ROBERTA, SIZES, BridgeTower, BridgeTowerConfig
from triptych.models.protocol import Encoded
from triptych.models.vision import VisionConfig
from triptych.training.flops import peak_flops, peak_memory_gb
from triptych.training.parallel import Precision, autocast, compile_inference, set_checkpointing

Row = dict[str, Any]
Notes = dict[str, Any]

TOKENS, RANKED = 50, 64
IGNORED = -100
OURS, PORT, RECOMPUTING = "ours", "port", "ours, recomputing"
ALONE = (PORT, OURS, RECOMPUTING)
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NARROW = VisionConfig(width=128, layers=4, heads=2, patch=16, image_size=48, interpolation="bicubic")
CONFIGS: dict[str, BridgeTowerConfig] = {
    "tiny": BridgeTowerConfig(  # not ours of that name: the port has no stem of convolutions and no decoder
        _NARROW, replace(ROBERTA, vocab_size=256, width=128, heads=2, ffn=512), text_layers=4, fusion_layers=3
    ),
    "base": SIZES["base"],
    "large": SIZES["large"],
}
TARGETS = {
    "forward fp32": 1.05,
    "forward bf16": 1.3,
    "step fp32": 1.2,
    "step bf16": 1.5,
    "pretrain fp32": 1.2,
    "pretrain bf16": 1.5,
    "rank fp32": 5.0,
    "rank bf16": 5.0,
}


@dataclass(frozen=True)
class Inputs:
    """Random pictures and texts; ``label_BL`` is the word to predict or IGNORED, ``match_B`` whether a pair matches."""

    pixels_BCHW: Tensor
    ids_BL: Tensor
    mask_BL: Tensor
    label_BL: Tensor
    match_B: Tensor

    @classmethod
    def random(cls, config: BridgeTowerConfig, batch: int, device: torch.device) -> Inputs:
        side = config.vision.image_size
        ids_BL = torch.randint(3, config.text.vocab_size, (batch, TOKENS))  # 1 is padding to the port
        chosen_BL = torch.zeros(batch, TOKENS, dtype=torch.bool)
        chosen_BL[:, : round(0.15 * TOKENS)] = True
        tensors = (
            torch.randn(batch, 3, side, side),
            ids_BL,
            torch.ones_like(ids_BL, dtype=torch.bool),
            ids_BL.where(chosen_BL, torch.full_like(ids_BL, IGNORED)),
            torch.arange(batch) % 2,
        )
        return cls(*(tensor.to(device) for tensor in tensors))

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(self, pixels_BCHW=self.pixels_BCHW.to(dtype))

    def all_B(self) -> Tensor:
        return torch.arange(len(self.match_B), device=self.match_B.device)

    def shown_B(self) -> Tensor:
        """The picture of each text for ITM: its own where it matches, else the next one."""
        return (self.all_B() + (1 - self.match_B)) % len(self.match_B)

    def rows(self, image_rows: Tensor, text_rows: Tensor) -> Inputs:
        """Pairs of the given pictures and texts."""
        text = (self.ids_BL, self.mask_BL, self.label_BL, self.match_B)
        return Inputs(self.pixels_BCHW[image_rows], *(tensor[text_rows] for tensor in text))


class Port(nn.Module):
    """What one puts together of transformers to train: the network and its two heads."""

    def __init__(self, config: BridgeTowerConfig) -> None:
        super().__init__()
        self.config = published(config)
        self.bridgetower = hf.BridgeTowerModel(self.config)
        self.mlm_score = hf.BridgeTowerMLMHead(self.config)
        self.itm_score = hf.BridgeTowerITMHead(2 * self.config.hidden_size)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """States of image and text, and the pooled one."""
        found = self.bridgetower(
            input_ids=inputs.ids_BL, attention_mask=inputs.mask_BL.long(), pixel_values=inputs.pixels_BCHW
        )
        return found.image_features, found.text_features, found.pooler_output

    def scores(self, inputs: Inputs) -> Tensor:
        return self.itm_score(self(inputs)[2])

    def pretraining_loss(self, inputs: Inputs) -> Tensor:
        """Two passes: for MLM all pairs are true."""
        word_XV = self.mlm_score(self(inputs)[1]).flatten(0, 1)
        return _loss(self.scores(inputs.rows(inputs.shown_B(), inputs.all_B())), word_XV, inputs)

    def loss(self, inputs: Inputs) -> Tensor:
        _, text_BLD, pooled_BP = self(inputs)
        return _loss(self.itm_score(pooled_BP), self.mlm_score(text_BLD).flatten(0, 1), inputs)


class Ours(nn.Module):
    """The same of ours."""

    def __init__(self, model: BridgeTower) -> None:
        super().__init__()
        self.model = model
        model.train_only("image", "text", "fusion", "pooled", "matching", "masked")

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        text = self.model.encode_text(inputs.ids_BL, inputs.mask_BL)
        fused = self.model.fuse(self.model.encode_image(inputs.pixels_BCHW), text)
        return fused.image_BND, fused.text_BLD, fused.pooled_BP

    def loss(self, inputs: Inputs, *, all_logits: bool = False) -> Tensor:
        _, text_BLD, pooled_BP = self(inputs)
        if all_logits:
            word_XV = self.model.masked_logits(text_BLD).flatten(0, 1)
        else:
            word_XV = self.model.masked_logits(text_BLD[inputs.label_BL != IGNORED])
        return _loss(self.model.match_logits(pooled_BP), word_XV, inputs)

    def pretraining_loss(self, inputs: Inputs) -> Tensor:
        """Encoders once; the masked texts are the whole ones here, since what is masked takes no time."""
        image = self.model.encode_image(inputs.pixels_BCHW)
        both = self.model.encode_text(inputs.ids_BL.repeat(2, 1), inputs.mask_BL.repeat(2, 1))
        masked, whole = both.rows(slice(0, len(image))), both.rows(slice(len(image), None))
        word_XV = self.model.masked_logits(self.model.fuse_text(image, masked)[inputs.label_BL != IGNORED])
        pooled_BP = self.model.pool(image, whole, inputs.shown_B())
        return _loss(self.model.match_logits(pooled_BP), word_XV, inputs)

    def two_passes_loss(self, inputs: Inputs) -> Tensor:
        """The same with both encoders run for each objective: ``MaskedMatchingConfig(passes="two")``."""
        first, second = (
            (self.model.encode_image(given.pixels_BCHW), self.model.encode_text(given.ids_BL, given.mask_BL))
            for given in (inputs, inputs.rows(inputs.shown_B(), inputs.all_B()))
        )
        word_XV = self.model.masked_logits(self.model.fuse_text(*first)[inputs.label_BL != IGNORED])
        return _loss(self.model.match_logits(self.model.pool(*second)), word_XV, inputs)


def _loss(match_B2: Tensor, word_XV: Tensor, inputs: Inputs) -> Tensor:
    """ITM and MLM. ``word_XV`` has a row for each position, or one for each word to predict."""
    label_X = inputs.label_BL.flatten()
    if len(word_XV) != len(label_X):
        label_X = label_X[label_X != IGNORED]
    return F.cross_entropy(match_B2, inputs.match_B) + F.cross_entropy(word_XV, label_X, ignore_index=IGNORED)


def published(config: BridgeTowerConfig) -> transformers.BridgeTowerConfig:
    """These sizes as transformers writes them."""
    with torch.device("meta"):
        model = BridgeTower(config)
    return transformers.BridgeTowerConfig(**port_config(model), attn_implementation="eager")


def both_sides(config: BridgeTowerConfig) -> tuple[Ours, Port]:
    """The port with random weights, and ours with the same."""
    port = Port(config)
    with TemporaryDirectory() as folder:
        saved, converted = Path(folder, "port"), Path(folder, "ours")
        port.config.save_pretrained(saved)
        save_file(port.state_dict(), saved / "model.safetensors", {"format": "pt"})
        convert(saved, converted, "bridgetower-hf")
        model = load(converted).model
    assert isinstance(model, BridgeTower)
    return Ours(model), port


def check_equal(ours: Ours, port: Port, inputs: Inputs) -> dict[str, float]:
    """The largest differences of states and losses, in fp32 and without dropout.

    Raises:
        RuntimeError: they are not the same function.
    """
    with torch.inference_mode():
        names = ("image", "text", "pooled", "loss", "loss of all logits", "loss of pre-training")
        left = (*ours(inputs), ours.loss(inputs), ours.loss(inputs, all_logits=True), ours.pretraining_loss(inputs))
        right = (*port(inputs), *[port.loss(inputs)] * 2, port.pretraining_loss(inputs))
        found = {name: float((a - b).abs().max()) for name, a, b in zip(names, left, right, strict=True)}
    if max(found.values()) > 1e-3:
        raise RuntimeError(f"ours and the port differ: {found}")
    return found


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    size: str
    batch: int
    device: torch.device
    how: Options
    compile: bool
    breakdown: bool

    @property
    def config(self) -> BridgeTowerConfig:
        return CONFIGS[self.size]

    def inputs(self, batch: int) -> Inputs:
        return Inputs.random(self.config, batch, self.device)

    def work(self, call: Call) -> Work:
        """With its operations counted, and warm."""
        return self.warm(call, count_flops(call))

    def warm(self, call: Call, flops: float) -> Work:
        """Of known operations; a device that works by itself is waited for."""
        work = Work(partial(_wait_for, call, self.device), flops)
        work.call()
        return work

    def rows(self, part: str, precision: Precision, timings: Timings) -> Iterator[Row]:
        """One for each side; all are compared with the port as it is."""
        for name, work in timings.works.items():
            row: Row = {"part": part, "precision": precision, "side": name, "seconds": timings.median(name)}
            row |= {"GFLOP": work.amount / 1e9, "GFLOP/s": timings.rate(name) / 1e9}
            row |= {"samples/s": self.batch / timings.median(name)}
            if self.device.type == "cuda":
                row["MFU"] = timings.rate(name) / peak_flops(self.device, DTYPES[precision])
            if name != PORT:
                row |= {"times faster": timings.ratio(PORT, name), "asked for": TARGETS[f"{part} {precision}"]}
            yield row

    def parts_of_time(self, calls: Mapping[str, Call]) -> dict[str, dict[str, float]]:
        """By operator, if that is asked for."""
        return {name: breakdown(call, 2) for name, call in calls.items()} if self.breakdown else {}


def _wait_for(call: Call, device: torch.device) -> None:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward(bench: Bench, ours: Ours, port: Port) -> tuple[list[Row], Notes]:
    """The whole network."""
    rows: list[Row] = []
    notes: Notes = {}
    for precision, dtype in DTYPES.items():
        inputs = bench.inputs(bench.batch).to(dtype)
        sides: dict[str, nn.Module] = {PORT: copy.deepcopy(port).to(dtype), OURS: copy.deepcopy(ours).to(dtype)}
        calls = {name: partial(_infer, side, inputs) for name, side in sides.items()}
        notes |= {f"forward {precision} {name}": found for name, found in bench.parts_of_time(calls).items()}
        works = {name: bench.work(call) for name, call in calls.items()}
        if bench.compile:
            compiled = copy.deepcopy(sides[OURS])
            compile_inference(compiled.model)
            call = partial(_infer, compiled, inputs)
            works[f"{OURS}, compiled"] = bench.warm(call, works[OURS].amount)
            call = partial(_infer_frozen, torch.compile(copy.deepcopy(sides[PORT])), inputs)
            works[f"{PORT}, compiled"] = bench.warm(call, works[PORT].amount)
        rows += bench.rows("forward", precision, in_turns(works, bench.how))
    return rows, notes


@torch.no_grad()
def _infer(side: Callable[[Inputs], object], inputs: Inputs) -> None:
    side(inputs)


def _infer_frozen(side: Callable[[Inputs], object], inputs: Inputs) -> None:
    """With weights packed for the processor, as ours are when they are compiled."""
    from torch._inductor import config

    with config.patch(freezing=True):
        _infer(side, inputs)


class Step:
    """One optimiser step."""

    def __init__(
        self, side: Ours | Port, inputs: Inputs, precision: Precision, loss: Callable[[Inputs], Tensor]
    ) -> None:
        self.inputs, self.precision, self.loss = inputs, precision, loss
        parameters = [parameter for parameter in side.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        side.train()

    def __call__(self) -> None:
        with autocast(self.inputs.pixels_BCHW.device, self.precision):
            loss = self.loss(self.inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def at(self, precision: Precision, loss: Callable[[Inputs], Tensor]) -> Step:
        """The same weights and optimiser with another precision or loss."""
        other = copy.copy(self)
        other.precision, other.loss = precision, loss
        return other


def step(bench: Bench, ours: Ours, port: Port) -> tuple[list[Row], Notes]:
    """Forward pass, backward pass, AdamW."""
    rows: list[Row] = []
    notes: Notes = {}
    inputs = bench.inputs(bench.batch)
    first = {PORT: Step(port, inputs, "fp32", port.loss), OURS: Step(ours, inputs, "fp32", ours.loss)}
    for precision in DTYPES:
        steps = {name: own.at(precision, own.loss) for name, own in first.items()}
        notes |= {f"step {precision} {name}": found for name, found in bench.parts_of_time(steps).items()}
        steps[f"{OURS}, all logits"] = first[OURS].at(precision, partial(ours.loss, all_logits=True))
        timings = in_turns({name: bench.work(own) for name, own in steps.items()}, bench.how)
        rows += bench.rows("step", precision, timings)
    return rows, notes


def pretrain(bench: Bench, ours: Ours, port: Port) -> tuple[list[Row], Notes]:
    """The same with the losses of pre-training."""
    rows: list[Row] = []
    inputs = bench.inputs(bench.batch)
    steps = {
        PORT: Step(port, inputs, "fp32", port.pretraining_loss),
        OURS: Step(ours, inputs, "fp32", ours.pretraining_loss),
    }
    for precision in DTYPES:
        works = {name: bench.work(own.at(precision, own.loss)) for name, own in steps.items()}
        works[f"{OURS}, two passes"] = bench.work(steps[OURS].at(precision, ours.two_passes_loss))
        rows += bench.rows("pretrain", precision, in_turns(works, bench.how))
    return rows, {}


def memory(bench: Bench, command: list[str]) -> list[Row]:
    """The peak of each in a process of its own."""
    rows = []
    for precision in DTYPES:
        for side in ALONE:
            alone = [*command, "--alone", side, precision]
            rows.append(json.loads(subprocess.run(alone, check=True, stdout=subprocess.PIPE, text=True).stdout))
        port = rows[-len(ALONE)]
        for row in rows[-len(ALONE) + 1 :]:
            row["of the port's"] = row["peak GB"] / port["peak GB"]
    return rows


def memory_alone(bench: Bench, name: str, precision: Precision) -> Row:
    """Two steps of one side, with random weights."""
    side: Ours | Port = Port(bench.config) if name == PORT else Ours(BridgeTower(bench.config))
    side.to(bench.device)
    set_checkpointing(side, name == RECOMPUTING)
    own = Step(side, bench.inputs(bench.batch), precision, side.loss)
    for _ in range(2):
        own()
    return {"part": "memory", "precision": precision, "side": name, "peak GB": peak_memory_gb(bench.device)}


def rank(bench: Bench, ours: Ours, port: Port) -> tuple[list[Row], Notes]:
    """All pairs of RANKED pictures and RANKED texts; timed with ``batch`` of each."""
    rows: list[Row] = []
    notes: Notes = {}
    count = bench.batch
    image_rows = torch.arange(count, device=bench.device).repeat_interleave(count)
    text_rows = torch.arange(count, device=bench.device).repeat(count)
    for precision, dtype in DTYPES.items():
        inputs = bench.inputs(count).to(dtype)
        model, other = copy.deepcopy(ours.model).to(dtype), copy.deepcopy(port).to(dtype)

        @torch.no_grad()
        def encode(model: BridgeTower = model, inputs: Inputs = inputs) -> tuple[Encoded, Encoded]:
            return model.encode_image(inputs.pixels_BCHW), model.encode_text(inputs.ids_BL, inputs.mask_BL)

        image, text = encode()
        texts = text.rows(text_rows)

        @torch.no_grad()
        def fuse(model: BridgeTower = model, image: Encoded = image, texts: Encoded = texts) -> Tensor:
            return model.match_logits(model.pool(image, texts, image_rows))

        # Of the port, as many pairs as encoding has pictures: the diagonal.
        diagonal = partial(other.scores, inputs)
        scores = torch.no_grad()(diagonal)
        difference = float((fuse().view(count, count, 2).diagonal().T - scores()).abs().max())
        notes[f"rank {precision}, difference of scores"] = difference
        if precision == "fp32" and difference > 1e-3:
            raise RuntimeError(f"ours and the port rank differently: {difference}")
        notes |= {f"rank {precision} {name}": found for name, found in bench.parts_of_time({OURS: fuse}).items()}
        works = {PORT: bench.work(scores), "encode": bench.work(encode), OURS: bench.work(fuse)}
        if bench.compile:
            compiled = copy.deepcopy(model)
            compile_inference(compiled)
            works[f"{OURS}, compiled"] = bench.warm(partial(fuse, compiled), works[OURS].amount)
        rows += _ranking_rows(precision, in_turns(works, bench.how), count)
    return rows, notes


def _ranking_rows(precision: Precision, timings: Timings, count: int) -> Iterator[Row]:
    """What was timed, multiplied to all pairs."""
    pairs = RANKED**2
    fusing = [name for name in timings.works if name.startswith(OURS)]
    times: dict[str, dict[str, float]] = {PORT: {PORT: pairs / count}}
    times |= {name: {"encode": RANKED / count, name: pairs / count**2} for name in fusing}
    seconds = {
        name: [
            sum(timings.seconds[part][n] * factor for part, factor in parts.items())
            for n in range(len(timings.seconds[PORT]))
        ]
        for name, parts in times.items()
    }
    for name, parts in times.items():
        flops = sum(timings.works[part].amount * factor for part, factor in parts.items())
        own = median(seconds[name])
        row: Row = {"part": "rank", "precision": precision, "side": name, "seconds": own, "GFLOP": flops / 1e9}
        row |= {"GFLOP/s": flops / own / 1e9, "pairs/s": pairs / own}
        if name != PORT:
            ratio = median(a / b for a, b in zip(seconds[PORT], seconds[name], strict=True))
            row |= {"times faster": ratio, "asked for": TARGETS[f"rank {precision}"]}
        yield row


def main() -> None:
    description = parser(__doc__, rounds=5)
    description.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    description.add_argument("--size", choices=CONFIGS, default="base")
    description.add_argument("--batch", type=int, default=4)
    description.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    description.add_argument("--compile", action="store_true", help="also compiled, forward and rank")
    description.add_argument("--breakdown", action="store_true", help="also where the time goes, by operator")
    description.add_argument("--alone", nargs=2, metavar=("SIDE", "PRECISION"), help=argparse.SUPPRESS)
    given = description.parse_args()
    how = options(given)
    size = "tiny" if how.quick else given.size
    bench = Bench(size, given.batch, given.device, how, given.compile, given.breakdown)
    torch.manual_seed(0)
    if given.alone:
        print(json.dumps(memory_alone(bench, *given.alone)))
        return
    rows: list[Row] = []
    notes: Notes = {}
    if "memory" in given.only:
        rows += memory(bench, [sys.executable, __file__, *sys.argv[1:]])
    timed = [part for name, part in TIMED.items() if name in given.only]
    if timed:
        ours, port = both_sides(bench.config)
        ours.to(bench.device).eval()
        port.to(bench.device).eval()
        notes["differences in fp32"] = check_equal(ours, port, bench.inputs(bench.batch))
        for part in timed:  # the step comes last: it changes the weights
            found, said = part(bench, ours, port)
            rows += found
            notes |= said
    settings = {
        "size": size,
        "batch": bench.batch,
        "image": bench.config.vision.image_size,
        "tokens": TOKENS,
        "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
        "transformers": transformers.__version__,
    }
    report("bridgetower", settings, rows, notes)


TIMED: dict[str, Callable[[Bench, Ours, Port], tuple[list[Row], Notes]]] = {
    "forward": forward,
    "rank": rank,
    "step": step,
    "pretrain": pretrain,
}
PARTS = ("memory", *TIMED)


if __name__ == "__main__":
    main()
