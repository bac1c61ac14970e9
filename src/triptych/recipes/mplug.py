"""mPLUG as published: pre-training, and fine-tuning for captions and retrieval.

Numbers are the paper's (Li et al. 2022, sections 5.1 and 7.1) where it gives them and the released configurations'
otherwise; where the two disagree the docstring says which was taken. Lengths in steps follow from the paper's total
batch of 1,024.
"""

from __future__ import annotations

from dataclasses import replace

from triptych.data.transforms import Preprocessing
from triptych.generation import BeamSearch
from triptych.models.mplug import SIZES
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.pretraining import PretrainingConfig
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.grounding import GroundingConfig
from triptych.tasks.nlvr2 import Nlvr2Config
from triptych.tasks.retrieval import RetrievalConfig
from triptych.tasks.self_critical import SelfCriticalConfig
from triptych.tasks.vqa import VqaConfig
from triptych.training.loop import TrainConfig
from triptych.training.optim import OptimConfig
from triptych.training.runs import DataConfig, Recipe

_EPOCHS = 30


def _pretraining(name: str, size: str, images: int, image_size: int, optim: OptimConfig) -> Recipe:
    steps_per_epoch = images // 1024
    return Recipe(
        name=name,
        objective=PretrainingConfig(alpha_warmup=steps_per_epoch),
        model=SIZES[size],
        data=DataConfig(preprocessing=Preprocessing(image_size), scale=(0.2, 1.0), max_words=30, max_tokens=25),
        train=TrainConfig(
            steps=_EPOCHS * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            batch_size=64,
            workers=8,
            precision="bf16",
            checkpointing=True,
            compile=True,
            checkpoint_every=1000,
            log_every=50,
        ),
        optim=optim,
    )


_BASE_OPTIM = OptimConfig(
    lr=1e-4,
    vision_lr=1e-5,
    warmup_lr=1e-6,
    min_lr=1e-6,
    warmup_steps=2000,
    weight_decay=0.02,
    schedule="epoch_cosine",
    decay="official",
)
_LARGE_OPTIM = replace(_BASE_OPTIM, lr=5e-5, vision_lr=5e-6)


def mplug_base_4m() -> Recipe:
    """mPLUG-base (ViT-B/16, S = 3) on the 4M set: COCO, Visual Genome, SBU, CC3M.

    Command: ``torchrun --nproc-per-node 8 -m triptych pretrain mplug_base_4m --data 'shards/{00000..00410}.tar'
    --start clip-vit-b-16 bert-base --batch-size 128 --folder runs/base``

    Hardware: the paper used 16 A100, 64 pairs each (1,024 a step; the released 256 a GPU would be four GPUs).
    Expect: 77.94 VQA test-dev and 80.44 NLVR2 test-P after fine-tuning (paper figure 3).

    30 epochs. Warm-up of 2,000 steps as the released code (the paper says 1,000); 25 tokens as ALBEF's code.
    """
    return _pretraining("mplug_base_4m", "base", 4_000_000, 256, _BASE_OPTIM)


def mplug_base_14m() -> Recipe:
    """mPLUG-base on the 14M set: the 4M set and CC12M.

    Command and hardware as :func:`mplug_base_4m`. Expect: 79.79 VQA test-dev (paper table 2).
    """
    return _pretraining("mplug_base_14m", "base", 14_000_000, 256, _BASE_OPTIM)


def mplug_large_14m() -> Recipe:
    """mPLUG-large (ViT-L/14, S = 6, 224 px) on the 14M set.

    Command: as :func:`mplug_base_4m` with ``mplug_large_14m --start clip-vit-l-14 bert-base``.
    Hardware: 16 A100. Expect: 81.27 VQA test-dev, CIDEr 141.0 on COCO, TR/IR R@1 82.8/65.8 (paper tables 1 to 3).

    Smallest rate 1e-6 as the paper (the released configuration has 2e-6).
    """
    return _pretraining("mplug_large_14m", "large", 14_000_000, 224, _LARGE_OPTIM)


def _finetuning(name: str, size: str, image_size: int, epochs: int, samples: int, batch: int) -> Recipe:
    steps_per_epoch = samples // batch
    return Recipe(
        name=name,
        objective=AlignmentConfig(),
        model=SIZES[size],
        data=DataConfig(
            preprocessing=Preprocessing(image_size),
            scale=(0.5, 1.0),
            per_caption=True,
            evaluate_limit=0,
            max_tokens=30,
        ),
        train=TrainConfig(
            steps=epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch // 8,
            workers=8,
            precision="bf16",
            checkpointing=True,
            evaluate_every=steps_per_epoch,
        ),
        optim=OptimConfig(
            lr=1e-5,
            vision_lr=2e-6,
            warmup_lr=1e-5,
            min_lr=1e-6,
            warmup_steps=100,
            schedule="epoch_cosine",
            decay="official",
        ),
    )


def _caption_coco(name: str, size: str, image_size: int) -> Recipe:
    recipe = _finetuning(name, size, image_size, epochs=5, samples=567_000, batch=256)
    return replace(
        recipe,
        objective=CaptioningConfig(context="image", search=BeamSearch(beams=10, min_length=8, max_length=20)),
        optim=replace(recipe.optim, lr=1e-5, vision_lr=5e-6, warmup_lr=1e-6, warmup_steps=400),
    )


def caption_coco_base() -> Recipe:
    """mPLUG-base captions on COCO (Karpathy split) at 384 px, cross-entropy.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune caption coco_base --start mplug-base
    --data dataset_coco.json --splits train restval --evaluate-data dataset_coco.json --evaluate-splits val
    --image-root coco --folder runs/caption``. Hardware: 8 A100. Expect: CIDEr 137.5 (official README).

    Learning rates of the released configuration; 5 epochs of 256, beam 10 and at most 20 tokens as the paper
    (released: beam 5, 8 to 25).
    """
    return _caption_coco("caption_coco_base", "base", 384)


def caption_coco_large() -> Recipe:
    """mPLUG-large captions on COCO at 336 px. Command and hardware as the base size. Expect: CIDEr 141.0 (table 1)."""
    return _caption_coco("caption_coco_large", "large", 336)


def _self_critical_coco(name: str, size: str, image_size: int) -> Recipe:
    recipe = _caption_coco(name, size, image_size)
    assert isinstance(recipe.objective, CaptioningConfig)
    steps_per_epoch = 113_287 // 256
    return replace(
        recipe,
        objective=SelfCriticalConfig(recipe.objective),
        data=replace(recipe.data, per_caption=False),
        train=replace(
            recipe.train, steps=5 * steps_per_epoch, steps_per_epoch=steps_per_epoch, evaluate_every=steps_per_epoch
        ),
        optim=replace(recipe.optim, lr=1e-6, vision_lr=1e-6, warmup_lr=1e-7, min_lr=8e-8),
    )


def self_critical_coco_base() -> Recipe:
    """Self-critical training of :func:`caption_coco_base`'s captions: 5 epochs of 256 (paper section 7.1).

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune caption coco_base_self_critical --start caption/model
    --data dataset_coco.json --splits train restval --evaluate-data dataset_coco.json --evaluate-splits val
    --image-root coco --folder runs/scst``. Hardware: 8 A100. Expect: CIDEr 150.4 (official README).

    Rate of the released configuration (paper: 8e-7), whose warm-up falls to it from 1e-5; ours rises.
    """
    return _self_critical_coco("self_critical_coco_base", "base", 384)


def self_critical_coco_large() -> Recipe:
    """Self-critical training of :func:`caption_coco_large`'s captions. Expect: CIDEr 155.1 (paper table 1)."""
    return _self_critical_coco("self_critical_coco_large", "large", 336)


def retrieval_coco_base() -> Recipe:
    """mPLUG-base retrieval on COCO at 384 px: 5 epochs of 256, re-ranking 256 (paper section 7.1).

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune retrieval coco_base --start mplug-base
    --data dataset_coco.json --splits train restval --evaluate-data dataset_coco.json --evaluate-splits val
    --image-root coco --folder runs/retrieval``. Hardware: 8 A100. The paper gives no figure for this size.
    """
    recipe = _finetuning("retrieval_coco_base", "base", 384, epochs=5, samples=567_000, batch=256)
    return replace(recipe, retrieval=RetrievalConfig(candidates=256, max_tokens=30))


def retrieval_coco_large() -> Recipe:
    """mPLUG-large retrieval on COCO at 336 px. Expect: TR R@1 82.8, IR R@1 65.8 on the 5k test (paper table 3)."""
    recipe = _finetuning("retrieval_coco_large", "large", 336, epochs=5, samples=567_000, batch=256)
    return replace(recipe, retrieval=RetrievalConfig(candidates=256, max_tokens=30))


def _retrieval_flickr30k(name: str, size: str, image_size: int) -> Recipe:
    recipe = _finetuning(name, size, image_size, epochs=5, samples=145_000, batch=256)
    return replace(recipe, retrieval=RetrievalConfig(candidates=128, max_tokens=30))


def retrieval_flickr30k_base() -> Recipe:
    """mPLUG-base retrieval on Flickr30k at 384 px: as COCO's, re-ranking 128 (paper section 7.1).

    Command: that of :func:`retrieval_coco_base` with ``flickr30k_base`` and ``dataset_flickr30k.json``, splits
    train and val. Hardware: 8 A100. The paper gives no figure for this size.
    """
    return _retrieval_flickr30k("retrieval_flickr30k_base", "base", 384)


def retrieval_flickr30k_large() -> Recipe:
    """mPLUG-large retrieval on Flickr30k at 336 px. Expect: TR R@1 97.6, IR R@1 88.4 (paper table 3)."""
    return _retrieval_flickr30k("retrieval_flickr30k_large", "large", 336)


def _vqa_v2(name: str, size: str, image_size: int) -> Recipe:
    recipe = _finetuning(name, size, image_size, epochs=8, samples=658_111, batch=1024)
    return replace(
        recipe,
        objective=VqaConfig(search=BeamSearch(5, 1, 10)),
        data=replace(recipe.data, per_caption=False, max_tokens=25),
        optim=replace(recipe.optim, lr=2e-5, vision_lr=5e-6, warmup_lr=1e-6, warmup_steps=400),
    )


def vqa_v2_base() -> Recipe:
    """mPLUG-base on VQA v2 at 384 px, answers generated (paper section 7.1: 8 epochs of 1,024).

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune vqa vqa_v2_base --start mplug-base
    --data v2_OpenEnded_mscoco_train2014_questions.json v2_mscoco_train2014_annotations.json
    v2_OpenEnded_mscoco_val2014_questions.json v2_mscoco_val2014_annotations.json --image-root coco
    --folder runs/vqa``. Hardware: 8 A100. Expect: 79.79 test-dev after the 14M pre-training (paper table 2).

    658,111 questions of training and validation, without Visual Genome's. Rates of the paper (released: 3e-5); the
    released warm-up starts at 1e-5, above the vision encoder's own rate, here at 1e-6.
    """
    return _vqa_v2("vqa_v2_base", "base", 384)


def vqa_v2_large() -> Recipe:
    """mPLUG-large on VQA v2 at 504 px (paper; released: 336). As the base size. Expect: 81.27 test-dev (table 2)."""
    return _vqa_v2("vqa_v2_large", "large", 504)


def _snli_ve(name: str, size: str, image_size: int) -> Recipe:
    recipe = _finetuning(name, size, image_size, epochs=5, samples=529_527, batch=64)
    return replace(
        recipe,
        objective=EntailmentConfig(premise=True),
        data=replace(recipe.data, per_caption=False, max_tokens=80),
        optim=replace(recipe.optim, lr=2e-5, vision_lr=2e-5, warmup_lr=1e-6, warmup_steps=400),
    )


def snli_ve_base() -> Recipe:
    """mPLUG-base on SNLI-VE at 384 px, with the premise (paper section 7.1: 5 epochs of 64 at 2e-5).

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune entailment snli_ve_base --start mplug-base
    --data snli_ve_train.jsonl --evaluate-data snli_ve_dev.jsonl --image-root flickr30k-images --folder runs/ve``.
    Hardware: 8 GPUs. The paper gives no figure for this size, and neither rates of the vision encoder nor a head: ours
    are 2e-5 for all and BridgeTower's classifier.
    """
    return _snli_ve("snli_ve_base", "base", 384)


def snli_ve_large() -> Recipe:
    """mPLUG-large on SNLI-VE at 336 px, as the base size. Expect: accuracy 89.45 dev, 89.29 test (paper table 5)."""
    return _snli_ve("snli_ve_large", "large", 336)


def _nlvr2(name: str, size: str, image_size: int) -> Recipe:
    recipe = _finetuning(name, size, image_size, epochs=15, samples=86_373, batch=256)
    return replace(
        recipe,
        objective=Nlvr2Config("merged", swap=True),
        data=replace(recipe.data, per_caption=False),
        optim=replace(recipe.optim, lr=5e-5, vision_lr=5e-6, warmup_lr=1e-6, warmup_steps=400),
    )


def nlvr2_base() -> Recipe:
    """mPLUG-base on NLVR2 at 384 px (paper section 7.1: 15 epochs of 256 at 5e-5 and 5e-6).

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune nlvr2 nlvr2_base --start mplug-base --data train.json
    --evaluate-data dev.json --image-root nlvr2 --folder runs/nlvr2``. Hardware: 8 GPUs. Expect: 80.44 test-P after the
    4M pre-training (figure 3). The warm-up and the head are ours.
    """
    return _nlvr2("nlvr2_base", "base", 384)


def nlvr2_large() -> Recipe:
    """mPLUG-large on NLVR2 at 336 px, as the base size. Expect: 84.58 dev, 84.95 test-P (paper table 5)."""
    return _nlvr2("nlvr2_large", "large", 336)


def _refcoco(name: str, size: str, image_size: int) -> Recipe:
    recipe = _finetuning(name, size, image_size, epochs=120, samples=375_454, batch=512)
    return replace(
        recipe,
        objective=GroundingConfig(),
        data=replace(recipe.data, per_caption=False, max_tokens=20),
        optim=replace(recipe.optim, lr=2e-5, vision_lr=5e-6, warmup_lr=1e-6, warmup_steps=2000),
    )


def refcoco_base() -> Recipe:
    """mPLUG-base on RefCOCO, RefCOCO+, RefCOCOg and ReferItGame together, at 336 px. The paper gives no figure for it.

    Command: ``torchrun --nproc-per-node 8 -m triptych finetune grounding refcoco_base --start mplug-base
    --data refer/refcoco refer/refcoco+ refer/refcocog --splits train --image-root coco --folder runs/ground``, and
    ReferItGame's list from TransVG among the data.
    Hardware: 8 GPUs.

    120 epochs of 512 at 2e-5 (paper section 7.1; then 2e-6 on each set), the vision encoder's rate and the warm-up as
    released. The number of phrases, 120,624 + 120,191 + 80,512 + 54,127, is that of the four training lists.
    """
    return _refcoco("refcoco_base", "base", 336)


def refcoco_large() -> Recipe:
    """mPLUG-large, as the base size. Expect: RefCOCO val/testA/testB 92.40/94.51/88.42 (paper table 4)."""
    return _refcoco("refcoco_large", "large", 336)
