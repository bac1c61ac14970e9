"""Laptop recipes on Flickr8k: 6,000 photographs, from scratch, under two hours on two CPU cores in all."""

from __future__ import annotations

from dataclasses import replace

from triptych.data.transforms import Preprocessing
from triptych.generation import BeamSearch
from triptych.models.mplug import SIZES
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.pretraining import PretrainingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.retrieval import RetrievalConfig
from triptych.training.loop import TrainConfig
from triptych.training.optim import OptimConfig
from triptych.training.runs import DataConfig, Recipe


def flickr8k() -> Recipe:
    """mPLUG-small pre-trained from scratch on Flickr8k's training photographs.

    Command: ``triptych pretrain flickr8k --data 'flickr8k/train-*.tar' --evaluate-data flickr8k/dev-00000.tar
    --folder runs/flickr8k``. Hardware: two CPU cores. Expect: not measured yet at its full length.
    """
    return Recipe(
        name="flickr8k",
        objective=PretrainingConfig(queue_size=4096, momentum=0.995, alpha_warmup=1000, distill_language=False),
        model=SIZES["small"],
        data=DataConfig(
            preprocessing=Preprocessing(128), scale=(0.4, 1.0), max_words=24, max_tokens=28, evaluate_limit=500
        ),
        train=TrainConfig(
            steps=4000, batch_size=64, workers=1, log_every=50, checkpoint_every=250, evaluate_every=1000
        ),
        optim=OptimConfig(lr=5e-4, vision_lr=None, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=300, weight_decay=0.1),
        retrieval=RetrievalConfig(candidates=32, max_words=24, max_tokens=28),
        captioning=CaptioningConfig(context="fused", search=BeamSearch(3, 4, 20)),
    )


def caption_flickr8k() -> Recipe:
    """Captions on Flickr8k from :func:`flickr8k`."""
    recipe = flickr8k()
    return replace(
        recipe,
        name="caption_flickr8k",
        objective=CaptioningConfig(context="image", search=BeamSearch(3, 4, 20), label_smoothing=0.1),
        data=replace(recipe.data, scale=(0.5, 1.0)),
        train=replace(recipe.train, steps=1000, evaluate_every=0),
        optim=replace(recipe.optim, lr=2e-4, warmup_steps=50),
    )


def retrieval_flickr8k() -> Recipe:
    """Retrieval on Flickr8k from :func:`flickr8k`."""
    recipe = flickr8k()
    return replace(
        recipe,
        name="retrieval_flickr8k",
        objective=AlignmentConfig(queue_size=4096, alpha_warmup=0),
        data=replace(recipe.data, scale=(0.5, 1.0)),
        train=replace(recipe.train, steps=500, evaluate_every=0),
        optim=replace(recipe.optim, lr=1e-4, warmup_steps=50),
    )
