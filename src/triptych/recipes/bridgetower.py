"""BridgeTower as published: pre-training, and fine-tuning for every task of the paper.

Numbers are those of microsoft/BridgeTower's ``scripts/`` and ``src/config.py``; its multipliers of the learning rate
are rates here. Lengths in steps follow from the total batch. Common to all, and different from the scripts:

- Precision is bf16 (scripts: 32-bit, in TF32 as torch 1.11 multiplies).
- AdamW is torch's (scripts: that of transformers 4.17; see ``docs/parity.md``).
- What is evaluated on is what you give; the scripts choose checkpoints on test sets, or on a part of the training data.

The encoders alone, on CIFAR and GLUE, are in :mod:`triptych.recipes.unimodal`, for any network.
"""

from __future__ import annotations

from dataclasses import replace

from triptych.data.augmentations import RandAugment, RandomAugment
from triptych.data.transforms import Preprocessing
from triptych.generation import BeamSearch
from triptych.models.bridgetower import SIZES
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.masked_matching import MaskedMatchingConfig
from triptych.objectives.ranking import RankingConfig
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


def _optim(
    lr: float, steps: int, *, heads: float, warmup: float, fusion: float = 5, weight_decay: float = 0.01
) -> OptimConfig:
    """``heads`` and ``fusion`` multiply the rate; ``warmup`` is a share of the steps."""
    return OptimConfig(
        lr=lr,
        vision_lr=None,
        fusion_lr=lr * fusion,
        head_lr=lr * heads,
        min_lr=0.0,
        warmup_lr=0.0,
        warmup_steps=int(steps * warmup),
        weight_decay=weight_decay,
        betas=(0.9, 0.98),
        clip=None,
        schedule="linear",
        decay="official",
    )


def _pretraining(name: str, size: str, image_size: int, batch_size: int) -> Recipe:
    steps, processes = 100_000, 64
    return Recipe(
        name=name,
        objective=MaskedMatchingConfig(negatives="local"),
        model=SIZES[size],
        data=DataConfig(
            preprocessing=Preprocessing(image_size, resize="crop"),
            scale=None,
            augment=None,
            flip=False,
            per_caption=True,
            evaluate_limit=100,
            max_words=50,
            max_tokens=50,
        ),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            accumulate=4096 // (processes * batch_size),
            workers=8,
            precision="bf16",
            checkpointing=True,
            compile=True,
            checkpoint_every=1000,
            log_every=50,
        ),
        optim=_optim(1e-5, steps, heads=5, warmup=0.1),
        # No embeddings are trained that could choose candidates.
        retrieval=RetrievalConfig(candidates=None, max_words=50, max_tokens=50),
    )


def bridgetower_base() -> Recipe:
    """BridgeTower-base (CLIP-ViT-B/16, RoBERTa-base, 288 px) on the 4M set: COCO, Visual Genome, SBU, CC3M.

    Command: ``torchrun --nnodes 8 --nproc-per-node 8 -m triptych pretrain bridgetower_base
    --data 'shards/{00000..00410}.tar' --start clip-vit-b-16 roberta-base --folder runs/bridgetower``; on one node of
    eight GPUs with ``--accumulate 16``.

    Hardware: 64 GPUs, 32 pairs each, twice accumulated (the script; the published model card says 8 A100).
    Expect: 78.66 VQA test-dev, 85.8 and 94.7 R@1 on Flickr30k after fine-tuning (paper tables).

    100,000 steps of 4,096; an epoch has every caption. Encoders run once a step, which leaves 68 % of the operations
    (``MaskedMatchingConfig(passes="two")``: twice, as officially). A false picture is one of the others of the forward
    pass (official: of the whole data set, where it may be the true one).
    """
    return _pretraining("bridgetower_base", "base", 288, 32)


def bridgetower_large() -> Recipe:
    """BridgeTower-large (ViT-L/14, RoBERTa-large, 294 px) on the 4M set.

    Command: as :func:`bridgetower_base` with ``bridgetower_large --start clip-vit-l-14 roberta-large``; on one node
    with ``--accumulate 32``. Hardware: 64 GPUs, 16 pairs each, four times accumulated.
    Expect: 81.25 VQA test-dev, 81.15 test-std after fine-tuning (paper tables).
    """
    return _pretraining("bridgetower_large", "large", 294, 16)


def _finetuning(
    name: str,
    size: str,
    image_size: int,
    objective: TaskConfig | AlignmentConfig | RankingConfig,
    *,
    epochs: int,
    samples: int,
    batch: int,
    batch_size: int,
    lr: float,
    heads: float,
    warmup: float,
    weight_decay: float = 0.01,
) -> Recipe:
    """``batch`` on eight GPUs, ``batch_size`` of it in each forward pass of one."""
    steps_per_epoch = samples // batch
    steps = epochs * steps_per_epoch
    return Recipe(
        name=name,
        objective=objective,
        model=SIZES[size],
        data=DataConfig(
            preprocessing=Preprocessing(image_size),
            scale=(0.5, 1.0),
            augment=RandAugment(2, 7),
            evaluate_limit=0,
            max_words=50,
            max_tokens=50,
        ),
        train=TrainConfig(
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch_size,
            accumulate=batch // (8 * batch_size),
            workers=8,
            precision="bf16",
            checkpointing=True,
            evaluate_every=steps_per_epoch,
        ),
        optim=_optim(lr, steps, heads=heads, warmup=warmup, weight_decay=weight_decay),
    )


def _vqa_v2(name: str, size: str, image_size: int, batch_size: int, lr: float) -> Recipe:
    recipe = _finetuning(
        name,
        size,
        image_size,
        VqaConfig("classify", head_scale=2.0),
        epochs=10,
        samples=645_381,
        batch=512,
        batch_size=batch_size,
        lr=lr,
        heads=50,
        warmup=0.06,
        weight_decay=0.05,
    )
    return replace(recipe, data=replace(recipe.data, augment=RandomAugment(2, 5), flip=False))


def bridgetower_vqa_v2_base() -> Recipe:
    """BridgeTower-base on VQA v2 at 576 px: a classifier of the 3,129 answers with soft targets, 10 epochs of 512.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune vqa bridgetower_vqa_v2_base --start bridgetower-base
    --data v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json
    v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json --image-root coco
    --folder runs/vqa``. Hardware: 8 GPUs. Expect: 78.66 test-dev, 78.73 test-std (paper; with Visual Genome's
    questions 79.10 and 79.04).

    645,381 questions of training and validation have an answer among the classes (ftfpt_base_vqa.sh).
    """
    return _vqa_v2("bridgetower_vqa_v2_base", "base", 576, 16, 1e-5)


def bridgetower_vqa_v2_large() -> Recipe:
    """BridgeTower-large on VQA v2 at 574 px, as the base size at 4e-6 (ftfpt_large_vqa.sh).

    Expect: 81.25 test-dev, 81.15 test-std (paper; with Visual Genome's questions 81.52 and 81.49).
    """
    return _vqa_v2("bridgetower_vqa_v2_large", "large", 574, 4, 4e-6)


def _vqa_v2_scratch(recipe: Recipe, name: str, lr: float) -> Recipe:
    return replace(
        recipe,
        name=name,
        objective=VqaConfig("classify", head_scale=1.0),
        data=replace(
            recipe.data,
            preprocessing=replace(recipe.data.preprocessing, resize="crop"),
            scale=None,
            augment=RandAugment(2, 9),
            flip=False,
        ),
        optim=_optim(lr, recipe.train.steps, heads=50, warmup=0.1),
    )


def bridgetower_vqa_v2_base_scratch() -> Recipe:
    """VQA v2 without pre-training, from CLIP and RoBERTa: the paper's ablations (ftfs_base_vqa.sh).

    Command: that of :func:`bridgetower_vqa_v2_base` with this name and ``--start clip-vit-b-16 roberta-base``; for a
    comparison, the model's ``bridge``, ``fusion_layers`` and ``bridged_layers`` in a recipe of your own.
    Expect: 75.18 test-dev, METER 74.04 (paper's ablations; 75.91 in a later run by the first author, with other
    settings). The shorter side is resized and the centre cropped, and what is cropped is augmented (official: before).
    """
    return _vqa_v2_scratch(bridgetower_vqa_v2_base(), "bridgetower_vqa_v2_base_scratch", 2e-5)


def bridgetower_vqa_v2_large_scratch() -> Recipe:
    """As :func:`bridgetower_vqa_v2_base_scratch`, the large size at 1e-5 (ftfs_large_vqa.sh). No figure was found."""
    return _vqa_v2_scratch(bridgetower_vqa_v2_large(), "bridgetower_vqa_v2_large_scratch", 1e-5)


def bridgetower_snli_ve_base() -> Recipe:
    """BridgeTower-base on SNLI-VE at 384 px, from the hypothesis alone: 5 epochs of 64 (ftfpt_base_snlive.sh).

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune entailment bridgetower_snli_ve_base
    --start bridgetower-base --data snli_ve_train.jsonl --evaluate-data snli_ve_dev.jsonl
    --image-root flickr30k-images --folder runs/ve``. Hardware: 8 GPUs. Expect: accuracy 81.11 dev, 81.19 test (paper
    table 5).
    """
    return _finetuning(
        "bridgetower_snli_ve_base",
        "base",
        384,
        EntailmentConfig(premise=False, head_scale=2.0),
        epochs=5,
        samples=529_527,
        batch=64,
        batch_size=8,
        lr=3e-6,
        heads=10,
        warmup=0.06,
    )


def bridgetower_nlvr2_base() -> Recipe:
    """BridgeTower-base on NLVR2 at 384 px, a pass for each picture: 10 epochs of 64 (ftfpt_base_nlvr2.sh).

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune nlvr2 bridgetower_nlvr2_base --start bridgetower-base
    --data train.json --evaluate-data dev.json --image-root nlvr2 --folder runs/nlvr2``. Hardware: 8 GPUs.
    Expect: 81.85 dev, 83.09 test-P (arXiv 2506.11515, table III).

    The types of the two pictures are differences to the pre-trained one here, so that weight decay draws them to it and
    not to zero.
    """
    return _finetuning(
        "bridgetower_nlvr2_base",
        "base",
        384,
        Nlvr2Config("passes", picture_types=True, head_scale=1.5, head_dropout=0.1),
        epochs=10,
        samples=86_373,
        batch=64,
        batch_size=8,
        lr=5e-6,
        heads=10,
        warmup=0.1,
        weight_decay=0.008,
    )


def _retrieval(
    name: str,
    objective: AlignmentConfig | RankingConfig,
    *,
    candidates: int | None,
    epochs: int,
    samples: int,
    batch: int,
    batch_size: int,
    lr: float,
    warmup: float,
) -> Recipe:
    recipe = _finetuning(
        name,
        "base",
        384,
        objective,
        epochs=epochs,
        samples=samples,
        batch=batch,
        batch_size=batch_size,
        lr=lr,
        heads=5,
        warmup=warmup,
    )
    return replace(
        recipe,
        data=replace(recipe.data, per_caption=True, max_words=40, max_tokens=40),
        retrieval=RetrievalConfig(candidates=candidates, shared_scores=True, max_words=40, max_tokens=40),
    )


_CONTRAST = AlignmentConfig(queue_size=0, momentum=None, alpha=0.0, negatives="local")
_FLICKR30K = 5 * (29_000 + 1_014)  # captions of train and val
_COCO = 566_747  # captions of train and restval


def bridgetower_flickr30k_base() -> Recipe:
    """BridgeTower-base on Flickr30k at 384 px, ITC and ITM: 20 epochs of 512, re-ranking 128.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune retrieval bridgetower_flickr30k_base
    --start bridgetower-base --data dataset_flickr30k.json --splits train val --evaluate-data dataset_flickr30k.json
    --evaluate-splits test --image-root flickr30k-images --folder runs/retrieval``. Hardware: 8 GPUs.
    Expect: IR R@1 85.83, TR R@1 94.73, sum of all recalls 576.6 (paper table 5; arXiv 2506.11515, table III), for
    which the best epoch on the test set was taken; train on the split train alone to choose on val.

    ITC sees the 64 pairs of a forward pass on eight GPUs, hard negatives the 8 of one, as officially
    (ftfpt_base_irtr_itm_itc_flickr.sh).
    """
    return _retrieval(
        "bridgetower_flickr30k_base",
        _CONTRAST,
        candidates=128,
        epochs=20,
        samples=_FLICKR30K,
        batch=512,
        batch_size=8,
        lr=5e-6,
        warmup=0.05,
    )


def bridgetower_coco_base() -> Recipe:
    """BridgeTower-base on COCO at 384 px, ITC and ITM: 30 epochs of 256, re-ranking 256.

    Command: that of :func:`bridgetower_flickr30k_base` with ``bridgetower_coco_base``, ``dataset_coco.json``, splits
    train and restval, evaluation on val. Hardware: 8 GPUs. The paper's figure was not found
    (ftfpt_base_irtr_itm_itc_coco.sh).
    """
    return _retrieval(
        "bridgetower_coco_base",
        _CONTRAST,
        candidates=256,
        epochs=30,
        samples=_COCO,
        batch=256,
        batch_size=16,
        lr=4.5e-6,
        warmup=0.1,
    )


def bridgetower_flickr30k_base_itm() -> Recipe:
    """BridgeTower-base on Flickr30k by matching alone, a caption among 15 false ones: 20 epochs of 2,048.

    Command: that of :func:`bridgetower_flickr30k_base` with this name. Hardware: 8 GPUs. No figure was published, and
    the official function crashes (ftfpt_base_irtr_flickr.sh).

    False captions are those of the other pictures of a forward pass, so that holds 16 (official: 4, and false captions
    of the data set). Matching judges all pairs: 100 pictures during training, all 1,000 with
    ``triptych evaluate retrieval``.
    """
    recipe = _retrieval(
        "bridgetower_flickr30k_base_itm",
        RankingConfig(false_texts=15),
        candidates=None,
        epochs=20,
        samples=_FLICKR30K,
        batch=2048,
        batch_size=16,
        lr=1.1e-5,
        warmup=0.1,
    )
    return replace(recipe, data=replace(recipe.data, evaluate_limit=100))


def bridgetower_caption_coco_base() -> Recipe:
    """Captions on COCO at 384 px by BridgeTower-base with a decoder of six layers, which the paper does not have.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune caption bridgetower_coco_base --start bridgetower-base
    --data dataset_coco.json --splits train restval --evaluate-data dataset_coco.json --evaluate-splits val
    --image-root coco --folder runs/caption``. Hardware: 8 GPUs. Expect: nobody has run it.

    The decoder starts from the text encoder and reads the encoded image, as mPLUG's; epochs, batch and search are
    those of :func:`triptych.recipes.mplug.caption_coco_base`.
    """
    recipe = _finetuning(
        "bridgetower_caption_coco_base",
        "base",
        384,
        CaptioningConfig(context="image", search=BeamSearch(beams=10, min_length=8, max_length=20)),
        epochs=5,
        samples=_COCO,
        batch=256,
        batch_size=16,
        lr=1e-5,
        heads=5,
        warmup=0.1,
    )
    return replace(
        recipe,
        model=replace(SIZES["base"], decoder_layers=6),
        data=replace(recipe.data, per_caption=True, max_words=30, max_tokens=40),
    )


def bridgetower_refcoco_base() -> Recipe:
    """Phrases of RefCOCO and its kin located at 384 px by a box head on BridgeTower-base, beyond the paper.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune grounding bridgetower_refcoco_base
    --start bridgetower-base --data refcoco refcoco+ refcocog --splits train --image-root coco/train2014
    --folder runs/grounding``. Hardware: 8 GPUs. Expect: nobody has run it.
    """
    return _finetuning(
        "bridgetower_refcoco_base",
        "base",
        384,
        GroundingConfig(locating="regression"),
        epochs=10,
        samples=375_000,
        batch=512,
        batch_size=16,
        lr=1e-5,
        heads=10,
        warmup=0.1,
    )
