"""Which expert works for which modality: counted, tabled and drawn."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import Tensor

from triptych import cli
from triptych.checkpoints.folder import save_folder
from triptych.data.pictures import read_pictures
from triptych.data.samples import all_texts, clean_caption
from triptych.data.shapes import Split, write_shards
from triptych.data.sources import ListShard, Source, open_source
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.expert_load import LayerLoad, draw, expert_load, table
from triptych.models.eve import Eve, EveConfig
from triptych.models.moe import MoEConfig, SoftMoE
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.predict import Predictor
from triptych.tasks.captioning import CaptioningConfig
from triptych.tasks.retrieval import RetrievalConfig

PIXELS = Preprocessing(32, HALF, HALF)
LAYERS = ["network.blocks.1.ffn.moe", "network.blocks.2.ffn.moe"]
IMAGE_TOKENS, PICTURES = 17, 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, Split.TEST, PICTURES, shard_size=PICTURES, size=32)
    return folder


@pytest.fixture(scope="module")
def source(shards: Path) -> Source:
    return open_source((str(shards / "test-*.tar"),))


@pytest.fixture(scope="module")
def tokenizer(source: Source) -> Tokenizer:
    return train_wordpiece([text for record in source for text in all_texts(record)], 128)


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Callable[..., Predictor]:
    """``make(**changes of the mixture)``: three blocks, of which the upper two have soft routers."""

    def make(deep: str = "soft", **changes: Any) -> Predictor:
        torch.manual_seed(0)
        vision = VisionConfig(32, layers=3, heads=2, patch=8, image_size=32, layer_norm_eps=1e-6)
        text = TextConfig(tokenizer.vocab_size, 32, 2, 48, max_positions=40, activation="quick_gelu")
        moe = dataclasses.replace(MoEConfig(4), **changes)
        model = Eve(EveConfig(vision, text, deep=deep, moe=moe, layer_scale=1.0, embed_dim=16)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.modality")):
                torch.nn.init.normal_(parameter)
        captioning = CaptioningConfig(context="fused")
        return Predictor(model, tokenizer, PIXELS, captioning, RetrievalConfig(max_tokens=40), precision="fp32")

    return make


def texts_of(predictor: Predictor, source: Source) -> list[list[str]]:
    cleaning, words = predictor.model.cleaning, predictor.retrieval.max_words
    return [[clean_caption(text, cleaning, words) for text in record.captions] for record in source]


@torch.no_grad()
def counted(predictor: Predictor, source: Source) -> dict[str, Tensor]:
    """Choices of each modality and expert, pair by pair: what the routers say, and not what they report."""
    model, found = predictor.model, {layer: torch.zeros(2, 4) for layer in LAYERS}
    handles = []
    for layer in LAYERS:
        moe = model.get_submodule(layer)
        assert isinstance(moe, SoftMoE)

        def count(module: Any, inputs: Any, outputs: Any, layer: str = layer) -> None:
            for modality, experts in zip(inputs[1].tolist(), outputs[0].expert_SK.tolist(), strict=True):
                for expert in experts:
                    found[layer][modality, expert] += 1

        handles.append(moe.router.register_forward_hook(count))
    ((_, pixels),) = read_pictures(source, PIXELS)
    for row, texts in enumerate(texts_of(predictor, source)):
        image = model.encode_image(PIXELS.normalize(pixels[row : row + 1]))
        for text in texts:
            model.fuse(image, model.encode_text(*predictor.tokenizer.encode_batch([text], max_length=40, end=True)))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("changes", [{}, {"route_padding": True}, {"top_k": 1}], ids=str)
def test_shares_are_those_of_the_routers(changes: Any, make: Callable[..., Predictor], source: Source) -> None:
    """Also where padding is routed: it is never counted."""
    predictor = make(**changes)
    texts = texts_of(predictor, source)
    lengths = [len(text) for own in texts for text in own]
    assert len(set(lengths)) > 1
    load, expected = expert_load(predictor, source), counted(predictor, source)
    assert (load.pictures, load.pairs) == (PICTURES, len(lengths))
    assert [(layer.layer, layer.passage) for layer in load.layers] == [(layer, "fused") for layer in LAYERS]
    for layer in load.layers:
        shares_ME = expected[layer.layer] / expected[layer.layer].sum(1, keepdim=True)
        torch.testing.assert_close(torch.tensor([layer.image_E, layer.text_E]), shares_ME)
        assert layer.image_tokens == IMAGE_TOKENS * load.pairs
        chosen = predictor.model.config.moe.top_k  # type: ignore[union-attr]
        assert [layer.image_tokens, layer.text_tokens] == (expected[layer.layer].sum(1) / chosen).tolist()
        assert 0 < layer.overlap < 1
    assert all(module.routings is None for module in predictor.model.modules() if isinstance(module, SoftMoE))


def test_each_modality_alone(make: Callable[..., Predictor], source: Source) -> None:
    """A picture by itself is looked at once, however many captions it has."""
    load = expert_load(make(), source, alone=True)
    assert [layer.passage for layer in load.layers] == ["fused"] * 2 + ["alone"] * 2
    for fused, alone in zip(load.layers[:2], load.layers[2:], strict=True):
        assert alone.layer == fused.layer
        assert alone.image_tokens == IMAGE_TOKENS * PICTURES
        assert alone.text_tokens == fused.text_tokens
        assert sum(alone.image_E) == pytest.approx(1)
        assert sum(alone.text_E) == pytest.approx(1)
    assert load.layers[1].text_E != load.layers[3].text_E


def test_a_limit(make: Callable[..., Predictor], source: Source) -> None:
    load = expert_load(make(), source, limit=2)
    assert load.pictures == 2
    assert load.pairs == sum(len(record.captions) for record, _ in zip(source, range(2), strict=False))


def test_without_soft_routers(make: Callable[..., Predictor], source: Source) -> None:
    with pytest.raises(ValueError, match=r"this eve has no soft router.*deep='soft'"):
        expert_load(make(deep="hard"), source)


def test_pictures_without_captions_do_not_count(make: Callable[..., Predictor], source: Source) -> None:
    records = [record if row == 1 else dataclasses.replace(record, captions=()) for row, record in enumerate(source)]
    load = expert_load(make(), Source((ListShard("list", tuple(records)),)), alone=True)
    assert (load.pictures, load.pairs) == (1, len(records[1].captions))
    assert load.layers[2].image_tokens == IMAGE_TOKENS
    del records[1]
    with pytest.raises(ValueError, match="no picture with a caption"):
        expert_load(make(), Source((ListShard("list", tuple(records)),)))


LOADS = (
    LayerLoad("network.blocks.10.ffn.moe", "fused", (0.5, 0.0, 0.25, 0.25), (0.5, 0.5, 0.0, 0.0), 12_345, 67),
    LayerLoad("<layer>", "alone", (1.0, 0.0), (0.0, 1.0), 8, 9),
    LayerLoad("mixture", "alone", (1.0,), (0.0,), 8, 0),
)


def test_overlap_and_names() -> None:
    assert [load.overlap for load in LOADS] == [0.5, 0.0, 0.0]
    assert [load.name for load in LOADS] == ["block 11, fused", "<layer>, alone", "mixture, alone"]


def test_the_table() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table(LOADS[0]))
    lines = shown.get().splitlines()
    assert "block 11, fused (%)" in lines[0]
    assert ["image (12,345)" in line and "text (67)" in line for line in lines].count(True) == 1
    assert sum("25.0" in line for line in lines[:-1]) == 2
    assert "even: 25.0, overlap: 50" in lines[-1]


def test_the_figure_has_two_bars_an_expert_as_high_as_their_shares() -> None:
    root = ElementTree.fromstring(draw(LOADS))
    space = {"s": "http://www.w3.org/2000/svg"}
    panels = root.findall("s:g", space)
    assert len(panels) == 3
    for panel, load in zip(panels, LOADS, strict=True):
        bars = [bar for bar in panel.findall("s:rect", space) if bar.find("s:title", space) is not None]
        heights = {
            kind: [float(bar.attrib["height"]) for bar in bars if bar.attrib["class"] == kind]
            for kind in ("image", "text")
        }
        tallest = max(*heights["image"], *heights["text"]) / max(*load.image_E, *load.text_E)
        for kind, shares in (("image", load.image_E), ("text", load.text_E)):
            assert heights[kind] == pytest.approx([tallest * share for share in shares], abs=0.1)
        assert all(float(bar.attrib["y"]) >= 40 for bar in bars)
        left = [float(bar.attrib["x"]) for bar in bars]
        assert left == sorted(left)
        assert 52 <= left[0] <= left[-1] + float(bars[-1].attrib["width"]) <= 848 + 0.1
        (even,) = [line for line in panel.findall("s:line", space) if line.attrib["class"] == "even"]
        assert 196 - float(even.attrib["y1"]) == pytest.approx(tallest / len(load.image_E), abs=0.1)
    names = [panel.find("s:text", space) for panel in panels]
    assert [name.text for name in names if name is not None] == [load.name for load in LOADS]
    assert not any(math.isnan(float(bar.attrib["height"])) for bar in root.iter("{http://www.w3.org/2000/svg}rect"))


def test_the_command(
    make: Callable[..., Predictor], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = make()
    save_folder(tmp_path / "eve", predictor.model, predictor.tokenizer, PIXELS)
    save_folder(tmp_path / "hard", make(deep="hard").model, predictor.tokenizer, PIXELS)
    arguments = ["experts", "--data", str(shards / "test-*.tar"), "--precision", "fp32"]
    figure = tmp_path / "load.svg"
    cli.main([*arguments, "--checkpoint", str(tmp_path / "eve"), "--limit", "3", "--svg", str(figure)])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["pictures"] == 3
    assert [layer["layer"] for layer in found["layers"]] == LAYERS
    assert found["layers"][0].keys() == {"layer", "passage", "tokens", "image", "text", "overlap"}
    assert "block 2, fused" in err
    assert "block 3, fused" in err
    assert f"wrote {figure}" in err
    assert len(ElementTree.fromstring(figure.read_text()).findall("{http://www.w3.org/2000/svg}g")) == 2
    for wrong, said in (
        (["--checkpoint", str(tmp_path / "hard")], "this eve has no soft router"),
        (["--checkpoint", str(tmp_path / "eve"), "--svg", str(tmp_path / "no" / "load.svg")], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, *wrong])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert said in err
        assert "Traceback" not in err
