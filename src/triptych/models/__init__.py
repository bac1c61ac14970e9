"""The networks, and the one list of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from triptych.models.bridgetower import SIZES as BRIDGETOWER_SIZES
from triptych.models.bridgetower import BridgeTower, BridgeTowerConfig
from triptych.models.eve import SIZES as EVE_SIZES
from triptych.models.eve import Eve, EveConfig
from triptych.models.mplug import SIZES as MPLUG_SIZES
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.protocol import VisionLanguageModel


@dataclass(frozen=True)
class ModelFamily:
    """One network and its sizes.

    Attributes:
        model: the class; its constructor takes a ``config``.
        config: the class of its configuration, a frozen dataclass.
        sizes: named configurations; every family has a ``tiny`` one.
    """

    model: type[VisionLanguageModel]
    config: type[Any]
    sizes: Mapping[str, Any]


MODELS: Mapping[str, ModelFamily] = MappingProxyType(
    {
        MPlug.model_type: ModelFamily(MPlug, MPlugConfig, MappingProxyType(MPLUG_SIZES)),
        BridgeTower.model_type: ModelFamily(BridgeTower, BridgeTowerConfig, MappingProxyType(BRIDGETOWER_SIZES)),
        Eve.model_type: ModelFamily(Eve, EveConfig, MappingProxyType(EVE_SIZES)),
    }
)
"""Every network by its ``model_type``."""


ModelConfig = MPlugConfig | BridgeTowerConfig | EveConfig
"""The configuration of some network."""


def model_type_of(config: ModelConfig) -> str:
    """The network that a configuration is of."""
    return next(model_type for model_type, family in MODELS.items() if isinstance(config, family.config))


def build(model_type: str, config: Any) -> VisionLanguageModel:
    """A freshly initialised network.

    Args:
        model_type: a key of :data:`MODELS`.
        config: its configuration, or the name of one of its sizes.
    """
    if model_type not in MODELS:
        raise ValueError(f"no model is called {model_type!r}; there are {', '.join(sorted(MODELS))}")
    family = MODELS[model_type]
    if isinstance(config, str):
        if config not in family.sizes:
            raise ValueError(f"{model_type} has no size {config!r}; it has {', '.join(sorted(family.sizes))}")
        config = family.sizes[config]
    if not isinstance(config, family.config):
        raise ValueError(f"{model_type} needs a {family.config.__name__}, not a {type(config).__name__}")
    return family.model(config)
