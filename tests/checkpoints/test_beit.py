"""BEiT-2's files, and EVEs that start from one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.checkpoints.beit import Beit, BeitConfig
from triptych.checkpoints.convert import convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder, save_folder
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.options import Options
from triptych.checkpoints.parts import initialise
from triptych.cli import main
from triptych.data.shapes import Split, write_shards
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.eve import Eve, EveConfig
from triptych.models.moe import MoEConfig
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig, VisionTransformer
from triptych.objectives.masked_signal import MaskedSignalConfig
from triptych.training.loop import TrainConfig
from triptych.training.optim import OptimConfig
from triptych.training.runs import DataConfig, Recipe, run_recipe

Tensors = dict[str, Tensor]
D, HEADS, FFN, LAYERS, PATCH = 32, 4, 48, 3, 8

VISION = VisionConfig(D, LAYERS, HEADS, PATCH, 32, layer_norm_eps=1e-6, interpolation="bicubic")
TEXT = TextConfig(40, D, HEADS, FFN, 20, 1e-6, attention_dropout=0.0, activation="quick_gelu")
EVE = EveConfig(VISION, TEXT, deep_layers=1, moe=MoEConfig(experts=3), embed_dim=8)


def official() -> Tensors:
    """The state dict of a pre-trained BEiT-2 (``beit2/modeling_pretrain.py``, with one of the layers for its class)."""
    tensors = {
        "cls_token": torch.randn(1, 1, D),
        "mask_token": torch.randn(1, 1, D),
        "patch_embed.proj.weight": torch.randn(D, 3, PATCH, PATCH) * 0.1,
        "patch_embed.proj.bias": torch.randn(D),
        "rel_pos_bias.relative_position_bias_table": torch.randn(7 * 7 + 3, HEADS),
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
        "norm.weight": torch.randn(D),
        "norm.bias": torch.randn(D),
        "lm_head.weight": torch.randn(10, D),
        "lm_head.bias": torch.randn(10),
    }
    for i in range(LAYERS):
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in one_block().items()}
    tensors |= {f"cls_pt_layers.0.{name}": tensor for name, tensor in one_block().items()}
    return tensors


def one_block() -> Tensors:
    return {
        "gamma_1": torch.rand(D),
        "gamma_2": torch.rand(D),
        "norm1.weight": torch.randn(D),
        "norm1.bias": torch.randn(D),
        "attn.q_bias": torch.randn(D),
        "attn.v_bias": torch.randn(D),
        "attn.qkv.weight": torch.randn(3 * D, D) * 0.1,
        "attn.proj.weight": torch.randn(D, D) * 0.1,
        "attn.proj.bias": torch.randn(D),
        "norm2.weight": torch.randn(D),
        "norm2.bias": torch.randn(D),
        "mlp.fc1.weight": torch.randn(FFN, D) * 0.1,
        "mlp.fc1.bias": torch.randn(FFN),
        "mlp.fc2.weight": torch.randn(D, FFN) * 0.1,
        "mlp.fc2.bias": torch.randn(D),
    }


def fine_tuned(tensors: Tensors) -> Tensors:
    """As ``beit2/modeling_finetune.py``: a table of positions in each block, and the norm of the mean."""
    kept = ("cls_token", "patch_embed.", "blocks.")
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(kept)}
    for i in range(LAYERS):
        found[f"blocks.{i}.attn.relative_position_bias_table"] = torch.randn(7 * 7 + 3, HEADS)
        found[f"blocks.{i}.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    found |= {"fc_norm.weight": torch.randn(D), "fc_norm.bias": torch.randn(D)}
    return found | {"head.weight": torch.randn(5, D), "head.bias": torch.randn(5)}


def forward(tensors: Tensors, pixels_BCHW: Tensor) -> Tensor:
    """States of all tokens, without relative positions."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    patch = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
    x_BND = F.conv2d(pixels_BCHW, *patch, stride=PATCH).flatten(2).transpose(1, 2)
    x_BND = torch.cat([tensors["cls_token"].expand(len(x_BND), 1, D), x_BND], dim=1)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        bias = [tensors[f"{block}.attn.q_bias"], torch.zeros(D), tensors[f"{block}.attn.v_bias"]]
        joint_BNX = F.linear(norm(x_BND, f"{block}.norm1"), tensors[f"{block}.attn.qkv.weight"], torch.cat(bias))
        query, key, value = joint_BNX.view(*x_BND.shape[:2], 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        share = (query @ key.transpose(-2, -1) * (D // HEADS) ** -0.5).softmax(-1)
        seen_BND = linear((share @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x_BND = x_BND + tensors[f"{block}.gamma_1"] * seen_BND
        hidden_BNF = F.gelu(linear(norm(x_BND, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x_BND = x_BND + tensors[f"{block}.gamma_2"] * linear(hidden_BNF, f"{block}.mlp.fc2")
    return norm(x_BND, "norm") if "norm.weight" in tensors else x_BND


def converted(tmp_path: Path, tensors: Tensors, options: Options | None = None) -> tuple[Beit, Report]:
    torch.save({"model": tensors}, tmp_path / "beitv2.pth")
    report = convert(tmp_path / "beitv2.pth", tmp_path / "part", "beit2", options)
    model = load_folder(tmp_path / "part").model
    assert isinstance(model, Beit)
    return model, report


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A converted BEiT-2."""
    converted(tmp_path, official())
    return tmp_path / "part"


def test_a_pretrained_file(tmp_path: Path) -> None:
    tensors = official()
    model, report = converted(tmp_path, tensors)
    assert model.config == BeitConfig(D, LAYERS, HEADS, FFN, PATCH)  # heads from the table of relative positions
    reasons = {dropped.name: dropped.reason for dropped in report.dropped}
    used = {source for mapped in report.mapped for source in mapped.sources}
    assert used | reasons.keys() == tensors.keys()
    assert not used & reasons.keys()
    assert {mapped.name for mapped in report.mapped} == model.state_dict().keys()
    assert (report.missing, report.unexpected) == ([], [])
    for name, said in (
        ("rel_pos_bias.relative_position_bias_table", "relative positions"),
        ("mask_token", "mask token"),
        ("lm_head.weight", "visual tokens"),
        ("cls_pt_layers.0.attn.q_bias", "pre-training alone"),
    ):
        assert said in reasons[name]
    assert any("as every expert" in note and "fresh" in note for note in report.notes)


def test_a_fine_tuned_file(tmp_path: Path) -> None:
    tensors = fine_tuned(official())
    model, report = converted(tmp_path, tensors)
    assert model.config == BeitConfig(D, LAYERS, HEADS, FFN, PATCH, norm=False)
    reasons = {dropped.name: dropped.reason for dropped in report.dropped}
    used = {source for mapped in report.mapped for source in mapped.sources}
    assert used | reasons.keys() == tensors.keys()
    assert "relative positions" in reasons["blocks.1.attn.relative_position_index"]
    assert "mean over patches" in reasons["fc_norm.bias"]
    assert "classifier of pictures" in reasons["head.weight"]
    eve = Eve(EVE)
    missing = {entry.name for entry in initialise(eve, tmp_path / "part").missing}
    assert {"network.norm.weight", "network.norm.bias"} <= missing


def test_heads_that_no_tensor_tells(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in official().items() if not name.startswith("rel_pos_bias")}
    model, _ = converted(tmp_path, tensors, Options(vision_heads=2))
    assert model.config.heads == 2
    with pytest.raises(CheckpointError, match="width 32, no multiple of 64: give --vision-heads"):
        converted(tmp_path, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shallow": "shared"},
        {"shallow": "soft", "deep_layers": 2, "moe": MoEConfig(experts=4, top_k=2, modality_routing=False)},
        {"deep": "hard"},
        {"deep_layers": 3},
    ],
)
@torch.no_grad()
def test_an_eve_starts_as_the_beit(tmp_path: Path, changes: dict[str, object]) -> None:
    """Without its own positions, type and first norm it computes on pictures what the BEiT-2 does, through any router:
    all experts are alike, and the weights of two add up to one.
    """
    tensors = official()
    converted(tmp_path, tensors)
    config = replace(EVE, vision=replace(VISION, activation="gelu"), **changes)  # type: ignore[arg-type]
    model = Eve(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialise(model, tmp_path / "part")
    after = model.state_dict()

    missing, mapped = {entry.name for entry in report.missing}, {entry.name for entry in report.mapped}
    assert missing | mapped == before.keys()
    assert not missing & mapped
    assert {name for name in before if torch.equal(before[name], after[name])} == missing
    own = ("position_embedding", "token_type", "router.gate.weight", "router.modality", "text_embeddings.word.weight")
    heads = ("image_projection", "text_projection", "temperature", "match_head", "masked_head", "text_embeddings.norm")
    assert {
        name for name in missing if not name.endswith(own) and not name.startswith((*heads, "network.pre_norm"))
    } == set()

    if config.shallow == "soft":  # its one expert has its probability for weight
        return
    model.image_embeddings.position_embedding.zero_()
    model.image_embeddings.token_type.zero_()
    model.network.pre_norm = nn.Identity()  # type: ignore[assignment]
    pixels_BCHW = torch.randn(2, 3, 32, 32)
    found_BND = model.image_states(model.encode_image(pixels_BCHW)).hidden_BLD
    torch.testing.assert_close(found_BND, forward(tensors, pixels_BCHW), atol=1e-4, rtol=1e-4)


def test_every_copy_is_of_its_block(part: Path) -> None:
    theirs = load_folder(part).model.state_dict()
    model = Eve(replace(EVE, deep_layers=2))
    report = initialise(model, part)
    ours = model.state_dict()
    for kind in ("weight", "bias"):
        source, ending = f"ffn.ffn.expand.{kind}", "" if kind == "weight" else "_bias"
        for side in ("image", "text"):
            assert torch.equal(ours[f"network.blocks.0.ffn.{side}.ffn.expand.{kind}"], theirs[f"blocks.0.{source}"])
            assert torch.equal(ours[f"network.blocks.0.ffn.{side}.norm.{kind}"], theirs[f"blocks.0.ffn.norm.{kind}"])
        for i in (1, 2):
            experts = ours[f"network.blocks.{i}.ffn.moe.experts.expand{ending}"]
            assert all(torch.equal(expert, theirs[f"blocks.{i}.{source}"]) for expert in experts)
    assert not torch.equal(theirs["blocks.1.ffn.ffn.expand.weight"], theirs["blocks.2.ffn.ffn.expand.weight"])
    sources = {entry.name: entry.sources for entry in report.mapped}
    assert sources["network.blocks.2.ffn.moe.experts.contract"] == ("blocks.2.ffn.ffn.contract.weight",)
    assert any("gelu in the BEiT-2 and quick_gelu in the model" in note for note in report.notes)


def test_a_deeper_eve_has_fresh_blocks_on_top(part: Path) -> None:
    """The paper's shared network with one more block (table 7)."""
    deep = replace(EVE, vision=replace(VISION, layers=4), deep="shared", deep_layers=2)
    report = initialise(Eve(deep), part)
    missing = {entry.name for entry in report.missing}
    assert "network.blocks.3.attention.out.weight" in missing
    assert not any(name.startswith("network.blocks.2.") for name in missing)
    assert "blocks from 3 on keep their random values: the BEiT-2 has no more" in report.notes


def test_parts_that_do_not_fit(tmp_path: Path, part: Path, config: MPlugConfig) -> None:
    def said(model: Eve | MPlug, *folders: Path, zero_positions: bool = False) -> str:
        with pytest.raises(CheckpointError) as caught:
            initialise(model, *folders, zero_positions=zero_positions)
        return str(caught.value)

    def eve(vision: VisionConfig = VISION, text: TextConfig = TEXT) -> Eve:
        return Eve(replace(EVE, vision=vision, text=text))

    assert "has 3 layers; the model has only 2" in said(eve(replace(VISION, layers=2)), part)
    wide = eve(replace(VISION, width=64), replace(TEXT, width=64))
    assert "the Transformer's width is 32 in this part but 64 in the model" in said(wide, part)
    assert "the Transformer's heads is 4 in this part but 2" in said(eve(replace(VISION, heads=2)), part)
    assert "the Transformer's ffn is 48 in this part but 96" in said(eve(text=replace(TEXT, ffn=96)), part)
    assert "the Transformer's patch is 8 in this part but 16" in said(eve(replace(VISION, patch=16)), part)
    assert "stem is patch in this part but convolution" in said(eve(replace(VISION, stem="convolution")), part)
    assert "is a second beit part" in said(eve(), part, part)
    assert "name at least one folder, of a BEiT-2" in said(eve())
    assert "zero_positions is a bug of mPLUG's" in said(eve(), part, zero_positions=True)
    clip = save_folder(tmp_path / "clip", VisionTransformer(VISION))
    assert "holds a clip-vision; a BEiT-2 is needed" in said(eve(), clip)
    assert "holds a beit; a CLIP image encoder or a BERT is needed" in said(MPlug(config), part)


def lost(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def changed(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lost("blocks.0.attn.q_bias"), "not a BEiT-2"),  # as a plain vision Transformer
        (lost("blocks.1.attn.q_bias"), "blocks.1.attention.query.bias"),
        (lost("blocks.2.mlp.fc2.bias"), "blocks.2.ffn.ffn.contract.bias"),
        (lost("norm.bias"), "norm.bias"),
        (lost("patch_embed.proj.weight"), "has no patch_embed.proj.weight"),
        (lost("blocks.0.mlp.fc1.weight"), "from which the sizes are read"),
        (changed("blocks.1.gamma_2", torch.zeros(3)), "of another size, or damaged"),
        (changed("colour.weight", torch.zeros(2)), "no place in the model: colour.weight"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Tensors], None], said: str) -> None:
    tensors = official()
    damage(tensors)
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, tensors)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "part").exists()


def test_other_kinds_say_what_it_is(tmp_path: Path) -> None:
    torch.save(official(), tmp_path / "beitv2.pth")
    with pytest.raises(CheckpointError, match=r"it looks like a BEiT-2 \(--from beit2\)"):
        convert(tmp_path / "beitv2.pth", tmp_path / "out", "eve")


def test_a_recipe_starts_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(official(), tmp_path / "beitv2.pth")
    main(["convert", str(tmp_path / "beitv2.pth"), str(tmp_path / "part"), "--from", "beit2"])
    assert json.loads(capsys.readouterr().out)["missing"] == []
    shards = write_shards(tmp_path / "data", Split.TRAIN, 8, size=32)
    recipe = Recipe(
        name="tiny",
        objective=MaskedSignalConfig(signals="text"),
        model=replace(EVE, text=replace(TEXT, vocab_size=200)),
        data=DataConfig((str(shards[0]),), preprocessing=Preprocessing(32, HALF, HALF), max_tokens=12),
        train=TrainConfig(steps=1, batch_size=4, workers=0),
        optim=OptimConfig(lr=0.0, warmup_steps=0, weight_decay=0.0),
        start=(str(tmp_path / "part"),),
    )
    run = run_recipe(recipe, tmp_path / "run")
    trained = load_folder(run.model_folder).model.state_dict()
    theirs = load_folder(tmp_path / "part").model.state_dict()
    for target, source in (
        ("network.blocks.0.ffn.text.ffn.expand.weight", "blocks.0.ffn.ffn.expand.weight"),
        ("image_embeddings.class_embedding", "class_embedding"),
    ):
        torch.testing.assert_close(trained[target], theirs[source])
    said = json.loads((tmp_path / "run" / "start.json").read_text())
    assert {entry["name"] for entry in said["mapped"]} | {entry["name"] for entry in said["missing"]} == trained.keys()
    wide = replace(recipe, model=replace(EVE, text=replace(TEXT, vocab_size=200, ffn=96)))
    with pytest.raises(ValueError, match="ffn is 48 in this part but 96 in the model"):
        run_recipe(wide, tmp_path / "other")
