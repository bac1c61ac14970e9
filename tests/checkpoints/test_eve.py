"""Official files of EVE: the backbone, heads of fine-tuned files, and the recording of the official network."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.checkpoints.convert import convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.eve import infer_config
from triptych.checkpoints.folder import Loaded, load, load_folder, save_folder
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.options import Options
from triptych.checkpoints.verify import format_checks, passed, verify
from triptych.cli import main
from triptych.models.eve import SIZES, Eve, EveConfig, HardRouter, PixelDecoderConfig, SharedFeedForward, SoftRouter
from triptych.models.moe import MoEConfig, record_routing
from triptych.models.protocol import Encoded
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig, resize_positions
from triptych.objectives.balance import balance_loss
from triptych.predict import Predictor

Tensors = dict[str, Tensor]
Perturb = Callable[[Path, str, float], Path]
D = 128

RELEASED = MoEConfig(experts=3, modality_into_experts=True, route_padding=True)
VISION = VisionConfig(D, 3, 2, patch=8, image_size=16, layer_norm_eps=1e-6, interpolation="bicubic")
TEXT = TextConfig(50, D, 2, 96, 30, 1e-6, attention_dropout=0.0, activation="quick_gelu")
BASE = EveConfig(VISION, TEXT, deep_layers=1, moe=RELEASED, embed_dim=D, unpositioned_patches=True)
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


@cache
def random_model(config: EveConfig) -> Eve:
    """One for all tests, which do not change it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Eve(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.temperature.fill_(0.0713)
    return model


def official(model: Eve) -> Tensors:
    """The official state dict of a backbone."""
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    image, text = "image_embeddings", "text_embeddings"
    named = {
        "class_embedding_vision": ours[f"{image}.class_embedding"],
        "type_embed_vision": ours[f"{image}.token_type"],
        "type_embed_text": ours[f"{text}.token_type"],
        "pos_embed_vision": ours[f"{image}.position_embedding"],
        "pos_embed_text": ours[f"{text}.position_embedding"],
        "position_ids_vision": torch.arange(5)[None],
        "position_ids_text": torch.arange(30),
        "word_embedding.weight": ours[f"{text}.word.weight"],
    }
    for official_name, name in {
        "patch_embed": f"{image}.patch_embedding",
        "layer_norm_text": f"{text}.norm",
        "pre_layrnorm": "network.pre_norm",
        "norm": "network.norm",
    }.items():
        named |= {f"{official_name}.{part}": ours[f"{name}.{part}"] for part in ("weight", "bias")}
    for i, block in enumerate(model.network.blocks):
        layer = f"encoder.layers.{i}"
        named |= {f"{layer}.{name}": tensor for name, tensor in official_block(block).items()}
    return {f"backbone.{name}": tensor.clone() for name, tensor in named.items()}


def official_block(block: nn.Module) -> Tensors:
    own = {name: tensor.detach() for name, tensor in block.state_dict().items()}
    found = {
        "gamma_1": own["attention_scale"],
        "gamma_2": own["ffn_scale"],
        "attn.q_bias": own["attention.query.bias"],
        "attn.v_bias": own["attention.value_bias"],
        "attn.qkv.weight": torch.cat([own["attention.query.weight"], own["attention.key_value.weight"]]),
    }
    found |= {f"attn.proj.{part}": own[f"attention.out.{part}"] for part in ("weight", "bias")}
    found |= {f"norm1.{part}": own[f"attention_norm.{part}"] for part in ("weight", "bias")}

    def network(ours: str, norm: str, mlp: str) -> None:
        for part in ("weight", "bias"):
            found[f"{norm}.{part}"] = own[f"{ours}.norm.{part}"]
            found[f"{mlp}.fc1.{part}"] = own[f"{ours}.ffn.expand.{part}"]
            found[f"{mlp}.fc2.{part}"] = own[f"{ours}.ffn.contract.{part}"]

    match block.ffn:
        case HardRouter():
            network("ffn.image", "norm2_imag", "mlp_imag")
            network("ffn.text", "norm2_text", "mlp_text")
        case SharedFeedForward():
            network("ffn", "norm2_imag", "mlp_imag")
        case SoftRouter():
            found |= {f"norm2_vl.{part}": own[f"ffn.norm.{part}"] for part in ("weight", "bias")}
            moe = "mlp_moe.moe"
            found[f"{moe}.gate.wg.weight"] = own["ffn.moe.router.gate.weight"]
            if "ffn.moe.router.modality" in own:
                found[f"{moe}.vision_embed"], found[f"{moe}.text_embed"] = own["ffn.moe.router.modality"]
            for e in range(len(own["ffn.moe.experts.expand"])):
                expert = f"{moe}.experts.experts.{e}"
                for layer, name in (("fc1", "expand"), ("fc2", "contract")):
                    found[f"{expert}.{layer}.weight"] = own[f"ffn.moe.experts.{name}"][e]
                    found[f"{expert}.{layer}.bias"] = own[f"ffn.moe.experts.{name}_bias"][e]
    return found


def converted(tmp_path: Path, tensors: Tensors, options: Options | None = None) -> tuple[Loaded, Report]:
    content = {"model": tensors, "config": {"image_res": 16, "optimizer": {"lr": 3e-5}}, "epoch": 9}
    torch.save(content, tmp_path / "eve.pth")
    report = convert(tmp_path / "eve.pth", tmp_path / "out", "eve", options)
    return load_folder(tmp_path / "out"), report


def problem(tmp_path: Path, tensors: Tensors, options: Options | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, tensors, options)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reasons_of(report: Report) -> dict[str, str]:
    return {dropped.name: dropped.reason for dropped in report.dropped}


def assert_accounted(report: Report, tensors: Tensors, loaded: Loaded) -> None:
    """Every tensor of the file and of the network is somewhere in the report, and once."""
    used = {source for mapped in report.mapped for source in mapped.sources}
    assert used | reasons_of(report).keys() == tensors.keys()
    assert not used & reasons_of(report).keys()
    ours = [mapped.name for mapped in report.mapped if not mapped.name.startswith("task.")]
    assert sorted(ours + [entry.name for entry in report.missing]) == sorted(loaded.model.state_dict())
    assert report.unexpected == []


def assert_same_backbone(found: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert not name.startswith(("image_emb", "text_emb", "network")) or torch.equal(tensor, theirs[name]), name


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A BPE tokenizer.json beside the weights, with EVE's special tokens."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"abcdefg", "de"])}
    backend = Backend(tokenizer_models.BPE(vocabulary, [("d", "e")], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


# -------------------------------------------------------------------------------------------------- the recording


@pytest.fixture
def recording(goldens: Path) -> Path:
    return goldens / "eve_tiny"


def test_parity_with_the_official_code(recording: Path) -> None:
    checks = verify(recording, 1e-4)
    recorded = {name[4:] for name in load_file(recording / "io.safetensors") if name.startswith("out.")}
    assert {check.name for check in checks} == recorded
    assert len(checks) == len(recorded) == 6
    assert passed(checks), format_checks(checks, 1e-4)


@pytest.mark.parametrize(
    ("name", "by", "failed"),
    [
        ("out.fusion", 3e-4, {"fusion"}),
        ("out.text_aux_per_layer", 3e-4, {"text_aux_per_layer"}),
        ("backbone.norm.bias", 0.5, {"fusion", "vision", "text"}),
        ("backbone.type_embed_text", 0.5, {"fusion", "text", "fusion_aux_per_layer", "text_aux_per_layer"}),
    ],
)
def test_what_is_changed_fails(recording: Path, perturb: Perturb, name: str, by: float, failed: set[str]) -> None:
    assert {check.name for check in verify(perturb(recording, name, by)) if not check.ok} == failed


@torch.no_grad()
def outputs_of(model: Eve, io: Tensors) -> tuple[Tensor, Tensor]:
    """States of pairs and the auxiliary loss of each layer."""
    image, text = model.encode_image(io["in.image"]), model.encode_text(io["in.input_ids"], io["in.attention_mask"] > 0)
    with record_routing(model) as routings:
        states_BTD = model.fuse(image, text).states().hidden_BLD
    return states_BTD, torch.stack([balance_loss({layer: calls}) for layer, calls in routings.items()])


def test_a_converted_recording_computes_what_was_recorded(tmp_path: Path, recording: Path) -> None:
    """And it needs both of what the converter switches on."""
    convert(recording / "official_layout.pth", tmp_path / "out", "eve")  # config.json beside it has the heads
    model, io = load(tmp_path / "out").model, load_file(recording / "io.safetensors")
    assert isinstance(model, Eve)
    states_BTD, losses = outputs_of(model, io)
    torch.testing.assert_close(states_BTD, io["out.fusion"], atol=1e-4, rtol=0)
    torch.testing.assert_close(losses, io["out.fusion_aux_per_layer"], atol=1e-4, rtol=0)

    for off in ("modality_into_experts", "route_padding"):
        other = Eve(replace(model.config, moe=replace(model.config.moe, **{off: False}))).eval()
        other.load_state_dict(model.state_dict())
        states_BTD, losses = outputs_of(other, io)
        assert (losses - io["out.fusion_aux_per_layer"]).abs().max() > 1e-3
        real_BT = F.pad(io["in.attention_mask"] > 0, (17, 0), value=True)
        differs = (states_BTD - io["out.fusion"]).abs()[real_BT].max() > 1e-3
        assert differs == (off == "modality_into_experts")  # padding changes no token but itself


def test_another_folder_of_that_format(tmp_path: Path) -> None:
    """Other sizes, one soft layer, three experts, without padding; and a head beside the backbone."""
    model = random_model(BASE)
    io = {
        "in.image": torch.randn(2, 3, 16, 16),
        "in.input_ids": torch.randint(50, (2, 7)),
        "in.attention_mask": torch.ones(2, 7),
    }
    io["out.fusion"], io["out.fusion_aux_per_layer"] = outputs_of(model, io)
    with torch.no_grad(), record_routing(model) as routings:
        io["out.vision"] = model.image_states(model.encode_image(io["in.image"])).hidden_BLD
        io["out.vision_aux_per_layer"] = balance_loss(routings)[None]
    with torch.no_grad(), record_routing(model) as routings:
        io["out.text"] = model.text_states(model.encode_text(io["in.input_ids"])).hidden_BLD
        io["out.text_aux_per_layer"] = balance_loss(routings)[None]
    sizes = {"width": D, "heads": 2, "ffn": 96, "layers": 3, "image_size": 16, "patch": 8, "vocab_size": 50}
    sizes |= {"soft_moe_layers": [2], "experts": 3, "top_k": 2, "text_length": 7, "text_positions": 30}
    settings = {"model": "eve", **sizes, "activation": "quick_gelu", "layer_norm_eps": 1e-06}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in io.items()}, tmp_path / "io.safetensors")
    head = {"output.0.weight": torch.randn(4, D), "itm_head.weight": torch.randn(2, D), "itm_head.bias": torch.zeros(2)}
    torch.save({"model": official(model) | head}, tmp_path / "official_layout.pth")
    checks = verify(tmp_path)
    assert passed(checks), format_checks(checks, 1e-4)
    assert len(checks) == 6


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("soft_moe_layers", [1, 3], "soft_moe_layers must be the topmost of 4 layers, not [1, 3]"),
        ("soft_moe_layers", 2, "soft_moe_layers must be of type list"),
        ("experts", "four", "experts must be of type int"),
        ("experts", 0, "experts must be at least 1"),
        ("top_k", 3, "top_k must be 1 or 2"),
        ("activation", "relu", "must be one of 'gelu', 'quick_gelu', not 'relu'"),
        ("layer_norm_eps", None, "layer_norm_eps must be of type float"),
        ("width", 48, "but [48] in the model"),
        ("heads", 5, "32 is not divisible by its 5 heads"),
        ("layers", 5, "soft_moe_layers must be the topmost of 5"),
        ("text_positions", 40, "text_embeddings.position_embedding is [196, 32] in the file"),
    ],
)
def test_broken_configurations(recording: Path, tmp_path: Path, field: str, value: object, said: str) -> None:
    folder = tmp_path / "recording"
    shutil.copytree(recording, folder)
    config = json.loads((folder / "config.json").read_text())
    config[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert said in str(caught.value)


def test_the_commands(tmp_path: Path, recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(recording)])
    assert json.loads(capsys.readouterr().out)["ok"] is True
    source = shutil.copy(recording / "official_layout.pth", tmp_path)
    main(["convert", str(source), str(tmp_path / "out"), "--from", "eve", "--vision-heads", "4"])
    said = capsys.readouterr()
    assert len(json.loads(said.out)["mapped"]) == 94
    assert "94 tensors mapped" in said.err
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(tmp_path / "out"), "--from", "eve"])
    assert "width 32, no multiple of 64: give --vision-heads" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the backbone


def test_a_backbone(tmp_path: Path) -> None:
    model = random_model(BASE)
    tensors = official(model)
    loaded, report = converted(tmp_path, tensors)
    assert loaded.config == BASE
    assert_same_backbone(loaded.model, model)
    assert_accounted(report, tensors, loaded)
    heads = {"image_projection", "text_projection", "temperature", "match_head", "masked_head"}
    assert {entry.name.split(".")[0] for entry in report.missing} == heads
    assert reasons_of(report) == {f"backbone.position_ids_{part}": "a constant" for part in ("vision", "text")}
    assert any("modality_into_experts, route_padding" in note for note in report.notes)
    assert any("unpositioned_patches" in note for note in report.notes)
    assert any("no token is dropped and no noise" in note for note in report.notes)
    assert "2 attention heads in the image encoder, assumed from width 128 / 64" in report.notes
    assert loaded.task == {"recipe": "published, without a head"}
    assert loaded.preprocessing is not None
    preprocessing = loaded.preprocessing
    assert (preprocessing.image_size, preprocessing.mean, preprocessing.std, preprocessing.resize) == (
        16,
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
        "squash",
    )


@pytest.mark.parametrize(
    "config",
    [
        replace(BASE, moe=replace(RELEASED, modality_routing=False, modality_into_experts=False)),
        replace(BASE, shallow="shared"),
        replace(BASE, deep_layers=3),
        replace(BASE, deep_layers=0, moe=MoEConfig()),
        replace(BASE, deep_layers=0, shallow="shared", moe=MoEConfig()),
        replace(BASE, moe=replace(RELEASED, experts=1, top_k=1)),
    ],
)
def test_every_kind_of_block(tmp_path: Path, config: EveConfig) -> None:
    model = random_model(config)
    tensors = official(model)
    loaded, report = converted(tmp_path, tensors)
    assert_accounted(report, tensors, loaded)
    assert_same_backbone(loaded.model, model)
    assert replace(loaded.config, shallow=config.shallow) == config  # without lower blocks they have no kind
    assert loaded.config.kinds() == config.kinds()


@pytest.mark.parametrize("size", ["base", "large"])
def test_published_sizes_are_read_from_the_tensors(size: str) -> None:
    with torch.device("meta"):
        tensors = official(Eve(SIZES[size]))
    config, _ = infer_config(tensors, Path("eve.pth"), Options())
    moe = replace(SIZES[size].moe, modality_into_experts=True, route_padding=True)
    assert config == replace(SIZES[size], moe=moe, unpositioned_patches=True)


def test_another_image_size(tmp_path: Path) -> None:
    model = random_model(BASE)
    loaded, report = converted(tmp_path, official(model), Options(image_size=32))
    assert loaded.config.vision.image_size == 32
    table_ND = model.image_embeddings.position_embedding
    wanted_ND = resize_positions(table_ND, (4, 4), "bicubic")
    found = loaded.model
    assert isinstance(found, Eve)
    assert torch.equal(found.image_embeddings.position_embedding, wanted_ND)
    assert not torch.equal(wanted_ND, resize_positions(table_ND, (4, 4), "bilinear"))
    assert "position table resized from 16 to 32 pixels (bicubic)" in report.notes
    (tmp_path / "as").mkdir()
    converted(tmp_path / "as", official(model))
    again = load(tmp_path / "as" / "out", image_size=32)
    assert again.config == loaded.config
    assert again.preprocessing == loaded.preprocessing
    assert_same_backbone(again.model, found)


def test_a_configuration_beside_the_file(tmp_path: Path) -> None:
    settings = {"heads": 4, "activation": "gelu", "layer_norm_eps": 1e-5, "drop_path_rate": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded, _ = converted(tmp_path, official(random_model(BASE)))
    vision = loaded.config.vision
    assert (vision.heads, loaded.config.text.heads, vision.activation, loaded.config.text.activation) == (
        4,
        4,
        "gelu",
        "gelu",
    )
    assert (vision.layer_norm_eps, loaded.config.drop_path) == (1e-5, 0.0)


def test_a_pretrained_file_has_heads_of_unknown_code(tmp_path: Path) -> None:
    tensors = official(random_model(BASE))
    tensors |= {"backbone.mask_embed_vision": torch.zeros(D), "decoder.blocks.0.norm1.weight": torch.ones(8)}
    tensors |= {"mlm_head.decoder.bias": torch.zeros(50)}
    loaded, report = converted(tmp_path, tensors)
    assert_accounted(report, tensors, loaded)
    reasons = reasons_of(report)
    assert "code was not released" in reasons["mlm_head.decoder.bias"]
    assert "code was not released" in reasons["decoder.blocks.0.norm1.weight"]
    assert "mask token" in reasons["backbone.mask_embed_vision"]


def changed(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def lost(*names: str) -> Callable[[Tensors], None]:
    def lose(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return lose


LAYER = "backbone.encoder.layers"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lost("backbone.pos_embed_vision"), "has no backbone.pos_embed_vision, from which the sizes are read"),
        (lost("backbone.word_embedding.weight"), "not an official EVE checkpoint"),
        (lost("backbone.norm.bias"), "network.norm.bias would come from backbone.norm.bias"),
        (lost(f"{LAYER}.0.attn.v_bias"), "network.blocks.0.attention.value_bias"),
        (lost(f"{LAYER}.0.mlp_text.fc1.weight"), "network.blocks.0.ffn.text.ffn.expand.weight"),
        (
            lost(f"{LAYER}.2.mlp_moe.moe.experts.experts.1.fc1.weight"),
            f"would come from {LAYER}.2.mlp_moe.moe.experts.experts.1.fc1.weight)",
        ),
        (lost(f"{LAYER}.2.mlp_moe.moe.text_embed"), f"would come from {LAYER}.2.mlp_moe.moe.text_embed"),
        (lost(f"{LAYER}.2.mlp_moe.moe.gate.wg.weight"), "gate.wg.weight, from which the sizes are read"),
        (changed("backbone.pos_embed_vision", torch.zeros(7, D)), "not a class token and a square grid"),
        (changed(f"{LAYER}.1.gamma_1", torch.zeros(3)), "of another size, or damaged"),
        (changed(f"{LAYER}.1.attn.qkv.weight", torch.zeros(4, D)), "cannot make"),
        (changed(f"{LAYER}.2.mlp_moe.moe.vision_embed", torch.zeros(3)), "cannot make network.blocks.2.ffn.moe.router"),
        (changed("backbone.colour.weight", torch.zeros(2)), "no place in the model: backbone.colour.weight"),
        (changed(f"{LAYER}.1.mlp_moe.moe.gate.wg.weight", torch.zeros(3, D)), "single_ffn moe"),
        (changed(f"{LAYER}.2.mlp_vl.fc1.weight", torch.zeros(3, D)), "ffn_type vl"),
        (changed("backbone.encoder.relative_position_bias_table", torch.zeros(3, 3)), "relative positions"),
        (changed("backbone.class_embedding_vision", torch.zeros(96)), "give --vision-heads"),
    ],
)
def test_damaged_and_other_files(tmp_path: Path, damage: Callable[[Tensors], None], said: str) -> None:
    tensors = official(random_model(BASE))
    damage(tensors)
    assert said in problem(tmp_path, tensors)


def test_soft_routers_below_others_are_refused(tmp_path: Path) -> None:
    tensors = official(random_model(replace(BASE, deep_layers=2)))
    swapped = {
        name.replace("layers.0.", "layers.9.").replace("layers.1.", "layers.0."): t for name, t in tensors.items()
    }
    swapped = {name.replace("layers.9.", "layers.1."): tensor for name, tensor in swapped.items()}
    assert "its blocks 0, 2 have soft routers: here only the topmost blocks" in problem(tmp_path, swapped)
    mixed = official(random_model(BASE))
    mixed = {name: tensor for name, tensor in mixed.items() if "layers.1.mlp_text" not in name}
    assert "block 1 has another kind" in problem(tmp_path, mixed)


# -------------------------------------------------------------------------------------------------- heads


def classifier(read: int, classes: int) -> tuple[nn.Sequential, Tensors]:
    """The released head, and its tensors in a file."""
    head = nn.Sequential(nn.Linear(read, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), nn.Linear(2 * D, classes))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return head.eval(), {f"output.{name}": tensor for name, tensor in head.state_dict().items()}


@torch.no_grad()
def test_a_classifier_for_questions(tmp_path: Path, tokenizer: Path) -> None:
    head, tensors = classifier(D, 3)
    (tmp_path / "answers.json").write_text('["yes", "no", "2"]')
    model = random_model(BASE)
    file = official(model) | tensors
    loaded, report = converted(tmp_path, file, Options(answers=tmp_path / "answers.json"))
    assert_accounted(report, file, loaded)
    assert loaded.task is not None
    assert (loaded.task["vqa"]["answering"], loaded.task["vqa"]["answers"]) == ("classify", ["yes", "no", "2"])
    task = Predictor.load(tmp_path / "out").task("vqa")
    pooled_QP = torch.randn(5, D)
    assert torch.equal(task.head(pooled_QP), head(pooled_QP))  # type: ignore[operator]
    # What the released code classifies is the state of the text's first token, after the picture's five.
    image, text = model.encode_image(torch.randn(2, 3, 16, 16)), model.encode_text(torch.randint(50, (2, 7)))
    joint_BTD = torch.cat([image.hidden_BLD, text.hidden_BLD], dim=1)
    torch.testing.assert_close(task.model.pool(image, text), model.network(joint_BTD, 5)[:, 5])


def test_a_classifier_without_its_answers_is_left_out(tmp_path: Path) -> None:
    file = official(random_model(BASE)) | classifier(D, 3)[1]
    loaded, report = converted(tmp_path, file)
    assert_accounted(report, file, loaded)
    reason = "its 3 answers are not in the file: give their list with --answers"
    assert {name: why for name, why in reasons_of(report).items() if name.startswith("output.")} == dict.fromkeys(
        (f"output.{layer}.{part}" for layer in (0, 1, 3) for part in ("weight", "bias")), reason
    )
    assert (loaded.task, loaded.task_state) == ({"recipe": "published, without a head"}, {})


@torch.no_grad()
def test_nlvr2_with_a_classifier_on_both(tmp_path: Path, tokenizer: Path) -> None:
    head, tensors = classifier(2 * D, 2)
    file = official(random_model(BASE)) | tensors
    loaded, report = converted(tmp_path, file)
    assert_accounted(report, file, loaded)
    assert loaded.task is not None
    assert (loaded.task["nlvr2"]["variant"], loaded.task["nlvr2"]["picture_types"]) == ("passes", False)
    task = Predictor.load(tmp_path / "out").task("nlvr2")
    pooled_QP = torch.randn(5, 2 * D)
    assert torch.equal(task.head(pooled_QP), head(pooled_QP))  # type: ignore[operator]


def bi_attention() -> dict[str, nn.Module]:
    """The modules of the released bi-attention, whose attention is PyTorch's own."""
    parts = {"attn1": nn.MultiheadAttention(D, 2), "attn2": nn.MultiheadAttention(D, 2)}
    others = {"fc.0": nn.Linear(2 * D, D), "attn_pool.fc.0": nn.Linear(D, 1), "nlvr2_output": nn.Linear(2 * D, 2)}
    modules: dict[str, nn.Module] = {**parts, **others}
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return modules


def bi_attend(modules: dict[str, nn.Module], first: Encoded, second: Encoded) -> Tensor:
    """Logits as ``model_nlvr_beit.py`` makes them (sequence first; padding -10000 before the softmax of pooling)."""
    pooled = []
    for name, own, other in (("attn1", first, second), ("attn2", second, first)):
        x_TBD, memory_TBD = own.hidden_BLD.transpose(0, 1), other.hidden_BLD.transpose(0, 1)
        seen_TBD, _ = modules[name](x_TBD, memory_TBD, memory_TBD, key_padding_mask=~other.real_BL())
        joined_BTD = F.relu(modules["fc.0"](torch.cat([seen_TBD, x_TBD], dim=-1))).transpose(0, 1)
        score_BT = F.relu(modules["attn_pool.fc.0"](joined_BTD)).squeeze(-1) - 1e4 * (~own.real_BL()).float()
        pooled.append((score_BT.softmax(1).unsqueeze(1) @ joined_BTD).squeeze(1))
    return modules["nlvr2_output"](torch.cat(pooled, dim=-1))


@torch.no_grad()
def test_nlvr2_with_bi_attention(tmp_path: Path, tokenizer: Path) -> None:
    modules = bi_attention()
    tensors = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
    file = official(random_model(BASE)) | tensors
    loaded, report = converted(tmp_path, file)
    assert_accounted(report, file, loaded)
    assert loaded.task is not None
    assert loaded.task["nlvr2"]["variant"] == "biattention"
    task = Predictor.load(tmp_path / "out").task("nlvr2")
    mask_BT = torch.arange(9) < torch.tensor([[9], [6]])
    first, second = (Encoded(torch.randn(2, 9, D), mask_BT) for _ in "ab")
    found = task.head(first, second)  # type: ignore[operator]
    torch.testing.assert_close(found, bi_attend(modules, first, second), atol=1e-5, rtol=1e-5)


def test_a_bi_attention_of_other_heads_is_left_out(tmp_path: Path) -> None:
    tensors = {f"{part}.{name}": t for part, m in bi_attention().items() for name, t in m.state_dict().items()}
    file = official(random_model(BASE)) | tensors
    loaded, report = converted(tmp_path, file, Options(vision_heads=8))
    assert_accounted(report, file, loaded)
    assert loaded.task == {"recipe": "published, without a head"}
    assert "a bi-attention of 8 heads; at this width it has 2 here" in reasons_of(report)["attn1.in_proj_weight"]


def retrieval_heads(contrastive: str = "itc_", temperature: str = "itc_temp", width: int = D) -> Tensors:
    return {
        f"{contrastive}vision_proj_head.weight": torch.randn(width, D),
        f"{contrastive}text_proj_head.weight": torch.randn(width, D),
        temperature: torch.tensor(0.0421),
    }


MATCHING = {"itm_head.weight": torch.randn(2, D), "itm_head.bias": torch.randn(2)}


@torch.no_grad()
def test_retrieval(tmp_path: Path, tokenizer: Path) -> None:
    """With the projections beside, which the released configuration can make and never runs."""
    heads = retrieval_heads(width=24)
    unused = {name: t for name, t in retrieval_heads("itc_vl_").items() if name != "itc_temp"}
    file = official(random_model(BASE)) | heads | MATCHING | unused
    loaded, report = converted(tmp_path, file)
    assert_accounted(report, file, loaded)
    assert loaded.config == replace(BASE, embed_dim=24)
    model = loaded.vision_language_model()
    assert isinstance(model, Eve)
    assert torch.equal(model.image_projection.weight, heads["itc_vision_proj_head.weight"])
    assert torch.equal(model.text_projection.weight, heads["itc_text_proj_head.weight"])
    assert model.temperature.item() == pytest.approx(0.0421)
    assert torch.equal(model.match_head.bias, MATCHING["itm_head.bias"])
    assert {entry.name.split(".")[0] for entry in report.missing} == {"masked_head"}
    assert "never runs" in reasons_of(report)["itc_vl_text_proj_head.weight"]
    assert Predictor.load(tmp_path / "out").retrieval.candidates == 128

    image = model.encode_image(torch.randn(2, 3, 16, 16))
    state_BD = model.network(image.hidden_BLD, 5)[:, 0]
    expected_BE = F.normalize(state_BD @ heads["itc_vision_proj_head.weight"].T, dim=-1)
    torch.testing.assert_close(model.embed_image(image), expected_BE)


@pytest.mark.parametrize(
    ("heads", "candidates"),
    [
        (retrieval_heads(), 0),
        (MATCHING, None),
        (retrieval_heads("mitc_", "mitc_temp"), 0),
        (retrieval_heads("itc_vl_"), 0),
    ],
)
def test_retrieval_with_one_head(tmp_path: Path, heads: Tensors, candidates: int | None) -> None:
    file = official(random_model(BASE)) | heads
    loaded, report = converted(tmp_path, file)
    assert_accounted(report, file, loaded)
    assert loaded.task is not None
    assert loaded.task["retrieval"]["candidates"] == candidates


def test_a_damaged_head(tmp_path: Path) -> None:
    file = official(random_model(BASE))
    heads = retrieval_heads() | MATCHING
    del heads["itc_text_proj_head.weight"]
    assert "text_projection.weight would come from itc_text_proj_head.weight" in problem(tmp_path, file | heads)
    extra = {"colour.weight": torch.zeros(2)}  # of a fine-tuned file it is known what it may have
    assert "no place in the model: colour.weight" in problem(tmp_path, file | retrieval_heads() | MATCHING | extra)
    _, tensors = classifier(2 * D, 2)
    del tensors["output.1.bias"]
    assert "task.head.norm.bias would come from output.1.bias" in problem(tmp_path, file | tensors)
    _, tensors = classifier(D + 2, 2)
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    assert "task.head.expand.weight" in problem(tmp_path, file | tensors, Options(answers=tmp_path / "answers.txt"))
    attention = {f"{part}.{name}": t for part, m in bi_attention().items() for name, t in m.state_dict().items()}
    del attention["nlvr2_output.weight"]
    assert "task.head.classify.weight would come from nlvr2_output.weight" in problem(tmp_path, file | attention)


def test_answers_without_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    options = Options(answers=tmp_path / "answers.txt")
    assert "--answers is for a file fine-tuned for questions" in problem(
        tmp_path, official(random_model(BASE)), options
    )


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    for option in (Options(stride=3), Options(text_heads=2), Options(decoder_layers=2), Options(resize="crop")):
        with pytest.raises(CheckpointError, match="does not apply to --from eve"):
            convert(tmp_path / "none", tmp_path / "out", "eve", option)


# -------------------------------------------------------------------------------------------------- our own format


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pixel_decoder": PixelDecoderConfig(16, 1, 2, cross_attention=True), "decoder_layers": 1},
        {"moe": MoEConfig(2, 1, noise="gumbel", capacity=1.5), "shallow": "soft", "unpositioned_patches": False},
        {"moe": MoEConfig(capacity=2.0, modality_routing=False), "deep": "hard", "drop_path": 0.0},
    ],
)
@torch.no_grad()
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(replace(BASE, **changes))
    loaded = load_folder(save_folder(tmp_path / "eve", model))
    assert loaded.config == model.config
    found = loaded.vision_language_model()
    pixels_BCHW, ids_BL = torch.randn(2, 3, 16, 16), torch.randint(50, (2, 6))
    ours, theirs = (one.fuse(one.encode_image(pixels_BCHW), one.encode_text(ids_BL)).text_BLD for one in (model, found))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moe": {"experts": 3, "top_k": 5}}, "model.moe: top_k must be 1 or 2"),
        ({"moe": {"colour": 3}}, "model.moe: unknown field 'colour'"),
        ({"pixel_decoder": {"width": "big"}}, "model.pixel_decoder.width: must be an integer"),
        ({"deep": "soggy"}, "model.deep: must be one of 'hard', 'soft', 'shared'"),
        ({"deep_layers": 7}, "deep_layers must be 0 to the 3 layers"),
    ],
)
def test_mistakes_in_config_json(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = save_folder(tmp_path / "eve", random_model(BASE))
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder)
    assert said in str(caught.value)
