"""Models made from a configuration: their shapes alone, or with given tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.mapping import Shape
from triptych.checkpoints.reading import Tensors


def shapes_of(build: Callable[[], nn.Module], where: str | Path) -> dict[str, Shape]:
    """Name and shape of every tensor of a model, without computing or allocating it.

    Raises:
        CheckpointError: there is no model of these sizes; ``where`` says where they come from.
    """
    try:
        model = _skeleton(build)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(where, f"no model has these sizes: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _Uninitialised(TorchFunctionMode):
    """On the meta device filling tensors does nothing, slowly; leave it out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    with _Uninitialised(), torch.device("meta"):
        return build()


def build_with(build: Callable[[], nn.Module], state: Tensors) -> nn.Module:
    """A model, in evaluation mode, that owns the given tensors.

    With every tensor given nothing is initialised (fast, and no memory twice); the others get the model's own
    initialisation with a fixed seed, so that a conversion always gives the same file.
    """
    model = _skeleton(build)
    if model.state_dict().keys() == state.keys():
        model.load_state_dict(state, assign=True)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
        model.load_state_dict(state, strict=False)
    return model.eval()
