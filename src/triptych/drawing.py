"""Boxes drawn on pictures, to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_FRAME = (255, 60, 60)
_TEXT = (255, 255, 255)
_SMALLEST_TEXT = 11


def draw_box(image: Image.Image, box_xyxy: Sequence[float], phrase: str) -> Image.Image:
    """A copy of an RGB picture with the box (left, top, right, bottom in its pixels) and the phrase above it.

    The phrase is below the top edge of the box where there is no room above, and cut where the picture is narrower.

    Raises:
        ValueError: the box is not four finite numbers, or its right is left of its left.
    """
    if len(box_xyxy) != 4 or not all(map(math.isfinite, box_xyxy)):
        raise ValueError(f"a box has four finite numbers, got {list(box_xyxy)}")
    left, top, right, bottom = box_xyxy
    if right < left or bottom < top:
        raise ValueError(f"the box {list(box_xyxy)} has its corners exchanged")
    drawn = image.convert("RGB").copy()
    canvas = ImageDraw.Draw(drawn)
    side = max(drawn.size)
    canvas.rectangle((left, top, right, bottom), outline=_FRAME, width=max(1, round(side / 200)))
    font = ImageFont.load_default(max(_SMALLEST_TEXT, side / 32))
    label = _fitting(canvas, " ".join(phrase.split()), font, drawn.width)
    _, _, width, height = map(math.ceil, canvas.textbbox((0, 0), label, font))
    corner = (max(0.0, min(left, drawn.width - width)), top - height if top >= height else top)
    canvas.rectangle((*corner, corner[0] + width, corner[1] + height), fill=_FRAME)
    canvas.text(corner, label, _TEXT, font)
    return drawn


def _fitting(
    canvas: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """The text, or as many of its letters as the width has room for."""
    shown = text
    while shown and canvas.textlength(shown, font) > width:
        text = text[:-1]
        shown = f"{text}…" if text else ""
    return shown
