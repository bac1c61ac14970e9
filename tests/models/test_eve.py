"""What is EVE's own; what it shares with every network is in ``test_every_model.py``.

Shape legend: B batch, N image tokens, L text tokens, K visible patches, P patches, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from triptych.models import build
from triptych.models.eve import (
    SIZES,
    Eve,
    EveConfig,
    HardRouter,
    PixelDecoder,
    PixelDecoderConfig,
    SharedFeedForward,
    SoftRouter,
    hide_patches,
    sine_positions,
)
from triptych.models.layers import record_attention
from triptych.models.moe import MoEConfig, record_routing
from triptych.models.protocol import Encoded, Part
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig


def config(layers: int = 3, **sizes: Any) -> EveConfig:
    vision = VisionConfig(32, layers, heads=2, patch=8, image_size=32, layer_norm_eps=1e-6, interpolation="bicubic")
    text = TextConfig(vocab_size=61, width=32, heads=2, ffn=48, max_positions=24, layer_norm_eps=1e-6)
    sizes = {"embed_dim": 16, "pixel_decoder": PixelDecoderConfig(16, layers=1, heads=2), **sizes}
    return EveConfig(vision, text, **{"moe": MoEConfig(experts=4), **sizes})


def eve(**sizes: Any) -> Eve:
    torch.manual_seed(0)
    model = Eve(config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("size", "parameters"), [("base", 475_197_696), ("large", 1_326_101_504)])
def test_published_sizes(size: str, parameters: int) -> None:
    """Spec section 1: the base number was counted in the official network."""
    with torch.device("meta"):
        model = build("eve", size)
    assert isinstance(model, Eve)
    assert sum(count(part) for part in (model.image_embeddings, model.text_embeddings, model.network)) == parameters
    soft = [count(block.ffn.moe.experts) for block in model.network.blocks if isinstance(block.ffn, SoftRouter)]
    hard = [count(block.ffn) for block in model.network.blocks if isinstance(block.ffn, HardRouter)]
    layers = len(model.network.blocks)
    assert (len(soft), len(hard)) == {"base": (2, 10), "large": (3, 21)}[size]
    assert isinstance(model.network.blocks[layers - len(soft)].ffn, SoftRouter)
    if size == "base":
        assert round(sum(soft) / 1e6, 1) == 302.2
        assert round(sum(hard) / 1e6, 1) == 94.5


def test_the_kinds_of_blocks() -> None:
    def kinds(**sizes: Any) -> list[type]:
        return [type(block.ffn) for block in eve(**sizes).network.blocks]

    assert kinds() == [HardRouter, SoftRouter, SoftRouter]
    assert kinds(deep_layers=1, deep="hard", shallow="shared") == [SharedFeedForward, SharedFeedForward, HardRouter]
    assert kinds(deep_layers=0) == [HardRouter] * 3
    mixed = eve(shallow="soft", deep="shared", deep_layers=2)
    assert isinstance(mixed.network.blocks[0].ffn, SoftRouter)
    assert mixed.network.blocks[0].ffn.moe.config == MoEConfig(experts=2, top_k=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deep": "dense"}, "deep must be one of hard, soft, shared, not 'dense'"),
        ({"shallow": "none"}, "shallow must be one of"),
        ({"deep_layers": 4}, "deep_layers must be 0 to the 3 layers, not 4"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 18}, "must be a multiple of 4, not 18"), ({"layers": 0}, "needs at least one layer, not 0")],
)
def test_settings_of_the_pixel_decoder_that_cannot_be(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelDecoderConfig(**changes)


def test_one_width() -> None:
    with pytest.raises(ValueError, match="one Transformer has one width, not 32 and 64"):
        dataclasses.replace(config(), text=dataclasses.replace(config().text, width=64))


def pair(model: Eve, side: int = 32) -> tuple[Tensor, Encoded]:
    torch.manual_seed(1)
    mask_BL = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return torch.randn(2, 3, side, side), model.encode_text(torch.randint(1, 60, (2, 6)), mask_BL)


@pytest.mark.parametrize("shape", ["whole", "visible", "clip", "larger"])
def test_text_tokens_stay_text_however_many_the_picture_has(shape: str) -> None:
    """The released code goes by place and takes the text of a shortened picture for vision."""
    model = eve()
    pixels, text = pair(model, 48 if shape == "larger" else 32)
    if shape == "visible":
        image = model.encode_visible(pixels, torch.tensor([[0, 5, 9], [2, 3, 11]]))
    elif shape == "clip":
        image = model.encode_image(torch.stack([pixels, pixels.flip(0)], dim=1))
    else:
        image = model.encode_image(pixels)
    N = {"whole": 17, "visible": 4, "clip": 34, "larger": 37}[shape]
    assert image.hidden_BLD.shape[1] == N
    with record_routing(model) as found:
        model.fuse(image, text)
    for calls in found.values():
        assert [call.first_ME.sum(1).tolist() for call in calls] == [[2 * N, 10]]


def test_the_text_goes_through_its_own_experts_in_hard_blocks() -> None:
    model = eve(deep_layers=0)
    pixels, text = pair(model)
    image = model.encode_visible(pixels, torch.tensor([[0, 5], [2, 3]]))
    before = model.fuse(image, text)
    with torch.no_grad():
        last = model.network.blocks[-1].ffn
        assert isinstance(last, HardRouter)
        for parameter in last.image.parameters():
            parameter.mul_(2)
    after = model.fuse(image, text)
    assert torch.equal(before.text_BLD, after.text_BLD)
    assert not torch.equal(before.image_BND, after.image_BND)


def test_visible_patches_are_those_of_the_whole_picture() -> None:
    """Positions are added before patches are left out, unless the released slip is asked for."""
    kept_BK = torch.tensor([[3, 7, 12], [0, 1, 15]])
    for stem in ("patch", "convolution"):
        model = eve()
        if stem == "convolution":
            vision = dataclasses.replace(config().vision, stem="convolution")
            model = Eve(dataclasses.replace(config(), vision=vision))
        pixels, _ = pair(model)
        visible = model.encode_visible(pixels, kept_BK).hidden_BLD
        whole = model.encode_image(hide_patches(pixels, kept_BK, (4, 4)) if stem == "convolution" else pixels)
        expected = torch.stack(
            [row[torch.cat([torch.tensor([0]), 1 + k])] for row, k in zip(whole.hidden_BLD, kept_BK, strict=True)]
        )
        torch.testing.assert_close(visible, expected)
    right, slip = eve(), eve(unpositioned_patches=True)
    difference = right.encode_visible(pixels, kept_BK).hidden_BLD - slip.encode_visible(pixels, kept_BK).hidden_BLD
    table_ND = right.image_embeddings.position_embedding
    torch.testing.assert_close(difference[:, 1:], table_ND[1:][kept_BK])
    assert not difference[:, 0].any()
    assert torch.equal(right.encode_image(pixels).hidden_BLD, slip.encode_image(pixels).hidden_BLD)


@pytest.mark.parametrize("stem", ["patch", "convolution"])
def test_hidden_pixels_are_not_seen(stem: Any) -> None:
    model = Eve(dataclasses.replace(config(), vision=dataclasses.replace(config().vision, stem=stem))).eval()
    pixels, _ = pair(model)
    kept_BK = torch.tensor([[3, 7], [3, 7]])
    other = pixels.clone()
    other[:, :, 8:, :24] += 5.0  # touches neither patch 3 (right above) nor 7 (right, second row)
    assert torch.equal(
        model.encode_visible(pixels, kept_BK).hidden_BLD, model.encode_visible(other, kept_BK).hidden_BLD
    )
    other[:, :, 0, -1] += 5.0
    assert not torch.equal(
        model.encode_visible(pixels, kept_BK).hidden_BLD, model.encode_visible(other, kept_BK).hidden_BLD
    )


def reference_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """By its definition: of a patch, half of the numbers are of its column and half of its row, sines then cosines."""
    table = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for half, place in enumerate((column, row)):
                for number in range(width // 4):
                    angle = place / 10000 ** (number / (width / 4))
                    start = half * width // 2 + number
                    table[row * columns + column, start] = np.sin(angle)
                    table[row * columns + column, start + width // 4] = np.cos(angle)
    return table


def test_positions_of_the_pixel_decoder() -> None:
    found = sine_positions((3, 5), 16, torch.zeros(1))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), reference_positions(3, 5, 16), atol=1e-6)


def test_the_pixel_decoder_puts_patches_where_they_were() -> None:
    """Whatever the order in which visible patches come."""
    torch.manual_seed(0)
    decoder = PixelDecoder(PixelDecoderConfig(16, layers=2, heads=2), 32, 8)
    nn.init.normal_(decoder.mask_token)
    visible_BKD, kept_BK = torch.randn(2, 4, 32), torch.tensor([[1, 4, 5], [0, 2, 3]])
    found = decoder(visible_BKD, kept_BK, (2, 3), None)
    assert found.shape == (2, 6, 8 * 8 * 3)
    order = torch.tensor([2, 0, 1])
    shuffled_BKD = torch.cat([visible_BKD[:, :1], visible_BKD[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(decoder(shuffled_BKD, kept_BK[:, order], (2, 3), None), found)
    assert not torch.allclose(decoder(visible_BKD, kept_BK, (3, 2), None), found)


@pytest.mark.parametrize("cross", [False, True])
def test_the_pixel_decoder_reads_the_text_if_it_is_made_to(cross: bool) -> None:
    model = eve(pixel_decoder=PixelDecoderConfig(16, layers=1, heads=2, cross_attention=cross))
    pixels, text = pair(model)
    kept_BK = torch.tensor([[3, 7, 12], [0, 1, 15]])
    fused = model.fuse(model.encode_visible(pixels, kept_BK), text)
    other = dataclasses.replace(fused, text_BLD=fused.text_BLD + 1)
    padding = dataclasses.replace(fused, text_BLD=torch.where(text.real_BL()[:, :, None], fused.text_BLD, 7.0))
    painted = model.paint(fused, kept_BK, (4, 4))
    assert torch.equal(model.paint(other, kept_BK, (4, 4)), painted) != cross
    torch.testing.assert_close(model.paint(padding, kept_BK, (4, 4)), painted)


def test_a_network_without_pixel_decoder_says_so() -> None:
    model = eve(pixel_decoder=None)
    pixels, text = pair(model)
    fused = model.fuse(model.encode_image(pixels), text)
    with pytest.raises(ValueError, match="this eve has no decoder of pixels"):
        model.paint(fused, torch.tensor([[0], [0]]), (4, 4))


def test_drop_path_rises_to_the_top_and_is_for_training() -> None:
    model = Eve(config(drop_path=0.2))
    rates = [block.drop_path for block in model.network.blocks]
    assert all(isinstance(rate, StochasticDepth) and rate.mode == "row" for rate in rates)
    assert [rate.p for rate in rates] == pytest.approx([0.0, 0.1, 0.2])
    pixels, text = pair(model)
    model.eval()
    image = model.encode_image(pixels)
    assert torch.equal(model.fuse(image, text).text_BLD, model.fuse(image, text).text_BLD)
    model.train()
    torch.manual_seed(0)
    found = [model.network(image.hidden_BLD, 17) for _ in range(12)]
    assert any(not torch.equal(found[0], other) for other in found)


def test_layer_scale() -> None:
    model = Eve(config(layer_scale=0.1))
    for block in model.network.blocks:
        assert torch.equal(block.attention_scale, torch.full((32,), 0.1))
        assert torch.equal(block.ffn_scale, torch.full((32,), 0.1))
    with torch.no_grad():
        for block in model.network.blocks:
            block.attention_scale.zero_()
            block.ffn_scale.zero_()
    x_BTD = torch.randn(1, 5, 32)
    torch.testing.assert_close(model.network(x_BTD, 5), model.network.norm(model.network.pre_norm(x_BTD)))


def test_initial_numbers_are_cut_off() -> None:
    model = Eve(SIZES["tiny"])
    std = 0.02 * (768 / 128) ** 0.5
    for name, parameter in model.network.named_parameters():
        if name.endswith(("bias", "router.modality")):
            assert not parameter.any() or "norm" in name, name
        elif parameter.dim() > 1:
            assert parameter.abs().max() <= std, name
            assert float(parameter.detach().std()) == pytest.approx(0.54 * std, rel=0.1), (
                name
            )  # of a normal cut at one sigma


READERS: tuple[tuple[Part, ...], ...] = (
    ("pooled",),
    ("fused_image",),
    ("decoder",),
    ("pixels",),
    ("masked",),
    ("masked", "pixels"),
    ("pooled", "matching", "pixels"),
    ("embedding", "pixels"),
    ("embedding", "masked", "pixels", "pooled", "matching"),
    ("pooled", "embedding", "matching", "masked", "decoder"),
)
"""What tasks and objectives read of fused states."""


@pytest.mark.parametrize(
    "used",
    [("image",), ("text",), ("image", "decoder"), *(("image", "text", "fusion", *readers) for readers in READERS)],
    ids="-".join,
)
@pytest.mark.parametrize("kind", ["soft", "hard", "shared", "cross_attention"])
def test_what_gets_a_gradient_is_trained_and_nothing_else(used: tuple[Part, ...], kind: str) -> None:
    decoder = PixelDecoderConfig(16, layers=1, heads=2, cross_attention=kind == "cross_attention")
    deep: Any = "hard" if kind == "cross_attention" else kind
    model = eve(deep=deep, decoder_layers=1, pixel_decoder=decoder)
    reading(model, used).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.train_only(*used)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == with_gradient


def reading(model: Eve, used: tuple[Part, ...]) -> Tensor:
    """A number that depends on all that these uses read."""
    pixels, text = pair(model)
    ids_BL = torch.randint(1, 60, (2, 6))
    image = model.encode_image(pixels)
    if used == ("image",):
        return model.image_states(image).hidden_BLD.square().sum()
    if used == ("text",):
        return model.text_states(text).hidden_BLD.square().sum()
    assert model.decoder is not None
    if used == ("image", "decoder"):
        return model.decoder.logits(model.decoder(ids_BL, model.image_states(image))).square().sum()
    fused = model.fuse(image, text)
    found = []
    if "embedding" in used:
        found.append(model.embed_image(image) @ model.embed_text(text).T / model.temperature)
    if "pooled" in used:
        found.append(fused.pooled_BP)
    if "matching" in used:
        found.append(model.match_logits(fused.pooled_BP))
    if "masked" in used:
        found.append(model.masked_logits(fused.text_BLD))
    if "fused_image" in used:
        found.append(fused.states().hidden_BLD)
    if "decoder" in used:
        found.append(model.decoder.logits(model.decoder(ids_BL, fused.states())))
    if "pixels" in used:
        kept_BK = torch.tensor([[0, 5, 9], [2, 3, 11]])
        found.append(model.paint(model.fuse(model.encode_visible(pixels, kept_BK), text), kept_BK, (4, 4)))
    return torch.stack([value.square().sum() for value in found]).sum()


class Rows(nn.Module):
    """Remembers how many rows the experts of a block are given."""

    def __init__(self, model: Eve, block: int) -> None:
        super().__init__()
        ffn = model.network.blocks[block].ffn
        assert isinstance(ffn, SoftRouter)
        self.found: list[int] = []
        ffn.moe.experts.register_forward_pre_hook(lambda _, args: self.found.append(len(args[0])))


def test_who_wants_one_state_has_one_computed_by_the_last_block() -> None:
    """Of 17 patches and 6 and 4 words, with 2 experts each; unless somebody looks at the others."""
    model = eve()
    pixels, text = pair(model)
    image = model.encode_image(pixels)
    clip = model.encode_image(torch.stack([pixels, pixels.flip(0)], dim=1))
    below, last = Rows(model, -2), Rows(model, -1)

    def given(call: Callable[[], Tensor]) -> tuple[int, int]:
        below.found.clear(), last.found.clear()
        call()
        return below.found[-1], last.found[-1]

    both = 2 * (2 * 17 + 6 + 4)
    assert given(lambda: model.pool(image, text)) == (both, 4)
    assert given(lambda: model.pool(image, text, torch.tensor([1, 1]))) == (both, 4)
    assert given(lambda: model.embed_image(image)) == (2 * 2 * 17, 4)
    assert given(lambda: model.embed_image(clip)) == (2 * 4 * 17, 8)
    assert given(lambda: model.embed_text(text)) == (20, 4)
    assert given(lambda: model.fuse(image, text).pooled_BP) == (both, both)
    with record_routing(model):
        assert given(lambda: model.pool(image, text)) == (both, both)
    with record_attention(model):
        assert given(lambda: model.pool(image, text)) == (both, both)
    assert given(lambda: model.train().pool(image, text)) == (both, both)
    full = eve(moe=MoEConfig(experts=4, capacity=1.0))
    last = Rows(full, -1)
    full.pool(image, text)
    assert last.found == [both]  # tokens compete for room


@pytest.mark.parametrize("kind", ["soft", "hard", "shared"])
def test_the_state_of_one_is_that_among_all(kind: Any) -> None:
    model = eve(deep=kind)
    pixels, text = pair(model)
    image = model.encode_image(pixels)
    clip = model.encode_image(torch.stack([pixels, pixels.flip(0)], dim=1))
    padded = model.encode_image(pixels).pad(20)
    for picture in (image, clip, padded):
        expected = model.fuse(picture, text).text_BLD[:, 0]
        torch.testing.assert_close(model.pool(picture, text), expected, rtol=1e-4, atol=1e-5)
        states = model.image_states(picture).mean_frame().hidden_BLD[:, 0]
        expected = nn.functional.normalize(model.image_projection(states), dim=-1)
        torch.testing.assert_close(model.embed_image(picture), expected, rtol=1e-4, atol=1e-5)
    expected = nn.functional.normalize(model.text_projection(model.text_states(text).hidden_BLD[:, 0]), dim=-1)
    torch.testing.assert_close(model.embed_text(text), expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_can_be_added() -> None:
    model = eve()
    model.add_decoder(2)
    assert model.config.decoder_layers == 2
    assert model.decoder is not None
    assert torch.equal(model.decoder.embeddings.word.weight, model.text_embeddings.word.weight)
    with pytest.raises(ValueError, match="this eve has a decoder"):
        model.add_decoder(1)


def test_recomputing_and_compiling_together() -> None:
    """Recording what routers decide must not change what a compiled block keeps for its backward pass."""
    model = eve(layers=2, deep_layers=1, pixel_decoder=None)
    pixels, text = pair(model)

    def gradients(*, recompute: bool) -> dict[str, Tensor]:
        model.network.checkpointing = recompute
        model.zero_grad()
        with record_routing(model) as routings:
            loss = model.network(torch.cat([model.encode_image(pixels).hidden_BLD, text.hidden_BLD.detach()], 1), 17)
        balance = torch.stack([call.probability_ME.square().sum() for calls in routings.values() for call in calls])
        (loss.square().mean() + balance.mean()).backward()
        return {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}

    expected = gradients(recompute=False)
    model.network.blocks[-1].compile(dynamic=True, fullgraph=True, backend="aot_eager")
    found = gradients(recompute=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
