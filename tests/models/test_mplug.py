"""mPLUG's own facts: which fusion layers are of which kind, what they change, sizes, and the position table."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.layers import Attention, FeedForward, KeyValueCache, quick_gelu_
from triptych.models.mplug import (
    SIZES,
    AsymmetricLayer,
    CoAttentionLayer,
    ConnectedLayer,
    FusionKind,
    FusionNetwork,
    MPlug,
    MPlugConfig,
    SkipRule,
    WidthBridge,
)
from triptych.models.protocol import Encoded
from triptych.models.text import TextConfig, TextDecoder, TextEmbeddings, pad_ids
from triptych.models.vision import VisionConfig, VisionTransformer, resize_positions

VISION = VisionConfig(width=32, layers=2, heads=2, patch=8, image_size=32)
TEXT = TextConfig(vocab_size=61, width=32, heads=2, ffn=48, max_positions=24, dropout=0.0, attention_dropout=0.0)
B, N, L, D = 2, 17, 5, 32


def config(**changes: object) -> MPlugConfig:
    small = MPlugConfig(VISION, TEXT, text_layers=1, fusion_layers=6, decoder_layers=1, embed_dim=16)
    return dataclasses.replace(small, **changes)


def stir(module: nn.Module) -> nn.Module:
    """Away from the start values, where biases are 0 and norms do nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return module.eval()


def image_and_text() -> tuple[Encoded, Encoded]:
    mask_BL = torch.tensor([[True] * L, [True] * 3 + [False] * 2])
    return Encoded(torch.randn(B, N, D)), Encoded(torch.randn(B, L, D), mask_BL)


# Spec 1.6. Released: j = 0..5, connected where j != 0 and j % S == 0. Paper: i = 1..6, where i % (S + 1) == 0.
CONNECTED: list[tuple[int, SkipRule, set[int]]] = [
    (1, "released", {1, 2, 3, 4, 5}),
    (2, "released", {2, 4}),
    (3, "released", {3}),
    (6, "released", set()),
    (1, "paper", {1, 3, 5}),
    (2, "paper", {2, 5}),
    (3, "paper", {3}),
    (6, "paper", set()),
]


@pytest.mark.parametrize(("stride", "rule", "expected"), CONNECTED)
def test_connected_layers(stride: int, rule: SkipRule, expected: set[int]) -> None:
    network = FusionNetwork(config(stride=stride, skip_rule=rule))
    assert {j for j, layer in enumerate(network.layers) if isinstance(layer, ConnectedLayer)} == expected
    others = [layer for j, layer in enumerate(network.layers) if j not in expected]
    assert all(isinstance(layer, AsymmetricLayer) for layer in others)


@pytest.mark.parametrize("size", ["base", "large"])
def test_published_sizes_connect_as_released(size: str) -> None:
    expected = {"base": (False, False, False, True, False, False), "large": (False,) * 6}
    assert SIZES[size].connected() == expected[size]


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("co_attention", CoAttentionLayer), ("connected", ConnectedLayer), ("asymmetric", AsymmetricLayer)],
)
def test_kinds_the_paper_compares_with(kind: FusionKind, layer: type[nn.Module]) -> None:
    network = FusionNetwork(config(fusion=kind, stride=3))
    assert [type(part) for part in network.layers] == [layer] * 6


@pytest.mark.parametrize(
    "settings",
    [{"fusion": "asymmetric"}, {"stride": 6}, {"stride": 6, "skip_rule": "paper"}],
    ids=["asymmetric", "S=6", "S=6-paper"],
)
def test_without_connected_layer_the_image_stays_bit_identical(settings: dict[str, object]) -> None:
    network = stir(FusionNetwork(config(**settings)))
    image, text = image_and_text()
    fused = network(image, text)
    assert torch.equal(fused.image_BND, image.hidden_BLD)
    assert not torch.isclose(fused.text_BLD, text.hidden_BLD).any(-1).all()


@pytest.mark.parametrize(
    "settings",
    [{"fusion": "skip", "stride": 3}, {"fusion": "connected"}, {"fusion": "co_attention"}],
    ids=["skip", "connected", "co_attention"],
)
def test_other_kinds_change_every_image_token(settings: dict[str, object]) -> None:
    network = stir(FusionNetwork(config(**settings)))
    image, text = image_and_text()
    kept_BND = image.hidden_BLD.clone()
    fused = network(image, text)
    assert ((fused.image_BND - image.hidden_BLD).abs().amax(-1) > 1e-3).all()
    assert torch.equal(image.hidden_BLD, kept_BND), "the input was changed in place"
    assert fused.image_mask_BN is None
    assert fused.text_mask_BL is text.mask_BL
    assert torch.equal(fused.pooled_BP, fused.text_BLD[:, 0])


def test_the_text_changes_its_image_in_skip_fusion_only_from_the_connected_layer_on() -> None:
    network = stir(FusionNetwork(config(stride=3)))
    image, text = image_and_text()
    for j, layer in enumerate(network.layers):
        before_BND = image.hidden_BLD
        result = layer(image, text, None) if isinstance(layer, AsymmetricLayer) else layer(image, text)
        image, text = Encoded(result[0]), Encoded(result[1], text.mask_BL)
        assert torch.equal(image.hidden_BLD, before_BND) == (j != 3)


def reference_post_norm(block: nn.Module, x_MD: Tensor, memory_MD: Tensor | None) -> Tensor:
    """A BERT block for one row without padding, written from the equations."""

    def attend(attention: Attention, query_MD: Tensor, seen_MD: Tensor) -> Tensor:
        q, (k, v) = attention.query(query_MD), attention.key_value(seen_MD).chunk(2, -1)
        width = D // attention.heads
        heads = []
        for head in range(attention.heads):
            part = slice(head * width, (head + 1) * width)
            heads.append((q[:, part] @ k[:, part].T / width**0.5).softmax(-1) @ v[:, part])
        return attention.out(torch.cat(heads, -1))

    x_MD = block.attention_norm(x_MD + attend(block.attention, x_MD, x_MD))
    if memory_MD is not None:
        x_MD = block.cross_norm(x_MD + attend(block.cross_attention, x_MD, memory_MD))
    hidden = F.gelu(F.linear(x_MD, block.ffn.expand.weight, block.ffn.expand.bias))
    return block.ffn_norm(x_MD + F.linear(hidden, block.ffn.contract.weight, block.ffn.contract.bias))


def test_skip_fusion_follows_its_equations() -> None:
    """Asymmetric layers, one connected layer with the summed skip on the image, asymmetric layers again."""
    network = stir(FusionNetwork(config(stride=2, fusion_layers=4)))
    image, text = image_and_text()
    fused = network(image, text)
    assert text.mask_BL is not None
    for row, length in enumerate(text.mask_BL.sum(1).tolist()):
        image_ND, text_LD = image.hidden_BLD[row], text.hidden_BLD[row, :length]
        for j, layer in enumerate(network.layers):
            if j == 2:
                joint_MD = reference_post_norm(layer.block, torch.cat([image_ND, text_LD]), None)
                image_ND, text_LD = image_ND + joint_MD[:N], joint_MD[N:]
            else:
                text_LD = reference_post_norm(layer.block, text_LD, image_ND)
        torch.testing.assert_close(fused.image_BND[row], image_ND, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused.text_BLD[row, :length], text_LD, rtol=1e-4, atol=1e-5)


def test_co_attention_reads_the_other_side_before_the_layer() -> None:
    layer = stir(CoAttentionLayer(TEXT))
    image, text = Encoded(torch.randn(1, N, D)), Encoded(torch.randn(1, L, D))
    image_BND, text_BLD = layer(image, text)
    expected_ND = reference_post_norm(layer.image_block, image.hidden_BLD[0], text.hidden_BLD[0])
    torch.testing.assert_close(image_BND[0], expected_ND, rtol=1e-4, atol=1e-5)
    expected_LD = reference_post_norm(layer.text_block, text.hidden_BLD[0], image.hidden_BLD[0])
    torch.testing.assert_close(text_BLD[0], expected_LD, rtol=1e-4, atol=1e-5)


def test_summed_skip_belongs_to_skip_fusion_alone() -> None:
    summed, plain = ConnectedLayer(TEXT, summed_skip=True), ConnectedLayer(TEXT, summed_skip=False)
    stir(summed)
    plain.load_state_dict(summed.state_dict())
    image, text = image_and_text()
    with_skip, without = summed(image, text), plain.eval()(image, text)
    torch.testing.assert_close(with_skip[0], image.hidden_BLD + without[0])
    assert torch.equal(with_skip[1], without[1])
    for kind, expected in (("skip", True), ("connected", False)):
        network = FusionNetwork(config(fusion=kind, stride=1))
        flags = {layer.summed_skip for layer in network.layers if isinstance(layer, ConnectedLayer)}
        assert flags == {expected}


def test_width_bridge_exists_where_widths_differ() -> None:
    assert isinstance(MPlug(config()).bridge, nn.Identity)
    wide = stir(MPlug(config(vision=dataclasses.replace(VISION, width=48))))
    assert isinstance(wide.bridge, WidthBridge)
    assert wide.bridge.norm.eps == 1e-12
    pixels_BCHW = torch.randn(B, 3, 32, 32)
    image = wide.encode_image(pixels_BCHW)
    states_BND = wide.vision(pixels_BCHW)
    assert states_BND.shape == (B, N, 48)
    norm = wide.bridge.norm
    expected_BND = F.layer_norm(wide.bridge.linear(states_BND), (D,), norm.weight, norm.bias, eps=1e-12)
    torch.testing.assert_close(image.hidden_BLD, expected_BND)
    fused = wide.fuse(image, wide.encode_text(torch.ones(B, L, dtype=torch.long)))
    assert fused.image_BND.shape == (B, N, D)


def parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def used_by_vqa(model: MPlug) -> int:
    """What spec 1.11 counts as used by a forward pass of VQA: no projections, no MLM head."""
    return parameters(model.vision, model.bridge, model.text, model.fusion, model.decoder)


@pytest.fixture(scope="module")
def published() -> dict[str, MPlug]:
    with torch.device("meta"):
        return {size: MPlug(SIZES[size]) for size in ("base", "large")}


def test_large_has_the_published_number_of_parameters(published: dict[str, MPlug]) -> None:
    assert round(used_by_vqa(published["large"]) / 1e6, 1) == 564.9


def test_base_has_the_published_number_of_parameters(published: dict[str, MPlug]) -> None:
    """The spec's 346.8 M counts the connected layer's cross-attention, which no forward pass touches (spec 1.6)."""
    ours = used_by_vqa(published["base"])
    assert round(ours / 1e6, 1) == 344.4
    first = published["base"].fusion.layers[0]
    assert isinstance(first, AsymmetricLayer)
    assert first.block.cross_attention is not None
    assert first.block.cross_norm is not None
    unused_cross = parameters(first.block.cross_attention, first.block.cross_norm)
    assert unused_cross == 4 * (768 * 768 + 768) + 2 * 768
    second_segments = 2 * 768  # text encoder and decoder each have a row for a second segment that is never used
    assert round((ours + unused_cross + second_segments) / 1e6, 1) == 346.8


@pytest.mark.parametrize(
    ("size", "part", "millions", "not_ours"),
    [
        ("base", "vision", 86.24, 768 * 512),  # the official count has CLIP's unused projection
        ("large", "vision", 303.97, 1024 * 768),
        ("base", "text", 66.36, 768),  # and a second segment
        ("base", "decoder", 137.88, 768),
        ("large", "bridge", 0.79, 0),
    ],
)
def test_parts_have_the_published_number_of_parameters(
    size: str, part: str, millions: float, not_ours: int, published: dict[str, MPlug]
) -> None:
    assert round((parameters(published[size].get_submodule(part)) + not_ours) / 1e6, 2) == millions


def test_word_table_and_decoder_head_are_tied(published: dict[str, MPlug]) -> None:
    tables = [name for name, p in published["base"].named_parameters() if p.shape == (30522, 768)]
    assert tables == ["text.embeddings.word.weight", "decoder.embeddings.word.weight", "masked_head.word.weight"]


def interpolate_by_hand(table_ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear, pixel centres at half, borders repeated: every output is a mean of four inputs."""
    old = round((len(table_ND) - 1) ** 0.5)
    image_HWD = table_ND[1:].view(old, old, -1)
    rows = [table_ND[0]]
    for y in range(grid[0]):
        for x in range(grid[1]):
            v = min(max((y + 0.5) * old / grid[0] - 0.5, 0.0), old - 1.0)
            u = min(max((x + 0.5) * old / grid[1] - 0.5, 0.0), old - 1.0)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, old - 1), min(left + 1, old - 1)
            upper = (1 - (u - left)) * image_HWD[top, left] + (u - left) * image_HWD[top, right]
            lower = (1 - (u - left)) * image_HWD[bottom, left] + (u - left) * image_HWD[bottom, right]
            rows.append((1 - (v - top)) * upper + (v - top) * lower)
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [(2, 2), (6, 6), (3, 7), (5, 2), (4, 8), (1, 1)])
def test_positions_are_interpolated_bilinearly(grid: tuple[int, int]) -> None:
    table_ND = torch.randn(17, 6)
    found_ND = resize_positions(table_ND, grid)
    assert found_ND.shape == (grid[0] * grid[1] + 1, 6)
    assert torch.equal(found_ND[0], table_ND[0])
    torch.testing.assert_close(found_ND, interpolate_by_hand(table_ND, grid))
    image_1DHW = table_ND[1:].T.reshape(1, 6, 4, 4)
    expected_1DHW = F.interpolate(image_1DHW, grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found_ND[1:], expected_1DHW[0].flatten(1).T)


def test_positions_of_the_own_grid_are_the_table() -> None:
    table_ND = torch.randn(17, 6)
    assert resize_positions(table_ND, (4, 4)) is table_ND
    assert resize_positions(table_ND.bfloat16(), (3, 3)).dtype == torch.bfloat16
    bicubic_ND = resize_positions(table_ND, (3, 5), mode="bicubic")
    assert (bicubic_ND - resize_positions(table_ND, (3, 5))).abs().max() > 1e-3
    with pytest.raises(ValueError, match="a position table of 16 rows is not a class token and a square grid"):
        resize_positions(torch.randn(16, 6), (3, 3))


def test_interpolated_table_in_the_model_equals_running_with_that_table() -> None:
    torch.manual_seed(2)
    vision = stir(VisionTransformer(VISION))
    other = VisionTransformer(dataclasses.replace(VISION, image_size=48)).eval()
    state = dict(vision.state_dict())
    state["position_embedding"] = resize_positions(state["position_embedding"], (6, 6))
    other.load_state_dict(state)
    pixels_BCHW = torch.randn(B, 3, 48, 48)
    torch.testing.assert_close(vision(pixels_BCHW), other(pixels_BCHW))


def test_oblong_images_get_the_positions_of_their_own_grid() -> None:
    vision = stir(VisionTransformer(VISION))
    pixels_BCHW = torch.randn(B, 3, 16, 48)
    patches_BND = vision.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
    x_BND = torch.cat([vision.class_embedding.expand(B, 1, D), patches_BND], dim=1)
    x_BND = vision.pre_norm(x_BND + interpolate_by_hand(vision.position_embedding, (2, 6)))
    for block in vision.blocks:
        x_BND = block(x_BND)
    torch.testing.assert_close(vision(pixels_BCHW), vision.post_norm(x_BND), rtol=1e-4, atol=1e-5)


def test_resizing_once_equals_interpolating_every_time() -> None:
    model = stir(MPlug(config()))
    assert isinstance(model, MPlug)
    pixels_BCHW = torch.randn(B, 3, 48, 48)
    expected_BND = model.encode_image(pixels_BCHW).hidden_BLD
    model.resize_images(48)
    assert model.config.vision.image_size == model.vision.config.image_size == 48
    assert model.vision.position_embedding.shape == (37, D)
    assert model.vision.position_embedding.requires_grad
    torch.testing.assert_close(model.encode_image(pixels_BCHW).hidden_BLD, expected_BND)
    other = MPlug(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.encode_image(pixels_BCHW).hidden_BLD, expected_BND)
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of patch 8"):
        model.resize_images(50)


def test_position_table_starts_from_clips_distribution_not_from_zero() -> None:
    """The released code starts pre-training from a table of zeros (spec 1.3)."""
    table_ND = VisionTransformer(dataclasses.replace(VISION, image_size=128)).position_embedding
    assert abs(table_ND.std().item() * 32**0.5 - 1) < 0.1


def test_patches_are_read_in_rows() -> None:
    vision = VisionTransformer(VISION)
    pixels_BCHW = torch.randn(1, 3, 16, 24)
    found_ND = vision.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)[0]
    kernel_DX = vision.patch_embedding.weight.flatten(1)
    expected = [
        kernel_DX @ pixels_BCHW[0, :, y : y + 8, x : x + 8].flatten() for y in range(0, 16, 8) for x in range(0, 24, 8)
    ]
    torch.testing.assert_close(found_ND, torch.stack(expected))


def test_quick_gelu() -> None:
    x = torch.linspace(-6, 6, 50)
    torch.testing.assert_close(quick_gelu_(x.clone()), x * torch.sigmoid(1.702 * x))


def test_overwriting_activations_leave_the_gradients_of_the_formula() -> None:
    """Of the input and of both layers; without gradients the values are the same, and the input stays as it was."""
    ffn, x_BLD = FeedForward(4, 6, "quick_gelu").double(), torch.randn(2, 3, 4, dtype=torch.double)
    given_BLD = x_BLD.clone().requires_grad_()
    parts = [given_BLD, *ffn.parameters()]
    found = torch.autograd.grad(ffn(given_BLD).square().sum(), parts)
    hidden_BLF = ffn.expand(given_BLD)
    expected_BLD = ffn.contract(hidden_BLF * torch.sigmoid(1.702 * hidden_BLF))
    expected = torch.autograd.grad(expected_BLD.square().sum(), parts)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(ffn(x_BLD), expected_BLD)
    assert torch.equal(given_BLD, x_BLD)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MPlug(config(text=dataclasses.replace(TEXT, heads=5))), "width 32 is not divisible by its 5 heads"),
        (lambda: MPlug(config(vision=dataclasses.replace(VISION, heads=3))), "32 is not divisible by its 3 heads"),
        (lambda: dataclasses.replace(VISION, image_size=30), "image_size 30 is not a multiple of patch 8"),
        (lambda: config(stride=0), "stride must be at least 1, not 0"),
        (lambda: config(fusion="skipped"), "fusion must be one of .*asymmetric.*, not 'skipped'"),
        (lambda: config(skip_rule="code"), "skip_rule must be one of released, paper, not 'code'"),
    ],
)
def test_impossible_sizes_are_refused(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=message):
        wrong()


def test_decoder_without_a_cache_equals_one_with_it_whatever_the_pieces() -> None:
    decoder = stir(TextDecoder(TEXT, 2))
    memory = Encoded(torch.randn(B, N, D), torch.rand(B, N) < 0.7)
    ids_BL = torch.randint(0, 61, (B, 9))
    expected_BLV = decoder.logits(decoder(ids_BL, memory))
    for pieces in ([9], [1] * 9, [4, 1, 3, 1], [2, 7]):
        state, end = decoder.start(memory, capacity=9), 0
        for piece in pieces:
            found_BV = decoder.step(ids_BL[:, end : end + piece], state)
            end += piece
            assert state.length == end
            torch.testing.assert_close(found_BV, expected_BLV[:, end - 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cache holds 9 positions, 10 were asked for"):
        decoder.step(ids_BL[:, :1], state)


def test_a_causal_text_never_looks_ahead() -> None:
    decoder = stir(TextDecoder(TEXT, 2))
    memory = Encoded(torch.randn(1, N, D))
    ids_BL = torch.randint(0, 61, (1, 8))
    changed_BL = ids_BL.clone()
    changed_BL[:, 5] = (ids_BL[:, 5] + 1) % 61
    before_BLD, after_BLD = decoder(ids_BL, memory), decoder(changed_BL, memory)
    assert torch.equal(before_BLD[:, :5], after_BLD[:, :5])
    assert ((before_BLD - after_BLD)[:, 5:].abs().amax(-1) > 1e-4).all()


def test_cache_keeps_rows_in_the_asked_order() -> None:
    cache = KeyValueCache(4)
    cache.select(torch.tensor([0]))
    cache.append(torch.arange(3.0).view(3, 1, 1).expand(3, 1, 10))
    cache.select(torch.tensor([2, 2, 0, 1]))
    assert cache.append(torch.full((4, 1, 10), 9.0))[:, :, 0].tolist() == [[2, 9], [2, 9], [0, 9], [1, 9]]
    cache.select(torch.tensor([3, 2, 1, 0]))
    assert cache.append(torch.full((4, 1, 10), 8.0))[:, :, 9].tolist() == [[1, 9, 8], [0, 9, 8], [2, 9, 8], [2, 9, 8]]
    assert cache.length == 3


def test_position_of_the_first_id_can_be_given() -> None:
    embeddings = TextEmbeddings(TEXT).eval()
    ids_BL = torch.randint(0, 61, (B, 6))
    assert torch.equal(embeddings(ids_BL)[:, 4:], embeddings(ids_BL[:, 4:], start=4))
    with pytest.raises(ValueError, match="a text of 26 tokens is longer than the 24 positions"):
        embeddings(ids_BL, start=20)


def test_pad_ids() -> None:
    assert pad_ids([[5], [6, 7, 8], []], pad=0).tolist() == [[5, 0, 0], [6, 7, 8], [0, 0, 0]]


def test_stacking_and_joining_keep_masks() -> None:
    image, text = image_and_text()
    assert Encoded.stack([image, image]).mask_BL is None
    stacked = Encoded.stack([image, text])
    assert stacked.hidden_BLD.shape == (2 * B, N, D)
    assert stacked.real_BL().sum(1).tolist() == [N, N, L, 3]
    assert torch.equal(stacked.hidden_BLD[B:, :L], text.hidden_BLD)
    joined = Encoded.join(text, image)
    assert joined.real_BL().sum(1).tolist() == [L + N, 3 + N]
    assert torch.equal(joined.hidden_BLD[:, L:], image.hidden_BLD)
    assert Encoded.join(image, image).mask_BL is None
    levels = Encoded(text.hidden_BLD, text.mask_BL, (text.hidden_BLD, 2 * text.hidden_BLD)).pad(L + 2)
    assert [level.shape for level in levels.levels] == [(B, L + 2, D)] * 2
    assert not levels.real_BL()[:, L:].any()
    moved = levels.rows(torch.tensor([1, 1, 0])).to(torch.bfloat16)
    assert {x.dtype for x in (moved.hidden_BLD, *moved.levels)} == {torch.bfloat16}
    assert moved.real_BL().dtype == torch.bool
    assert moved.real_BL().sum(1).tolist() == [3, 3, 5]
