"""Image classification with a model's image encoder alone: CIFAR, ImageNet, or any pictures with labels.

Source: microsoft/BridgeTower ``run_cifar.py``: one linear layer on token 0 and cross-entropy.

Shape legend: B pictures (or clips), C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from triptych.data.samples import Record
from triptych.models.protocol import Encoded, Part
from triptych.objectives.classification import class_indices, classification_loss
from triptych.tasks.base import ItemBatch, ItemTask, Report, mean_credits, most_common
from triptych.tasks.unimodal import UnimodalConfig, UnimodalTask, class_of


@dataclass(frozen=True)
class ImageClassificationConfig(UnimodalConfig):
    """How pictures are classified.

    Attributes:
        per_class: give the accuracy of each class, too.
    """

    per_class: bool = False
    per_picture: ClassVar[int] = 1


@dataclass(frozen=True)
class LabelledImage:
    """What is asked of a picture; ``label`` indexes the classes, or is None where it is only predicted."""

    name: str
    label: int | None


@dataclass(frozen=True)
class ReadLabel:
    """The label of a record (see ``docs/tasks.md``)."""

    labels: tuple[str, ...]

    def __call__(self, record: Record) -> list[LabelledImage]:
        return [LabelledImage(record.image_id, class_of(record, self.labels))]


@dataclass(frozen=True)
class ImageLabelBatch(ItemBatch):
    """Pictures with the index of each one's class; one item a picture."""

    class_B: Tensor


class ImageClassification(UnimodalTask, ItemTask[LabelledImage, ImageLabelBatch]):
    """Names the class of pictures."""

    name: ClassVar[str] = "image_classification"
    metric: ClassVar[str] = "accuracy"
    config_type: ClassVar[type[Any]] = ImageClassificationConfig
    part: ClassVar[Part] = "image"
    config: ImageClassificationConfig

    def items(self) -> Callable[[Record], Sequence[LabelledImage]]:
        return ReadLabel(self.config.labels)

    def batch(
        self, pixels: Tensor, picture_Q: Tensor, items: Sequence[LabelledImage], *, max_tokens: int
    ) -> ImageLabelBatch:
        return ImageLabelBatch(pixels, picture_Q, class_indices(item.label for item in items))

    def commonest(self, seen: Sequence[LabelledImage]) -> Callable[[LabelledImage], Any]:
        label = most_common(item.label for item in seen)
        return lambda item: self.config.labels[label]

    def encode(self, batch: ImageLabelBatch) -> Encoded:
        return self.model.image_states(self.model.encode_image(self.preprocessing.normalize(batch.pixels)))

    def forward(self, batch: ImageLabelBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Mean cross-entropy of the labels."""
        return {self.name: classification_loss(self.logits(batch), batch.class_B)}

    @torch.no_grad()
    def predict(self, batch: ImageLabelBatch) -> list[str]:
        """A label for each picture."""
        return [self.config.labels[index] for index in self.logits(batch).argmax(1).tolist()]

    def report(self, items: Sequence[LabelledImage], predictions: Sequence[Any]) -> Report:
        """Accuracy in percent, of all and, with ``per_class``, of the pictures of each class."""
        results = [{"image_id": item.name, "label": label} for item, label in zip(items, predictions, strict=True)]
        judged: list[tuple[str | None, float]] = []
        for item, label in zip(items, predictions, strict=True):
            if item.label is not None:
                expected = self.config.labels[item.label]
                judged.append((f"accuracy/{expected}" if self.config.per_class else None, float(label == expected)))
        return Report(mean_credits(judged, "accuracy"), results, [credit for _, credit in judged])
