"""Reconstructions: what is hidden, that colours come back as they were, whose text is whose, and the sheet.

Shape legend: B batch, C channels, H height, W width, P patches, K visible patches, Y numbers of a patch.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from triptych import cli, reconstruction
from triptych.checkpoints.folder import save_folder
from triptych.data.samples import BrokenSample
from triptych.data.sources import open_source
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import Preprocessing
from triptych.models.eve import Eve, EveConfig, PixelDecoderConfig
from triptych.models.moe import MoEConfig
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.objectives.masked_signal import MaskedSignalConfig, normalise_patches, patches_of
from triptych.predict import Predictor
from triptych.reconstruction import (
    Picture,
    Reconstruction,
    draw_sheet,
    pictures_of_data,
    pictures_of_files,
    reconstruct,
)

PATCH, SIDE = 8, 32
PIXELS = Preprocessing(SIDE, (0.5, 0.4, 0.3), (0.2, 0.5, 0.3))
TEXTS = ("a red picture", "a small green star", "two blue circles")
VISION = VisionConfig(32, layers=2, heads=2, patch=PATCH, image_size=SIDE)
Load = Callable[..., Predictor]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([*TEXTS * 5], 60)


def text_config(tokenizer: Tokenizer) -> TextConfig:
    return TextConfig(tokenizer.vocab_size, 32, 2, 48, max_positions=16)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EVE with random weights, as if it had been pre-trained."""
    torch.manual_seed(3)
    decoder = PixelDecoderConfig(16, layers=1, heads=2)
    config = EveConfig(VISION, text_config(tokenizer), 1, moe=MoEConfig(2), embed_dim=8, pixel_decoder=decoder)
    model = Eve(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    task = {"masked_signal": dataclasses.asdict(MaskedSignalConfig(image_ratio=0.5))}
    return save_folder(tmp_path_factory.mktemp("eve") / "model", model, tokenizer, PIXELS, task=task)


@pytest.fixture
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder, precision="fp32")


@pytest.fixture
def pictures() -> list[Picture]:
    generator = torch.Generator().manual_seed(4)
    pixels_BCHW = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return [Picture(f"{number}", *both) for number, both in enumerate(zip(pixels_BCHW, TEXTS, strict=True))]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two pictures that are not square."""
    for name, size in (("wide", (90, 40)), ("tall", (20, 61))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    return [tmp_path / "wide.png", tmp_path / "tall.png"]


@pytest.fixture
def data(files: list[Path], tmp_path: Path) -> str:
    """A list of four: the second has no caption, the third no file."""
    rows: list[dict[str, Any]] = [
        {"image": str(files[0]), "caption": "A red picture."},
        {"image": str(files[1]), "caption": ""},
        {"image": str(tmp_path / "lost.png"), "caption": "lost"},
        {"image": str(files[1]), "caption": "two blue circles"},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hidden_patches(one: Reconstruction) -> Tensor:
    """Which patches are hidden, bool [P]; the others are those of the picture."""
    seen_PY, own_PY = (patches_of(x[None], PATCH)[0] for x in (one.seen_CHW, one.picture.pixels_CHW))
    hidden_P = (seen_PY == 128).all(1)
    assert torch.equal(seen_PY[~hidden_P], own_PY[~hidden_P])
    return hidden_P


def hidden_of(one: Reconstruction, pixels_CHW: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of a picture where the original was hidden, and where it was seen."""
    hidden_P = hidden_patches(one)
    patches_PY = patches_of(pixels_CHW[None], PATCH)[0]
    return patches_PY[hidden_P], patches_PY[~hidden_P]


# --- painting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "hidden"), [(None, 8), (0.75, 12), (0.9, 15)])
def test_what_is_hidden_is_painted_and_the_rest_stays(
    predictor: Predictor, pictures: list[Picture], ratio: float | None, hidden: int
) -> None:
    """By default as many patches are hidden as in training."""
    for one in reconstruct(predictor, pictures, ratio=ratio):
        (painting,) = one.paintings
        assert painting.text == one.picture.text
        hidden_XY, seen_XY = hidden_of(one, painting.pixels_CHW)
        assert len(hidden_XY) == hidden
        originals_XY, kept_XY = hidden_of(one, one.picture.pixels_CHW)
        assert torch.equal(seen_XY, kept_XY)
        assert not torch.equal(hidden_XY, originals_XY)


@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
def test_a_perfect_decoder_gives_the_picture_back(
    predictor: Predictor, pictures: list[Picture], normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The colours are put back as the checkpoint says they were taken out, and its error is none."""
    settings = dataclasses.asdict(MaskedSignalConfig(normalise_pixels=normalised))
    predictor = dataclasses.replace(predictor, settings={"masked_signal": settings})
    target_BPY = patches_of(PIXELS.normalize(torch.stack([picture.pixels_CHW for picture in pictures])), PATCH)
    target_BPY = normalise_patches(target_BPY) if normalised else target_BPY
    monkeypatch.setattr(predictor.model, "paint", lambda *_: target_BPY)
    for one in reconstruct(predictor, pictures):
        assert torch.equal(one.paintings[0].pixels_CHW, one.picture.pixels_CHW)
        assert one.paintings[0].error < 1e-10
    monkeypatch.setattr(predictor.model, "paint", lambda *_: target_BPY + 0.5)
    assert [one.paintings[0].error for one in reconstruct(predictor, pictures)] == pytest.approx([0.25] * 3)


def test_colours_beyond_the_range_are_cut(
    predictor: Predictor, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, colour in ((100.0, 255), (-100.0, 0)):
        painted_BPY = torch.full((3, 16, 3 * PATCH**2), value)
        monkeypatch.setattr(predictor.model, "paint", lambda *_, painted_BPY=painted_BPY: painted_BPY)
        for one in reconstruct(predictor, pictures):
            assert (hidden_of(one, one.paintings[0].pixels_CHW)[0] == colour).all()


def test_pictures_are_painted_each_for_itself(
    predictor: Predictor, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at once or few: what is hidden depends on the seed and on the place in the list alone."""

    def painted(count: int, seed: int = 0) -> list[Reconstruction]:
        return reconstruct(predictor, pictures[:count], seed=seed)

    together, other = painted(3), painted(3, seed=1)
    monkeypatch.setattr(reconstruction, "_AT_ONCE", 2)
    for one, alone in zip(together, painted(3), strict=True):
        assert torch.equal(one.seen_CHW, alone.seen_CHW)
        torch.testing.assert_close(one.paintings[0].error, alone.paintings[0].error, rtol=1e-5, atol=1e-6)
    assert torch.equal(painted(1)[0].seen_CHW, together[0].seen_CHW)
    assert len({tuple(hidden_patches(one).tolist()) for one in (*together, *other)}) == 6


def test_texts_are_compared_with_the_same_patches_hidden(predictor: Predictor, pictures: list[Picture]) -> None:
    wrong = reconstruct(predictor, pictures, against="wrong")
    assert [one.paintings[1].text for one in wrong] == [TEXTS[1], TEXTS[2], TEXTS[0]]
    pictures[2] = dataclasses.replace(pictures[2], text=TEXTS[0])  # the next one that differs
    wrong = reconstruct(predictor, pictures, against="wrong")
    assert [one.paintings[1].text for one in wrong] == [TEXTS[1], TEXTS[0], TEXTS[1]]
    empty = reconstruct(predictor, pictures, against="empty")
    assert [one.paintings[1].text for one in empty] == ["", "", ""]
    without = reconstruct(predictor, [dataclasses.replace(picture, text="") for picture in pictures])
    for number, one in enumerate(empty):
        assert torch.equal(one.paintings[0].pixels_CHW, wrong[number].paintings[0].pixels_CHW)
        assert torch.equal(one.paintings[1].pixels_CHW, without[number].paintings[0].pixels_CHW)
        errors = {painting.error for painting in (*one.paintings, wrong[number].paintings[1])}
        assert len(errors) == 3


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, {"ratio": 0.0}, "the ratio must be between 0 and 1, not 0.0"),
        (TEXTS, {"ratio": 1.0}, "the ratio must be between 0 and 1, not 1.0"),
        (["", "", ""], {"against": "empty"}, "painted without a text already"),
        (["one"] * 3, {"against": "wrong"}, "give two or more with different texts"),
    ],
)
def test_what_cannot_be_painted(
    predictor: Predictor, pictures: list[Picture], texts: Sequence[str], options: dict[str, Any], message: str
) -> None:
    asked = [dataclasses.replace(picture, text=text) for picture, text in zip(pictures, texts, strict=True)]
    with pytest.raises(ValueError, match=message):
        reconstruct(predictor, asked, **options)


def test_other_networks_cannot_paint(predictor: Predictor, pictures: list[Picture]) -> None:
    model = MPlug(MPlugConfig(VISION, text_config(predictor.tokenizer), fusion_layers=2, stride=1))
    with pytest.raises(ValueError, match="this mplug has no pixel_decoder"):
        reconstruct(dataclasses.replace(predictor, model=model), pictures)
    clips = [dataclasses.replace(pictures[0], pixels_CHW=pictures[0].pixels_CHW[None])]
    with pytest.raises(ValueError, match="pictures are reconstructed, not videos"):
        reconstruct(predictor, clips)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_pictures_of_files(predictor: Predictor, files: list[Path]) -> None:
    for texts, expected in (([], ["", ""]), (["A star!"], ["a star!"] * 2), (["one", "two"], ["one", "two"])):
        found = pictures_of_files(predictor, files, [text.lower() for text in texts])
        assert [picture.name for picture in found] == [str(path) for path in files]
        assert [picture.pixels_CHW.shape for picture in found] == [(3, SIDE, SIDE)] * 2
        assert [picture.text for picture in found] == [text.replace("!", "") for text in expected]
    with pytest.raises(ValueError, match="one for each of the 2 pictures, not 3"):
        pictures_of_files(predictor, files, TEXTS)
    with pytest.raises(ValueError, match="not videos"):
        pictures_of_files(predictor, [Path("clip.mp4")], [])
    with pytest.raises(BrokenSample, match=r"lost\.png: cannot read"):
        pictures_of_files(predictor, [files[0].with_name("lost.png")], [])


def test_pictures_of_data(predictor: Predictor, data: str, files: list[Path]) -> None:
    source = open_source([data])
    assert [picture.text for picture in pictures_of_data(predictor, source, 1)] == ["a red picture"]
    found = pictures_of_data(predictor, source, 5)
    assert [picture.text for picture in found] == ["a red picture", "two blue circles"]
    assert [picture.name for picture in found] == [str(path) for path in files]


# --- the sheet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["none", "empty", "wrong"])
def test_the_sheet_shows_everything(predictor: Predictor, pictures: list[Picture], against: Any) -> None:
    found = reconstruct(predictor, pictures, against=against)
    sheet_HWC = np.asarray(draw_sheet(found, against))
    columns = 3 if against == "none" else 4
    enlarged = 192  # 6 times
    assert sheet_HWC.shape[1] == columns * (enlarged + 8) + 8
    top, tops = 0, []
    for one in found:
        shown = [one.picture.pixels_CHW, one.seen_CHW, *(painting.pixels_CHW for painting in one.paintings)]
        assert len(shown) == columns
        large = [pixels_CHW.permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1) for pixels_CHW in shown]
        top = next(y for y in range(top, len(sheet_HWC)) if (sheet_HWC[y : y + enlarged, 8:200] == large[0]).all())
        for column, picture_HWC in enumerate(large):
            left = 8 + column * (enlarged + 8)
            assert (sheet_HWC[top : top + enlarged, left : left + enlarged] == picture_HWC).all()
        tops.append(top)
        top += enlarged
    assert len(set(np.diff(tops))) == 1
    between_HWC = sheet_HWC[tops[0] + enlarged : tops[1]]
    below = (between_HWC < 128).any(-1)
    assert below[:20, 8 + 2 * (enlarged + 8) :].any()  # the error
    assert below[20:40, 8:100].any()  # the text
    assert below[40:].any() == (against == "wrong")  # the other text
    assert (sheet_HWC[: tops[0]] < 128).any()  # the heads


def test_long_texts_are_wrapped(predictor: Predictor, pictures: list[Picture]) -> None:
    (one,) = reconstruct(predictor, pictures[:1])
    short = draw_sheet([one])
    long = dataclasses.replace(one, picture=dataclasses.replace(one.picture, text="blue " * 60))
    tall = draw_sheet([long])
    assert tall.width == short.width
    assert tall.height > short.height + 40
    nothing = draw_sheet([dataclasses.replace(one, picture=dataclasses.replace(one.picture, text=""))])
    assert nothing.height < short.height


# --- the command --------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    cli.main(["reconstruct", *map(str, arguments)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_with_files(
    capsys: pytest.CaptureFixture[str], folder: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "sheet.png"
    common = ("--checkpoint", folder, "--out", out, "--precision", "fp32")
    lines = command(capsys, *files, *common, "--text", TEXTS[0], TEXTS[1], "--against", "wrong", "--ratio", 0.75)
    assert [(line["image"], line["text"]) for line in lines] == list(zip(map(str, files), TEXTS, strict=False))
    assert [line["against"]["text"] for line in lines] == [TEXTS[1], TEXTS[0]]
    assert all(line["error"] > 0 and line["against"]["error"] > 0 for line in lines)
    assert Image.open(out).width == 4 * 200 + 8
    (line,) = command(capsys, files[0], *common)
    assert set(line) == {"image", "text", "error"}
    assert Image.open(out).width == 3 * 200 + 8


def test_the_command_with_data(capsys: pytest.CaptureFixture[str], folder: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "sheet.jpg"
    lines = command(capsys, "--data", data, "--checkpoint", folder, "--out", out, "--count", 2, "--against", "empty")
    assert [line["text"] for line in lines] == ["a red picture", "two blue circles"]
    assert Image.open(out).format == "JPEG"


def test_what_the_command_refuses(
    capsys: pytest.CaptureFixture[str], folder: Path, files: list[Path], data: str, tmp_path: Path
) -> None:
    out = tmp_path / "sheet.png"
    refused: list[tuple[tuple[object, ...], str]] = [
        (("--out", out), "give either files or --data"),
        ((files[0], "--data", data, "--out", out), "give either files or --data"),
        (("--data", data, "--text", "x", "--out", out), "--text is for files"),
        (("--data", data, "--count", 0, "--out", out), "--count must be at least 1, not 0"),
        ((files[0], "--out", tmp_path / "no" / "sheet.png"), "there is no folder"),
        ((files[0], "--out", tmp_path / "sheet.txt"), "must end as pictures do"),
        ((tmp_path / "lost.png", "--out", out), "lost.png: cannot read"),
        ((files[0], "--out", out, "--ratio", 2), "the ratio must be between 0 and 1, not 2.0"),
    ]
    for arguments, message in refused:
        with pytest.raises(SystemExit) as ended:
            command(capsys, *arguments, "--checkpoint", folder)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
