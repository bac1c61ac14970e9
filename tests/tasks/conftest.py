"""The small network that the tests of tasks use."""

from collections.abc import Callable

import pytest
import torch

from triptych.data.tokenizers import Tokenizer
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig


@pytest.fixture(scope="session")
def build_model() -> Callable[[Tokenizer], MPlug]:
    """Makes an mPLUG of width 16 on pictures of 16 pixels, for a tokenizer's vocabulary."""

    def build(tokenizer: Tokenizer) -> MPlug:
        torch.manual_seed(0)
        text = TextConfig(tokenizer.vocab_size, width=16, heads=2, ffn=32, max_positions=32)
        vision = VisionConfig(width=16, layers=1, heads=2, patch=8, image_size=16)
        sizes = {"text_layers": 1, "fusion_layers": 2, "decoder_layers": 1, "stride": 1, "embed_dim": 8}
        return MPlug(MPlugConfig(vision, text, **sizes)).eval()

    return build
