"""Which expert of a mixture works for which modality, as in the figure 6 of EVE's paper: for ``triptych experts``.

Shape legend: B pairs, L text tokens, E experts, M modalities (0 image, 1 text).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from triptych.data.pictures import read_pictures
from triptych.data.samples import Record, clean_caption
from triptych.data.sources import Source
from triptych.models.moe import Routing, SoftMoE, record_routing
from triptych.models.protocol import Encoded
from triptych.predict import Predictor
from triptych.progress import counted
from triptych.report import ticks
from triptych.tasks.base import at_most
from triptych.training.parallel import autocast

Passage = Literal["fused", "alone"]
"""Pictures and texts together, or either by itself."""

_PICTURES, _PAIRS = 32, 64


@dataclass(frozen=True)
class LayerLoad:
    """How the tokens of many passes were spread over the experts of one layer; padding is not among them.

    Attributes:
        layer: the name of the layer in the network.
        image_E, text_E: share of the modality's choices (K a token) that fell on each expert; of each modality they add
            up to 1, or to 0 where it has no token.
        image_tokens, text_tokens: how many there were.
    """

    layer: str
    passage: Passage
    image_E: tuple[float, ...]
    text_E: tuple[float, ...]
    image_tokens: int
    text_tokens: int

    @property
    def name(self) -> str:
        """For people: blocks are counted from 1."""
        number = re.search(r"blocks\.(\d+)", self.layer)
        return f"{self.layer if number is None else f'block {int(number[1]) + 1}'}, {self.passage}"

    @property
    def overlap(self) -> float:
        """1 where both modalities are spread alike, 0 where no expert serves both."""
        return sum(map(min, self.image_E, self.text_E))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layer": self.layer,
            "passage": self.passage,
            "tokens": {"image": self.image_tokens, "text": self.text_tokens},
            "image": list(self.image_E),
            "text": list(self.text_E),
            "overlap": self.overlap,
        }


@dataclass(frozen=True)
class ExpertLoad:
    """What :func:`expert_load` found: every layer of every passage, lowest first."""

    pictures: int
    pairs: int
    layers: tuple[LayerLoad, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"pictures": self.pictures, "pairs": self.pairs, "layers": [layer.to_dict() for layer in self.layers]}


class _Counts:
    """Choices and tokens by layer, over all passes of a passage."""

    def __init__(self) -> None:
        self.chosen_ME: dict[str, Tensor] = {}
        self.tokens_M: dict[str, Tensor] = {}

    def add(self, routings: Mapping[str, Sequence[Routing]]) -> None:
        for layer, calls in routings.items():
            for call in calls:
                chosen_ME, tokens_M = call.chosen_ME.double().cpu(), call.first_ME.double().sum(1).cpu()
                self.chosen_ME[layer] = self.chosen_ME.get(layer, 0) + chosen_ME
                self.tokens_M[layer] = self.tokens_M.get(layer, 0) + tokens_M

    def loads(self, passage: Passage) -> Iterator[LayerLoad]:
        for layer, chosen_ME in self.chosen_ME.items():
            image_E, text_E = (chosen_ME / chosen_ME.sum(1, keepdim=True).clamp(min=1)).tolist()
            image, text = map(round, self.tokens_M[layer].tolist())
            yield LayerLoad(layer, passage, tuple(image_E), tuple(text_E), image, text)


@torch.no_grad()
def expert_load(predictor: Predictor, source: Source, *, limit: int = 0, alone: bool = False) -> ExpertLoad:
    """Run pictures with each of their captions through a network, and count who works for whom.

    Texts are cut as for retrieval, which the paper's figure is of.

    Args:
        limit: pictures; 0 for all.
        alone: also count passes of pictures by themselves and of texts by themselves.

    Raises:
        ValueError: the network has no soft router, or the data no picture with a caption.
    """
    model = predictor.model
    if not any(isinstance(module, SoftMoE) for module in model.modules()):
        raise ValueError(
            f"this {model.model_type} has no soft router, so no experts that tokens are spread over: "
            "give a checkpoint of an EVE with deep='soft'"
        )
    fused, single = _Counts(), _Counts()
    pictures = pairs = 0
    batches = counted(
        read_pictures(source, predictor.preprocessing, _PICTURES, limit),
        "counting",
        at_most(source.size, limit),
        lambda batch: len(batch[0]),
    )
    for records, pixels in batches:
        owner_B, texts = _pairs(predictor, records)
        if not texts:
            continue
        pictures, pairs = pictures + len(set(owner_B)), pairs + len(texts)
        with autocast(predictor.device, predictor.precision):
            image = model.encode_image(predictor.preprocessing.normalize(pixels.to(predictor.device)))
            if alone:
                with record_routing(model) as routings:
                    model.image_states(image.rows(torch.tensor(sorted(set(owner_B)), device=predictor.device)))
                single.add(routings)
            for rows_B, text in _encoded(predictor, texts):
                with record_routing(model) as routings:
                    model.fuse(image, text, torch.tensor(owner_B, device=predictor.device)[rows_B])
                fused.add(routings)
                if alone:
                    with record_routing(model) as routings:
                        model.text_states(text)
                    single.add(routings)
    if pairs == 0:
        raise ValueError("no picture with a caption to send through the experts")
    return ExpertLoad(pictures, pairs, (*fused.loads("fused"), *single.loads("alone")))


def _pairs(predictor: Predictor, records: Sequence[Record]) -> tuple[list[int], list[str]]:
    """Which of the records each caption is of, and the captions."""
    config, cleaning = predictor.retrieval, predictor.model.cleaning
    owners = [row for row, record in enumerate(records) for _ in record.captions]
    return owners, [clean_caption(text, cleaning, config.max_words) for record in records for text in record.captions]


def _encoded(predictor: Predictor, texts: Sequence[str]) -> Iterator[tuple[Tensor, Encoded]]:
    """Texts of equal length together, for a network may route padding, too; and which of the texts they are."""
    model, length = predictor.model, min(predictor.retrieval.max_tokens, predictor.model.max_text)
    ids_BL, mask_BL = predictor.tokenizer.encode_batch(texts, max_length=length, end=model.ends_texts)
    length_B = mask_BL.sum(1)
    for own in sorted(set(length_B.tolist())):
        for rows_B in (length_B == own).nonzero().squeeze(1).split(_PAIRS):
            yield rows_B.to(predictor.device), model.encode_text(ids_BL[rows_B, :own].to(predictor.device))


# --- for people -----------------------------------------------------------------------------------------------


def table(load: LayerLoad) -> Table:
    """The shares of one layer in percent; below, what even shares would be and how alike the modalities are spread."""
    below = f"even: {100 / len(load.image_E):.1f}, overlap: {100 * load.overlap:.0f}"
    shown = Table(title=f"{load.name} (%)", caption=below, title_justify="left", caption_justify="left")
    shown.add_column("expert", justify="right")
    for name, tokens in (("image", load.image_tokens), ("text", load.text_tokens)):
        shown.add_column(f"{name} ({tokens:,})", justify="right")
    for expert, (image, text) in enumerate(zip(load.image_E, load.text_E, strict=True), 1):
        shown.add_row(str(expert), *(f"{100 * share:.1f}" for share in (image, text)))
    return shown


_WIDTH, _HEIGHT = 860, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 40, 44
_STYLE = """
svg { --paper: #ffffff; --ink: #1f2430; --soft: #5b6472; --grid: #dfe3e8; --image: #3b7cb8; --text: #bd7d12; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15181e; --ink: #e8ebf0; --soft: #a3adba; --grid: #363d47; --image: #6fb0ea; --text: #e0a94a; }
}
.paper { fill: var(--paper); } text { fill: var(--soft); font-size: 11px; } .x { text-anchor: middle; }
.y { text-anchor: end; } .name { fill: var(--ink); font-size: 14px; font-weight: 600; } .grid { stroke: var(--grid); }
.even { stroke: var(--soft); stroke-dasharray: 4 3; } .image { fill: var(--image); } .text { fill: var(--text); }
"""


def draw(loads: Sequence[LayerLoad]) -> str:
    """An SVG file: a chart for each layer, with two bars an expert and a dashed line where all would be equal."""
    panels = "".join(
        f'<g transform="translate(0 {number * _HEIGHT})">{_panel(load)}</g>\n' for number, load in enumerate(loads)
    )
    height = len(loads) * _HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-label="Share of image and text tokens of each expert" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">\n"
        f'<style>{_STYLE}</style>\n<rect class="paper" width="{_WIDTH}" height="{height}"/>\n{panels}</svg>\n'
    )


def _panel(load: LayerLoad) -> str:
    experts = len(load.image_E)
    marks = ticks(0.0, max(*load.image_E, *load.text_E, 1 / experts), 4)
    slot, bottom = (_WIDTH - _LEFT - _RIGHT) / experts, _HEIGHT - _BOTTOM

    def y(share: float) -> float:
        return bottom - (bottom - _TOP) * share / marks[-1]

    def bar(kind: str, left: float, share: float) -> str:
        return (
            f'<rect class="{kind}" x="{left:.1f}" y="{y(share):.1f}" width="{0.38 * slot:.1f}" '
            f'height="{bottom - y(share):.1f}"><title>{kind} {100 * share:.2f} %</title></rect>'
        )

    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        f'<text class="y" x="{_LEFT - 6}" y="{y(mark) + 4:.1f}">{100 * mark:.4g} %</text>'
        for mark in marks
    )
    bars = "".join(
        f"{bar('image', left + 0.1 * slot, image)}{bar('text', left + 0.52 * slot, text)}"
        f'<text class="x" x="{left + slot / 2:.1f}" y="{bottom + 15}">{number + 1}</text>'
        for number, (image, text) in enumerate(zip(load.image_E, load.text_E, strict=True))
        for left in [_LEFT + number * slot]
    )
    even = (
        f'<line class="even" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(1 / experts):.1f}" y2="{y(1 / experts):.1f}"/>'
    )
    legend = "".join(
        f'<rect class="{kind}" x="{x}" y="13" width="11" height="11"/><text x="{x + 16}" y="23">{kind} tokens</text>'
        for kind, x in (("image", _WIDTH - 210), ("text", _WIDTH - 105))
    )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return (
        f'<text class="name" x="{_LEFT}" y="23">{escape(load.name)}</text>{legend}{grid}{bars}{even}'
        f'<text class="x" x="{middle}" y="{_HEIGHT - 12}">expert</text>'
    )
