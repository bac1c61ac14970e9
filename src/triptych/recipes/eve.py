"""EVE as published: pre-training, and fine-tuning for every task of the paper and some beyond it.

Numbers of pre-training are the paper's (Chen et al., AAAI 2024, arXiv 2308.11971) where it gives any; what is ours is
said to be. Those of fine-tuning are the released code's (ssyze/EVE ``README.md``, ``configs/*.yaml``,
``dataset/__init__.py``). Lengths in steps follow from the total batch. Common to all:

- Pixels are normalised to -1..1; texts have 40 tokens.
- AdamW has betas 0.9 and 0.98, eps 1e-8 and weight decay 0.01, with the released exceptions (``decay="official"``): so
  in fine-tuning, and in pre-training by our choice. Multipliers of the learning rate are rates here. What has the rate
  of heads is what the task adds and, for retrieval, the projections and the matching head; the temperature, which the
  released code trains at that rate, too, is at the network's.
- Precision is bf16 (released: 32-bit for questions and statements).

The network on one modality, on CIFAR and GLUE, is in :mod:`triptych.recipes.unimodal`, for any network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from triptych.data.augmentations import Augmentation, ColourJitter, RandomAugment
from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch
from triptych.models.eve import SIZES, PixelDecoderConfig
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.balance import BalanceConfig
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.grounding import GroundingConfig
from triptych.tasks.nlvr2 import Nlvr2Config
from triptych.tasks.registry import TaskConfig
from triptych.tasks.retrieval import RetrievalConfig
from triptych.tasks.vqa import VqaConfig
from triptych.training.loop import TrainConfig
from triptych.training.optim import OptimConfig
from triptych.training.runs import DataConfig, Recipe

_TOKENS = 40


def _optim(lr: float, *, warmup: int, schedule: Literal["cosine", "linear"], clip: float, heads: float) -> OptimConfig:
    """``heads`` multiplies the rate; ``warmup`` is in steps."""
    return OptimConfig(
        lr=lr,
        vision_lr=None,
        head_lr=None if heads == 1 else lr * heads,
        min_lr=0.0,
        warmup_lr=0.0,
        warmup_steps=warmup,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        eps=1e-8,
        clip=clip,
        schedule=schedule,
        decay="official",
    )


# --- pre-training -------------------------------------------------------------------------------------------------


def _pretraining(name: str, size: str, steps: int, lr: float, batch_size: int) -> Recipe:
    """``batch_size`` in each forward pass of one of eight GPUs."""
    return Recipe(
        name=name,
        objective=MaskedSignalConfig(image_ratio=0.75, text_ratio=0.5),
        model=replace(SIZES[size], pixel_decoder=PixelDecoderConfig(width=512, layers=8, heads=16)),
        data=DataConfig(
            preprocessing=Preprocessing(224, HALF, HALF),
            scale=(0.5, 1.0),
            augment=None,
            flip=True,
            per_caption=True,
            max_words=_TOKENS,
            max_tokens=_TOKENS,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            accumulate=2048 // (8 * batch_size),
            workers=8,
            precision="bf16",
            compile=True,
            checkpoint_every=1000,
            log_every=50,
        ),
        optim=_optim(lr, warmup=10_000, schedule="cosine", clip=1.0, heads=1),
        balance=BalanceConfig(0.001),
    )


def eve_base_4m() -> Recipe:
    """EVE-base (12 blocks, the topmost two with 32 experts) on the 4M set: COCO, Visual Genome, SBU, CC3M.

    Command: ``torchrun --nproc-per-node 8 -m triptych pretrain eve_base_4m --data 'shards/{00000..00410}.tar'
    --start beit2-base --vocabulary eve-tokenizer/tokenizer.json --folder runs/eve``, where ``beit2-base`` comes from
    ``triptych convert --from beit2``. Without ``--vocabulary`` a vocabulary of 64,000 is trained on the data.

    Hardware: 8 GPUs, 128 pairs each, twice accumulated. The paper timed 8 A100 with up to 224 pairs each: 2.14 hours an
    epoch of about 10 million pairs (table 1), 1,712 A100-hours in all (figure 1).
    Expect: 78.00 VQA test-dev, 83.93 NLVR2 test-P, 79.6 and 62.0 R@1 on COCO, 95.6 and 84.1 on Flickr30k after
    fine-tuning (paper table 2).

    The paper's: 480,000 steps of 2,048 pairs (100 epochs), 5e-4, 224 px, crop and mirroring, 75 % of the patches and
    50 % of the words hidden, auxiliary loss 0.001. Ours: betas, eps and decay as in the released fine-tuning, gradient
    norm cut at 1.0, warm-up of 10,000 steps, then a cosine to 0, stochastic depth 0.1, MAE's pixel decoder (8 layers of
    512, 16 heads), BERT's 80/10/10, at most 40 words; the crop's 50 to 100 % and the 40 tokens are the released code's.
    """
    return _pretraining("eve_base_4m", "base", 480_000, 5e-4, 128)


def eve_large_4m() -> Recipe:
    """EVE-large (24 blocks, the topmost three with 32 experts) on the 4M set.

    Command: that of :func:`eve_base_4m` with ``eve_large_4m --start beit2-large``. Hardware: 8 GPUs, 64 pairs each,
    four times accumulated. Expect: 79.25 VQA test-dev, 84.69 NLVR2 test-P, 82.5 and 65.2 R@1 on COCO, 96.3 and 86.3 on
    Flickr30k after fine-tuning (paper table 4).

    The paper's: 280,000 steps of 2,048, 2e-4; the rest as of the base size.
    """
    return _pretraining("eve_large_4m", "large", 280_000, 2e-4, 64)


def eve_large_16m() -> Recipe:
    """EVE-large on the 16M set: the 4M set and CC12M.

    Command and hardware as :func:`eve_large_4m`. Expect: 80.17 VQA test-dev, 86.22 NLVR2 test-P, 83.5 and 66.7 R@1 on
    COCO, 98.0 and 87.9 on Flickr30k after fine-tuning (paper table 4).

    Ours: 280,000 steps, as on 4M, since the paper gives one number for the large size.
    """
    return _pretraining("eve_large_16m", "large", 280_000, 2e-4, 64)


# --- fine-tuning --------------------------------------------------------------------------------------------------


def _finetuning(
    name: str,
    size: str,
    image_size: int,
    objective: TaskConfig | AlignmentConfig,
    *,
    samples: int,
    batch: int,
    lr: float,
    heads: float,
    epochs: int = 10,
    schedule: Literal["cosine", "linear"] = "linear",
    warmup: float = 0.1,
    clip: float = 3.0,
    augment: Augmentation | None = None,
) -> Recipe:
    """``batch`` on eight GPUs; ``warmup`` is a share of the steps, ``heads`` multiplies the rate."""
    steps_per_epoch = samples // batch
    steps = epochs * steps_per_epoch
    return Recipe(
        name=name,
        objective=objective,
        model=SIZES[size],
        data=DataConfig(
            preprocessing=Preprocessing(image_size, HALF, HALF),
            scale=(0.5, 1.0),
            augment=augment or RandomAugment(2, 7),
            evaluate_limit=0,
            max_words=30,
            max_tokens=_TOKENS,
        ),
        train=TrainConfig(
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch // 8,
            workers=8,
            precision="bf16",
            checkpointing=True,
            evaluate_every=steps_per_epoch,
        ),
        optim=_optim(lr, warmup=int(steps * warmup), schedule=schedule, clip=clip, heads=heads),
    )


def _vqa_v2(name: str, size: str) -> Recipe:
    recipe = _finetuning(
        name, size, 480, VqaConfig("classify", head_scale=2.0), samples=645_381, batch=128, lr=3e-5, heads=10
    )
    return replace(recipe, data=replace(recipe.data, flip=False), balance=BalanceConfig(0.0))


def eve_vqa_v2_base() -> Recipe:
    """EVE-base on VQA v2 at 480 px: a classifier with soft targets, 10 epochs of 128 at 3e-5, without auxiliary loss.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune vqa eve_vqa_v2_base --start runs/eve/model
    --data v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json
    v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json --image-root coco
    --folder runs/vqa``. Hardware: 8 GPUs. Expect: 78.00 test-dev, 78.02 test-std (paper table 2).

    The classes are the answers given nine times in the training data, 3,129; the released code has ALBEF's list of
    3,128, which ``VqaConfig.answers`` takes. How many questions its filtered files have was not found: 645,381 is
    BridgeTower's. It mirrors half of the pictures unless question or answer say left or right; here none is.
    """
    return _vqa_v2("eve_vqa_v2_base", "base")


def eve_vqa_v2_large() -> Recipe:
    """EVE-large on VQA v2, as the base size. Expect: 79.25 test-dev; 80.17 after 16M (paper table 4)."""
    return _vqa_v2("eve_vqa_v2_large", "large")


def _nlvr2(name: str, size: str) -> Recipe:
    recipe = _finetuning(
        name,
        size,
        384,
        Nlvr2Config("biattention", head_dropout=0.1),
        samples=86_373,
        batch=128,
        lr=3.5e-5,
        heads=15,
        schedule="cosine",
        warmup=0.2,
    )
    return replace(recipe, data=replace(recipe.data, max_words=_TOKENS))


def eve_nlvr2_base() -> Recipe:
    """EVE-base on NLVR2 at 384 px: a pass for each picture, then bi-attention; 10 epochs of 128 at 3.5e-5.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune nlvr2 eve_nlvr2_base --start runs/eve/model
    --data train.json --evaluate-data dev.json --image-root nlvr2 --folder runs/nlvr2``. Hardware: 8 GPUs.
    Expect: 83.34 dev, 83.93 test-P (paper table 2).
    """
    return _nlvr2("eve_nlvr2_base", "base")


def eve_nlvr2_large() -> Recipe:
    """EVE-large on NLVR2, as the base size. Expect: 84.03 dev, 84.69 test-P; 85.63, 86.22 after 16M (table 4)."""
    return _nlvr2("eve_nlvr2_large", "large")


_FLICKR30K = 5 * 29_000  # captions of train
_COCO = 566_747  # captions of train and restval


def _retrieval(name: str, size: str, *, samples: int, batch: int, lr: float, heads: float) -> Recipe:
    contrast = AlignmentConfig(queue_size=0, momentum=None, alpha=0.0, negatives="all")
    recipe = _finetuning(
        name,
        size,
        384,
        contrast,
        samples=samples,
        batch=batch,
        lr=lr,
        heads=heads,
        clip=1.0,
        augment=ColourJitter(0.4, 0.4, 0.4),
    )
    return replace(
        recipe,
        data=replace(recipe.data, per_caption=True),
        retrieval=RetrievalConfig(candidates=128, max_words=30, max_tokens=_TOKENS),
    )


def eve_coco_base() -> Recipe:
    """EVE-base on COCO at 384 px, ITC and ITM: 10 epochs of 256 at 3e-5, re-ranking 128.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune retrieval eve_coco_base --start runs/eve/model
    --data dataset_coco.json --splits train restval --evaluate-data dataset_coco.json --evaluate-splits val
    --image-root coco --folder runs/retrieval``. Hardware: 8 GPUs. Expect: TR R@1 79.6, IR R@1 62.0 on the 5k test
    (paper table 2).

    Contrast and hard negatives are those of all GPUs; projections, temperature (0.07) and matching head start fresh
    where pre-training had none.
    """
    return _retrieval("eve_coco_base", "base", samples=_COCO, batch=256, lr=3e-5, heads=10)


def eve_coco_large() -> Recipe:
    """EVE-large on COCO, as the base size at 5e-5. Expect: TR/IR R@1 82.5/65.2; 83.5/66.7 after 16M (table 4)."""
    return _retrieval("eve_coco_large", "large", samples=_COCO, batch=256, lr=5e-5, heads=10)


def eve_flickr30k_base() -> Recipe:
    """EVE-base on Flickr30k at 384 px, ITC and ITM: 10 epochs of 128 at 1e-5, re-ranking 128.

    Command: that of :func:`eve_coco_base` with ``eve_flickr30k_base`` and ``dataset_flickr30k.json``, split train.
    Hardware: 8 GPUs. Expect: TR R@1 95.6, IR R@1 84.1 (paper table 2).
    """
    return _retrieval("eve_flickr30k_base", "base", samples=_FLICKR30K, batch=128, lr=1e-5, heads=5)


def eve_flickr30k_large() -> Recipe:
    """EVE-large on Flickr30k, as the base size. Expect: TR/IR R@1 96.3/86.3; 98.0/87.9 after 16M (table 4)."""
    return _retrieval("eve_flickr30k_large", "large", samples=_FLICKR30K, batch=128, lr=1e-5, heads=5)


# --- beyond the paper ---------------------------------------------------------------------------------------------


def eve_snli_ve_base() -> Recipe:
    """EVE-base on SNLI-VE at 384 px, from the hypothesis alone, beyond the paper: 5 epochs of 128.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune entailment eve_snli_ve_base --start runs/eve/model
    --data snli_ve_train.jsonl --evaluate-data snli_ve_dev.jsonl --image-root flickr30k-images --folder runs/ve``.
    Hardware: 8 GPUs. Expect: nobody has run it.

    Rates, schedule and classifier are those of :func:`eve_vqa_v2_base`, with the auxiliary loss; the epochs those of
    mPLUG and BridgeTower.
    """
    return _finetuning(
        "eve_snli_ve_base",
        "base",
        384,
        EntailmentConfig(premise=False, head_scale=2.0),
        samples=529_527,
        batch=128,
        lr=3e-5,
        heads=10,
        epochs=5,
    )


def eve_caption_coco_base() -> Recipe:
    """Captions on COCO at 384 px by EVE-base with a decoder of six layers, which the paper does not have.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune caption eve_coco_base --start runs/eve/model
    --data dataset_coco.json --splits train restval --evaluate-data dataset_coco.json --evaluate-splits val
    --image-root coco --folder runs/caption``. Hardware: 8 GPUs. Expect: nobody has run it.

    The decoder starts from nothing but the word embeddings and reads what the network makes of the image alone; epochs,
    batch and search are those of :func:`triptych.recipes.mplug.caption_coco_base`.
    """
    recipe = _finetuning(
        "eve_caption_coco_base",
        "base",
        384,
        CaptioningConfig(context="image", search=BeamSearch(beams=10, min_length=8, max_length=20)),
        samples=_COCO,
        batch=256,
        lr=3e-5,
        heads=1,
        epochs=5,
        clip=1.0,
    )
    return replace(
        recipe,
        model=replace(SIZES["base"], decoder_layers=6),
        data=replace(recipe.data, per_caption=True),
    )


def eve_refcoco_base() -> Recipe:
    """Phrases of RefCOCO and its kin located at 384 px by a box head on EVE-base, beyond the paper.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune grounding eve_refcoco_base --start runs/eve/model
    --data refcoco refcoco+ refcocog --splits train --image-root coco/train2014 --folder runs/grounding``.
    Hardware: 8 GPUs. Expect: nobody has run it.
    """
    return _finetuning(
        "eve_refcoco_base",
        "base",
        384,
        GroundingConfig(locating="regression"),
        samples=375_454,
        batch=512,
        lr=3e-5,
        heads=10,
        clip=1.0,
    )
