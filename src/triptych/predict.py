"""Using a saved model on pictures and on data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch

from triptych.checkpoints.configs import from_json
from triptych.checkpoints.folder import load
from triptych.data.pictures import read_pictures
from triptych.data.samples import Record, decode_image
from triptych.data.sources import open_source
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import Preprocessing
from triptych.generation import BeamSearch
from triptych.models.protocol import VisionLanguageModel
from triptych.tasks.captioning import Captioning, CaptioningConfig, CaptionReport, evaluate_captions
from triptych.tasks.retrieval import RetrievalConfig, encode_collection, evaluate_retrieval
from triptych.training.parallel import Precision, autocast, compile_inference

_BATCH = 32


@dataclass(frozen=True)
class Predictor:
    """A loaded checkpoint with everything that using it needs."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    captioning: CaptioningConfig
    retrieval: RetrievalConfig
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
    ) -> Self:
        """Load a checkpoint folder or Hub id, on a GPU where there is one.

        Args:
            precision: of the arithmetic.
            beams: width of the caption search; by default the checkpoint's.
            candidates: of retrieval, re-ranked by matching; by default the checkpoint's.
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
        loaded.model.eval()
        if compile:
            compile_inference(loaded.model)
        return cls(loaded.model, loaded.tokenizer, loaded.preprocessing, captioning, retrieval, precision)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def caption_files(self, paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
        """Captions of picture files, a batch at a time."""
        task = self.captioner()
        transform = self.preprocessing.test_transform()
        for some in _groups(paths):
            pictures = [decode_image(Record(str(path), str(path), (), str(path))) for path in some]
            pixels_BCHW = torch.stack([transform(picture) for picture in pictures]).to(self.device)
            with autocast(self.device, self.precision):
                captions = task.caption(pixels_BCHW)
            yield from zip(some, captions, strict=True)

    def evaluate_captions(
        self,
        data: Sequence[str],
        image_root: str | None = None,
        splits: Sequence[str] | None = None,
        *,
        limit: int = 0,
        blank: bool = False,
    ) -> CaptionReport:
        """Caption a data set and score it; ``blank`` shows grey pictures instead."""
        source = open_source(tuple(data), image_root=image_root, splits=splits)
        pictures = read_pictures(source, self.preprocessing, _BATCH, limit)
        with autocast(self.device, self.precision):
            return evaluate_captions(self.captioner(), pictures, blank=blank)

    def evaluate_retrieval(
        self,
        data: Sequence[str],
        image_root: str | None = None,
        splits: Sequence[str] | None = None,
        *,
        limit: int = 0,
        blank: bool = False,
    ) -> dict[str, float]:
        """Recalls on a data set; ``blank`` shows grey pictures instead."""
        source = open_source(tuple(data), image_root=image_root, splits=splits)
        pictures = read_pictures(source, self.preprocessing, _BATCH, limit)
        with autocast(self.device, self.precision):
            collection = encode_collection(
                self.model, self.tokenizer, self.preprocessing, pictures, self.retrieval, blank=blank
            )
            return evaluate_retrieval(self.model, collection, self.retrieval).scores

    def captioner(self) -> Captioning:
        """The model as a captioner of pixels, set up as the checkpoint says."""
        return Captioning(self.model, self.tokenizer, self.preprocessing, self.captioning).eval()


def _groups(paths: Iterable[Path], size: int = _BATCH) -> Iterator[tuple[Path, ...]]:
    remaining = iter(paths)
    while some := tuple(islice(remaining, size)):
        yield some
