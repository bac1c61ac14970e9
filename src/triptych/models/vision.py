"""The CLIP vision Transformer.

Shape legend: B batch, C channels, H height, W width, N image tokens (class token first), D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.layers import Activation, PreNormBlock, init_weights, run_block

Stem = Literal["patch", "convolution"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision Transformer.

    Attributes:
        image_size: pixels of a side, a multiple of ``patch``; sets the size of the position table.
        attention_dropout: mPLUG's code trains with 0.1 here, OpenAI's with 0.
        stem: what makes a state of a patch: ``patch`` is one linear map, as published; ``convolution`` is three
            convolutions (:class:`ConvolutionStem`), which learn from fewer pictures.
        interpolation: of the position table for another resolution. mPLUG's is bilinear (``models/vit.py:208-225``),
            BridgeTower's and EVE's bicubic.
    """

    width: int
    layers: int
    heads: int
    patch: int
    image_size: int
    activation: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    stem: Stem = "patch"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.stem not in get_args(Stem):
            raise ValueError(f"stem must be one of {', '.join(get_args(Stem))}, not {self.stem!r}")
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise ValueError(f"interpolation must be one of {known}, not {self.interpolation!r}")
        if self.stem == "convolution" and self.patch % 4:
            raise ValueError(f"a convolution stem needs a patch that is a multiple of 4, not {self.patch}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")

    @property
    def tokens(self) -> int:
        """N: patches and the class token."""
        return (self.image_size // self.patch) ** 2 + 1


class ConvolutionStem(nn.Sequential):
    """[B, 3, H, W] to [B, D, H / patch, W / patch]: two strided convolutions, then one that takes a patch at a time.

    Source: Xiao et al. 2021, "Early Convolutions Help Transformers See Better". Not a part of any published checkpoint.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(
            nn.Conv2d(3, 32, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(64, width, kernel_size=patch // 4, stride=patch // 4),
        )

    def reset_parameters(self) -> None:
        """He's initialisation: the scale of the pixels reaches the last convolution."""
        for layer in self:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


class VisionTransformer(nn.Module):
    """Pixels to one state a patch, class token first; ``ln_post`` on every token, no projection.

    Source: openai/CLIP ``clip/model.py`` VisionTransformer, used as X-PLUG/mPLUG ``models/clip/model.py:212-250``.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.patch_embedding = (
            ConvolutionStem(D, config.patch)
            if config.stem == "convolution"
            else nn.Conv2d(3, D, config.patch, stride=config.patch, bias=False)
        )
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.position_embedding = nn.Parameter(torch.empty(config.tokens, D))
        self.pre_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(
            PreNormBlock(
                D,
                config.heads,
                4 * D,
                activation=config.activation,
                eps=config.layer_norm_eps,
                dropout=config.attention_dropout,
            )
            for _ in range(config.layers)
        )
        self.post_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initialisation: residual projections shrink with depth."""
        D, layers = self.config.width, self.config.layers
        init_weights(self, D)
        if isinstance(self.patch_embedding, ConvolutionStem):
            self.patch_embedding.reset_parameters()
        else:
            nn.init.normal_(self.patch_embedding.weight, std=(3 * self.config.patch**2) ** -0.5)
        nn.init.normal_(self.class_embedding, std=D**-0.5)
        nn.init.normal_(self.position_embedding, std=D**-0.5)
        for block in self.blocks:
            assert isinstance(block, PreNormBlock)
            nn.init.normal_(block.attention.query.weight, std=D**-0.5)
            nn.init.normal_(block.attention.key_value.weight, std=D**-0.5)
            nn.init.normal_(block.attention.out.weight, std=D**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.ffn.expand.weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.ffn.contract.weight, std=D**-0.5 * (2 * layers) ** -0.5)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] normalised pixels to [B, N, D]. Other resolutions than the table's interpolate it."""
        return self.levels(pixels_BCHW, 1)[0]

    def levels(self, pixels_BCHW: Tensor, count: int) -> list[Tensor]:
        """States [B, N, D] of the last ``count`` blocks, lowest first.

        ``ln_post`` is applied to each; what goes on to the next block is not normalised (microsoft/BridgeTower
        ``bt_module.py:453,498``).
        """
        patch = self.config.patch
        height, width = pixels_BCHW.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"image of {height} x {width} pixels: both sides must be multiples of the patch, {patch}")
        x_BND = self.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(x_BND.dtype).expand(len(x_BND), 1, -1)
        grid = (height // patch, width // patch)
        position_ND = resize_positions(self.position_embedding, grid, self.config.interpolation)
        x_BND = torch.cat([class_B1D, x_BND], dim=1) + position_ND
        x_BND = self.pre_norm(x_BND)
        levels = []
        for number, block in enumerate(self.blocks, start=1):
            x_BND = run_block(block, x_BND, checkpointing=self.checkpointing)
            if number > len(self.blocks) - count:
                levels.append(self.post_norm(x_BND))
        return levels

    def resize(self, image_size: int) -> None:
        """Interpolate the position table once and for all, for training at another resolution."""
        config = replace(self.config, image_size=image_size)
        side = image_size // config.patch
        table_ND = resize_positions(self.position_embedding.detach(), (side, side), config.interpolation)
        self.position_embedding = nn.Parameter(table_ND.clone())
        self.config = config


def resize_positions(table_ND: Tensor, grid: tuple[int, int], mode: Interpolation = "bilinear") -> Tensor:
    """Interpolate a position table (class token first, then a square grid) to another grid of patches.

    Equal grids return the table itself.
    """
    old = round((table_ND.shape[0] - 1) ** 0.5)
    if old * old != table_ND.shape[0] - 1:
        raise ValueError(f"a position table of {table_ND.shape[0]} rows is not a class token and a square grid")
    if grid == (old, old):
        return table_ND
    class_1D, patches_ND = table_ND[:1], table_ND[1:]
    image_1DHW = patches_ND.float().T.reshape(1, -1, old, old)
    image_1DHW = F.interpolate(image_1DHW, size=grid, mode=mode, align_corners=False)
    return torch.cat([class_1D, image_1DHW[0].flatten(1).T.to(table_ND.dtype)])
