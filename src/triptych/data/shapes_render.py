"""The Shapes world: what a scene is made of, and how it is drawn.

A scene is a handful of flat objects on a light background. Each lies wholly inside its own cell of a 3x3
grid, so "top left" or "above" are never a matter of taste and two objects never touch.

Shape legend: T frames, H height, W width, C colour channels (RGB).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Kind = tuple[str, str, str]
"""What an object looks like: (size, colour, shape), e.g. `("small", "red", "circle")`."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""

GRID = 3
SIZES = ("small", "large")
RADII = {"small": 0.09, "large": 0.145}
COLOUR_RGB = {
    "red": (215, 30, 35),
    "green": (35, 160, 65),
    "blue": (35, 80, 215),
    "yellow": (245, 210, 15),
    "purple": (145, 45, 175),
    "orange": (250, 125, 0),
}
COLOURS = tuple(COLOUR_RGB)
SHAPES = ("circle", "square", "triangle", "star")
PLACES = (
    "top left",
    "top centre",
    "top right",
    "centre left",
    "centre",
    "centre right",
    "bottom left",
    "bottom centre",
    "bottom right",
)
"""The names of the grid's cells in reading order."""

HELD_OUT_PAIRS = frozenset({("red", "square"), ("blue", "star"), ("yellow", "triangle")})
"""The (colour, shape) pairs kept for the compositions split: 3 of 24."""

MAX_OBJECTS = 8
"""One cell of the grid is always free."""

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 32, 512


class Split(StrEnum):
    """Which scenes a model may see; the exact rules are in `triptych.data.shapes.split_admits`."""

    TRAIN = "train"
    TEST = "test"
    COMPOSITIONS = "compositions"


@dataclass(frozen=True, slots=True)
class Object:
    """One object. `x`, `y` (its middle) and `radius` (half its extent) are fractions of the image's width."""

    size: str
    colour: str
    shape: str
    cell: int
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> Kind:
        """(size, colour, shape)."""
        return (self.size, self.colour, self.shape)

    @property
    def held_out(self) -> bool:
        """Whether only scenes of the compositions split may contain this object."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS

    @property
    def row(self) -> int:
        """The grid row, 0 at the top."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """The grid column, 0 at the left."""
        return self.cell % GRID

    @property
    def place(self) -> str:
        """The name of the grid cell, e.g. "top left"."""
        return PLACES[self.cell]


@dataclass(frozen=True, slots=True)
class Background:
    """A light plane: `rgb` in the middle, changing by `slope_x`, `slope_y` across the image, plus noise."""

    rgb: tuple[float, float, float]
    slope_x: float
    slope_y: float
    noise_seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything there is to know about one image. `objects` are in reading order."""

    split: Split
    seed: int
    index: int
    objects: tuple[Object, ...]
    background: Background

    @property
    def image_id(self) -> str:
        """A name unique to (split, seed, index)."""
        return f"shapes-{self.split}-{self.seed}-{self.index:09d}"

    @property
    def kinds(self) -> Counter[Kind]:
        """How often each (size, colour, shape) occurs."""
        return Counter(item.kind for item in self.objects)


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """Draw `scene` as an anti-aliased square image.

    Args:
        scene: what to draw.
        size: width and height in pixels, 32 to 512.

    Returns:
        The image, uint8 [H, W, 3].

    Raises:
        ValueError: if `size` is out of range.
    """
    image_HWC = render_background(scene.background, size)
    for item in scene.objects:
        draw(image_HWC, item)
    return image_HWC


def render_background(background: Background, size: int) -> NDArray[np.uint8]:
    """Draw the empty plane, uint8 [size, size, 3]; raises `ValueError` unless `size` is 32 to 512."""
    if not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image size must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels, not {size}")
    offset_W = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    noise = np.random.Generator(np.random.PCG64(background.noise_seed)).bytes(size * size)
    # Two bits of noise, the same in all three channels: enough to make images differ, and it compresses.
    light_HW = (np.frombuffer(noise, np.uint8).reshape(size, size) & 3).astype(np.float32)
    light_HW += offset_W[None, :] * background.slope_x
    light_HW += offset_W[:, None] * background.slope_y
    image_HWC = np.empty((size, size, 3), np.uint8)
    for channel, level in enumerate(background.rgb):
        image_HWC[:, :, channel] = light_HW + np.float32(level)
    return image_HWC


def draw(image_HWC: NDArray[np.uint8], item: Object) -> None:
    """Paint `item` onto a square image, in place."""
    coverage_HW, left, top = _coverage(item, image_HWC.shape[0])
    height, width = coverage_HW.shape
    window_HWC = image_HWC[top : top + height, left : left + width]
    paint_C = np.array(COLOUR_RGB[item.colour], np.float64)
    window_HWC[:] = window_HWC + coverage_HW[:, :, None] * (paint_C - window_HWC) + 0.5


def object_box(item: Object, size: int = 64) -> Box:
    """The tight box, in an image of `size` pixels, of all pixels whose centre lies inside `item`."""
    coverage_HW, left, top = _coverage(item, size)
    inside_HW = coverage_HW >= 0.5
    columns, rows = np.flatnonzero(inside_HW.any(axis=0)), np.flatnonzero(inside_HW.any(axis=1))
    return (left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)


def _coverage(item: Object, size: int) -> tuple[NDArray[np.float64], int, int]:
    """How far `item` covers each pixel of its window, 0 to 1 [H, W], with the window's left and top."""
    centre_x, centre_y, radius = item.x * size, item.y * size, item.radius * size
    left, top = max(0, math.floor(centre_x - radius - 0.5)), max(0, math.floor(centre_y - radius - 0.5))
    right = min(size, math.ceil(centre_x + radius + 0.5))
    bottom = min(size, math.ceil(centre_y + radius + 0.5))
    x_W = (np.arange(left, right, dtype=np.float64) + (0.5 - centre_x)) / radius
    y_H1 = ((np.arange(top, bottom, dtype=np.float64) + (0.5 - centre_y)) / radius)[:, None]
    distance_HW = _signed_distance(item.shape, x_W, y_H1) * radius
    return np.minimum(np.maximum(0.5 - distance_HW, 0.0), 1.0), left, top


def _signed_distance(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance to the outline, negative inside, of a shape that fits the square from -1 to 1; y points down.

    Only the sign and the neighbourhood of the outline matter for drawing, so corners use the distance to the
    edges' lines. Nothing but exactly rounded operations is used, so that images agree between platforms.
    """
    if shape == "circle":
        return np.asarray(np.sqrt(x * x + y * y) - 1.0)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.9)
    if shape == "triangle":
        slope = 1.75  # from the tip (0, -1) down to the corners (±1, 0.75)
        side = (slope * np.abs(x) - y - 1.0) / math.sqrt(1.0 + slope * slope)
        return np.asarray(np.maximum(side, y - 0.75))
    assert shape == "star", shape
    return _star_distance(x, y)


def _star_distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A five-pointed star of outer radius 1, tip up: fold the plane onto half a point with its one edge.

    The folding follows Inigo Quilez, "2D distance functions" (sdStar5).
    """
    cos36, sin36, inner = 0.809016994374947, 0.587785252292473, 0.5
    x, y = np.abs(x), -y
    fold = 2.0 * np.maximum(cos36 * x - sin36 * y, 0.0)
    x, y = x - fold * cos36, y + fold * sin36
    fold = 2.0 * np.maximum(-cos36 * x - sin36 * y, 0.0)
    x, y = np.abs(x + fold * cos36), y + fold * sin36 - 1.0
    edge_x, edge_y = inner * sin36, inner * cos36 - 1.0
    return np.asarray((y * edge_x - x * edge_y) / math.sqrt(edge_x * edge_x + edge_y * edge_y))
