"""What small real data sets teach on a CPU: every task beside itself blind, and beside the commonest answer.

    python benchmarks/real_data.py --data DATA --models runs --folder runs/real > benchmarks/results/real_data.json
    python benchmarks/real_data.py ... --only easy_vqa snli_ve
    python benchmarks/real_data.py ... --network bridgetower --models runs/bridgetower --folder runs/real-bridgetower
    python benchmarks/real_data.py ... --network eve --models runs/eve --folder runs/real-eve

DATA has the folders flickr8k, easy_vqa, daquar, snli_ve, nlvr, coco_mini and video; MODELS has the runs of
``docs/flickr8k.md``: flickr8k, flickr8k-caption, flickr8k-retrieval and flickr8k-itm, and as shapes the demo's
pretraining; of another network those of its own recipes, where there are any (``pretrain flickr8k_eve``, ``finetune
caption flickr8k_eve``). What trains from nothing is mPLUG-tiny, or the --network of that size; BridgeTower and EVE
choose their answers, as in their papers. Lists in our own format are written under ``--folder/lists``; each training is
a run under ``--folder``, and what is done is not done again. Tests are paired: McNemar's where an item is right or
wrong, the bootstrap elsewhere, against the same model shown grey pictures.

Splits: easy_vqa and NLVR have their own; DAQUAR's images, SNLI-VE's photographs and those of NLVR's boxes are divided
by a hash of their names, so that no picture is on both sides. SNLI-VE has five folds, since it has 205 photographs;
their captions, but no hypotheses, were in the pre-training of Flickr8k.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import surroundings
from triptych.ask import ask
from triptych.data.sources import open_source
from triptych.models import MODELS
from triptych.predict import Predictor
from triptych.recipes import small, unimodal
from triptych.tasks.comparison import Comparison, compare, paired_test
from triptych.tasks.grounding import GroundingConfig
from triptych.tasks.registry import task_for
from triptych.tasks.self_critical import SelfCriticalConfig
from triptych.tasks.vqa import VqaConfig
from triptych.training.parallel import autocast
from triptych.training.runs import Recipe, run_recipe

FOLDS = 5

Row = dict[str, Any]
Sides = dict[str, list[Row]]
"""Rows of a list by its name: "train" and "test"."""


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def side_of(name: str, test_percent: int, fold: int = 0) -> str:
    """Whether a picture is for training or for the test, of which each fold has others: a function of its name."""
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "test" if place // test_percent == fold else "train"


def by_picture(rows: Iterable[Row], location: Callable[[str], str], listed: str) -> list[Row]:
    """One row a picture, with what is asked of it as a list."""
    pictures: dict[str, list[Row]] = {}
    for row in rows:
        pictures.setdefault(row["image"], []).append({key: value for key, value in row.items() if key != "image"})
    return [{"image": location(name), listed: items} for name, items in pictures.items()]


def easy_vqa(data: Path, fold: int) -> Sides:
    """Questions as they are; 4,000 drawings to train on and 1,000 to test on."""
    return {
        side: by_picture(rows_of(data / f"easy_vqa/{side}.jsonl"), f"{data}/easy_vqa/{side}.tar:".__add__, "questions")
        for side in ("train", "test")
    }


def easy_shapes(data: Path, fold: int) -> Sides:
    """The shape of each drawing, from the answers to its questions."""
    shapes = ("circle", "rectangle", "triangle")
    sides: Sides = {}
    for side in ("train", "test"):
        shape_of = {
            row["image"]: row["answer"] for row in rows_of(data / f"easy_vqa/{side}.jsonl") if row["answer"] in shapes
        }
        place = f"{data}/easy_vqa/{side}.tar:"
        sides[side] = [{"image": place + image, "label": shape} for image, shape in shape_of.items()]
    return sides


def daquar(data: Path, fold: int) -> Sides:
    """Answers are sets: one answer here, its parts in alphabetical order."""
    rows = [row | {"answer": ", ".join(sorted(set(row["answer"])))} for row in rows_of(data / "daquar/train.jsonl")]
    return divided(rows, lambda row: side_of(row["image"], 10), f"{data}/daquar/images.tar:", "questions")


def snli_ve(data: Path, fold: int) -> Sides:
    """Photographs of Flickr8k's shards: 205, of which every fold tests on others."""
    places = {
        Path(record.image_id).stem: f"{shard}:{Path(record.image_id).stem}.jpg"
        for shard in sorted((data / "flickr8k").glob("*.tar"))
        for record in open_source(str(shard))
    }
    rows = [row for row in rows_of(data / "snli_ve/train.jsonl") if Path(row["image"]).stem in places]
    sides: Sides = {"train": [], "test": []}
    for row in by_picture(rows, str, "entailment"):
        place = places[Path(row["image"]).stem]
        sides[side_of(row["image"], 100 // FOLDS, fold)].append(row | {"image": place})
    return sides


def nlvr(data: Path, fold: int) -> Sides:
    return {
        "train": statements(data, "train"),
        "test": statements(data, "dev"),
    }


def statements(data: Path, name: str) -> list[Row]:
    return [
        {"image": f"{data}/nlvr/images.tar:{row['image']}", "statement": row["sentence"], "label": row["label"]}
        for row in rows_of(data / f"nlvr/{name}.jsonl")
    ]


def nlvr_boxes(data: Path, fold: int) -> Sides:
    rows = [boxed(row["image"], row["phrase"], row["bbox_xywh"]) for row in rows_of(data / "nlvr/dev_grounding.jsonl")]
    # Pictures of one sentence, dev-1572-0-0 and so on, stay together.
    return divided(
        rows, lambda row: side_of("-".join(row["image"].split("-")[:2]), 20), f"{data}/nlvr/images.tar:", "phrases"
    )


def coco_boxes(data: Path, fold: int) -> Sides:
    """The categories that occur once in a photograph, as phrases."""
    sides: Sides = {}
    for side, name in (("train", "train2017"), ("test", "val2017")):
        rows = []
        for row in rows_of(data / f"coco_mini/{name}.jsonl"):
            names = [box["category"] for box in row["boxes"]]
            rows += [
                boxed(row["image"], f"the {box['category']}", box["bbox_xywh"])
                for box in row["boxes"]
                if names.count(box["category"]) == 1
            ]
        sides[side] = by_picture(rows, f"{data}/coco_mini/images.tar:".__add__, "phrases")
    return sides


def boxed(image: str, text: str, box_xywh: list[float]) -> Row:
    left, top, width, height = box_xywh
    return {"image": image, "text": text, "box_xyxy": [left, top, left + width, top + height]}


def divided(rows: Iterable[Row], side: Callable[[Row], str], root: str, listed: str) -> Sides:
    sides: Sides = {"train": [], "test": []}
    for row in rows:
        sides[side(row)].append(row)
    return {name: by_picture(some, root.__add__, listed) for name, some in sides.items()}


@dataclass(frozen=True)
class Trial:
    """One data set.

    Attributes:
        lists: makes the rows of a fold; None for Flickr8k's own shards.
        start: of MODELS; None trains from nothing.
        task: what is evaluated, if not what the recipe trains.
        folds: trainings, each tested on other pictures; the tests count together.
    """

    recipe: Callable[[], Recipe]
    lists: Callable[[Path, int], Sides] | None
    start: str | None = None
    task: str | None = None
    folds: int = 1


TRIALS = {
    "easy_vqa": Trial(small.easy_vqa, easy_vqa),
    "easy_shapes": Trial(unimodal.images_tiny, easy_shapes, "shapes"),
    "daquar": Trial(small.daquar, daquar, "flickr8k-itm"),
    "snli_ve": Trial(small.snli_ve_flickr8k, snli_ve, "flickr8k-itm", folds=FOLDS),
    "nlvr": Trial(small.nlvr, nlvr),
    "nlvr_boxes": Trial(small.nlvr_boxes, nlvr_boxes),
    "coco_boxes": Trial(small.coco_boxes, coco_boxes, "flickr8k-itm"),
    "flickr8k_scst": Trial(small.self_critical_flickr8k, None, "flickr8k-caption", "caption"),
}


def of_network(recipe: Recipe, network: str) -> Recipe:
    """A recipe for another network than mPLUG, which the recipes are for."""
    if network == "mplug":
        return recipe
    if isinstance(recipe.objective, VqaConfig):
        recipe = replace(recipe, objective=replace(recipe.objective, answering="classify"))
    model = MODELS[network].sizes["tiny"]
    if network == "eve" and not isinstance(recipe.objective, GroundingConfig | SelfCriticalConfig):
        model = replace(model, decoder_layers=0)  # its pre-training has none, and only these two write
    return replace(recipe, model=model)


def run(name: str, trial: Trial, recipe: Recipe, data: Path, models: Path, folder: Path) -> Row:
    """Train every fold, if that is not done, and compare."""
    found = []
    for fold in range(trial.folds):
        own = name if trial.folds == 1 else f"{name}-{fold}"
        train, test = write_lists(own, trial, data, folder / "lists", fold)
        start = () if trial.start is None else (str(models / trial.start / "model"),)
        recipe = replace(recipe, data=replace(recipe.data, train=(train,), evaluate=()), start=start)
        print(f"{own}: {recipe.train.steps} steps of {recipe.train.batch_size}", file=sys.stderr)
        predictor = Predictor.load(run_recipe(recipe, folder / own).model_folder)
        task = predictor.task(trial.task or task_for(recipe.objective).name)
        with autocast(predictor.device, predictor.precision):
            found.append(compare(task, open_source(test), open_source(train)))
    sizes = {side: sum(1 for _ in open_source(place)) for side, place in (("train", train), ("test", test))}
    network = predictor.model.model_type
    result = {"records": sizes, "network": network, "recipe": recipe.name, "steps": recipe.train.steps}
    result["start"] = trial.start
    if trial.task == "caption":  # what the model could do before
        before = Predictor.load(models / str(trial.start) / "model")
        with autocast(before.device, before.precision):
            result["before"] = before.captioner().evaluate(open_source(test)).scores
    return result | together(found)


def together(found: list[Comparison]) -> Row:
    """One comparison as it is; of several folds all their items."""
    if len(found) == 1:
        return found[0].to_dict()
    sides = {name: [getattr(one, name) for one in found] for name in ("model", "blind", "majority")}
    credits = {name: [credit for report in reports for credit in report.credits] for name, reports in sides.items()}
    scores = {name: {found[0].metric: round(100 * sum(own) / len(own), 4)} for name, own in credits.items()}
    test = paired_test(credits["model"], credits["blind"])
    folds = {name: [report.scores[found[0].metric] for report in reports] for name, reports in sides.items()}
    return {
        "metric": found[0].metric,
        **scores,
        "model against blind": test,
        "items": len(credits["model"]),
        "folds": folds,
    }


def once(name: str, trial: Trial, network: str, data: Path, models: Path, folder: Path) -> Row:
    """The result that is there, or a new one."""
    path, recipe = folder / f"{name}.json", of_network(trial.recipe(), network)
    settings = json.loads(json.dumps({"recipe": asdict(recipe), "start": trial.start, "folds": trial.folds}))
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if done.get("settings") != settings:  # a run of other settings is refused when it is taken up
        done = {"settings": settings, "result": run(name, trial, recipe, data, models, folder)}
        path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    return done["result"]


def write_lists(name: str, trial: Trial, data: Path, folder: Path, fold: int) -> tuple[str, str]:
    """Locations of the training and the test data."""
    if trial.lists is None:
        return str(data / "flickr8k/train-*.tar"), str(data / "flickr8k/dev-00000.tar")
    folder.mkdir(parents=True, exist_ok=True)
    places = {side: folder / f"{name}-{side}.jsonl" for side in ("train", "test")}
    if not all(place.exists() for place in places.values()):
        for side, rows in trial.lists(data, fold).items():
            places[side].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(places["train"]), str(places["test"])


DESCRIPTIONS = {
    "3qqEKTPxLNs_1_15.avi": "a baby sits on a blue sofa and drinks from a cup",
    "UXs3eq68ZjE_250_255.avi": "rice is poured into a pot",
    "WTf5EgVY5uU_124_128.avi": "a hand stirs food in a black pan",
    "corrupted.mp4": "a test pattern of coloured bars",
    "flipping_a_pancake.mkv": "a woman in a kitchen tosses a pancake",
    "j2Dhf-xFUxU_13_20.avi": "a hand cuts a stack of flat bread",
    "klteYv1Uv9A_27_33.avi": "a knife cuts a tomato",
}
"""Written for this benchmark by looking at the clips."""


def videos(data: Path, models: Path) -> Row:
    """Captions of the clips, and the rank of each clip for its own description; by models of photographs alone."""
    paths = [data / "video" / name for name in DESCRIPTIONS]
    captioner = Predictor.load(models / "flickr8k-caption" / "model")
    captions = {path.name: caption for path, caption in captioner.caption_files(paths)}
    searcher = Predictor.load(models / "flickr8k-retrieval" / "model")
    ranks = {}
    for answer in ask(searcher, "retrieval", paths, list(DESCRIPTIONS.values())):
        found = [Path(name).name for name in answer["images"]]
        wanted = next(name for name, text in DESCRIPTIONS.items() if text == answer["text"])
        ranks[wanted] = found.index(wanted) + 1
    return {"captions": captions, "rank of 7": ranks, "mean rank": sum(ranks.values()) / len(ranks), "chance": 4.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--network", choices=sorted(MODELS), default="mplug")
    parser.add_argument("--only", nargs="+", choices=[*TRIALS, "video"], default=[*TRIALS, "video"])
    given = parser.parse_args()
    torch.manual_seed(0)
    results: Row = {}
    for name in given.only:
        if name == "video":
            results[name] = videos(given.data, given.models)
        else:
            results[name] = once(name, TRIALS[name], given.network, given.data.resolve(), given.models, given.folder)
        print(json.dumps({name: results[name]}), file=sys.stderr)
    json.dump({"environment": surroundings(), "results": results}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
