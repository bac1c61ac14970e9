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
from triptych.models.eve import SIZES as EVE
from triptych.models.eve import Eve
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


def eve(tokenizer: Tokenizer, layers: int) -> Eve:
    config = EVE["tiny"]
    text, vision = replace(config.text, vocab_size=tokenizer.vocab_size), replace(config.vision, layers=layers)
    return Eve(replace(config, text=text, vision=vision, deep_layers=1)).eval()


def test_a_network_with_one_attention_for_both(tokenizer: Tokenizer) -> None:
    """Of the attention of its blocks the share of each patch in that of all; words are those of the text."""
    network = eve(tokenizer, layers=3)
    maps = word_maps(network, tokenizer, PREPROCESSING, PIXELS_CHW, "a small red Triangle at the top")
    assert maps.words == ("a", "small", "red", "Triangle", "at", "the", "top")
    assert [name for name, _ in maps.layers] == [f"block {number}, joint" for number in (1, 2, 3)]
    grid = 48 // network.patch
    for _, share_WHW in maps.layers:
        assert share_WHW.shape == (7, grid, grid)
        assert np.allclose(share_WHW.sum((1, 2)), 1, atol=1e-5)
        assert np.all(share_WHW >= 0)
    cut = word_maps(network, tokenizer, PREPROCESSING, PIXELS_CHW, "a small red star", max_tokens=3)
    assert cut.words == ("a",)
    assert not any(module.explicit for module in network.modules() if isinstance(module, Attention))


def test_one_attention_shows_the_patch_that_a_word_attends_to(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first word has a direction, as one patch has; the other has none. Norms keep what has mean 0."""
    network = eve(tokenizer, layers=1)
    grid, direction_D = 48 // network.patch, torch.tensor([1.0, -1.0]).repeat(network.width // 2)
    attention = network.network.blocks[0].get_submodule("attention")
    assert isinstance(attention, Attention)
    attend_to(attention, torch.zeros(network.width))
    with torch.no_grad():
        attention.query.weight.copy_(3 * torch.eye(network.width))

    def encode_image(pixels_BCHW: torch.Tensor) -> Encoded:
        hidden_BND = torch.zeros(1, 1 + grid**2, network.width)
        hidden_BND[0, 1 + 2 * grid + 1] = direction_D  # the patch in row 2, column 1
        return Encoded(hidden_BND)

    def encode_text(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> Encoded:
        hidden_BLD = torch.zeros(*ids_BL.shape, network.width)
        hidden_BLD[0, 1] = direction_D
        return Encoded(hidden_BLD, mask_BL)

    monkeypatch.setattr(network, "encode_image", encode_image)
    monkeypatch.setattr(network, "encode_text", encode_text)
    maps = word_maps(network, tokenizer, PREPROCESSING, PIXELS_CHW, "a star")
    assert maps.words == ("a", "star")
    ((_, share_WHW),) = maps.layers
    expected_HW = np.zeros((grid, grid))
    expected_HW[2, 1] = 1
    assert np.allclose(share_WHW[0], expected_HW, atol=1e-4)
    assert np.allclose(share_WHW[1], 1 / grid**2, atol=1e-4)


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
            if part.bias is not None:
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
