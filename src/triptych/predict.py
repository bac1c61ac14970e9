"""Using a saved model on pictures and on data sets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import torch

from triptych.checkpoints.configs import from_json
from triptych.checkpoints.folder import load
from triptych.checkpoints.reading import Tensors
from triptych.data.pictures import alike, file_record, read_pictures, show, stack
from triptych.data.samples import BrokenSample
from triptych.data.sources import Source, open_source
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import FrameChoice, FrameDecoder, FrameRule, Preprocessing, Transform
from triptych.generation import BeamSearch
from triptych.models.protocol import VisionLanguageModel
from triptych.progress import counted, progress
from triptych.tasks.base import ItemTask, Report, Task, at_most
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.registry import TASKS
from triptych.tasks.retrieval import RetrievalConfig, encode_collection, evaluate_retrieval, pairs_to_match
from triptych.training.parallel import Precision, autocast, compile_inference

_BATCH = 32

logger = logging.getLogger(__name__)


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
        frame_decoder: FrameDecoder | None = None,
        answers: Sequence[str] | None = None,
    ) -> Self:
        """Load a checkpoint folder or Hub id, on a GPU where there is one.

        Args:
            precision: of the arithmetic.
            beams: width of the caption search; by default the checkpoint's.
            candidates: of retrieval, re-ranked by matching; by default the checkpoint's.
            frames, frame_rule, frame_decoder: seen of a video; by default as the checkpoint says.
            answers: of a model for questions: choose every answer among these.
            compile: see :func:`triptych.training.parallel.compile_inference`.

        Raises:
            ValueError: it has no tokenizer or preprocessing, or is only a part of a model; or ``answers`` do not help.
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
        if answers is not None:
            settings = task.get("vqa", {})
            if "vqa" not in task or not answers or settings.get("answering") == "classify":
                reason = "the list is empty" if settings else f"{checkpoint} was not trained for vqa"
                reason = "the checkpoint classifies, by answers of its own" if answers and settings else reason
                raise ValueError(f"answers to choose among: {reason}")
            task["vqa"] = {**task["vqa"], "answering": "rank", "answers": list(answers)}
        preprocessing = loaded.preprocessing
        trained = preprocessing.frames
        count = trained.count if frames is None else frames
        seen = FrameChoice(count, frame_rule or trained.rule, frame_decoder or trained.decoder)
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
        """Captions of picture and video files, a batch at a time; files that cannot be read are skipped and logged."""
        task = self.captioner()
        transform, frames = self.preprocessing.test_transform(), self.preprocessing.frames
        for some in alike(paths, at_once=_BATCH):
            tried = [(path, _shown(path, transform, frames)) for path in some]
            shown = [(path, pixels) for path, pixels in tried if pixels is not None]
            if not shown:
                continue
            with autocast(self.device, self.precision):
                captions = task.caption(stack([pixels for _, pixels in shown]).to(self.device))
            yield from zip((path for path, _ in shown), captions, strict=True)

    def evaluate(
        self,
        task: str,
        data: Sequence[str],
        image_root: str | None = None,
        splits: Sequence[str] | None = None,
        *,
        limit: int = 0,
        blank: bool = False,
        fold: int = 0,
    ) -> Report:
        """Scores and predictions of a task on a data set.

        Args:
            task: ``retrieval``, or a name of :data:`triptych.tasks.registry.TASKS`.
            limit: so many pictures; 0 for all.
            blank: show grey pictures instead.
            fold: of retrieval: recalls are means over parts of so many pictures (COCO's "1k": 1000); 0 for the whole.

        Raises:
            ValueError: the checkpoint was not trained for this task.
        """
        source = open_source(tuple(data), image_root=image_root, splits=splits)
        with autocast(self.device, self.precision):
            if task != "retrieval":
                return self.task(task).evaluate(source, limit=limit, blank=blank)
            self.check(task)
            return self._retrieve(source, limit, blank, fold)

    def _retrieve(self, source: Source, limit: int, blank: bool, fold: int) -> Report:
        """Recalls of the whole data set, or their means over folds."""
        if fold < 0:
            raise ValueError(f"fold must not be negative: {fold}")
        batch = _BATCH if fold == 0 else max(size for size in range(1, _BATCH + 1) if fold % size == 0)
        pictures = counted(
            read_pictures(source, self.preprocessing, batch, limit),
            "encoding images",
            at_most(source.size, limit),
            lambda batch: len(batch[0]),
        )
        found: list[dict[str, float]] = []
        while first := next(pictures, None):
            part = chain([first], pictures if fold == 0 else islice(pictures, fold // batch - 1))
            collection = encode_collection(
                self.model, self.tokenizer, self.preprocessing, part, self.retrieval, blank=blank
            )
            if found and len(collection.records) < fold:
                logger.warning("left out the last %d pictures, less than a fold", len(collection.records))
                break
            with progress("matching", pairs_to_match(collection, self.retrieval), unit="pairs") as advance:
                found.append(evaluate_retrieval(self.model, collection, self.retrieval, advance).scores)
        if not found:
            raise ValueError("retrieval needs at least one picture with a caption")
        return Report({name: sum(scores[name] for scores in found) / len(found) for name in found[0]})

    def task(self, name: str) -> Task:
        """The model set up for a task as its checkpoint says, with the task's own head.

        Raises:
            ValueError: the checkpoint was not trained for this task.
        """
        self.check(name)
        if name == Captioning.name:
            return self.captioner()
        kind = TASKS[name]
        config = from_json(kind.config_type, self.settings[name], f"task.{name}")
        task = kind(self.model, self.tokenizer, self.preprocessing, config)
        task.load_own_state(dict(self.head))
        return task.to(self.device).eval()

    def item_task(self, name: str) -> ItemTask[Any, Any]:
        """:meth:`task`, of those that ask things of pictures."""
        task = self.task(name)
        if not isinstance(task, ItemTask):
            raise ValueError(f"{name} asks nothing of pictures")
        return task

    def check(self, name: str) -> None:
        """Whether the checkpoint can do a task; one that says nothing, as a converted one, captions and retrieves.

        Raises:
            ValueError: it was not trained for it.
        """
        known = [task for task in ("retrieval", *TASKS) if task in self.settings]
        if name not in (known if self.settings else ("retrieval", Captioning.name)):
            raise ValueError(f"this checkpoint was not trained for {name}, only for: {', '.join(known) or 'nothing'}")

    def captioner(self) -> Captioning:
        """The model as a captioner of pixels, set up as the checkpoint says."""
        return Captioning(self.model, self.tokenizer, self.preprocessing, self.captioning).eval()


def _shown(path: Path, transform: Transform, frames: FrameChoice) -> torch.Tensor | None:
    """Pixels of a file; None, and a line in the log, if it cannot be read."""
    try:
        return show(file_record(path), transform, frames)
    except BrokenSample as error:
        logger.warning("skipped %s", error)
        return None
