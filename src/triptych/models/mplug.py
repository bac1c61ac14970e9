"""mPLUG: effective and efficient vision-language learning by cross-modal skip-connections.

Li et al., EMNLP 2022, arXiv 2205.12005. Official code: X-PLUG/mPLUG ``models/modeling_mplug.py`` and
``models/model_*_mplug.py``.

Shape legend: B batch, N image tokens, L text tokens, D width (text side), E embedding width, V vocabulary,
X selected tokens, P pooled width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.layers import Attention, Memory, init_weights, run_block
from triptych.models.protocol import Encoded, Fused, Part, VisionLanguageModel
from triptych.models.text import CoAttentionLayer, MaskedLanguageHead, TextConfig, TextDecoder, TextEncoder
from triptych.models.vision import VisionConfig, VisionTransformer

FusionKind = Literal["skip", "co_attention", "connected", "asymmetric"]
SkipRule = Literal["released", "paper"]


@dataclass(frozen=True)
class MPlugConfig:
    """Sizes of an mPLUG.

    Attributes:
        text_layers, fusion_layers, decoder_layers: depths of the three BERT stacks.
        fusion: ``skip`` is mPLUG; the others are the networks the paper compares it with (figure 4).
        stride: S, asymmetric layers between two connected ones.
        skip_rule: ``released`` connects layer j = 0.. where ``j != 0 and j % S == 0`` (modeling_mplug.py:471; published
            weights need it), ``paper`` connects layer i = 1.. where ``i % (S + 1) == 0`` (Algorithm 1). For S = 3 they
            agree.
        embed_dim: E of the contrastive projections.
        temperature: start value of the learnable temperature.
    """

    vision: VisionConfig
    text: TextConfig = field(default_factory=TextConfig)
    text_layers: int = 6
    fusion_layers: int = 6
    decoder_layers: int = 12
    fusion: FusionKind = "skip"
    stride: int = 3
    skip_rule: SkipRule = "released"
    embed_dim: int = 256
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, not {self.stride}")
        if self.fusion not in get_args(FusionKind):
            raise ValueError(f"fusion must be one of {', '.join(get_args(FusionKind))}, not {self.fusion!r}")
        if self.skip_rule not in get_args(SkipRule):
            raise ValueError(f"skip_rule must be one of {', '.join(get_args(SkipRule))}, not {self.skip_rule!r}")

    def connected(self) -> tuple[bool, ...]:
        """Which fusion layers use connected attention."""
        layers = range(self.fusion_layers)
        if self.fusion == "connected":
            return tuple(True for _ in layers)
        if self.fusion != "skip":
            return tuple(False for _ in layers)
        if self.skip_rule == "released":
            return tuple(j != 0 and j % self.stride == 0 for j in layers)
        return tuple((j + 1) % (self.stride + 1) == 0 for j in layers)


class WidthBridge(nn.Module):
    """Brings image states to the text side's width (mPLUG-large, model_vqa_mplug.py:33)."""

    def __init__(self, vision_width: int, config: TextConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self, config.width)

    def forward(self, image_BNW: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(image_BNW)))


class AsymmetricLayer(nn.Module):
    """The text attends to itself, then to the image; the image is left as it is (paper section 2.2).

    Of a pair of images, the text attends to each with an attention of its own, and the mean of the two goes on (paper
    section 5.2.5, "as BLIP": salesforce/BLIP ``models/nlvr_encoder.py``, of which these are the lower six layers).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.block = config.block(cross=True)

    def forward(
        self,
        image: Encoded,
        text: Encoded,
        image_rows_B: Tensor | None,
        second: tuple[Encoded, Attention] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``second`` is the other image of a pair, and the attention to it."""
        memory: Tensor | Memory = image.hidden_BLD
        if image_rows_B is not None:  # keys and values once an image, however many texts it meets
            memory = self.block.remember(image).select(image_rows_B)
        return image.hidden_BLD, self.block(text.hidden_BLD, text.mask_BL, memory, image.mask_BL, second=second)


class ConnectedLayer(nn.Module):
    """One self-attention over ``[image; text]`` (paper equations 4 and 5).

    ``summed_skip`` adds the image stream from before the layer to its result without a norm, as the released
    network does (modeling_mplug.py:679-681); the paper's equations do not have it.
    """

    def __init__(self, config: TextConfig, *, summed_skip: bool) -> None:
        super().__init__()
        self.block = config.block(cross=False)
        self.summed_skip = summed_skip

    def forward(self, image: Encoded, text: Encoded) -> tuple[Tensor, Tensor]:
        joint = Encoded.join(image, text)
        joint_BMD = self.block(joint.hidden_BLD, joint.mask_BL)
        image_BND, text_BLD = joint_BMD.split([image.hidden_BLD.shape[1], text.hidden_BLD.shape[1]], dim=1)
        return (image.hidden_BLD + image_BND if self.summed_skip else image_BND), text_BLD


class FusionNetwork(nn.Module):
    """A stack of fusion layers, for any kind of fusion the paper compares."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self._layer(config, connected) for connected in config.connected())
        self.checkpointing = False
        init_weights(self, config.text.width)

    @staticmethod
    def _layer(config: MPlugConfig, connected: bool) -> nn.Module:
        if config.fusion == "co_attention":
            return CoAttentionLayer(config.text)
        if connected:
            return ConnectedLayer(config.text, summed_skip=config.fusion == "skip")
        return AsymmetricLayer(config.text)

    def forward(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Fused:
        """Fuse row b of the text with row b of the image, or with row ``image_rows_B[b]`` of it."""
        for layer in self.layers:
            if isinstance(layer, ConnectedLayer):  # the text changes its image, so each needs a copy
                if image_rows_B is not None:
                    image, image_rows_B = image.rows(image_rows_B), None
                image_BND, text_BLD = run_block(layer, image, text, checkpointing=self.checkpointing)
            else:
                image_BND, text_BLD = run_block(layer, image, text, image_rows_B, checkpointing=self.checkpointing)
                if isinstance(layer, CoAttentionLayer):
                    image_rows_B = None
            image, text = Encoded(image_BND, image.mask_BL), Encoded(text_BLD, text.mask_BL)
        if image_rows_B is not None:
            image = image.rows(image_rows_B)
        return Fused(image.hidden_BLD, text.hidden_BLD, text.hidden_BLD[:, 0], image.mask_BL, text.mask_BL)

    def pair_attention(self) -> nn.ModuleList:
        """A copy of each asymmetric layer's cross-attention."""
        if any(isinstance(layer, CoAttentionLayer) for layer in self.layers):
            raise ValueError("co-attention takes one picture: fuse a text with each by itself")
        blocks = [layer.block for layer in self.layers if isinstance(layer, AsymmetricLayer)]
        copies = [copy.deepcopy(block.cross_attention) for block in blocks if block.cross_attention is not None]
        return nn.ModuleList(copies).requires_grad_(True)

    def fuse_pair(self, first: Encoded, second: Encoded, text: Encoded, attention: nn.ModuleList) -> Fused:
        """Fuse each text with two images.

        The paper does not say what a connected layer does with two; here it is one self-attention over
        ``[first; second; text]``.
        """
        attentions = iter(attention)
        split = [first.hidden_BLD.shape[1], second.hidden_BLD.shape[1]]
        for layer in self.layers:
            if isinstance(layer, AsymmetricLayer):
                other = (second, next(attentions))
                _, text_BLD = run_block(layer, first, text, None, other, checkpointing=self.checkpointing)
            else:
                both = Encoded.join(first, second)
                both_BND, text_BLD = run_block(layer, both, text, checkpointing=self.checkpointing)
                first_BND, second_BND = both_BND.split(split, dim=1)
                first, second = Encoded(first_BND, first.mask_BL), Encoded(second_BND, second.mask_BL)
            text = Encoded(text_BLD, text.mask_BL)
        both = Encoded.join(first, second)
        return Fused(both.hidden_BLD, text.hidden_BLD, text.hidden_BLD[:, 0], both.mask_BL, text.mask_BL)


class MPlug(VisionLanguageModel):
    """Vision Transformer, text encoder, skip-connected fusion, and a decoder on any encoded or fused state."""

    model_type: ClassVar[str] = "mplug"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "image": ("vision", "bridge"),
        "text": ("text",),
        "fusion": ("fusion",),
        "embedding": ("image_projection", "text_projection", "temperature"),
        "matching": ("match_head",),
        "masked": ("masked_head",),
        "decoder": ("decoder",),
    }

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        self.config = config
        text, vision = config.text, config.vision
        self.width = self.pooled_width = text.width
        self.embed_dim = config.embed_dim
        self.max_text, self.patch = text.max_positions, vision.patch
        self.vision = VisionTransformer(vision)
        self.bridge = WidthBridge(vision.width, text) if vision.width != text.width else nn.Identity()
        self.text = TextEncoder(text, config.text_layers)
        self.fusion = FusionNetwork(config)
        self.decoder = TextDecoder(text, config.decoder_layers)
        self.image_projection = nn.Linear(text.width, config.embed_dim)
        self.text_projection = nn.Linear(text.width, config.embed_dim)
        self.match_head = nn.Linear(text.width, 2)
        self.masked_head = MaskedLanguageHead(text)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        for head in (self.image_projection, self.text_projection, self.match_head):
            init_weights(head, text.width)

    def resize_images(self, image_size: int) -> None:
        self.vision.resize(image_size)
        self.config = replace(self.config, vision=self.vision.config)

    def encode_picture(self, pixels_BCHW: Tensor) -> Encoded:
        """[B, 3, H, W] normalised pixels to [B, N, D]."""
        return Encoded(self.bridge(self.vision(pixels_BCHW)))

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Encoded:
        """[B, L] ids, ``[CLS] words`` (official convention: no ``[SEP]``), to [B, L, D]."""
        return Encoded(self.text(ids_BL, mask_BL), mask_BL)

    def embed_picture(self, image: Encoded) -> Tensor:
        return F.normalize(self.image_projection(image.hidden_BLD[:, 0]), dim=-1)

    def embed_text(self, text: Encoded) -> Tensor:
        return F.normalize(self.text_projection(text.hidden_BLD[:, 0]), dim=-1)

    def fuse(self, image: Encoded, text: Encoded, image_rows_B: Tensor | None = None) -> Fused:
        return self.fusion(image, text, image_rows_B)

    def for_fused_image(self) -> Sequence[nn.Module]:
        return [layer.image_block for layer in self.fusion.layers[-1:] if isinstance(layer, CoAttentionLayer)]

    def pair_attention(self) -> nn.ModuleList:
        return self.fusion.pair_attention()

    def fuse_pair(self, first: Encoded, second: Encoded, text: Encoded, attention: nn.ModuleList) -> Fused:
        return self.fusion.fuse_pair(first, second, text, attention)

    def match_logits(self, pooled_BP: Tensor) -> Tensor:
        return self.match_head(pooled_BP)

    def masked_logits(self, text_XD: Tensor) -> Tensor:
        return self.masked_head(text_XD)


_BASE_VISION = VisionConfig(width=768, layers=12, heads=12, patch=16, image_size=256, attention_dropout=0.1)
_LARGE_VISION = VisionConfig(width=1024, layers=24, heads=16, patch=14, image_size=224, attention_dropout=0.1)
_SMALL_TEXT = TextConfig(
    vocab_size=4096,
    width=256,
    heads=4,
    ffn=1024,
    max_positions=128,
    dropout=0.0,
    attention_dropout=0.0,
    activation="quick_gelu",  # on a CPU GELU and its gradient took 12 % of a step, random numbers for dropout as much
)
_TINY_TEXT = replace(_SMALL_TEXT, vocab_size=256, width=128, heads=2, ffn=512, max_positions=64)

SIZES: dict[str, MPlugConfig] = {
    "tiny": MPlugConfig(
        VisionConfig(width=128, layers=4, heads=2, patch=16, image_size=48, stem="convolution"),
        _TINY_TEXT,
        text_layers=2,
        fusion_layers=3,
        decoder_layers=2,
        stride=2,
        embed_dim=64,
    ),
    "small": MPlugConfig(
        VisionConfig(width=256, layers=4, heads=4, patch=16, image_size=96, stem="convolution"),
        _SMALL_TEXT,
        text_layers=2,
        fusion_layers=3,
        decoder_layers=2,
        stride=2,
        embed_dim=128,
    ),
    "base": MPlugConfig(_BASE_VISION),
    "large": MPlugConfig(_LARGE_VISION, stride=6),
}
"""Published sizes (``base``: ViT-B/16 and S = 3, ``large``: ViT-L/14 and S = 6) and two that train on a CPU."""
