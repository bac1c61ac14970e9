"""Maps are of the right words and the right patches, whatever the kind of fusion."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from triptych.attention_maps import word_maps
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.bridgetower import SIZES as BRIDGETOWER
from triptych.models.bridgetower import BridgeTower
from triptych.models.layers import Attention
from triptych.models.mplug import SIZES, FusionKind, MPlug
from triptych.models.protocol import Encoded

PREPROCESSING = Preprocessing(48, HALF, HALF)
PIXELS_CHW = torch.full((3, 48, 48), 100, dtype=torch.uint8)
GRID = 48 // SIZES["tiny"].vision.patch


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(["a small red star at the top"] * 5 + ["triangle"], 44)


def model(tokenizer: Tokenizer, fusion: FusionKind = "skip", layers: int = 4) -> MPlug:
    config = SIZES["tiny"]
    text = replace(config.text, vocab_size=tokenizer.vocab_size)
    return MPlug(replace(config, text=text, fusion=fusion, fusion_layers=layers)).eval()


def test_a_network_whose_texts_end_with_a_token(tokenizer: Tokenizer) -> None:
    """Words that are cut off have no map, and the end token gives none."""
    config = BRIDGETOWER["tiny"]
    network = BridgeTower(replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size))).eval()
    whole = word_maps(network, tokenizer, PREPROCESSING, PIXELS_CHW, "a small red star")
    assert whole.words == ("a", "small", "red", "star")
    assert [name for name, _ in whole.layers] == [f"layer {number}, co-attention" for number in (1, 2, 3)]
    cut = word_maps(network, tokenizer, PREPROCESSING, PIXELS_CHW, "a small red star", max_tokens=3)
    assert cut.words == ("a",)


def test_a_map_for_each_word_and_layer(tokenizer: Tokenizer) -> None:
    maps = word_maps(model(tokenizer), tokenizer, PREPROCESSING, PIXELS_CHW, "a small red Triangle at the top")
    assert len(tokenizer.encode_batch(["triangle"], max_length=None, end=False)[0][0]) > 2  # of several pieces
    assert maps.words == ("a", "small", "red", "Triangle", "at", "the", "top")
    assert [name for name, _ in maps.layers] == [
        "layer 1, cross-attention",
        "layer 2, cross-attention",
        "layer 3, connected",
        "layer 4, cross-attention",
    ]
    tokens = len(tokenizer.encode_batch(["a small red triangle at the top"], max_length=None, end=False)[0][0])
    for name, share_WHW in maps.layers:
        assert share_WHW.shape == (7, GRID, GRID)
        total_W = share_WHW.sum((1, 2))
        # An untrained model attends evenly: to all image tokens but the first, or to these among the text's.
        even = GRID**2 / (GRID**2 + 1 + (tokens if name.endswith("connected") else 0))
        assert np.all(abs(total_W - even) < 0.15)


def attend_to(attention: Attention, direction_D: torch.Tensor) -> None:
    """Every query looks for keys along a direction."""
    with torch.no_grad():
        for part in (attention.query, attention.key_value):
            part.weight.zero_()
            part.bias.zero_()
        attention.query.bias.copy_(direction_D)
        attention.key_value.weight[: len(direction_D)] = torch.eye(len(direction_D))


@pytest.mark.parametrize(
    ("fusion", "name"),
    [
        ("asymmetric", "block.cross_attention"),
        ("connected", "block.attention"),
        ("co_attention", "text_block.cross_attention"),
    ],
)
def test_the_map_shows_the_patch_that_is_attended_to(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fusion: FusionKind, name: str
) -> None:
    mplug = model(tokenizer, fusion, layers=1)
    direction_D = torch.ones(mplug.width)
    attention: nn.Module = mplug.fusion.layers[0].get_submodule(name)
    assert isinstance(attention, Attention)
    attend_to(attention, direction_D)

    def encode_image(pixels_BCHW: torch.Tensor) -> Encoded:
        hidden_BND = torch.zeros(1, 1 + GRID**2, mplug.width)
        hidden_BND[0, 1 + 2 * GRID + 1] = 10 * direction_D  # the patch in row 2, column 1
        return Encoded(hidden_BND)

    monkeypatch.setattr(mplug, "encode_image", encode_image)
    maps = word_maps(mplug, tokenizer, PREPROCESSING, PIXELS_CHW, "a red star")
    ((_, share_WHW),) = maps.layers
    expected_WHW = np.zeros((3, GRID, GRID))
    expected_WHW[:, 2, 1] = 1
    assert np.allclose(share_WHW, expected_WHW, atol=1e-4)


def test_texts_are_cut_as_in_training(tokenizer: Tokenizer) -> None:
    maps = word_maps(model(tokenizer), tokenizer, PREPROCESSING, PIXELS_CHW, "a small red star", max_tokens=2)
    assert maps.words == ("a",)


def test_nothing_is_left_switched_on(tokenizer: Tokenizer) -> None:
    mplug = model(tokenizer)
    word_maps(mplug, tokenizer, PREPROCESSING, PIXELS_CHW, "a star")
    assert not any(module.explicit for module in mplug.modules() if isinstance(module, Attention))


def test_a_text_without_words(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="has no words"):
        word_maps(model(tokenizer), tokenizer, PREPROCESSING, PIXELS_CHW, " ")
