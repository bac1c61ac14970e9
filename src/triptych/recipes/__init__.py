"""Recipes: functions that return a complete configuration. The command line finds them by name here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from triptych.recipes import bridgetower, eve, flickr8k, mplug, shapes, small, unimodal
from triptych.training.runs import Recipe

PRETRAINING: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "mplug_base_4m": mplug.mplug_base_4m,
        "mplug_base_14m": mplug.mplug_base_14m,
        "mplug_large_14m": mplug.mplug_large_14m,
        "bridgetower_base": bridgetower.bridgetower_base,
        "bridgetower_large": bridgetower.bridgetower_large,
        "eve_base_4m": eve.eve_base_4m,
        "eve_large_4m": eve.eve_large_4m,
        "eve_large_16m": eve.eve_large_16m,
        "flickr8k": flickr8k.flickr8k,
        "flickr8k_bridgetower": flickr8k.flickr8k_bridgetower,
        "flickr8k_eve": flickr8k.flickr8k_eve,
        "shapes_tiny": shapes.shapes_tiny,
        "shapes_tiny_bridgetower": shapes.shapes_tiny_bridgetower,
        "shapes_tiny_eve": shapes.shapes_tiny_eve,
    }
)

CAPTIONING: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "coco_base": mplug.caption_coco_base,
        "coco_large": mplug.caption_coco_large,
        "coco_base_self_critical": mplug.self_critical_coco_base,
        "coco_large_self_critical": mplug.self_critical_coco_large,
        "bridgetower_coco_base": bridgetower.bridgetower_caption_coco_base,
        "eve_coco_base": eve.eve_caption_coco_base,
        "flickr8k": flickr8k.caption_flickr8k,
        "flickr8k_eve": flickr8k.caption_flickr8k_eve,
        "flickr8k_self_critical": small.self_critical_flickr8k,
        "shapes_tiny": shapes.caption_shapes_tiny,
        "shapes_tiny_self_critical": shapes.self_critical_shapes_tiny,
        "shapes_tiny_eve": shapes.caption_shapes_tiny_eve,
        "shapes_tiny_eve_self_critical": shapes.self_critical_shapes_tiny_eve,
    }
)

RETRIEVAL: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "coco_base": mplug.retrieval_coco_base,
        "coco_large": mplug.retrieval_coco_large,
        "flickr30k_base": mplug.retrieval_flickr30k_base,
        "flickr30k_large": mplug.retrieval_flickr30k_large,
        "bridgetower_coco_base": bridgetower.bridgetower_coco_base,
        "bridgetower_flickr30k_base": bridgetower.bridgetower_flickr30k_base,
        "bridgetower_flickr30k_base_itm": bridgetower.bridgetower_flickr30k_base_itm,
        "eve_coco_base": eve.eve_coco_base,
        "eve_coco_large": eve.eve_coco_large,
        "eve_flickr30k_base": eve.eve_flickr30k_base,
        "eve_flickr30k_large": eve.eve_flickr30k_large,
        "flickr8k": flickr8k.retrieval_flickr8k,
        "flickr8k_itm": flickr8k.retrieval_itm_flickr8k,
        "flickr8k_eve": flickr8k.retrieval_flickr8k_eve,
        "shapes_tiny": shapes.retrieval_shapes_tiny,
        "shapes_tiny_itm": shapes.retrieval_itm_shapes_tiny,
        "shapes_tiny_eve": shapes.retrieval_shapes_tiny_eve,
    }
)

VQA: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "vqa_v2_base": mplug.vqa_v2_base,
        "vqa_v2_large": mplug.vqa_v2_large,
        "bridgetower_vqa_v2_base": bridgetower.bridgetower_vqa_v2_base,
        "bridgetower_vqa_v2_large": bridgetower.bridgetower_vqa_v2_large,
        "bridgetower_vqa_v2_base_scratch": bridgetower.bridgetower_vqa_v2_base_scratch,
        "bridgetower_vqa_v2_large_scratch": bridgetower.bridgetower_vqa_v2_large_scratch,
        "eve_vqa_v2_base": eve.eve_vqa_v2_base,
        "eve_vqa_v2_large": eve.eve_vqa_v2_large,
        "easy_vqa": small.easy_vqa,
        "daquar": small.daquar,
        "shapes_tiny": shapes.vqa_shapes_tiny,
        "shapes_tiny_classify": shapes.vqa_shapes_tiny_classify,
        "shapes_tiny_eve": shapes.vqa_shapes_tiny_eve,
    }
)

ENTAILMENT: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "snli_ve_base": mplug.snli_ve_base,
        "snli_ve_large": mplug.snli_ve_large,
        "bridgetower_snli_ve_base": bridgetower.bridgetower_snli_ve_base,
        "eve_snli_ve_base": eve.eve_snli_ve_base,
        "snli_ve_flickr8k": small.snli_ve_flickr8k,
        "shapes_tiny": shapes.entailment_shapes_tiny,
        "shapes_tiny_eve": shapes.entailment_shapes_tiny_eve,
    }
)

GROUNDING: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "refcoco_base": mplug.refcoco_base,
        "refcoco_large": mplug.refcoco_large,
        "bridgetower_refcoco_base": bridgetower.bridgetower_refcoco_base,
        "eve_refcoco_base": eve.eve_refcoco_base,
        "nlvr_boxes": small.nlvr_boxes,
        "coco_boxes": small.coco_boxes,
        "shapes_tiny": shapes.grounding_shapes_tiny,
        "shapes_tiny_eve": shapes.grounding_shapes_tiny_eve,
    }
)

NLVR2: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "nlvr2_base": mplug.nlvr2_base,
        "nlvr2_large": mplug.nlvr2_large,
        "bridgetower_nlvr2_base": bridgetower.bridgetower_nlvr2_base,
        "eve_nlvr2_base": eve.eve_nlvr2_base,
        "eve_nlvr2_large": eve.eve_nlvr2_large,
        "nlvr": small.nlvr,
        "shapes_tiny": shapes.nlvr2_shapes_tiny,
        "shapes_tiny_eve": shapes.nlvr2_shapes_tiny_eve,
    }
)

IMAGE_CLASSIFICATION: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        "cifar_base": unimodal.cifar_base,
        "cifar_probe_base": unimodal.cifar_probe_base,
        "tiny": unimodal.images_tiny,
    }
)

TEXT_CLASSIFICATION: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {**unimodal.GLUE, "tiny": unimodal.texts_tiny}
)

FINETUNING: Mapping[str, Mapping[str, Callable[[], Recipe]]] = MappingProxyType(
    {
        "caption": CAPTIONING,
        "retrieval": RETRIEVAL,
        "vqa": VQA,
        "entailment": ENTAILMENT,
        "grounding": GROUNDING,
        "nlvr2": NLVR2,
        "image_classification": IMAGE_CLASSIFICATION,
        "text_classification": TEXT_CLASSIFICATION,
    }
)


def find(recipes: Mapping[str, Callable[[], Recipe]], name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in recipes:
        raise ValueError(f"there is no recipe {name!r}; there are: {', '.join(recipes)}")
    return recipes[name]()
