"""Optimiser groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from triptych.models.protocol import VisionLanguageModel
from triptych.training.muon import Muon

Group = Literal["base", "fusion", "head", "vision"]
_GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule; the defaults are mPLUG-base's pre-training (X-PLUG/mPLUG configs, paper 5.1).

    Attributes:
        lr: peak of everything that has no rate of its own.
        vision_lr: peak of the vision encoder; ``None`` for the same as ``lr``.
        fusion_lr: peak of what joins both encoders: projections to the fusion, its layers, bridges and poolers, and a
            decoder, whose layers are of the same kind; ``None`` for the same as ``lr``. What BridgeTower's official
            code gives as a multiplier (``lr_mult_cross_modal``) is a rate here.
        head_lr: peak of the heads of pre-training and of tasks; ``None`` for the same as ``lr``. Type vectors, the
            temperature and METER's gates stay at ``lr`` (officially, too: meter_utils.py:265-356).
        warmup_lr: where the linear warm-up starts, for all groups.
        warmup_steps: its length.
        schedule: after the warm-up a cosine to ``min_lr``, every step (``cosine``) or held constant within an epoch
            as mPLUG's scheduler does (``epoch_cosine``); or a straight line to it (``linear``, BridgeTower and EVE).
        decay: which parameters get no weight decay: biases, norms and single vectors (``matrices``), or exactly what
            the official grouping spares (``official``): names with "bias" or "LayerNorm.weight", so that CLIP's norms,
            the class token, position tables and the temperature are decayed (mPLUG's optim/optim_factory.py:154-184),
            the norm in a classifier of a task (BridgeTower's meter_utils.py:269), and those of EVE's norms whose names
            there end in a modality: of words, and before the feed-forward networks (ssyze/EVE optim.py).
        muon_lr: peak of Muon, which then takes the matrices of the layers; embeddings, convolutions, norms and biases
            stay with AdamW. From nothing it needs a fraction of AdamW's steps. ``None``, as the papers: AdamW alone.
        clip: gradient norm is cut to this; ``None`` for never (BridgeTower).
    """

    lr: float = 1e-4
    vision_lr: float | None = 1e-5
    fusion_lr: float | None = None
    head_lr: float | None = None
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    warmup_steps: int = 2000
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    schedule: Literal["cosine", "epoch_cosine", "linear"] = "cosine"
    decay: Literal["matrices", "official"] = "matrices"
    muon_lr: float | None = None


class Optimizers:
    """Optimisers that share the work of one step, and look like one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Every one makes its step."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` gave.

        Raises:
            ValueError: it is of other optimisers.
        """
        if len(state["parts"]) != len(self.parts):
            raise ValueError(f"the state of {len(state['parts'])} optimisers does not fit {len(self.parts)}")
        for part, values in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(values)


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizers:
    """AdamW, and Muon where ``muon_lr`` is set, over the trainable parameters in groups by learning rate and decay."""
    group_of = _groups(module)
    rates = {"base": None, "fusion": config.fusion_lr, "head": config.head_lr, "vision": config.vision_lr}
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            by_muon = config.muon_lr is not None and _multiplies(name, parameter)
            group = group_of[name] if group_of[name] == "vision" or rates[group_of[name]] is not None else "base"
            key = (by_muon, _GROUPS.index(group), _decays(name, parameter, config))
            groups.setdefault(key, []).append(parameter)

    def described(muon: bool) -> list[dict[str, Any]]:
        of_all = config.muon_lr if muon and config.muon_lr is not None else config.lr
        return [
            {
                "params": parameters,
                "lr": (peak := of_all if (rate := rates[_GROUPS[number]]) is None else of_all * (rate / config.lr)),
                "peak_lr": peak,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (by_muon, number, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
            if by_muon == muon
        ]

    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(described(muon=False), betas=config.betas, eps=config.eps, fused=True)
    ]
    if config.muon_lr is not None:
        parts.append(Muon(described(muon=True), lr=config.muon_lr))
    return Optimizers(*parts)


def _groups(module: nn.Module) -> dict[str, Group]:
    """Which group each parameter is of, by its name."""
    models = {
        f"{name}." if name else "": model
        for name, model in module.named_modules()
        if isinstance(model, VisionLanguageModel)
    }
    return {name: _group(name, models) for name, _ in module.named_parameters()}


def _group(name: str, models: Mapping[str, VisionLanguageModel]) -> Group:
    """``models`` by what the names of their parameters start with."""
    if "vision." in name:
        return "vision"
    if not models or _is_single(name):
        return "base"
    start = next((start for start in models if name.startswith(start)), None)
    if start is None:  # of a task: a head, or attention to a second picture
        return "fusion" if name.startswith("second_attention.") else "head"
    parts, child = models[start].parts, name.removeprefix(start).partition(".")[0]
    used = {part for part, names in parts.items() if child in names}
    if used & {"fusion", "pooled", "decoder"}:  # poolers are also a part of matching
        return "fusion"
    return "head" if used & {"matching", "embedding", "masked"} else "base"


def _is_single(name: str) -> bool:
    """Whether a parameter is at the base rate wherever it is: vectors of types, the temperature, METER's gates."""
    return name.rpartition(".")[2] in ("token_type", "picture_types", "temperature") or ".gate." in name


def _multiplies(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or a stack of experts' matrices, that states are multiplied with."""
    return parameter.dim() in (2, 3) and not (_is_table(name) or name.endswith("bias"))


def _is_table(name: str) -> bool:
    """Whether a matrix is a table of vectors: its rows are looked up or added, not multiplied with."""
    return _is_added(name) or "embeddings." in name or "word.weight" in name


def _is_added(name: str) -> bool:
    """Whether a matrix holds vectors that are added to states (of places, of modalities, of NLVR2's two pictures)."""
    return "position_embedding" in name or "picture_types" in name or name.endswith("router.modality")


def _decays(name: str, parameter: nn.Parameter, config: OptimConfig) -> bool:
    if config.decay == "matrices":
        return parameter.dim() > 1 and not (_is_added(name) or name.endswith("bias"))
    decayed = ("vision.", "bridge.", "text_embeddings.", ".ffn.")
    decayed_norm = any(part in name for part in decayed) or name == "head.norm.weight"
    spared_norm = name.endswith("norm.weight") and not decayed_norm
    return not (name.endswith("bias") or spared_norm)


def learning_rate(config: OptimConfig, peak: float, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate of a group at a step (0-based) out of ``steps``."""
    if step < config.warmup_steps:
        return config.warmup_lr + (peak - config.warmup_lr) * step / config.warmup_steps
    progress = step / steps
    if config.schedule == "epoch_cosine":
        progress = (step // steps_per_epoch) / math.ceil(steps / steps_per_epoch)
    else:
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = min(config.min_lr, peak)
    if config.schedule == "linear":
        return peak + (low - peak) * min(1.0, progress)
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Optimizers, config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Set every group's rate for a step and return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, group["peak_lr"], step, steps, steps_per_epoch)
    return float(optimizer.param_groups[0]["lr"])
