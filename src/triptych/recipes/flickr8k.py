"""Laptop recipes on Flickr8k: 6,000 photographs, from scratch, under two hours on two CPU cores in all."""

from __future__ import annotations

from dataclasses import replace

from triptych.data.transforms import Preprocessing
from triptych.generation import BeamSearch
from triptych.models import MODELS
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.objectives.pretraining import PretrainingConfig
from triptych.objectives.ranking import RankingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.retrieval import RetrievalConfig
from triptych.training.loop import TrainConfig
from triptych.training.optim import OptimConfig
from triptych.training.runs import DataConfig, Recipe


def flickr8k() -> Recipe:
    """mPLUG-small pre-trained from scratch on Flickr8k's training photographs.

    Command: ``triptych pretrain flickr8k --data 'flickr8k/train-*.tar' --evaluate-data flickr8k/dev-00000.tar
    --folder runs/flickr8k``. Hardware: two CPU cores, about an hour. Expect: text-to-image R@10 21 % of
    1,000 photographs (``docs/flickr8k.md``).
    """
    return Recipe(
        name="flickr8k",
        # No teacher: a batch of 128 contrasted with itself learns faster than one of 64 with a teacher and a queue (ITC
        # alone, 16,000 samples: text-to-image R@10 4.6 against 3.4 %).
        objective=PretrainingConfig(queue_size=0, momentum=None, alpha=0.0, distill_language=False),
        model=MODELS["mplug"].sizes["small"],
        data=DataConfig(
            preprocessing=Preprocessing(96), scale=(0.4, 1.0), max_words=24, max_tokens=28, evaluate_limit=200
        ),
        train=TrainConfig(steps=1400, batch_size=128, log_every=20, checkpoint_every=100, evaluate_every=350),
        optim=OptimConfig(
            lr=8e-4, vision_lr=None, muon_lr=0.02, min_lr=1e-5, warmup_lr=1e-5, warmup_steps=100, weight_decay=0.1
        ),
        # By embeddings alone: so few photographs do not teach ITM anything (its loss stays that of guessing).
        retrieval=RetrievalConfig(candidates=0, max_words=24, max_tokens=28),
        captioning=CaptioningConfig(context="fused", search=BeamSearch(3, 4, 20)),
    )


def flickr8k_bridgetower() -> Recipe:
    """BridgeTower-small, with a decoder, pre-trained as :func:`flickr8k`.

    Command: that of :func:`flickr8k` with this name. Hardware: two CPU cores. Expect: it has not been run to its end.
    """
    return replace(flickr8k(), name="flickr8k_bridgetower", model=MODELS["bridgetower"].sizes["small"])


def flickr8k_eve() -> Recipe:
    """EVE-small pre-trained from scratch as in its paper: hidden words and hidden patches, nothing else.

    Command: that of :func:`flickr8k` with this name. Hardware: two CPU cores. Expect: it has not been run to its end.
    """
    return replace(
        flickr8k(),
        name="flickr8k_eve",
        objective=MaskedSignalConfig(image_ratio=0.75, text_ratio=0.5),
        model=replace(MODELS["eve"].sizes["small"], decoder_layers=0),
    )


def caption_flickr8k() -> Recipe:
    """Captions on Flickr8k from :func:`flickr8k`; six minutes. Expect: CIDEr 27.7 (``docs/flickr8k.md``)."""
    recipe = flickr8k()
    return replace(
        recipe,
        name="caption_flickr8k",
        objective=CaptioningConfig(context="image", search=BeamSearch(3, 4, 20), label_smoothing=0.1),
        data=replace(recipe.data, scale=(0.5, 1.0)),
        train=replace(recipe.train, steps=600, evaluate_every=0),
        optim=replace(recipe.optim, lr=3e-4, muon_lr=0.007, warmup_steps=50),
    )


def caption_flickr8k_eve() -> Recipe:
    """As :func:`caption_flickr8k`, longer, by a decoder that :func:`flickr8k_eve` is given here; not run to its end."""
    recipe = caption_flickr8k()
    return replace(
        recipe,
        name="caption_flickr8k_eve",
        model=MODELS["eve"].sizes["small"],
        train=replace(recipe.train, steps=900),
    )


def retrieval_flickr8k() -> Recipe:
    """Retrieval on Flickr8k from :func:`flickr8k`; eight minutes. Expect: R@1 4.0 (text to image) and 5.6 %."""
    recipe = flickr8k()
    return replace(
        recipe,
        name="retrieval_flickr8k",
        objective=AlignmentConfig(queue_size=0, momentum=None, alpha=0.0),
        data=replace(recipe.data, scale=(0.5, 1.0)),
        train=replace(recipe.train, steps=400, evaluate_every=0),
        optim=replace(recipe.optim, lr=3e-4, muon_lr=0.007, warmup_steps=50),
    )


def retrieval_flickr8k_eve() -> Recipe:
    """As :func:`retrieval_flickr8k`, longer, from :func:`flickr8k_eve`, which has no ITC; not run to its end."""
    recipe = retrieval_flickr8k()
    return replace(
        recipe,
        name="retrieval_flickr8k_eve",
        model=replace(MODELS["eve"].sizes["small"], decoder_layers=0),
        train=replace(recipe.train, steps=800),
    )


def retrieval_itm_flickr8k() -> Recipe:
    """Matching alone, among random false captions, from :func:`flickr8k`; eight minutes.

    Against the hard negatives of pre-training ITM learns nothing from so few photographs; against random ones it does,
    and a fused state that knows whether a text fits is a start for entailment.
    """
    recipe = flickr8k()
    return replace(
        recipe,
        name="retrieval_itm_flickr8k",
        objective=RankingConfig(false_texts=3),
        data=replace(recipe.data, scale=(0.5, 1.0), flip=True),
        train=replace(recipe.train, steps=400, batch_size=64, evaluate_every=0),
        optim=replace(recipe.optim, lr=3e-4, muon_lr=0.004, warmup_steps=50),
        retrieval=replace(recipe.retrieval, candidates=50),
    )
