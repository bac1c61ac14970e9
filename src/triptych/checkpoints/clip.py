"""CLIP's image encoder, from OpenAI's files (``--from clip``) or transformers' (``--from clip-hf``)."""

from __future__ import annotations

from pathlib import Path

from triptych.checkpoints.bert import count, heads_of
from triptych.checkpoints.beside import Beside
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.families import expect
from triptych.checkpoints.mapping import (
    NameMap,
    Rule,
    concatenate,
    convert_tensors,
    linear,
    positions,
    rename,
    split,
)
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors
from triptych.data.transforms import Preprocessing
from triptych.models.layers import Activation
from triptych.models.vision import Interpolation, VisionConfig, VisionTransformer

OPTIONS = frozenset({"image_size", "vision_heads", "activation", "allow_missing", "allow_unexpected"})
_TEXT_TOWER = "CLIP's text tower, unused"


def convert_clip(source: Path, tensors: Tensors, options: Options) -> Converted:
    """OpenAI's state dict or TorchScript archive."""
    expect("OpenAI's CLIP", ["visual.conv1.weight", "visual.class_embedding"], tensors, source)
    config, notes = vision_config(
        tensors,
        source,
        options,
        class_embedding="visual.class_embedding",
        patches="visual.conv1.weight",
        table="visual.positional_embedding",
        layers="visual.transformer.resblocks.",
    )
    names = NameMap(openai_vision("", "visual.", config))
    names.drop("CLIP's projection, unused", "visual.proj")
    names.drop(
        _TEXT_TOWER,
        "transformer.*",
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.*",
        "text_projection",
        "logit_scale",
    )
    names.drop("a constant", "input_resolution", "context_length", "vocab_size", "attn_mask")
    return _convert(source, tensors, names, config, notes, options)


def convert_clip_hf(source: Path, tensors: Tensors, options: Options) -> Converted:
    """transformers' CLIPModel or CLIPVisionModel."""
    expect("transformers' CLIP", ["vision_model.embeddings."], tensors, source)
    vision, beside = "vision_model.", Beside(source, "config.json")
    config, notes = vision_config(
        tensors,
        source,
        options,
        class_embedding=f"{vision}embeddings.class_embedding",
        patches=f"{vision}embeddings.patch_embedding.weight",
        table=f"{vision}embeddings.position_embedding.weight",
        layers=f"{vision}encoder.layers.",
        beside=beside.part("vision_config") if "vision_config" in beside else beside,
    )
    names = NameMap(_transformers_vision(vision, config))
    names.drop("a constant", "*.position_ids")
    names.drop("CLIP's projection, unused", "visual_projection.weight")
    names.drop(_TEXT_TOWER, "text_model.*", "text_projection.weight", "logit_scale")
    return _convert(source, tensors, names, config, notes, options)


def openai_vision(target: str, source: str, config: VisionConfig) -> list[Rule]:
    """OpenAI's names below ``source`` (``visual.``) to a VisionTransformer's below ``target``."""
    rules = [
        rename(f"{target}patch_embedding.weight", f"{source}conv1.weight"),
        rename(f"{target}class_embedding", f"{source}class_embedding"),
        positions(
            f"{target}position_embedding",
            f"{source}positional_embedding",
            config.image_size // config.patch,
            config.interpolation,
        ),
        *linear(f"{target}pre_norm", f"{source}ln_pre"),
        *linear(f"{target}post_norm", f"{source}ln_post"),
    ]
    for i in range(config.layers):
        ours, theirs = f"{target}blocks.{i}", f"{source}transformer.resblocks.{i}"
        for part in ("weight", "bias"):
            query, key_value = f"{ours}.attention.query.{part}", f"{ours}.attention.key_value.{part}"
            rules.append(split(f"{theirs}.attn.in_proj_{part}", (query, 1), (key_value, 2)))
        rules += linear(f"{ours}.attention.out", f"{theirs}.attn.out_proj")
        rules += linear(f"{ours}.attention_norm", f"{theirs}.ln_1")
        rules += linear(f"{ours}.ffn.expand", f"{theirs}.mlp.c_fc")
        rules += linear(f"{ours}.ffn.contract", f"{theirs}.mlp.c_proj")
        rules += linear(f"{ours}.ffn_norm", f"{theirs}.ln_2")
    return rules


def _transformers_vision(source: str, config: VisionConfig) -> list[Rule]:
    rules = [
        rename("patch_embedding.weight", f"{source}embeddings.patch_embedding.weight"),
        rename("class_embedding", f"{source}embeddings.class_embedding"),
        positions(
            "position_embedding",
            f"{source}embeddings.position_embedding.weight",
            config.image_size // config.patch,
        ),
        *linear("pre_norm", f"{source}pre_layrnorm"),  # their spelling
        *linear("post_norm", f"{source}post_layernorm"),
    ]
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}", f"{source}encoder.layers.{i}"
        for part in ("weight", "bias"):
            key, value = f"{theirs}.self_attn.k_proj.{part}", f"{theirs}.self_attn.v_proj.{part}"
            rules.append(concatenate(f"{ours}.attention.key_value.{part}", key, value))
        rules += linear(f"{ours}.attention.query", f"{theirs}.self_attn.q_proj")
        rules += linear(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj")
        rules += linear(f"{ours}.attention_norm", f"{theirs}.layer_norm1")
        rules += linear(f"{ours}.ffn.expand", f"{theirs}.mlp.fc1")
        rules += linear(f"{ours}.ffn.contract", f"{theirs}.mlp.fc2")
        rules += linear(f"{ours}.ffn_norm", f"{theirs}.layer_norm2")
    return rules


def vision_config(
    tensors: Tensors,
    source: Path,
    options: Options,
    *,
    class_embedding: str,
    patches: str,
    table: str,
    layers: str,
    beside: Beside | None = None,
    attention_dropout: float = 0.0,
    interpolation: Interpolation = "bilinear",
) -> tuple[VisionConfig, list[str]]:
    """Sizes of a CLIP image encoder, read from the tensors of these names, and what had to be assumed."""
    for name, dimensions in ((class_embedding, 1), (patches, 4), (table, 2)):
        if name not in tensors:
            raise CheckpointError(source, f"has no {name}, from which the sizes are read")
        if tensors[name].dim() != dimensions or 0 in tensors[name].shape:
            raise CheckpointError(source, f"{name} has the odd shape {list(tensors[name].shape)}")
    width, patch = tensors[class_embedding].shape[0], tensors[patches].shape[-1]
    side = round((tensors[table].shape[0] - 1) ** 0.5)
    file_size = side * patch
    if side * side + 1 != tensors[table].shape[0]:
        raise CheckpointError(source, f"{table} is not a class token and a square grid")
    notes = []
    heads = options.vision_heads or (beside.integer("num_attention_heads", "heads") if beside else None)
    if heads is None:
        heads = heads_of(width, "vision", source)
        notes.append(f"{heads} attention heads in the image encoder, assumed from width {width} / 64")
    image_size = options.image_size or file_size
    if image_size != file_size:
        notes.append(f"position table resized from {file_size} to {image_size} pixels ({interpolation})")
    eps = beside.number("layer_norm_eps") if beside else None
    try:
        config = VisionConfig(
            width=width,
            layers=count(tensors, layers),
            heads=heads,
            patch=patch,
            image_size=image_size,
            activation=options.activation or _activation(beside, source),
            layer_norm_eps=1e-5 if eps is None else eps,
            attention_dropout=attention_dropout,
            interpolation=interpolation,
        )
    except ValueError as error:
        raise CheckpointError(source, str(error)) from error
    return config, notes


def _activation(beside: Beside | None, source: Path) -> Activation:
    match beside.text("hidden_act", "activation") if beside else None:
        case None | "quick_gelu":
            return "quick_gelu"
        case "gelu":
            return "gelu"
        case other:
            raise CheckpointError(source, f"its layers use {other!r}; only gelu and quick_gelu are supported")


def _convert(
    source: Path,
    tensors: Tensors,
    names: NameMap,
    config: VisionConfig,
    notes: list[str],
    options: Options,
) -> Converted:
    def build() -> VisionTransformer:
        return VisionTransformer(config)

    state, report = convert_tensors(
        tensors,
        names,
        shapes_of(build, source),
        source,
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    report.notes += notes
    preprocessing = Preprocessing(image_size=config.image_size, resize="crop")
    return Converted(build_with(build, state), report, preprocessing)
