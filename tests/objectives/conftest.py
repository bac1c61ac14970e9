"""A tiny network and batches for the objectives."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from triptych.data.batches import PretrainingBatch, Tokens
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig, pad_ids
from triptych.models.vision import VisionConfig

PAD, CLS, SEP, MASK, VOCAB = 0, 1, 2, 3, 40


@pytest.fixture
def make_model() -> Callable[..., MPlug]:
    """``make_model(dropout=0.0, **changes of the configuration)``, its parameters stirred."""

    def make(dropout: float = 0.0, **changes: object) -> MPlug:
        torch.manual_seed(0)
        vision = VisionConfig(32, layers=1, heads=2, patch=8, image_size=16)
        text = TextConfig(VOCAB, 32, 2, 48, max_positions=80, dropout=dropout, attention_dropout=dropout)
        sizes = {"text_layers": 1, "fusion_layers": 3, "decoder_layers": 1, "embed_dim": 16, "stride": 2}
        model = MPlug(dataclasses.replace(MPlugConfig(vision, text, **sizes), **changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "temperature":
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture
def make_batch() -> Callable[..., PretrainingBatch]:
    """``make_batch(rows, seed, image_ids)``, texts of 1 to 9 words, cut at a random place."""

    def make(rows: int, seed: int = 0, image_ids: list[int] | None = None) -> PretrainingBatch:
        generator = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        texts = [[number(4, VOCAB) for _ in range(number(1, 10))] for _ in range(rows)]
        cuts = [number(0, len(text)) for text in texts]

        def tokens(words: list[list[int]]) -> Tokens:
            mask_BL = pad_ids([[1] * len(row) for row in words], 0).bool()
            return Tokens(pad_ids(words, PAD), mask_BL)

        return PretrainingBatch(
            torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8, generator=generator),
            tokens([[CLS, *text] for text in texts]),
            torch.tensor(image_ids if image_ids is not None else range(100 * seed, 100 * seed + rows)),
            tokens([[CLS, *text[:cut]] for text, cut in zip(texts, cuts, strict=True)]),
            tokens([[CLS, *text[cut:], SEP] for text, cut in zip(texts, cuts, strict=True)]),
        )

    return make
