"""Models made from a configuration: their shapes alone, or with given tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from triptych.checkpoints.mapping import Shape
from triptych.checkpoints.reading import Tensors


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, Shape]:
    """Name and shape of every tensor of a model, without computing or allocating it."""
    with torch.device("meta"):
        model = build()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build_with(build: Callable[[], nn.Module], state: Tensors) -> nn.Module:
    """A model, in evaluation mode, that owns the given tensors.

    With every tensor given nothing is initialised (fast, and no memory twice); the others get the model's own
    initialisation with a fixed seed, so that a conversion always gives the same file.
    """
    with torch.device("meta"):
        model = build()
    if model.state_dict().keys() == state.keys():
        model.load_state_dict(state, assign=True)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
        model.load_state_dict(state, strict=False)
    return model.eval()
