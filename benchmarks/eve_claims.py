"""EVE's claims at laptop size: tasks and passes of pre-training, routers, and contrast, under one budget each.

    python benchmarks/eve_claims.py --folder runs/eve-claims --pictures docs/images > benchmarks/results/eve_claims.json
    python benchmarks/eve_claims.py --folder runs/eve-claims --group tasks --budgets steps --seeds 0 --steps 300

EVE-tiny is pre-trained on Shapes in each of the ways that the paper's tables compare, then fine-tuned for questions,
answered by a classifier (VQA v2 in the paper), and for retrieval by ITC and ITM (Flickr30k); the scores are those of
held-out scenes. With equal seeds all see the same data in the same order. What is done is not done again: a result is
a file under ``--folder``, and an interrupted training goes on.

Groups: ``tasks`` (table 5), ``deep`` (tables 7 and 8), ``pretraining`` (table 6: contrast and matching), ``compute``
(figure 1: several lengths). Budgets of pre-training: ``steps``, as many for all; ``time``, the time that EVE's steps
take; ``operations``, their arithmetic. What a step costs is measured first, all kinds of step in turns, and kept;
where two budgets give numbers of steps that differ by less than a twentieth, they are the same training.

An order of the paper "appears" where the mean difference over seeds, of pairs with equal seeds, is more than two
standard errors above zero, and is "reversed" where it is as far below; else it is "open". Pictures: a dot a seed, a
line at the mean, dashed EVE's; and scores against what pre-training took.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, get_args

import torch
from torch import nn

from bridges import TEST, TRAIN, spearman, train, write_world
from charts import Panel, Plane, Point, against_cost, dots
from common import Options, Work, count_flops, in_turns, surroundings
from eve import SPECIAL, random_batch
from triptych.data.shapes import Split
from triptych.data.transforms import HALF
from triptych.models.eve import Eve, EveConfig
from triptych.objectives.balance import BalanceConfig, Balanced
from triptych.objectives.masked_signal import MaskedSignal, MaskedSignalConfig
from triptych.objectives.pretraining import TextIds
from triptych.recipes.shapes import retrieval_shapes_tiny_eve, shapes_tiny_eve, vqa_shapes_tiny_eve
from triptych.training.optim import build_optimizer
from triptych.training.parallel import autocast
from triptych.training.runs import Recipe

Row = dict[str, Any]
Budget = Literal["steps", "time", "operations"]

_RECIPE = shapes_tiny_eve()
assert isinstance(_RECIPE.model, EveConfig)
assert isinstance(_RECIPE.objective, MaskedSignalConfig)
TINY, SIGNALS = _RECIPE.model, _RECIPE.objective
DEEPER = replace(
    TINY,
    deep="shared",
    deep_layers=TINY.deep_layers + 1,
    vision=replace(TINY.vision, layers=TINY.vision.layers + 1),
)


@dataclass(frozen=True)
class Variant:
    """A way to pre-train; ``objective`` is None where nothing is pre-trained."""

    title: str
    objective: MaskedSignalConfig | None = SIGNALS
    model: EveConfig = TINY
    balance: BalanceConfig = _RECIPE.balance


EVE = "eve"
VARIANTS: dict[str, Variant] = {
    EVE: Variant("EVE"),
    "simultaneous": Variant(
        "both masked in one pass", replace(SIGNALS, passes="simultaneous", image_ratio=0.5, text_ratio=0.5)
    ),
    "mlm": Variant("MLM alone", replace(SIGNALS, signals="text")),
    "mim": Variant("MIM alone", replace(SIGNALS, signals="image")),
    "none": Variant("nothing pre-trained", None),
    "shared": Variant("shared FFN", model=replace(TINY, deep="shared")),
    "shared_block": Variant("shared FFN, one more block", model=DEEPER),
    "hard": Variant("hard router", model=replace(TINY, deep="hard")),
    "unbalanced": Variant("no auxiliary loss", balance=BalanceConfig(0.0)),
    "unrouted": Variant("no modality routing", model=replace(TINY, moe=replace(TINY.moe, modality_routing=False))),
    "itc": Variant("EVE with ITC", replace(SIGNALS, contrast="itc")),
    "itm": Variant("EVE with ITM", replace(SIGNALS, matching="random")),
    "all": Variant("EVE with ITC and ITM", replace(SIGNALS, contrast="itc", matching="hard")),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "tasks": (EVE, "simultaneous", "mlm", "mim", "none"),
    "deep": (EVE, "shared", "shared_block", "hard", "unbalanced", "unrouted"),
    "pretraining": (EVE, "itc", "itm", "all"),
    "compute": (EVE, "simultaneous", "hard", "all"),
}
SHARES = (0.25, 0.5, 1.0)
"""Of the budget, in the group ``compute``; elsewhere the whole."""

PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "tasks": {EVE: (77.3, 87.3), "simultaneous": (74.6, 81.4), "mlm": (77.0, 85.7), "mim": (60.9, 26.65)},
    "deep": {
        EVE: (77.4, 87.8),
        "shared": (77.0, 86.8),
        "shared_block": (77.1, 87.25),
        "hard": (77.0, 86.25),
        "unbalanced": (77.1, 86.65),
        "unrouted": (77.3, 87.25),
    },
    "pretraining": {EVE: (77.4, 87.8), "itc": (76.8, 87.0), "itm": (77.0, 87.35), "all": (77.1, 87.5)},
}
"""VQA v2 dev, and the mean of Flickr30k's TR@1 and IR@1 (tables 5 to 8); the last are at equal GPU-hours."""
CLAIMS: dict[str, tuple[tuple[str, str], ...]] = {
    "tasks": ((EVE, "simultaneous"), (EVE, "mlm"), (EVE, "mim"), ("mlm", "simultaneous"), ("mlm", "mim")),
    "deep": (
        (EVE, "shared"),
        (EVE, "shared_block"),
        (EVE, "hard"),
        ("shared_block", "shared"),
        (EVE, "unbalanced"),
        (EVE, "unrouted"),
    ),
    "pretraining": ((EVE, "itc"), (EVE, "itm"), (EVE, "all")),
}
"""What the paper finds better than what."""

TASKS: dict[str, tuple[Callable[[], Recipe], str, int, str]] = {
    "vqa": (vqa_shapes_tiny_eve, "overall", 0, "questions, accuracy in percent"),
    "retrieval": (retrieval_shapes_tiny_eve, "mean", 200, "retrieval, mean recall in percent"),
}
"""A recipe, the score that counts, how many pictures it is evaluated on (0 for all), and its name for people."""
STEPS = {"vqa": 300, "retrieval": 200}
PRETRAINING_STEPS = 600
LONGEST = 24
"""Tokens of a caption of two objects."""
SAME = 0.05
"""Numbers of steps that differ by less are one training."""


@dataclass(frozen=True)
class Job:
    """A training of a comparison: who, how many steps, and which budgets that is, or what share of them."""

    variant: str
    steps: int
    share: float
    budgets: tuple[Budget, ...]


# --- what a step costs -----------------------------------------------------------------------------------------


class PretrainingStep:
    """One step as the recipe makes it, of noise."""

    def __init__(self, variant: Variant) -> None:
        assert variant.objective is not None
        ids = TextIds(0, SPECIAL - 1, tuple(range(SPECIAL)), variant.model.text.vocab_size)
        task = MaskedSignal(Eve(variant.model), variant.objective, ids, mean=HALF, std=HALF)
        self.task: nn.Module = (Balanced(task, variant.balance) if variant.balance.weight else task).train()
        self.optimizer = build_optimizer(self.task, _RECIPE.optim)
        self.batch = random_batch(variant.model, _RECIPE.train.batch_size, torch.device("cpu"), LONGEST)
        self.number = 0

    def __call__(self) -> None:
        with autocast(torch.device("cpu"), _RECIPE.train.precision):
            losses = self.task(self.batch, self.number)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.task.parameters(), _RECIPE.optim.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1


def costs(path: Path, how: Options) -> dict[str, dict[str, float]]:
    """``operations`` and ``ms`` of a step of each variant, and its ``time`` as a multiple of EVE's; measured once."""
    trained = {name: variant for name, variant in VARIANTS.items() if variant.objective is not None}
    settings = json.loads(json.dumps({name: asdict(variant) for name, variant in trained.items()}))
    found: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("settings") != settings:
        sys.stderr.write("measuring what a step costs\n")
        torch.manual_seed(0)
        works: dict[str, Work] = {}
        for name, variant in trained.items():
            step = PretrainingStep(variant)
            works[name] = Work(step, count_flops(step))
            step()
        timings = in_turns(works, how)
        found = {
            "settings": settings,
            "costs": {
                name: {"operations": work.amount, "ms": 1000 * timings.median(name), "time": timings.ratio(name, EVE)}
                for name, work in works.items()
            },
        }
        _write(path, found)
    return found["costs"]


def steps_for(steps: int, budget: Budget, cost: Mapping[str, float], eves: Mapping[str, float]) -> int:
    """So many that they cost what EVE's cost."""
    if budget == "steps":
        return steps
    wanted = round(steps * eves[budget] / cost[budget])
    return steps if abs(wanted - steps) < SAME * steps else max(1, wanted)


def jobs_of(given: argparse.Namespace, cost: Mapping[str, Mapping[str, float]]) -> dict[str, list[Job]]:
    """The trainings of each group; those of several groups or budgets with equal steps are one."""
    found: dict[str, list[Job]] = {}
    for group in given.group:
        jobs: dict[tuple[str, int], Job] = {}
        for budget in given.budgets:
            for name in GROUPS[group]:
                trained = VARIANTS[name].objective is not None
                for share in (SHARES if group == "compute" else (1.0,)) if trained else (0.0,):
                    steps = round(given.steps * share)
                    if trained:
                        steps = steps_for(steps, budget, cost[name], cost[EVE])
                    job = jobs.get((name, steps), Job(name, steps, share, ()))
                    jobs[name, steps] = replace(job, budgets=(*job.budgets, budget))
        found[group] = list(jobs.values())
    return found


# --- trainings -------------------------------------------------------------------------------------------------


def shortened(recipe: Recipe, steps: int, seed: int, balance: BalanceConfig) -> Recipe:
    """With so many steps, of which as large a share is warm-up."""
    warmup = round(recipe.optim.warmup_steps * steps / recipe.train.steps)
    settings = replace(recipe.train, steps=steps, seed=seed, log_every=min(25, steps), checkpoint_every=steps)
    return replace(recipe, train=settings, optim=replace(recipe.optim, warmup_steps=warmup), balance=balance)


def pretraining(variant: Variant, steps: int, seed: int) -> Recipe:
    """The recipe of a variant."""
    objective = variant.objective
    assert objective is not None
    recipe = shortened(_RECIPE, steps, seed, variant.balance)
    candidates = None if objective.contrast == "none" else 0 if objective.matching == "none" else 16
    retrieval = replace(recipe.retrieval, candidates=candidates)
    return replace(recipe, name="eve_claims", model=variant.model, objective=objective, retrieval=retrieval)


def finetuning(task: str, variant: Variant, steps: int, seed: int) -> Recipe:
    """The recipe of a task after it."""
    recipe = shortened(TASKS[task][0](), steps, seed, variant.balance)
    return replace(recipe, name=f"eve_claims_{task}", model=variant.model)


class Trial:
    """One training with one seed and what was fine-tuned from it; the results are in a file."""

    def __init__(self, job: Job, seed: int, given: argparse.Namespace, data: Mapping[Split, str]) -> None:
        self.variant, self.steps, self.seed, self.given, self.data = VARIANTS[job.variant], job.steps, seed, given, data
        own = f"{job.variant}-{job.steps}-{seed}"
        self.name, self.folder = own, given.folder / own
        self.path = given.folder / "results" / f"{own}.json"

    def run(self) -> Row:
        """The score of each task; done already, or now."""
        wanted = {} if self.variant.objective is None else _settings(pretraining(self.variant, self.steps, self.seed))
        found: Row = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        if found.get("pretraining") != wanted:
            shutil.rmtree(self.folder, ignore_errors=True)
            found = {"pretraining": wanted, "tasks": {}}
        for task in self.given.tasks:
            recipe = finetuning(task, self.variant, self._steps(task), self.seed)
            if found["tasks"].get(task, {}).get("settings") != _settings(recipe):
                found["tasks"][task] = {"settings": _settings(recipe), "scores": self._finetune(task, recipe)}
                _write(self.path, found)
        return {task: found["tasks"][task]["scores"][TASKS[task][1]] for task in self.given.tasks}

    def _steps(self, task: str) -> int:
        steps: int | None = getattr(self.given, f"{task}_steps")
        return steps or STEPS[task]

    def _pretrained(self) -> tuple[str, ...]:
        """Where the pre-trained model is, if there is one."""
        if self.variant.objective is None:
            return ()
        recipe, folder = pretraining(self.variant, self.steps, self.seed), self.folder / "pretraining"
        if not (folder / "model").exists():
            sys.stderr.write(f"{self.name}: {self.steps} steps of pre-training\n")
            train(replace(recipe, data=replace(recipe.data, train=(self.data[Split.TRAIN],))), folder)
            shutil.rmtree(folder / "checkpoints")
        return (str(folder / "model"),)

    def _finetune(self, task: str, recipe: Recipe) -> Mapping[str, float]:
        start, folder = self._pretrained(), self.folder / task
        sys.stderr.write(f"{self.name}, {task}: {recipe.train.steps} steps\n")
        places = replace(
            recipe.data,
            train=(self.data[Split.TRAIN],),
            evaluate=(self.data[Split.TEST],),
            evaluate_limit=TASKS[task][2],
        )
        scores = dict(train(replace(recipe, data=places, start=start), folder).outcome.metrics)
        shutil.rmtree(folder)
        return scores


def _settings(recipe: Recipe) -> Any:
    return json.loads(json.dumps(asdict(recipe)))


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


# --- what is made of the results -------------------------------------------------------------------------------


def summary(group: str, job: Job, task: str, seeds: Sequence[Row], cost: Mapping[str, Mapping[str, float]]) -> Row:
    """One row of the report: a training on a task, over all seeds."""
    scores = [found[task] for found in seeds]
    own = cost.get(job.variant, {"operations": 0.0, "ms": 0.0})
    paper = PAPER.get(group, {}).get(job.variant)
    return {
        "group": group,
        "variant": job.variant,
        "budgets": job.budgets,
        "share": job.share,
        "steps": job.steps,
        "PFLOP": job.steps * own["operations"] / 1e15,
        "minutes": job.steps * own["ms"] / 60_000,
        "task": task,
        "mean": mean(scores),
        "standard deviation": stdev(scores) if len(scores) > 1 else None,
        "seeds": scores,
        "paper": None if paper is None else paper[list(TASKS).index(task)],
    }


def at_budget(rows: Sequence[Row], group: str, budget: Budget, task: str) -> dict[str, Row]:
    """The row of each variant under a budget."""
    own = (row for row in rows if row["group"] == group and row["task"] == task)
    return {row["variant"]: row for row in own if budget in row["budgets"]}


def findings(rows: Sequence[Row], group: str, budget: Budget, task: str) -> Iterator[Row]:
    """Each order of the paper: how far it appears."""
    found = at_budget(rows, group, budget, task)
    for better, worse in CLAIMS.get(group, ()):
        if better not in found or worse not in found:
            continue
        gains = [a - b for a, b in zip(found[better]["seeds"], found[worse]["seeds"], strict=True)]
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        paper = [PAPER[group][name][list(TASKS).index(task)] for name in (better, worse)]
        yield {
            "group": group,
            "budget": budget,
            "task": task,
            "better": better,
            "worse": worse,
            "gain": mean(gains),
            "standard error": error,
            "seeds with it": sum(gain > 0 for gain in gains),
            "seeds": len(gains),
            "paper's gain": paper[0] - paper[1],
            "verdict": verdict(mean(gains), error),
        }


def verdict(gain: float, error: float | None) -> str:
    """Whether a difference is one."""
    if error is None:
        return "one seed says nothing"
    if abs(gain) <= 2 * error:
        return "open"
    return "appears" if gain > 0 else "reversed"


def sentence(found: Row) -> str:
    """A finding for people."""
    better, worse = (VARIANTS[found[name]].title for name in ("better", "worse"))
    error = "" if found["standard error"] is None else f" ± {found['standard error']:.1f}"
    paper = found["paper's gain"]
    return (
        f"{found['verdict']}: {better} over {worse}, {found['task']}, equal {found['budget']}: {found['gain']:+.1f}"
        f"{error} ({found['seeds with it']} of {found['seeds']} seeds; paper {paper:+.1f})"
    )


def ranks(rows: Sequence[Row], group: str, budget: Budget, task: str) -> float | None:
    """Correlation of the ranks with the paper's."""
    both = [row for row in at_budget(rows, group, budget, task).values() if row["paper"] is not None]
    return spearman([row["mean"] for row in both], [row["paper"] for row in both]) if len(both) > 2 else None


def draw_groups(rows: Sequence[Row], folder: Path) -> None:
    """A picture of dots for each group of the paper's tables, and the figure of scores against compute."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    for group in groups:
        own = [row for row in rows if row["group"] == group]
        if group == "compute":
            picture = draw_compute(own, tasks)
        else:
            panels = [
                Panel(
                    TASKS[task][3],
                    {label(row): row["seeds"] for row in own if row["task"] == task},
                    VARIANTS[EVE].title,
                )
                for task in tasks
            ]
            said = "Each way to pre-train with several seeds: a dot a seed, a line at the mean; dashed: EVE's mean."
            picture = dots(f"EVE on Shapes: {group}", said, panels, lambda name: name != VARIANTS[EVE].title, names=260)
        (folder / f"eve_{group}.svg").write_text(picture, encoding="utf-8")


def label(row: Row) -> str:
    """Of a row of dots."""
    title = VARIANTS[row["variant"]].title
    return title if "steps" in row["budgets"] or row["variant"] == EVE else f"{title}, equal {row['budgets'][0]}"


def draw_compute(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Figure 1: what becomes of so much pre-training."""
    planes = []
    for task in tasks:
        points: dict[str, list[Point]] = {}
        for row in rows:
            if row["task"] == task:
                points.setdefault(VARIANTS[row["variant"]].title, []).append(Point(row["minutes"], row["seeds"]))
        planes.append(Plane(TASKS[task][3], points))
    said = "Scores after fine-tuning against the time of pre-training: a dot a seed, a line through the means."
    return against_cost("EVE on Shapes against compute", said, "minutes of pre-training", planes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of data, trainings and results")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--budgets", nargs="+", choices=get_args(Budget), default=["steps", "time"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=PRETRAINING_STEPS, help="of EVE's pre-training")
    for task, steps in STEPS.items():
        parser.add_argument(f"--{task}-steps", type=int, default=steps, help="of its fine-tuning")
    parser.add_argument("--rounds", type=int, default=9, help="of measuring what a step costs")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as it takes itself")
    parser.add_argument("--processor-time", action="store_true", help="costs by it; with one thread on a busy core")
    parser.add_argument("--pictures", type=Path, help="a folder for eve_tasks.svg and the like")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    data = write_world(given.folder / "data")
    cost = costs(given.folder / "costs.json", Options(False, given.rounds, given.processor_time))
    jobs = jobs_of(given, cost)
    found: dict[tuple[str, int], list[Row]] = {}
    for seed in given.seeds:  # all trainings with one seed first: an interrupted comparison is a comparison
        once: dict[tuple[str, int], Job] = {(job.variant, job.steps): job for own in jobs.values() for job in own}
        for key, job in once.items():
            found.setdefault(key, []).append(Trial(job, seed, given, data).run())
    rows = [
        summary(group, job, task, found[job.variant, job.steps], cost)
        for group, own in jobs.items()
        for job in own
        for task in given.tasks
    ]
    compared = [
        (group, budget, task) for group in jobs if group in CLAIMS for budget in given.budgets for task in given.tasks
    ]
    claims = [finding for where in compared for finding in findings(rows, *where)]
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    for finding in claims:
        print(sentence(finding), file=sys.stderr)
    if given.pictures is not None:
        draw_groups(rows, given.pictures)
    settings = {
        "seeds": given.seeds,
        "steps": {"pretraining": given.steps} | {task: getattr(given, f"{task}_steps") for task in given.tasks},
        "budgets": given.budgets,
        "train": TRAIN,
        "test": TEST,
        "costs of a step": cost,
    }
    notes = {
        "claims": [finding | {"said": sentence(finding)} for finding in claims],
        "rank correlation with the paper": {", ".join(where): ranks(rows, *where) for where in compared},
    }
    json.dump(
        {"benchmark": "eve_claims", **surroundings(), "settings": settings, "rows": rows, "notes": notes},
        sys.stdout,
        indent=1,
    )
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
