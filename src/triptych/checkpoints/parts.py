"""Start an mPLUG where the paper starts: image encoder from CLIP, text side from BERT (paper section 5.1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from triptych.checkpoints.bert import Bert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder
from triptych.checkpoints.mapping import NameMap, Report, Rule, convert_tensors, positions, rename
from triptych.models.layers import PostNormBlock
from triptych.models.mplug import MPlug
from triptych.models.vision import VisionTransformer


def initialise(model: MPlug, *folders: str | Path, zero_positions: bool = False) -> Report:
    """Fill a new model from converted parts (``--from clip``, ``clip-hf``, ``bert-hf``), in place.

    The text encoder and the decoder take BERT's layers from the first on, the fusion network its last ones; the
    decoder's head and the masked-language head are BERT's own. Cross-attention, projections, matching head and width
    bridge keep their random values; the report lists them as missing.

    Args:
        folders: at most one ``clip-vision`` and one ``bert`` folder.
        zero_positions: set the image position table to zero, as a bug of the official code does
            (visual_transformers.py:45-51), instead of interpolating CLIP's.

    Raises:
        CheckpointError: a folder is not such a part, or its sizes are not the model's.
    """
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


def _vision_names(model: MPlug, part: VisionTransformer, folder: str | Path) -> NameMap:
    ours, theirs = model.config.vision, part.config
    for field in ("width", "layers", "heads", "patch", "activation"):
        _agree(f"the image encoder's {field}", getattr(ours, field), getattr(theirs, field), folder)
    names = NameMap()
    for name in part.state_dict():
        target = f"vision.{name}"
        resized = positions(target, name, ours.image_size // ours.patch)
        names.add(resized if name == "position_embedding" else rename(target, name))
    return names


def _bert_names(model: MPlug, part: Bert, folder: str | Path) -> NameMap:
    config, text = model.config, part.config.text
    for field in ("vocab_size", "width", "heads", "ffn", "max_positions"):
        _agree(f"the text side's {field}", getattr(config.text, field), getattr(text, field), folder)
    deepest = max(config.text_layers, config.fusion_layers, config.decoder_layers)
    if part.config.layers < deepest:
        raise CheckpointError(folder, f"has {part.config.layers} layers; the model's deepest stack has {deepest}")
    names = NameMap()
    names.add(
        _same("text.embeddings", "encoder.embeddings", part), _same("decoder.embeddings", "encoder.embeddings", part)
    )
    names.add(rename("masked_head.word.weight", "encoder.embeddings.word.weight"))
    for i in range(config.text_layers):
        names.add(_same(f"text.blocks.{i}", f"encoder.blocks.{i}", part))
    for i in range(config.decoder_layers):
        names.add(_same(f"decoder.blocks.{i}", f"encoder.blocks.{i}", part))
    first = part.config.layers - config.fusion_layers
    for name, number in _fusion_blocks(model):
        names.add(_same(name, f"encoder.blocks.{first + number}", part))
    if part.head is not None:
        names.add(_same("decoder.head", "head", part), _same("masked_head.head", "head", part))
    return names


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
