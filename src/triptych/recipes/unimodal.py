"""The encoders alone, as BridgeTower's paper checks them: CIFAR-10 and CIFAR-100, and GLUE.

Numbers are those of microsoft/BridgeTower ``run_cifar.py``, ``run_glue.py`` and their scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from triptych.data.transforms import Preprocessing
from triptych.models.mplug import SIZES
from triptych.recipes.shapes import shapes_tiny
from triptych.tasks.image_classification import ImageClassificationConfig
from triptych.tasks.text_classification import TextClassificationConfig
from triptych.training.loop import TrainConfig
from triptych.training.optim import OptimConfig
from triptych.training.runs import DataConfig, Recipe

_EPOCHS = 10


def cifar_base() -> Recipe:
    """CIFAR-10 or CIFAR-100 at 224 px, all of the image encoder trained: 10 epochs of 512, 1e-5 (official: or 2e-5).

    Command: ``triptych finetune image_classification cifar_base --start mplug-base --data cifar-10-batches-py
    --splits train --evaluate-data cifar-10-batches-py --evaluate-splits test --folder runs/cifar``. Hardware: one
    GPU. The official code never trains its linear classifier; here it has the rate 1e-3.
    """
    steps_per_epoch = 50_000 // 512
    steps = _EPOCHS * steps_per_epoch
    return Recipe(
        name="cifar_base",
        objective=ImageClassificationConfig(),
        model=SIZES["base"],
        data=DataConfig(
            preprocessing=Preprocessing(224, resize="crop"),
            scale=None,
            augment=None,
            flip=False,
            evaluate_limit=0,
            window=5,
        ),
        train=TrainConfig(
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=128,
            accumulate=4,
            workers=8,
            precision="bf16",
            evaluate_every=steps_per_epoch,
        ),
        optim=OptimConfig(
            lr=1e-5,
            vision_lr=1e-5,
            head_lr=1e-3,
            min_lr=0.0,
            warmup_lr=0.0,
            warmup_steps=int(0.06 * steps),
            weight_decay=0.01,
            betas=(0.9, 0.98),
            schedule="linear",
        ),
    )


def cifar_probe_base() -> Recipe:
    """A linear probe: as :func:`cifar_base`, with the image encoder as it is. Not in the paper."""
    recipe = cifar_base()
    return replace(recipe, name="cifar_probe_base", objective=ImageClassificationConfig(linear_probe=True))


_GLUE: Mapping[str, tuple[int, TextClassificationConfig]] = MappingProxyType(
    {
        "cola": (8_551, TextClassificationConfig(score="matthews")),
        "sst2": (67_349, TextClassificationConfig()),
        "mrpc": (3_668, TextClassificationConfig(score="f1")),
        "qqp": (363_846, TextClassificationConfig(score="f1")),
        "stsb": (5_749, TextClassificationConfig(kind="regress", score="spearman")),
        "mnli": (392_702, TextClassificationConfig()),
        "qnli": (104_743, TextClassificationConfig()),
        "rte": (2_490, TextClassificationConfig()),
    }
)


def _glue(task: str) -> Recipe:
    """A task of GLUE: 10 epochs of 32 at 1e-5 (official: the best of 16 and 32, 1e-5 and 2e-5, stopped early).

    Command: ``triptych finetune text_classification glue_cola --start mplug-base --data CoLA/train.tsv
    --evaluate-data CoLA/dev.tsv --folder runs/cola``; for MNLI ``--evaluate-data MNLI/dev_matched.tsv
    MNLI/dev_mismatched.tsv``. Hardware: one GPU.
    """
    examples, objective = _GLUE[task]
    steps_per_epoch = examples // 32
    steps = _EPOCHS * steps_per_epoch
    return Recipe(
        name=f"glue_{task}",
        objective=replace(objective, head="hidden", head_dropout=0.1),
        model=SIZES["base"],
        data=DataConfig(max_tokens=512, evaluate_limit=0),
        train=TrainConfig(
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=32,
            precision="bf16",
            evaluate_every=steps_per_epoch,
        ),
        optim=OptimConfig(
            lr=1e-5,
            vision_lr=None,
            min_lr=0.0,
            warmup_lr=0.0,
            warmup_steps=int(0.06 * steps),
            weight_decay=0.1,
            betas=(0.9, 0.98),
            schedule="linear",
            eps=1e-6,
        ),
    )


GLUE: Mapping[str, Callable[[], Recipe]] = MappingProxyType({f"glue_{task}": partial(_glue, task) for task in _GLUE})


def images_tiny() -> Recipe:
    """The image encoder of the tiny size on any labelled pictures at 48 px; half a minute.

    Command: ``triptych finetune image_classification tiny --start runs/shapes/model --data train.jsonl
    --evaluate-data test.jsonl --folder runs/labels``. Hardware: two CPU cores. Expect, on easy-VQA's drawings by their
    shape: what ``benchmarks/results/real_data.json`` holds.
    """
    return _tiny("images_tiny", ImageClassificationConfig())


def texts_tiny() -> Recipe:
    """The text encoder of the tiny size on any labelled texts, such as a table of GLUE.

    Command: ``triptych finetune text_classification tiny --start runs/shapes/model --data train.tsv
    --evaluate-data dev.tsv --folder runs/texts``. Hardware: two CPU cores. No figure: it is there to try things out.
    """
    return _tiny("texts_tiny", TextClassificationConfig(head="hidden", head_dropout=0.1))


def _tiny(name: str, objective: ImageClassificationConfig | TextClassificationConfig) -> Recipe:
    recipe = shapes_tiny()
    return replace(
        recipe,
        name=name,
        objective=objective,
        data=replace(recipe.data, max_tokens=60, evaluate_limit=0),
        train=replace(recipe.train, steps=300, log_every=50),
        optim=replace(recipe.optim, lr=4e-4, muon_lr=0.004, warmup_steps=30),
    )
