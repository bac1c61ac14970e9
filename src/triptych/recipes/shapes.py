"""Laptop recipes on Shapes, the built-in world: minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch
from triptych.models.mplug import SIZES
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.pretraining import PretrainingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.retrieval import RetrievalConfig
from triptych.tasks.vqa import VqaConfig
from triptych.training.loop import TrainConfig
from triptych.training.optim import OptimConfig
from triptych.training.runs import DataConfig, Recipe

_WORDS = 32  # three objects take up to 28 words, all of them single pieces


def shapes_tiny() -> Recipe:
    """mPLUG-tiny pre-trained on Shapes with all four objectives; ``make demo`` runs it.

    Command: ``triptych data shapes shapes --size 48 --max-objects 2 && triptych pretrain shapes_tiny
    --data 'shapes/train-*.tar' --evaluate-data 'shapes/test-*.tar' --folder runs/shapes``. Hardware: two CPU cores,
    under ten minutes. Expect: what ``benchmarks/results/demo.json`` holds.
    """
    return Recipe(
        name="shapes_tiny",
        # Soft targets (alpha > 0) slow learning down at this size: measured.
        objective=PretrainingConfig(queue_size=2048, momentum=0.99, alpha=0.0, distill_language=False),
        model=SIZES["tiny"],
        data=DataConfig(
            preprocessing=Preprocessing(48, HALF, HALF),
            scale=None,
            augment=False,
            flip=False,
            max_words=_WORDS,
            max_tokens=_WORDS + 2,
            evaluate_limit=200,
        ),
        train=TrainConfig(steps=600, batch_size=64, log_every=25, checkpoint_every=200),
        optim=OptimConfig(
            lr=8e-4, vision_lr=None, muon_lr=0.01, min_lr=1e-5, warmup_lr=1e-5, warmup_steps=50, weight_decay=0.02
        ),
        retrieval=RetrievalConfig(candidates=16, max_words=_WORDS, max_tokens=_WORDS + 2),
        captioning=CaptioningConfig(context="fused", search=BeamSearch(1, 1, _WORDS + 2)),
    )


def caption_shapes_tiny() -> Recipe:
    """Captions from the picture alone (mPLUG's fine-tuning), starting from :func:`shapes_tiny`; four minutes.

    The rates are those of pre-training: what is still to be learned, telling shapes apart, is in the vision encoder.
    """
    recipe = shapes_tiny()
    return replace(
        recipe,
        name="caption_shapes_tiny",
        objective=CaptioningConfig(context="image", search=BeamSearch(3, 1, _WORDS + 2)),
        train=replace(recipe.train, steps=1600, log_every=50, checkpoint_every=400),
    )


def retrieval_shapes_tiny() -> Recipe:
    """Retrieval (ITC and ITM), starting from :func:`shapes_tiny`; a minute."""
    recipe = shapes_tiny()
    return replace(
        recipe,
        name="retrieval_shapes_tiny",
        objective=AlignmentConfig(queue_size=2048, momentum=0.99, alpha_warmup=0),
        train=replace(recipe.train, steps=200),
        optim=replace(recipe.optim, lr=3e-4, muon_lr=3e-3, warmup_steps=20),
    )


def vqa_shapes_tiny() -> Recipe:
    """Questions about Shapes answered freely, four of a picture in a step, starting from :func:`shapes_tiny`."""
    recipe = shapes_tiny()
    return replace(
        recipe,
        name="vqa_shapes_tiny",
        objective=VqaConfig(per_picture=4, search=BeamSearch(1, 1, 8)),
        train=replace(recipe.train, steps=1000, log_every=50, checkpoint_every=250),
    )


def entailment_shapes_tiny() -> Recipe:
    """Hypotheses about Shapes, three of a picture in a step, starting from :func:`shapes_tiny`."""
    recipe = shapes_tiny()
    return replace(
        recipe,
        name="entailment_shapes_tiny",
        objective=EntailmentConfig(per_picture=3),
        train=replace(recipe.train, steps=600, log_every=50),
    )
