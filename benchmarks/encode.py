"""How near encoding and fusing come to the processor's matrix products.

    python benchmarks/encode.py > benchmarks/results/encode.json

The vision Transformer, the text encoder and the fusion network of mPLUG-base in inference mode, batch 4, 256 pixels,
30 tokens, in fp32 and with all weights in bf16; as they are, and compiled (as by ``triptych evaluate --compile``). The
limit is the best rate of the matrix products of ``common.products``, measured in turns with the model. Operations are
those of matrix products, convolutions and attention: norms, activations and softmax count as none, their time does.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from common import Options, Work, count_flops, in_turns, options, parser, products, report
from triptych.models.mplug import SIZES, MPlug
from triptych.training.parallel import compile_inference

BATCH, TOKENS = 4, 30


def measure(model: MPlug, dtype: torch.dtype, how: Options) -> list[dict[str, Any]]:
    """The rows of the report for one kind of number."""
    model.to(dtype)
    compiled = copy.deepcopy(model)
    compile_inference(compiled)
    side = model.config.vision.image_size
    pixels_BCHW = torch.randn(BATCH, 3, side, side).to(dtype)
    ids_BL = torch.randint(1, model.config.text.vocab_size, (BATCH, TOKENS))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)

    @torch.no_grad()
    def forward(model: MPlug) -> None:
        model.fuse(model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL))

    flops = count_flops(partial(forward, model))
    works = {"as it is": Work(partial(forward, model), flops), "compiled": Work(partial(forward, compiled), flops)}
    for work in works.values():
        work.call()
    limits = products(dtype, how.quick)
    timings = in_turns({**works, **limits}, how)
    limit = timings.fastest(limits)
    return [
        {
            "model": name,
            "GFLOP": work.amount / 1e9,
            "seconds": timings.median(name),
            "GFLOP/s": timings.rate(name) / 1e9,
            "limit": limit,
            "limit GFLOP/s": timings.rate(limit) / 1e9,
            "share": timings.share(name, limit),
        }
        for name, work in works.items()
    ]


def main() -> None:
    how = options(parser(__doc__, rounds=9).parse_args())
    size = "tiny" if how.quick else "base"
    torch.manual_seed(0)
    model = MPlug(SIZES[size]).eval()
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(model, dtype, how)]
    settings = {"model": f"mplug {size}", "batch": BATCH, "image": model.config.vision.image_size, "tokens": TOKENS}
    report("encode", settings, rows, {"target share": {"float32": 0.85, "bfloat16": 0.65}})


if __name__ == "__main__":
    main()
