"""Optimiser groups and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are mPLUG-base's pre-training (X-PLUG/mPLUG configs, paper 5.1).

    Attributes:
        lr: peak of everything but the vision encoder.
        vision_lr: peak of the vision encoder; ``None`` for the same as ``lr``.
        warmup_lr: where the linear warm-up starts, for all groups.
        warmup_steps: its length.
        schedule: after the warm-up a cosine to ``min_lr``, every step (``cosine``) or held constant within an epoch
            as the official scheduler does (``epoch_cosine``).
        decay: which parameters get no weight decay: biases, norms and single vectors (``matrices``), or exactly what
            the official grouping spares (``official``): names with "bias" or "LayerNorm.weight", so that CLIP's norms,
            the class token, position tables and the temperature are decayed (optim/optim_factory.py:154-184).
        clip: gradient norm is cut to this.
    """

    lr: float = 1e-4
    vision_lr: float | None = 1e-5
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    warmup_steps: int = 2000
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    schedule: Literal["cosine", "epoch_cosine"] = "cosine"
    decay: Literal["matrices", "official"] = "matrices"


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in groups by learning rate and decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            vision = "vision." in name
            groups.setdefault((vision, _decays(name, parameter, config)), []).append(parameter)
    lr_of = {False: config.lr, True: config.lr if config.vision_lr is None else config.vision_lr}
    described = [
        {
            "params": parameters,
            "lr": lr_of[vision],
            "peak_lr": lr_of[vision],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (vision, decays), parameters in sorted(groups.items())
    ]
    return torch.optim.AdamW(described, betas=config.betas, eps=config.eps, fused=True)


def _decays(name: str, parameter: nn.Parameter, config: OptimConfig) -> bool:
    if config.decay == "matrices":
        return parameter.dim() > 1 and "position_embedding" not in name
    spared_norm = name.endswith("norm.weight") and "vision." not in name and "bridge." not in name
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
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int, steps_per_epoch: int
) -> float:
    """Set every group's rate for a step and return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, group["peak_lr"], step, steps, steps_per_epoch)
    return float(optimizer.param_groups[0]["lr"])
