"""The second part of the demo, ``--tasks all``: every downstream task on Shapes, from the models of the first part.

``triptych.shapes_demo`` is the first part. Every step leaves what is done already as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table as TerminalTable

from triptych import report
from triptych.data.pictures import show
from triptych.data.samples import Record, decode_image
from triptych.data.shapes import ShapesConfig, Split, write_shards, write_statements
from triptych.data.shapes_clips import ClipFiles, write_clips
from triptych.data.sources import open_source
from triptych.data.writing import replacing
from triptych.drawing import draw_box
from triptych.metrics.boxes import paired_iou
from triptych.predict import Predictor
from triptych.recipes import shapes as shapes_recipes
from triptych.report import Captioned, Column, Rows, Section
from triptych.shapes_demo import DemoConfig, claim, exact_share, names_exactly
from triptych.tasks.comparison import compare
from triptych.training.parallel import autocast, process_group
from triptych.training.runs import Recipe, run_recipe

_CLIPS = 200
_CLIP_FRAMES = 8
_SHOWN = 8
_ENLARGED = 6
_STILL_CAPTIONS = "still-clips-test.jsonl"
_STILL_QUESTIONS = "still-clip-questions-test.jsonl"


@dataclass(frozen=True)
class Trial:
    """One task of the table.

    Attributes:
        title: of its row.
        task: what is evaluated.
        score: the score that its row shows, times ``factor``.
        start: whose model it starts from: one of the first part, or an earlier trial.
        data, test: files of the data folder to train on, and to evaluate on.
        recipe: of its training; None where the model of ``start`` is used as it is (zero-shot).
        best: the score that was asked for, if one was.
    """

    title: str
    task: str
    score: str
    start: str
    data: str
    test: str
    recipe: Callable[[], Recipe] | None = None
    factor: float = 1.0
    best: float | None = None


TRIALS: Mapping[str, Trial] = {
    "vqa": Trial(
        "questions, accuracy",
        "vqa",
        "overall",
        "pretraining",
        "train-*.tar",
        "test-*.tar",
        shapes_recipes.vqa_shapes_tiny,
        best=90,
    ),
    "grounding": Trial(
        "phrases, IoU of at least 0.5",
        "grounding",
        "accuracy",
        "vqa",
        "train-*.tar",
        "test-*.tar",
        shapes_recipes.grounding_shapes_tiny,
        best=80,
    ),
    "nlvr2": Trial(
        "statements about two pictures",
        "nlvr2",
        "accuracy",
        "vqa",
        "statements-train.jsonl",
        "pairs/statements-test.jsonl",
        shapes_recipes.nlvr2_shapes_tiny,
        best=75,
    ),
    "entailment": Trial(
        "entailment",
        "entailment",
        "accuracy",
        "vqa",
        "train-*.tar",
        "test-*.tar",
        shapes_recipes.entailment_shapes_tiny,
        best=85,
    ),
    "captions": Trial("captions, CIDEr", "caption", "CIDEr", "captioning", "train-*.tar", "test-*.tar", factor=100),
    "self_critical": Trial(
        "captions after self-critical training, CIDEr",
        "caption",
        "CIDEr",
        "captioning",
        "train-*.tar",
        "test-*.tar",
        shapes_recipes.self_critical_shapes_tiny,
        factor=100,
    ),
    "clip_captions": Trial(
        "captions of clips, zero-shot, CIDEr",
        "caption",
        "CIDEr",
        "captioning",
        _STILL_CAPTIONS,
        _STILL_CAPTIONS,
        factor=100,
    ),
    "clip_questions": Trial(
        "questions about clips, zero-shot",
        "vqa",
        "overall",
        "vqa",
        "train-*.tar",
        _STILL_QUESTIONS,
    ),
}


_OWN: Mapping[str, Mapping[str, Callable[[], Recipe]]] = {
    "bridgetower": {"vqa": shapes_recipes.vqa_shapes_tiny_classify},
    "eve": {
        "vqa": shapes_recipes.vqa_shapes_tiny_eve,
        "grounding": shapes_recipes.grounding_shapes_tiny_eve,
        "nlvr2": shapes_recipes.nlvr2_shapes_tiny_eve,
        "entailment": shapes_recipes.entailment_shapes_tiny_eve,
        "self_critical": shapes_recipes.self_critical_shapes_tiny_eve,
    },
}
"""Recipes of trials that networks have of their own; BridgeTower and EVE choose their answers, as in their papers."""


def trials(config: DemoConfig) -> Mapping[str, Trial]:
    """The table, with the network's own recipes."""
    own = _OWN.get(config.model, {})
    return {name: replace(trial, recipe=own.get(name, trial.recipe)) for name, trial in TRIALS.items()}


def run_tasks(folder: Path, config: DemoConfig) -> bool:
    """Do or go on with all of it in the folder of the first part; False if a signal stopped it."""
    data = folder / "data"
    table = trials(config)
    trainings = {name: trial.recipe for name, trial in table.items()}
    recipes = {name: asdict(config.shortened(recipe())) for name, recipe in trainings.items() if recipe is not None}
    claim(folder / "tasks-demo.json", recipes)
    write_data(data, config)
    models = {name: folder / name / "model" for name in ("pretraining", "captioning")}
    path = folder / "tasks.json"
    done: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, trial in table.items():
        start = models[trial.start]
        model = start if trial.recipe is None else _train(name, trial, start, folder, config)
        if model is None:
            return False
        models[name] = model
        if name not in done:
            done[name] = _evaluate(trial, model, data)
            path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print_table(done)
    write_page(folder, done, models, config)
    return True


def write_data(data: Path, config: DemoConfig) -> None:
    """Statements about the training scenes, other test scenes with statements, and clips; what is there stays.

    The test scenes of the first part are chosen (no two have the same caption), and statements are about neighbours.
    """
    size, world = config.pretraining().data.preprocessing.image_size, ShapesConfig(max_objects=config.max_objects)
    pairs = data / "pairs"
    write_statements(data, Split.TRAIN, config.train // 2, config=world, each=4, keep=True, show_progress=True)
    write_shards(pairs, Split.TEST, 2 * config.test, size=size, config=world, keep=True, show_progress=True)
    write_statements(pairs, Split.TEST, config.test, config=world, keep=True)
    clips = min(_CLIPS, config.test)
    files = write_clips(
        data, Split.TEST, clips, frames=_CLIP_FRAMES, size=size, config=world, keep=True, show_progress=True
    )
    _write_still(files)


def _write_still(files: ClipFiles) -> None:
    """What a model that knows only images can be judged by: captions of the scene, questions with nothing of motion."""
    captions, asked = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (files.captions, files.questions)
    )
    folder = files.captions.parent
    still = {
        _STILL_CAPTIONS: [row | {"captions": row["scene_captions"]} for row in captions],
        _STILL_QUESTIONS: [row for row in asked if row["kind"] != "motion"],
    }
    for name, rows in still.items():
        with replacing(folder / name) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def _train(name: str, trial: Trial, start: Path, folder: Path, config: DemoConfig) -> Path | None:
    """Fine-tune from a model; None if a signal stopped it."""
    assert trial.recipe is not None
    recipe = config.shortened(trial.recipe())
    data = replace(recipe.data, train=(str(folder / "data" / trial.data),), evaluate=())
    recipe = replace(recipe, data=data, start=(str(start),))
    sys.stderr.write(f"{trial.title}, {recipe.name}: {recipe.train.steps} steps of {recipe.train.batch_size}\n")
    with process_group() as process:
        run = run_recipe(recipe, folder / name, process)
    return run.model_folder if run.outcome.finished else None


def _evaluate(trial: Trial, model: Path, data: Path) -> dict[str, Any]:
    """The model on its test data, beside itself blind and the commonest answer of its training data.

    Captions also get ``exact``, the percentage that name exactly the objects.
    """
    predictor = Predictor.load(model)
    source, training = open_source(str(data / trial.test)), open_source(str(data / trial.data))
    sys.stderr.write(f"evaluating {trial.title}\n")
    with autocast(predictor.device, predictor.precision):
        found = compare(predictor.task(trial.task), source, training)
    result = found.to_dict()
    if trial.task == "caption":
        records = list(source)
        for side, part in (("model", found.model), ("blind", found.blind)):
            captions = {str(row["image_id"]): row["caption"] for row in part.predictions}
            result[side]["exact"] = exact_share(captions, records)
    return result


def print_table(done: Mapping[str, Mapping[str, Any]]) -> None:
    """Every task: the model, blind, majority; to stderr."""
    table = TerminalTable(box=None, pad_edge=False)
    for name in ("", "model", "blind", "majority", "asked for"):
        table.add_column(
            name, justify="left" if not name else "right", style="dim" if name not in ("", "model") else None
        )
    for title, cells in _table_rows(done):
        table.add_row(title, *cells)
    Console(stderr=True).print(table)


def _table_rows(done: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Title and cells of each task that is done."""
    for name, trial in TRIALS.items():
        if name not in done:
            continue
        rows = [(trial.title, trial.score, trial.factor)]
        if trial.task == "caption":
            rows += [(f"{trial.title.rpartition(', ')[0]}, all objects right", "exact", 1.0)]
        for title, score, factor in rows:
            scores = [done[name].get(column, {}).get(score) for column in ("model", "blind", "majority")]
            cells = ["" if value is None else f"{value * factor:.1f}" for value in scores]
            yield title, (*cells, "" if trial.best is None else f"{trial.best:.0f}")


# --- the page ----------------------------------------------------------------------------------------------------


def write_page(
    folder: Path, done: Mapping[str, Mapping[str, Any]], models: Mapping[str, Path], config: DemoConfig
) -> Path:
    """Write tasks.html."""
    data = folder / "data"
    records = [record for _, record in zip(range(_SHOWN), open_source(str(data / "test-*.tar")), strict=False)]
    columns = (Column("model"), Column("blind", muted=True), Column("majority", muted=True), Column("asked for"))
    sections: list[Section] = [
        report.Table(
            "Results",
            columns,
            (Rows("", tuple(_table_rows(done))),),
            note="Percent; CIDEr times 100. Blind: the same model shown a grey picture for each. Majority: the answer "
            "that the training data give most; for phrases the mean box. Zero-shot: a model that has seen no clips.",
        ),
        report.Captions(
            "Questions",
            tuple(_answered(models["vqa"], records)),
            "One of each of the first test pictures, not chosen. Above: the model's answer; below: the right one.",
        ),
        report.Captions(
            "Phrases",
            tuple(_located(models["grounding"], records)),
            "Red: the box that the model gives; right where its IoU with the true one is at least 0.5.",
        ),
        report.Captions(
            "Clips",
            tuple(_clips(models["captions"], data)),
            "The last frame, and what a model says that has seen images alone; right where it names all objects.",
        ),
    ]
    lead = f"Every downstream task on the built-in world, fine-tuned from one pre-trained {config.network.title}."
    return report.write_report(folder / "tasks.html", "Downstream tasks on Shapes", sections, lead=lead)


def _answered(model: Path, records: Sequence[Record]) -> Iterator[Captioned]:
    """A question about each picture, another one each time, and what the model answers."""
    task = Predictor.load(model).item_task("vqa")
    for number, record in enumerate(records):
        asked = record.extra["questions"][number % len(record.extra["questions"])]
        answer = task.answer([replace(record, extra={"questions": [asked]})])[0]
        said, right = (f"{asked['question']}? {text}" for text in (answer, asked["answer"]))
        yield Captioned(decode_image(record), said, (right,), answer == asked["answer"])


def _located(model: Path, records: Sequence[Record]) -> Iterator[Captioned]:
    """A phrase about each picture, another one each time, and where the model finds it."""
    task = Predictor.load(model).item_task("grounding")
    for number, record in enumerate(records):
        phrase = record.extra["phrases"][number % len(record.extra["phrases"])]
        box = task.answer([replace(record, extra={"phrases": [phrase]})])[0]
        overlap = float(paired_iou(torch.tensor([box]), torch.tensor([phrase["box_xyxy"]]))[0])
        picture = decode_image(record)
        large = picture.resize((_ENLARGED * picture.width, _ENLARGED * picture.height), Image.Resampling.NEAREST)
        drawn = draw_box(large, [_ENLARGED * number for number in box], phrase["text"])
        yield Captioned(drawn, phrase["text"], (phrase["text"],), overlap >= 0.5)


def _clips(model: Path, data: Path) -> Iterator[Captioned]:
    """The last frames of the first clips, what a captioner of pictures says of them, and what could be said."""
    predictor = Predictor.load(model)
    captioner, preprocessing = predictor.captioner(), predictor.preprocessing
    for _, record in zip(range(_SHOWN), open_source(str(data / _STILL_CAPTIONS)), strict=False):
        pixels = show(record, preprocessing.test_transform(), preprocessing.frames)
        caption = captioner.caption(pixels[None].to(predictor.device))[0]
        last = Image.fromarray(pixels[-1].permute(1, 2, 0).numpy())
        yield Captioned(last, caption, record.captions, names_exactly(caption, record))
