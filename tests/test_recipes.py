"""Recipes hold the papers' numbers, and each describes itself."""

import dataclasses
import inspect
from collections.abc import Callable

import pytest

from triptych import recipes
from triptych.models.mplug import SIZES
from triptych.objectives.alignment import AlignmentConfig, OfficialBehaviour
from triptych.objectives.pretraining import PretrainingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.training.runs import Recipe

ALL: dict[str, Callable[[], Recipe]] = {
    **{f"pretrain {name}": function for name, function in recipes.PRETRAINING.items()},
    **{
        f"{task} {name}": function
        for task, functions in recipes.FINETUNING.items()
        for name, function in functions.items()
    },
}


@pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())
def test_every_recipe_is_whole(function: Callable[[], Recipe]) -> None:
    recipe = function()
    assert recipe.name == function.__name__
    assert recipe == function()
    assert len(inspect.getdoc(function) or "") > 40
    assert recipe.optim.warmup_steps < recipe.train.steps
    image_size, vision = recipe.data.preprocessing.image_size, recipe.model.vision
    assert image_size % vision.patch == 0
    assert recipe.data.max_tokens <= recipe.model.text.max_positions


@pytest.mark.parametrize("name", list(recipes.PRETRAINING))
def test_pretraining_recipes_state_their_command(name: str) -> None:
    text = inspect.getdoc(recipes.PRETRAINING[name]) or ""
    for part in ("ommand", "ardware", "Expect"):
        assert part in text


def test_every_task_has_a_laptop_size() -> None:
    for functions in (recipes.PRETRAINING, *recipes.FINETUNING.values()):
        assert "shapes_tiny" in functions
    for functions in (recipes.PRETRAINING, recipes.CAPTIONING, recipes.RETRIEVAL):
        assert "flickr8k" in functions


def test_the_pretraining_of_the_paper() -> None:
    """Paper section 5.1 and the released configurations."""
    base, base_14m, large = (
        recipes.find(recipes.PRETRAINING, name) for name in ("mplug_base_4m", "mplug_base_14m", "mplug_large_14m")
    )
    for recipe in (base, base_14m, large):
        objective, optim = recipe.objective, recipe.optim
        assert isinstance(objective, PretrainingConfig)
        assert (objective.queue_size, objective.momentum, objective.alpha) == (65536, 0.995, 0.4)
        assert objective.mlm_probability == 0.15
        assert objective.weights == (1.0, 1.0, 1.0, 1.0)
        assert objective.official == OfficialBehaviour()
        assert (optim.weight_decay, optim.betas, optim.warmup_steps) == (0.02, (0.9, 0.999), 2000)
        assert optim.muon_lr is None
        assert recipe.train.steps == 30 * recipe.train.steps_per_epoch
        assert recipe.data.scale == (0.2, 1.0)
        assert recipe.model.temperature == 0.07
    assert base.train.steps_per_epoch == 4_000_000 // 1024
    assert base_14m.train.steps_per_epoch == large.train.steps_per_epoch == 14_000_000 // 1024
    assert base.model == SIZES["base"]
    assert large.model == SIZES["large"]
    assert (base.model.stride, large.model.stride) == (3, 6)
    assert (base.data.preprocessing.image_size, large.data.preprocessing.image_size) == (256, 224)
    assert (base.optim.lr, base.optim.vision_lr) == (1e-4, 1e-5)
    assert (large.optim.lr, large.optim.vision_lr) == (5e-5, 5e-6)
    assert dataclasses.replace(base_14m, name=base.name, train=base.train, objective=base.objective) == base


def test_the_finetuning_of_the_paper() -> None:
    """Paper section 7.1 (table 11); image sizes and rates of captioning from the released configurations."""
    for size, pixels in (("base", 384), ("large", 336)):
        caption = recipes.find(recipes.CAPTIONING, f"coco_{size}")
        retrieval = recipes.find(recipes.RETRIEVAL, f"coco_{size}")
        assert isinstance(caption.objective, CaptioningConfig)
        assert isinstance(retrieval.objective, AlignmentConfig)
        assert caption.objective.context == "image"
        assert (caption.objective.search.beams, caption.objective.search.max_length) == (10, 20)  # type: ignore[union-attr]
        assert (caption.optim.lr, caption.optim.vision_lr) == (1e-5, 5e-6)
        assert (retrieval.optim.lr, retrieval.optim.vision_lr) == (1e-5, 2e-6)
        assert retrieval.retrieval.candidates == 256
        for recipe in (caption, retrieval):
            assert recipe.data.preprocessing.image_size == pixels
            assert recipe.data.per_caption
            assert recipe.data.scale == (0.5, 1.0)
            assert recipe.train.steps == 5 * (567_000 // 256)


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'lettuce'; there are: mplug_base_4m, .*shapes_tiny"):
        recipes.find(recipes.PRETRAINING, "lettuce")
