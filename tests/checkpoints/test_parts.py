from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triptych.checkpoints.bert import Bert, BertConfig
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import save_folder
from triptych.checkpoints.parts import initialise
from triptych.models.bridgetower import BridgeTower, BridgeTowerConfig
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.vision import VisionTransformer, resize_positions


@pytest.fixture
def parts(tmp_path: Path, config: MPlugConfig) -> tuple[VisionTransformer, Bert, Path, Path]:
    """A CLIP image encoder at another resolution and a BERT of 5 layers, saved."""
    vision = VisionTransformer(replace(config.vision, image_size=32))
    bert = Bert(BertConfig(config.text, layers=5))
    for parameter in [*vision.parameters(), *bert.parameters()]:
        torch.nn.init.normal_(parameter)
    return vision, bert, save_folder(tmp_path / "clip", vision), save_folder(tmp_path / "bert", bert)


def test_where_the_paper_starts(model: MPlug, parts: tuple[VisionTransformer, Bert, Path, Path]) -> None:
    vision, bert, clip_folder, bert_folder = parts
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialise(model, clip_folder, bert_folder)
    after, theirs = model.state_dict(), bert.state_dict()

    for name, tensor in vision.state_dict().items():
        if name != "position_embedding":
            assert torch.equal(after[f"vision.{name}"], tensor)
    assert torch.equal(model.vision.position_embedding, resize_positions(vision.position_embedding, (2, 2)))
    for stack, first in (("text.blocks", 0), ("decoder.blocks", 0), ("fusion.layers", 2)):
        layers = {"text.blocks": 2, "decoder.blocks": 2, "fusion.layers": 3}[stack]
        for i in range(layers):
            ours = f"{stack}.{i}.block" if stack == "fusion.layers" else f"{stack}.{i}"
            for part in ("attention.query.weight", "attention_norm.bias", "ffn.contract.weight", "ffn_norm.weight"):
                assert torch.equal(after[f"{ours}.{part}"], theirs[f"encoder.blocks.{first + i}.{part}"])
    for target in ("text.embeddings", "decoder.embeddings"):
        assert torch.equal(after[f"{target}.segment"], theirs["encoder.embeddings.segment"])
    assert torch.equal(after["masked_head.word.weight"], theirs["encoder.embeddings.word.weight"])
    assert torch.equal(after["decoder.head.transform.weight"], theirs["head.transform.weight"])
    assert torch.equal(after["masked_head.head.bias"], theirs["head.bias"])

    untouched = {name for name in before if torch.equal(before[name], after[name])}
    missing = {entry.name for entry in report.missing}
    assert missing == {
        name
        for name in before
        if "cross" in name or name.split(".")[0] in ("image_projection", "text_projection", "match_head", "temperature")
    }
    assert untouched == missing
    assert {mapped.name for mapped in report.mapped} == before.keys() - missing


def test_the_official_zero_position_table(model: MPlug, parts: tuple[VisionTransformer, Bert, Path, Path]) -> None:
    report = initialise(model, parts[2], zero_positions=True)
    assert not model.vision.position_embedding.any()
    assert model.vision.position_embedding.requires_grad
    assert any("zero" in note for note in report.notes)
    assert any(entry.name.startswith("text.") for entry in report.missing)


@pytest.mark.parametrize("kind", ["co_attention", "connected", "asymmetric"])
def test_every_kind_of_fusion(
    config: MPlugConfig, parts: tuple[VisionTransformer, Bert, Path, Path], kind: str
) -> None:
    model = MPlug(replace(config, fusion=kind))
    report = initialise(model, parts[3])
    missing = [entry.name for entry in report.missing if entry.name.startswith("fusion.")]
    assert all("cross" in name for name in missing)
    assert bool(missing) == (kind != "connected")


def test_a_bert_without_head(tmp_path: Path, config: MPlugConfig, model: MPlug) -> None:
    folder = save_folder(tmp_path / "bare", Bert(BertConfig(config.text, layers=3, head=False)))
    report = initialise(model, folder)
    assert "decoder.head.bias" in {entry.name for entry in report.missing}


def test_parts_that_do_not_fit(
    tmp_path: Path, config: MPlugConfig, model: MPlug, parts: tuple[VisionTransformer, Bert, Path, Path]
) -> None:
    def said(*folders: Path, into: MPlug = model) -> str:
        with pytest.raises(CheckpointError) as caught:
            initialise(into, *folders)
        return str(caught.value)

    assert "at least one folder" in said()
    assert "second bert part" in said(parts[3], parts[3])
    assert "holds a mplug" in said(save_folder(tmp_path / "whole", model))
    deep = MPlug(replace(config, text_layers=6))
    assert "has 5 layers; the model's deepest stack has 6" in said(parts[3], into=deep)
    wide = MPlug(replace(config, text=replace(config.text, ffn=128)))
    assert "text side's ffn is 64 in this part but 128" in said(parts[3], into=wide)
    narrow = MPlug(replace(config, vision=replace(config.vision, heads=4)))
    assert "image encoder's heads is 2 in this part but 4" in said(parts[2], into=narrow)
    other = MPlug(replace(config, text=replace(config.text, max_positions=18)))
    roberta = Bert(BertConfig(replace(config.text, max_positions=18, first_position=2), layers=5))
    assert "text side's first_position is 2 in this part but 0" in said(
        save_folder(tmp_path / "r", roberta), into=other
    )
    stem = MPlug(replace(config, vision=replace(config.vision, stem="convolution")))
    assert "image encoder's stem is patch in this part but convolution" in said(parts[2], into=stem)


# -------------------------------------------------------------------------------------------------- BridgeTower


@pytest.fixture
def bridged(config: MPlugConfig) -> BridgeTowerConfig:
    """A small BridgeTower with a decoder."""
    return BridgeTowerConfig(
        replace(config.vision, layers=3, interpolation="bicubic"),
        replace(config.text, max_positions=18, layer_norm_eps=1e-5, first_position=2),
        text_layers=3,
        fusion_layers=2,
        embed_dim=8,
        decoder_layers=2,
    )


@pytest.fixture
def towers(tmp_path: Path, bridged: BridgeTowerConfig) -> tuple[VisionTransformer, Bert, Path, Path]:
    """A CLIP image encoder at another resolution, as converted, and a RoBERTa, saved."""
    vision = VisionTransformer(replace(bridged.vision, image_size=32, interpolation="bilinear"))
    roberta = Bert(BertConfig(bridged.text, layers=3))
    for parameter in [*vision.parameters(), *roberta.parameters()]:
        torch.nn.init.normal_(parameter)
    return vision, roberta, save_folder(tmp_path / "clip", vision), save_folder(tmp_path / "roberta", roberta)


@pytest.mark.parametrize("decoder_layers", [0, 2])
def test_where_bridgetower_starts(
    bridged: BridgeTowerConfig, towers: tuple[VisionTransformer, Bert, Path, Path], decoder_layers: int
) -> None:
    model = BridgeTower(replace(bridged, decoder_layers=decoder_layers)).eval()
    vision, roberta, clip_folder, roberta_folder = towers
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialise(model, clip_folder, roberta_folder)
    after = model.state_dict()

    ids_BL, mask_BL = torch.tensor([[0, 5, 9, 2], [0, 7, 2, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    pixels_BCHW = torch.randn(2, 3, 16, 16)
    table_ND = resize_positions(vision.position_embedding, (2, 2), "bicubic")
    assert torch.equal(model.vision.position_embedding, table_ND)
    assert not torch.equal(table_ND, resize_positions(vision.position_embedding, (2, 2), "bilinear"))
    vision.position_embedding = torch.nn.Parameter(table_ND)
    with torch.inference_mode():
        assert torch.equal(model.text(ids_BL, mask_BL), roberta.eval().encoder(ids_BL, mask_BL))
        assert torch.equal(model.vision(pixels_BCHW), vision.eval()(pixels_BCHW))
    if decoder_layers:
        assert model.decoder is not None
        theirs = roberta.state_dict()
        for name, tensor in model.decoder.state_dict().items():
            if "cross" not in name:
                source = name if name.startswith("head.") else f"encoder.{name}"
                assert torch.equal(tensor, theirs[source])

    missing = {entry.name for entry in report.missing}
    started = ("vision", "text", "decoder")
    assert missing == {
        name for name in before if name.split(".")[0] not in started or ("decoder" in name and "cross" in name)
    }
    assert {name for name in before if torch.equal(before[name], after[name])} == missing
    assert any(name.startswith("masked_head.") for name in missing)


def test_towers_that_do_not_fit(
    bridged: BridgeTowerConfig, towers: tuple[VisionTransformer, Bert, Path, Path], model: MPlug
) -> None:
    deep = BridgeTower(replace(bridged, text_layers=4))
    with pytest.raises(CheckpointError, match="has 3 layers; the model's deepest stack has 4"):
        initialise(deep, towers[3])
    with pytest.raises(CheckpointError, match="text side's max_positions is 18 in this part but 16"):
        initialise(model, towers[3])
    with pytest.raises(CheckpointError, match="image encoder's layers is 3 in this part but 2"):
        initialise(model, towers[2])
