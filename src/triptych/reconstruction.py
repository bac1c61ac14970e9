"""Pictures of which a model sees a part, and paints the rest by the text: for ``triptych reconstruct``.

Shape legend: B batch, C channels, H height, W width, P patches, K visible patches, Y numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from triptych.checkpoints.configs import from_json
from triptych.data.loader import read_once
from triptych.data.pictures import file_record, is_video, show, stack
from triptych.data.pipelines import Example, ImageTextPipeline
from triptych.data.samples import clean_caption
from triptych.data.sources import Source
from triptych.objectives.distributed import StepNoise
from triptych.objectives.masked_signal import (
    MaskedSignalConfig,
    check_paints,
    normalise_patches,
    patches_of,
    picture_of,
    restore_patches,
    visible_patches,
)
from triptych.predict import Predictor
from triptych.training.parallel import autocast

Against = Literal["none", "empty", "wrong"]
"""What pictures are painted by beside their own text: nothing, no text, or the text of another."""

_AT_ONCE = 32
_GREY = 128
_GAP, _FONT, _SMALLEST = 8, 14, 176
_INK, _PAPER = (20, 20, 20), (255, 255, 255)
_BESIDE = {"empty": "painted without a text", "wrong": "painted by another text"}


@dataclass(frozen=True)
class Picture:
    """What is to be painted: uint8 pixels [C, H, W] as the model sees them, and the text that goes with it, if any."""

    name: str
    pixels_CHW: Tensor
    text: str


@dataclass(frozen=True)
class Painting:
    """A picture (uint8) whose hidden patches were painted by a text; ``error`` is their ``mim`` loss."""

    text: str
    pixels_CHW: Tensor
    error: float


@dataclass(frozen=True)
class Reconstruction:
    """A picture, what the model saw of it (uint8, hidden patches grey), and what it made of that by each text.

    Attributes:
        paintings: the first is by the picture's own text.
    """

    picture: Picture
    seen_CHW: Tensor
    paintings: tuple[Painting, ...]


def pictures_of_files(predictor: Predictor, paths: Sequence[Path], texts: Sequence[str]) -> list[Picture]:
    """Picture files with one text for all, one for each, or none.

    Raises:
        ValueError: another number of texts, or a video.
        BrokenSample: a file cannot be read.
    """
    if len(texts) not in (0, 1, len(paths)):
        raise ValueError(f"give one text for all, or one for each of the {len(paths)} pictures, not {len(texts)}")
    if any(map(is_video, paths)):
        raise ValueError("pictures are reconstructed, not videos")
    model, preprocessing = predictor.model, predictor.preprocessing
    transform = preprocessing.test_transform()
    cleaned = [clean_caption(text, model.cleaning, model.max_text) for text in texts] or [""]
    own = cleaned * len(paths) if len(cleaned) == 1 else cleaned
    return [
        Picture(str(path), show(file_record(path), transform, preprocessing.frames), text)
        for path, text in zip(paths, own, strict=True)
    ]


def pictures_of_data(predictor: Predictor, source: Source, count: int) -> list[Picture]:
    """The first ``count`` pictures of a data set that have a caption, with one of theirs.

    Raises:
        ValueError: there are none.
    """
    model, preprocessing = predictor.model, predictor.preprocessing
    pipeline = ImageTextPipeline(
        predictor.tokenizer,
        preprocessing.test_transform(),
        max_words=model.max_text,
        cleaning=model.cleaning,
        frames=preprocessing.frames,
    )

    def examples() -> Iterator[Example]:
        for some in read_once(source, pipeline.prepare, list, batch_size=min(count, _AT_ONCE)):
            yield from some

    found = [Picture(one.record.image_id, one.pixels, one.captions[0]) for one in islice(examples(), count)]
    if not found:
        raise ValueError("the data have no picture")
    return found


def reconstruct(
    predictor: Predictor,
    pictures: Sequence[Picture],
    *,
    ratio: float | None = None,
    seed: int = 0,
    against: Against = "none",
) -> list[Reconstruction]:
    """Hide patches of pictures and let the model paint them.

    Args:
        ratio: share of the patches that is hidden; by default as the checkpoint was trained, or 0.75.
        seed: which are hidden depends on it and on the picture's place in the list alone.
        against: by what else they are painted, with the same patches hidden.

    Raises:
        ValueError: the model has no decoder of pixels, a video is among the pictures, or there are no two texts for
            ``against``.
    """
    check_paints(predictor.model)
    trained = from_json(MaskedSignalConfig, predictor.settings.get("masked_signal", {}), "task.masked_signal")
    ratio = trained.image_ratio if ratio is None else ratio
    if not 0 < ratio < 1:
        raise ValueError(f"the ratio must be between 0 and 1, not {ratio}")
    if any(picture.pixels_CHW.dim() != 3 for picture in pictures):
        raise ValueError("pictures are reconstructed, not videos or several pictures at once")
    texts = [[picture.text for picture in pictures]]
    if against != "none":
        texts.append(_other_texts(texts[0], against))
    found: list[Reconstruction] = []
    for start in range(0, len(pictures), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        pixels_BCHW = stack([picture.pixels_CHW for picture in pictures[some]])
        kept_BK = _visible(predictor, pixels_BCHW, ratio, seed, start)
        painted = [_paint(predictor, pixels_BCHW, own[some], kept_BK, trained.normalise_pixels) for own in texts]
        seen_BCHW = _shown(pixels_BCHW, torch.full_like(pixels_BCHW, _GREY), kept_BK, predictor.model.patch)
        found += [
            Reconstruction(picture, seen_CHW, tuple(paintings))
            for picture, seen_CHW, *paintings in zip(pictures[some], seen_BCHW, *painted, strict=True)
        ]
    return found


def _other_texts(texts: Sequence[str], against: Against) -> list[str]:
    """The text of each picture's wrong painting: none, or the next of another picture that differs."""
    if not any(texts):
        raise ValueError("the pictures are painted without a text already: give texts to compare that with")
    if against == "empty":
        return [""] * len(texts)
    if len(set(texts)) == 1:
        raise ValueError("a wrong text is that of another picture: give two or more with different texts")
    after = [[*texts[number + 1 :], *texts] for number in range(len(texts))]
    return [next(other for other in others if other != own) for own, others in zip(texts, after, strict=True)]


def _visible(predictor: Predictor, pixels_BCHW: Tensor, ratio: float, seed: int, first: int) -> Tensor:
    """Which patches of each picture are seen, [B, K]."""
    patches, device = math.prod(_grid(pixels_BCHW, predictor.model.patch)), torch.device("cpu")
    noises = [StepNoise(seed, first + b) for b in range(len(pixels_BCHW))]
    return visible_patches(torch.cat([noise.uniform(1, patches, device=device) for noise in noises]), ratio)


def _grid(pixels_BCHW: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    return pixels_BCHW.shape[2] // patch, pixels_BCHW.shape[3] // patch


@torch.no_grad()
def _paint(
    predictor: Predictor, pixels_BCHW: Tensor, texts: Sequence[str], kept_BK: Tensor, normalised: bool
) -> list[Painting]:
    """The pictures with the patches that are not visible painted by the texts."""
    model, preprocessing, device = predictor.model, predictor.preprocessing, predictor.device
    grid, patch = _grid(pixels_BCHW, model.patch), model.patch
    ids_BL, mask_BL = predictor.tokenizer.encode_batch(texts, max_length=model.max_text, end=model.ends_texts)
    target_BCHW = preprocessing.normalize(pixels_BCHW)
    with autocast(device, predictor.precision):
        visible = model.encode_visible(target_BCHW.to(device), kept_BK.to(device))
        fused = model.fuse(visible, model.encode_text(ids_BL.to(device), mask_BL.to(device)))
        painted_BPY = model.paint(fused, kept_BK.to(device), grid).float().cpu()
    target_BPY = patches_of(target_BCHW, patch)
    wanted_BPY = normalise_patches(target_BPY) if normalised else target_BPY
    hidden_BP = torch.ones(painted_BPY.shape[:2]).scatter(1, kept_BK, 0.0)
    error_B = ((painted_BPY - wanted_BPY).square().mean(-1) * hidden_BP).sum(1) / hidden_BP.sum(1)
    if normalised:
        painted_BPY = restore_patches(painted_BPY, target_BPY)
    mean_C11, std_C11 = (torch.tensor(x).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    colours_BCHW = (picture_of(painted_BPY, grid, patch) * std_C11 + mean_C11) * 255
    painted_BCHW = _shown(pixels_BCHW, colours_BCHW.round().clamp(0, 255).to(torch.uint8), kept_BK, patch)
    return [
        Painting(text, pixels_CHW, float(error))
        for text, pixels_CHW, error in zip(texts, painted_BCHW, error_B, strict=True)
    ]


def _shown(pixels_BCHW: Tensor, instead_BCHW: Tensor, kept_BK: Tensor, patch: int) -> Tensor:
    """The pictures where they are visible, and something else where they are not."""
    patches_BPY, instead_BPY = patches_of(pixels_BCHW, patch), patches_of(instead_BCHW, patch)
    kept_BP = torch.zeros(patches_BPY.shape[:2], dtype=torch.bool).scatter(1, kept_BK, True)
    together_BPY = torch.where(kept_BP[:, :, None], patches_BPY, instead_BPY)
    return picture_of(together_BPY, _grid(pixels_BCHW, patch), patch)


def draw_sheet(found: Sequence[Reconstruction], against: Against = "none") -> Image.Image:
    """A row for each picture: itself, what was seen of it, and the paintings with their errors; its texts below."""
    has_text = any(one.picture.text for one in found)
    heads = ["picture", "what is seen", "painted by its text" if has_text else "painted"]
    heads += [] if against == "none" else [_BESIDE[against]]
    font = ImageFont.load_default(_FONT)
    line = math.ceil(_FONT * 1.4)
    original = found[0].picture.pixels_CHW
    enlarged = max(1, math.ceil(_SMALLEST / original.shape[2]))
    height, width = original.shape[1] * enlarged, original.shape[2] * enlarged
    whole = len(heads) * (width + _GAP) - _GAP
    texts = [_texts(one, against, font, whole) for one in found]
    tall = [height + line * (1 + len(lines)) + 2 * _GAP for lines in texts]
    sheet = Image.new("RGB", (whole + 2 * _GAP, line + 2 * _GAP + sum(tall)), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    left = [_GAP + column * (width + _GAP) for column in range(len(heads))]
    for x, head in zip(left, heads, strict=True):
        canvas.text((x, _GAP), head, _INK, font)
    y = line + 2 * _GAP
    for one, lines, own_height in zip(found, texts, tall, strict=True):
        shown = [one.picture.pixels_CHW, one.seen_CHW, *(painting.pixels_CHW for painting in one.paintings)]
        for x, pixels_CHW in zip(left, shown, strict=True):
            image = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for x, painting in zip(left[2:], one.paintings, strict=True):
            canvas.text((x, y + height), f"error {painting.error:.4f}", _INK, font)
        for number, text in enumerate(lines, 1):
            canvas.text((_GAP, y + height + number * line), text, _INK, font)
        y += own_height
    return sheet


def _texts(
    one: Reconstruction, against: Against, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """The lines below a row: its text, and another that it was painted by."""
    lines = _wrapped(one.picture.text, font, width)
    if against == "wrong":
        lines += _wrapped(f"another: {one.paintings[1].text}", font, width)
    return lines


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
