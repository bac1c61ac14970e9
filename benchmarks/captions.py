"""Caption generation with cached keys and values against recomputing the prefix at every step.

    python benchmarks/captions.py > benchmarks/results/captions.json

The decoder of mPLUG-base over the image, batch 4 at 256 pixels, beam 5. The end token is forbidden, so that every beam
runs its 25 tokens. The other side is the same decoder with ``cached=False``: at every step the whole prefix, over
images repeated for each beam, as the official code does (X-PLUG/mPLUG ``models/predictor.py``). In fp32 both must find
the same captions.

A cached step reads every weight once for a few rows, so besides the rate of matrix products the rate of reading memory
limits it. "bound" is the larger of the times that the operations and the bytes need at the measured rates.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from common import Work, count_flops, in_turns, options, parser, products, reading, report
from triptych.generation import BeamSearch, Hypothesis, SpecialIds, generate
from triptych.models.mplug import SIZES, MPlug
from triptych.models.protocol import Encoded
from triptych.models.text import TextDecoder

BATCH, BEAMS = 4, 5


@dataclass(frozen=True)
class Side:
    """One way to generate the same captions."""

    decoder: TextDecoder
    memory: Encoded
    cached: bool
    tokens: int

    def run(self) -> list[list[Hypothesis]]:
        """Generate."""
        search = BeamSearch(BEAMS, min_length=self.tokens, max_length=self.tokens)
        return generate(self.decoder, self.memory, search, SpecialIds(), cached=self.cached)

    def flops(self) -> int:
        """Operations of one run, counted without computing anything."""
        memory = self.memory.to("meta")
        decoder = copy.deepcopy(self.decoder).to("meta").requires_grad_(False)
        first_B = torch.zeros(BATCH, dtype=torch.long, device="meta")
        beams_R = first_B.repeat_interleave(BEAMS)

        def uncached() -> None:
            decoder.logits(decoder(first_B[:, None], memory)[:, -1])
            for length in range(2, self.tokens + 1):
                decoder.logits(decoder(beams_R[:, None].expand(-1, length), memory.rows(beams_R))[:, -1])

        def cached() -> None:
            state = decoder.start(memory, self.tokens)
            decoder.step(first_B[:, None], state)
            state.select(beams_R)
            for _ in range(2, self.tokens + 1):
                decoder.step(beams_R[:, None], state)

        with torch.no_grad():
            return count_flops(cached if self.cached else uncached)

    def bytes_read(self) -> int:
        """Of all cached steps: the weights that a step uses, and the memory's keys and values."""
        unused = ("position", "cross_attention.key_value")
        weights = (p for name, p in self.decoder.named_parameters() if not any(part in name for part in unused))
        with torch.no_grad():
            state = self.decoder.start(self.memory, self.tokens)
        kept = (x for memory in state.memory for x in (memory.keys_BHMK, memory.values_BHMK))
        return self.tokens * sum(x.nbytes for x in (*weights, *kept))


def main() -> None:
    how = options(parser(__doc__, rounds=3).parse_args())
    size, tokens = ("tiny", 5) if how.quick else ("base", 25)
    torch.manual_seed(0)
    model = MPlug(SIZES[size]).eval()
    image_size = model.config.vision.image_size
    pixels_BCHW = torch.randn(BATCH, 3, image_size, image_size)
    with torch.no_grad():
        memory = model.encode_image(pixels_BCHW)
    half = copy.deepcopy(model.decoder).bfloat16()
    sides = {
        "fp32 cached": Side(model.decoder, memory, True, tokens),
        "fp32 uncached": Side(model.decoder, memory, False, tokens),
        "bf16 cached": Side(half, memory.to(torch.bfloat16), True, tokens),
        "bf16 uncached": Side(half, memory.to(torch.bfloat16), False, tokens),
    }

    same = _ids(sides["fp32 cached"]) == _ids(sides["fp32 uncached"])
    for name in ("bf16 cached", "bf16 uncached"):
        sides[name].run()
    limits = {dtype: products(dtype, how.quick) for dtype in (torch.float32, torch.bfloat16)}
    works = {name: Work(side.run, side.flops()) for name, side in sides.items()}
    timings = in_turns({**works, **limits[torch.float32], **limits[torch.bfloat16], "read": reading(how.quick)}, how)

    rows = []
    for name, side in sides.items():
        rate = timings.rate(timings.fastest(limits[side.memory.hidden_BLD.dtype]))
        by_flops = works[name].amount / rate
        by_bytes = side.bytes_read() / timings.rate("read") if side.cached else 0.0
        row = {
            "side": name,
            "seconds": timings.median(name),
            "GFLOP": works[name].amount / 1e9,
            "limit GFLOP/s": rate / 1e9,
            "bound by operations": by_flops,
            "bound by bytes": by_bytes,
            "of bound": max(by_flops, by_bytes) / timings.median(name),
        }
        rows.append(row)
    notes = {
        "same captions": same,
        "read GB/s": timings.rate("read") / 1e9,
        "times faster with a cache, fp32": timings.ratio("fp32 uncached", "fp32 cached"),
        "by operations": works["fp32 uncached"].amount / works["fp32 cached"].amount,
        "target": 20.0,
        "times faster with a cache, bf16": timings.ratio("bf16 uncached", "bf16 cached"),
        "times faster in bf16, cached": timings.ratio("fp32 cached", "bf16 cached"),
    }
    settings = {"model": f"mplug {size}", "batch": BATCH, "beams": BEAMS, "tokens": tokens, "image": image_size}
    report("captions", settings, rows, notes)


def _ids(side: Side) -> list[list[list[int]]]:
    return [[hypothesis.ids for hypothesis in row] for row in side.run()]


if __name__ == "__main__":
    main()
