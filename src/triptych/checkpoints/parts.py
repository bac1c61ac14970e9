"""Start a network where its paper starts: image encoder from CLIP, text side from BERT or RoBERTa; EVE from BEiT-2.

mPLUG: paper section 5.1. BridgeTower: microsoft/BridgeTower ``bt_module.py:82``, ``clip_model.py:325``. EVE: the paper
says that it "is initialized with BEiTv2" and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from triptych.checkpoints.beit import Beit
from triptych.checkpoints.bert import Bert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder
from triptych.checkpoints.mapping import NameMap, Report, Rule, convert_tensors, positions, rename
from triptych.models.bridgetower import BridgeTower
from triptych.models.eve import Eve, EveBlock, HardRouter, SoftRouter
from triptych.models.layers import PostNormBlock
from triptych.models.mplug import MPlug
from triptych.models.protocol import VisionLanguageModel
from triptych.models.vision import VisionTransformer


def initialise(model: VisionLanguageModel, *folders: str | Path, zero_positions: bool = False) -> Report:
    """Fill a new model from converted parts (``--from clip``, ``clip-hf``, ``bert-hf``, ``roberta-hf``, ``beit2``).

    The image encoder takes CLIP's, with its position table interpolated. Of a BERT or RoBERTa, mPLUG's text encoder
    and decoder take the layers from the first on, its fusion network the last ones; the decoder's head and the
    masked-language head are BERT's own. BridgeTower's text encoder takes the layers from the first on, and so does its
    decoder, if it has one, with the head. What no part fills keeps its random values (cross-attention, projections,
    matching head; in BridgeTower the whole fusion and the masked-language head); the report lists it as missing.

    EVE takes a BEiT-2's patch embedding, class token, last norm, and of each block attention, norms and factors; the
    block's feed-forward network becomes the one for images, the one for texts, and every expert. Words, positions,
    types, routers and heads keep their random values; and so do topmost blocks that the BEiT-2 has not.

    Args:
        model: changed in place.
        folders: at most one ``clip-vision`` and one ``bert`` folder; for EVE one ``beit`` folder.
        zero_positions: set the image position table to zero, as a bug of mPLUG's official code does
            (visual_transformers.py:45-51), instead of interpolating CLIP's.

    Raises:
        CheckpointError: a folder is not such a part, or its sizes are not the model's.
    """
    if not isinstance(model, MPlug | BridgeTower | Eve):
        raise CheckpointError("initialise", f"it is not known which parts a {model.model_type} starts from")
    wanted = "a BEiT-2" if isinstance(model, Eve) else "a CLIP image encoder or a BERT"
    if not folders:
        raise CheckpointError("initialise", f"name at least one folder, of {wanted}")
    if zero_positions and isinstance(model, Eve):
        raise CheckpointError("initialise", "zero_positions is a bug of mPLUG's; EVE's positions are its own anyway")
    report, seen = Report(), set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for folder in folders:
        loaded = load_folder(folder)
        if loaded.model_type in seen:
            raise CheckpointError(folder, f"is a second {loaded.model_type} part; one is enough")
        seen.add(loaded.model_type)
        match model, loaded.model:
            case Eve(), Beit() as beit:
                names = _beit_names(model, beit, folder, report)
            case MPlug() | BridgeTower(), VisionTransformer() as vision:
                names = _vision_names(model, vision, folder)
            case MPlug() | BridgeTower(), Bert() as bert:
                names = _bert_names(model, bert, folder)
            case _:
                raise CheckpointError(folder, f"holds a {loaded.model_type}; {wanted} is needed")
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
    if zero_positions and not isinstance(model, Eve):
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


def _beit_names(model: Eve, part: Beit, folder: str | Path, report: Report) -> NameMap:
    """``report`` gets notes on what is not alike in both."""
    ours, theirs = model.config.vision, part.config
    _agree("the image embedding's stem", ours.stem, "patch", folder)
    for field in ("width", "heads", "patch"):
        _agree(f"the Transformer's {field}", getattr(ours, field), getattr(theirs, field), folder)
    _agree("the Transformer's ffn", model.config.text.ffn, theirs.ffn, folder)
    if ours.layers < theirs.layers:
        raise CheckpointError(folder, f"has {theirs.layers} layers; the model has only {ours.layers}")
    if ours.layers > theirs.layers:
        report.notes.append(f"blocks from {theirs.layers} on keep their random values: the BEiT-2 has no more")
    if ours.activation != theirs.activation:
        report.notes.append(f"the activation is {theirs.activation} in the BEiT-2 and {ours.activation} in the model")
    names = NameMap()
    names.add(_same("image_embeddings.patch_embedding", "patch_embedding", part))
    names.add(rename("image_embeddings.class_embedding", "class_embedding"))
    if theirs.norm:
        names.add(_same("network.norm", "norm", part))
    for i, (target, source) in enumerate(zip(model.network.blocks, part.blocks, strict=False)):
        assert isinstance(target, EveBlock)
        for name in source.state_dict():
            if not name.startswith("ffn."):
                names.add(rename(f"network.blocks.{i}.{name}", f"blocks.{i}.{name}"))
        names.add(_copies(target, f"network.blocks.{i}.ffn", f"blocks.{i}.ffn", part))
    return names


def _copies(block: EveBlock, target: str, source: str, part: Beit) -> list[Rule]:
    """One norm and feed-forward network as whatever a block of an EVE has."""
    match block.ffn:
        case HardRouter():
            return [*_same(f"{target}.image", source, part), *_same(f"{target}.text", source, part)]
        case SoftRouter() as router:
            experts = len(router.moe.experts.expand)
            rules = _same(f"{target}.norm", f"{source}.norm", part)
            for layer in ("expand", "contract"):
                for kind, ending in (("weight", ""), ("bias", "_bias")):
                    rules.append(
                        _every(f"{target}.moe.experts.{layer}{ending}", f"{source}.ffn.{layer}.{kind}", experts)
                    )
            return rules
        case _:
            return _same(target, source, part)


def _every(target: str, source: str, experts: int) -> Rule:
    """One tensor as that of every expert."""

    def copies(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0].expand(experts, *tensors[0].shape)]

    return Rule((target,), (source,), copies)


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
