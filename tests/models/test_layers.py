"""The one attention module against PyTorch's own, and the blocks built of it.

Shape legend: B batch, L query length, M memory length, D width, H heads.
"""

import pytest
import torch
from torch import Tensor, nn

from triptych.models.layers import (
    Attention,
    KeyValueCache,
    PostNormBlock,
    PreNormBlock,
    init_weights,
    record_attention,
)
from triptych.models.protocol import Encoded

B, L, M, D, H = 3, 4, 6, 16, 2


def torch_attention(ours: Attention, memory_width: int) -> nn.MultiheadAttention:
    """PyTorch's module with the same weights."""
    theirs = nn.MultiheadAttention(D, H, batch_first=True, kdim=memory_width, vdim=memory_width)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        key, value = ours.key_value.weight.chunk(2)
        if theirs.in_proj_weight is None:
            theirs.q_proj_weight.copy_(ours.query.weight)
            theirs.k_proj_weight.copy_(key)
            theirs.v_proj_weight.copy_(value)
        else:
            theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, key, value]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    return theirs


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_equals_pytorchs(explicit: bool, causal: bool, masked: bool) -> None:
    ours = Attention(D, H)
    ours.explicit = explicit
    theirs = torch_attention(ours, D)
    x_BLD = torch.randn(B, L, D)
    mask_BL = torch.arange(L) < torch.tensor([4, 2, 1])[:, None] if masked else None
    expected_BLD, maps_BHLM = theirs(
        x_BLD,
        x_BLD,
        x_BLD,
        key_padding_mask=None if mask_BL is None else ~mask_BL,
        attn_mask=torch.ones(L, L, dtype=torch.bool).triu(1) if causal else None,
        average_attn_weights=False,
    )
    torch.testing.assert_close(ours(x_BLD, mask=mask_BL, causal=causal), expected_BLD, rtol=1e-4, atol=1e-5)
    if explicit:
        assert ours.probabilities_BHLM is not None
        torch.testing.assert_close(ours.probabilities_BHLM, maps_BHLM, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("memory_width", [D, 10])
def test_cross_attention_equals_pytorchs(explicit: bool, remembered: bool, memory_width: int) -> None:
    ours = Attention(D, H, memory_width=memory_width)
    ours.explicit = explicit
    theirs = torch_attention(ours, memory_width)
    x_BLD, memory_BMD = torch.randn(B, L, D), torch.randn(B, M, memory_width)
    mask_BM = torch.arange(M) < torch.tensor([6, 3, 1])[:, None]
    expected_BLD, _ = theirs(x_BLD, memory_BMD, memory_BMD, key_padding_mask=~mask_BM)
    found_BLD = ours(x_BLD, ours.remember(memory_BMD, mask_BM)) if remembered else ours(x_BLD, memory_BMD, mask=mask_BM)
    torch.testing.assert_close(found_BLD, expected_BLD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
def test_neighbouring_rows_share_a_memory(explicit: bool) -> None:
    """Beams: rows 0, 1 read memory 0, rows 2, 3 memory 1, and so on."""
    attention = Attention(D, H)
    attention.explicit = explicit
    x_RLD, memory_BMD = torch.randn(2 * B, L, D), torch.randn(B, M, D)
    mask_BM = torch.arange(M) < torch.tensor([6, 3, 1])[:, None]
    copies = torch.arange(B).repeat_interleave(2)
    expected_RLD = attention(x_RLD, memory_BMD[copies], mask=mask_BM[copies])
    torch.testing.assert_close(attention(x_RLD, attention.remember(memory_BMD, mask_BM)), expected_RLD)


def test_a_mask_can_be_of_any_shape_that_broadcasts() -> None:
    attention = Attention(D, H)
    x_BLD, mask_BHLM = torch.randn(B, L, D), torch.rand(B, H, L, L) < 0.5
    mask_BHLM |= torch.eye(L, dtype=torch.bool)
    expected_BLD = attention(x_BLD, mask=mask_BHLM)
    attention.explicit = True
    torch.testing.assert_close(attention(x_BLD, mask=mask_BHLM), expected_BLD)
    assert attention.probabilities_BHLM is not None
    assert not attention.probabilities_BHLM[~mask_BHLM].any()


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_without_real_tokens_is_harmless(causal: bool) -> None:
    """Values and gradients are finite, and those of the other rows the same for both ways of computing."""
    attention = Attention(D, H)
    found = []
    for explicit in (False, True):
        attention.explicit = explicit
        torch.manual_seed(1)
        x_BLD = torch.randn(B, L, D, requires_grad=True)
        mask_BL = torch.arange(L) < torch.tensor([4, 2, 0])[:, None]
        out_BLD = attention(x_BLD, mask=mask_BL, causal=causal)
        (grad_BLD,) = torch.autograd.grad(out_BLD.square().sum(), x_BLD)
        assert out_BLD.isfinite().all()
        assert grad_BLD.isfinite().all()
        found.append((out_BLD[:2], grad_BLD[:2]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
def test_dropout_acts_in_training_only_and_keeps_the_mean(explicit: bool) -> None:
    attention = Attention(D, H, dropout=0.5)
    attention.explicit = explicit
    x_BLD = torch.randn(1, 1, D).expand(1, 200, D)  # all keys alike: dropout changes the sum of probabilities alone
    calm_BLD = attention.eval()(x_BLD)
    assert torch.equal(attention(x_BLD), calm_BLD)
    attention.train()
    mean_BLD = torch.stack([attention(x_BLD) for _ in range(50)]).mean((0, 2))
    assert (attention(x_BLD) != calm_BLD).any()
    torch.testing.assert_close(mean_BLD[0], calm_BLD[0, 0], rtol=0.05, atol=0.02)


def test_pre_norm_block() -> None:
    block = PreNormBlock(D, H, 24, activation="quick_gelu", eps=1e-5, dropout=0.0)
    x_BLD = torch.randn(B, L, D)
    y_BLD = x_BLD + block.attention(block.attention_norm(x_BLD))
    hidden = block.ffn.expand(block.ffn_norm(y_BLD))
    expected_BLD = y_BLD + block.ffn.contract(hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(block(x_BLD), expected_BLD)


def test_post_norm_block_equals_pytorchs_decoder_layer() -> None:
    block = PostNormBlock(D, H, 24, eps=1e-5, dropout=0.0, attention_dropout=0.0, cross=True)
    theirs = nn.TransformerDecoderLayer(D, H, 24, dropout=0.0, activation="gelu", batch_first=True)
    assert block.cross_attention is not None
    theirs.self_attn, theirs.multihead_attn = (
        torch_attention(block.attention, D),
        torch_attention(block.cross_attention, D),
    )
    theirs.linear1, theirs.linear2 = block.ffn.expand, block.ffn.contract
    x_BLD, memory_BMD = torch.randn(B, L, D), torch.randn(B, M, D)
    mask_BM = torch.arange(M) < torch.tensor([6, 3, 1])[:, None]
    ahead_LL = torch.ones(L, L, dtype=torch.bool).triu(1)
    expected_BLD = theirs(x_BLD, memory_BMD, tgt_mask=ahead_LL, memory_key_padding_mask=~mask_BM)
    found_BLD = block(x_BLD, None, memory_BMD, mask_BM, causal=True)
    torch.testing.assert_close(found_BLD, expected_BLD, rtol=1e-4, atol=1e-5)


def test_a_block_without_cross_attention_remembers_nothing() -> None:
    block = PostNormBlock(D, H, 24, eps=1e-5, dropout=0.0, attention_dropout=0.0)
    with pytest.raises(ValueError, match="no cross-attention"):
        block.remember(Encoded(torch.randn(B, M, D)))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 16 is not divisible by its 3 heads"):
        Attention(16, 3)


def spread(x: Tensor) -> float:
    return float(x.detach().std())


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (192, 0.04)])
def test_initialisation(width: int, std: float) -> None:
    module = nn.Sequential(nn.Linear(200, 200), nn.Embedding(200, 200), nn.LayerNorm(200), nn.Conv2d(3, 200, 8))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9.0)
    init_weights(module, width)
    linear, embedding, norm, convolution = module
    for part in (linear, embedding, convolution):
        assert abs(spread(part.weight) / std - 1) < 0.05
    assert not linear.bias.any()
    assert not convolution.bias.any()
    assert (norm.weight == 1).all()
    assert not norm.bias.any()


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_without_keys_and_values(masked: bool) -> None:
    """The same result and gradients, up to the order of the products."""
    torch.manual_seed(0)
    module = Attention(16, heads=4, memory_width=24).double()
    nn.init.normal_(module.key_value.bias)
    x_B1D = torch.randn(3, 1, 16, dtype=torch.double, requires_grad=True)
    memory_BMD = torch.randn(3, 7, 24, dtype=torch.double, requires_grad=True)
    mask_BM = torch.arange(7) < torch.tensor([7, 4, 1])[:, None] if masked else None
    expected_B1D, found_B1D = module(x_B1D, memory_BMD, mask_BM), module.first(x_B1D, memory_BMD, mask_BM)
    torch.testing.assert_close(found_B1D, expected_B1D)
    leaves = [x_B1D, memory_BMD, *module.parameters()]
    for found, expected in zip(
        torch.autograd.grad(found_B1D.square().sum(), leaves),
        torch.autograd.grad(expected_B1D.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("memory_width", [D, 10])
def test_keys_without_a_bias_are_keys_with_a_bias_of_zero(explicit: bool, memory_width: int) -> None:
    """In every way to call it; values have their own bias, which gets the gradient that it would have there."""
    plain, bare = Attention(D, H, memory_width=memory_width), Attention(D, H, memory_width=memory_width, key_bias=False)
    assert "key_value.bias" not in dict(bare.named_parameters())
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.normal_()
        same = {name: value for name, value in bare.state_dict().items() if name != "value_bias"}
        assert bare.value_bias is not None
        plain.load_state_dict({**same, "key_value.bias": torch.cat([torch.zeros(D), bare.value_bias])})
    x_BLD, memory_BMD = torch.randn(B, L, D), torch.randn(B, M, memory_width)
    mask_BM = torch.arange(M) < torch.tensor([6, 3, 1])[:, None]

    def found(module: Attention) -> list[Tensor]:
        module.explicit = explicit
        outs = [
            module(x_BLD, memory_BMD, mask_BM),
            module(x_BLD, module.remember(memory_BMD, mask_BM)),
            module.first(x_BLD[:, :1], memory_BMD, mask_BM),
        ]
        if memory_width == D:
            outs.append(module(x_BLD, causal=True, cache=KeyValueCache(L)))
        bias = module.key_value.bias if module.value_bias is None else module.value_bias
        (grad,) = torch.autograd.grad(torch.stack([out.square().sum() for out in outs]).sum(), bias)
        return [*outs, grad[-D:]]

    for value, expected in zip(found(bare), found(plain), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_one_query_is_recorded_as_any() -> None:
    module = Attention(16, heads=4)
    x_BLD = torch.randn(2, 5, 16)
    with record_attention(module) as maps:
        found_B1D = module.first(x_BLD[:, :1], x_BLD)
    assert maps[""].shape == (2, 4, 1, 5)
    torch.testing.assert_close(found_B1D, module.first(x_BLD[:, :1], x_BLD))


def test_keys_are_rounded_up_in_bf16_without_a_trace() -> None:
    """Of 130 keys in bf16 on a CPU: the same result, and maps of 130."""
    torch.manual_seed(0)
    module = Attention(32, heads=2).to(torch.bfloat16)
    x_BLD = torch.randn(2, 130, 32, dtype=torch.bfloat16)
    mask_BL = torch.arange(130) < torch.tensor([130, 70])[:, None]
    with torch.no_grad():
        for mask in (None, mask_BL):
            with record_attention(module) as maps:
                expected_BLD = module(x_BLD, mask=mask)
            assert maps[""].shape == (2, 2, 130, 130)
            torch.testing.assert_close(module(x_BLD, mask=mask), expected_BLD, rtol=0.05, atol=0.02)


def test_dropout_of_one_query_keeps_the_mean() -> None:
    torch.manual_seed(0)
    module = Attention(8, heads=2, dropout=0.3)
    nn.init.normal_(module.key_value.bias)
    x_B1D, memory_BMD = torch.randn(1, 1, 8), torch.randn(1, 6, 8)
    with torch.no_grad():
        expected = module.eval().first(x_B1D, memory_BMD)
        drawn = module.train().first(x_B1D.expand(20_000, -1, -1), memory_BMD.expand(20_000, -1, -1))
    assert drawn.std(0).min() > 0
    torch.testing.assert_close(drawn.mean(0, keepdim=True), expected, rtol=0, atol=0.02)
