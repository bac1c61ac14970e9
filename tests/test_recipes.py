"""Recipes hold the papers' numbers, and each describes itself."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable

import pytest

from triptych import recipes
from triptych.generation import BeamSearch
from triptych.models.mplug import SIZES
from triptych.objectives.alignment import AlignmentConfig, OfficialBehaviour
from triptych.objectives.pretraining import PretrainingConfig
from triptych.objectives.ranking import RankingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.grounding import GroundingConfig
from triptych.tasks.image_classification import ImageClassificationConfig
from triptych.tasks.nlvr2 import Nlvr2Config
from triptych.tasks.registry import TASKS, task_for
from triptych.tasks.self_critical import SelfCriticalConfig
from triptych.tasks.text_classification import TextClassificationConfig
from triptych.tasks.vqa import VqaConfig
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
def test_every_recipe_is_whole(function: Callable[[], Recipe], request: pytest.FixtureRequest) -> None:
    recipe = function()
    assert recipe.name in (getattr(function, "__name__", ""), request.node.callspec.id.rpartition(" ")[2])
    assert recipe == function()
    assert len(inspect.getdoc(getattr(function, "func", function)) or "") > 40
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
    assert set(recipes.FINETUNING) == {"retrieval", *TASKS}
    of_one_encoder = {"image_classification", "text_classification"}
    for functions in (recipes.PRETRAINING, *(recipes.FINETUNING[task] for task in {*TASKS} - of_one_encoder)):
        assert "shapes_tiny" in functions
    for task in of_one_encoder:
        assert "tiny" in recipes.FINETUNING[task]
    for functions in (recipes.PRETRAINING, recipes.CAPTIONING, recipes.RETRIEVAL):
        assert "flickr8k" in functions


@pytest.mark.parametrize("name", [name for name in ALL if "shapes_tiny" in name or name.startswith("pretrain flickr")])
def test_laptop_sizes_are_small(name: str) -> None:
    recipe = ALL[name]()
    assert recipe.train.steps * recipe.train.batch_size <= 200_000
    assert recipe.train.workers == 0
    assert recipe.data.preprocessing.image_size <= 96


def test_every_recipe_is_of_its_task() -> None:
    for task, functions in recipes.FINETUNING.items():
        for function in functions.values():
            objective = function().objective
            if task == "retrieval":
                assert isinstance(objective, AlignmentConfig | RankingConfig)
            else:
                assert task_for(objective).name == task


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


@dataclasses.dataclass(frozen=True)
class Paper:
    """A row of the paper's table 11, the image sizes of base and large, and where the release decided, its rate."""

    lr: float
    vision_lr: float
    batch: int
    epochs: int
    samples: int
    pixels: tuple[int, int]


TABLE_11 = {
    "vqa vqa_v2": Paper(2e-5, 5e-6, 1024, 8, 658_111, (384, 504)),
    "entailment snli_ve": Paper(2e-5, 2e-5, 64, 5, 529_527, (384, 336)),
    "nlvr2 nlvr2": Paper(5e-5, 5e-6, 256, 15, 86_373, (384, 336)),
    "grounding refcoco": Paper(2e-5, 5e-6, 512, 120, 375_454, (336, 336)),  # released rate of the vision encoder
    "caption coco": Paper(1e-5, 5e-6, 256, 5, 567_000, (384, 336)),  # as released
    "retrieval coco": Paper(1e-5, 2e-6, 256, 5, 567_000, (384, 336)),
}


@pytest.mark.parametrize(("name", "size"), [*itertools.product(TABLE_11, ("base", "large"))])
def test_table_11_of_the_paper(name: str, size: str) -> None:
    recipe, paper = ALL[f"{name}_{size}"](), TABLE_11[name]
    assert recipe.model == SIZES[size]
    assert recipe.data.preprocessing.image_size == paper.pixels[size == "large"]
    assert (recipe.optim.lr, recipe.optim.vision_lr) == (paper.lr, paper.vision_lr)
    assert 8 * recipe.train.batch_size * recipe.train.accumulate == paper.batch  # on eight GPUs, as the commands say
    assert recipe.train.steps_per_epoch == paper.samples // paper.batch
    assert recipe.train.steps == paper.epochs * recipe.train.steps_per_epoch
    assert (recipe.optim.schedule, recipe.optim.decay, recipe.optim.weight_decay) == ("epoch_cosine", "official", 0.02)
    assert recipe.optim.min_lr == 1e-6
    assert recipe.data.per_caption == (name in ("caption coco", "retrieval coco"))


@pytest.mark.parametrize("size", ["base", "large"])
def test_self_critical_training_of_the_paper(size: str) -> None:
    """Section 7.1: 5 epochs of 256; the rates, the search and the pictures of the release."""
    recipe, before = ALL[f"caption coco_{size}_self_critical"](), ALL[f"caption coco_{size}"]()
    objective = recipe.objective
    assert isinstance(objective, SelfCriticalConfig)
    assert objective == SelfCriticalConfig(before.objective)  # type: ignore[arg-type]
    assert objective.explore == BeamSearch(5, 8, 25)
    assert (objective.baseline, objective.normalise) == ("mean", "official")
    assert (recipe.optim.lr, recipe.optim.vision_lr, recipe.optim.min_lr) == (1e-6, 1e-6, 8e-8)
    assert 8 * recipe.train.batch_size == 256
    assert recipe.train.steps == 5 * (113_287 // 256)  # a picture once an epoch, with all its captions
    assert not recipe.data.per_caption
    assert recipe.data.preprocessing == before.data.preprocessing


def test_how_the_paper_judges() -> None:
    """Sections 5.2 and 7.1, and the released configurations."""
    for size in ("base", "large"):
        vqa, entailment, nlvr2, grounding = (
            ALL[f"{name}_{size}"]() for name in ("vqa vqa_v2", "entailment snli_ve", "nlvr2 nlvr2", "grounding refcoco")
        )
        assert isinstance(vqa.objective, VqaConfig)
        assert (vqa.objective.answering, vqa.objective.search) == ("generate", BeamSearch(5, 1, 10))
        assert vqa.data.max_tokens == 25  # without OCR
        assert isinstance(entailment.objective, EntailmentConfig)
        assert entailment.objective.premise
        assert isinstance(nlvr2.objective, Nlvr2Config)
        assert (nlvr2.objective.variant, nlvr2.objective.pictures, nlvr2.objective.swap) == ("merged", 2, True)
        assert isinstance(grounding.objective, GroundingConfig)
        assert (grounding.objective.locating, grounding.objective.bins) == ("tokens", 336)
        assert not grounding.objective.official_normalisation
        assert (grounding.data.max_tokens, grounding.optim.warmup_steps) == (20, 2000)


def test_cifar_of_bridgetower() -> None:
    """``run_cifar.py`` and its script: 512 a step, AdamW (0.9, 0.98) with decay 0.01, warm-up 0.06, linear."""
    recipe, probe = ALL["image_classification cifar_base"](), ALL["image_classification cifar_probe_base"]()
    optim, train, data = recipe.optim, recipe.train, recipe.data
    assert train.batch_size * train.accumulate == 512
    assert train.steps == 10 * (50_000 // 512)
    assert (optim.vision_lr, optim.betas, optim.eps, optim.weight_decay) == (1e-5, (0.9, 0.98), 1e-8, 0.01)
    assert (optim.schedule, optim.warmup_steps, optim.min_lr) == ("linear", int(0.06 * train.steps), 0.0)
    assert (data.preprocessing.image_size, data.scale, data.augment, data.flip) == (224, None, None, False)
    assert isinstance(recipe.objective, ImageClassificationConfig)
    assert (recipe.objective.head, recipe.objective.pooling, recipe.objective.linear_probe) == (
        "linear",
        "first",
        False,
    )
    assert dataclasses.replace(probe, name=recipe.name, objective=recipe.objective) == recipe
    assert probe.objective == ImageClassificationConfig(linear_probe=True)


GLUE = {  # training examples of the benchmark, and the metric of ``run_glue.py``
    "cola": (8551, "matthews"),
    "sst2": (67349, "accuracy"),
    "mrpc": (3668, "f1"),
    "qqp": (363846, "f1"),
    "stsb": (5749, "spearman"),
    "mnli": (392702, "accuracy"),
    "qnli": (104743, "accuracy"),
    "rte": (2490, "accuracy"),
}


def test_glue_of_bridgetower() -> None:
    """``run_glue.py``: 10 epochs, 512 tokens, decay 0.1, eps 1e-6, betas (0.9, 0.98), warm-up 0.06."""
    assert set(recipes.FINETUNING["text_classification"]) == {"tiny", *(f"glue_{name}" for name in GLUE)}
    for name, (examples, score) in GLUE.items():
        recipe = ALL[f"text_classification glue_{name}"]()
        objective, optim, train = recipe.objective, recipe.optim, recipe.train
        assert isinstance(objective, TextClassificationConfig)
        assert objective.score == score
        assert objective.kind == ("regress" if name == "stsb" else "classify")
        assert (objective.head, objective.head_dropout, objective.linear_probe) == ("hidden", 0.1, False)  # RoBERTa's
        assert train.batch_size * train.accumulate in (16, 32)
        assert train.steps == 10 * (examples // (train.batch_size * train.accumulate))
        assert optim.lr in (1e-5, 2e-5)
        assert (optim.weight_decay, optim.eps, optim.betas) == (0.1, 1e-6, (0.9, 0.98))
        assert (optim.schedule, optim.warmup_steps) == ("linear", int(0.06 * train.steps))
        assert recipe.data.max_tokens == 512


def test_ranking_by_matching_alone() -> None:
    recipe = ALL["retrieval shapes_tiny_itm"]()
    assert isinstance(recipe.objective, RankingConfig)
    assert recipe.objective.false_texts < recipe.train.batch_size
    assert RankingConfig().false_texts == 15  # BridgeTower's and METER's


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'lettuce'; there are: mplug_base_4m, .*shapes_tiny"):
        recipes.find(recipes.PRETRAINING, "lettuce")
