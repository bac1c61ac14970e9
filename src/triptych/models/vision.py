"""The CLIP vision Transformer.

Shape legend: B batch, C channels, H height, W width, N image tokens (class token first), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.models.layers import Activation, PreNormBlock, init_weights, run_block


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision Transformer.

    Attributes:
        image_size: pixels of a side, a multiple of ``patch``; sets the size of the position table.
        attention_dropout: mPLUG's code trains with 0.1 here, OpenAI's with 0.
    """

    width: int
    layers: int
    heads: int
    patch: int
    image_size: int
    activation: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")

    @property
    def tokens(self) -> int:
        """N: patches and the class token."""
        return (self.image_size // self.patch) ** 2 + 1


class VisionTransformer(nn.Module):
    """Pixels to one state a patch, class token first; ``ln_post`` on every token, no projection.

    Source: openai/CLIP ``clip/model.py`` VisionTransformer, used as X-PLUG/mPLUG ``models/clip/model.py:212-250``.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.patch_embedding = nn.Conv2d(3, D, config.patch, stride=config.patch, bias=False)
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
        init_weights(self)
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
        patch = self.config.patch
        height, width = pixels_BCHW.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"image of {height} x {width} pixels: both sides must be multiples of the patch, {patch}")
        x_BND = self.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(x_BND.dtype).expand(len(x_BND), 1, -1)
        position_ND = resize_positions(self.position_embedding, (height // patch, width // patch))
        x_BND = torch.cat([class_B1D, x_BND], dim=1) + position_ND
        x_BND = self.pre_norm(x_BND)
        for block in self.blocks:
            x_BND = run_block(block, x_BND, checkpointing=self.checkpointing)
        return self.post_norm(x_BND)


def resize_positions(table_ND: Tensor, grid: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Interpolate a position table (class token first, then a square grid) to another grid of patches.

    mPLUG uses bilinear (``models/vit.py:208-225``), BridgeTower and EVE bicubic. Equal grids return the table itself.
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
