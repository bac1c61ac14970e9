"""EVE: one Transformer over [image; text], with experts of each modality below and a modality-aware mixture on top.

Chen et al., AAAI 2024, arXiv 2308.11971. Official code, for fine-tuning alone: ssyze/EVE
``models/multiway_transformer.py``.

The network is unified, so nothing is computed before both sides meet but their embeddings: what ``encode_image`` and
``encode_text`` give are those, and ``image_states``, ``text_states`` and ``fuse`` run all of the blocks.

Shape legend: B batch, C channels, H height, W width, N image tokens (class token first), L text tokens, T = N + L,
S = B T, K visible patches, P patches, D width, E embedding width, V vocabulary, X selected tokens,
Y numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from triptych.models.layers import Attention, FeedForward, PreNormBlock, run_block
from triptych.models.moe import MoEConfig, Routing, SoftMoE
from triptych.models.protocol import Encoded, Fused, Part, VisionLanguageModel
from triptych.models.text import MaskedLanguageHead, TextConfig, TextDecoder
from triptych.models.vision import ConvolutionStem, VisionConfig, resize_positions

RouterKind = Literal["hard", "soft", "shared"]
Modality = Literal["image", "text"]


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of the decoder of masked image modelling; the paper calls it lightweight, these are MAE's.

    Attributes:
        width: a multiple of 4, for the sines and cosines of two axes.
        cross_attention: its blocks also attend to the text's states, which the released code tried.
    """

    width: int = 512
    layers: int = 8
    heads: int = 16
    cross_attention: bool = False

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4:
            raise ValueError(f"the width of the pixel decoder must be a multiple of 4, not {self.width}")
        if self.layers < 1:
            raise ValueError(f"the pixel decoder needs at least one layer, not {self.layers}")


@dataclass(frozen=True)
class EveConfig:
    """Sizes of an EVE.

    Attributes:
        vision: of the Transformer (width, layers, heads, activation, norms) and of the pictures.
        text: of the vocabulary and of the table of positions, of one width with the Transformer; and of a decoder.
        deep_layers: how many blocks, the topmost, have the feed-forward kind ``deep``; the others have ``shallow``.
        shallow, deep: ``hard`` has one feed-forward network a modality, ``soft`` a mixture with a learned router, and
            ``shared`` one network for both (the paper's table 7). A soft router among the shallow layers has as many
            experts as modalities and chooses one (the released ``single_ffn: moe``).
        moe: of the deep layers' mixture.
        layer_scale: start value of the factors on both residual branches.
        drop_path: chance to leave out a residual branch of the last block; lower ones have proportionally less.
        embed_dim: E, of ITC.
        temperature: start value of the learnable temperature.
        pixel_decoder: of masked image modelling; ``None`` for a network that is not pre-trained so.
        decoder_layers: depth of a decoder for captions and the like, which the paper does not have.
        unpositioned_patches: visible patches of a masked picture lose their positions, as in the released code.
    """

    vision: VisionConfig
    text: TextConfig
    deep_layers: int = 2
    shallow: RouterKind = "hard"
    deep: RouterKind = "soft"
    moe: MoEConfig = field(default_factory=MoEConfig)
    layer_scale: float = 0.1
    drop_path: float = 0.1
    embed_dim: int = 768
    temperature: float = 0.07
    pixel_decoder: PixelDecoderConfig | None = None
    decoder_layers: int = 0
    unpositioned_patches: bool = False

    def __post_init__(self) -> None:
        for name in ("shallow", "deep"):
            if getattr(self, name) not in get_args(RouterKind):
                known = ", ".join(get_args(RouterKind))
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if self.vision.width != self.text.width:
            raise ValueError(f"one Transformer has one width, not {self.vision.width} and {self.text.width}")
        if not 0 <= self.deep_layers <= self.vision.layers:
            raise ValueError(f"deep_layers must be 0 to the {self.vision.layers} layers, not {self.deep_layers}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), not {self.drop_path}")

    def kinds(self) -> tuple[RouterKind, ...]:
        """The feed-forward kind of each block."""
        return (self.shallow,) * (self.vision.layers - self.deep_layers) + (self.deep,) * self.deep_layers


@dataclass(frozen=True)
class Layout:
    """Which tokens of a joint sequence are of which modality, and which are real.

    Attributes:
        image, text: how many tokens each has; the image's come first. Whoever makes the sequence counts them, so a
            masked picture or a clip is as good as a whole one.
        mask_BT: bool, ``True`` where a token is real; ``None`` where every one is.
        real: how many are real.
    """

    image: int
    text: int
    mask_BT: Tensor | None
    real: int | None

    def modality_S(self, batch: int, device: torch.device) -> Tensor:
        """0 for image tokens, 1 for text tokens."""
        modality_T = (torch.arange(self.image + self.text, device=device) >= self.image).long()
        return modality_T.repeat(batch)

    def of(self, token: int) -> Layout:
        """That of one token alone, which must be a real one."""
        return Layout(1, 0, None, None) if token < self.image else Layout(0, 1, None, None)


class SharedFeedForward(nn.Module):
    """One norm and network for all tokens."""

    def __init__(self, config: EveConfig) -> None:
        super().__init__()
        vision = config.vision
        self.norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.ffn = FeedForward(vision.width, config.text.ffn, vision.activation)

    def forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        return self.ffn(self.norm(x_BTD))


class HardRouter(nn.Module):
    """A norm and a network for each modality: who is the expert of a token is known beforehand."""

    def __init__(self, config: EveConfig) -> None:
        super().__init__()
        self.image = SharedFeedForward(config)
        self.text = SharedFeedForward(config)

    def forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        image_BND, text_BLD = x_BTD.split_with_sizes([layout.image, layout.text], dim=1)
        parts = []
        if layout.image:
            parts.append(self.image(image_BND, layout))
        if layout.text:
            parts.append(self.text(text_BLD, layout))
        return torch.cat(parts, dim=1)


class SoftRouter(nn.Module):
    """One norm, then the mixture of experts."""

    def __init__(self, config: EveConfig, moe: MoEConfig) -> None:
        super().__init__()
        vision = config.vision
        self.norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.moe = SoftMoE(vision.width, config.text.ffn, moe, vision.activation)

    def forward(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, Routing | None]:
        """The tokens, and what :meth:`SoftMoE.record` wants."""
        modality_S = layout.modality_S(len(x_BTD), x_BTD.device)
        real_S = None if layout.mask_BT is None else layout.mask_BT.flatten()
        y_SD, routing = self.moe.mix(self.norm(x_BTD).flatten(0, 1), modality_S, real_S, layout.real)
        return y_SD.view(x_BTD.shape[0], x_BTD.shape[1], -1), routing


class EveBlock(nn.Module):
    """``x + g1 attention(norm(x))``, then ``x + g2 ffn(norm(x))``, as BEiT; who is ``ffn`` depends on the token.

    Source: ssyze/EVE ``models/multiway_transformer.py``.
    """

    def __init__(self, config: EveConfig, kind: RouterKind, moe: MoEConfig, drop_path: float) -> None:
        super().__init__()
        vision = config.vision
        self.attention_norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.attention = Attention(vision.width, vision.heads, dropout=vision.attention_dropout, key_bias=False)
        self.attention_scale = nn.Parameter(torch.full((vision.width,), config.layer_scale))
        self.ffn_scale = nn.Parameter(torch.full((vision.width,), config.layer_scale))
        self.ffn: SharedFeedForward | HardRouter | SoftRouter
        if kind == "soft":
            self.ffn = SoftRouter(config, moe)
        else:
            self.ffn = HardRouter(config) if kind == "hard" else SharedFeedForward(config)
        self.drop_path = StochasticDepth(drop_path, "row")

    @property
    def observed(self) -> bool:
        """Whether what it does with each token matters beyond the states that the caller asks for."""
        moe = self.ffn.moe if isinstance(self.ffn, SoftRouter) else None
        shares = moe is not None and (moe.routings is not None or moe.config.capacity is not None)
        return self.training or self.attention.explicit or shares

    def forward(self, x_BTD: Tensor, layout: Layout, token: int | None = None) -> tuple[Tensor, Routing | None]:
        """States, and what :meth:`record` wants; ``token`` asks for the state of that one alone, [B, 1, D]."""
        normed_BTD = self.attention_norm(x_BTD)
        if token is None:
            attended_BTD = self.attention(normed_BTD, mask=layout.mask_BT)
        else:
            own = slice(token, token + 1)
            attended_BTD = self.attention.first(normed_BTD[:, own], normed_BTD, layout.mask_BT)
            x_BTD, layout = x_BTD[:, own], layout.of(token)
        x_BTD = x_BTD + self.drop_path(self.attention_scale * attended_BTD)
        if isinstance(self.ffn, SoftRouter):
            y_BTD, routing = self.ffn(x_BTD, layout)
        else:
            y_BTD, routing = self.ffn(x_BTD, layout), None
        return x_BTD + self.drop_path(self.ffn_scale * y_BTD), routing

    def record(self, routing: Routing | None) -> None:
        """Tell whoever wants to know what the router decided."""
        if isinstance(self.ffn, SoftRouter):
            self.ffn.moe.record(routing)


class UnifiedTransformer(nn.Module):
    """All blocks, between two norms, over image tokens, text tokens, or both."""

    def __init__(self, config: EveConfig) -> None:
        super().__init__()
        vision, kinds = config.vision, config.kinds()
        shallow = replace(config.moe, experts=2, top_k=1)
        self.pre_norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.blocks = nn.ModuleList(
            EveBlock(
                config,
                kind,
                config.moe if number >= len(kinds) - config.deep_layers else shallow,
                config.drop_path * number / max(1, len(kinds) - 1),
            )
            for number, kind in enumerate(kinds)
        )
        self.norm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.counts_padding = any(kind == "soft" for kind in kinds) and not config.moe.route_padding
        self.checkpointing = False

    def forward(self, x_BTD: Tensor, image: int, mask_BT: Tensor | None = None, token: int | None = None) -> Tensor:
        """States [B, T, D] of tokens of which the first ``image`` are a picture's; or of one ``token``, [B, 1, D].

        Where nobody looks at the others, the last block, with all its experts, computes that one alone.
        """
        real = None
        if mask_BT is not None and self.counts_padding:
            real = int(mask_BT.sum())
        layout = Layout(image, x_BTD.shape[1] - image, mask_BT, real)
        x_BTD = self.pre_norm(x_BTD)
        for number, block in enumerate(cast(Iterable[EveBlock], self.blocks), start=1):
            alone = token if number == len(self.blocks) and not block.observed else None
            x_BTD, routing = run_block(block, x_BTD, layout, alone, checkpointing=self.checkpointing)
            block.record(routing)
        if token is not None and alone is None:
            x_BTD = x_BTD[:, token : token + 1]
        return self.norm(x_BTD)


class ImageEmbeddings(nn.Module):
    """Patches and a class token, with learned positions and the vector of pictures (equation 1)."""

    def __init__(self, config: EveConfig) -> None:
        super().__init__()
        self.config = config.vision
        self.unpositioned = config.unpositioned_patches
        D, patch = self.config.width, self.config.patch
        self.patch_embedding = (
            ConvolutionStem(D, patch)
            if self.config.stem == "convolution"
            else nn.Conv2d(3, D, kernel_size=patch, stride=patch)
        )
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.position_embedding = nn.Parameter(torch.empty(self.config.tokens, D))
        self.token_type = nn.Parameter(torch.empty(D))

    def forward(self, pixels_BCHW: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] to [B, N, D]; with ``kept_BK`` of those patches alone, [B, 1 + K, D], in their order."""
        patch = self.config.patch
        height, width = pixels_BCHW.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"image of {height} x {width} pixels: both sides must be multiples of the patch, {patch}")
        grid = (height // patch, width // patch)
        if kept_BK is not None and self.config.stem == "convolution":  # which would look beyond the patch
            pixels_BCHW = hide_patches(pixels_BCHW, kept_BK, grid)
        patches_BPD = self.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
        position_ND = resize_positions(self.position_embedding, grid, self.config.interpolation)
        class_B1D = (self.class_embedding + position_ND[0]).to(patches_BPD.dtype).expand(len(patches_BPD), 1, -1)
        if kept_BK is None or not self.unpositioned:
            patches_BPD = patches_BPD + position_ND[1:]
        if kept_BK is not None:
            patches_BPD = patches_BPD.gather(1, kept_BK[:, :, None].expand(-1, -1, patches_BPD.shape[2]))
        return torch.cat([class_B1D, patches_BPD], dim=1) + self.token_type

    def resize(self, image_size: int) -> None:
        """Interpolate the position table once and for all, for training at another resolution."""
        config = replace(self.config, image_size=image_size)
        side = image_size // config.patch
        table_ND = resize_positions(self.position_embedding.detach(), (side, side), config.interpolation)
        self.position_embedding = nn.Parameter(table_ND.clone())
        self.config = config


def hide_patches(pixels_BCHW: Tensor, kept_BK: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pictures with every patch but the kept ones 0, which is the mean colour."""
    rows, columns = grid
    shown_BP = torch.zeros(len(kept_BK), rows * columns, dtype=torch.bool, device=kept_BK.device)
    shown_B1YX = shown_BP.scatter(1, kept_BK, True).view(-1, 1, rows, columns)
    height, width = pixels_BCHW.shape[-2] // rows, pixels_BCHW.shape[-1] // columns
    shown_B1HW = shown_B1YX.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    return pixels_BCHW.masked_fill(~shown_B1HW, 0)


class EveTextEmbeddings(nn.Module):
    """Normalised words, with learned positions and the vector of texts (equation 2)."""

    def __init__(self, config: EveConfig) -> None:
        super().__init__()
        text = config.text
        self.word = nn.Embedding(text.vocab_size, text.width)
        self.norm = nn.LayerNorm(text.width, eps=text.layer_norm_eps)
        self.dropout = nn.Dropout(text.dropout)
        self.position_embedding = nn.Parameter(torch.empty(text.max_positions, text.width))
        self.token_type = nn.Parameter(torch.empty(text.width))

    def forward(self, ids_BL: Tensor) -> Tensor:
        """[B, L] ids to [B, L, D]."""
        length = ids_BL.shape[1]
        if length > len(self.position_embedding):
            raise ValueError(f"a text of {length} tokens is longer than the {len(self.position_embedding)} positions")
        word_BLD = self.dropout(self.norm(self.word(ids_BL)))
        return word_BLD + self.position_embedding[:length] + self.token_type


class PixelBlock(nn.Module):
    """A Transformer block of the pixel decoder; with ``cross_attention`` it first attends to the text."""

    def __init__(self, config: PixelDecoderConfig, text_width: int) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.block = PreNormBlock(width, heads, 4 * width, activation="gelu", eps=1e-6, dropout=0.0)
        self.cross_norm: nn.LayerNorm | None = None
        self.cross_attention: Attention | None = None
        if config.cross_attention:
            self.cross_norm = nn.LayerNorm(width, eps=1e-6)
            self.cross_attention = Attention(width, heads, memory_width=text_width)

    def forward(self, x_BND: Tensor, text: Encoded | None) -> Tensor:
        if self.cross_attention is not None and self.cross_norm is not None and text is not None:
            x_BND = x_BND + self.cross_attention(self.cross_norm(x_BND), text.hidden_BLD, text.mask_BL)
        return self.block(x_BND)


class PixelDecoder(nn.Module):
    """Paints the hidden patches of a picture from the states of the visible ones.

    He et al. 2022 (MAE), which EVE follows; facebookresearch/mae ``models_mae.py``. Positions are fixed sines and
    cosines of the row and the column, so any resolution can be painted.
    """

    def __init__(self, config: PixelDecoderConfig, width: int, patch: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(width, config.width)
        self.mask_token = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(PixelBlock(config, width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.paint = nn.Linear(config.width, patch * patch * 3)
        self.checkpointing = False

    def forward(self, visible_BKD: Tensor, kept_BK: Tensor, grid: tuple[int, int], text: Encoded | None) -> Tensor:
        """Colours [B, P, Y] of every patch, row by row; of a patch pixel by pixel, the three colours together.

        Args:
            visible_BKD: states of the class token and the visible patches, [B, 1 + K, D].
            kept_BK: which patches those are.
            grid: rows and columns of patches.
            text: states that the blocks attend to, if they are made for it.
        """
        visible_BKD = self.embed(visible_BKD)
        batch, patches, width = len(kept_BK), grid[0] * grid[1], self.config.width
        masked_BPD = self.mask_token.to(visible_BKD.dtype).expand(batch, patches, -1)
        index_BKD = kept_BK[:, :, None].expand(-1, -1, width)
        patches_BPD = masked_BPD.scatter(1, index_BKD, visible_BKD[:, 1:])
        patches_BPD = patches_BPD + sine_positions(grid, width, patches_BPD)
        x_BND = torch.cat([visible_BKD[:, :1], patches_BPD], dim=1)
        for block in self.blocks:
            x_BND = run_block(block, x_BND, text, checkpointing=self.checkpointing)
        return self.paint(self.norm(x_BND[:, 1:]))


def sine_positions(grid: tuple[int, int], width: int, like: Tensor) -> Tensor:
    """[P, D] sines and cosines of columns, then of rows (facebookresearch/mae ``util/pos_embed.py``)."""
    rates = 10000.0 ** -(torch.arange(width // 4, device=like.device, dtype=torch.float64) / (width // 4))

    def axis(count: int) -> Tensor:
        angles = torch.arange(count, device=like.device, dtype=torch.float64)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = grid
    columns_PD, rows_PD = axis(columns).repeat(rows, 1), axis(rows).repeat_interleave(columns, dim=0)
    return torch.cat([columns_PD, rows_PD], dim=1).to(like.dtype)


_READ_IMAGE = frozenset[Part](("embedding", "fused_image", "decoder", "pixels"))
_READ_TEXT = frozenset[Part](("embedding", "fused_image", "decoder", "pooled", "matching", "masked"))
"""Who reads the final states of a modality; texts are read anyway, except where pictures are painted."""


class Eve(VisionLanguageModel):
    """One Transformer for pictures, for texts, and for both."""

    model_type: ClassVar[str] = "eve"
    ends_texts: ClassVar[bool] = True
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "image": ("image_embeddings", "network"),
        "text": ("text_embeddings", "network"),
        "fusion": ("network",),
        "embedding": ("image_projection", "text_projection", "temperature"),
        "matching": ("match_head",),
        "masked": ("masked_head",),
        "pixels": ("pixel_decoder",),
        "decoder": ("decoder",),
    }

    def __init__(self, config: EveConfig) -> None:
        super().__init__()
        self.config = config
        vision, text = config.vision, config.text
        self.width = self.pooled_width = vision.width
        self.embed_dim, self.max_text, self.patch = config.embed_dim, text.max_positions, vision.patch
        self.image_embeddings = ImageEmbeddings(config)
        self.text_embeddings = EveTextEmbeddings(config)
        self.network = UnifiedTransformer(config)
        self.image_projection = nn.Linear(vision.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(vision.width, config.embed_dim, bias=False)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.match_head = nn.Linear(vision.width, 2)
        self._init_weights()
        self.masked_head = MaskedLanguageHead(text)
        self.pixel_decoder: PixelDecoder | None = None
        if config.pixel_decoder is not None:
            self.pixel_decoder = PixelDecoder(config.pixel_decoder, vision.width, vision.patch)
            _truncated_normal(self.pixel_decoder, config.pixel_decoder.width)
        self.decoder = TextDecoder(text, config.decoder_layers) if config.decoder_layers else None

    def _init_weights(self) -> None:
        """The released code's: normal numbers cut off at one sigma, of 0.02 at its width of 768."""
        _truncated_normal(self, self.width)
        if isinstance(self.image_embeddings.patch_embedding, ConvolutionStem):
            self.image_embeddings.patch_embedding.reset_parameters()

    def train_only(self, *used: Part) -> None:
        """As everywhere; and what only the tokens of a modality run through is trained where that modality is seen.

        In the last block that is where somebody reads the states of its tokens.
        """
        super().train_only(*used)
        seen: dict[Modality, bool] = {"image": "image" in used, "text": "text" in used}
        for block in self.network.blocks:
            self._freeze_unseen(block.ffn, seen)
        if "fusion" in used:
            painting = self.config.pixel_decoder
            reads_text = painting is not None and painting.cross_attention
            unread = {"pixels"} & set(used) and not (_READ_TEXT & set(used) or reads_text)
            seen = {"image": bool(_READ_IMAGE & set(used)), "text": not unread}
            self._freeze_unseen(self.network.blocks[-1].ffn, seen)

    @staticmethod
    def _freeze_unseen(ffn: nn.Module | Tensor, seen: Mapping[Modality, bool]) -> None:
        for modality in get_args(Modality):
            if isinstance(ffn, HardRouter) and not seen[modality]:
                getattr(ffn, modality).requires_grad_(False)

    def resize_images(self, image_size: int) -> None:
        self.image_embeddings.resize(image_size)
        self.config = replace(self.config, vision=self.image_embeddings.config)

    def add_decoder(self, layers: int) -> None:
        if self.decoder is not None:
            raise ValueError("this eve has a decoder")
        self.decoder = TextDecoder(self.config.text, layers).to(self.temperature.device)
        with torch.no_grad():
            self.decoder.embeddings.word.weight.copy_(self.text_embeddings.word.weight)
        self.config = replace(self.config, decoder_layers=layers)

    def encode_picture(self, pixels_BCHW: Tensor) -> Encoded:
        """[B, 3, H, W] normalised pixels to the embeddings [B, N, D] that every block is still to see."""
        return Encoded(self.image_embeddings(pixels_BCHW))

    def encode_visible(self, pixels_BCHW: Tensor, kept_BK: Tensor) -> Encoded:
        return Encoded(self.image_embeddings(pixels_BCHW, kept_BK))

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Encoded:
        """[B, L] ids, ``[CLS] words [SEP]``, to embeddings [B, L, D]."""
        return Encoded(self.text_embeddings(ids_BL), mask_BL)

    def image_states(self, image: Encoded) -> Encoded:
        """The states of pictures by themselves; of a clip frame by frame."""
        return self._image_states(image)

    def _image_states(self, image: Encoded, token: int | None = None) -> Encoded:
        hidden_BND, mask_BN = image.hidden_BLD, image.mask_BL
        if image.frames > 1:
            hidden_BND, mask_BN = hidden_BND.reshape(len(image) * image.frames, -1, self.width), None
        states_BND = self.network(hidden_BND, hidden_BND.shape[1], mask_BN, token)
        states = Encoded(states_BND, mask_BN if token is None else None)
        return states.as_clips(image.frames) if image.frames > 1 else states

    def text_states(self, text: Encoded) -> Encoded:
        """The states of texts by themselves."""
        return Encoded(self.network(text.hidden_BLD, 0, text.mask_BL), text.mask_BL)

    def embed_image(self, image: Encoded) -> Tensor:
        """Unit-length embeddings [B, E]; of a clip that of the mean state over its frames."""
        return self._embed(self.image_projection, self._image_states(image, 0).mean_frame().hidden_BLD)

    def embed_picture(self, image: Encoded) -> Tensor:
        return self._embed(self.image_projection, self._image_states(image, 0).hidden_BLD)

    def embed_text(self, text: Encoded) -> Tensor:
        return self._embed(self.text_projection, self.network(text.hidden_BLD, 0, text.mask_BL, 0))

    @staticmethod
    def _embed(projection: nn.Module, states_B1D: Tensor) -> Tensor:
        return F.normalize(projection(states_B1D[:, 0]), dim=-1)

    def fuse(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Fused:
        image, joint, count = self._join(image, text, image_rows_B)
        states_BTD = self.network(joint.hidden_BLD, count, joint.mask_BL)
        image_BND, text_BLD = states_BTD[:, :count], states_BTD[:, count:]
        return Fused(image_BND, text_BLD, text_BLD[:, 0], image.mask_BL, text.mask_BL)

    def pool(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Tensor:
        _, joint, count = self._join(image, text, image_rows_B)
        return self.network(joint.hidden_BLD, count, joint.mask_BL, token=count)[:, 0]

    @staticmethod
    def _join(image: Encoded, text: Encoded, image_rows_B: Tensor | None) -> tuple[Encoded, Encoded, int]:
        """The image of each text, both as one sequence, and how many tokens of it are the image's."""
        if image_rows_B is not None:
            image = image.rows(image_rows_B)
        return image, Encoded.join(image, text), image.hidden_BLD.shape[1]

    def match_logits(self, pooled_BP: Tensor) -> Tensor:
        return self.match_head(pooled_BP)

    def masked_logits(self, text_XD: Tensor) -> Tensor:
        return self.masked_head(text_XD)

    def paint(self, fused: Fused, kept_BK: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.pixel_decoder is None:
            return super().paint(fused, kept_BK, grid)
        text = Encoded(fused.text_BLD, fused.text_mask_BL)
        return self.pixel_decoder(fused.image_BND, kept_BK, grid, text)


@torch.no_grad()
def _truncated_normal(module: nn.Module, width: int) -> None:
    """Every matrix and table; biases 0, norms as they are made. Narrower networks get as much variance passed on."""
    std, within = 0.02 * (768 / width) ** 0.5, math.erf(0.5**0.5)
    for name, parameter in module.named_parameters():
        own = name.rpartition(".")[2]
        if own.endswith("bias"):
            nn.init.zeros_(parameter)
        elif own in ("temperature", "attention_scale", "ffn_scale") or name.endswith("norm.weight"):
            continue
        elif own == "modality":
            nn.init.zeros_(parameter)
        else:
            # By the inverse of the distribution: torch's own draws again and again, which takes minutes at base size.
            parameter.uniform_(-within, within).erfinv_().mul_(2**0.5 * std).clamp_(-std, std)


_BASE = VisionConfig(
    width=768, layers=12, heads=12, patch=16, image_size=224, layer_norm_eps=1e-6, interpolation="bicubic"
)
_BASE_TEXT = TextConfig(
    vocab_size=64000, max_positions=196, layer_norm_eps=1e-6, attention_dropout=0.0, activation="quick_gelu"
)
_TINY = replace(_BASE, width=128, layers=4, heads=2, image_size=48, stem="convolution")
_SMALL_TEXT = replace(_BASE_TEXT, vocab_size=4096, width=256, heads=4, ffn=1024, max_positions=128, dropout=0.0)
_TINY_TEXT = replace(_SMALL_TEXT, vocab_size=256, width=128, heads=2, ffn=512, max_positions=64)

SIZES: dict[str, EveConfig] = {
    "tiny": EveConfig(
        _TINY,
        _TINY_TEXT,
        moe=MoEConfig(experts=4),
        layer_scale=1.0,
        drop_path=0.0,
        embed_dim=64,
        pixel_decoder=PixelDecoderConfig(width=64, layers=2, heads=2),
        decoder_layers=2,
    ),
    "small": EveConfig(
        replace(_TINY, width=256, layers=6, heads=4, image_size=96),
        _SMALL_TEXT,
        moe=MoEConfig(experts=8),
        layer_scale=1.0,
        drop_path=0.0,
        embed_dim=128,
        pixel_decoder=PixelDecoderConfig(width=128, layers=2, heads=4),
        decoder_layers=2,
    ),
    "base": EveConfig(_BASE, _BASE_TEXT),
    "large": EveConfig(
        replace(_BASE, width=1024, layers=24, heads=16),
        replace(_BASE_TEXT, width=1024, heads=16, ffn=4096),
        deep_layers=3,
        embed_dim=1024,
    ),
}
"""Published sizes, and two that train on a CPU, with a decoder for captions."""
