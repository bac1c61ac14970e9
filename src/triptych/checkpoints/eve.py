"""EVE's own files: ``--from eve`` (ssyze/EVE, ``{"model": state_dict}``).

All of them have the backbone; fine-tuned ones also the head of their task (:mod:`triptych.checkpoints.eve_heads`). The
pre-training's heads are of code that was never released: what they are called, nobody outside knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from triptych.checkpoints.beit import block, feed_forward
from triptych.checkpoints.bert import table
from triptych.checkpoints.beside import Beside
from triptych.checkpoints.bridgetower import note_absent
from triptych.checkpoints.bridgetower_heads import OWN, TaskHead
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.clip import vision_config
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.eve_heads import (
    FINE_TUNED,
    BiAttention,
    contrastive_width,
    find_head,
    ranking_rules,
    retrieval_task,
)
from triptych.checkpoints.families import expect
from triptych.checkpoints.mapping import NameMap, Report, convert_tensors, linear, positions, rename, stack
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.eve import Eve, EveConfig, RouterKind
from triptych.models.moe import MoEConfig
from triptych.models.text import TextConfig

OPTIONS = frozenset(
    {"image_size", "vision_heads", "activation", "allow_missing", "allow_unexpected", "answers", "vocab"}
)

_LAYERS = "backbone.encoder.layers."
_AS_RELEASED = (
    "as in the released code experts see the vector of the modality, and padding is routed and counted "
    "(modality_into_experts, route_padding)",
    "as in the paper, and not in the released code, no token is dropped and no noise chooses the second expert",
)
_UNPOSITIONED = (
    "as in the released code visible patches of a masked picture have no positions (unpositioned_patches); it matters "
    "only where pre-training goes on"
)


def convert_eve(source: Path, tensors: Tensors, options: Options) -> Converted:
    """An official pre-trained or fine-tuned file."""
    required = ["backbone.patch_embed.", "backbone.word_embedding.", f"{_LAYERS}0."]
    expect("an official EVE checkpoint", required, tensors, source)
    config, notes = infer_config(tensors, source, options)
    head, left = find_head(tensors, config.vision.width, config.vision.heads, options.answers, source)
    if options.answers is not None and (head is None or head.task != "vqa"):
        raise CheckpointError(source, "--answers is for a file fine-tuned for questions, which this one is not")
    state, report = eve_state(
        tensors,
        config,
        source,
        head,
        left,
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    report.notes += notes
    own = {name.removeprefix(OWN): tensor for name, tensor in state.items() if name.startswith(OWN)}
    network = {name: tensor for name, tensor in state.items() if not name.startswith(OWN)}
    return Converted(
        build_with(lambda: Eve(config), network),
        report,
        Preprocessing(config.vision.image_size, mean=HALF, std=HALF),  # dataset/__init__.py
        config.text.vocab_size,
        task=head.description if head else retrieval_task(tensors),
        task_state=own,
    )


def eve_state(
    tensors: Tensors,
    config: EveConfig,
    source: str | Path,
    head: TaskHead | BiAttention | None = None,
    left: dict[str, str] | None = None,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[Tensors, Report]:
    """The tensors of an :class:`Eve` of these sizes, and of a task's head, from official ones.

    Args:
        left: what is left out of a head, and why.
    """
    names = eve_names(config)
    ranking, unused = ranking_rules(tensors)
    names.add(ranking)
    shapes = shapes_of(lambda: Eve(config), source)
    if head is not None:
        names.add(head.rules())
        shapes |= head.shapes(source)
    for name, reason in (left or {}).items():
        names.drop(reason, f"{name}.*")
    names.drop("another head for the same, which fine-tuning never runs", *unused)
    names.drop("a constant", "backbone.position_ids_*")
    names.drop("the mask token of token targets, which are not offered", "backbone.mask_embed_vision")
    if not any(name.startswith(FINE_TUNED) for name in tensors):
        reason = "of the pre-training, whose code was not released: nothing says what it computes"
        names.drop(reason, *(name for name in tensors if not name.startswith("backbone.")))
    filled = {rule.targets[0].split(".")[0] for rule in ranking}
    heads = {"masked_head", "match_head", "image_projection", "text_projection", "temperature"} - filled
    state, report = convert_tensors(
        tensors,
        names,
        shapes,
        source,
        allow_missing=(*allow_missing, *(glob for name in sorted(heads) for glob in (name, f"{name}.*"))),
        allow_unexpected=allow_unexpected,
    )
    report.notes += note_absent(report)
    return state, report


def eve_names(config: EveConfig) -> NameMap:
    """Where every tensor of an EVE's backbone comes from."""
    names = NameMap()
    vision = config.vision
    for part, official in (("image", "vision"), ("text", "text")):
        names.add(rename(f"{part}_embeddings.token_type", f"backbone.type_embed_{official}"))
    names.add(
        linear("image_embeddings.patch_embedding", "backbone.patch_embed"),
        rename("image_embeddings.class_embedding", "backbone.class_embedding_vision"),
        positions(
            "image_embeddings.position_embedding",
            "backbone.pos_embed_vision",
            vision.image_size // vision.patch,
            vision.interpolation,
        ),
        rename("text_embeddings.word.weight", "backbone.word_embedding.weight"),
        linear("text_embeddings.norm", "backbone.layer_norm_text"),
        rename("text_embeddings.position_embedding", "backbone.pos_embed_text"),
        linear("network.pre_norm", "backbone.pre_layrnorm"),  # their spelling
        linear("network.norm", "backbone.norm"),
    )
    for i, kind in enumerate(config.kinds()):
        ours, theirs = f"network.blocks.{i}", f"{_LAYERS}{i}"
        names.add(block(ours, theirs))
        if kind == "soft":
            _add_mixture(names, f"{ours}.ffn", theirs, config.moe)
        elif kind == "shared":
            names.add(feed_forward(f"{ours}.ffn", f"{theirs}.norm2_imag", f"{theirs}.mlp_imag"))
        else:
            names.add(feed_forward(f"{ours}.ffn.image", f"{theirs}.norm2_imag", f"{theirs}.mlp_imag"))
            names.add(feed_forward(f"{ours}.ffn.text", f"{theirs}.norm2_text", f"{theirs}.mlp_text"))
    return names


def _add_mixture(names: NameMap, ours: str, theirs: str, moe: MoEConfig) -> None:
    """The norm, the router and the experts, which are one tensor of each kind here."""
    mixture = f"{theirs}.mlp_moe.moe"
    names.add(linear(f"{ours}.norm", f"{theirs}.norm2_vl"))
    names.add(rename(f"{ours}.moe.router.gate.weight", f"{mixture}.gate.wg.weight"))
    if moe.modality_routing:
        names.add(stack(f"{ours}.moe.router.modality", f"{mixture}.vision_embed", f"{mixture}.text_embed"))
    for layer, part in (("fc1", "expand"), ("fc2", "contract")):
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            sources = [f"{mixture}.experts.experts.{e}.{layer}.{kind}" for e in range(moe.experts)]
            names.add(stack(f"{ours}.moe.experts.{part}{ending}", *sources))


def infer_config(tensors: Tensors, source: Path, options: Options) -> tuple[EveConfig, list[str]]:
    """Sizes, from the tensors, the options and a config.json beside the file; and notes on what was assumed."""
    if "backbone.encoder.relative_position_bias_table" in tensors:
        raise CheckpointError(source, "it has relative positions, which this network (and no published one) has not")
    beside = Beside(source, "config.json")
    vision, notes = vision_config(
        tensors,
        source,
        options,
        class_embedding="backbone.class_embedding_vision",
        patches="backbone.patch_embed.weight",
        table="backbone.pos_embed_vision",
        layers=_LAYERS,
        beside=beside,
        interpolation="bicubic",
    )
    eps = beside.number("layer_norm_eps")
    vision = replace(vision, layer_norm_eps=1e-6 if eps is None else eps)
    shallow, deep_layers = _routers(tensors, vision.layers, source)
    vocab_size, width = table(tensors, "backbone.word_embedding.weight", source)
    max_positions, _ = table(tensors, "backbone.pos_embed_text", source)
    first = f"{_LAYERS}0.mlp_imag" if deep_layers < vision.layers else f"{_LAYERS}0.mlp_moe.moe.experts.experts.0"
    ffn, _ = table(tensors, f"{first}.fc1.weight", source)
    text = TextConfig(
        vocab_size,
        width,
        vision.heads,
        ffn,
        max_positions,
        vision.layer_norm_eps,
        attention_dropout=0.0,
        activation=vision.activation,
    )
    moe = MoEConfig()
    if deep_layers:
        moe = _mixture(tensors, vision.layers - deep_layers, source)
        notes.append(f"{moe.top_k} experts a token, as the released gate always chooses (no tensor tells)")
        notes += _AS_RELEASED
    notes.append(_UNPOSITIONED)
    drop_path = beside.number("drop_path_rate")
    try:
        config = EveConfig(
            vision,
            text,
            deep_layers,
            shallow,
            moe=moe,
            drop_path=EveConfig.drop_path if drop_path is None else drop_path,
            embed_dim=contrastive_width(tensors, width, source),
            unpositioned_patches=True,
        )
    except ValueError as error:
        raise CheckpointError(source, str(error)) from error
    return config, notes


def _mixture(tensors: Tensors, layer: int, source: Path) -> MoEConfig:
    """Sizes of the mixtures, read from that of one layer, with what the released code does."""
    mixture = f"{_LAYERS}{layer}.mlp_moe.moe"
    experts, _ = table(tensors, f"{mixture}.gate.wg.weight", source)
    by_modality = f"{mixture}.vision_embed" in tensors or f"{mixture}.text_embed" in tensors
    return MoEConfig(
        experts,
        min(2, experts),
        modality_routing=by_modality,
        modality_into_experts=by_modality,
        route_padding=True,
    )


def _routers(tensors: Tensors, layers: int, source: Path) -> tuple[RouterKind, int]:
    """What the lower blocks have for feed-forward, and how many above them have a soft router."""
    kinds = [_router(tensors, f"{_LAYERS}{i}.", source) for i in range(layers)]
    deep = kinds.count("soft")
    if "soft" in kinds[: layers - deep]:
        where = ", ".join(str(i) for i, kind in enumerate(kinds) if kind == "soft")
        raise CheckpointError(
            source, f"its blocks {where} have soft routers: here only the topmost blocks, next to each other, can"
        )
    lower = kinds[: layers - deep]
    if len(set(lower)) > 1:
        odd = next(i for i, kind in enumerate(lower) if kind != lower[0])
        raise CheckpointError(source, f"its block {odd} has another kind of feed-forward networks than block 0")
    return (lower[0] if lower else "hard"), deep


def _router(tensors: Tensors, prefix: str, source: Path) -> RouterKind:
    """The kind of one block, by what its tensors are called (``single_ffn`` and ``ffn_type`` of the released code)."""
    parts = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    if "mlp_vl" in parts:
        raise CheckpointError(source, f"{prefix}mlp_vl: a third network for pairs (ffn_type vl), which is not offered")
    if "mlp_moe" in parts and "norm2_imag" in parts:
        raise CheckpointError(source, f"{prefix}mlp_moe: routed experts in a lower block (single_ffn moe), not offered")
    if "mlp_moe" in parts:
        return "soft"
    return "hard" if "mlp_text" in parts else "shared"
