"""What ``make demo`` runs: pre-train a small network on the built-in world, fine-tune it for captions, and report.

Everything is kept in one folder, and the same command goes on where it was interrupted:

    data/         the Shapes world as tar shards: train, test, and compositions that training never shows
    pretraining/  the first training: log, checkpoints, and at the end model/
    captioning/   the second, from that model
    retrieval/    of EVE, whose pre-training does not retrieve: another from that model
    pictures/     a few test pictures to try the model on
    results.json  all numbers
    report.html   the report

With ``--tasks all`` every downstream task follows, from these models: a folder for each training, ``tasks.json`` and
``tasks.html``.

This file is the command alone; the steps are in ``triptych.shapes_demo``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.shapes_demo import DemoConfig

# Imports of torch stand inside: `--help` should not wait for it, and Ctrl-C meanwhile should not show a traceback.


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m triptych.demo",
        description="Pre-train a small network on the built-in world, evaluate it, and write a report. "
        "The same command goes on where an interrupted one stopped.",
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything is kept (default: demo)")
    parser.add_argument("--model", choices=("mplug", "bridgetower", "eve"), default="mplug", help="the network")
    parser.add_argument("--quick", action="store_true", help="a smoke test of about a minute that teaches nothing")
    parser.add_argument(
        "--tasks",
        choices=("captions", "all"),
        default="captions",
        help="all: questions, phrases, statements, entailment, self-critical captions and clips too (20 minutes)",
    )
    given = parser.parse_args(arguments)
    if given.quick:
        _say("a smoke test: everything runs once, but so few steps teach the model nothing")
    try:
        command = shlex.join(["python", "-m", "triptych.demo", *arguments])
        return _run(given.folder, given.model, given.quick, given.tasks == "all", command)
    except KeyboardInterrupt:
        _say("\nstopped; the same command goes on from here")
        return 130


def _run(folder: Path, model: str, quick: bool, tasks: bool, command: str) -> int:
    from triptych import shapes_demo
    from triptych.training.loop import TrainingStopped

    config = replace(shapes_demo.QUICK if quick else shapes_demo.DemoConfig(), model=model)
    try:
        evaluations = shapes_demo.run_demo(folder, config, command)
    except (ValueError, OSError, TrainingStopped) as error:
        _say(f"demo: {error}")
        return 2
    if evaluations is None:  # the training has said so
        return 130
    shapes_demo.print_results(evaluations)
    _say(f"\nthe report: {folder / 'report.html'}\nthe numbers: {folder / 'results.json'}")
    for what, line in shapes_demo.next_steps(folder, config):
        _say(f"\n{what}\n  {line}")
    if tasks and (code := _run_tasks(folder, config)):
        return code
    if quick:
        _say("\nthis was a smoke test; without --quick the demo trains a model that can do something")
    return 0


def _run_tasks(folder: Path, config: DemoConfig) -> int:
    """The second part; returns the exit code."""
    from triptych.shapes_tasks import run_tasks
    from triptych.training.loop import TrainingStopped

    try:
        finished = run_tasks(folder, config)
    except (ValueError, OSError, ImportError, TrainingStopped) as error:
        _say(f"demo: {error}")
        return 2
    if not finished:  # the training has said so
        return 130
    _say(f"\nthe tasks: {folder / 'tasks.html'}\ntheir numbers: {folder / 'tasks.json'}")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
