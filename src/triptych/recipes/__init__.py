"""Recipes: functions that return a complete configuration. The command line finds them by name here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from triptych.recipes import flickr8k, mplug, shapes
from triptych.training.runs import Recipe

PRETRAINING: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "mplug_base_4m": mplug.mplug_base_4m,
        "mplug_base_14m": mplug.mplug_base_14m,
        "mplug_large_14m": mplug.mplug_large_14m,
        "flickr8k": flickr8k.flickr8k,
        "shapes_tiny": shapes.shapes_tiny,
    }
)

CAPTIONING: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "coco_base": mplug.caption_coco_base,
        "coco_large": mplug.caption_coco_large,
        "flickr8k": flickr8k.caption_flickr8k,
        "shapes_tiny": shapes.caption_shapes_tiny,
    }
)

RETRIEVAL: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "coco_base": mplug.retrieval_coco_base,
        "coco_large": mplug.retrieval_coco_large,
        "flickr8k": flickr8k.retrieval_flickr8k,
        "shapes_tiny": shapes.retrieval_shapes_tiny,
    }
)

VQA: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "vqa_v2_base": mplug.vqa_v2_base,
        "vqa_v2_large": mplug.vqa_v2_large,
        "shapes_tiny": shapes.vqa_shapes_tiny,
    }
)

ENTAILMENT: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "snli_ve_base": mplug.snli_ve_base,
        "snli_ve_large": mplug.snli_ve_large,
        "shapes_tiny": shapes.entailment_shapes_tiny,
    }
)

FINETUNING: Mapping[str, Mapping[str, Callable[[], Recipe]]] = MappingProxyType(
    {"caption": CAPTIONING, "retrieval": RETRIEVAL, "vqa": VQA, "entailment": ENTAILMENT}
)


def find(recipes: Mapping[str, Callable[[], Recipe]], name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in recipes:
        raise ValueError(f"there is no recipe {name!r}; there are: {', '.join(recipes)}")
    return recipes[name]()
