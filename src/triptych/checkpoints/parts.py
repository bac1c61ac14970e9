"""Start a network where its paper starts: image encoder from CLIP, text side from BERT or RoBERTa.

mPLUG: paper section 5.1. BridgeTower: microsoft/BridgeTower ``bt_module.py:82``, ``clip_model.py:325``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from triptych.checkpoints.bert import Bert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder
from triptych.checkpoints.mapping import NameMap, Report, Rule, convert_tensors, positions, rename
from triptych.models.bridgetower import BridgeTower
from triptych.models.layers import PostNormBlock
from triptych.models.mplug import MPlug
from triptych.models.protocol import VisionLanguageModel
from triptych.models.vision import VisionTransformer


def initialise(model: VisionLanguageModel, *folders: str | Path, zero_positions: bool = False) -> Report:
    """Fill a new model from converted parts (``--from clip``, ``clip-hf``, ``bert-hf``, ``roberta-hf``), in place.

    The image encoder takes CLIP's, with its position table interpolated. Of a BERT or RoBERTa, mPLUG's text encoder
    and decoder take the layers from the first on, its fusion network the last ones; the decoder's head and the
    masked-language head are BERT's own. BridgeTower's text encoder takes the layers from the first on, and so does its
    decoder, if it has one, with the head. What no part fills keeps its random values (cross-attention, projections,
    matching head; in BridgeTower the whole fusion and the masked-language head); the report lists it as missing.

    Args:
        folders: at most one ``clip-vision`` and one ``bert`` folder.
        zero_positions: set the image position table to zero, as a bug of mPLUG's official code does
            (visual_transformers.py:45-51), instead of interpolating CLIP's.

    Raises:
        CheckpointError: a folder is not such a part, or its sizes are not the model's.
    """
    if not isinstance(model, MPlug | BridgeTower):
        raise CheckpointError("initialise", f"it is not known which parts a {model.model_type} starts from")
    if not folders:
        raise CheckpointError("initialise", "name at least one folder, of a CLIP image encoder or of a BERT")
    report, seen = Report(), set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for folder in folders:
        loaded = load_folder(folder)
        if loaded.model_type in seen:
            raise CheckpointError(folder, f"is a second {loaded.model_type} part; one is enough")
        seen.add(loaded.model_type)
        match loaded.model:
            case VisionTransformer() as vision:
                names = _vision_names(model, vision, folder)
            case Bert() as bert:
                names = _bert_names(model, bert, folder)
            case _:
                raise CheckpointError(folder, f"holds a {loaded.model_type}; a CLIP image encoder or a BERT is needed")
        # What a BERT has and a model leaves out (layers, head) is no mistake.
        state, part = convert_tensors(
            dict(loaded.model.state_dict()), names, shapes, folder, allow_missing=("*",), allow_unexpected=("*",)
        )
        model.load_state_dict(state, strict=False)
        part.missing, part.unexpected = [], []
        report.add(part)
    mapped = {entry.name for entry in report.mapped}
    _, rest = convert_tensors({}, NameMap(), shapes, "", allow_missing=("*",))
    report.missing = [entry for entry in rest.missing if entry.name not in mapped]
    if zero_positions:
        with torch.no_grad():
            model.vision.position_embedding.zero_()
        report.notes.append("image position table set to zero, as in the official pre-training")
    return report


def _vision_names(model: MPlug | BridgeTower, part: VisionTransformer, folder: str | Path) -> NameMap:
    ours, theirs = model.config.vision, part.config
    for field in ("width", "layers", "heads", "patch", "activation", "stem"):
        _agree(f"the image encoder's {field}", getattr(ours, field), getattr(theirs, field), folder)
    names = NameMap()
    for name in part.state_dict():
        target = f"vision.{name}"
        resized = positions(target, name, ours.image_size // ours.patch, ours.interpolation)
        names.add(resized if name == "position_embedding" else rename(target, name))
    return names


def _bert_names(model: MPlug | BridgeTower, part: Bert, folder: str | Path) -> NameMap:
    config, text = model.config, part.config.text
    for field in ("vocab_size", "width", "heads", "ffn", "max_positions", "first_position"):
        _agree(f"the text side's {field}", getattr(config.text, field), getattr(text, field), folder)
    own_fusion = config.fusion_layers if isinstance(model, MPlug) else 0
    deepest = max(config.text_layers, own_fusion, config.decoder_layers)
    if part.config.layers < deepest:
        raise CheckpointError(folder, f"has {part.config.layers} layers; the model's deepest stack has {deepest}")
    names = NameMap()
    names.add(_stack("text", config.text_layers, part))
    if model.decoder is not None:
        names.add(_stack("decoder", config.decoder_layers, part), _same("decoder.head", "head", part))
    if isinstance(model, MPlug):
        names.add(rename("masked_head.word.weight", "encoder.embeddings.word.weight"))
        names.add(_same("masked_head.head", "head", part))
        first = part.config.layers - config.fusion_layers
        for name, number in _fusion_blocks(model):
            names.add(_same(name, f"encoder.blocks.{first + number}", part))
    return names


def _stack(target: str, layers: int, part: Bert) -> list[Rule]:
    """Embeddings and the first layers."""
    rules = _same(f"{target}.embeddings", "encoder.embeddings", part)
    for i in range(layers):
        rules += _same(f"{target}.blocks.{i}", f"encoder.blocks.{i}", part)
    return rules


def _fusion_blocks(model: MPlug) -> Iterator[tuple[str, int]]:
    """Every Transformer block of the fusion network (two a layer in co-attention) and its layer's number."""
    for name, module in model.fusion.named_modules():
        if isinstance(module, PostNormBlock):
            yield f"fusion.{name}", int(name.split(".")[1])


def _same(target: str, source: str, part: nn.Module) -> list[Rule]:
    """All tensors below ``source``, under the same names below ``target``."""
    below = f"{source}."
    return [
        rename(f"{target}.{name.removeprefix(below)}", name) for name in part.state_dict() if name.startswith(below)
    ]


def _agree(what: str, ours: object, theirs: object, folder: str | Path) -> None:
    if ours != theirs:
        raise CheckpointError(folder, f"{what} is {theirs} in this part but {ours} in the model")
