"""Heads of fine-tuned BridgeTowers: an official classifier becomes the head of the task it was trained for.

Source: microsoft/BridgeTower ``bt_module.py:150-206`` (``Sequential`` of linear, norm, GELU, linear).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from triptych.checkpoints.bert import table
from triptych.checkpoints.building import shapes_of
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.mapping import Rule, Shapes, linear
from triptych.checkpoints.reading import Tensors
from triptych.models.heads import ClassifierHead
from triptych.tasks.entailment import EntailmentConfig
from triptych.tasks.nlvr2 import Nlvr2Config
from triptych.tasks.vqa import VqaConfig

OWN = "task."
"""Stands before the names of a task's own tensors where those of the model are beside them."""

TYPES = "token_type_embeddings.weight"
_VQA, _NLVR2, _SNLI = CLASSIFIERS = ("vqa_classifier", "nlvr2_classifier", "snli_classifier")


@dataclass(frozen=True)
class TaskHead:
    """The classifier of a file.

    Attributes:
        task: the name of its task, and ``config`` the settings.
        classifier: its name in the file.
        classes: K.
        pooled: P, the width of one pooled state.
    """

    task: str
    config: VqaConfig | Nlvr2Config | EntailmentConfig
    classifier: str
    classes: int
    pooled: int

    @property
    def description(self) -> dict[str, Any]:
        """As a checkpoint folder keeps it."""
        return {self.task: asdict(self.config)}

    @property
    def picture_types(self) -> bool:
        """Whether the task adds a vector to each of two pictures; D is then half of P."""
        return isinstance(self.config, Nlvr2Config) and self.config.picture_types

    def shapes(self, where: str | Path) -> Shapes:
        """Name and shape of what the task adds to the model, after :data:`OWN`."""
        states = 2 if self.task == "nlvr2" else 1
        scale = self.config.head_scale / states
        head = shapes_of(lambda: ClassifierHead(states * self.pooled, self.classes, scale=scale), where)
        shapes = {f"{OWN}head.{name}": shape for name, shape in head.items()}
        if self.picture_types:
            shapes[f"{OWN}picture_types"] = (2, self.pooled // 2)
        return shapes

    def rules(self) -> list[Rule]:
        """Where these come from."""
        layers = {"expand": 0, "norm": 1, "classify": 3}
        rules = [rule for part, i in layers.items() for rule in linear(f"{OWN}head.{part}", f"{self.classifier}.{i}")]
        if self.picture_types:
            rules.append(_picture_types())
        return rules


def find_head(
    tensors: Tensors, width: int, answers: Path | None, source: Path
) -> tuple[TaskHead | None, dict[str, str]]:
    """The classifier of a file, if it has one that a task can use; and why others are left out, by name.

    Args:
        width: D.
        answers: the file with the classes of a classifier for questions.
    """
    found = [name for name in CLASSIFIERS if f"{name}.0.weight" in tensors]
    left = dict.fromkeys(found[1:], "a checkpoint keeps the head of one task")
    if not found:
        return None, left
    name = found[0]
    if f"{name}.1.weight" not in tensors and f"{name}.3.weight" not in tensors:
        return None, {name: "a classifier of one layer, which no task here has", **left}
    hidden, _ = table(tensors, f"{name}.0.weight", source)
    classes, _ = table(tensors, f"{name}.3.weight", source)
    scale = head_scale(hidden, 2 * width)
    if name == _NLVR2:
        nlvr2 = Nlvr2Config(variant="passes", picture_types=True, head_scale=scale, head_dropout=0.1)
        return TaskHead("nlvr2", nlvr2, name, classes, 2 * width), left
    if name == _SNLI:
        return TaskHead("entailment", EntailmentConfig(head_scale=scale), name, classes, 2 * width), left
    if answers is None:
        return None, {name: f"its {classes} answers are not in the file: give their list with --answers", **left}
    known = read_answers(answers, classes)
    return TaskHead("vqa", VqaConfig("classify", known, head_scale=scale), name, classes, 2 * width), left


def _picture_types() -> Rule:
    """What the second picture's type differs by from the type of all pictures, which the model itself adds.

    The sum is the official row but for rounding (one unit in the last place). Exact would be a model without a type
    for pictures, which is then of no use to any other task.
    """

    def differences(tensors: Any) -> Any:
        _, first_D, second_D = tensors[0]
        return [torch.stack([torch.zeros_like(first_D), second_D - first_D])]

    return Rule((f"{OWN}picture_types",), (TYPES,), differences)


def head_scale(hidden: int, width: int) -> float:
    """The number that times ``width``, rounded down, is ``hidden``."""
    scale = hidden / width
    return scale if int(width * scale) == hidden else math.nextafter(scale, math.inf)


def read_answers(path: Path, classes: int) -> tuple[str, ...]:
    """The answers in the order of the classes.

    Args:
        path: a JSON list; a JSON object of answers and their numbers, either way round, also as ``answer2label``,
            ``ans2label``, ``label2ans``, ``label2answer`` or ``id2label`` of a larger object; or a text file with one
            answer a line.
        classes: how many there must be.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(path, "not a text file: a list of answers is needed") from error
    try:
        answers = _listed(json.loads(content))
    except json.JSONDecodeError as error:
        if path.suffix == ".json":
            raise CheckpointError(path, f"not JSON: {error}") from error
        answers = content.splitlines()
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
    if len(answers) != classes:
        raise CheckpointError(path, f"has {len(answers)} answers, but the classifier {classes} classes")
    if len(set(answers)) < len(answers):
        twice = next(answer for answer in answers if answers.count(answer) > 1)
        raise CheckpointError(path, f"has the answer {twice!r} twice")
    return tuple(answers)


_NESTED = ("answer2label", "ans2label", "label2answer", "label2ans", "id2label")


def _listed(values: Any) -> list[str]:
    """Answers in order from parsed JSON; ValueError says what is wrong."""
    if isinstance(values, Mapping):
        values = next((values[name] for name in _NESTED if name in values), values)
    if isinstance(values, Mapping):
        pairs = [(answer, label) if isinstance(label, int) else (label, answer) for answer, label in values.items()]
        numbered = {str(label): answer for answer, label in pairs}
        if numbered.keys() != {str(label) for label in range(len(values))}:
            raise ValueError(f"must number the answers 0 to {len(values) - 1}, each once")
        values = [numbered[str(label)] for label in range(len(values))]
    if not isinstance(values, list) or not all(isinstance(answer, str) for answer in values):
        raise ValueError("must hold a list of answers, or an object of answers and their numbers")
    return values
