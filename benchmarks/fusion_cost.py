"""What bridges cost: BridgeTower against METER, and every definition of a bridge, by parameters, operations and time.

    python benchmarks/fusion_cost.py > benchmarks/results/fusion_cost.json
    python benchmarks/fusion_cost.py --only meter add mlp --device cuda --precision bf16 --batch 32

The whole network of the base size in inference mode, batch 4, texts of 50 tokens, at 288 and at 384 pixels. Parameters
are those that pooled states need: no heads. Operations, of one pair, are those of matrix products, convolutions and
attention. Every definition is counted; METER, METER with its fusion of layers, and the paper's bridge are timed, in
turns, unless ``--only`` names others: encoders are shared, so that several fit into memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import Options, Timings, Work, count_flops, in_turns, options, parser, report
from triptych.models.bridgetower import BRIDGES, SIZES, BridgeTower, BridgeTowerConfig

SIDES, TOKENS, BATCH = (288, 384), 50, 4
TIMED = ("meter", "meter_gather", "add")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def networks(base: BridgeTowerConfig) -> dict[str, BridgeTowerConfig]:
    """METER without and with its fusion of layers, then the definitions."""
    meter = replace(base, bridged_layers=0)
    bridged = {kind: replace(base, bridge=kind) for kind in BRIDGES}
    return {"meter": meter, "meter_gather": replace(meter, gather_layers=True), **bridged}


def count(config: BridgeTowerConfig, side: int) -> tuple[int, int]:
    """Parameters, and operations of one pair; without weights."""
    with torch.device("meta"):
        model = BridgeTower(config).eval()
        model.resize_images(side)
        model.train_only("image", "text", "fusion", "pooled")
        pixels_BCHW = torch.empty(1, 3, side, side)
        ids_BL = torch.zeros(1, TOKENS, dtype=torch.long)
        mask_BL = torch.ones(1, TOKENS, dtype=torch.bool)
    flops = count_flops(partial(forward, model, pixels_BCHW, ids_BL, mask_BL))
    return sum(p.numel() for p in model.parameters() if p.requires_grad), flops


@torch.no_grad()
def forward(model: BridgeTower, pixels_BCHW: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> None:
    """One pass, finished when it returns."""
    model.fuse(model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL))
    if pixels_BCHW.device.type == "cuda":
        torch.cuda.synchronize(pixels_BCHW.device)


def time(
    configs: dict[str, BridgeTowerConfig], side: int, batch: int, device: torch.device, dtype: torch.dtype, how: Options
) -> Timings:
    """The networks in turns, with random weights."""
    works: dict[str, Work] = {}
    first: BridgeTower | None = None
    pixels_BCHW = torch.randn(batch, 3, side, side).to(device, dtype)
    for name, config in configs.items():
        model = BridgeTower(config).eval()
        if first is None:
            first = model
            first.resize_images(side)
        model.vision, model.text = first.vision, first.text
        model.to(device, dtype)
        ids_BL = torch.randint(3, config.text.vocab_size, (batch, TOKENS), device=device)
        work = Work(partial(forward, model, pixels_BCHW, ids_BL, torch.ones_like(ids_BL, dtype=torch.bool)))
        work.call()
        works[name] = work
    return in_turns(works, how)


def main() -> None:
    description = parser(__doc__, rounds=9)
    description.add_argument("--only", nargs="+", choices=networks(SIZES["base"]), default=list(TIMED))
    description.add_argument("--batch", type=int, default=BATCH)
    description.add_argument("--precision", choices=DTYPES, default="fp32", help="of all weights")
    description.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = description.parse_args()
    how = options(given)
    torch.manual_seed(0)
    configs = networks(replace(SIZES["tiny"], decoder_layers=0) if how.quick else SIZES["base"])
    rows: list[dict[str, Any]] = []
    for side in (48,) if how.quick else SIDES:
        counted = {name: count(config, side) for name, config in configs.items()}
        timed = {name: configs[name] for name in dict.fromkeys(("meter", *given.only))}
        timings = time(timed, side, given.batch, given.device, DTYPES[given.precision], how)
        parameters, flops = counted["meter"]
        for name, (own_parameters, own_flops) in counted.items():
            row = {
                "image": side,
                "network": name,
                "parameters": own_parameters,
                "more than METER": own_parameters - parameters,
                "GFLOP a pair": own_flops / 1e9,
                "operations": own_flops / flops,
            }
            if name in timed:
                row |= {"ms": 1000 * timings.median(name), "time": timings.ratio(name, "meter")}
            rows.append(row)
    settings = {
        "size": "tiny" if how.quick else "base",
        "batch": given.batch,
        "tokens": TOKENS,
        "precision": given.precision,
        "device": str(given.device),
    }
    report("fusion_cost", settings, rows, {"operations, time": "as a multiple of METER's"})


if __name__ == "__main__":
    main()
