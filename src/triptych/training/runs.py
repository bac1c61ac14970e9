"""What a recipe describes, and running it: pre-training and fine-tuning from data to a saved model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.checkpoints.configs import from_json
from triptych.checkpoints.folder import Loaded, load, save_folder
from triptych.checkpoints.parts import initialise
from triptych.data.augmentations import Augmentation, RandomAugment
from triptych.data.batches import ImageTextBatch
from triptych.data.loader import Loader, read_once
from triptych.data.pictures import read_pictures
from triptych.data.pipelines import ImageTextPipeline, PretrainingPipeline
from triptych.data.samples import all_texts, clean_caption
from triptych.data.sources import Source, open_source
from triptych.data.tokenizers import Tokenizer, open_tokenizer, train_wordpiece
from triptych.data.transforms import Preprocessing, Transform
from triptych.models import MODELS, ModelConfig, build, model_type_of
from triptych.models.protocol import VisionLanguageModel
from triptych.objectives.alignment import Alignment, AlignmentConfig
from triptych.objectives.balance import BalanceConfig, Balanced, has_soft_router
from triptych.objectives.masked_matching import MaskedMatching, MaskedMatchingConfig
from triptych.objectives.masked_signal import MaskedSignal, MaskedSignalConfig
from triptych.objectives.prefix_language import split_prefix
from triptych.objectives.pretraining import Pretraining, PretrainingConfig, TextIds
from triptych.objectives.ranking import RankingConfig, TextRanking
from triptych.tasks.base import Pipeline, Task
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.registry import TaskConfig, task_for
from triptych.tasks.retrieval import RetrievalConfig, encode_collection, evaluate_retrieval
from triptych.tasks.self_critical import SelfCriticalConfig
from triptych.training.checkpoint import newest_checkpoint
from triptych.training.expert_parallel import whole_experts
from triptych.training.loop import Outcome, TrainConfig, Trainer
from triptych.training.optim import OptimConfig
from triptych.training.parallel import Process, autocast

_VOCABULARY_SAMPLE = 200_000
_HELD_OUT_BATCH = 32


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and what is done to them.

    Attributes:
        train, evaluate: locations as :func:`triptych.data.sources.open_source` takes them.
        image_root: of list files whose image paths are relative.
        splits, evaluate_splits: of Karpathy files.
        evaluate_limit: pictures that an evaluation during training looks at; 0 for all.
        scale: of the random crop; ``None`` keeps the whole picture.
        augment: of colours and geometry, if any.
        flip: mirror half of the pictures (not where texts say left and right).
        per_caption: an epoch has every caption of a picture, not one of them.
        window: shards that are shuffled together; two windows are in memory.
    """

    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    image_root: str | None = None
    splits: tuple[str, ...] | None = None
    evaluate_splits: tuple[str, ...] | None = None
    evaluate_limit: int = 1000
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(256))
    scale: tuple[float, float] | None = (0.2, 1.0)
    augment: Augmentation | None = field(default_factory=RandomAugment)
    flip: bool = True
    max_words: int = 30
    max_tokens: int = 25
    per_caption: bool = False
    window: int = 4

    def source(self) -> Source:
        """The training data."""
        return open_source(self.train, image_root=self.image_root, splits=self.splits)

    def evaluation_source(self) -> Source:
        """The data to evaluate on."""
        return open_source(self.evaluate, image_root=self.image_root, splits=self.evaluate_splits)


@dataclass(frozen=True)
class Recipe:
    """A complete configuration of one training.

    Attributes:
        objective: its type decides what is trained: pre-training, retrieval (ITC and ITM, or ranking by
            ITM alone), or one of the tasks.
        model: sizes; with ``start`` those of the checkpoint are used.
        start: a checkpoint folder to start from, or folders of parts (CLIP, BERT, RoBERTa; BEiT-2) that ``triptych
            convert`` made.
        vocabulary: ``vocab.txt``, ``vocab.json`` (beside ``merges.txt``) or ``tokenizer.json``; by default that of a
            part in ``start``, else a WordPiece of ``model.text.vocab_size`` is trained on all texts of the data.
        balance: the auxiliary loss of a network with a soft router (EVE).
        retrieval, captioning: how the model is evaluated.
    """

    name: str
    objective: (
        PretrainingConfig | MaskedMatchingConfig | MaskedSignalConfig | AlignmentConfig | RankingConfig | TaskConfig
    )
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    start: tuple[str, ...] = ()
    vocabulary: str | None = None
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    captioning: CaptioningConfig = field(default_factory=lambda: CaptioningConfig(context="fused"))


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    folder: Path
    model_folder: Path
    outcome: Outcome


def run_recipe(recipe: Recipe, folder: Path, process: Process | None = None) -> Run:
    """Train a recipe in a folder; a run that was interrupted there goes on.

    The folder gets ``recipe.json``, ``log.jsonl``, ``tensorboard/``, ``checkpoints/`` and, at the end, ``model/``; and
    where it starts from parts ``start.json``, which tells what became of every tensor.
    """
    process = process or Process()
    _claim(folder, recipe, process)
    source = recipe.data.source()
    if recipe.data.evaluate:
        recipe.data.evaluation_source()  # a wrong location should show now, not after the training
    model, tokenizer, start = _build_model(recipe, source, folder, process)
    task = _build_task(recipe, model, tokenizer, source, folder, process)
    if isinstance(task, Task):
        _study(task, source, folder, process)
        if start is not None:
            _go_on_with_head(task, start)
    pipeline = _pipeline(recipe, task, tokenizer)
    loader: Loader[Any, Any] = Loader(
        source,
        pipeline.prepare,
        pipeline.collate,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        workers=recipe.train.workers,
        rank=process.rank,
        world=process.world,
        window=recipe.data.window,
        per_caption=recipe.data.per_caption,
    )

    def evaluate(kept: nn.Module, step: int) -> Mapping[str, float]:
        if isinstance(kept, Task):
            with autocast(kept.device, recipe.train.precision):
                return kept.evaluate(recipe.data.evaluation_source(), limit=recipe.data.evaluate_limit).scores
        assert isinstance(kept, VisionLanguageModel)
        return evaluate_model(recipe, kept, tokenizer, limit=recipe.data.evaluate_limit)

    def save(kept: nn.Module, name: str) -> Path:
        model, own = (kept.model, kept.own_state()) if isinstance(kept, Task) else (kept, None)
        description = task_description(recipe, task)
        return save_folder(folder / name, model, tokenizer, recipe.data.preprocessing, task=description, task_state=own)

    trained = Balanced(task, recipe.balance) if has_soft_router(model) else task
    trainer = Trainer(
        trained,
        loader,
        folder,
        recipe.train,
        recipe.optim,
        process,
        evaluate=evaluate if recipe.data.evaluate else None,
        best=task.metric if isinstance(task, Task | MaskedSignal) else "mean",
        save_best=lambda kept: save(kept, "best"),
    )
    outcome = trainer.run()
    if outcome.finished:
        with whole_experts(trainer.kept):
            if process.leads:
                save(trainer.kept, "model")
    return Run(folder, folder / "model", outcome)


_DECIDED = ("name", "objective", "model", "start", "optim")
"""What cannot change in the middle of a run; its length, where it reads and how often it saves can."""


def _claim(folder: Path, recipe: Recipe, process: Process) -> None:
    """Write ``recipe.json``.

    Raises:
        ValueError: the folder has a run of another recipe.
    """
    path, wanted = folder / "recipe.json", json.loads(json.dumps(asdict(recipe)))
    if path.exists() and newest_checkpoint(folder / "checkpoints"):
        begun = json.loads(path.read_text())
        where = next((name for name in _DECIDED if begun[name] != wanted[name]), None)
        if where is not None:
            raise ValueError(
                f"{folder} has a run of another recipe ({where}: {_difference(begun[where], wanted[where])}): "
                "give the command it was begun with, or another folder"
            )
    if not process.leads:
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=1) + "\n")
    temporary.replace(path)


def _difference(begun: Any, wanted: Any) -> str:
    """The first value that differs, with the way to it."""
    if isinstance(begun, dict) and isinstance(wanted, dict):
        name = next((name for name in (*wanted, *begun) if begun.get(name) != wanted.get(name)), None)
        if name is None:  # where one says nothing, the other says None
            return "it was begun with another version"
        return f"{name}: {_difference(begun.get(name), wanted.get(name))}"
    return f"it was {begun!r} and is {wanted!r}"


def task_description(recipe: Recipe, task: nn.Module) -> dict[str, Any]:
    """What a saved model was trained for, so that it can be used without its recipe: settings by name of the task."""
    description: dict[str, Any] = {"recipe": recipe.name}
    if isinstance(task, Task):
        return description | {task.name: asdict(task.config)}
    if isinstance(task, MaskedSignal):
        description["masked_signal"] = asdict(task.settings)
    if not isinstance(task, MaskedSignal) or task.settings.ranks:
        description["retrieval"] = asdict(recipe.retrieval)
    if isinstance(task, Pretraining):
        description["caption"] = asdict(recipe.captioning)
    return description


def _build_model(
    recipe: Recipe, source: Source, folder: Path, process: Process
) -> tuple[VisionLanguageModel, Tokenizer, Loaded | None]:
    """The model, its tokenizer, and the whole checkpoint it starts from, if it is one."""
    torch.manual_seed(recipe.train.seed)
    size = recipe.data.preprocessing.image_size
    if len(recipe.start) == 1 and (loaded := load(recipe.start[0])).model_type in MODELS:
        if loaded.tokenizer is None:
            raise ValueError(f"{recipe.start[0]} has no tokenizer.json: convert it again with --vocab")
        assert isinstance(loaded.model, VisionLanguageModel)
        loaded.model.resize_images(size)
        asks_for_decoder = model_type_of(recipe.model) == loaded.model_type and recipe.model.decoder_layers > 0
        if asks_for_decoder and loaded.model.decoder is None:
            loaded.model.add_decoder(recipe.model.decoder_layers)
        return loaded.model, loaded.tokenizer, loaded
    tokenizer = _tokenizer(recipe, source, folder, process)
    config = replace(
        recipe.model,
        text=replace(recipe.model.text, vocab_size=tokenizer.vocab_size),
        vision=replace(recipe.model.vision, image_size=size),
    )
    model = build(model_type_of(config), config)
    if recipe.start:
        report = initialise(model, *recipe.start)
        if process.leads:
            (folder / "start.json").write_text(report.to_json() + "\n")
    return model, tokenizer, None


def _tokenizer(recipe: Recipe, source: Source, folder: Path, process: Process) -> Tokenizer:
    if recipe.vocabulary is not None:
        return open_tokenizer(recipe.vocabulary)
    for part in recipe.start:  # word embeddings mean nothing under another vocabulary
        if (beside := Path(part) / "tokenizer.json").exists():
            return Tokenizer.load(beside)
    path = folder / "tokenizer.json"
    if not path.exists() and process.leads:
        cleaning = MODELS[model_type_of(recipe.model)].model.cleaning
        texts = (
            clean_caption(text, cleaning, recipe.data.max_words)
            for record in islice(iter(source), _VOCABULARY_SAMPLE)
            for text in all_texts(record)
        )
        trained = train_wordpiece(texts, recipe.model.text.vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        trained.save(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    if process.world > 1:
        torch.distributed.barrier()
    return Tokenizer.load(path)


def _build_task(
    recipe: Recipe,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    source: Source,
    folder: Path,
    process: Process,
) -> nn.Module:
    pixels, objective, seed = recipe.data.preprocessing, recipe.objective, recipe.train.seed
    ids = _text_ids(tokenizer)
    _check_ranking(recipe)
    if isinstance(objective, PretrainingConfig):
        return Pretraining(model, objective, ids, mean=pixels.mean, std=pixels.std, seed=seed)
    if isinstance(objective, MaskedMatchingConfig):
        return MaskedMatching(model, objective, ids, mean=pixels.mean, std=pixels.std, seed=seed)
    if isinstance(objective, MaskedSignalConfig):
        return MaskedSignal(model, objective, ids, mean=pixels.mean, std=pixels.std, seed=seed)
    if isinstance(objective, AlignmentConfig):
        return Alignment(model, objective, mean=pixels.mean, std=pixels.std, seed=seed)
    if isinstance(objective, RankingConfig):
        return TextRanking(model, objective, mean=pixels.mean, std=pixels.std, seed=seed)
    if isinstance(objective, SelfCriticalConfig) and recipe.data.per_caption:
        raise ValueError("self-critical training compares with all captions of a picture: set data.per_caption=False")
    kind = task_for(objective)
    task = kind(model, tokenizer, pixels, _completed(objective, kind, source, folder, process))
    task.freeze_rest()
    return task


def _text_ids(tokenizer: Tokenizer) -> TextIds:
    return TextIds(tokenizer.pad_id, tokenizer.mask_id, tokenizer.special_ids, tokenizer.vocab_size)


def _check_ranking(recipe: Recipe) -> None:
    """Whether retrieval would rank by what is trained.

    Raises:
        ValueError: it would not.
    """
    objective, candidates = recipe.objective, recipe.retrieval.candidates
    if isinstance(objective, RankingConfig) and candidates == 0:
        raise ValueError("ranking trains matching alone: give retrieval.candidates, or nothing trained is used")
    if not isinstance(objective, MaskedMatchingConfig | MaskedSignalConfig):
        return
    matches, contrasts = objective.matching != "none", objective.contrast != "none"
    if matches and not contrasts and candidates is not None:
        raise ValueError("no embeddings are trained that could choose candidates: set retrieval.candidates=None")
    if contrasts and not matches and candidates != 0:
        raise ValueError("no matching is trained that could re-rank candidates: set retrieval.candidates=0")


def _completed(objective: Any, kind: type[Task], source: Source, folder: Path, process: Process) -> Any:
    """The task's settings with what the training data say, which is found out once in the life of a run."""
    path = folder / "task.json"
    begun = path.exists() and newest_checkpoint(folder / "checkpoints") is not None
    if not begun and process.leads:
        path.with_suffix(".tmp").write_text(json.dumps(asdict(kind.complete(objective, source))) + "\n")
        path.with_suffix(".tmp").replace(path)
    if process.world > 1:
        torch.distributed.barrier()
    return from_json(kind.config_type, json.loads(path.read_text()), str(path))


def _study(task: Task, source: Source, folder: Path, process: Process) -> None:
    """Let a task learn of its training data what it needs: the leading process finds it, the others read it."""
    file = folder / "study.json.gz"
    if process.leads:
        if newest_checkpoint(folder / "checkpoints") is None:
            file.unlink(missing_ok=True)
        task.study(source, file)
    if process.world > 1:
        torch.distributed.barrier()
    if not process.leads:
        task.study(source, file)


_OF_A_HEAD = ("answering", "answers", "labels", "locating", "bins", "variant", "pictures", "pooling", "kind")
"""Settings of tasks that say what the numbers of a head stand for."""


def _go_on_with_head(task: Task, start: Loaded) -> None:
    """Take over the head of a checkpoint that was trained for the same task, if it means the same."""
    saved, own = (start.task or {}).get(task.name), json.loads(json.dumps(asdict(task.config)))
    if saved is None or not start.task_state:
        return
    differing = [name for name in _OF_A_HEAD if saved.get(name) != own.get(name)]
    if differing:
        sys.stderr.write(f"a new head: that of the checkpoint is for other {', '.join(differing)}\n")
        return
    try:
        task.load_own_state(dict(start.task_state))
    except ValueError as error:
        sys.stderr.write(f"a new head: {error}\n")


def _pipeline(recipe: Recipe, task: nn.Module, tokenizer: Tokenizer) -> Pipeline:
    data = recipe.data
    transform = data.preprocessing.train_transform(data.scale, data.augment, data.flip)
    if isinstance(task, Task):
        return task.training_pipeline(transform, data.max_words, data.max_tokens)
    assert isinstance(task, Alignment | TextRanking)
    kind = partial(PretrainingPipeline, split=split_prefix) if isinstance(task, Pretraining) else ImageTextPipeline
    return _pairs(data, task.model, tokenizer, transform, kind)


def _pairs(
    data: DataConfig,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    transform: Transform,
    kind: Callable[..., ImageTextPipeline] = ImageTextPipeline,
) -> ImageTextPipeline:
    """Pictures with a text each, as the model reads them."""
    return kind(
        tokenizer,
        transform,
        data.max_words,
        data.max_tokens,
        end=model.ends_texts,
        cleaning=model.cleaning,
        frames=data.preprocessing.frames,
    )


def evaluate_model(
    recipe: Recipe, model: VisionLanguageModel, tokenizer: Tokenizer, *, limit: int = 0
) -> dict[str, float]:
    """What the recipe trains, on its evaluation data: retrieval, and after mPLUG's pre-training captions.

    Of masked signals how well the hidden part is predicted, and retrieval only where something is trained to rank by.
    """
    preprocessing, objective = recipe.data.preprocessing, recipe.objective
    scores: dict[str, float] = {}
    model.eval()
    with autocast(next(model.parameters()).device, recipe.train.precision):
        if not isinstance(objective, MaskedSignalConfig) or objective.ranks:
            pictures = read_pictures(recipe.data.evaluation_source(), preprocessing, limit=limit)
            collection = encode_collection(model, tokenizer, preprocessing, pictures, recipe.retrieval)
            scores |= evaluate_retrieval(model, collection, recipe.retrieval).scores
        if isinstance(objective, PretrainingConfig):
            captioner = Captioning(model, tokenizer, preprocessing, recipe.captioning)
            scores |= captioner.evaluate(recipe.data.evaluation_source(), limit=limit).scores
        if isinstance(objective, MaskedSignalConfig):
            mean, std, seed = preprocessing.mean, preprocessing.std, recipe.train.seed
            signals = MaskedSignal(model, objective, _text_ids(tokenizer), mean=mean, std=std, seed=seed)
            signals.to(next(model.parameters()).device)
            scores |= signals.evaluate(_held_out(recipe.data, model, tokenizer, limit))
    return scores


def _held_out(
    data: DataConfig, model: VisionLanguageModel, tokenizer: Tokenizer, limit: int
) -> Iterator[ImageTextBatch]:
    """The evaluation data as training would see them, but whole and unchanged: a caption of each picture."""
    pipeline = _pairs(data, model, tokenizer, data.preprocessing.test_transform())
    left = limit
    for examples in read_once(data.evaluation_source(), pipeline.prepare, list, batch_size=_HELD_OUT_BATCH):
        yield pipeline.collate(examples[:left] if limit else examples)
        left -= len(examples)
        if limit and left <= 0:
            return
