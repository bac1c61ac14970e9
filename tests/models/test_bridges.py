"""BridgeTower's bridges, what feeds which layer, METER as the case without bridges, and what is computed once.

Shape legend: B batch, T tokens, N image tokens, L text tokens, D width, H heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.bridgetower import BRIDGES, SIZES, BridgeTower, BridgeTowerConfig
from triptych.models.text import TextConfig, TextDecoder
from triptych.models.vision import VisionConfig

D, B, T = 32, 2, 5
VISION = VisionConfig(D, layers=4, heads=2, patch=8, image_size=16, interpolation="bicubic")
TEXT = TextConfig(61, D, 2, 48, 26, layer_norm_eps=1e-5, dropout=0.0, attention_dropout=0.0, first_position=2)


def build(**sizes: Any) -> BridgeTower:
    torch.manual_seed(0)
    values: dict[str, Any] = {"text_layers": 4, "fusion_layers": 3, "embed_dim": 16, **sizes}
    model = BridgeTower(BridgeTowerConfig(VISION, TEXT, **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask_BL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return torch.randn(B, 3, 16, 16), torch.randint(3, 61, (B, T)), mask_BL


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- definitions --------------------------------------------------------------------------------------------------

FORMULAS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda b, x, y, mask: x + y,
    "multiply": lambda b, x, y, mask: x * y,
    "weighted": lambda b, x, y, mask: b.share * x + (1 - b.share) * y,
    "gated": lambda b, x, y, mask: torch.lerp(y, x, b.both(torch.cat([x, y], 2)).sigmoid()),
    "linear": lambda b, x, y, mask: x @ b.both.weight[:, :D].T + y @ b.both.weight[:, D:].T + b.both.bias,
    "mlp": lambda b, x, y, mask: b.contract(F.gelu(b.expand(torch.cat([x, y], 2)))),
    "attention": lambda b, x, y, mask: attend(b.attention, x, y, mask),
    "attention_ffn": lambda b, x, y, mask: b.ffn.contract(F.gelu(b.ffn.expand(attend(b.attention, x, y, mask)))),
    "residual": lambda b, x, y, mask: x + y + b.both(torch.cat([x, y], 2)),
    "scaled_add": lambda b, x, y, mask: b.scale * y + x,
    "interpolate": lambda b, x, y, mask: (1 - b.share) * y + b.share * x,
}


def attend(module: Any, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Multi-head attention, a head at a time."""
    width = D // module.heads
    keys_BTD, values_BTD = module.key_value(y_BTD).split(D, dim=2)
    heads = []
    for head in range(module.heads):
        own = slice(head * width, (head + 1) * width)
        scores_BTT = module.query(x_BTD)[..., own] @ keys_BTD[..., own].mT / width**0.5
        scores_BTT = scores_BTT.masked_fill(~mask_BT[:, None], -torch.inf)
        heads.append(scores_BTT.softmax(-1) @ values_BTD[..., own])
    return module.out(torch.cat(heads, 2))


@pytest.mark.parametrize("kind", BRIDGES)
def test_every_bridge_is_its_definition_and_a_norm(kind: Any) -> None:
    torch.manual_seed(2)
    bridge = BRIDGES[kind](TEXT).eval()
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.normal_(std=0.5)
    x_BTD, y_BTD = torch.randn(2, B, T, D)
    mask_BT = inputs()[2]
    expected_BTD = F.layer_norm(
        FORMULAS[kind](bridge, x_BTD, y_BTD, mask_BT), (D,), bridge.norm.weight, bridge.norm.bias, eps=1e-5
    )
    torch.testing.assert_close(bridge(x_BTD, y_BTD, mask_BT), expected_BTD, rtol=1e-5, atol=1e-5)


def test_bridges_of_a_new_network_start_as_published_or_as_addition() -> None:
    x_BTD, y_BTD = torch.randn(2, B, T, D)
    starts = {
        "residual": x_BTD + y_BTD,
        "scaled_add": x_BTD + y_BTD,
        "weighted": (x_BTD + y_BTD) / 2,
        "interpolate": (x_BTD + y_BTD) / 2,
    }
    for kind, expected_BTD in starts.items():
        model = BridgeTower(BridgeTowerConfig(VISION, TEXT, 4, 3, bridge=kind))  # type: ignore[arg-type]
        found_BTD = model.fusion.image_bridges[0].join(x_BTD, y_BTD, None)  # type: ignore[operator]
        torch.testing.assert_close(found_BTD, expected_BTD)


@pytest.mark.parametrize(
    ("kind", "millions"),
    [
        ("add", 0.0184),
        ("multiply", 0.0184),
        ("weighted", 0.0260),
        ("gated", 11.8),
        ("linear", 11.8),
        ("mlp", 35.4),
        ("attention", 23.6),
        ("attention_ffn", 70.8),
        ("residual", 11.8),
    ],
)
def test_bridges_add_as_many_parameters_as_the_paper_counts(kind: Any, millions: float) -> None:
    """To METER-base (table of bridge definitions), which leaves out biases and cuts decimals."""
    with torch.device("meta"):
        meter = BridgeTower(dataclasses.replace(SIZES["base"], bridged_layers=0))
        bridged = BridgeTower(dataclasses.replace(SIZES["base"], bridge=kind))
    assert (count(bridged) - count(meter)) / 1e6 == pytest.approx(millions, rel=1 / 200)


# --- what feeds what ----------------------------------------------------------------------------------------------


def test_each_layer_is_fed_by_the_level_that_belongs_to_it() -> None:
    """Written out as the paper does, section 3.3; each side reads what the other was before the layer."""
    model = build()
    pixels_BCHW, ids_BL, mask_BL = inputs()
    fused = model.fuse(model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL))
    image_levels, text_levels = model.vision.levels(pixels_BCHW, 3), model.text.levels(ids_BL, mask_BL, 3)
    fusion = model.fusion

    def projected(side: Any, level_BTD: Tensor) -> Tensor:
        return F.linear(level_BTD, side.linear.weight, side.linear.bias) + side.token_type

    y_BND = fusion.image_norm(projected(model.image_projection, image_levels[0]))
    x_BLD = fusion.text_norm(projected(model.text_projection, text_levels[0]))
    for number, layer in enumerate(fusion.layers):
        if number:
            own_BND = projected(model.image_projection, image_levels[number])
            own_BLD = projected(model.text_projection, text_levels[number])
            y_BND = fusion.image_bridges[number - 1].norm(y_BND + own_BND)
            x_BLD = fusion.text_bridges[number - 1].norm(x_BLD + own_BLD)
        y_BND, x_BLD = (
            layer.image_block(y_BND, None, x_BLD, mask_BL),
            layer.text_block(x_BLD, mask_BL, y_BND),
        )
    torch.testing.assert_close(fused.image_BND, y_BND)
    torch.testing.assert_close(fused.text_BLD, x_BLD)
    pooled_BP = torch.cat(
        [model.text_pooler.linear(x_BLD[:, 0]).tanh(), model.image_pooler.linear(y_BND[:, 0]).tanh()], 1
    )
    torch.testing.assert_close(fused.pooled_BP, pooled_BP)


def test_levels_are_normalised_but_the_stream_is_not() -> None:
    vision = build().vision
    pixels_BCHW = inputs()[0]
    raw: list[Tensor] = []
    for block in vision.blocks:
        block.register_forward_hook(lambda module, given, out: raw.append(out))
    levels = vision.levels(pixels_BCHW, 3)
    assert len(raw) == 4
    for level_BND, raw_BND in zip(levels, raw[1:], strict=True):
        torch.testing.assert_close(level_BND, vision.post_norm(raw_BND))
    torch.testing.assert_close(vision(pixels_BCHW), levels[-1])


@pytest.mark.parametrize(("bridged", "levels"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_fewer_bridges_read_fewer_levels(bridged: int, levels: int) -> None:
    model = build(bridged_layers=bridged)
    pixels_BCHW, ids_BL, mask_BL = inputs()
    image, text = model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL)
    assert len(image.levels) == len(text.levels) == levels
    assert len(model.fusion.image_bridges) == max(0, bridged - 1)
    assert isinstance(model.fusion.image_norm, nn.LayerNorm if bridged else nn.Identity)


def test_meter_with_its_fusion_of_layers() -> None:
    """The topmost state and a sum of those below, whose shares a linear layer decides for each number of a state."""
    model = build(bridged_layers=0, gather_layers=True)
    pixels_BCHW = inputs()[0]
    *below, top_BND = model.vision.levels(pixels_BCHW, 4)
    side = model.image_projection
    assert side.gate is not None
    weights = [side.gate(level_BND).exp() for level_BND in below]
    gathered_BND = top_BND + sum(w * level_BND for w, level_BND in zip(weights, below, strict=True)) / sum(weights)
    (found_BND,) = model.encode_image(pixels_BCHW).levels
    torch.testing.assert_close(found_BND, side.linear(gathered_BND) + side.token_type)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"bridge": "sum"}, "bridge must be one of add, .*not 'sum'"),
        ({"contrast": "both"}, "contrast must be one of encoders, projected, not 'both'"),
        ({"fusion_layers": 5}, "5 bridged layers need as many cross-modal layers .* there are 5, 4 and 4"),
        ({"bridged_layers": 4}, "4 bridged layers"),
        ({"fusion_layers": 0}, "fusion_layers must be at least 1"),
        ({"gather_layers": True}, "gather_layers is for a network without bridges"),
        ({"text": dataclasses.replace(TEXT, width=64)}, "both encoders need one width, not 32 and 64"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"text": TEXT, "text_layers": 4, "fusion_layers": 3, **sizes}
    with pytest.raises(ValueError, match=message):
        BridgeTowerConfig(VISION, **values)


def test_more_layers_than_the_encoders_have_can_be_external() -> None:
    model = build(fusion_layers=6, bridged_layers=4)
    pixels_BCHW, ids_BL, mask_BL = inputs()
    assert model.fuse(model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL)).pooled_BP.shape == (B, 2 * D)


# --- what is computed once, or not at all ---------------------------------------------------------------------------


def test_the_pooled_state_alone_is_that_of_fusing() -> None:
    model = build()
    pixels_BCHW, ids_BL, mask_BL = inputs()
    image, text, rows_B = model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL), torch.tensor([1, 1])
    torch.testing.assert_close(model.pool(image, text, rows_B), model.fuse(image, text, rows_B).pooled_BP)
    tokens: list[int] = []
    model.fusion.layers[-1].image_block.ffn.register_forward_hook(lambda m, given, out: tokens.append(out.shape[1]))
    model.pool(image, text, rows_B)
    assert tokens == [1]


def test_the_text_states_alone_are_those_of_fusing() -> None:
    model = build()
    pixels_BCHW, ids_BL, mask_BL = inputs()
    image, text, rows_B = model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL), torch.tensor([1, 1])
    expected_BLD = model.fuse(image, text, rows_B).text_BLD
    ran: list[int] = []
    model.fusion.layers[-1].image_block.ffn.register_forward_hook(lambda m, given, out: ran.append(1))
    torch.testing.assert_close(model.fuse_text(image, text, rows_B), expected_BLD)
    assert not ran


def test_the_lowest_layer_looks_at_each_image_once() -> None:
    model = build()
    pixels_BCHW, ids_BL, mask_BL = inputs()
    image, text = model.encode_image(pixels_BCHW[:1]), model.encode_text(ids_BL, mask_BL)
    rows: list[int] = []
    for layer in model.fusion.layers:
        layer.image_block.attention.register_forward_hook(lambda m, given, out: rows.append(len(out)))
    model.fuse(image, text, torch.tensor([0, 0]))
    assert rows == [1, 2, 2]


def test_padding_of_a_text_has_one_position() -> None:
    """RoBERTa's: that before the first token's."""
    embeddings = build().text.embeddings
    ids_BL, mask_BL = inputs()[1:]
    table_PD, word_BLD = embeddings.position.weight, embeddings.word(ids_BL)
    positions_BL = torch.tensor([[2, 3, 4, 5, 6], [2, 3, 4, 1, 1]])
    expected_BLD = embeddings.norm(word_BLD + table_PD[positions_BL] + embeddings.segment)
    torch.testing.assert_close(embeddings(ids_BL, mask_BL=mask_BL), expected_BLD)


def test_a_decoder_can_be_added_and_starts_from_the_text_encoder() -> None:
    model = build()
    assert model.decoder is None
    model.add_decoder(5)
    decoder: TextDecoder = model.decoder
    assert model.config.decoder_layers == len(decoder.blocks) == 5
    for own, block in zip(decoder.blocks, model.text.blocks, strict=False):
        torch.testing.assert_close(own.ffn.expand.weight, block.ffn.expand.weight)
    torch.testing.assert_close(decoder.embeddings.word.weight, model.text.embeddings.word.weight)
    assert decoder.embeddings.word.weight is not model.text.embeddings.word.weight
    with pytest.raises(ValueError, match="has a decoder"):
        model.add_decoder(5)


def test_pairs_are_embedded_where_the_network_has_a_head_for_them() -> None:
    model = build(contrast="projected")
    pooled_BP = torch.randn(B, 2 * D)
    torch.testing.assert_close(model.embed_pair(pooled_BP).norm(dim=1), torch.ones(B))
    with pytest.raises(ValueError, match="embeds no pairs"):
        build().embed_pair(pooled_BP)


def test_the_image_is_embedded_after_the_projection_where_published_so() -> None:
    for contrast in ("encoders", "projected"):
        model = build(contrast=contrast)
        image = model.encode_image(inputs()[0])
        state_BD = image.hidden_BLD[:, 0] if contrast == "encoders" else image.levels[-1][:, 0]
        torch.testing.assert_close(model.embed_image(image), F.normalize(model.image_embedding(state_BD), dim=1))
