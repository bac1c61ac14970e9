"""BridgeTower's ablations at laptop size: every definition of a bridge, and METER, under one budget.

    python benchmarks/bridges.py --folder runs/bridges > benchmarks/results/bridges.json
    python benchmarks/bridges.py --folder runs/bridges --group split layers ...
    python benchmarks/bridges.py --folder runs/bridges --only add meter --seeds 0 --tasks vqa --steps 50

As in the paper's ablations nothing is pre-trained across the modalities, but the encoders are: in the place of CLIP and
RoBERTa, once by contrast alone (ITC) on the captions of Shapes. ``--encoders random`` starts from nothing. Then each
network of the tiny size is trained for two tasks: questions, answered by a classifier (VQA v2 in the paper), and
retrieval, ITC and ITM (Flickr30k). With equal seeds all see the same data in the same order. What is done is not done
again: a result is a file under ``--folder``, and an interrupted training goes on. The groups: ``definitions`` of the
bridge; ``split``, how many of three cross-modal layers have one; ``layers``, how many there are, with bridges or none.

The comparison is drawn to ``--picture``: a dot a seed, a line at the mean, as far as the results that are there go.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from charts import Panel, dots
from common import surroundings
from triptych.checkpoints.bert import Bert, BertConfig
from triptych.checkpoints.folder import load, save_folder
from triptych.data.shapes import ShapesConfig, Split, write_shards
from triptych.models import build
from triptych.models.bridgetower import BRIDGES, SIZES, BridgeTower, BridgeTowerConfig
from triptych.objectives.alignment import AlignmentConfig
from triptych.objectives.pretraining import PretrainingConfig
from triptych.recipes.shapes import shapes_tiny
from triptych.report import training_seconds
from triptych.tasks.vqa import VqaConfig
from triptych.training.logs import read_log
from triptych.training.runs import Recipe, Run, run_recipe

Row = dict[str, Any]

TINY = replace(SIZES["tiny"], decoder_layers=0)
METER = replace(TINY, bridged_layers=0)
NETWORKS: dict[str, BridgeTowerConfig] = {
    **{kind: replace(TINY, bridge=kind) for kind in BRIDGES},
    "meter": METER,
    "meter_gather": replace(METER, gather_layers=True),
    **{f"bridged_{count}_of_3": replace(TINY, bridged_layers=count) for count in (1, 2)},
    **{f"layers_{count}": replace(TINY, fusion_layers=count) for count in (1, 2)},
    **{f"meter_layers_{count}": replace(METER, fusion_layers=count) for count in (1, 2)},
}
GROUPS: dict[str, tuple[str, ...]] = {
    "definitions": (*BRIDGES, "meter", "meter_gather"),
    "split": ("meter", "bridged_1_of_3", "bridged_2_of_3", "add"),
    "layers": ("meter_layers_1", "layers_1", "meter_layers_2", "layers_2", "meter", "add"),
}
PAPER: dict[str, tuple[float, float]] = {
    "add": (75.18, 533.8),
    "multiply": (73.41, 530.4),
    "weighted": (75.09, 532.9),
    "gated": (75.13, 533.1),
    "linear": (74.55, 532.2),
    "mlp": (74.26, 530.2),
    "attention": (73.67, 514.3),
    "attention_ffn": (73.54, 511.1),
    "residual": (75.10, 533.1),
    "meter": (74.04, 530.7),
}
"""VQA v2 test-dev and Flickr30k's sum of recalls of the paper's tables, without pre-training."""

TRAIN, TEST = 10_000, 500
STEPS = {"vqa": 300, "retrieval": 150}
ENCODER_STEPS = 400
ENCODERS = ("contrast", "random")


def questions(steps: int) -> Recipe:
    """Four questions of a picture in a step."""
    return _shortened("bridges_vqa", VqaConfig("classify", per_picture=4, head_scale=1.0), steps)


def retrieval(steps: int) -> Recipe:
    """ITC and ITM within the batch."""
    return _shortened("bridges_retrieval", AlignmentConfig(queue_size=0, momentum=None, alpha=0.0), steps)


def contrast(steps: int) -> Recipe:
    """Encoders alone: what else pre-training does is computed, by a network that is too small to matter, but has no
    weight."""
    alone = (1.0, 0.0, 0.0, 0.0)
    objective = PretrainingConfig(queue_size=0, momentum=None, alpha=0.0, distill_language=False, weights=alone)
    recipe = _shortened("bridges_encoders", objective, steps)
    return replace(recipe, model=replace(METER, fusion_layers=1, decoder_layers=1))


def _shortened(name: str, objective: VqaConfig | AlignmentConfig, steps: int) -> Recipe:
    recipe = shapes_tiny()
    train = replace(recipe.train, steps=steps, log_every=10, checkpoint_every=steps)
    return replace(recipe, name=name, objective=objective, train=train)


TASKS: dict[str, tuple[Callable[[int], Recipe], str]] = {
    "vqa": (questions, "overall"),
    "retrieval": (retrieval, "mean"),
}
"""A recipe, and the score that counts: accuracy, and the mean of the recalls at 1, 5 and 10 in both directions."""


def write_world(folder: Path) -> dict[Split, str]:
    """The data; no two test pictures have the same caption."""
    size = shapes_tiny().data.preprocessing.image_size
    for split, count in ((Split.TRAIN, TRAIN), (Split.TEST, TEST)):
        write_shards(
            folder,
            split,
            count,
            config=ShapesConfig(max_objects=2),
            size=size,
            distinct=split is Split.TEST,
            keep=True,
            show_progress=True,
        )
    return {split: str(folder / f"{split}-*.tar") for split in (Split.TRAIN, Split.TEST)}


def train(recipe: Recipe, folder: Path) -> Run:
    """A finished run; a signal ends the program."""
    done = run_recipe(recipe, folder)
    if not done.outcome.finished:
        sys.exit("stopped; the same command goes on from here")
    return done


def pretrained_encoders(folder: Path, data: Mapping[Split, str], steps: int) -> tuple[str, str]:
    """Folders of an image encoder and of a text encoder, as ``triptych convert`` makes them of CLIP and RoBERTa."""
    vision, text = folder / "vision", folder / "text"
    if not text.exists():
        recipe = contrast(steps)
        sys.stderr.write(f"encoders: {steps} steps\n")
        done = train(replace(recipe, data=replace(recipe.data, train=(data[Split.TRAIN],))), folder / "run")
        loaded = load(done.model_folder)
        assert isinstance(loaded.model, BridgeTower)
        config = loaded.model.config
        bert = Bert(BertConfig(config.text, config.text_layers, head=False))
        bert.encoder = loaded.model.text
        save_folder(vision, loaded.model.vision, preprocessing=loaded.preprocessing)
        save_folder(text, bert, loaded.tokenizer)
    return str(vision), str(text)


def run(recipe: Recipe, folder: Path) -> Row:
    """Train, evaluate, and keep the scores alone."""
    done = train(recipe, folder)
    seconds = training_seconds(read_log(folder), recipe.train.steps)
    shutil.rmtree(folder)
    return {
        "scores": dict(done.outcome.metrics),
        "ms a step": None if seconds is None else 1000 * seconds / recipe.train.steps,
    }


def once(
    name: str, task: str, seed: int, given: argparse.Namespace, data: Mapping[Split, str], start: tuple[str, ...]
) -> Row:
    """The result that is there, or a new one."""
    make, _ = TASKS[task]
    recipe = replace(make(given.steps or STEPS[task]), model=NETWORKS[name])
    recipe = replace(recipe, train=replace(recipe.train, seed=seed), start=start)
    optim = recipe.optim
    assert optim.muon_lr is not None
    recipe = replace(recipe, optim=replace(optim, lr=given.rates * optim.lr, muon_lr=given.rates * optim.muon_lr))
    settings = json.loads(json.dumps(asdict(recipe)))
    own = f"{given.encoders}-{task}-{name}-{seed}"
    path = given.folder / "results" / f"{own}.json"
    found: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("settings") != settings:
        sys.stderr.write(f"{task}, {name}, seed {seed}: {recipe.train.steps} steps\n")
        places = replace(recipe.data, train=(data[Split.TRAIN],), evaluate=(data[Split.TEST],), evaluate_limit=0)
        found = {"settings": settings, **run(replace(recipe, data=places), given.folder / own)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def summary(name: str, task: str, found: Sequence[Row]) -> Row:
    """One row of the report: a network on a task, over all seeds."""
    _, metric = TASKS[task]
    scores = [row["scores"][metric] for row in found]
    times = [row["ms a step"] for row in found if row["ms a step"] is not None]
    return {
        "network": name,
        "task": task,
        "parameters": count_parameters(NETWORKS[name]),
        "mean": mean(scores),
        "standard deviation": stdev(scores) if len(scores) > 1 else None,
        "seeds": scores,
        "ms a step": min(times) if times else None,
        "paper": PAPER[name][list(TASKS).index(task)] if name in PAPER else None,
    }


def count_parameters(config: BridgeTowerConfig) -> int:
    """Of the fusion: bridges, cross-modal layers, and what projects to them."""
    model = build("bridgetower", config)
    parts = model.parts["fusion"]
    return sum(p.numel() for name, p in model.named_parameters() if name.partition(".")[0] in parts)


def orders(rows: Sequence[Row], task: str) -> Row:
    """How far the paper's order appears: the rank correlation, and each network less METER, seed by seed."""
    own = {row["network"]: row for row in rows if row["task"] == task}
    both = [row for row in own.values() if row["paper"] is not None]
    result: Row = {}
    if len(both) > 2:
        result["rank correlation with the paper"] = spearman(
            [row["mean"] for row in both], [row["paper"] for row in both]
        )
    if "meter" in own:
        for name, row in own.items():
            gains = [a - b for a, b in zip(row["seeds"], own["meter"]["seeds"], strict=True)]
            if name != "meter":
                result[f"{name} less meter"] = {
                    "mean": mean(gains),
                    "standard error": stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
                }
    return result


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of the ranks; equal values share theirs. None where all are equal."""
    ranks = [
        [sum(other < one for other in own) + (own.count(one) - 1) / 2 for one in own] for own in (list(x), list(y))
    ]
    (a, mean_a), (b, mean_b) = ((own, mean(own)) for own in ranks)
    covariance = sum((one - mean_a) * (other - mean_b) for one, other in zip(a, b, strict=True))
    spread = (sum((one - mean_a) ** 2 for one in a) * sum((one - mean_b) ** 2 for one in b)) ** 0.5
    return covariance / spread if spread else None


_TITLES = {
    "vqa": "questions, accuracy in percent",
    "retrieval": "retrieval, mean recall in percent",
}


def draw(rows: Sequence[Row]) -> str:
    """An SVG: networks below each other, a panel a task."""
    panels = [
        Panel(_TITLES[task], {_shown(row["network"]): row["seeds"] for row in rows if row["task"] == task}, "meter")
        for task in TASKS
        if any(row["task"] == task for row in rows)
    ]
    said = "Each network trained with several seeds: a dot a seed, a line at the mean; dashed: METER's mean."
    return dots("Definitions of the bridge, compared on Shapes", said, panels, lambda name: name.startswith("meter"))


def _shown(network: str) -> str:
    return network.replace("_", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of data, trainings and results")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=["definitions"])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, help="these networks, not groups")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--encoders", choices=ENCODERS, default="contrast")
    parser.add_argument("--encoder-steps", type=int, default=ENCODER_STEPS, help="of their own training")
    parser.add_argument("--rates", type=float, default=1.0, help="of all learning, as multiples of shapes_tiny's")
    parser.add_argument("--steps", type=int, help=f"of each training; by default {STEPS}")
    parser.add_argument("--picture", type=Path, help="an SVG file to draw to")
    given = parser.parse_args()
    names = given.only or list(dict.fromkeys(name for group in given.group for name in GROUPS[group]))
    data = write_world(given.folder / "data")
    start: tuple[str, ...] = ()
    if given.encoders == "contrast":
        start = pretrained_encoders(given.folder / "encoders", data, given.encoder_steps)
    found: dict[tuple[str, str], list[Row]] = {(name, task): [] for task in given.tasks for name in names}
    for seed in given.seeds:  # all networks with one seed first: an interrupted comparison is a comparison
        for name, task in found:
            found[name, task].append(once(name, task, seed, given, data, start))
    rows = [summary(name, task, results) for (name, task), results in found.items()]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    if given.picture is not None:
        given.picture.write_text(draw(rows), encoding="utf-8")
    settings = {
        "encoders": given.encoders,
        "rates": given.rates,
        "seeds": given.seeds,
        "steps": {task: given.steps or STEPS[task] for task in given.tasks},
        "train": TRAIN,
        "test": TEST,
    }
    notes = {task: orders(rows, task) for task in given.tasks}
    json.dump(
        {"benchmark": "bridges", **surroundings(), "settings": settings, "rows": rows, "notes": notes},
        sys.stdout,
        indent=1,
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
