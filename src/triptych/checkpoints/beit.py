"""BEiT-2 (``--from beit2``), which an EVE starts from: microsoft/unilm ``beit2``, also BEiT's and timm's files.

Only what an EVE takes is read: the blocks, the patch embedding, the class token and the last norm. Positions are not:
BEiT's are relative, EVE's are absolute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from triptych.checkpoints.bert import count, heads_of, table
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.families import expect
from triptych.checkpoints.mapping import NameMap, Rule, convert_tensors, linear, rename, split
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors
from triptych.models.eve import EveBlock, EveConfig
from triptych.models.layers import Activation
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig

OPTIONS = frozenset({"vision_heads", "activation", "allow_missing", "allow_unexpected"})

_RELATIVE = "relative_position_bias_table"
_STARTS = (
    "an EVE that starts from it has the attention, norms, factors, patch embedding and class token of this file; each "
    "block's feed-forward network as that for images, as that for texts and as every expert; and words, positions, "
    "types, routers and heads of its own, fresh"
)


@dataclass(frozen=True)
class BeitConfig:
    """A BEiT-2 to initialise an EVE from.

    Attributes:
        ffn: hidden width of the feed-forward networks.
        norm: whether it comes with a norm of every token after the last block; a classifier that reads the mean of the
            patches has none.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    patch: int
    activation: Activation = "gelu"
    layer_norm_eps: float = 1e-6
    norm: bool = True


class Beit(nn.Module):
    """A BEiT-2 without positions: an EVE takes over its parts, by itself it computes nothing."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        D, patch = config.width, config.patch
        vision = VisionConfig(
            D, config.layers, config.heads, patch, patch, config.activation, layer_norm_eps=config.layer_norm_eps
        )
        like = EveConfig(vision, TextConfig(width=D, ffn=config.ffn), deep_layers=0, shallow="shared")
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=patch, stride=patch)
        self.class_embedding = nn.Parameter(torch.zeros(D))
        self.blocks = nn.ModuleList(EveBlock(like, "shared", like.moe, 0.0) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps) if config.norm else None


def convert_beit(source: Path, tensors: Tensors, options: Options) -> Converted:
    """A pre-trained BEiT-2, or one fine-tuned to classify, to a :class:`Beit`."""
    required = ["patch_embed.proj.", "cls_token", "blocks.0.attn.q_bias", "blocks.0.gamma_1"]
    expect("a BEiT-2", required, tensors, source)
    config, notes = _infer_config(tensors, source, options)
    names = NameMap()
    names.add(linear("patch_embedding", "patch_embed.proj"), Rule(("class_embedding",), ("cls_token",), _one_vector))
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"blocks.{i}"
        names.add(block(ours, theirs), feed_forward(f"{ours}.ffn", f"{theirs}.norm2", f"{theirs}.mlp"))
    if config.norm:
        names.add(linear("norm", "norm"))
    names.drop("relative positions, of which an EVE has none", "rel_pos_bias.*", "blocks.*.attn.relative_position_*")
    names.drop("positions: those of an EVE are its own", "pos_embed")
    names.drop("the norm of the mean over patches, which an EVE never takes", "fc_norm.*")
    names.drop("a classifier of pictures", "head.*")
    names.drop("a classifier of visual tokens", "lm_head.*")
    names.drop("the mask token of BEiT's pre-training", "mask_token")
    names.drop("run in BEiT's pre-training alone", "cls_pt_layers.*", "cls_pt_norm.*", "cls_pt_lm_head.*")

    def build() -> Beit:
        return Beit(config)

    state, report = convert_tensors(
        tensors,
        names,
        shapes_of(build, source),
        source,
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    report.notes += notes
    return Converted(build_with(build, state), report)


def block(target: str, source: str) -> list[Rule]:
    """What every block of a BEiT-2 or an EVE has, whatever its feed-forward networks."""
    attention, theirs = f"{target}.attention", f"{source}.attn"
    return [
        split(f"{theirs}.qkv.weight", (f"{attention}.query.weight", 1), (f"{attention}.key_value.weight", 2)),
        rename(f"{attention}.query.bias", f"{theirs}.q_bias"),
        rename(f"{attention}.value_bias", f"{theirs}.v_bias"),
        *linear(f"{attention}.out", f"{theirs}.proj"),
        *linear(f"{target}.attention_norm", f"{source}.norm1"),
        rename(f"{target}.attention_scale", f"{source}.gamma_1"),
        rename(f"{target}.ffn_scale", f"{source}.gamma_2"),
    ]


def feed_forward(target: str, norm: str, network: str) -> list[Rule]:
    """A norm and the two linear layers after it."""
    return [
        *linear(f"{target}.norm", norm),
        *linear(f"{target}.ffn.expand", f"{network}.fc1"),
        *linear(f"{target}.ffn.contract", f"{network}.fc2"),
    ]


def _one_vector(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[0].reshape(-1)]


def _infer_config(tensors: Tensors, source: Path, options: Options) -> tuple[BeitConfig, list[str]]:
    """Sizes, from the tensors and the options; and notes on what was assumed."""
    patches = tensors.get("patch_embed.proj.weight")
    if patches is None or patches.dim() != 4 or 0 in patches.shape:
        raise CheckpointError(source, "has no patch_embed.proj.weight of four dimensions, from which sizes are read")
    width, patch = patches.shape[0], patches.shape[-1]
    ffn, _ = table(tensors, "blocks.0.mlp.fc1.weight", source)
    notes = [_STARTS]
    relative = next((tensor for name, tensor in tensors.items() if name.endswith(_RELATIVE)), None)
    heads = options.vision_heads
    if heads is None and relative is not None and relative.dim() == 2:
        heads = relative.shape[1]
    if heads is None:
        heads = heads_of(width, "vision", source)
        notes.append(f"{heads} attention heads, assumed from width {width} / 64")
    norm = "norm.weight" in tensors
    if not norm:
        notes.append("no norm of every token in the file: an EVE's last norm starts fresh")
    layers, activation = count(tensors, "blocks."), options.activation or "gelu"
    return BeitConfig(width, layers, heads, ffn, patch, activation, norm=norm), notes
