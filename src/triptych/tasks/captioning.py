"""Image captioning: fine-tuning, generation and evaluation.

Source: mPLUG section 4; X-PLUG/mPLUG ``caption_mplug.py``, ``models/model_caption_mplug.py``.

Shape legend: B batch, F frames, C channels, H height, W width, L tokens, D width, V vocabulary, X real target tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch
from triptych.data.pictures import read_pictures
from triptych.data.pipelines import ImageTextPipeline
from triptych.data.samples import Record
from triptych.data.sources import Source
from triptych.data.transforms import Transform
from triptych.generation import BeamSearch, Hypothesis, Sampling, SpecialIds, generate
from triptych.metrics.captions import score_captions
from triptych.models.protocol import Encoded, Part
from triptych.objectives.distributed import mean_over_all
from triptych.progress import counted
from triptych.tasks.base import Pipeline, Report, Task, at_most

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptioningConfig:
    """How captions are trained and generated.

    Attributes:
        context: what the decoder attends to: the encoded ``image`` alone (mPLUG's fine-tuning,
            model_caption_mplug.py:41-48), or image and prompt ``fused`` (a pre-trained model's PrefixLM, zero-shot).
        prompt: first words, not counted as generated (official: none; paper, zero-shot: "a picture of").
        search: the released settings are beam 5, 8 to 25 tokens; the paper's are beam 10, at most 20.
        label_smoothing: for small data sets; 0 officially.
    """

    context: Literal["image", "fused"] = "image"
    prompt: str = ""
    search: BeamSearch | Sampling = field(default_factory=lambda: BeamSearch(5, 8, 25))
    label_smoothing: float = 0.0

    @property
    def start(self) -> str:
        """What the decoder's text begins with. A fused context holds the prompt already, as PrefixLM's its prefix."""
        return self.prompt if self.context == "image" else ""


class Captioning(Task):
    """A model that captions pictures; call it with a batch for its loss, or :meth:`caption` pixels.

    Batches carry ``[CLS] start caption [SEP]`` in ``text`` (see :attr:`CaptioningConfig.start`).
    """

    name: ClassVar[str] = "caption"
    metric: ClassVar[str] = "CIDEr"
    config_type: ClassVar[type[Any]] = CaptioningConfig
    config: CaptioningConfig

    def build(self) -> None:
        if self.model.decoder is None:
            raise ValueError(f"captioning needs a model with a decoder; this {self.model.model_type} has none")
        self.special = SpecialIds(self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id)

    @property
    def uses(self) -> tuple[Part, ...]:
        return ("image", "decoder") if self.config.context == "image" else ("image", "text", "fusion", "decoder")

    def training_pipeline(self, transform: Transform, max_words: int, max_tokens: int) -> Pipeline:
        return ImageTextPipeline(
            self.tokenizer,
            transform,
            max_words,
            max_tokens,
            end=True,
            prompt=self.config.start,
            cleaning="lower",
            frames=self.preprocessing.frames,
        )

    def evaluate(self, source: Source, *, limit: int = 0, blank: bool = False) -> Report:
        pictures = counted(
            read_pictures(source, self.preprocessing, limit=limit),
            f"evaluating {self.name}",
            at_most(source.size, limit),
            lambda batch: len(batch[0]),
        )
        report = evaluate_captions(self, pictures, blank=blank)
        return Report(report.scores, report.results())

    def forward(self, batch: ImageTextBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Mean cross-entropy of the caption tokens."""
        assert self.model.decoder is not None
        memory = self._memory(self.preprocessing.normalize(batch.pixels_BCHW))
        hidden_BLD = self.model.decoder(batch.text.ids_BL[:, :-1], memory)
        next_BL = batch.text.mask_BL[:, 1:]
        logits_XV = self.model.decoder.logits(hidden_BLD[next_BL])
        loss_X = F.cross_entropy(
            logits_XV.float(),
            batch.text.ids_BL[:, 1:][next_BL],
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        return {"caption": mean_over_all(loss_X)}

    def hypotheses(self, pixels: Tensor) -> list[list[Hypothesis]]:
        """What the search finds for uint8 pixels, best first."""
        assert self.model.decoder is not None
        with torch.no_grad():
            memory = self._memory(self.preprocessing.normalize(pixels))
        start_BL = self._ids(self.config.start, pixels)
        return generate(self.model.decoder, memory, self.config.search, self.special, prompt_BL=start_BL)

    def caption(self, pixels: Tensor) -> list[str]:
        """One caption for each picture of uint8 pixels, without the prompt."""
        skip = self._ids(self.config.start, pixels).shape[1]
        return [self.tokenizer.decode(found[0].ids[skip:]) for found in self.hypotheses(pixels)]

    def _memory(self, pixels: Tensor) -> Encoded:
        image = self.model.encode_image(pixels)
        if self.config.context == "image":
            return self.model.image_states(image)
        prompt_BL = self._ids(self.config.prompt, pixels, end=self.model.ends_texts)
        return self.model.fuse(image, self.model.encode_text(prompt_BL)).states()

    def _ids(self, text: str, pixels: Tensor, *, end: bool = False) -> Tensor:
        """``[CLS] text`` for each picture, with the end token where an encoder is to read it so."""
        ids_1L, _ = self.tokenizer.encode_batch([text], max_length=None, end=end)
        return ids_1L.to(pixels.device).expand(len(pixels), -1)


@dataclass(frozen=True)
class CaptionReport:
    """Scores, and what was generated for each picture."""

    scores: dict[str, float]
    predictions: dict[str, str]
    references: dict[str, tuple[str, ...]]

    def results(self) -> list[dict[str, Any]]:
        """The COCO result format, in which ids that are numbers are written as numbers."""
        return [
            {"image_id": int(image) if image == str(_number(image)) else image, "caption": text}
            for image, text in self.predictions.items()
        ]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def evaluate_captions(
    task: Captioning,
    batches: Iterable[tuple[Sequence[Record], Tensor]],
    *,
    blank: bool = False,
) -> CaptionReport:
    """Caption every picture once and score against all its references.

    Where records name their ``domain`` (NoCaps), ``CIDEr/in-domain`` and so on are of the pictures of one domain, with
    the document frequencies of these alone, as when a file of each is scored. Pictures without references are captioned
    and not scored: all of them, as in NoCaps' published files, or some, which a warning counts.

    Args:
        batches: records and their uint8 pixels.
        blank: show the model a grey picture instead, to see what it says without looking.
    """
    device = next(task.parameters()).device
    predictions: dict[str, str] = {}
    references: dict[str, tuple[str, ...]] = {}
    domains: dict[str, str] = {}
    for records, pixels in batches:
        pixels = torch.full_like(pixels, 128) if blank else pixels
        captions = task.caption(pixels.to(device))
        for record, caption in zip(records, captions, strict=True):
            predictions[record.image_id] = caption
            # A list may have one record a caption: all of them are references of the picture.
            references[record.image_id] = (*references.get(record.image_id, ()), *record.captions)
            if record.extra.get("domain"):
                domains[record.image_id] = str(record.extra["domain"])
    return CaptionReport(_scores(references, predictions, domains), predictions, references)


def _scores(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str], domains: Mapping[str, str]
) -> dict[str, float]:
    """All scores of all pictures that have references, and CIDEr of each domain."""
    known = {image: captions for image, captions in references.items() if captions}
    if predictions and not known:
        return {}
    if left_out := len(predictions) - len(known):
        logger.warning("%d of %d pictures have no captions: not in the scores", left_out, len(predictions))
    scores = score_captions(known, {image: predictions[image] for image in known})
    for domain in sorted({domains[image] for image in known if image in domains}):
        own = {image: predictions[image] for image in known if domains.get(image) == domain}
        scores[f"CIDEr/{domain}"] = score_captions(known, own, allow_missing=True)["CIDEr"]
    return scores
