"""Laptop recipes on small real data sets: minutes on two CPU cores. ``benchmarks/real_data.py`` runs them all."""

from __future__ import annotations

from dataclasses import replace

from triptych.data.transforms import Preprocessing
from triptych.generation import BeamSearch
from triptych.recipes.flickr8k import caption_flickr8k, flickr8k
from triptych.recipes.shapes import shapes_tiny
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.grounding import GroundingConfig
from triptych.tasks.nlvr2 import Nlvr2Config
from triptych.tasks.self_critical import SelfCriticalConfig
from triptych.tasks.vqa import VqaConfig
from triptych.training.runs import Recipe


def easy_vqa() -> Recipe:
    """Questions about drawings of one shape (victorzhou.com), from nothing, 64 px.

    Command: ``triptych finetune vqa easy_vqa --data train.jsonl --image-root train.tar --folder runs/easy``, with one
    row a picture that lists its ``questions``. Hardware: two CPU cores, four minutes. Expect: what
    ``benchmarks/results/real_data.json`` holds.
    """
    recipe = shapes_tiny()
    return replace(
        recipe,
        name="easy_vqa",
        objective=VqaConfig(per_picture=4, search=BeamSearch(1, 1, 4)),
        data=replace(recipe.data, preprocessing=replace(recipe.data.preprocessing, image_size=64), evaluate_limit=0),
        train=replace(recipe.train, steps=800, log_every=50, checkpoint_every=400),
        optim=replace(recipe.optim, lr=6e-4, muon_lr=0.006, warmup_steps=50),
    )


def _flickr8k(name: str, steps: int) -> Recipe:
    """The rates that fine-tune the network of :func:`triptych.recipes.flickr8k.flickr8k`."""
    recipe = flickr8k()
    return replace(
        recipe,
        name=name,
        data=replace(recipe.data, scale=(0.7, 1.0), flip=False, evaluate_limit=0, max_tokens=48),
        train=replace(recipe.train, steps=steps, batch_size=32, evaluate_every=0),
        optim=replace(recipe.optim, lr=2e-4, muon_lr=0.003, warmup_steps=30),
    )


def daquar() -> Recipe:
    """Questions about indoor photographs (DAQUAR), from matching on Flickr8k as below; three minutes.

    Answers are lists that count as sets: give the parts in one order as one text.
    """
    return replace(_flickr8k("daquar", 300), objective=VqaConfig(per_picture=4, search=BeamSearch(1, 1, 8)))


def snli_ve_flickr8k() -> Recipe:
    """The entailment pairs of SNLI-VE whose photographs Flickr8k has; less than a minute.

    From :func:`triptych.recipes.flickr8k.retrieval_itm_flickr8k`, whose fused state knows whether a text fits: from
    pre-training alone what is learned of 165 photographs is not significantly better than blind.
    """
    recipe = _flickr8k("snli_ve_flickr8k", 100)
    return replace(
        recipe,
        objective=EntailmentConfig(per_picture=4, head_dropout=0.1),
        optim=replace(recipe.optim, lr=1e-4, muon_lr=1.5e-3),
    )


def nlvr() -> Recipe:
    """Sentences about one drawing of three boxes (NLVR), from nothing, 192 px: a drawing is 400 x 100.

    Half of the labels of its training list are only probably right, and its best networks of 2018 reached 68 %.
    """
    recipe = shapes_tiny()
    return replace(
        recipe,
        name="nlvr",
        objective=Nlvr2Config(pictures=1),
        data=replace(recipe.data, preprocessing=Preprocessing(192), max_words=60, max_tokens=62, evaluate_limit=0),
        train=replace(recipe.train, steps=300, batch_size=32, log_every=20),
        optim=replace(recipe.optim, lr=4e-4, muon_lr=0.004, warmup_steps=30),
    )


def nlvr_boxes() -> Recipe:
    """Phrases such as "the small yellow circle" in the drawings of NLVR, from nothing, 192 px."""
    recipe = nlvr()
    return replace(
        recipe,
        name="nlvr_boxes",
        objective=GroundingConfig(bins=96, weighting="none", per_picture=4, augment=False),
        train=replace(recipe.train, steps=400),
    )


def coco_boxes() -> Recipe:
    """Categories that occur once in a COCO photograph, from matching on Flickr8k; a minute on 80 photographs."""
    return replace(_flickr8k("coco_boxes", 150), objective=GroundingConfig(bins=96, weighting="none", per_picture=4))


def self_critical_flickr8k() -> Recipe:
    """Self-critical training of :func:`triptych.recipes.flickr8k.caption_flickr8k`'s captions."""
    recipe = caption_flickr8k()
    assert isinstance(recipe.objective, CaptioningConfig)
    return replace(
        recipe,
        name="self_critical_flickr8k",
        objective=SelfCriticalConfig(recipe.objective, explore=BeamSearch(5, 4, 20)),
        train=replace(recipe.train, steps=150, batch_size=32, log_every=10),
        optim=replace(recipe.optim, lr=2e-5, muon_lr=5e-4, warmup_steps=10),
    )
