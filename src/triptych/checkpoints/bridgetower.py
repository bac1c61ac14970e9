"""BridgeTower's and METER's own files: ``--from bridgetower`` (microsoft/BridgeTower, Lightning's ``.ckpt``).

Pre-trained files hold the matching and the masked-language head; fine-tuned ones the heads that their task runs: a
classifier, contrastive heads or a ranking head. The names of the network are also those of the port in transformers,
spelled differently (:mod:`triptych.checkpoints.bridgetower_hf`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoints.bert import count, embeddings, layer, table, text_config
from triptych.checkpoints.beside import Beside
from triptych.checkpoints.bridgetower_heads import OWN, TYPES, TaskHead, find_head
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.clip import openai_vision, vision_config
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.families import expect
from triptych.checkpoints.mapping import Dropped, NameMap, Report, Rule, convert_tensors, linear, rename
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors
from triptych.data.transforms import Preprocessing
from triptych.models.bridgetower import ROBERTA, BridgeTower, BridgeTowerConfig
from triptych.models.vision import VisionConfig
from triptych.tasks.retrieval import RetrievalConfig

OPTIONS = frozenset(
    {"image_size", "resize", "vision_heads", "text_heads", "allow_missing", "allow_unexpected", "answers", "vocab"}
)

HEADS = {
    "masked_head": "mlm_score.",
    "match_head": "itm_score.",
    "text_embedding": "itc_text_head.",
    "image_embedding": "itc_image_head.",
    "pair_embedding": "itc_cross_modal_head.",
}
"""Our heads of pre-training, and what their official names start with."""

_SIDES = ("image", "text")
_RANKING = "rank_output"


def convert_bridgetower(source: Path, tensors: Tensors, options: Options) -> Converted:
    """An official pre-trained or fine-tuned file, of BridgeTower or of METER, with CLIP and RoBERTa as encoders."""
    expect(
        "an official BridgeTower checkpoint with CLIP's image encoder",
        ["vit_model.visual.", "text_transformer.", "cross_modal_image_layers.", "cross_modal_text_layers."],
        tensors,
        source,
    )
    config, notes = infer_config(tensors, source, options)
    head, left = find_head(tensors, config.text.width, options.answers, source)
    if options.answers is not None and (head is None or head.task != "vqa"):
        raise CheckpointError(source, "--answers is for a file with vqa_classifier, which this one has not")
    state, report = bridgetower_state(
        tensors,
        config,
        source,
        head,
        left,
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    report.notes += notes
    if head is not None and head.task == "nlvr2":
        report.notes.append(
            "the type of the second picture is kept as a difference to the first's: equal but for rounding"
        )
    own = {name.removeprefix(OWN): tensor for name, tensor in state.items() if name.startswith(OWN)}
    network = {name: tensor for name, tensor in state.items() if not name.startswith(OWN)}
    return Converted(
        build_with(lambda: BridgeTower(config), network),
        report,
        _preprocessing(tensors, config, options),
        config.text.vocab_size,
        task=head.description if head else retrieval_task(tensors),
        task_state=own,
    )


def _preprocessing(names: Collection[str], config: BridgeTowerConfig, options: Options) -> Preprocessing:
    """Pre-training crops, fine-tuning squashes (spec of the official transforms ``clip`` and ``blip``)."""
    pretrained = "mlm_score.bias" in names and not any("_classifier." in name for name in names)
    return Preprocessing(config.vision.image_size, resize=options.resize or ("crop" if pretrained else "squash"))


def retrieval_task(names: Collection[str]) -> dict[str, Any]:
    """How to retrieve with a file: as official with contrastive heads; without, embeddings rank nothing.

    Of transformers' contrastive class, which need not have a matching head, embeddings alone rank then.
    """
    matching, contrastive = "itm_score.fc.weight" in names, "itc_text_head.fc.weight" in names
    if not (matching or contrastive):
        return {"recipe": "published, without a head"}  # it can do no task before it is fine-tuned
    candidates = (128 if matching else 0) if contrastive else None
    config = RetrievalConfig(candidates, shared_scores=contrastive, max_words=40, max_tokens=40)
    return {"retrieval": asdict(config)}


def bridgetower_state(
    tensors: Tensors,
    config: BridgeTowerConfig,
    source: str | Path,
    head: TaskHead | None = None,
    left: dict[str, str] | None = None,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[Tensors, Report]:
    """The tensors of a :class:`BridgeTower` of these sizes, and of a task's head, from official ones.

    Args:
        left: classifiers that are left out, and why.
    """
    names = bridgetower_names(config, len(tensors.get("text_transformer.embeddings.token_type_embeddings.weight", ())))
    names.add(rename("temperature", "temperature"))
    if f"{_RANKING}.weight" in tensors:
        names.rules = [rule for rule in names.rules if not rule.targets[0].startswith("match_head.")]
        names.add(_ranking("weight"), _ranking("bias"))
    shapes = shapes_of(lambda: BridgeTower(config), source)
    if head is not None:
        names.add(head.rules())
        shapes |= head.shapes(source)
    for name, reason in (left or {}).items():
        names.drop(reason, f"{name}.*")
    names.drop("CLIP's left-overs, never run", "vit_model.positional_embedding", "vit_model.ln_final.*")
    names.drop("RoBERTa's pooler, never run", "text_transformer.pooler.*")
    names.drop("a constant", "text_transformer.embeddings.position_ids", "text_transformer.embeddings.token_type_ids")
    names.drop(UNREAD, *unread_blocks(tensors, "vit_model.visual.transformer.resblocks.", config.vision.layers))
    absent = absent_heads(tensors)
    state, report = convert_tensors(
        tensors,
        names,
        shapes,
        source,
        allow_missing=(*allow_missing, *absent),
        allow_unexpected=allow_unexpected,
    )
    report.notes += note_absent(report)
    if len(tensors[TYPES]) > 2 and (head is None or head.task != "nlvr2"):
        shape = tuple(tensors[TYPES].shape)
        report.dropped.append(Dropped(TYPES, shape, "rows from 2 on: of the second picture of NLVR2"))
    if f"{_RANKING}.weight" in tensors:
        report.notes.append(
            "the ranking head, which fine-tuning for retrieval trains in place of the matching head's row for matches, "
            "is that row here: it ranks as officially, but its probabilities of a match mean nothing"
        )
    return state, report


UNREAD = "above the topmost layer that is read"


def unread_blocks(names: Iterable[str], prefix: str, layers: int) -> list[str]:
    """Globs of the blocks from ``layers`` on: both encoders are read by the depth of the text encoder."""
    return [f"{prefix}{number}.*" for number in range(layers, count(list(names), prefix))]


def absent_heads(names: Collection[str]) -> list[str]:
    """Globs of our names of those heads of which a file has nothing: no file has all."""
    return [f"{ours}.*" for ours, official in HEADS.items() if not any(name.startswith(official) for name in names)]


def note_absent(report: Report) -> list[str]:
    """What a report should say of heads that are not in the file."""
    heads = dict.fromkeys(entry.name.split(".")[0] for entry in report.missing)
    return [f"not in the file, so at their initial values: {', '.join(heads)}"] if heads else []


def _ranking(part: str) -> Rule:
    """The matching head with the trained row in place of that for matches."""
    reason = "row 1: fine-tuning for retrieval trained rank_output in its place"
    sources = (f"itm_score.fc.{part}", f"{_RANKING}.{part}")
    return Rule((f"match_head.{part}",), sources, lambda tensors: [torch.cat([tensors[0][:1], tensors[1]])], reason)


def bridgetower_names(config: BridgeTowerConfig, segments: int = 1) -> NameMap:
    """Where every tensor of a BridgeTower comes from, but for the temperature, by official names.

    Args:
        segments: rows of the text encoder's table of segments.
    """
    names = NameMap(openai_vision("vision.", "vit_model.visual.", config.vision))
    names.add(embeddings("text.embeddings", "text_transformer.embeddings", (), segments=segments))
    for i in range(config.text_layers):
        names.add(layer(f"text.blocks.{i}", f"text_transformer.encoder.layer.{i}", (), cross=False))
    names.add(Rule(("text_projection.token_type", "image_projection.token_type"), (TYPES,), _first_two))
    for side in _SIDES:
        _add_side(names, config, side)
    names.add(
        linear("masked_head.head.transform", "mlm_score.transform.dense"),
        linear("masked_head.head.norm", "mlm_score.transform.LayerNorm"),
        rename("masked_head.word.weight", "mlm_score.decoder.weight"),
        rename("masked_head.head.bias", "mlm_score.bias"),
        linear("match_head", "itm_score.fc"),
    )
    if config.contrast == "projected":
        names.add(linear("pair_embedding", "itc_cross_modal_head.fc"))
    return names


def _first_two(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The types of texts and of pictures; what a third row is for, the task NLVR2 knows."""
    return [tensors[0][0], tensors[0][1]]


def _add_side(names: NameMap, config: BridgeTowerConfig, side: str) -> None:
    """One side of the fusion, from its projection to its pooler, and the contrastive head."""
    official = f"cross_modal_{side}"
    names.add(linear(f"{side}_projection.linear", f"{official}_transform"))
    if config.gather_layers:
        names.add(linear(f"{side}_projection.gate", f"{side}_gate"))
    if config.bridges:
        names.add(linear(f"fusion.{side}_norm", f"{official}_layernorm"))
    for k in range(config.bridges - 1):
        ours, theirs = f"fusion.{side}_bridges.{k}", f"{official}_link_tower.{k}"
        names.add(linear(f"{ours}.norm", f"{theirs}.LayerNorm"))
        if config.bridge == "scaled_add":  # these two the port alone has
            names.add(rename(f"{ours}.scale", f"{theirs}.scaled_factor"))
        elif config.bridge == "interpolate":
            names.add(rename(f"{ours}.share", f"{theirs}.beta"))
    for i in range(config.fusion_layers):
        names.add(layer(f"fusion.layers.{i}.{side}_block", f"{official}_layers.{i}", (), cross=True))
    names.add(linear(f"{side}_pooler.linear", f"{official}_pooler.dense"))
    names.add(linear(f"{side}_embedding", f"itc_{side}_head.fc"))


def infer_config(tensors: Tensors, source: Path, options: Options) -> tuple[BridgeTowerConfig, list[str]]:
    """Sizes, from the tensors and the options; and notes on what was assumed."""
    visual = "vit_model.visual."
    vision, notes = vision_config(
        tensors,
        source,
        options,
        class_embedding=f"{visual}class_embedding",
        patches=f"{visual}conv1.weight",
        table=f"{visual}positional_embedding",
        layers=f"{visual}transformer.resblocks.",
        interpolation="bicubic",
    )
    segments, _ = table(tensors, "text_transformer.embeddings.token_type_embeddings.weight", source)
    if segments != 1:
        raise CheckpointError(source, f"its text encoder is no RoBERTa: it has {segments} segments")
    text, text_notes = text_config(tensors, "text_transformer.", source, Beside(source), options.text_heads, ROBERTA)
    text_layers = count(tensors, "text_transformer.encoder.layer.")
    bridged = "cross_modal_text_layernorm.weight" in tensors
    if bridged:
        vision = read_layers(vision, text_layers, source)
    else:
        notes.append("no bridges in the file: it is a METER")
    embed_dim = BridgeTowerConfig.embed_dim
    if "itc_text_head.fc.weight" in tensors:
        embed_dim, _ = table(tensors, "itc_text_head.fc.weight", source)
    try:
        config = BridgeTowerConfig(
            vision,
            text,
            text_layers=text_layers,
            fusion_layers=count(tensors, "cross_modal_text_layers."),
            bridged_layers=None if bridged else 0,
            gather_layers="text_gate.weight" in tensors,
            embed_dim=embed_dim,
        )
    except ValueError as error:
        raise CheckpointError(source, str(error)) from error
    return config, notes + text_notes


def read_layers(vision: VisionConfig, text_layers: int, source: str | Path) -> VisionConfig:
    """The image encoder as deep as the text encoder, by whose depth the official network reads both."""
    if vision.layers < text_layers:
        raise CheckpointError(
            source,
            f"its image encoder has {vision.layers} layers, fewer than the {text_layers} of its text encoder, by which "
            "both are read",
        )
    return replace(vision, layers=text_layers)
