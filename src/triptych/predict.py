"""Using a saved model on pictures and on data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Self

import torch

from triptych.checkpoints.configs import from_json
from triptych.checkpoints.folder import load
from triptych.checkpoints.reading import Tensors
from triptych.data.official_video import VIDEO_SUFFIXES
from triptych.data.pictures import read_pictures, show, stack
from triptych.data.samples import Record
from triptych.data.sources import open_source
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import FrameChoice, FrameRule, Preprocessing
from triptych.generation import BeamSearch
from triptych.models.protocol import VisionLanguageModel
from triptych.tasks.base import Report, Task
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.registry import TASKS
from triptych.tasks.retrieval import RetrievalConfig, encode_collection, evaluate_retrieval
from triptych.tasks.vqa import VisualQuestionAnswering
from triptych.training.parallel import Precision, autocast, compile_inference

_BATCH = 32


@dataclass(frozen=True)
class Predictor:
    """A loaded checkpoint with everything that using it needs.

    Attributes:
        settings: of each task that the checkpoint was trained for, by its name.
        head: parameters of the task's own head.
    """

    model: VisionLanguageModel
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    captioning: CaptioningConfig
    retrieval: RetrievalConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)
    precision: Precision = "auto"

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        precision: Precision = "auto",
        beams: int | None = None,
        compile: bool = False,
        candidates: int | None = None,
        frames: int | None = None,
        frame_rule: FrameRule | None = None,
        answers: Sequence[str] = (),
    ) -> Self:
        """Load a checkpoint folder or Hub id, on a GPU where there is one.

        Args:
            precision: of the arithmetic.
            beams: width of the caption search; by default the checkpoint's.
            candidates: of retrieval, re-ranked by matching; by default the checkpoint's.
            frames, frame_rule: seen of a video; by default as the checkpoint says.
            answers: choose every answer to a question among these.
            compile: see :func:`triptych.training.parallel.compile_inference`.

        Raises:
            ValueError: it has no tokenizer or preprocessing, or is only a part of a model.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = load(checkpoint, device=device)
        if not isinstance(loaded.model, VisionLanguageModel):
            raise ValueError(f"{checkpoint} is a {loaded.model_type}, a part to start pre-training from, not a model")
        if loaded.tokenizer is None or loaded.preprocessing is None:
            raise ValueError(f"{checkpoint} has no tokenizer or preprocessing: convert it again with --vocab")
        task: dict[str, Any] = dict(loaded.task or {})
        captioning = from_json(CaptioningConfig, task.get("caption", {}), f"{checkpoint}: task.caption")
        retrieval = from_json(RetrievalConfig, task.get("retrieval", {}), f"{checkpoint}: task.retrieval")
        if beams is not None and isinstance(captioning.search, BeamSearch):
            captioning = replace(captioning, search=replace(captioning.search, beams=beams))
        if candidates is not None:
            retrieval = replace(retrieval, candidates=candidates)
        if answers:
            task["vqa"] = {**task.get("vqa", {}), "answering": "rank", "answers": list(answers)}
        preprocessing = loaded.preprocessing
        seen = FrameChoice(frames or preprocessing.frames.count, frame_rule or preprocessing.frames.rule)
        loaded.model.eval()
        if compile:
            compile_inference(loaded.model)
        return cls(
            loaded.model,
            loaded.tokenizer,
            replace(preprocessing, frames=seen),
            captioning,
            retrieval,
            task,
            loaded.task_state,
            precision,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def caption_files(self, paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
        """Captions of picture and video files, a batch at a time."""
        task = self.captioner()
        transform, frames = self.preprocessing.test_transform(), self.preprocessing.frames
        for some in _groups(paths):
            pixels = stack([show(_file(path), transform, frames) for path in some]).to(self.device)
            with autocast(self.device, self.precision):
                captions = task.caption(pixels)
            yield from zip(some, captions, strict=True)

    def answer_files(self, paths: Iterable[Path], questions: Sequence[str]) -> Iterator[tuple[Path, str, str]]:
        """(path, question, answer): all questions about each picture or video, a batch at a time."""
        task = self.task(VisualQuestionAnswering.name)
        assert isinstance(task, VisualQuestionAnswering)
        asked = {"questions": [{"question": question} for question in questions]}
        for some in _groups(paths):
            records = [_file(path, asked) for path in some]
            with autocast(self.device, self.precision):
                answers = iter(task.answer(records))
            yield from ((path, question, next(answers)) for path in some for question in questions)

    def evaluate(
        self,
        task: str,
        data: Sequence[str],
        image_root: str | None = None,
        splits: Sequence[str] | None = None,
        *,
        limit: int = 0,
        blank: bool = False,
    ) -> Report:
        """Scores and predictions of a task on a data set.

        Args:
            task: ``retrieval``, or a name of :data:`triptych.tasks.registry.TASKS`.
            limit: so many pictures; 0 for all.
            blank: show grey pictures instead.

        Raises:
            ValueError: the checkpoint was not trained for this task.
        """
        source = open_source(tuple(data), image_root=image_root, splits=splits)
        with autocast(self.device, self.precision):
            if task != "retrieval":
                return self.task(task).evaluate(source, limit=limit, blank=blank)
            pictures = read_pictures(source, self.preprocessing, _BATCH, limit)
            collection = encode_collection(
                self.model, self.tokenizer, self.preprocessing, pictures, self.retrieval, blank=blank
            )
            return Report(evaluate_retrieval(self.model, collection, self.retrieval).scores)

    def task(self, name: str) -> Task:
        """The model set up for a task as its checkpoint says, with the task's own head.

        Raises:
            ValueError: the checkpoint was not trained for this task.
        """
        if name == Captioning.name:
            return self.captioner()
        if name not in self.settings:
            known = ", ".join(["retrieval", *(task for task in TASKS if task in self.settings)])
            raise ValueError(f"this checkpoint was not trained for {name}, only for: {known}")
        kind = TASKS[name]
        config = from_json(kind.config_type, self.settings[name], f"task.{name}")
        task = kind(self.model, self.tokenizer, self.preprocessing, config)
        task.load_own_state(dict(self.head))
        return task.to(self.device).eval()

    def captioner(self) -> Captioning:
        """The model as a captioner of pixels, set up as the checkpoint says."""
        return Captioning(self.model, self.tokenizer, self.preprocessing, self.captioning).eval()


def _file(path: Path, extra: Mapping[str, Any] | None = None) -> Record:
    """A record of a picture file, or of a video."""
    if _is_video(path):
        return Record(str(path), None, (), str(path), {**(extra or {}), "video": str(path)})
    return Record(str(path), str(path), (), str(path), extra or {})


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _groups(paths: Iterable[Path], size: int = _BATCH) -> Iterator[tuple[Path, ...]]:
    """The paths in their order, so many at once, pictures and videos apart."""
    for _, alike in groupby(paths, _is_video):
        while some := tuple(islice(alike, size)):
            yield some
