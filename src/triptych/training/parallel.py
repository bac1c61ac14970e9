"""Processes and devices: torchrun's environment, DDP, precision, and what is applied to a model in which order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from triptych.models.protocol import VisionLanguageModel
from triptych.training.expert_parallel import check_spreads, spread_experts

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes logs and shared files."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Process]:
    """Join the group that ``torchrun`` set up, or run alone without it."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield Process(device=torch.device("cuda" if cuda else "cpu"))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # The others wait while the first evaluates, which takes longer than the default of ten minutes.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """bf16 arithmetic over fp32 master weights, or plain fp32.

    ``auto`` takes bf16 where the processor multiplies matrices in it. Evaluate under ``torch.no_grad``: under
    ``inference_mode`` autocast does not keep the weights that it has cast, and casts them at every use.
    """
    if precision == "fp32" or (precision == "auto" and not fast_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def fast_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies matrices in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def parallelize(
    task: nn.Module, process: Process, *, checkpointing: bool, compile: bool, expert_parallel: bool = False
) -> nn.Module:
    """Prepare a task for training on its device.

    The order matters: recomputation wraps a block's arithmetic, compilation must see the block with it, and DDP must
    see the final parameters.

    Raises:
        ValueError: ``expert_parallel`` and the experts cannot be spread evenly among the processes.
    """
    if expert_parallel:
        check_spreads(task, process.world)
    task.to(process.device)
    set_checkpointing(task, checkpointing)
    if compile:
        compile_blocks(task)
    if process.world == 1:
        return task
    if expert_parallel:
        own = spread_experts(task)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, own)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(task, broadcast_buffers=False, gradient_as_bucket_view=True)


def set_checkpointing(module: nn.Module, enabled: bool) -> None:
    """Recompute the activations of every block in the backward pass, or keep them."""
    for part in module.modules():
        if hasattr(part, "checkpointing"):
            part.checkpointing = enabled  # type: ignore[assignment]


def compile_blocks(module: nn.Module) -> None:
    """Compile each Transformer block by itself: few graphs, quickly built, whatever the model."""
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] in {"blocks", "layers"}:
            for block in part:
                block.compile(dynamic=True)


def compile_inference(model: VisionLanguageModel) -> None:
    """Compile encoding and fusing, with weights packed for the processor: for a model that no longer changes.

    Each shape costs some seconds at first, so it is for data sets; gradients must be off in every call.
    """
    for name in ("encode_image", "encode_text", "fuse", "fuse_text", "pool"):
        setattr(model, name, _frozen(getattr(model, name)))


def _frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor import config  # a second to import

    compiled = torch.compile(function)

    def call(*args: Any) -> Any:
        # Not as an option of torch.compile: TorchDynamo, too, asks whether the weights are constants.
        with config.patch(freezing=True):
            return compiled(*args)

    return call


def unwrap(module: nn.Module) -> nn.Module:
    """The task inside DDP."""
    return cast(nn.Module, module.module) if isinstance(module, DistributedDataParallel) else module
