"""BridgeTower in transformers' layout, both ways: ``--from bridgetower-hf`` and ``--to bridgetower-hf``.

A folder as ``save_pretrained`` writes it, of BridgeTowerModel or of a class with heads. The port computes the same as
the official code but for the eps of norms: it has one for the text encoder and the cross-modal layers, and one, 1e-5
in every published file, for bridges and the masked-language head.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers.processors import RobertaProcessing
from torch import Tensor

from triptych.checkpoints.beside import Beside
from triptych.checkpoints.bridgetower import (
    UNREAD,
    absent_heads,
    bridgetower_names,
    note_absent,
    read_layers,
    retrieval_task,
    unread_blocks,
)
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.families import expect
from triptych.checkpoints.folder import Loaded, load_folder
from triptych.checkpoints.mapping import Dropped, Mapped, NameMap, Report, Rule, convert_tensors
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import Preprocessing
from triptych.models.bridgetower import BridgeKind, BridgeTower, BridgeTowerConfig
from triptych.models.layers import Activation
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig

OPTIONS = frozenset({"image_size", "resize", "allow_missing", "allow_unexpected", "vocab"})

_LINKS: tuple[BridgeKind, ...] = ("add", "scaled_add", "interpolate")
_ACTIVATIONS: tuple[Activation, ...] = ("gelu", "quick_gelu")
_BRIDGE_EPS = 1e-5
_OUTSIDE = ("mlm_score.", "itm_score.", "itc_", "logit_scale")
_SPELLED = (
    ("vit_model.visual.conv1.weight", "vision_model.visual.embeddings.patch_embedding.weight"),
    ("vit_model.visual.class_embedding", "vision_model.visual.embeddings.class_embedding"),
    ("vit_model.visual.positional_embedding", "vision_model.visual.embeddings.position_embedding.weight"),
    ("vit_model.", "vision_model."),
    ("text_transformer.", "text_model."),
)
_POOLER = "text_model.pooler.dense"
_TEMPERATURE = "triptych_temperature"
"""In config.json: the temperature itself, which no float32 logarithm tells to the last bit."""


def convert_bridgetower_hf(source: Path, tensors: Tensors, options: Options) -> Converted:
    """BridgeTowerModel, ForMaskedLM, ForImageAndTextRetrieval or ForContrastiveLearning."""
    prefix = "bridgetower." if any(name.startswith("bridgetower.") for name in tensors) else ""
    parts = ("vision_model.visual.", "text_model.", "cross_modal_image_layers.", "cross_modal_text_layers.")
    expect("transformers' BridgeTower", [prefix + part for part in parts], tensors, source)
    beside = Beside(source, "config.json")
    if beside.path is None:
        raise CheckpointError(source, "has no config.json beside it, from which the sizes are read")
    config, notes = _read_config(beside, tensors, source)
    if options.image_size not in (None, config.vision.image_size):
        assert options.image_size is not None
        notes.append(f"position table resized from {config.vision.image_size} to {options.image_size} pixels (bicubic)")
        try:
            config = replace(config, vision=replace(config.vision, image_size=options.image_size))
        except ValueError as error:
            raise CheckpointError(source, str(error)) from error
    segments = len(tensors.get(f"{prefix}text_model.embeddings.token_type_embeddings.weight", ()))
    names = _port_names(config, prefix, segments)
    kept = beside.number(_TEMPERATURE)
    names.add(Rule(("temperature",), ("logit_scale",), lambda tensors: [_temperature(tensors[0], kept)]))
    if beside.flag("tie_word_embeddings") and "mlm_score.decoder.weight" not in tensors:
        words = f"{prefix}text_model.embeddings.word_embeddings.weight"
        names.rules = [_untied(rule, words) for rule in names.rules]
    names.drop("the port's text pooler, never run", f"{prefix}text_model.pooler.*")
    names.drop("a constant", "*.position_ids", "*.embeddings.token_type_ids")
    names.drop("norms of single layers, which the whole network never runs", "*.visual.ln_separate.*")
    blocks = f"{prefix}vision_model.visual.transformer.resblocks."
    names.drop(UNREAD, *unread_blocks(tensors, blocks, config.vision.layers))
    absent = [*absent_heads(tensors), *(["temperature"] if "logit_scale" not in tensors else [])]
    state, report = convert_tensors(
        tensors,
        names,
        shapes_of(lambda: BridgeTower(config), source),
        source,
        allow_missing=(*options.allow_missing, *absent),
        allow_unexpected=options.allow_unexpected,
    )
    report.notes += [*notes, *note_absent(report)]
    if "logit_scale" in tensors:
        report.notes += _note_temperature(tensors["logit_scale"], state["temperature"])
    return Converted(
        build_with(lambda: BridgeTower(config), state),
        report,
        Preprocessing(config.vision.image_size, resize=options.resize or "crop"),
        config.text.vocab_size,
        task=retrieval_task(tensors),
    )


def export_bridgetower_hf(folder: Path, target: Path) -> Report:
    """Write a checkpoint folder of ours as transformers' ``from_pretrained`` reads it.

    Every class of the port loads what is written; ``architectures`` names the one with the most heads of ours.

    Returns:
        Which of our tensors became which of the port's, which were left out, and what was filled in.

    Raises:
        CheckpointError: no BridgeTower, one that the port cannot express, or ``target`` has something in it.
    """
    loaded = load_folder(folder)
    if not isinstance(loaded.model, BridgeTower):
        raise CheckpointError(folder, f"holds a {loaded.model_type}, not a bridgetower")
    config = loaded.model.config
    refuse_inexpressible(config, loaded.tokenizer, folder)
    state, report = port_state(loaded.model)
    report.notes += _what_differs(loaded, config)
    files: dict[str, Any] = {"config.json": port_config(loaded.model)}
    preprocessing = loaded.preprocessing or Preprocessing(config.vision.image_size, resize="crop")
    files["preprocessor_config.json"] = _preprocessor(preprocessing)
    if loaded.tokenizer is not None:
        files["tokenizer_config.json"] = _tokenizer_config(loaded.tokenizer, config)
    else:
        report.notes.append("no tokenizer in the checkpoint: put RoBERTa's files beside it")
    _write(target, state, files, loaded.tokenizer)
    return report


def port_state(model: BridgeTower) -> tuple[Tensors, Report]:
    """The port's tensors from ours; its text pooler, which it never runs, is zero."""
    config, state, report = model.config, model.state_dict(), Report()
    names = _port_names(config, "bridgetower.")
    if config.contrast == "encoders":
        names.rules = [rule for rule in names.rules if not rule.sources[0].startswith("itc_")]
    else:
        names.add(Rule(("temperature",), ("logit_scale",), lambda tensors: tensors))
    written: Tensors = {}
    for rule in names.rules:
        for name, tensor in zip(rule.sources, _undo(rule, [state[target] for target in rule.targets]), strict=True):
            written[name] = _logit_scale(tensor) if name == "logit_scale" else tensor.clone().contiguous()
            report.mapped.append(Mapped(name, tuple(tensor.shape), rule.targets))
    D = config.text.width
    written |= {
        f"bridgetower.{_POOLER}.weight": torch.zeros(D, D),
        f"bridgetower.{_POOLER}.bias": torch.zeros(D),
    }
    report.notes.append(f"filled in with zeros, since the port has but never runs it: bridgetower.{_POOLER}")
    used = {target for rule in names.rules for target in rule.targets}
    reasons = {"decoder": "the port has no decoder"}
    other = "the port embeds pictures after their projection, so it has no place for heads on the encoders' own states"
    for name, tensor in state.items():
        if name not in used:
            report.dropped.append(Dropped(name, tuple(tensor.shape), reasons.get(name.split(".")[0], other)))
    return written, report


def refuse_inexpressible(config: BridgeTowerConfig, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Raise a CheckpointError for a network that the port cannot be configured to be."""
    vision, text = config.vision, config.text
    padding = text.first_position - 1
    pad_id = padding if tokenizer is None else tokenizer.pad_id
    problems = (
        (config.bridge not in _LINKS, f"bridges of kind {config.bridge!r}; the port has {', '.join(_LINKS)}"),
        (
            config.bridges != config.fusion_layers,
            f"bridges at {config.bridges} of {config.fusion_layers} layers; the port has them at all",
        ),
        (
            vision.layers != config.text_layers,
            f"{vision.layers} layers in the image encoder and {config.text_layers} in the text encoder; the port reads "
            "both by the depth of the latter",
        ),
        (vision.stem != "patch", "a convolution stem; the port embeds patches by one linear map"),
        (
            vision.heads != vision.width // 64,
            f"{vision.heads} heads in the image encoder; the port has one for each 64 of its width {vision.width}",
        ),
        (
            vision.activation != "quick_gelu",
            f"{vision.activation!r} in the image encoder; the port has quick_gelu",
        ),
        (
            vision.interpolation != "bicubic",
            f"{vision.interpolation} interpolation of positions; the port's is bicubic",
        ),
        (
            padding < 0 or pad_id != padding,
            f"text positions from {padding + 1} on, and padding of id {pad_id}; the port's begin one after that id",
        ),
    )
    for applies, problem in problems:
        if applies:
            raise CheckpointError(folder, f"cannot be written in transformers' layout: it has {problem}")


def port_config(model: BridgeTower) -> dict[str, Any]:
    """The port's config.json."""
    config = model.config
    vision, text = config.vision, config.text
    projected = config.contrast == "projected"
    values: dict[str, Any] = {
        "architectures": [f"BridgeTowerFor{'ContrastiveLearning' if projected else 'ImageAndTextRetrieval'}"],
        "model_type": "bridgetower",
        "dtype": "float32",
        "hidden_size": text.width,
        "hidden_act": "gelu",
        "num_hidden_layers": config.fusion_layers,
        "num_attention_heads": text.heads,
        "layer_norm_eps": _BRIDGE_EPS,
        "link_tower_type": config.bridge,
        "share_cross_modal_transformer_layers": True,
        "share_link_tower_layers": False,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "bridgetower_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.ffn,
            "hidden_act": text.activation,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
            "max_position_embeddings": text.max_positions,
            "type_vocab_size": 1,
            "layer_norm_eps": text.layer_norm_eps,
            "pad_token_id": text.first_position - 1,
        },
        "vision_config": {
            "model_type": "bridgetower_vision_model",
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_channels": 3,
            "patch_size": vision.patch,
            "image_size": vision.image_size,
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }
    if projected:
        temperature = model.temperature.item()
        values |= {
            "contrastive_hidden_size": config.embed_dim,
            "logit_scale_init_value": -math.log(temperature),
            _TEMPERATURE: temperature,
        }
    return values


def _port_names(config: BridgeTowerConfig, prefix: str, segments: int = 1) -> NameMap:
    """The official rules, respelled: heads stand beside the network, which has a prefix in classes with heads."""

    def respell(name: str) -> str:
        official, ours = next((pair for pair in _SPELLED if name.startswith(pair[0])), ("", ""))
        name = ours + name.removeprefix(official)
        return name if name.startswith(_OUTSIDE) else prefix + name

    rules = bridgetower_names(config, segments).rules
    return NameMap([replace(rule, sources=tuple(map(respell, rule.sources))) for rule in rules])


def _untied(rule: Rule, words: str) -> Rule:
    """The masked-language head's word table from the word embeddings it is tied to."""
    return replace(rule, sources=(words,)) if rule.targets == ("masked_head.word.weight",) else rule


def _undo(rule: Rule, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a rule made these of: it joined or split rows, or took the rows of a table apart."""
    if rule.sources[0].endswith("token_type_embeddings.weight"):
        return [torch.stack(list(tensors))]
    if len(rule.sources) == 1:
        return [torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]]
    return tensors[0].chunk(len(rule.sources))


def _logit_scale(temperature: Tensor) -> Tensor:
    return -temperature.double().log().float()


def _temperature(logit_scale: Tensor, kept: float | None) -> Tensor:
    """exp(-logit_scale), or the number that an export kept, if it still has this logarithm."""
    if kept:
        temperature = torch.tensor(kept, dtype=torch.float32)
        if torch.equal(_logit_scale(temperature), logit_scale.float()):
            return temperature
    return torch.exp(-logit_scale.double())


def _note_temperature(logit_scale: Tensor, temperature: Tensor) -> list[str]:
    back = _logit_scale(temperature)
    if torch.equal(back, logit_scale.float()):
        return []
    return [f"logit_scale {float(logit_scale):.9g} would come back as {float(back):.9g}: a temperature is coarser here"]


def _read_config(beside: Beside, names: Collection[str], source: Path) -> tuple[BridgeTowerConfig, list[str]]:
    """Sizes from config.json, with the port's defaults."""
    text_json, vision_json = beside.part("text_config"), beside.part("vision_config")
    for part, name in (
        (beside, "share_link_tower_layers"),
        (vision_json, "remove_last_layer"),
        (text_json, "is_decoder"),
        (text_json, "add_cross_attention"),
    ):
        if part.flag(name):
            raise CheckpointError(str(beside.path), f"{name} is not supported; the port's own network does not run so")
    if beside.flag("share_cross_modal_transformer_layers") is False:
        raise CheckpointError(str(beside.path), "share_cross_modal_transformer_layers must be true, as published")
    channels = vision_json.integer("num_channels")
    if channels not in (None, 3):
        raise CheckpointError(str(beside.path), f"num_channels must be 3, not {channels}")
    bridge_eps = _or(beside.number("layer_norm_eps"), 1e-5)
    if bridge_eps != _BRIDGE_EPS:
        raise CheckpointError(str(beside.path), f"layer_norm_eps (of bridges) must be 1e-5, not {bridge_eps:g}")
    text = TextConfig(
        vocab_size=text_json.integer("vocab_size") or 50265,
        width=text_json.integer("hidden_size") or 768,
        heads=text_json.integer("num_attention_heads") or 12,
        ffn=text_json.integer("intermediate_size") or 3072,
        max_positions=text_json.integer("max_position_embeddings") or 514,
        layer_norm_eps=_or(text_json.number("layer_norm_eps"), 1e-5),
        dropout=_or(text_json.number("hidden_dropout_prob"), 0.1),
        attention_dropout=_or(text_json.number("attention_probs_dropout_prob"), 0.1),
        activation=_one_of(text_json, "hidden_act", _ACTIVATIONS),
        first_position=int(_or(text_json.number("pad_token_id"), 1)) + 1,
    )
    if "mlm_score.bias" in names and _one_of(beside, "hidden_act", _ACTIVATIONS) != "gelu":
        raise CheckpointError(str(beside.path), "hidden_act (of the masked-language head) must be gelu")
    notes = []
    if "mlm_score.bias" in names and text.layer_norm_eps != bridge_eps:
        notes.append(
            f"the norm of the masked-language head gets the eps of cross-modal layers, {text.layer_norm_eps:g}; in the "
            f"port it is {bridge_eps:g}"
        )
    contrastive = beside.integer("contrastive_hidden_size")
    projected = "itc_cross_modal_head.fc.weight" in names or "logit_scale" in names
    text_layers = text_json.integer("num_hidden_layers") or 12
    width = vision_json.integer("hidden_size") or 768
    try:
        vision = VisionConfig(
            width=width,
            layers=vision_json.integer("num_hidden_layers") or 12,
            heads=max(1, width // 64),
            patch=vision_json.integer("patch_size") or 16,
            image_size=vision_json.integer("image_size") or 288,
            layer_norm_eps=_or(vision_json.number("layer_norm_eps"), 1e-5),
            interpolation="bicubic",
        )
        config = BridgeTowerConfig(
            read_layers(vision, text_layers, source),
            text,
            text_layers=text_layers,
            fusion_layers=beside.integer("num_hidden_layers") or 6,
            bridge=_one_of(beside, "link_tower_type", _LINKS),
            fusion_norm_eps=text.layer_norm_eps,
            contrast="projected" if projected else "encoders",
            embed_dim=contrastive or BridgeTowerConfig.embed_dim,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(beside.path), str(error)) from error
    return config, notes


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _one_of(beside: Beside, name: str, known: tuple[Any, ...]) -> Any:
    """A word of config.json; the first of those known where there is none."""
    value = beside.text(name) or known[0]
    if value not in known:
        raise CheckpointError(str(beside.path), f"{name} must be {' or '.join(known)}, not {value!r}")
    return value


def _what_differs(loaded: Loaded, config: BridgeTowerConfig) -> list[str]:
    """How what the port computes will differ."""
    notes = []
    if config.fusion_norm_eps != config.text.layer_norm_eps:
        notes.append(
            f"the port has one eps for text encoder and cross-modal layers, {config.text.layer_norm_eps:g}; here the "
            f"latter's is {config.fusion_norm_eps:g}, so outputs differ by about 1e-5, as those of published files do"
        )
    elif config.fusion_norm_eps != _BRIDGE_EPS:
        notes.append(f"the masked-language head's norm will have eps {_BRIDGE_EPS:g}, not {config.fusion_norm_eps:g}")
    if loaded.task_state:
        notes.append("the head of the task is left out: the port has none like it")
    return notes


def _preprocessor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Ours in the port's words.

    The official preprocessing is CLIP's, whose processor transformers' BridgeTowerProcessor (from version 5 on) takes
    in place of its own: that one, even with a divisor of 1, shrinks and borders pictures longer than 5:3, and cannot
    squash any.
    """
    size = preprocessing.image_size
    square, short = {"height": size, "width": size}, {"shortest_edge": size}
    values: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if preprocessing.resize == "squash" else short,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    if preprocessing.resize == "port":
        own = {"image_processor_type": "BridgeTowerImageProcessor", "crop_size": short}
        values |= own | {"size_divisor": 32, "do_pad": True}
    return values


def _tokenizer_config(tokenizer: Tokenizer, config: BridgeTowerConfig) -> dict[str, Any]:
    special = tokenizer.special
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.text.max_tokens,
        "bos_token": special.bos,
        "cls_token": special.bos,
        "eos_token": special.eos,
        "sep_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unk,
        "mask_token": special.mask,
    }


def _framing(tokenizer: Tokenizer) -> Backend:
    """The tokenizer with ``<s> text </s>`` built in, which ours adds itself."""
    backend: Backend = Backend.from_str(tokenizer.backend.to_str())
    sep, cls = (tokenizer.special.eos, tokenizer.eos_id), (tokenizer.special.bos, tokenizer.bos_id)
    backend.post_processor = RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=False)
    return backend


def _write(target: Path, state: Tensors, files: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """All files, in a folder that is complete as soon as it is there."""
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(target, "is there already; name a new folder")
    new = target.with_name(f".{target.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        for name, values in files.items():
            (new / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            _framing(tokenizer).save(str(new / "tokenizer.json"))
        if target.exists():
            target.rmdir()
        new.rename(target)
    except OSError as error:
        raise CheckpointError(target, f"cannot be written: {error}") from error
