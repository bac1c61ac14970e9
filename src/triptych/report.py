"""A page about a run: one HTML file that needs nothing else, to look at, to print and to send.

A report is a title and sections. A section is a small dataclass that holds plain data (texts, numbers, pictures) and
knows its HTML; :func:`write_report` puts them on a page. What every run has (curves, speed, recipe, environment)
comes from :func:`run_sections`; the rest is for the caller to compose. All texts are escaped, pictures are embedded.

Shape legend: W words, H and W (after a height) height and width in patches or pixels.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import SequenceMatcher
from html import escape
from importlib.resources import files
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.training.logs import read_log

Picture = Image.Image
Floats = NDArray[np.floating[Any]]

_SHARP_SIDE = 128
"""Pictures of at most so many pixels a side are embedded exactly; larger ones as a JPEG of `_LARGEST_SIDE`."""
_LARGEST_SIDE = 320
_HEAT_SIDE = 96


class Section(Protocol):
    """A part of a report."""

    @property
    def title(self) -> str:
        """The heading."""

    @property
    def note(self) -> str:
        """A sentence or two under the heading: what is shown, and how to read it."""

    def body(self) -> str:
        """HTML."""


def write_report(path: Path, title: str, sections: Sequence[Section], *, lead: str = "", warning: str = "") -> Path:
    """Write a page; one that is there already is replaced when the new one is complete.

    Args:
        lead: a paragraph under the title.
        warning: what a reader must not overlook, in a box above everything else.
    """
    parts = [
        f"<section>\n<h2>{escape(section.title)}</h2>\n{_paragraph(section.note, 'note')}{section.body()}\n</section>"
        for section in sections
    ]
    page = _PAGE.format(
        title=escape(title),
        style=files("triptych").joinpath("report.css").read_text(encoding="utf-8"),
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        lead=_paragraph(lead, "lead"),
        warning=_paragraph(warning, "warning"),
        sections="\n".join(parts),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="overline">triptych &middot; {date}</p>
<h1>{title}</h1>
{lead}{warning}</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _paragraph(text: str, name: str) -> str:
    return f'<p class="{name}">{escape(text)}</p>\n' if text else ""


# --- numbers and facts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One number that matters, what it is, and what to compare it with."""

    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Figures:
    """A row of numbers that matter."""

    title: str
    figures: tuple[Figure, ...]
    note: str = ""

    def body(self) -> str:
        items = (
            f'<div class="figure"><b>{escape(item.value)}</b><span>{escape(item.label)}</span>'
            f"<small>{escape(item.detail)}</small></div>"
            for item in self.figures
        )
        return f'<div class="figures">{"".join(items)}</div>'


@dataclass(frozen=True)
class Column:
    """A column of numbers; ``muted`` where it is there to compare with."""

    name: str
    muted: bool = False


@dataclass(frozen=True)
class Rows:
    """Rows of a table that belong together: a label and its cells, a cell for each column."""

    heading: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Table:
    """Results. ``spans`` are headings over several columns: (heading, number of columns)."""

    title: str
    columns: tuple[Column, ...]
    groups: tuple[Rows, ...]
    spans: tuple[tuple[str, int], ...] = ()
    note: str = ""

    def body(self) -> str:
        over = "".join(f'<th scope="colgroup" colspan="{width}">{escape(name)}</th>' for name, width in self.spans)
        names = "".join(f'<th scope="col"{self._kind(at)}>{escape(c.name)}</th>' for at, c in enumerate(self.columns))
        head = (f'<tr class="over"><td></td>{over}</tr>' if over else "") + f"<tr><td></td>{names}</tr>"
        bodies = "".join(self._group(group) for group in self.groups)
        return f'<div class="wide"><table><thead>{head}</thead>{bodies}</table></div>'

    def _group(self, group: Rows) -> str:
        width = 1 + len(self.columns)
        heading = f'<tr><th scope="rowgroup" colspan="{width}">{escape(group.heading)}</th></tr>'
        rows = (
            f'<tr><th scope="row">{escape(label)}</th>'
            + "".join(f"<td{self._kind(at)}>{escape(cell)}</td>" for at, cell in enumerate(cells))
            + "</tr>"
            for label, cells in group.rows
        )
        return f"<tbody>{heading if group.heading else ''}{''.join(rows)}</tbody>"

    def _kind(self, at: int) -> str:
        names = []
        if self.columns[at].muted:
            names.append("muted")
        starts = {0}
        for _, width in self.spans:
            starts.add(max(starts) + width)
        if self.spans and at in starts:
            names.append("first")
        return f' class="{" ".join(names)}"' if names else ""


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    title: str
    facts: Mapping[str, str]
    note: str = ""

    def body(self) -> str:
        items = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in self.facts.items())
        return f'<dl class="facts">{"".join(items)}</dl>'


@dataclass(frozen=True)
class Commands:
    """Commands to copy, each with a line that says what it does."""

    title: str
    commands: tuple[tuple[str, str], ...]
    note: str = ""

    def body(self) -> str:
        return "".join(
            f"{_paragraph(what, 'what')}<pre><code>{escape(command)}</code></pre>" for what, command in self.commands
        )


@dataclass(frozen=True)
class Text:
    """A long text that is folded away, such as a configuration."""

    title: str
    summary: str
    text: str
    note: str = ""

    def body(self) -> str:
        return f"<details><summary>{escape(self.summary)}</summary><pre>{escape(self.text)}</pre></details>"


# --- pictures -----------------------------------------------------------------------------------------------


def data_uri(picture: Picture, *, exact: bool = True) -> str:
    """A picture as an address that holds it: small ones exactly (PNG) if ``exact``, others reduced (JPEG)."""
    data, kind = BytesIO(), "png"
    if exact and max(picture.size) <= _SHARP_SIDE:
        picture.convert("RGB").save(data, "PNG", optimize=True)
    else:
        kind = "jpeg"
        small = picture.convert("RGB")
        small.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        small.save(data, "JPEG", quality=85)
    return f"data:image/{kind};base64,{b64encode(data.getvalue()).decode()}"


def _image(picture: Picture, alternative: str, *, exact: bool = True) -> str:
    width, height = picture.size
    source = data_uri(picture, exact=exact)
    return f'<img src="{source}" alt="{escape(alternative)}" width="{width}" height="{height}">'


@dataclass(frozen=True)
class Captioned:
    """A picture, what was generated for it, and what people said; ``right``: whether it is judged correct."""

    picture: Picture
    generated: str
    references: tuple[str, ...]
    right: bool | None = None


@dataclass(frozen=True)
class Captions:
    """Pictures with generated captions; words that the nearest reference does not have there are marked."""

    title: str
    items: tuple[Captioned, ...]
    note: str = ""

    def body(self) -> str:
        return f'<div class="cards">{"".join(map(self._card, self.items))}</div>'

    @staticmethod
    def _card(item: Captioned) -> str:
        nearest, right = compare(item.generated, item.references)
        words = zip(item.generated.split(), right, strict=True)
        marked = " ".join(escape(word) if fits else f"<mark>{escape(word)}</mark>" for word, fits in words)
        below = "(word for word a reference)" if nearest == item.generated else nearest
        verdict = {True: '<i class="right">right</i>', False: '<i class="wrong">wrong</i>', None: ""}[item.right]
        return (
            f'<figure class="card">{_image(item.picture, nearest)}<figcaption>{verdict}'
            f'<p class="generated">{marked or "(nothing)"}</p><p class="reference">{escape(below)}</p>'
            "</figcaption></figure>"
        )


def compare(generated: str, references: Sequence[str]) -> tuple[str, list[bool]]:
    """The reference that is most like a generated text, and for each generated word whether it is in place there."""
    words = generated.split()
    matchers = [SequenceMatcher(None, reference.split(), words, autojunk=False) for reference in references]
    if not matchers:
        return "", [True] * len(words)
    best = max(range(len(matchers)), key=lambda index: matchers[index].ratio())
    fits = [False] * len(words)
    for block in matchers[best].get_matching_blocks():
        fits[block.b : block.b + block.size] = [True] * block.size
    return references[best], fits


@dataclass(frozen=True)
class PictureSearch:
    """A text and the pictures found for it, best first.

    Attributes:
        right: position of the right picture among those found.
        answer: the right picture, shown apart when it was not found.
    """

    text: str
    found: tuple[Picture, ...]
    right: int | None
    answer: Picture


@dataclass(frozen=True)
class PictureSearches:
    """Text to image: each query with the best pictures; the right one is framed."""

    title: str
    queries: tuple[PictureSearch, ...]
    note: str = ""

    def body(self) -> str:
        return "".join(map(self._row, self.queries))

    @staticmethod
    def _row(query: PictureSearch) -> str:
        def cell(picture: Picture, label: str, right: bool) -> str:
            name = ' class="right"' if right else ""
            return f"<figure{name}>{_image(picture, label)}<figcaption>{label}</figcaption></figure>"

        shown = [
            cell(picture, f"{at + 1}, right" if at == query.right else f"{at + 1}", at == query.right)
            for at, picture in enumerate(query.found)
        ]
        if query.right is None:
            shown += ['<span class="gap"></span>', cell(query.answer, "the right one", True)]
        return f'<div class="search"><p>{escape(query.text)}</p><div class="strip">{"".join(shown)}</div></div>'


@dataclass(frozen=True)
class Strip:
    """Pictures that belong together, each with its name, and a text about them all."""

    text: str
    pictures: tuple[tuple[str, Picture], ...]


@dataclass(frozen=True)
class Strips:
    """A row of pictures for each text."""

    title: str
    strips: tuple[Strip, ...]
    note: str = ""

    def body(self) -> str:
        return "".join(map(self._row, self.strips))

    @staticmethod
    def _row(strip: Strip) -> str:
        shown = "".join(
            f"<figure>{_image(picture, name)}<figcaption>{escape(name)}</figcaption></figure>"
            for name, picture in strip.pictures
        )
        return f'<div class="search"><p>{escape(strip.text)}</p><div class="strip">{shown}</div></div>'


@dataclass(frozen=True)
class TextSearch:
    """A picture and the texts found for it, best first; ``right`` and ``answer`` as in :class:`PictureSearch`."""

    picture: Picture
    found: tuple[str, ...]
    right: int | None
    answer: str


@dataclass(frozen=True)
class TextSearches:
    """Image to text: each picture with the best texts; the right one is marked."""

    title: str
    queries: tuple[TextSearch, ...]
    note: str = ""

    def body(self) -> str:
        return f'<div class="texts">{"".join(map(self._row, self.queries))}</div>'

    @staticmethod
    def _row(query: TextSearch) -> str:
        found = "".join(
            f'<li class="right">{escape(text)}</li>' if at == query.right else f"<li>{escape(text)}</li>"
            for at, text in enumerate(query.found)
        )
        missed = "" if query.right is not None else f'<p class="missed">right: {escape(query.answer)}</p>'
        return (
            f'<div class="picture-query">{_image(query.picture, query.answer)}<div><ol>{found}</ol>{missed}</div></div>'
        )


@dataclass(frozen=True)
class Attended:
    """A picture and where each word of a text looks in it.

    Attributes:
        layers: name of a layer and its attention, non-negative: heat_WHW[w] belongs to word w.
    """

    picture: Picture
    words: tuple[str, ...]
    layers: tuple[tuple[str, Floats], ...]


@dataclass(frozen=True)
class AttentionMaps:
    """For each word of a text the picture, bright where the word attends to it; a row of maps a layer."""

    title: str
    items: tuple[Attended, ...]
    note: str = ""
    words_a_row: int = 11

    def body(self) -> str:
        return "".join(map(self._item, self.items))

    def _item(self, item: Attended) -> str:
        width = math.ceil(len(item.words) / math.ceil(len(item.words) / self.words_a_row))
        rows = "".join(self._rows(item, slice(at, at + width)) for at in range(0, len(item.words), width))
        text = " ".join(item.words)
        return f'<div class="attended"><div>{_image(item.picture, text)}<p>{escape(text)}</p></div>{rows}</div>'

    def _rows(self, item: Attended, part: slice) -> str:
        words = item.words[part]
        head = "".join(f'<th scope="col">{escape(word)}</th>' for word in words)
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(
                f"<td>{_image(spotlight(item.picture, heat_HW), f'{word}, {name}', exact=False)}</td>"
                for word, heat_HW in zip(words, heat_WHW[part], strict=True)
            )
            + "</tr>"
            for name, heat_WHW in item.layers
        )
        return f'<div class="wide"><table class="maps"><tr><td></td>{head}</tr>{rows}</table></div>'


def spotlight(picture: Picture, heat_HW: Floats, side: int = _HEAT_SIDE) -> Picture:
    """The picture as a square of ``side`` pixels, at full brightness where the heat is largest and dark without it."""
    largest = float(heat_HW.max(initial=0))
    relative_HW = np.asarray(heat_HW / largest if largest > 0 else np.zeros_like(heat_HW), dtype=np.float32)
    light = Image.fromarray(relative_HW).resize((side, side), Image.Resampling.BILINEAR)
    light_HW1 = 0.12 + 0.88 * np.asarray(light)[:, :, None].clip(0, 1)
    pixels_HWC = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    return Image.fromarray((pixels_HWC * light_HW1).round().astype(np.uint8))


# --- curves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A quantity over the steps of a run; values that are not finite are left out, ``noisy`` ones are smoothed."""

    name: str
    unit: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    noisy: bool = True


@dataclass(frozen=True)
class Curves:
    """Small charts beside each other, one a quantity: pale as logged, and smoothed."""

    title: str
    lines: tuple[Line, ...]
    note: str = ""

    def body(self) -> str:
        if not self.lines:
            return '<p class="empty">Nothing was logged.</p>'
        return f'<div class="charts">{"".join(map(chart, self.lines))}</div>'


_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 20, 28, 40
_POINTS = 240


def chart(line: Line) -> str:
    """An inline SVG of a line, with axes and their labels."""
    finite = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if math.isfinite(value)]
    head = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(line.name)}">'
        f'<text class="name" x="{_LEFT}" y="16">{escape(line.name)}</text>'
    )
    if not finite:
        return f'{head}<text x="{_LEFT}" y="{_HEIGHT / 2}">no values</text></svg>'
    steps, values = (np.asarray(column, dtype=float) for column in zip(*finite, strict=True))
    smooth = smoothed(values, max(1, len(values) // 40)) if line.noisy else values
    x_ticks, y_ticks = ticks(0.0, float(steps.max()), 5), ticks(min(0.0, float(values.min())), float(values.max()), 4)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / x_ticks[-1]

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def path(heights: Floats, name: str) -> str:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(*_thinned(steps, heights), strict=True))
        return f'<polyline class="{name}" points="{points}"/>'

    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="y" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{_short(tick)}</text>'
        for tick in y_ticks
    )
    below = "".join(f'<text class="x" x="{x(t):.1f}" y="{_HEIGHT - _BOTTOM + 15}">{_short(t)}</text>' for t in x_ticks)
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    labels = (
        f'<text class="x label" x="{middle_x}" y="{_HEIGHT - 6}">step</text>'
        f'<text class="x label" transform="translate(10 {middle_y}) rotate(-90)">{escape(line.unit)}</text>'
    )
    last = f'<circle class="last" cx="{x(steps[-1]):.1f}" cy="{y(smooth[-1]):.1f}" r="3"/>'
    value = f'<text class="value" x="{_WIDTH - _RIGHT}" y="16">{smooth[-1]:.3g}</text>'
    return f"{head}{value}{grid}{below}{labels}{path(values, 'raw')}{path(smooth, 'smooth')}{last}</svg>"


def smoothed(values: Floats, reach: int) -> Floats:
    """The mean of each value and its ``reach`` neighbours on both sides; of fewer where there are no more.

    At the start there are as few on the right as on the left, for curves begin steeply. At the end, where the value
    matters, there are all of them on the left.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    left = np.minimum(at, reach)
    right = np.minimum(left, len(values) - 1 - at)
    return np.asarray((sums[at + right + 1] - sums[at - left]) / (left + right + 1))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, about ``count`` of them, from at most ``low`` to at least ``high``; at least two."""
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _thinned(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """At most `_POINTS` points, each the mean of its neighbourhood."""
    if len(steps) <= _POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), _POINTS)
    return np.array([steps[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


_LOSS_NAMES = {
    "itc": "Image-text contrast (ITC)",
    "itm": "Image-text matching (ITM)",
    "mlm": "Masked language (MLM)",
    "prefix": "Prefix language (PrefixLM)",
    "mim": "Masked image (MIM)",
    "balance": "Balance of the experts",
    "caption": "Caption",
}
_MEASURES = {
    "mlm_accuracy": ("Masked words guessed", "share"),
    "itm_accuracy": ("Pairs judged rightly", "share"),
    "busiest": ("Busiest expert", "times an equal share"),
    "idle": ("Experts without a token", "share"),
    "dropped": ("Choices without room", "per token"),
}
"""What tasks measure besides their losses: its name and unit."""


def curves_of(records: Iterable[Mapping[str, Any]], title: str = "Training curves", note: str = "") -> Curves:
    """Every part of the loss, their sum where there are several, what was measured, and the learning rate of a log."""
    columns: dict[tuple[str, str], tuple[list[int], list[float]]] = {}

    def add(name: str, unit: str, step: int, value: float) -> None:
        steps, values = columns.setdefault((name, unit), ([], []))
        steps.append(step)
        values.append(float(value))

    for record in records:
        for name, value in record.get("losses", {}).items():
            add(_LOSS_NAMES.get(name, name), "loss", record["step"], value)
        if len(record.get("losses", {})) > 1:
            add("Sum of the losses", "loss", record["step"], record["loss"])
        for name, (shown, unit) in _MEASURES.items():
            if name in record:
                add(shown, unit, record["step"], record[name])
        if "lr" in record:
            add("Learning rate", "rate", record["step"], record["lr"])
    lines = tuple(
        Line(name, unit, tuple(steps), tuple(values), noisy=unit != "rate")
        for (name, unit), (steps, values) in columns.items()
    )
    return Curves(title, lines, note)


# --- what every run has -------------------------------------------------------------------------------------


def run_sections(folder: Path) -> list[Section]:
    """Curves, speed, recipe and environment of the run in a folder, as far as it left a log and a recipe."""
    records = read_log(folder)
    path = folder / "recipe.json"
    recipe = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    steps = recipe.get("train", {}).get("steps", 0)
    sections: list[Section] = [
        curves_of(records, note="Pale: as logged; dark: smoothed; the number is where the smoothed curve ends."),
        Facts("Speed and memory", speed(records, steps)),
        Facts("Environment", environment()),
    ]
    if recipe:
        text = json.dumps(recipe, indent=1)
        sections.append(Text("Recipe", f"{recipe['name']}: the complete configuration", text))
    return sections


def speed(records: Sequence[Mapping[str, Any]], steps: int) -> dict[str, str]:
    """Where a run's time went, from its log: medians over the intervals that it reports."""
    reports = [record for record in records if "samples_per_s" in record]
    if not reports:
        return {"steps": f"{max((record['step'] for record in records), default=0):,}"}

    def typical(name: str) -> float:
        return float(median(report[name] for report in reports))

    seconds = training_seconds(records, steps)
    return {
        "steps": f"{reports[-1]['step']:,} of {steps:,}" if steps else f"{reports[-1]['step']:,}",
        "time of the steps": "unknown" if seconds is None else duration(seconds),
        "throughput": f"{typical('samples_per_s'):.1f} samples/s",
        "MFU": f"{typical('mfu'):.1%} of the processor's matrix product rate",
        "waiting for data": f"{typical('data_share'):.1%} of the time",
        "peak memory": f"{max(report['memory_gb'] for report in reports):.2f} GB",
        "broken samples skipped": f"{reports[-1]['skipped']:,}",
    }


def training_seconds(records: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """How long a run's steps took, interruptions left out; ``None`` where the log does not tell.

    A record has the remaining time, at the rate of the interval that it reports, so it has that interval's length.
    """
    reports = [record for record in records if "eta_s" in record]
    rates = [report["eta_s"] / (steps - report["step"]) for report in reports if report["step"] < steps]
    if not rates:
        return None
    rates += [rates[-1]] * (len(reports) - len(rates))
    ends = [0, *(report["step"] for report in reports)]
    return float(sum(rate * (end - start) for rate, (start, end) in zip(rates, pairwise(ends), strict=True)))


def duration(seconds: float) -> str:
    """Seconds for people: "8.2 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def environment() -> dict[str, str]:
    """What a run's speed and numbers depend on besides its recipe."""
    import torch

    import triptych

    facts = {
        "triptych": triptych.__version__,
        "commit": commit() or "not a git checkout",
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} on {_cores()} {'core' if _cores() == 1 else 'cores'}",
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def commit() -> str | None:
    """The commit of the checkout that this package is run from; ``None`` where it is no checkout or git is not there.

    An installed copy may lie inside another project's checkout: only a folder whose git knows this file counts.
    """

    def git(*arguments: str) -> str:
        here = Path(__file__)
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
