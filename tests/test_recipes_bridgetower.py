"""BridgeTower's recipes hold the numbers of its scripts."""

import dataclasses

import pytest

from triptych import recipes
from triptych.data.augmentations import RandAugment, RandomAugment
from triptych.models.bridgetower import SIZES
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.masked_matching import MaskedMatchingConfig
from triptych.objectives.ranking import RankingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.grounding import GroundingConfig
from triptych.tasks.nlvr2 import Nlvr2Config
from triptych.tasks.vqa import VqaConfig
from triptych.training.runs import Recipe


@dataclasses.dataclass(frozen=True)
class Script:
    """A row of the specification's table of fine-tuning (section 3), the number of samples, and the text length."""

    pixels: int
    lr: float
    batch: int
    per_gpu: int
    epochs: int
    warmup: float
    decay: float
    heads: int
    samples: int
    tokens: int = 50
    size: str = "base"


VQA, FLICKR30K = 435_174 + 210_207, 5 * 30_014
SCRIPTS = {
    "vqa bridgetower_vqa_v2_base": Script(576, 1e-5, 512, 16, 10, 0.06, 0.05, 50, VQA),
    "vqa bridgetower_vqa_v2_large": Script(574, 4e-6, 512, 4, 10, 0.06, 0.05, 50, VQA, size="large"),
    "vqa bridgetower_vqa_v2_base_scratch": Script(576, 2e-5, 512, 16, 10, 0.1, 0.01, 50, VQA),
    "vqa bridgetower_vqa_v2_large_scratch": Script(574, 1e-5, 512, 4, 10, 0.1, 0.01, 50, VQA, size="large"),
    "entailment bridgetower_snli_ve_base": Script(384, 3e-6, 64, 8, 5, 0.06, 0.01, 10, 529_527),
    "nlvr2 bridgetower_nlvr2_base": Script(384, 5e-6, 64, 8, 10, 0.1, 0.008, 10, 86_373),
    # 16 in place of 4: false texts come from the forward pass.
    "retrieval bridgetower_flickr30k_base_itm": Script(384, 1.1e-5, 2048, 16, 20, 0.1, 0.01, 5, FLICKR30K, 40),
    "retrieval bridgetower_flickr30k_base": Script(384, 5e-6, 512, 8, 20, 0.05, 0.01, 5, FLICKR30K, 40),
    "retrieval bridgetower_coco_base": Script(384, 4.5e-6, 256, 16, 30, 0.1, 0.01, 5, 566_747, 40),
}


def recipe_of(name: str) -> Recipe:
    task, _, own = name.partition(" ")
    return recipes.find(recipes.FINETUNING[task], own)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_of_fine_tuning(name: str) -> None:
    recipe, script = recipe_of(name), SCRIPTS[name]
    optim, train, data = recipe.optim, recipe.train, recipe.data
    assert recipe.name == name.partition(" ")[2]
    assert recipe.model == SIZES[script.size]
    assert data.preprocessing.image_size == script.pixels
    assert data.max_tokens == data.max_words == script.tokens  # every token is at least a letter: words cut nothing
    assert (train.batch_size, 8 * train.batch_size * train.accumulate) == (script.per_gpu, script.batch)
    assert train.steps_per_epoch == script.samples // script.batch
    assert train.steps == script.epochs * train.steps_per_epoch
    assert (optim.lr, optim.vision_lr) == (script.lr, None)
    assert (optim.fusion_lr, optim.head_lr) == pytest.approx((5 * script.lr, script.heads * script.lr))
    assert (optim.weight_decay, optim.warmup_steps) == (script.decay, int(script.warmup * train.steps))
    assert data.per_caption == name.startswith("retrieval")


ALL = [
    *(recipe_of(name) for name in SCRIPTS),
    *(recipes.PRETRAINING[f"bridgetower_{size}"]() for size in ("base", "large")),
]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_what_all_scripts_share(recipe: Recipe) -> None:
    optim = recipe.optim
    assert (optim.betas, optim.eps, optim.clip, optim.muon_lr) == ((0.9, 0.98), 1e-8, None, None)
    assert (optim.schedule, optim.decay, optim.min_lr, optim.warmup_lr) == ("linear", "official", 0.0, 0.0)


@pytest.mark.parametrize(("size", "pixels", "per_gpu"), [("base", 288, 32), ("large", 294, 16)])
def test_pre_training(size: str, pixels: int, per_gpu: int) -> None:
    recipe = recipes.find(recipes.PRETRAINING, f"bridgetower_{size}")
    optim, train, data = recipe.optim, recipe.train, recipe.data
    assert recipe.objective == MaskedMatchingConfig(negatives="local")
    assert recipe.model == SIZES[size]
    assert (train.steps, train.batch_size, 64 * train.batch_size * train.accumulate) == (100_000, per_gpu, 4096)
    assert (optim.lr, optim.vision_lr, optim.weight_decay, optim.warmup_steps) == (1e-5, None, 0.01, 10_000)
    assert (optim.fusion_lr, optim.head_lr) == pytest.approx((5e-5, 5e-5))
    assert (data.preprocessing.image_size, data.preprocessing.resize) == (pixels, "crop")
    assert (data.scale, data.augment, data.flip, data.per_caption, data.max_tokens) == (None, None, False, True, 50)


def test_heads() -> None:
    """Section 1.5, and ``head_hidden_scale`` of the scripts; without pre-training METER's, 1."""
    for size in ("base", "large"):
        trained, scratch = (recipe_of(f"vqa bridgetower_vqa_v2_{size}{end}").objective for end in ("", "_scratch"))
        assert trained == VqaConfig("classify", head_scale=2.0, min_count=9)
        assert scratch == VqaConfig("classify", head_scale=1.0, min_count=9)
    assert recipe_of("entailment bridgetower_snli_ve_base").objective == EntailmentConfig(premise=False, head_scale=2.0)
    pairs = Nlvr2Config("passes", picture_types=True, head_scale=1.5, head_dropout=0.1)
    assert recipe_of("nlvr2 bridgetower_nlvr2_base").objective == pairs


def test_pictures_of_fine_tuning() -> None:
    """Squashed, cropped at random, mirrored but for VQA; the whole picture without pre-training (section 4.3)."""
    for name in SCRIPTS:
        data = recipe_of(name).data
        if "scratch" in name:
            assert (data.preprocessing.resize, data.scale, data.flip) == ("crop", None, False)
            assert data.augment == RandAugment(2, 9)
        else:
            assert (data.preprocessing.resize, data.scale, data.flip) == ("squash", (0.5, 1.0), "vqa" not in name)
            assert data.augment == (RandomAugment(2, 5) if "vqa" in name else RandAugment(2, 7))


def test_beyond_the_paper() -> None:
    captions, phrases = recipe_of("caption bridgetower_coco_base"), recipe_of("grounding bridgetower_refcoco_base")
    assert captions.model == dataclasses.replace(SIZES["base"], decoder_layers=6)
    assert isinstance(captions.objective, CaptioningConfig)
    assert captions.objective.context == "image"
    assert phrases.objective == GroundingConfig(locating="regression")


def test_retrieval() -> None:
    contrast = AlignmentConfig(queue_size=0, momentum=None, alpha=0.0, negatives="local")
    for name, candidates in (("flickr30k_base", 128), ("coco_base", 256)):
        recipe = recipe_of(f"retrieval bridgetower_{name}")
        assert recipe.objective == contrast
        assert (recipe.retrieval.candidates, recipe.retrieval.shared_scores) == (candidates, True)
        assert recipe.retrieval.max_tokens == 40
    alone = recipe_of("retrieval bridgetower_flickr30k_base_itm")
    assert alone.objective == RankingConfig(false_texts=15)
    assert alone.train.batch_size > 15
    assert alone.retrieval.candidates is None  # all pairs
