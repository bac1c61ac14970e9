"""mPLUG's published files: ``--from mplug`` (X-PLUG/mPLUG, AliceMind) and ``--from mplug-modelscope``.

Both spell their tensors alike. Pre-trained files hold everything; fine-tuned ones only what their task runs. The fusion
encoder appears as ``fusion_encoder.bert.``, ``fusion_encoder.fusion.`` or ``fusion_encoder.``, the text encoder as
``text_encoder.bert.`` or ``text_encoder.``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from triptych.checkpoints.bert import add_head, count, embeddings, layer, table, text_config
from triptych.checkpoints.beside import Beside
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.clip import openai_vision, vision_config
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.families import expect
from triptych.checkpoints.mapping import NameMap, Report, convert_tensors, linear, rename
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors
from triptych.data.transforms import Preprocessing
from triptych.models.mplug import MPlug, MPlugConfig

OPTIONS = frozenset(
    {
        "image_size",
        "vision_heads",
        "text_heads",
        "activation",
        "stride",
        "fusion_layers",
        "decoder_layers",
        "keep_momentum",
        "keep_queues",
        "allow_missing",
        "allow_unexpected",
        "vocab",
    }
)
MOMENTUM = "_m"
"""What official names of the momentum copies end in."""

_QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
_COPIED = (
    "visual_encoder",
    "text_encoder",
    "fusion_encoder",
    "text_decoder",
    "vision_proj",
    "text_proj",
    "visn_fc",
    "visn_layer_norm",
)


def convert_mplug(source: Path, tensors: Tensors, options: Options) -> Converted:
    """An official pre-trained or fine-tuned file."""
    # The official image encoder trains with attention dropout 0.1 (models/clip/model.py:175), ModelScope's without.
    return _convert(source, tensors, options, attention_dropout=0.1)


def convert_mplug_modelscope(source: Path, tensors: Tensors, options: Options) -> Converted:
    """A file of ModelScope (``damo/mplug_*``)."""
    converted = _convert(source, tensors, options, attention_dropout=0.0)
    converted.report.notes.append(
        "ModelScope's code ends the encoder's text with [SEP], lower-cases questions and pads them to 25 tokens; the "
        "official code adds no [SEP]"
    )
    return converted


def _convert(source: Path, tensors: Tensors, options: Options, *, attention_dropout: float) -> Converted:
    expect("an mPLUG checkpoint", ["visual_encoder.visual.", "text_encoder.", "fusion_encoder."], tensors, source)
    config, notes = infer_config(tensors, source, options, attention_dropout=attention_dropout)

    def build() -> MPlug:
        return MPlug(config)

    state, report = mplug_state(
        tensors,
        config,
        source,
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    report.notes += notes
    if report.missing:
        report.notes.append(f"the file looks like {_looks_like(tensors)}")
    converted = Converted(
        build_with(build, state), report, Preprocessing(config.vision.image_size), config.text.vocab_size
    )
    if options.keep_momentum:
        converted.extra["ema.safetensors"] = _momentum(tensors, config, source, report)
    if options.keep_queues:
        converted.extra["queues.safetensors"] = _queues(tensors, source, report)
    return converted


def mplug_state(
    tensors: Tensors,
    config: MPlugConfig,
    source: str | Path,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[Tensors, Report]:
    """The tensors of an :class:`MPlug` of these sizes from official ones."""
    return convert_tensors(
        tensors,
        mplug_names(config, tensors),
        shapes_of(lambda: MPlug(config), source),
        source,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        hint=_looks_like(tensors),
    )


def mplug_names(config: MPlugConfig, present: Collection[str], copy: str = "") -> NameMap:
    """Where every tensor of an MPlug comes from.

    Args:
        present: the names of the file, which decide between the spellings.
        copy: ``"_m"`` for the momentum copies.
    """
    vision, text = f"visual_encoder{copy}", f"text_encoder{copy}{_inner(present, f'text_encoder{copy}')}"
    fusion, decoder = f"fusion_encoder{copy}{_inner(present, f'fusion_encoder{copy}')}", f"text_decoder{copy}"
    names = NameMap(openai_vision("vision.", f"{vision}.visual.", config.vision))
    if config.vision.width != config.text.width:
        names.add(linear("bridge.linear", f"visn_fc{copy}"), linear("bridge.norm", f"visn_layer_norm{copy}"))
    names.add(embeddings("text.embeddings", f"{text}.embeddings", present))
    for i in range(config.text_layers):
        names.add(layer(f"text.blocks.{i}", f"{text}.encoder.layer.{i}", present, cross=False))

    unused = count(present, f"{fusion}.encoder.layer.") - config.fusion_layers
    for i, connected in enumerate(config.connected()):
        official = f"{fusion}.encoder.layer.{i + unused}"
        names.add(layer(f"fusion.layers.{i}.block", official, present, cross=not connected))
        if connected:
            names.drop("cross-attention of a connected layer, never run", f"{official}.crossattention.*")
    for i in range(unused):
        names.drop("fusion layer below the ones that run", f"{fusion}.encoder.layer.{i}.*")

    words = f"{fusion}.embeddings.word_embeddings.weight"
    names.add(rename("masked_head.word.weight", words))
    add_head(names, "masked_head.head", f"fusion_encoder{copy}.cls.predictions", words, present)

    names.add(embeddings("decoder.embeddings", f"{decoder}.bert.embeddings", present))
    for i in range(config.decoder_layers):
        names.add(layer(f"decoder.blocks.{i}", f"{decoder}.bert.encoder.layer.{i}", present, cross=True))
    words = f"{decoder}.bert.embeddings.word_embeddings.weight"
    add_head(names, "decoder.head", f"{decoder}.cls.predictions", words, present)

    names.add(linear("image_projection", f"vision_proj{copy}"), linear("text_projection", f"text_proj{copy}"))
    if not copy:
        names.add(linear("match_head", "itm_head"), rename("temperature", "temp"))
    _drop_unused(names, vision, fusion, copy)
    return names


def _inner(present: Collection[str], module: str) -> str:
    """What stands between a module's name and BERT's own names: nothing, ``.bert`` or ``.fusion``."""
    pattern = re.compile(rf"{re.escape(module)}((?:\.bert|\.fusion)*)\.(?:encoder\.layer|embeddings)\.")
    found = {match[1] for name in present if (match := pattern.match(name))}
    return max(found, key=len, default="")


def _drop_unused(names: NameMap, vision: str, fusion: str, copy: str) -> None:
    names.drop("CLIP's projection, unused", f"{vision}.visual.proj")
    names.drop(
        "CLIP's text tower, unused",
        f"{vision}.transformer.*",
        f"{vision}.token_embedding.weight",
        f"{vision}.positional_embedding",
        f"{vision}.ln_final.*",
        f"{vision}.text_projection",
        f"{vision}.logit_scale",
    )
    names.drop("a constant", "*.position_ids")
    names.drop(
        "the fusion encoder's own embeddings, never run",
        *(f"{fusion}.embeddings.{part}" for part in ("position_embeddings.*", "token_type_embeddings.*")),
        f"{fusion}.embeddings.LayerNorm.*",
    )
    if not copy:
        names.drop("momentum copy", *(f"{module}{MOMENTUM}.*" for module in _COPIED))
        names.drop("contrastive queue", *_QUEUES)


def infer_config(
    tensors: Tensors, source: Path, options: Options, *, attention_dropout: float
) -> tuple[MPlugConfig, list[str]]:
    """Sizes, from the tensors, the options and a configuration beside the file; and notes on what was assumed.

    The configuration is the official ``config_bert.json`` or a ``config.json`` with the fields of an MPlugConfig.
    """
    beside = Beside(source, "config_bert.json", "config.json")
    vision, notes = vision_config(
        tensors,
        source,
        options,
        class_embedding="visual_encoder.visual.class_embedding",
        patches="visual_encoder.visual.conv1.weight",
        table="visual_encoder.visual.positional_embedding",
        layers="visual_encoder.visual.transformer.resblocks.",
        beside=beside.part("vision"),
        attention_dropout=attention_dropout,
    )
    prefix = f"text_encoder{_inner(tensors, 'text_encoder')}."
    text_beside = beside.part("text") if "text" in beside else beside
    text, text_notes = text_config(tensors, prefix, source, text_beside, options.text_heads)
    notes += text_notes
    allocated = count(tensors, f"fusion_encoder{_inner(tensors, 'fusion_encoder')}.encoder.layer.")
    fusion_layers = options.fusion_layers or beside.integer("fusion_layers")
    if fusion_layers is None:
        fusion_layers = min(6, allocated)
        notes.append(f"the upper {fusion_layers} of {allocated} fusion layers run (default; no tensor tells)")
    if fusion_layers > allocated:
        raise CheckpointError(source, f"has {allocated} fusion layers, {fusion_layers} were asked for")
    stride = options.stride or beside.integer("stride_layer", "stride")
    if stride is None:
        stride = 3 if vision.width == text.width else 6
        notes.append(f"stride {stride} (default for this size; no tensor tells)")
    else:
        notes.append(f"stride {stride} ({'given' if options.stride else beside.path})")
    decoder_layers = count(tensors, "text_decoder.bert.encoder.layer.")
    if decoder_layers == 0:
        decoder_layers = options.decoder_layers or beside.integer("text_decode_layers") or 12
    elif options.decoder_layers not in (None, decoder_layers):
        raise CheckpointError(source, f"has {decoder_layers} decoder layers, {options.decoder_layers} were asked for")
    embed_dim = MPlugConfig(vision).embed_dim
    if "vision_proj.weight" in tensors:
        embed_dim, _ = table(tensors, "vision_proj.weight", source)
    config = MPlugConfig(
        vision,
        text,
        text_layers=count(tensors, f"{prefix}encoder.layer."),
        fusion_layers=fusion_layers,
        decoder_layers=decoder_layers,
        stride=stride,
        embed_dim=embed_dim,
    )
    return config, notes


def _looks_like(names: Collection[str]) -> str:
    """Which of the published kinds of file this is, told by the heads it has."""
    decoder = any(name.startswith("text_decoder.") for name in names)
    matching, masked = "itm_head.weight" in names, "fusion_encoder.cls.predictions.bias" in names
    if decoder and not matching and not masked:
        return "a file fine-tuned for question answering or captioning, which carries no other heads"
    if matching and not decoder:
        return "a file fine-tuned for retrieval, which carries no decoder and no masked-language head"
    return "a pre-trained file"


def _momentum(tensors: Tensors, config: MPlugConfig, source: Path, report: Report) -> Tensors:
    """The momentum copies under the names of what they copy; not every part has one."""
    copies = {
        name: tensor
        for name, tensor in tensors.items()
        if name.split(".")[0].removesuffix(MOMENTUM) in _COPIED and name.split(".")[0].endswith(MOMENTUM)
    }
    if not copies:
        raise CheckpointError(source, "has no momentum copies to keep; leave out --keep-momentum")
    shapes = shapes_of(lambda: MPlug(config), source)
    ema, momentum = convert_tensors(copies, mplug_names(config, copies, MOMENTUM), shapes, source, allow_missing=("*",))
    report.dropped = [dropped for dropped in report.dropped if dropped.name not in copies] + momentum.dropped
    report.notes.append(f"{len(ema)} momentum copies kept in ema.safetensors")
    return ema


def _queues(tensors: Tensors, source: Path, report: Report) -> Tensors:
    queues = {name: tensors[name].clone().contiguous() for name in _QUEUES if name in tensors}
    if not queues:
        raise CheckpointError(source, "has no queues to keep; leave out --keep-queues")
    report.dropped = [dropped for dropped in report.dropped if dropped.name not in queues]
    report.notes.append(f"{', '.join(queues)} kept in queues.safetensors")
    return queues
