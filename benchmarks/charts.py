"""SVG charts of comparisons over several seeds: dots in rows, and scores against what they cost.

They follow the reader's light or dark scheme, and need nothing but a browser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean

from triptych.report import ticks

_NAMES, _PANEL, _GAP, _ROW, _HEAD, _FOOT = 150, 330, 40, 24, 58, 34
_LEFT, _HEIGHT, _ENTRY = 60, 280, 22
_HUES = ("first", "second", "third", "fourth", "fifth")
_STYLE = """
    svg { --paper: #ffffff; --ink: #1f2430; --soft: #5b6472; --line: #c3cad4;
      --first: #3b7cb8; --second: #bd7d12; --third: #4c8c4a; --fourth: #b5506e; --fifth: #7a5fb0; }
    @media (prefers-color-scheme: dark) {
      svg { --paper: #15181e; --ink: #e8ebf0; --soft: #a3adba; --line: #454d59;
        --first: #6fb0ea; --second: #e0a94a; --third: #83c581; --fourth: #e58aa5; --fifth: #b19be6; }
    }
    text { fill: var(--ink); font-size: 14px; }
    .soft { fill: var(--soft); font-size: 12px; text-anchor: middle; }
    .head { font-weight: 600; font-size: 15px; }
    .grid { stroke: var(--line); stroke-width: 1; }
    circle { fill-opacity: .45; stroke: none; }
    .mean { stroke-width: 3; }
    .path { fill: none; stroke-width: 2; }
    .base { stroke-width: 1.5; stroke-dasharray: 4 4; }
"""


@dataclass(frozen=True)
class Panel:
    """Scores of one kind: the seeds of each name, and the name whose mean is drawn through all rows, if any."""

    title: str
    scores: Mapping[str, Sequence[float]]
    reference: str | None = None


@dataclass(frozen=True)
class Point:
    """What something costs, and the seeds' scores."""

    cost: float
    scores: Sequence[float]


@dataclass(frozen=True)
class Plane:
    """Scores of one kind against costs: the points of each name."""

    title: str
    points: Mapping[str, Sequence[Point]]


def dots(
    title: str, said: str, panels: Sequence[Panel], hue: Callable[[str], int] = lambda name: 0, *, names: int = _NAMES
) -> str:
    """Names below each other, a panel a kind of score: a dot a seed, a line at the mean.

    Args:
        said: what a person who cannot see it is told.
        hue: number of the colour of a name.
        names: width of the column of names, in pixels.
    """
    rows = list(dict.fromkeys(name for panel in panels for name in panel.scores))
    width, height = names + len(panels) * (_PANEL + _GAP), _HEAD + len(rows) * _ROW + _FOOT
    body = "".join(
        f'<text x="{names - 14}" y="{_middle(line) + 5}" text-anchor="end">{escape(name)}</text>'
        for line, name in enumerate(rows)
    )
    for place, panel in enumerate(panels):
        body += _dotted(panel, rows, names + (_PANEL + _GAP) * place, hue)
    return _document(title, said, width, height, body)


def _middle(line: int) -> float:
    return _HEAD + _ROW * (line + 0.5)


def _dotted(panel: Panel, rows: Sequence[str], left: float, hue: Callable[[str], int]) -> str:
    """The dots of one panel; its axis begins where the worst is."""
    everything = [score for scores in panel.scores.values() for score in scores]
    marks = ticks(min(everything), max(everything), 4)
    bottom = _middle(len(rows) - 1) + _ROW / 2

    def x(score: float) -> float:
        return left + _PANEL * (score - marks[0]) / (marks[-1] - marks[0])

    parts = [f'<text class="head" x="{left}" y="24">{escape(panel.title)}</text>']
    for mark in marks:
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{_HEAD - 6}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{x(mark):.1f}" y="{bottom + 18}">{mark:g}</text>')
    if panel.reference is not None and panel.reference in panel.scores:
        at, own = x(mean(panel.scores[panel.reference])), _stroke(hue(panel.reference))
        parts.append(f'<line class="base" {own} x1="{at:.1f}" x2="{at:.1f}" y1="{_HEAD - 6}" y2="{bottom}"/>')
    for line, name in enumerate(rows):
        if name in panel.scores:
            y, scores = _middle(line), panel.scores[name]
            at = x(mean(scores))
            parts += [f'<circle {_fill(hue(name))} cx="{x(score):.1f}" cy="{y}" r="5"/>' for score in scores]
            parts.append(
                f'<line class="mean" {_stroke(hue(name))} x1="{at:.1f}" x2="{at:.1f}" y1="{y - 8}" y2="{y + 8}"/>'
            )
    return "\n".join(parts) + "\n"


def against_cost(title: str, said: str, cost: str, planes: Sequence[Plane]) -> str:
    """A panel a kind of score, over costs on a scale of equal ratios: a dot a seed, a line through the means.

    Args:
        cost: what the horizontal axes show.
    """
    names = list(dict.fromkeys(name for plane in planes for name in plane.points))
    width = _LEFT + len(planes) * (_PANEL + _LEFT)
    bottom = _HEAD + _HEIGHT
    height = bottom + 50 + len(names) * _ENTRY
    body = "".join(_curved(plane, names, cost, _LEFT + (_PANEL + _LEFT) * place) for place, plane in enumerate(planes))
    for line, name in enumerate(names):
        y = bottom + 56 + line * _ENTRY
        body += f'<line class="mean" {_stroke(line)} x1="{_LEFT}" x2="{_LEFT + 24}" y1="{y}" y2="{y}"/>'
        body += f'<text x="{_LEFT + 34}" y="{y + 5}">{escape(name)}</text>\n'
    return _document(title, said, width, height, body)


def _curved(plane: Plane, names: Sequence[str], cost: str, left: float) -> str:
    """One panel, with its axes."""
    everything = [point for points in plane.points.values() for point in points]
    marks = ticks(*_ends([score for point in everything for score in point.scores]), 4)
    low, high = (math.log(cost) for cost in _ends([point.cost for point in everything]))
    bottom = _HEAD + _HEIGHT
    inner = _PANEL - 30

    def x(cost: float) -> float:
        return left + 15 + inner * ((math.log(cost) - low) / (high - low) if high > low else 0.5)

    def y(score: float) -> float:
        return bottom - _HEIGHT * (score - marks[0]) / (marks[-1] - marks[0])

    parts = [f'<text class="head" x="{left}" y="24">{escape(plane.title)}</text>']
    for mark in marks:
        parts.append(f'<line class="grid" x1="{left}" x2="{left + _PANEL}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text class="soft" x="{left - 18}" y="{y(mark) + 4:.1f}">{mark:g}</text>')
    for mark in ratio_ticks(math.exp(low), math.exp(high)):
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text class="soft" x="{x(mark):.1f}" y="{bottom + 20}">{mark:g}</text>')
    parts.append(f'<text class="soft" x="{left + _PANEL / 2}" y="{bottom + 38}">{escape(cost)}</text>')
    for number, name in enumerate(names):
        points = sorted(plane.points.get(name, ()), key=lambda point: point.cost)
        path = " ".join(f"{x(point.cost):.1f},{y(mean(point.scores)):.1f}" for point in points)
        parts.append(f'<polyline class="path" {_stroke(number)} points="{path}"/>')
        for point in points:
            at = x(point.cost)
            parts += [f'<circle {_fill(number)} cx="{at:.1f}" cy="{y(score):.1f}" r="5"/>' for score in point.scores]
    return "\n".join(parts) + "\n"


def ratio_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 times a power of ten between two costs."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [number for number in found if low * (1 - 1e-9) <= number <= high * (1 + 1e-9)]


def _ends(numbers: Sequence[float]) -> tuple[float, float]:
    return min(numbers), max(numbers)


def _fill(number: int) -> str:
    return f'style="fill: var(--{_HUES[number % len(_HUES)]})"'


def _stroke(number: int) -> str:
    return f'style="stroke: var(--{_HUES[number % len(_HUES)]})"'


def _document(title: str, said: str, width: float, height: float, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title desc" font-family="system-ui, sans-serif">\n'
        f'<title id="title">{escape(title, quote=False)}</title>'
        f'<desc id="desc">{escape(said, quote=False)}</desc>\n'
        f'<style>{_STYLE}</style>\n<rect width="{width}" height="{height}" style="fill: var(--paper)"/>\n'
        f"{body}</svg>\n"
    )
