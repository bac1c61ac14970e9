"""Laptop recipes on Shapes, the built-in world: minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch
from triptych.models import MODELS
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.objectives.pretraining import PretrainingConfig
from triptych.objectives.ranking import RankingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.grounding import GroundingConfig
from triptych.tasks.nlvr2 import Nlvr2Config
from triptych.tasks.registry import TaskConfig
from triptych.tasks.retrieval import RetrievalConfig
from triptych.tasks.self_critical import SelfCriticalConfig
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
        model=MODELS["mplug"].sizes["tiny"],
        data=DataConfig(
            preprocessing=Preprocessing(48, HALF, HALF),
            scale=None,
            augment=None,
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


def shapes_tiny_bridgetower() -> Recipe:
    """BridgeTower-tiny, with a decoder, pre-trained as :func:`shapes_tiny`.

    Command: ``python -m triptych.demo --model bridgetower``, or that of :func:`shapes_tiny` with this recipe's name.
    Hardware: two CPU cores. Expect: what ``benchmarks/results/tasks_bridgetower.json`` holds. The paper pre-trains
    without ITC and PrefixLM; with the same objectives the two networks can be compared, and BridgeTower can write.
    """
    return replace(shapes_tiny(), name="shapes_tiny_bridgetower", model=MODELS["bridgetower"].sizes["tiny"])


def _finetuning(name: str, objective: TaskConfig | AlignmentConfig | RankingConfig, steps: int) -> Recipe:
    """Fine-tuning from a model of Shapes.

    The rates are 0.4 times those of pre-training: at the full rates questions took three times as many steps.
    """
    recipe = shapes_tiny()
    return replace(
        recipe,
        name=name,
        objective=objective,
        train=replace(recipe.train, steps=steps, log_every=50, checkpoint_every=250),
        optim=replace(recipe.optim, lr=4e-4, muon_lr=0.004),
    )


def caption_shapes_tiny() -> Recipe:
    """Captions from the picture alone (mPLUG's fine-tuning), starting from :func:`shapes_tiny`; two minutes."""
    return _finetuning("caption_shapes_tiny", CaptioningConfig("image", search=BeamSearch(3, 1, _WORDS + 2)), 600)


def self_critical_shapes_tiny() -> Recipe:
    """Self-critical training, starting from :func:`caption_shapes_tiny`; a minute."""
    search = BeamSearch(3, 1, _WORDS + 2)
    objective = SelfCriticalConfig(CaptioningConfig("image", search=search), explore=BeamSearch(5, 1, _WORDS + 2))
    recipe = _finetuning("self_critical_shapes_tiny", objective, 60)
    return replace(
        recipe,
        train=replace(recipe.train, batch_size=32, log_every=10),
        optim=replace(recipe.optim, lr=2e-5, muon_lr=2e-4, warmup_steps=5),
    )


def retrieval_shapes_tiny() -> Recipe:
    """Retrieval (ITC and ITM), starting from :func:`shapes_tiny`; a minute."""
    objective = AlignmentConfig(queue_size=2048, momentum=0.99, alpha_warmup=0)
    recipe = _finetuning("retrieval_shapes_tiny", objective, 200)
    return replace(recipe, optim=replace(recipe.optim, lr=3e-4, muon_lr=3e-3, warmup_steps=20))


def retrieval_itm_shapes_tiny() -> Recipe:
    """Retrieval by matching alone (BridgeTower's ITM-only), starting from :func:`shapes_tiny`.

    The evaluation matches all pairs.
    """
    recipe = _finetuning("retrieval_itm_shapes_tiny", RankingConfig(false_texts=7), 200)
    return replace(recipe, retrieval=replace(recipe.retrieval, candidates=None))


def vqa_shapes_tiny() -> Recipe:
    """Questions answered freely, four of a picture in a step, starting from :func:`shapes_tiny`; four minutes."""
    return _finetuning("vqa_shapes_tiny", VqaConfig(per_picture=4, search=BeamSearch(1, 1, 8)), 900)


def vqa_shapes_tiny_classify() -> Recipe:
    """Questions answered with one of the training data's answers, as BridgeTower does; otherwise as above."""
    return _finetuning("vqa_shapes_tiny_classify", VqaConfig(answering="classify", per_picture=4), 900)


def grounding_shapes_tiny() -> Recipe:
    """Phrases located in the picture, starting from :func:`vqa_shapes_tiny`, which has learned to look; two minutes.

    A coordinate token for each pixel. Unweighted: from so few steps the weights slow it down (after 300, from
    captions: 72 instead of 93 %).
    """
    objective = GroundingConfig(bins=48, weighting="none", per_picture=4, augment=False)
    return _finetuning("grounding_shapes_tiny", objective, 300)


def nlvr2_shapes_tiny() -> Recipe:
    """Statements about two pictures, starting from :func:`vqa_shapes_tiny`; two minutes.

    Two passes, of which each is a question about one picture; merged attention had learned nothing after 600 steps.
    """
    return _finetuning("nlvr2_shapes_tiny", Nlvr2Config("passes", head_dropout=0.0), 400)


def entailment_shapes_tiny() -> Recipe:
    """Hypotheses, three of a picture in a step, starting from :func:`vqa_shapes_tiny`; a minute."""
    return _finetuning("entailment_shapes_tiny", EntailmentConfig(per_picture=3), 300)


# --- EVE ----------------------------------------------------------------------------------------------------------
#
# As in its paper everything starts from masked signals alone: what retrieves, answers or writes is trained afterwards.


def _eve(name: str, recipe: Recipe, *, steps: int, lr: float, muon_lr: float, decoder_layers: int = 0) -> Recipe:
    """The recipe of another network for EVE-tiny; with ``decoder_layers`` a model without a decoder is given one."""
    return replace(
        recipe,
        name=name,
        model=replace(MODELS["eve"].sizes["tiny"], decoder_layers=decoder_layers),
        train=replace(recipe.train, steps=steps),
        optim=replace(recipe.optim, lr=lr, muon_lr=muon_lr),
    )


def shapes_tiny_eve() -> Recipe:
    """EVE-tiny pre-trained on Shapes as in its paper: hidden words and hidden patches, nothing else.

    Command: ``python -m triptych.demo --model eve``, or that of :func:`shapes_tiny` with this recipe's name. Hardware:
    two CPU cores. Expect: of the hidden half of the words 97 % right on training pictures at the end.
    """
    recipe = _eve("shapes_tiny_eve", shapes_tiny(), steps=600, lr=8e-4, muon_lr=0.01)
    return replace(recipe, objective=MaskedSignalConfig(image_ratio=0.75, text_ratio=0.5))


def retrieval_shapes_tiny_eve() -> Recipe:
    """ITC and ITM without a teacher, starting from :func:`shapes_tiny_eve`, which has learned neither."""
    recipe = _eve("retrieval_shapes_tiny_eve", retrieval_shapes_tiny(), steps=600, lr=4e-4, muon_lr=0.004)
    return replace(recipe, objective=AlignmentConfig(queue_size=0, momentum=None, alpha=0.0))


def caption_shapes_tiny_eve() -> Recipe:
    """Captions from the picture alone, by a decoder that :func:`shapes_tiny_eve` is given here."""
    return _eve("caption_shapes_tiny_eve", caption_shapes_tiny(), steps=600, lr=8e-4, muon_lr=0.008, decoder_layers=2)


def self_critical_shapes_tiny_eve() -> Recipe:
    """Self-critical training, starting from :func:`caption_shapes_tiny_eve`."""
    recipe = self_critical_shapes_tiny()
    return _eve("self_critical_shapes_tiny_eve", recipe, steps=60, lr=2e-5, muon_lr=2e-4, decoder_layers=2)


def vqa_shapes_tiny_eve() -> Recipe:
    """Questions answered with one of the training data's answers, as in EVE's paper, from :func:`shapes_tiny_eve`."""
    return _eve("vqa_shapes_tiny_eve", vqa_shapes_tiny_classify(), steps=900, lr=8e-4, muon_lr=0.008)


def grounding_shapes_tiny_eve() -> Recipe:
    """Phrases located by a decoder that writes coordinates, starting from :func:`vqa_shapes_tiny_eve`."""
    recipe = grounding_shapes_tiny()
    return _eve("grounding_shapes_tiny_eve", recipe, steps=600, lr=8e-4, muon_lr=0.008, decoder_layers=2)


def nlvr2_shapes_tiny_eve() -> Recipe:
    """Statements about two pictures in two passes, starting from :func:`vqa_shapes_tiny_eve`."""
    return _eve("nlvr2_shapes_tiny_eve", nlvr2_shapes_tiny(), steps=400, lr=4e-4, muon_lr=0.004)


def entailment_shapes_tiny_eve() -> Recipe:
    """Hypotheses, three of a picture in a step, starting from :func:`vqa_shapes_tiny_eve`."""
    return _eve("entailment_shapes_tiny_eve", entailment_shapes_tiny(), steps=300, lr=4e-4, muon_lr=0.004)
