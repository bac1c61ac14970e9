"""BridgeTower: building bridges between encoders in vision-language representation learning. METER is the case without.

Xu et al., AAAI 2023, arXiv 2206.08657. Official code: microsoft/BridgeTower ``src/modules/bt_module.py``,
``meter_module.py`` and ``heads.py``.

Shape legend: B batch, N image tokens, L text tokens, T tokens of either side, D width, E embedding width,
V vocabulary, X selected tokens, P pooled width (2 D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.layers import Attention, FeedForward, init_weights, run_block
from triptych.models.protocol import Encoded, Fused, Part, VisionLanguageModel
from triptych.models.text import CoAttentionLayer, MaskedLanguageHead, TextConfig, TextDecoder, TextEncoder
from triptych.models.vision import VisionConfig, VisionTransformer

BridgeKind = Literal[
    "add",
    "multiply",
    "weighted",
    "gated",
    "linear",
    "mlp",
    "attention",
    "attention_ffn",
    "residual",
    "scaled_add",
    "interpolate",
]
Contrast = Literal["encoders", "projected"]
Wanted = Literal["all", "text", "first"]

ROBERTA = TextConfig(vocab_size=50265, max_positions=514, layer_norm_eps=1e-5, first_position=2)
"""Sizes of roberta-base."""


@dataclass(frozen=True)
class BridgeTowerConfig:
    """Sizes of a BridgeTower.

    Attributes:
        vision, text: the two encoders, of one width.
        text_layers: depth of the text encoder; that of the image encoder is ``vision.layers``.
        fusion_layers: cross-modal layers on each side, of the text encoder's width, heads and linear layers.
        bridge: what joins a uni-modal state with the cross-modal one, see :data:`BRIDGES`.
        bridged_layers: how many cross-modal layers, counted from the lowest, are fed by a uni-modal layer each, of
            which the topmost so many take part; ``None`` for all. The others only read the layer below. With 0 the
            network is METER: the topmost states enter the lowest layer, without a norm.
        gather_layers: METER's fusion of layers: what enters is the topmost state and a gated sum of all below; only
            without bridges.
        fusion_norm_eps: of the norms of cross-modal layers and of the MLM head. Official 1e-12, in the port of
            transformers 1e-5; published weights were trained with the former.
        contrast: what ITC embeds: the two encoders' own states of token 0 (``encoders``, official), or for the image
            that after the projection to the fusion (``projected``, bridgetower-large-itm-mlm-itc), which also has an
            embedding of pairs.
        embed_dim: E.
        temperature: start value of the learnable temperature.
        decoder_layers: depth of a decoder for captions and the like, which the paper does not have.
    """

    vision: VisionConfig
    text: TextConfig = field(default_factory=lambda: ROBERTA)
    text_layers: int = 12
    fusion_layers: int = 6
    bridge: BridgeKind = "add"
    bridged_layers: int | None = None
    gather_layers: bool = False
    fusion_norm_eps: float = 1e-12
    contrast: Contrast = "encoders"
    embed_dim: int = 256
    temperature: float = 0.07
    decoder_layers: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("bridge", BridgeKind), ("contrast", Contrast)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, not {getattr(self, name)!r}")
        if self.vision.width != self.text.width:
            raise ValueError(f"both encoders need one width, not {self.vision.width} and {self.text.width}")
        if self.fusion_layers < 1:
            raise ValueError(f"fusion_layers must be at least 1, not {self.fusion_layers}")
        shallower = min(self.vision.layers, self.text_layers, self.fusion_layers)
        if not 0 <= self.bridges <= shallower:
            raise ValueError(
                f"{self.bridges} bridged layers need as many cross-modal layers and layers of each encoder; "
                f"there are {self.fusion_layers}, {self.vision.layers} and {self.text_layers}"
            )
        if self.gather_layers and self.bridges:
            raise ValueError("gather_layers is for a network without bridges: set bridged_layers=0")

    @property
    def bridges(self) -> int:
        """How many cross-modal layers a uni-modal layer feeds."""
        return self.fusion_layers if self.bridged_layers is None else self.bridged_layers

    @property
    def fusion(self) -> TextConfig:
        """Sizes of the cross-modal layers."""
        return replace(self.text, layer_norm_eps=self.fusion_norm_eps)


class Bridge(nn.Module):
    """Joins a uni-modal state y with the cross-modal state x of the same tokens, and normalises: x + y.

    The paper's BridgeLayer (section 3.3; here definition a of its table of definitions). The norm belongs to every
    definition.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, cross_BTD: Tensor, own_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """``cross_BTD`` is x, ``own_BTD`` y, both [B, T, D]."""
        return self.norm(self.join(cross_BTD, own_BTD, mask_BT))

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What is normalised."""
        return x_BTD + y_BTD


class MultiplyBridge(Bridge):
    """x * y (definition b)."""

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return x_BTD * y_BTD


class WeightedBridge(Bridge):
    """a x + (1 - a) y with a learned vector a (definition c); its start value is not published, here 1/2."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.share = nn.Parameter(torch.full((config.width,), 0.5))

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return self.share * x_BTD + (1 - self.share) * y_BTD


class InterpolateBridge(WeightedBridge):
    """The same with one number for all of D (transformers' ``interpolate``)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.share = nn.Parameter(torch.tensor(0.5))


class ScaledAddBridge(Bridge):
    """x + s y with a learned number s (transformers' ``scaled_add``)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return x_BTD + self.scale * y_BTD


class LinearBridge(Bridge):
    """W [x; y] (definition e)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.both = nn.Linear(2 * config.width, config.width)

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return self.both(torch.cat([x_BTD, y_BTD], dim=-1))


class GatedBridge(LinearBridge):
    """a x + (1 - a) y with a = sigmoid(W [x; y]) (definition d)."""

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        share_BTD = super().join(x_BTD, y_BTD, mask_BT).sigmoid()
        return share_BTD * x_BTD + (1 - share_BTD) * y_BTD


class ResidualBridge(LinearBridge):
    """x + y + W* [x; y] (definition i); W* starts at zero, which the table's star is taken to mean."""

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return x_BTD + y_BTD + super().join(x_BTD, y_BTD, mask_BT)


class MlpBridge(Bridge):
    """W2 GELU(W1 [x; y]) (definition f)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.expand = nn.Linear(2 * config.width, 2 * config.width)
        self.contract = nn.Linear(2 * config.width, config.width)

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return self.contract(F.gelu(self.expand(torch.cat([x_BTD, y_BTD], dim=-1))))


class AttentionBridge(Bridge):
    """MCA(x, y): x attends to y (definition g)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config.width, config.heads, dropout=config.attention_dropout)

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return self.attention(x_BTD, y_BTD, mask_BT)


class AttentionFfnBridge(AttentionBridge):
    """FFN(MCA(x, y)) (definition h)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.ffn = FeedForward(config.width, config.ffn, config.activation)

    def join(self, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return self.ffn(super().join(x_BTD, y_BTD, mask_BT))


BRIDGES: Mapping[BridgeKind, type[Bridge]] = {
    "add": Bridge,
    "multiply": MultiplyBridge,
    "weighted": WeightedBridge,
    "gated": GatedBridge,
    "linear": LinearBridge,
    "mlp": MlpBridge,
    "attention": AttentionBridge,
    "attention_ffn": AttentionFfnBridge,
    "residual": ResidualBridge,
    "scaled_add": ScaledAddBridge,
    "interpolate": InterpolateBridge,
}
"""The nine definitions of the paper's ablation, a to i, and the two that transformers adds."""


class Projection(nn.Module):
    """Brings states of an encoder to the fusion: one linear layer and one type vector for all levels.

    With ``gather`` there is one level, METER's: the topmost state and, for each number of it, a weighted sum of those
    below (``meter_module.py:118``).
    """

    def __init__(self, width: int, *, gather: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.token_type = nn.Parameter(torch.empty(width))
        self.gate = nn.Linear(width, width) if gather else None

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """States [B, T, D], lowest first, each projected."""
        if self.gate is not None:
            below_KBTD = torch.stack(list(levels[:-1]))
            levels = [levels[-1] + (self.gate(below_KBTD).softmax(0) * below_KBTD).sum(0)]
        return tuple(self.linear(level_BTD) + self.token_type for level_BTD in levels)


class BridgedFusion(nn.Module):
    """Cross-modal layers on both sides, each fed by a level of the encoders of its own (paper section 3.3)."""

    def __init__(self, config: BridgeTowerConfig) -> None:
        super().__init__()
        width, kind = config.text.width, BRIDGES[config.bridge]
        self.bridged = config.bridges
        # The lowest layer has nothing below it: its bridge is the norm alone. METER has not even that.
        self.image_norm: nn.Module = nn.LayerNorm(width, eps=1e-5) if self.bridged else nn.Identity()
        self.text_norm: nn.Module = nn.LayerNorm(width, eps=1e-5) if self.bridged else nn.Identity()
        self.image_bridges = nn.ModuleList(kind(config.fusion) for _ in range(self.bridged - 1))
        self.text_bridges = nn.ModuleList(kind(config.fusion) for _ in range(self.bridged - 1))
        self.layers = nn.ModuleList(CoAttentionLayer(config.fusion) for _ in range(config.fusion_layers))
        self.checkpointing = False
        init_weights(self, width)
        for bridge in (*self.image_bridges, *self.text_bridges):
            if isinstance(bridge, ResidualBridge):
                nn.init.zeros_(bridge.both.weight)

    def forward(
        self, image: Encoded, text: Encoded, image_rows_B: Tensor | None, *, wanted: Wanted = "all"
    ) -> tuple[Tensor, Tensor]:
        """Image and text states after the last layer, of which that only computes what is wanted.

        ``first`` is token 0 of both, [B, 1, D]; with ``text`` the image states are those before it.
        """
        image_BND, text_BLD = self.image_norm(image.levels[0]), self.text_norm(text.levels[0])
        image_mask_BN = image.mask_BL
        for number, layer in enumerate(cast(list[CoAttentionLayer], list(self.layers))):
            if 0 < number < self.bridged:
                own_BND = image.levels[number] if image_rows_B is None else image.levels[number][image_rows_B]
                bridge, kept = self.image_bridges[number - 1], self.checkpointing
                image_BND = run_block(bridge, image_BND, own_BND, image_mask_BN, checkpointing=kept)
                bridge = self.text_bridges[number - 1]
                text_BLD = run_block(bridge, text_BLD, text.levels[number], text.mask_BL, checkpointing=kept)
            sides = Encoded(image_BND, image_mask_BN), Encoded(text_BLD, text.mask_BL)
            rows_B = image_rows_B if number == 0 else None  # from the second layer on each text has its own image
            last = number == len(self.layers) - 1
            if last and wanted == "text":
                text_BLD = run_block(layer.text_side, *sides, rows_B, checkpointing=self.checkpointing)
            else:
                image_BND, text_BLD = run_block(
                    layer, *sides, rows_B, first=last and wanted == "first", checkpointing=self.checkpointing
                )
            if number == 0 and image_rows_B is not None and image_mask_BN is not None:
                image_mask_BN = image_mask_BN[image_rows_B]
        return image_BND, text_BLD


class Pooler(nn.Module):
    """Linear and tanh on token 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.linear(hidden_BTD[:, 0]).tanh()


class BridgeTower(VisionLanguageModel):
    """Two encoders, of which the topmost layers feed one cross-modal layer each on either side."""

    model_type: ClassVar[str] = "bridgetower"
    ends_texts: ClassVar[bool] = True
    cleaning: ClassVar[Literal["words", "none"]] = "none"  # RoBERTa's words have case and punctuation
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "image": ("vision",),
        "text": ("text",),
        "fusion": ("image_projection", "text_projection", "fusion"),
        "pooled": ("image_pooler", "text_pooler"),
        "embedding": ("image_embedding", "text_embedding", "temperature"),
        "matching": ("match_head",),
        "masked": ("masked_head",),
        "decoder": ("decoder",),
    }

    def __init__(self, config: BridgeTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.pooled_width = config.text.width, 2 * config.text.width
        self.embed_dim, self.max_text = config.embed_dim, config.text.max_tokens
        self.patch = config.vision.patch
        self.vision = VisionTransformer(config.vision)
        self.text = TextEncoder(config.text, config.text_layers)
        self.image_projection = Projection(self.width, gather=config.gather_layers)
        self.text_projection = Projection(self.width, gather=config.gather_layers)
        self.fusion = BridgedFusion(config)
        self.image_pooler, self.text_pooler = Pooler(self.width), Pooler(self.width)
        self.match_head = nn.Linear(self.pooled_width, 2)
        self.masked_head = MaskedLanguageHead(config.fusion)
        self.image_embedding = nn.Linear(self.width, config.embed_dim)
        self.text_embedding = nn.Linear(self.width, config.embed_dim)
        self.pair_embedding: nn.Linear | None = None
        if config.contrast == "projected":
            self.pair_embedding = nn.Linear(self.pooled_width, config.embed_dim)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.decoder = TextDecoder(config.text, config.decoder_layers) if config.decoder_layers else None
        self._init_weights()

    def _init_weights(self) -> None:
        """BERT's, of everything that is no encoder (``objectives.py:12``); encoders and blocks have their own."""
        for name, module in self.named_children():
            if name not in ("vision", "text", "fusion", "masked_head", "decoder"):
                init_weights(module, self.width)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.token_type, std=0.02 * math.sqrt(768 / self.width))

    @property
    def _levels(self) -> tuple[int, int]:
        """How many levels of the image encoder and of the text encoder are read."""
        if self.config.gather_layers:
            return self.config.vision.layers, self.config.text_layers
        return (max(1, self.config.bridges),) * 2

    def resize_images(self, image_size: int) -> None:
        self.vision.resize(image_size)
        self.config = replace(self.config, vision=self.vision.config)

    def add_decoder(self, layers: int) -> None:
        if self.decoder is not None:
            raise ValueError("this bridgetower has a decoder")
        self.decoder = TextDecoder(self.config.text, layers).to(self.temperature.device)
        self.decoder.start_from(self.text)
        self.config = replace(self.config, decoder_layers=layers)

    def encode_picture(self, pixels_BCHW: Tensor) -> Encoded:
        """[B, 3, H, W] normalised pixels to the last states [B, N, D] and the projected levels.

        The levels, projected here so that fusing with many texts does not do it again, are all that :meth:`fuse`
        reads; the last states all that the official :meth:`embed_image` reads.
        """
        levels = self.vision.levels(pixels_BCHW, self._levels[0])
        return Encoded(levels[-1], None, self.image_projection(levels))

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Encoded:
        """[B, L] ids, ``<s> words </s>``, to the last states [B, L, D] and the projected levels."""
        levels = self.text.levels(ids_BL, mask_BL, self._levels[1])
        return Encoded(levels[-1], mask_BL, self.text_projection(levels))

    def embed_picture(self, image: Encoded) -> Tensor:
        states_BND = image.hidden_BLD if self.config.contrast == "encoders" else image.levels[-1]
        return F.normalize(self.image_embedding(states_BND[:, 0]), dim=-1)

    def embed_text(self, text: Encoded) -> Tensor:
        return F.normalize(self.text_embedding(text.hidden_BLD[:, 0]), dim=-1)

    def embed_pair(self, pooled_BP: Tensor) -> Tensor:
        """Unit-length embeddings [B, E] of image-text pairs, from :meth:`pool`.

        Raises:
            ValueError: the network has no such head (``contrast="encoders"``).
        """
        if self.pair_embedding is None:
            raise ValueError("this BridgeTower embeds no pairs: its contrast is 'encoders', not 'projected'")
        return F.normalize(self.pair_embedding(pooled_BP), dim=-1)

    def fuse(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Fused:
        image_BND, text_BLD = self.fusion(image, text, image_rows_B)
        image_mask_BN = image.mask_BL
        if image_mask_BN is not None and image_rows_B is not None:
            image_mask_BN = image_mask_BN[image_rows_B]
        return Fused(image_BND, text_BLD, self._pooled(image_BND, text_BLD), image_mask_BN, text.mask_BL)

    def pool(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Tensor:
        """As :meth:`fuse`; the last layer computes token 0 alone."""
        return self._pooled(*self.fusion(image, text, image_rows_B, wanted="first"))

    def fuse_text(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Tensor:
        """As :meth:`fuse`; the image side of the last layer is left out."""
        return self.fusion(image, text, image_rows_B, wanted="text")[1]

    def _pooled(self, image_BTD: Tensor, text_BTD: Tensor) -> Tensor:
        return torch.cat([self.text_pooler(text_BTD), self.image_pooler(image_BTD)], dim=-1)

    def match_logits(self, pooled_BP: Tensor) -> Tensor:
        return self.match_head(pooled_BP)

    def masked_logits(self, text_XD: Tensor) -> Tensor:
        return self.masked_head(text_XD)


_BASE_VISION = VisionConfig(width=768, layers=12, heads=12, patch=16, image_size=288, interpolation="bicubic")
_LARGE_VISION = VisionConfig(width=1024, layers=24, heads=16, patch=14, image_size=294, interpolation="bicubic")
_TINY_VISION = VisionConfig(
    width=128, layers=4, heads=2, patch=16, image_size=48, stem="convolution", interpolation="bicubic"
)
_SMALL_TEXT = TextConfig(
    vocab_size=4096,
    width=256,
    heads=4,
    ffn=1024,
    max_positions=128,
    dropout=0.0,
    attention_dropout=0.0,
    activation="quick_gelu",  # as mPLUG's small sizes: on a CPU GELU takes longer
)
_TINY_TEXT = replace(_SMALL_TEXT, vocab_size=256, width=128, heads=2, ffn=512, max_positions=64)

SIZES: dict[str, BridgeTowerConfig] = {
    "tiny": BridgeTowerConfig(_TINY_VISION, _TINY_TEXT, text_layers=3, fusion_layers=3, embed_dim=64, decoder_layers=2),
    "small": BridgeTowerConfig(
        replace(_TINY_VISION, width=256, heads=4, image_size=96),
        _SMALL_TEXT,
        text_layers=3,
        fusion_layers=3,
        embed_dim=128,
        decoder_layers=2,
    ),
    "base": BridgeTowerConfig(_BASE_VISION),
    "large": BridgeTowerConfig(_LARGE_VISION, replace(ROBERTA, width=1024, heads=16, ffn=4096), text_layers=24),
}
"""Published sizes (``base``: CLIP-ViT-B/16 and roberta-base; ``large``: ViT-L/14 and roberta-large), and two
that train on a CPU, with a decoder."""
