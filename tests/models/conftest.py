"""The small networks that every registered network is tested with. A new one needs a line in ``CASES``."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from triptych.models import build
from triptych.models.bridgetower import BridgeTowerConfig
from triptych.models.eve import EveConfig, PixelDecoderConfig
from triptych.models.moe import MoEConfig
from triptych.models.mplug import FusionKind, MPlugConfig
from triptych.models.protocol import VisionLanguageModel
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig


@dataclass(frozen=True)
class Case:
    """A small network and what a test must know of it."""

    model_type: str
    config: Any
    patch: int = 8
    image_size: int = 32
    vocab: int = 61
    max_text: int = 24
    beside: str | None = None
    """A module that nothing of the protocol uses."""


def mplug(fusion: FusionKind, vision_width: int) -> Case:
    vision = VisionConfig(vision_width, layers=2, heads=2, patch=8, image_size=32, attention_dropout=0.1)
    text = TextConfig(vocab_size=61, width=32, heads=2, ffn=48, max_positions=24)
    sizes = {"text_layers": 2, "fusion_layers": 3, "decoder_layers": 2, "embed_dim": 16}
    return Case("mplug", MPlugConfig(vision, text, fusion=fusion, stride=2, **sizes))


def bridgetower(**sizes: Any) -> Case:
    vision = VisionConfig(32, layers=3, heads=2, patch=8, image_size=32, interpolation="bicubic")
    text = TextConfig(vocab_size=61, width=32, heads=2, ffn=48, max_positions=26, layer_norm_eps=1e-5, first_position=2)
    sizes = {"text_layers": 3, "fusion_layers": 2, "embed_dim": 16, "decoder_layers": 2, **sizes}
    beside = "pair_embedding" if sizes.get("contrast") == "projected" else None
    return Case("bridgetower", BridgeTowerConfig(vision, text, **sizes), beside=beside)


def eve(moe: MoEConfig | None = None, **sizes: Any) -> Case:
    vision = VisionConfig(32, layers=3, heads=2, patch=8, image_size=32, layer_norm_eps=1e-6, interpolation="bicubic")
    text = TextConfig(vocab_size=61, width=32, heads=2, ffn=48, max_positions=24, layer_norm_eps=1e-6)
    pixels = PixelDecoderConfig(width=16, layers=1, heads=2)
    sizes = {"embed_dim": 16, "decoder_layers": 2, "pixel_decoder": pixels, **sizes}
    return Case("eve", EveConfig(vision, text, moe=moe or MoEConfig(experts=4), **sizes))


def with_stem(case: Case) -> Case:
    """The same network with convolutions in front of its Transformer."""
    vision = dataclasses.replace(case.config.vision, stem="convolution")
    return dataclasses.replace(case, config=dataclasses.replace(case.config, vision=vision))


CASES = {
    "mplug": mplug("skip", 48),
    "mplug-convolution-stem": with_stem(mplug("skip", 48)),
    "mplug-asymmetric": mplug("asymmetric", 32),
    "mplug-connected": mplug("connected", 32),
    "mplug-co_attention": mplug("co_attention", 32),
    "bridgetower": bridgetower(),
    "bridgetower-projected": bridgetower(contrast="projected"),
    "bridgetower-gated": bridgetower(bridge="gated"),
    "bridgetower-attention_ffn": bridgetower(bridge="attention_ffn", fusion_layers=3),
    "bridgetower-half-bridged": bridgetower(bridged_layers=2, fusion_layers=3),
    "meter": bridgetower(bridged_layers=0),
    "meter-gathering": bridgetower(bridged_layers=0, gather_layers=True),
    "eve": eve(),
    "eve-convolution-stem": with_stem(eve()),
    "eve-shared": eve(shallow="shared", deep="shared"),
    "eve-hard": eve(deep="hard"),
    "eve-soft": eve(MoEConfig(experts=3, top_k=1, modality_routing=False), shallow="soft"),
    "eve-into-experts": eve(MoEConfig(experts=4, modality_into_experts=True)),
}

FIRST = {case.model_type: case for case in reversed(CASES.values())}
"""One case a network."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What asks for ``case``, or for a fixture that does, runs for each of them."""
    if "case" in metafunc.fixturenames:
        cases = FIRST if "once_a_network" in metafunc.fixturenames else CASES
        metafunc.parametrize("case", cases.values(), ids=cases.keys(), indirect=True)


@pytest.fixture
def once_a_network() -> None:
    """For what takes seconds: with it a test runs for one case of each network."""


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def cases() -> dict[str, Case]:
    return CASES


def small(case: Case, seed: int = 0) -> VisionLanguageModel:
    """In evaluation mode, with every parameter away from its start, so that none can be ignored unnoticed."""
    torch.manual_seed(seed)
    model = build(case.model_type, case.config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture
def make_model(case: Case) -> Callable[[int], VisionLanguageModel]:
    """Another model of the same sizes, from a seed."""
    return partial(small, case)


@pytest.fixture
def model(case: Case) -> VisionLanguageModel:
    return small(case)
