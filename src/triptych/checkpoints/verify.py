"""Compare our models with recorded outputs of the official code.

A recording is a folder with ``config.json`` (``model``: its family, the sizes, the generation settings),
``official_layout.*`` (weights as the official code saves them) and ``io.safetensors`` (``in.*`` and ``out.*``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.checkpoints.beside import read_json
from triptych.checkpoints.bridgetower import bridgetower_state
from triptych.checkpoints.bridgetower_heads import CLASSIFIERS
from triptych.checkpoints.building import build_with
from triptych.checkpoints.configs import from_json
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.eve import eve_state
from triptych.checkpoints.eve_heads import BI_ATTENTION, CLASSIFIER, contrastive_width
from triptych.checkpoints.mplug import mplug_state
from triptych.checkpoints.reading import Tensors, read_tensors
from triptych.generation import BeamSearch, SpecialIds, generate
from triptych.models.bridgetower import BridgeTower, BridgeTowerConfig
from triptych.models.eve import Eve, EveConfig
from triptych.models.heads import ClassifierHead
from triptych.models.moe import MoEConfig, record_routing
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.protocol import Encoded
from triptych.models.text import TextConfig, TextDecoder
from triptych.models.vision import VisionConfig
from triptych.objectives.balance import balance_loss


@dataclass(frozen=True)
class Check:
    """One recorded output against ours.

    ``max_abs_diff`` for numbers (infinite where the shapes differ), ``ids_equal`` for token ids; the other is None.
    """

    name: str
    max_abs_diff: float | None
    ids_equal: bool | None
    ok: bool


@dataclass(frozen=True)
class Recording:
    """A recording, read."""

    folder: Path
    config: dict[str, Any]
    weights: Tensors
    inputs: Tensors
    outputs: Tensors

    def input(self, name: str) -> Tensor:
        """A recorded input."""
        if name not in self.inputs:
            raise CheckpointError(self.folder / "io.safetensors", f"has no in.{name}")
        return self.inputs[name]

    def value(self, values: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
        """A value of config.json, which must be of this type."""
        value = values.get(name)
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise CheckpointError(
                self.folder / "config.json", f"{where}{name} must be of type {kind.__name__}, not {value!r}"
            )
        return value


Outputs = dict[str, Tensor]
"""Our side of every output that a recording of a family has."""


def verify(folder: str | Path, tolerance: float = 1e-4) -> list[Check]:
    """Run the recorded inputs through our model and compare every recorded output.

    Args:
        tolerance: largest absolute difference that passes; token ids must be equal.

    Raises:
        CheckpointError: the folder is not a complete recording, has an output we cannot compute, or lacks one.
    """
    recording = _read(Path(folder))
    family = recording.config.get("model")
    if family not in list(FAMILIES):
        raise CheckpointError(
            folder, f"recorded from {family!r}, which cannot be verified yet; known are {', '.join(FAMILIES)}"
        )
    try:
        with torch.inference_mode():
            outputs = FAMILIES[family](recording)
            _account(recording, outputs)
            return [_check(name, ours, recording.outputs[name], tolerance) for name, ours in outputs.items()]
    except CheckpointError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(folder, f"the inputs do not fit the sizes in config.json: {error}") from error


def format_checks(checks: Sequence[Check], tolerance: float) -> str:
    """A table for people."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        if check.max_abs_diff is None:
            result = "equal" if check.ids_equal else "differ"
        else:
            result = f"{check.max_abs_diff:.2e}"
        lines.append(f"{check.name:<{width}}  {result:>8}  {'ok' if check.ok else 'FAILED'}")
    failed = sum(not check.ok for check in checks)
    lines.append(
        f"{len(checks)} outputs, {failed} over tolerance {tolerance:g}"
        if failed
        else f"{len(checks)} outputs, all within tolerance {tolerance:g}"
    )
    return "\n".join(lines)


def checks_to_json(checks: Sequence[Check]) -> str:
    """The same for programs; a difference that is no number is null."""
    rows = []
    for check in checks:
        values = asdict(check)
        if check.max_abs_diff is not None and not torch.tensor(check.max_abs_diff).isfinite():
            values["max_abs_diff"] = None
        rows.append(values)
    return json.dumps({"ok": passed(checks), "checks": rows}, indent=1, allow_nan=False)


def passed(checks: Sequence[Check]) -> bool:
    """Whether every output agrees, and there was one."""
    return bool(checks) and all(check.ok for check in checks)


def _read(folder: Path) -> Recording:
    if not folder.is_dir():
        raise CheckpointError(folder, "no such folder")
    layouts = sorted(folder.glob("official_layout.*"))
    if len(layouts) != 1:
        raise CheckpointError(folder, f"needs one file official_layout.*, has {len(layouts)}")
    for name in ("config.json", "io.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(folder, f"not a recording: it has no {name}")
    recorded = read_tensors(folder / "io.safetensors")
    strange = [name for name in recorded if not name.startswith(("in.", "out."))]
    if strange:
        raise CheckpointError(folder / "io.safetensors", f"{strange[0]} is neither in.* nor out.*")
    return Recording(
        folder,
        read_json(folder / "config.json"),
        read_tensors(layouts[0]),
        {name[3:]: tensor for name, tensor in recorded.items() if name.startswith("in.")},
        {name[4:]: tensor for name, tensor in recorded.items() if name.startswith("out.")},
    )


def _account(recording: Recording, outputs: Outputs) -> None:
    """Every recorded output must be one of ours, and every one of ours recorded."""
    where = recording.folder / "io.safetensors"
    unknown = sorted(recording.outputs.keys() - outputs.keys())
    if unknown:
        raise CheckpointError(where, f"outputs that we cannot compute: {', '.join(unknown)}")
    missing = sorted(outputs.keys() - recording.outputs.keys())
    if missing:
        raise CheckpointError(where, f"outputs are not recorded: {', '.join(missing)}")


def _check(name: str, ours: Tensor, recorded: Tensor, tolerance: float) -> Check:
    if not recorded.is_floating_point():
        equal = ours.shape == recorded.shape and bool((ours == recorded).all())
        return Check(name, None, equal, equal)
    if ours.shape != recorded.shape:
        return Check(name, float("inf"), None, False)
    diff = float((ours - recorded).abs().max()) if ours.numel() else 0.0
    return Check(name, diff, None, diff <= tolerance)  # not a number fails


def _mplug_outputs(recording: Recording) -> Outputs:
    config = _mplug_config(recording)
    model = _mplug(recording, config)
    decoder = model.decoder
    assert decoder is not None
    ids_BL, mask_BL = recording.input("input_ids"), recording.input("attention_mask").bool()
    pixels_BCHW = recording.input("image")
    target_BL = recording.input("decoder_input_ids")
    target_mask_BL = recording.input("decoder_attention_mask").bool()
    image, text = model.encode_image(pixels_BCHW), model.encode_text(ids_BL, mask_BL)
    fused = model.fuse(image, text)
    pad = recording.value(recording.config, "pad", int)

    def logits(memory: Encoded) -> Tensor:
        return decoder.logits(decoder(target_BL, memory, target_mask_BL))

    def loss_per_sequence(memory: Encoded) -> Tensor:
        """Summed over the next tokens, padding apart."""
        next_BVL = logits(memory)[:, :-1].transpose(1, 2)
        return F.cross_entropy(next_BVL, target_BL[:, 1:], ignore_index=pad, reduction="none").sum(1)

    outputs: Outputs = {
        "image_embeds": image.hidden_BLD,
        "text_embeds": text.hidden_BLD,
        "image_feat": model.embed_image(image),
        "text_feat": model.embed_text(text),
        "itm_logits": model.match_logits(fused.pooled_BP),
        "mlm_logits": model.masked_logits(fused.text_BLD),
    }
    memories = {"decoder": fused.states(), "caption": image}
    for name, memory in memories.items():
        outputs[f"{name}_logits"] = logits(memory)
        outputs[f"{name}_loss_per_sequence"] = loss_per_sequence(memory)
    for stride in _recorded_strides(recording):
        other = _mplug(recording, replace(config, stride=stride)).fuse(image, text)
        outputs[f"fused_image_stride{stride}"] = other.image_BND
        outputs[f"fused_text_stride{stride}"] = other.text_BLD
    searches = recording.config.get("generate", {})
    if not isinstance(searches, dict):
        raise CheckpointError(recording.folder / "config.json", "generate must be an object")
    for name, settings in searches.items():
        if not name.startswith(("caption_", "vqa_")):
            raise CheckpointError(recording.folder / "config.json", f"generate.{name} must start with vqa_ or caption_")
        memory = memories["caption" if name.startswith("caption_") else "decoder"]
        ids, scores = _generated(recording, name, settings, decoder, memory)
        outputs[f"generate_{name}_ids"] = ids
        outputs[f"generate_{name}_scores"] = scores
    return outputs


def _mplug_config(recording: Recording) -> MPlugConfig:
    config, where = recording.config, f"{recording.folder / 'config.json'}: "

    def integer(name: str) -> int:
        value: int = recording.value(config, name, int)
        return value

    try:
        return MPlugConfig(
            from_json(VisionConfig, config.get("vision"), f"{where}vision"),
            from_json(TextConfig, config.get("text"), f"{where}text"),
            text_layers=integer("text_encoder_layers"),
            fusion_layers=integer("fusion_layers"),
            decoder_layers=integer("text_decode_layers"),
            stride=integer("stride"),
            embed_dim=integer("embed_dim"),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(recording.folder / "config.json", str(error)) from error


def _mplug(recording: Recording, config: MPlugConfig) -> MPlug:
    state, _ = mplug_state(recording.weights, config, recording.folder)
    model = build_with(lambda: MPlug(config), state)
    assert isinstance(model, MPlug)
    return model


def _recorded_strides(recording: Recording) -> list[int]:
    """The strides of the recorded fusions, for images or texts: of each both must be there, and there must be one."""
    found = (re.fullmatch(r"fused_(?:image|text)_stride([1-9]\d*)", name) for name in recording.outputs)
    strides = sorted({int(match[1]) for match in found if match})
    return strides or [recording.value(recording.config, "stride", int)]


def _generated(
    recording: Recording, name: str, settings: Any, decoder: TextDecoder, memory: Encoded
) -> tuple[Tensor, Tensor]:
    """All hypotheses of the official search: ids [B, beams, length] padded with -1, and scores [B, beams]."""
    where = f"generate.{name}"
    if not isinstance(settings, dict):
        raise CheckpointError(recording.folder / "config.json", f"{where} must be an object")
    try:
        search = BeamSearch(
            beams=recording.value(settings, "beam", int, f"{where}."),
            min_length=recording.value(settings, "min_length", int, f"{where}."),
            max_length=recording.value(settings, "max_length", int, f"{where}."),
            length_penalty=recording.value(recording.config, "length_penalty", float),
            rule="official",
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(recording.folder / "config.json", f"{where}: {error}") from error
    special = SpecialIds(*(recording.value(recording.config, role, int) for role in ("bos", "eos", "pad")))
    prompt_BL = None
    if "prompt" in settings:
        prompt = recording.value(settings, "prompt", list, f"{where}.")
        prompt_BL = torch.tensor([prompt] * len(memory), dtype=torch.long)
    found = generate(decoder, memory, search, special, prompt_BL=prompt_BL)
    recorded = recording.outputs.get(f"generate_{name}_ids")
    length = max(len(one.ids) for row in found for one in row)
    length = length if recorded is None else max(length, recorded.shape[-1])
    beams = max(len(row) for row in found)
    ids_BKL = torch.full((len(found), beams, length), -1)
    scores_BK = torch.full((len(found), beams), float("nan"))
    for b, row in enumerate(found):
        for k, one in enumerate(row):
            ids_BKL[b, k, : len(one.ids)] = torch.tensor(one.ids)
            scores_BK[b, k] = one.score
    return ids_BKL, scores_BK


def _bridgetower_outputs(recording: Recording) -> Outputs:
    """Of the heads, those that the weights have."""
    config = _bridgetower_config(recording)
    left = dict.fromkeys(CLASSIFIERS, "a head of its own")
    state, _ = bridgetower_state(recording.weights, config, recording.folder, left=left)
    model = build_with(lambda: BridgeTower(config), state)
    assert isinstance(model, BridgeTower)
    image = model.encode_image(recording.input("image"))
    text = model.encode_text(recording.input("input_ids"), recording.input("attention_mask").bool())
    fused = model.fuse(image, text)
    outputs: Outputs = {
        "text_features": fused.text_BLD,
        "image_features": fused.image_BND,
        "pooled": fused.pooled_BP,
    }
    if "mlm_score.bias" in recording.weights:
        outputs["mlm_logits"] = model.masked_logits(fused.text_BLD)
    if "itm_score.fc.bias" in recording.weights:
        outputs["itm_logits"] = model.match_logits(fused.pooled_BP)
    if "itc_text_head.fc.bias" in recording.weights:
        outputs["itc_text"], outputs["itc_image"] = model.embed_text(text), model.embed_image(image)
    if "vqa_classifier.0.weight" in recording.weights:
        outputs["vqa_logits"] = _classifier(recording, "vqa_classifier", config)(fused.pooled_BP)
    return outputs


def _bridgetower_config(recording: Recording) -> BridgeTowerConfig:
    where = recording.folder / "config.json"

    def part(name: str) -> dict[str, Any]:
        values: dict[str, Any] = recording.value(recording.config, name, dict)
        return values

    def integer(values: Mapping[str, Any], name: str, inside: str) -> int:
        value: int = recording.value(values, name, int, f"{inside}.")
        return value

    width = recording.value(recording.config, "width", int)
    vision, text, fusion = part("vision"), dict(part("text")), part("cross_modal")
    layers, pad = integer(text, "layers", "text"), integer(text, "pad", "text")
    del text["layers"], text["pad"]
    shared = {name: text.get(name) for name in ("heads", "ffn")}
    if {name: fusion.get(name) for name in shared} != shared:
        raise CheckpointError(where, f"cross_modal must have heads and ffn of text, {shared}")
    try:
        return BridgeTowerConfig(
            from_json(VisionConfig, {**vision, "width": width, "interpolation": "bicubic"}, f"{where}: vision"),
            from_json(TextConfig, {**text, "width": width, "first_position": pad + 1}, f"{where}: text"),
            text_layers=layers,
            fusion_layers=integer(fusion, "layers", "cross_modal"),
            bridge=recording.value(recording.config, "bridge", str),
            fusion_norm_eps=recording.value(fusion, "layer_norm_eps", float, "cross_modal."),
            embed_dim=recording.value(recording.config, "embed_dim", int),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(where, str(error)) from error


def _classifier(recording: Recording, name: str, config: BridgeTowerConfig) -> nn.Module:
    """A classifier of the weights, whose sizes config.json has."""
    scale = recording.value(recording.config, "head_hidden_scale", float)
    classes = recording.value(recording.config, "answers", int)
    head = ClassifierHead(2 * config.text.width, classes, scale=scale)
    parts = {"expand": 0, "norm": 1, "classify": 3}
    tensors = {f"{part}.{kind}": f"{name}.{i}.{kind}" for part, i in parts.items() for kind in ("weight", "bias")}
    lost = [official for official in tensors.values() if official not in recording.weights]
    if lost:
        raise CheckpointError(recording.folder, f"the weights have no {lost[0]}")
    head.load_state_dict({ours: recording.weights[official] for ours, official in tensors.items()})
    return head.eval()


def _eve_outputs(recording: Recording) -> Outputs:
    """States of pairs, of pictures and of texts, and the auxiliary loss of every soft router, lowest first."""
    config = _eve_config(recording)
    left = dict.fromkeys((CLASSIFIER, *BI_ATTENTION), "a head of its own")
    state, _ = eve_state(recording.weights, config, recording.folder, left=left)
    model = build_with(lambda: Eve(config), state)
    assert isinstance(model, Eve)
    image = model.encode_image(recording.input("image"))
    text = model.encode_text(recording.input("input_ids"), recording.input("attention_mask").bool())
    modes: dict[str, Callable[[], Encoded]] = {
        "fusion": lambda: model.fuse(image, text).states(),
        "vision": lambda: model.image_states(image),
        "text": lambda: model.text_states(text),
    }
    outputs: Outputs = {}
    for name, run in modes.items():
        with record_routing(model) as routings:
            outputs[name] = run().hidden_BLD
        losses = [balance_loss({layer: calls}) for layer, calls in routings.items()]
        outputs[f"{name}_aux_per_layer"] = torch.stack(losses) if losses else torch.zeros(0)
    return outputs


def _eve_config(recording: Recording) -> EveConfig:
    """With the released code's behaviour, but for its noise and its dropping, which are not recorded."""
    values, where = recording.config, recording.folder / "config.json"

    def integer(name: str) -> int:
        value: int = recording.value(values, name, int)
        return value

    kinds = {"width": int, "heads": int, "activation": str, "layer_norm_eps": float}
    shared = {name: recording.value(values, name, kind) for name, kind in kinds.items()}
    vision = {"layers": integer("layers"), "patch": integer("patch"), "image_size": integer("image_size")}
    text = {"ffn": integer("ffn"), "vocab_size": integer("vocab_size"), "max_positions": integer("text_positions")}
    soft = recording.value(values, "soft_moe_layers", list)
    if soft != list(range(vision["layers"] - len(soft), vision["layers"])):
        raise CheckpointError(where, f"soft_moe_layers must be the topmost of {vision['layers']} layers, not {soft}")
    by_modality = any(name.endswith(".moe.vision_embed") for name in recording.weights)
    try:
        return EveConfig(
            from_json(VisionConfig, {**vision, **shared, "interpolation": "bicubic"}, f"{where}: model"),
            from_json(TextConfig, {**text, **shared}, f"{where}: model"),
            deep_layers=len(soft),
            moe=MoEConfig(
                integer("experts"),
                integer("top_k"),
                modality_routing=by_modality,
                modality_into_experts=by_modality,
                route_padding=True,
            ),
            embed_dim=contrastive_width(recording.weights, integer("width"), recording.folder),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(where, str(error)) from error


FAMILIES: dict[str, Callable[[Recording], Outputs]] = {
    "mplug": _mplug_outputs,
    "bridgetower": _bridgetower_outputs,
    "eve": _eve_outputs,
}
"""By config.json's ``model``."""
