"""The downstream tasks by name. A new one needs a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from triptych.tasks.base import Task
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.entailment import Entailment, EntailmentConfig
from triptych.tasks.grounding import Grounding, GroundingConfig
from triptych.tasks.image_classification import ImageClassification, ImageClassificationConfig
from triptych.tasks.nlvr2 import Nlvr2, Nlvr2Config
from triptych.tasks.self_critical import SelfCritical, SelfCriticalConfig
from triptych.tasks.text_classification import TextClassification, TextClassificationConfig
from triptych.tasks.vqa import VisualQuestionAnswering, VqaConfig

TaskConfig = (
    CaptioningConfig
    | EntailmentConfig
    | GroundingConfig
    | ImageClassificationConfig
    | Nlvr2Config
    | SelfCriticalConfig
    | TextClassificationConfig
    | VqaConfig
)

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        task.name: task
        for task in (
            Captioning,
            Entailment,
            Grounding,
            ImageClassification,
            Nlvr2,
            TextClassification,
            VisualQuestionAnswering,
        )
    }
)


def task_for(config: Any) -> type[Task]:
    """The task that a configuration is for; one that only trains differently (self-critical captions) included."""
    kinds: tuple[type[Task], ...] = (*TASKS.values(), SelfCritical)
    return next(task for task in kinds if task.config_type is type(config))
