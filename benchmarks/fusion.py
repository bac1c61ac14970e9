"""Forward pass of the fusion networks that mPLUG's paper compares (figure 4).

    python benchmarks/fusion.py > benchmarks/results/fusion.json

The fusion network alone, of mPLUG-base's sizes (6 layers), given encoded images of 256 and 384 pixels (257 and 577
tokens) and texts of 30 tokens, batch 4, fp32, inference mode: co-attention, connected attention, skip-connected with
stride S (the released rule: layers j = S, 2S, ... of 0..5 are connected, none for S = 6), and asymmetric co-attention.
"share" is how much of the saving in operations against connected attention is a saving in time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import Options, Work, count_flops, in_turns, options, parser, report
from triptych.models.mplug import SIZES, FusionNetwork, MPlugConfig
from triptych.models.protocol import Encoded

BATCH, TOKENS = 4, 30


def networks(config: MPlugConfig) -> dict[str, FusionNetwork]:
    """The networks by the name the paper gives them."""
    configs = {
        "connected": replace(config, fusion="connected"),
        "co-attention": replace(config, fusion="co_attention"),
        **{f"skip S={stride}": replace(config, fusion="skip", stride=stride) for stride in (1, 2, 3, 6)},
        "asymmetric": replace(config, fusion="asymmetric"),
    }
    return {name: FusionNetwork(config).eval() for name, config in configs.items()}


def forward(network: FusionNetwork, image_BND: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> None:
    """One pass."""
    with torch.inference_mode():
        network(Encoded(image_BND), Encoded(text_BLD, mask_BL))


def measure(config: MPlugConfig, image_size: int, how: Options) -> list[dict[str, Any]]:
    """One row of the report for each network."""
    width = config.text.width
    image_BND = torch.randn(BATCH, (image_size // config.vision.patch) ** 2 + 1, width)
    text_BLD = torch.randn(BATCH, TOKENS, width)
    mask_BL = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    works = {}
    for name, network in networks(config).items():
        call = partial(forward, network, image_BND, text_BLD, mask_BL)
        works[name] = Work(call, count_flops(call))
    timings = in_turns(works, how)
    rows = []
    for name, work in works.items():
        by_flops = works["connected"].amount / work.amount
        by_time = timings.ratio("connected", name)
        rows.append(
            {
                "image": image_size,
                "network": name,
                "ms": 1000 * timings.median(name),
                "GFLOP": work.amount / 1e9,
                "times faster than connected": by_time,
                "by operations": by_flops,
                "share": by_time / by_flops,
            }
        )
    return rows


def main() -> None:
    how = options(parser(__doc__, rounds=9).parse_args())
    config = SIZES["tiny" if how.quick else "base"]
    torch.manual_seed(0)
    rows = [row for image_size in (256, 384) for row in measure(config, image_size, how)]
    settings = {"width": config.text.width, "layers": config.fusion_layers, "batch": BATCH, "tokens": TOKENS}
    report("fusion", settings, rows, {"target share of skip S=3": 0.9})


if __name__ == "__main__":
    main()
