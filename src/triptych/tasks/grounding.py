"""Visual grounding: the box of what a phrase refers to, written as coordinate tokens or regressed.

Source: mPLUG section 5.2.4; X-PLUG/mPLUG ``models/model_grounding_mplug.py``, ``grounding_mplug.py``. Regression, for
networks without a decoder: djiajunustc/TransVG ``models/trans_vg.py``, ``utils/loss_utils.py``.

Shape legend: B pictures, Q phrases, K coordinates, L tokens, D width of states, P pooled width, C channels, H height,
W width. Boxes are of 4 numbers: cxcywh, normalised on the canvas, where the network sees them; xyxy in pixels of the
picture where people do (see :mod:`triptych.data.boxes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.batches import Tokens
from triptych.data.boxes import (
    BINS,
    Box,
    EvaluationTransform,
    Extent,
    Grounded,
    TrainingTransform,
    bins_to_boxes,
    boxes_to_bins,
    record_expressions,
    to_picture,
)
from triptych.data.loader import seeded
from triptych.data.samples import BrokenSample, Record, decode_image
from triptych.data.sources import Source
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import Preprocessing, Transform
from triptych.metrics.boxes import convert_boxes, paired_giou, paired_iou
from triptych.models.heads import BoxHead
from triptych.models.layers import Memory, init_weights
from triptych.models.protocol import Encoded, Part
from triptych.models.text import TextDecoder
from triptych.objectives.distributed import mean_over_all
from triptych.tasks.base import ItemBatch, ItemTask, Report, Shown, draw, gather, mean_credits

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
L1_WEIGHT = 5.0
GIOU_WEIGHT = 2.0
"""DETR's weights of the two losses of regression (Carion et al. 2020, appendix; facebookresearch/detr ``main.py``);
TransVG's code, ``engine.py``, adds the two as they are."""

Locating = Literal["tokens", "regression"]
Weighting = Literal["own", "official", "none"]
GroundingTransform = Callable[[Image.Image, Tensor, Sequence[str]], Grounded]

_THRESHOLD = 0.5
_PLACED = 2000
_START = "[unused339]"
_COORDINATE = "[unused{}]"
_FIRST = 340


@dataclass(frozen=True)
class GroundingConfig:
    """How phrases are located.

    Attributes:
        locating: ``tokens``: the decoder writes cx, cy, w and h as coordinate tokens (mPLUG). ``regression``: a small
            network on the fused state gives the four numbers (TransVG), for networks without a decoder.
        bins: tokens stand for 0/bins, 1/bins ... bins/bins of the canvas; no more than its pixels make sense.
        weighting: of each token's cross-entropy. ``own``: by how far off its most probable coordinate is, and by 1 -
            GIoU of the box that the four give. ``official``: by the mean of these weights over the batch, which is what
            the released code computes. ``none``: all alike.
        per_picture: phrases of a picture in one step; it is augmented and encoded once for them. 0 takes all.
        augment: the augmentation of mPLUG and TransVG; off, training sees pictures as evaluation does.
        official_augmentation: with the faults of theirs (:class:`triptych.data.boxes.TrainingTransform`).
        official_normalisation: evaluate with ImageNet's mean and standard deviation, whatever the model was trained
            with, as the released code does.
    """

    locating: Locating = "tokens"
    bins: int = BINS
    weighting: Weighting = "own"
    per_picture: int = 1
    augment: bool = True
    official_augmentation: bool = False
    official_normalisation: bool = False

    def __post_init__(self) -> None:
        if self.locating not in get_args(Locating):
            raise ValueError(f"locating must be one of {', '.join(get_args(Locating))}, not {self.locating!r}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, not {self.weighting!r}")
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, not {self.bins}")
        if self.official_augmentation and not self.augment:
            raise ValueError("official_augmentation needs augment")


@dataclass(frozen=True)
class Place:
    """Where on its canvas a picture of ``width`` x ``height`` pixels is."""

    extent: Extent
    width: int
    height: int


@dataclass(frozen=True)
class Phrase:
    """One phrase as the model reads it.

    Attributes:
        image: id of the picture.
        box_xyxy: what it refers to, in pixels of the picture; None where it is not known.
        names: what the source calls the phrase by.
        split: of the data set, where the record says it.
        target: the box on the canvas, cxcywh, normalised.
        place: of the picture, once it is on its canvas.
    """

    image: str
    text: str
    box_xyxy: Box | None = None
    names: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    target: Box | None = None
    place: Place | None = None


def read_phrases(record: Record) -> list[Phrase]:
    """The phrases of a record (see ``docs/tasks.md``).

    Raises:
        BrokenSample: as :func:`triptych.data.boxes.record_expressions`.
    """
    split = record.extra.get("split")
    name = None if split is None else str(split)
    return [Phrase(record.image_id, own.text, own.box_xyxy, own.names, name) for own in record_expressions(record)]


@dataclass(frozen=True)
class GroundingPipeline:
    """Pictures with some of their phrases, put on the canvas together; a phrase without a box only in evaluation.

    Args:
        items: what a record's phrases are.
        per_picture: so many phrases are drawn each time; 0 takes all.
    """

    items: Callable[[Record], Sequence[Phrase]]
    transform: GroundingTransform
    batch: Callable[[Tensor, Tensor, Sequence[Phrase]], Any]
    per_picture: int = 0

    def prepare(self, record: Record, seed: int) -> Shown[Phrase]:
        """Decode, draw phrases, and transform picture, boxes and phrases."""
        image = decode_image(record)
        items = list(self.items(record))
        with seeded(seed):
            items = draw(items, self.per_picture)
            known = [(item.text, item.box_xyxy) for item in items if item.box_xyxy is not None]
            boxes_N4 = torch.tensor([box for _, box in known]).view(-1, 4)
            try:
                grounded = self.transform(image, boxes_N4, [text for text, _ in known])
            except ValueError as error:
                raise BrokenSample(record.key, str(error)) from error
        return Shown(grounded.pixels_CHW, _placed(items, image, grounded))

    def collate(self, examples: list[Shown[Phrase]]) -> Any:
        """One batch."""
        return self.batch(*gather(examples))


def _placed(items: Sequence[Phrase], image: Image.Image, grounded: Grounded) -> tuple[Phrase, ...]:
    """The phrases after the transform, which saw those with a box; boxes are cut at the edges of the picture."""
    place = Place(grounded.extent, image.width, image.height)
    moved = iter(zip(grounded.phrases, grounded.boxes_N4.tolist(), strict=True))
    placed = []
    for item in items:
        if item.box_xyxy is None:
            placed.append(replace(item, place=place))
            continue
        text, target = next(moved)
        left, top, right, bottom = item.box_xyxy
        box = (max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height))
        placed.append(replace(item, text=text, box_xyxy=box, target=tuple(target), place=place))
    return tuple(placed)


def _learnable(record: Record) -> list[Phrase]:
    """Phrases with a box, for training."""
    phrases = [phrase for phrase in read_phrases(record) if phrase.box_xyxy is not None]
    if not phrases:
        raise BrokenSample(record.key, "none of its phrases has a box")
    return phrases


@dataclass(frozen=True)
class GroundingBatch(ItemBatch):
    """Pictures on their canvases, and phrases.

    Attributes:
        phrase: ``[CLS] phrase [SEP]`` (official here, unlike in other tasks).
        box_Q4: cxcywh, normalised on the canvas; NaN where it is not known.
        places: of each phrase's picture.
    """

    phrase: Tokens
    box_Q4: Tensor
    places: tuple[Place, ...]


class CoordinateWords(nn.Module):
    """What a decoder reads and writes in place of words: the K coordinates, and last a start token.

    As in mPLUG the table is input and, tied, output; mPLUG takes rows of BERT's vocabulary, ``[unused339]`` for the
    start and ``[unused340]`` and on for the coordinates, and gives all other words no chance. Where the vocabulary has
    these, the table begins as a copy of them, and computes the same.
    """

    def __init__(self, bins: int, decoder: TextDecoder, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.start = bins + 1
        self.word = nn.Embedding(bins + 2, decoder.config.width)
        self.bias = nn.Parameter(torch.zeros(bins + 1))
        init_weights(self, decoder.config.width)
        official = [*(_COORDINATE.format(_FIRST + number) for number in range(bins + 1)), _START]
        found = [tokenizer.backend.token_to_id(token) for token in official]
        ids = [index for index in found if index is not None]
        if len(ids) == len(official):
            with torch.no_grad():
                self.word.weight.copy_(decoder.embeddings.word.weight[ids])
                self.bias.copy_(decoder.head.bias[ids[:-1]])

    def logits(self, decoder: TextDecoder, memory: Encoded | Sequence[Memory], written_QL: Tensor) -> Tensor:
        """``[Q, L + 1, K]``: of the coordinate after the start, and after each of those written."""
        start_Q1 = written_QL.new_full((len(written_QL), 1), self.start)
        hidden_QLD = decoder(torch.cat([start_Q1, written_QL], 1), memory, word_VD=self.word.weight)
        return decoder.head(hidden_QLD, self.word.weight[: self.start], self.bias).float()


class Grounding(ItemTask[Phrase, GroundingBatch]):
    """Locates phrases in pictures; :meth:`answer` gives boxes in pixels of each picture."""

    name: ClassVar[str] = "grounding"
    metric: ClassVar[str] = "accuracy"
    config_type: ClassVar[type[Any]] = GroundingConfig
    config: GroundingConfig

    def build(self) -> None:
        if self.config.locating == "regression":
            self.head = BoxHead(self.model.pooled_width)
        elif self.model.decoder is None:
            raise ValueError(f"this {self.model.model_type} has no decoder: locate with locating='regression'")
        else:
            self.coordinates = CoordinateWords(self.config.bins, self.model.decoder, self.tokenizer)

    @property
    def uses(self) -> tuple[Part, ...]:
        shared: tuple[Part, ...] = ("image", "text", "fusion")
        return (*shared, "pooled" if self.config.locating == "regression" else "decoder")

    def freeze_rest(self) -> None:
        super().freeze_rest()
        if self.config.locating == "tokens":  # coordinates take the place of the decoder's words
            self._decoder.embeddings.word.requires_grad_(False)
            self._decoder.head.bias.requires_grad_(False)

    def items(self) -> Callable[[Record], Sequence[Phrase]]:
        return read_phrases

    def training_pipeline(self, transform: Transform, max_words: int, max_tokens: int) -> GroundingPipeline:
        """Grounding has its own transforms, which move the boxes with the picture: the one given is not used."""
        own: GroundingTransform = EvaluationTransform(self.preprocessing)
        if self.config.augment:
            own = TrainingTransform(self.preprocessing, official=self.config.official_augmentation)
        batch = partial(self.batch, max_tokens=max_tokens)
        return GroundingPipeline(_learnable, own, batch, self.config.per_picture)

    def batch(self, pixels: Tensor, picture_Q: Tensor, items: Sequence[Phrase], *, max_tokens: int) -> GroundingBatch:
        tokens = self.tokenizer.encode_batch([item.text for item in items], max_length=max_tokens, end=True)
        unknown = (float("nan"),) * 4
        box_Q4 = torch.tensor([unknown if item.target is None else item.target for item in items])
        places = tuple(item.place for item in items if item.place is not None)
        assert len(places) == len(items), "phrases are placed by the pipeline"
        return GroundingBatch(pixels, picture_Q, Tokens(*tokens), box_Q4, places)

    def forward(self, batch: GroundingBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        """Tokens: mean of the weighted cross-entropies (:attr:`GroundingConfig.weighting`).

        Regression: :data:`L1_WEIGHT` times the summed distance of the four numbers, and :data:`GIOU_WEIGHT` times
        1 - GIoU, both averaged over phrases.
        """
        if self.config.locating == "regression":
            predicted_Q4 = self.head(self.pool(batch, batch.phrase))
            distance_Q = (predicted_Q4 - batch.box_Q4).abs().sum(1)
            return {
                "l1": L1_WEIGHT * mean_over_all(distance_Q),
                "giou": GIOU_WEIGHT * mean_over_all(_far_apart(predicted_Q4, batch.box_Q4)),
            }
        true_Q4 = boxes_to_bins(batch.box_Q4, self.config.bins)
        states = self.fuse(batch, batch.phrase).states()
        logits_Q4K = self.coordinates.logits(self._decoder, states, true_Q4[:, :3])
        loss_Q4 = F.cross_entropy(logits_Q4K.transpose(1, 2), true_Q4, reduction="none")
        return {"grounding": mean_over_all(loss_Q4 * self._weights(logits_Q4K, batch.box_Q4))}

    @torch.no_grad()
    def _weights(self, logits_Q4K: Tensor, box_Q4: Tensor) -> Tensor:
        """What each token's loss counts. The most probable coordinates are those under the true earlier ones."""
        if self.config.weighting == "none":
            return torch.ones_like(box_Q4)
        predicted_Q4 = bins_to_boxes(logits_Q4K.argmax(-1), self.config.bins)
        distance_Q4 = (predicted_Q4 - box_Q4).abs().clamp(0, 5)
        weight_Q4 = distance_Q4 * _far_apart(predicted_Q4, box_Q4)[:, None]
        if self.config.weighting == "official":  # there [Q, 1, 4] meets [Q, 4]: all losses meet all weights
            return weight_Q4.mean(0, keepdim=True).expand_as(weight_Q4)
        return weight_Q4

    @torch.no_grad()
    def predict(self, batch: GroundingBatch) -> list[Box]:
        """A box for each phrase, xyxy in pixels of its picture."""
        if self.config.locating == "regression":
            box_Q4 = self.head(self.pool(batch, batch.phrase, self._seen))
        else:
            box_Q4 = self._write(self.fuse(batch, batch.phrase, self._seen).states())
        return [self._in_picture(box_4, place) for box_4, place in zip(box_Q4.cpu(), batch.places, strict=True)]

    def _in_picture(self, box_4: Tensor, place: Place) -> Box:
        canvas = self.preprocessing.image_size
        pixels_14 = to_picture(box_4[None].double(), place.extent, canvas, place.width, place.height)
        left, top, right, bottom = pixels_14[0].tolist()
        return left, top, right, bottom

    def _write(self, states: Encoded) -> Tensor:
        """The boxes ``[Q, 4]`` that greedy decoding writes."""
        memory = self._decoder.remember(states)
        written_QL = torch.empty(len(states), 0, dtype=torch.long, device=states.hidden_BLD.device)
        for _ in range(4):
            logits_QLK = self.coordinates.logits(self._decoder, memory, written_QL)
            written_QL = torch.cat([written_QL, logits_QLK[:, -1:].argmax(-1)], 1)
        return bins_to_boxes(written_QL, self.config.bins)

    def report(self, items: Sequence[Phrase], predictions: Sequence[Any]) -> Report:
        """Percentage of boxes whose IoU with the true one is at least 0.5, of all and by split; and the mean IoU.

        Boxes are compared in the picture (official: on the canvas, where a prediction may lie in the padding).
        """
        results = [
            {"image": item.image, "phrase": item.text, **item.names, "box_xyxy": [round(number, 2) for number in box]}
            for item, box in zip(items, predictions, strict=True)
        ]
        known = [(item, box) for item, box in zip(items, predictions, strict=True) if item.box_xyxy is not None]
        if not known:
            return Report({}, results)
        predicted_N4 = torch.tensor([box for _, box in known], dtype=torch.float64)
        true_N4 = torch.tensor([item.box_xyxy for item, _ in known], dtype=torch.float64)
        overlaps = paired_iou(predicted_N4, true_N4).tolist()
        credits = [float(overlap >= _THRESHOLD) for overlap in overlaps]
        judged = [(item.split, credit) for (item, _), credit in zip(known, credits, strict=True)]
        mean = {"mean_iou": round(100 * sum(overlaps) / len(overlaps), 4)}
        return Report(mean_credits(judged, "accuracy") | mean, results, credits)

    def known_items(self, source: Source) -> list[Phrase]:
        """Of the first pictures alone: boxes are placed on the canvas, for which a picture's size must be known."""
        return self.read_items(source, limit=_PLACED)

    def commonest(self, seen: Sequence[Phrase]) -> Callable[[Phrase], Box]:
        """The mean box on the canvas, at its place in each picture."""
        boxes = [item.target for item in seen if item.target is not None]
        if not boxes:
            raise ValueError("the training data have no boxes: there is no mean one")
        mean_4 = torch.tensor(boxes).mean(0)

        def guess(item: Phrase) -> Box:
            assert item.place is not None, "phrases are placed by the pipeline"
            return self._in_picture(mean_4, item.place)

        return guess

    @property
    def _decoder(self) -> TextDecoder:
        assert self.model.decoder is not None
        return self.model.decoder

    @property
    def _seen(self) -> Preprocessing:
        """How evaluation sees pictures."""
        if self.config.official_normalisation:
            return replace(self.preprocessing, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return self.preprocessing

    def _evaluation_pipeline(self) -> GroundingPipeline:
        batch = partial(self.batch, max_tokens=self.model.max_text)
        return GroundingPipeline(self.items(), EvaluationTransform(self._seen), batch)


def _far_apart(boxes_Q4: Tensor, others_Q4: Tensor) -> Tensor:
    """1 - GIoU of the boxes in the same row, both cxcywh."""
    return 1 - paired_giou(convert_boxes(boxes_Q4, "cxcywh", "xyxy"), convert_boxes(others_Q4, "cxcywh", "xyxy"))
