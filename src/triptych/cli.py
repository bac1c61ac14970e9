"""The installed command, ``triptych``: see :data:`COMMANDS`.

Results that a program may want go to stdout as JSON; everything else goes to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, arg

from triptych.commands.data import data_arrow, data_check, data_shapes
from triptych.commands.output import print_json, say
from triptych.commands.scores import score_captions, score_nlvr2, score_vqa
from triptych.metrics.files import read_texts

if TYPE_CHECKING:
    from triptych.training.runs import Recipe

TaskName = Literal[
    "caption",
    "retrieval",
    "vqa",
    "grounding",
    "nlvr2",
    "entailment",
    "image_classification",
    "text_classification",
]

ComparedTask = Literal["caption", "vqa", "grounding", "nlvr2", "entailment", "image_classification"]
"""Those that look at pictures and score each by itself."""

PublishedLayout = Literal[
    "mplug",
    "mplug-modelscope",
    "bridgetower",
    "bridgetower-hf",
    "eve",
    "clip",
    "clip-hf",
    "bert-hf",
    "roberta-hf",
    "beit2",
]

# Imports of torch stand inside the commands: `--help` and `score` should not wait for it.


@dataclass(frozen=True)
class TrainingOptions:
    """What may be changed of a recipe. Without an option the recipe's value holds.

    Attributes:
        data: training data: tar shards, JSON or JSONL lists, Karpathy JSON; paths, globs, {0..9} braces, URLs.
        evaluate_data: data to evaluate on while training and at the end.
        folder: where the run is kept; the same command with the same folder resumes an interrupted run.
        image_root: what the image paths of JSON lists are relative to.
        splits: splits to train on, of a file whose records name theirs (Karpathy: train restval).
        evaluate_splits: the same for the evaluation.
        start: checkpoint folder or Hub id to start from, or folders of converted parts (CLIP, BERT, RoBERTa; BEiT-2).
        vocabulary: vocab.txt, vocab.json (beside merges.txt) or tokenizer.json; by default that of --start, else one is
            trained on the data.
        steps: optimiser steps.
        batch_size: samples a process and forward pass.
        accumulate: forward passes an optimiser step.
        workers: processes that read and decode.
        lr: peak learning rate; those of the vision encoder and of Muon change in proportion.
        precision: fp32, bf16 (with fp32 master weights), or auto.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between evaluations; 0 for one at the end.
        seed: of everything random.
    """

    data: tuple[str, ...]
    folder: Path
    evaluate_data: tuple[str, ...] = ()
    image_root: str | None = None
    splits: tuple[str, ...] = ()
    evaluate_splits: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    vocabulary: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    workers: int | None = None
    lr: float | None = None
    precision: Literal["auto", "fp32", "bf16"] | None = None
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    seed: int | None = None

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with these changes."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in given.items() if value not in (None, ())}

        def changed(part: Any, **renamed: str) -> Any:
            names = {item.name: renamed.get(item.name, item.name) for item in fields(part)}
            return replace(
                part, **{own: given[name] for own, name in names.items() if name in given and own != "folder"}
            )

        data = changed(recipe.data, train="data", evaluate="evaluate_data")
        train, optim = changed(recipe.train), changed(recipe.optim)
        for name in ("vision_lr", "fusion_lr", "head_lr", "muon_lr"):
            if "lr" in given and (rate := getattr(recipe.optim, name)) is not None:
                optim = replace(optim, **{name: rate * optim.lr / recipe.optim.lr})
        if "steps" in given:  # a shorter run has a shorter warm-up
            shrink = min(1.0, train.steps / recipe.train.steps)
            optim = replace(optim, warmup_steps=int(optim.warmup_steps * shrink))
        changes = {name: given[name] for name in ("start", "vocabulary") if name in given}
        return replace(recipe, data=data, train=train, optim=optim, **changes)


def pretrain(recipe: Positional[str], options: OmitSubcommandPrefixes[TrainingOptions]) -> None:
    """Pre-train a model from a recipe. Under torchrun it uses every process.

    Args:
        recipe: mplug_base_4m, mplug_base_14m, mplug_large_14m, flickr8k, or shapes_tiny.
        options: changes to the recipe.
    """
    from triptych import recipes

    _train(options.apply(recipes.find(recipes.PRETRAINING, recipe)), options.folder)


def finetune(
    task: Positional[TaskName],
    recipe: Positional[str],
    options: OmitSubcommandPrefixes[TrainingOptions],
) -> None:
    """Fine-tune a checkpoint (--start) for a task.

    Args:
        task: what to train for.
        recipe: one of the task's; a name that there is not lists them (docs/recipes.md).
        options: changes to the recipe.
    """
    from triptych import recipes

    _train(options.apply(recipes.find(recipes.FINETUNING[task], recipe)), options.folder)


def _train(recipe: Recipe, folder: Path) -> None:
    from triptych.training.parallel import process_group
    from triptych.training.runs import run_recipe

    with process_group() as process:
        run = run_recipe(recipe, folder, process)
        if process.leads:
            print_json(
                {
                    "folder": str(run.folder),
                    "model": str(run.model_folder) if run.outcome.finished else None,
                    "step": run.outcome.step,
                    "finished": run.outcome.finished,
                    "metrics": dict(run.outcome.metrics),
                }
            )


def evaluate(
    task: Positional[TaskName],
    checkpoint: Path,
    data: tuple[str, ...],
    image_root: str | None = None,
    splits: tuple[str, ...] | None = None,
    limit: int = 0,
    blank: bool = False,
    predictions: Path | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    compile: bool = False,
    candidates: int | None = None,
    fold: int = 0,
    answers: Path | None = None,
    frames: int | None = None,
    frame_rule: Literal["uniform", "official"] | None = None,
    frame_decoder: Literal["pyav", "torchcodec"] | None = None,
) -> None:
    """Evaluate a checkpoint; scores go to stdout.

    Args:
        task: what to evaluate.
        checkpoint: a checkpoint folder.
        data: as for training.
        image_root: what the image paths of JSON lists are relative to.
        splits: of a file whose records name theirs.
        limit: only so many pictures.
        blank: show a grey picture instead of each, to see how much the pictures matter.
        predictions: write what was predicted here, as the task's owners want it: JSON; for nlvr2 .csv and for GLUE
            .tsv if the name ends so.
        precision: arithmetic.
        compile: compile the encoders first (about a minute), for thousands of pictures.
        candidates: of retrieval: so many of the best by embeddings are re-ranked by matching, with 0 none; by default
            as the checkpoint says.
        fold: of retrieval: recalls are means over parts of so many pictures, as COCO's "1k" (1000).
        answers: of vqa: a JSON list of answers to choose among, or an object whose keys they are.
        frames: of videos: so many are looked at; by default as the checkpoint says (8).
        frame_rule: which: uniform over the whole video, or as mPLUG's code, which can miss the end.
        frame_decoder: what decodes them; by default as the checkpoint says (PyAV).
    """
    from triptych.predict import Predictor

    given = {"candidates": candidates is not None, "fold": fold != 0}
    wrong = next((name for name, value in given.items() if value and task != "retrieval"), None)
    if wrong is not None:
        raise ValueError(f"--{wrong} is for retrieval")
    if predictions is not None and task == "retrieval":
        raise ValueError("retrieval has no predictions to write")
    if predictions is not None and not predictions.parent.is_dir():
        raise ValueError(f"there is no folder {predictions.parent} for the predictions")
    predictor = Predictor.load(
        checkpoint,
        precision=precision,
        compile=compile,
        candidates=candidates,
        frames=frames,
        frame_rule=frame_rule,
        frame_decoder=frame_decoder,
        answers=None if answers is None else read_texts(answers),
    )
    report = predictor.evaluate(task, data, image_root, splits, limit=limit, blank=blank, fold=fold)
    print_json(report.scores)
    if predictions is not None:
        _write_predictions(task, report.predictions, predictions)
        say(f"wrote {len(report.predictions)} predictions to {predictions}")


def compare(
    task: Positional[ComparedTask],
    checkpoint: Path,
    data: tuple[str, ...],
    training_data: tuple[str, ...] = (),
    image_root: str | None = None,
    splits: tuple[str, ...] | None = None,
    training_splits: tuple[str, ...] | None = None,
    limit: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """What the pictures are worth: a checkpoint beside itself shown grey ones, with a paired test.

    Args:
        task: what to evaluate.
        checkpoint: a checkpoint folder.
        data: to evaluate on, as for training.
        training_data: beside the commonest answer of these, too.
        image_root: what the image paths of JSON lists are relative to.
        splits: of a file whose records name theirs, to evaluate on.
        training_splits: the same of the training data.
        limit: only so many pictures.
        precision: arithmetic.
    """
    from triptych.data.sources import open_source
    from triptych.predict import Predictor
    from triptych.tasks.comparison import compare as run
    from triptych.training.parallel import autocast

    if training_data and task == "caption":
        raise ValueError("captions have no commonest answer: compare them without --training-data")
    predictor = Predictor.load(checkpoint, precision=precision)
    source = open_source(data, image_root=image_root, splits=splits)
    training = open_source(training_data, image_root=image_root, splits=training_splits) if training_data else None
    with autocast(predictor.device, predictor.precision):
        print_json(run(predictor.task(task), source, training, limit=limit).to_dict())


def _write_predictions(task: str, found: list[dict[str, Any]], path: Path) -> None:
    """In the form of the task's owners."""
    if task == "nlvr2" and path.suffix == ".csv":
        from triptych.metrics.nlvr2 import write_nlvr2_predictions

        write_nlvr2_predictions(path, found)
    elif task == "text_classification" and path.suffix == ".tsv":
        from triptych.data.glue import write_submission

        write_submission(found, path)
    else:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def score(command: Positional[Literal["captions", "vqa", "nlvr2"]]) -> None:
    """Score predictions that any program wrote: `triptych score captions --help`, `triptych score vqa --help`..."""
    raise AssertionError(f"{command} is handled by main")


def predict(
    task: Positional[TaskName],
    files: Positional[tuple[Path, ...]] = (),
    checkpoint: Path = Path("demo/captioning/model"),
    text: tuple[str, ...] = (),
    save: Path | None = None,
    beams: int | None = None,
    frames: int | None = None,
    frame_decoder: Literal["pyav", "torchcodec"] | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Use a checkpoint on pictures and videos: one JSON object an answer on stdout.

    Args:
        task: what to do; retrieval lists the best files for each text, nlvr2 judges a statement about one or two
            pictures.
        files: picture or video files.
        checkpoint: a checkpoint folder; by default the one that ``make demo`` leaves.
        text: questions (vqa), phrases (grounding), hypotheses (entailment), statements (nlvr2), or descriptions
            (retrieval), each about every file; or texts to classify.
        save: of grounding: a folder for copies of the pictures with the boxes drawn on them.
        beams: width of the search for captions; by default the checkpoint's.
        frames: of videos: so many are looked at.
        frame_decoder: what decodes them; by default as the checkpoint says (PyAV).
        precision: arithmetic.
    """
    from triptych.ask import ask
    from triptych.predict import Predictor

    if save is not None and task != "grounding":
        raise ValueError("--save is for grounding")
    if beams is not None and task != "caption":
        raise ValueError("--beams is for captions")
    predictor = Predictor.load(checkpoint, precision=precision, beams=beams, frames=frames, frame_decoder=frame_decoder)
    for number, answer in enumerate(ask(predictor, task, files, text)):
        if save is not None:
            answer["saved"] = str(_save_box(save, number, answer))
        print_json(answer)


def _save_box(folder: Path, number: int, answer: Mapping[str, Any]) -> Path:
    from triptych.data.samples import load_image
    from triptych.drawing import draw_box

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(answer['image']).stem}-{number}.png"
    draw_box(load_image(answer["image"], answer["image"]), answer["box_xyxy"], answer["phrase"]).save(path)
    return path


def reconstruct(
    checkpoint: Path,
    out: Path,
    files: Positional[tuple[Path, ...]] = (),
    text: tuple[str, ...] = (),
    data: tuple[str, ...] = (),
    image_root: str | None = None,
    splits: tuple[str, ...] | None = None,
    count: int = 8,
    ratio: float | None = None,
    against: Literal["none", "empty", "wrong"] = "none",
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Hide most of each picture, let a checkpoint paint it by a text (EVE), and draw a sheet of pictures.

    A row has the picture, what was seen of it, and what was painted; each one's error goes to stdout.

    Args:
        checkpoint: a checkpoint folder.
        out: the file to write: .png, .jpg...
        files: picture files of any size, or none where there are --data.
        text: what the files show: one text for all, or one for each.
        data: in place of files: a data set with captions, as for training.
        image_root: what the image paths of JSON lists are relative to.
        splits: of a file whose records name theirs.
        count: so many pictures of the data.
        ratio: share of the patches that is hidden; by default as in training.
        against: paint them also without a text (empty) or by that of another picture (wrong), beside.
        seed: of what is hidden.
        precision: arithmetic.
    """
    from PIL import Image

    from triptych.data.sources import open_source
    from triptych.predict import Predictor
    from triptych.reconstruction import draw_sheet, pictures_of_data, pictures_of_files
    from triptych.reconstruction import reconstruct as run

    if bool(files) == bool(data):
        raise ValueError("give either files or --data")
    if data and text:
        raise ValueError("--data have captions: --text is for files")
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} for the sheet")
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{out} must end as pictures do, with .png or .jpg")
    predictor = Predictor.load(checkpoint, precision=precision)
    if files:
        pictures = pictures_of_files(predictor, files, text)
    else:
        pictures = pictures_of_data(predictor, open_source(data, image_root=image_root, splits=splits), count)
    found = run(predictor, pictures, ratio=ratio, seed=seed, against=against)
    for one in found:
        errors = [{"text": painting.text, "error": painting.error} for painting in one.paintings]
        print_json({"image": one.picture.name, **errors[0]} | ({"against": errors[1]} if errors[1:] else {}))
    draw_sheet(found, against).save(out)
    say(f"wrote {out}")


def experts(
    checkpoint: Path,
    data: tuple[str, ...],
    image_root: str | None = None,
    splits: tuple[str, ...] | None = None,
    limit: int = 0,
    alone: bool = False,
    svg: Path | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Which expert of a mixture works for which modality (EVE): shares of image and of text tokens, by layer.

    Tables go to stderr, JSON to stdout.

    Args:
        checkpoint: a checkpoint folder.
        data: pictures with captions, as for training; every caption is read with its picture.
        image_root: what the image paths of JSON lists are relative to.
        splits: of a file whose records name theirs.
        limit: only so many pictures.
        alone: count also passes of pictures by themselves and of texts by themselves.
        svg: draw the shares here.
        precision: arithmetic.
    """
    from rich.console import Console

    from triptych.data.sources import open_source
    from triptych.expert_load import draw, expert_load, table
    from triptych.predict import Predictor

    if svg is not None and not svg.parent.is_dir():
        raise ValueError(f"there is no folder {svg.parent} for the figure")
    predictor = Predictor.load(checkpoint, precision=precision)
    source = open_source(data, image_root=image_root, splits=splits)
    found = expert_load(predictor, source, limit=limit, alone=alone)
    console = Console(stderr=True)
    for layer in found.layers:
        console.print(table(layer))
    print_json(found.to_dict())
    if svg is not None:
        svg.write_text(draw(found.layers), encoding="utf-8")
        say(f"wrote {svg}")


def convert(
    source: Positional[Path],
    folder: Positional[Path],
    from_: Annotated[PublishedLayout | None, arg(name="from")] = None,
    to: Literal["bridgetower-hf"] | None = None,
    vocab: Path | None = None,
    answers: Path | None = None,
    resize: Literal["squash", "crop", "port"] | None = None,
    image_size: int | None = None,
    stride: int | None = None,
    fusion_layers: int | None = None,
    decoder_layers: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    keep_momentum: bool = False,
    keep_queues: bool = False,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
) -> None:
    """Convert a published checkpoint to ours (--from), or ours to a published layout (--to); every tensor is reported.

    Args:
        source: the published file, or the folder it is in; with --to a checkpoint folder.
        folder: the folder to write.
        from_: whose layout the source has.
        to: whose layout to write.
        vocab: vocab.txt, tokenizer.json or vocab.json (beside merges.txt), where there is none beside the source.
        resize: how pictures of other aspect ratios are seen; by default as published, port as transformers does.
        answers: the classes of a BridgeTower or EVE for questions, in their order: a JSON list or object, or lines.
        image_size: resize the position table to this resolution.
        stride: mPLUG's S, which no tensor tells (base 3, large 6).
        fusion_layers: how many of the allocated fusion layers the network runs, from the top (6).
        decoder_layers: for files without a decoder.
        vision_heads: attention heads, if not width / 64; of EVE's and BEiT-2's only Transformer, too.
        text_heads: attention heads, if not width / 64.
        keep_momentum: keep the momentum copies, in ema.safetensors.
        keep_queues: keep the contrastive queues.
        allow_missing: globs of our names that may keep their initial values.
        allow_unexpected: globs of official names that may be ignored.
    """
    from triptych.checkpoints.convert import convert as run
    from triptych.checkpoints.convert import export
    from triptych.checkpoints.options import Options

    options = Options(
        vocab=vocab,
        answers=answers,
        resize=resize,
        image_size=image_size,
        stride=stride,
        fusion_layers=fusion_layers,
        decoder_layers=decoder_layers,
        vision_heads=vision_heads,
        text_heads=text_heads,
        keep_momentum=keep_momentum,
        keep_queues=keep_queues,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    if (from_ is None) == (to is None):
        raise ValueError("give either --from or --to")
    report = run(source, folder, from_, options) if from_ else export(source, folder, str(to), options)
    say(str(report))
    sys.stdout.write(report.to_json().rstrip() + "\n")


def verify(folder: Positional[Path], tolerance: float = 1e-4) -> None:
    """Run a folder of recorded outputs and compare; exits with 1 where something is over tolerance.

    Args:
        folder: config.json, official_layout.* and io.safetensors.
        tolerance: largest absolute difference allowed; token ids must be equal.
    """
    from triptych.checkpoints.verify import checks_to_json, format_checks, passed
    from triptych.checkpoints.verify import verify as run

    checks = run(folder, tolerance)
    say(format_checks(checks, tolerance))
    sys.stdout.write(checks_to_json(checks).rstrip() + "\n")
    if not passed(checks):
        sys.exit(1)


def data(command: Positional[Literal["shapes", "check", "arrow"]]) -> None:
    """Make, check or convert data: `triptych data shapes --help`, `triptych data check --help`..."""
    raise AssertionError(f"{command} is handled by main")


COMMANDS: Mapping[str, Callable[..., None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "score": score,
    "predict": predict,
    "reconstruct": reconstruct,
    "experts": experts,
    "convert": convert,
    "verify": verify,
    "data": data,
}
GROUPS: Mapping[str, Mapping[str, Callable[..., None]]] = {
    "data": {"shapes": data_shapes, "check": data_check, "arrow": data_arrow},
    "score": {"captions": score_captions, "vqa": score_vqa, "nlvr2": score_nlvr2},
}
"""Commands that are followed by the name of another."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a user's mistake ends with one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:] if arguments is None else arguments
    commands, program = COMMANDS, "triptych"
    if arguments and arguments[0] in GROUPS:
        commands, program = GROUPS[arguments[0]], f"triptych {arguments[0]}"
        arguments = arguments[1:]
    try:
        tyro.extras.subcommand_cli_from_dict(
            dict(commands),
            prog=program,
            description="mPLUG, BridgeTower and EVE: pre-train, fine-tune, evaluate, and use.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if _is_fault(error):
            raise
        say(f"triptych: {error}")
        sys.exit(2)


def _is_fault(error: Exception) -> bool:
    """RuntimeErrors are ours to explain only where we raised them; the rest are faults and show where."""
    from triptych.training.loop import TrainingStopped

    return isinstance(error, RuntimeError) and not isinstance(error, TrainingStopped)
