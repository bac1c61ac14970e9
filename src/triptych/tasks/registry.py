"""The downstream tasks by name. A new one needs a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from triptych.tasks.base import Task
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.entailment import Entailment, EntailmentConfig
from triptych.tasks.vqa import VisualQuestionAnswering, VqaConfig

TaskConfig = CaptioningConfig | EntailmentConfig | VqaConfig

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {task.name: task for task in (Captioning, Entailment, VisualQuestionAnswering)}
)


def task_for(config: TaskConfig) -> type[Task]:
    """The task that a configuration is for."""
    return next(task for task in TASKS.values() if task.config_type is type(config))
