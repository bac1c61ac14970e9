"""BridgeTower in transformers' layout, both ways. (Parity with the port: tests/models/test_bridgetower.py)"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor

from triptych.checkpoints.bridgetower_hf import port_config, port_state
from triptych.checkpoints.convert import convert, export
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder, save_folder
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.options import Options
from triptych.cli import convert as convert_command
from triptych.data.tokenizers import Tokenizer, wordpiece_from_vocab
from triptych.data.transforms import Preprocessing, Resize
from triptych.models.bridgetower import BridgeTower, BridgeTowerConfig
from triptych.models.mplug import MPlug
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig, resize_positions

Tensors = dict[str, Tensor]

VISION = VisionConfig(64, 3, 1, patch=8, image_size=32, layer_norm_eps=2e-5, interpolation="bicubic")
TEXT = TextConfig(50, 64, 2, 80, 30, 1e-5, 0.05, 0.15, first_position=2)
CONFIG = BridgeTowerConfig(
    VISION, TEXT, text_layers=3, fusion_layers=2, fusion_norm_eps=1e-5, contrast="projected", embed_dim=12
)
HEADS = ("masked_head.", "match_head.", "image_embedding.", "text_embedding.", "pair_embedding.", "temperature")
CLASSES = {
    "BridgeTowerModel": (),
    "BridgeTowerForMaskedLM": ("masked_head.",),
    "BridgeTowerForImageAndTextRetrieval": ("match_head.",),
    "BridgeTowerForContrastiveLearning": HEADS[2:],
}
"""Which of our heads each class of the port has."""


def random_model(config: BridgeTowerConfig = CONFIG, temperature: float = 0.0713) -> BridgeTower:
    torch.manual_seed(0)
    model = BridgeTower(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.temperature.fill_(temperature)
    return model


def port_folder(folder: Path, *, tensors: Tensors | None = None, **changes: Any) -> Path:
    """A folder of the port with our random weights; changes of config.json as ``text_config__hidden_act="relu"``."""
    model = random_model()
    folder.mkdir()
    save_file(port_state(model)[0] if tensors is None else tensors, folder / "model.safetensors")
    config = port_config(model)
    for path, value in changes.items():
        *parts, name = path.split("__")
        part = config
        for inner in parts:
            part = part[inner]
        part[name] = value
        if value is None:
            del part[name]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def converted(tmp_path: Path, source: Path, options: Options | None = None) -> tuple[BridgeTower, Report]:
    report = convert(source, tmp_path / "out", "bridgetower-hf", options)
    model = load_folder(tmp_path / "out").model
    assert isinstance(model, BridgeTower)
    return model, report


def problem(tmp_path: Path, source: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, source)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def exported(tmp_path: Path, model: BridgeTower, *rest: Any, **more: Any) -> tuple[Path, Report]:
    save_folder(tmp_path / "ours", model, *rest, **more)
    return tmp_path / "port", export(tmp_path / "ours", tmp_path / "port", "bridgetower-hf")


def refusal(tmp_path: Path, config: BridgeTowerConfig, tokenizer: Tokenizer | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        exported(tmp_path, BridgeTower(config), tokenizer)
    assert not (tmp_path / "port").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(found: BridgeTower, expected: BridgeTower, *but: str) -> None:
    theirs = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert name.startswith(but) or torch.equal(tensor, theirs[name]), name


def byte_level() -> Tokenizer:
    backend = Backend(tokenizer_models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=45, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["a cat sat on the mat", "two red dogs"], trainer)
    return Tokenizer(backend)


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("link", ["add", "scaled_add", "interpolate"])
def test_from_the_port_and_back_bit_for_bit(tmp_path: Path, name: str, link: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    port_class = getattr(transformers, name)
    config = transformers.BridgeTowerConfig(**port_config(random_model(replace(CONFIG, bridge=link))))
    before = port_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    before.save_pretrained(tmp_path / "before")
    model, report = converted(tmp_path, tmp_path / "before")
    assert {entry.name for entry in report.missing} == {
        key for key in model.state_dict() if key.startswith(HEADS) and not key.startswith(CLASSES[name] or "none")
    }
    assert {dropped.name.split(".")[-2] for dropped in report.dropped} == {"dense"}  # the pooler

    report = export(tmp_path / "out", tmp_path / "after", "bridgetower-hf")
    after, loading = port_class.from_pretrained(
        tmp_path / "after", attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    theirs = after.state_dict()
    for key, tensor in before.state_dict().items():
        assert torch.equal(tensor, theirs[key]) or ".text_model.pooler." in f".{key}", key
    assert any("filled in with zeros" in note and "text_model.pooler" in note for note in report.notes)

    ids_BL = torch.tensor([[0, 7, 9, 2], [0, 8, 2, 1]])
    given = {"input_ids": ids_BL, "attention_mask": (ids_BL != 1).long(), "pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        outputs = before(**given)[0], after.eval()(**given)[0]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("temperature", [0.07, 0.0713, 0.01, 0.5, 0.9, 1.0, 1.7, 30.0])
def test_to_the_port_and_back_bit_for_bit(tmp_path: Path, temperature: float) -> None:
    model = random_model(temperature=temperature)
    folder, report = exported(tmp_path, model)
    assert report.dropped == []
    back, report = converted(tmp_path, folder)
    assert report.missing == []
    assert back.config == replace(CONFIG, temperature=back.config.temperature)
    assert_same_weights(back, model)


@pytest.mark.parametrize("scale", [2.6592, 4.6052, 2.0, 3.14159, -2.5])
def test_the_scale_of_logits_comes_back(tmp_path: Path, scale: float) -> None:
    tensors = port_state(random_model())[0] | {"logit_scale": torch.tensor(scale)}
    _, report = converted(tmp_path, port_folder(tmp_path / "port", tensors=tensors))  # config.json has another one
    export(tmp_path / "out", tmp_path / "back", "bridgetower-hf")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["logit_scale"], torch.tensor(scale))
    assert not any("logit_scale" in note for note in report.notes)


def test_a_scale_that_a_temperature_cannot_tell_is_reported(tmp_path: Path) -> None:
    tensors = port_state(random_model())[0] | {"logit_scale": torch.tensor(0.0123456789)}
    _, report = converted(tmp_path, port_folder(tmp_path / "port", tensors=tensors))
    assert any(note.startswith("logit_scale 0.0123456791 would come back as 0.01234") for note in report.notes)


def test_sizes_and_settings_are_those_of_config_json(tmp_path: Path) -> None:
    model, _ = converted(tmp_path, port_folder(tmp_path / "port"))
    assert model.config == CONFIG
    loaded = load_folder(tmp_path / "out")
    assert loaded.preprocessing == Preprocessing(32, resize="crop")


def test_bare_names_bin_files_and_constants_of_older_files(tmp_path: Path) -> None:
    source = port_folder(tmp_path / "port", contrastive_hidden_size=None)
    (source / "model.safetensors").unlink()
    tensors = {
        name.removeprefix("bridgetower."): tensor
        for name, tensor in port_state(random_model())[0].items()
        if name.startswith("bridgetower.")
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(30)[None]
    tensors["vision_model.visual.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["vision_model.visual.ln_separate.0.weight"] = torch.ones(64)
    torch.save(tensors, source / "pytorch_model.bin")
    model, report = converted(tmp_path, source)
    assert model.config == replace(CONFIG, contrast="encoders", embed_dim=256)
    assert_same_weights(model, random_model(), *HEADS)
    reasons = {dropped.reason for dropped in report.dropped}
    assert reasons == {
        "a constant",
        "the port's text pooler, never run",
        "norms of single layers, which the whole network never runs",
    }
    said = next(note for note in report.notes if note.startswith("not in the file"))
    assert all(head.rstrip(".") in said for head in HEADS if head != "pair_embedding.")


def test_a_tied_masked_language_head(tmp_path: Path) -> None:
    tensors = port_state(random_model())[0]
    del tensors["mlm_score.decoder.weight"]
    source = port_folder(tmp_path / "port", tensors=tensors, tie_word_embeddings=True)
    model, _ = converted(tmp_path, source)
    assert torch.equal(model.masked_head.word.weight, model.text.embeddings.word.weight)
    untied = port_folder(tmp_path / "untied", tensors=tensors)
    (tmp_path / "second").mkdir()
    assert "masked_head.word.weight" in problem(tmp_path / "second", untied)


def test_another_resolution(tmp_path: Path) -> None:
    model, report = converted(tmp_path, port_folder(tmp_path / "port"), Options(image_size=48))
    before = random_model().vision.position_embedding.detach()
    assert torch.equal(model.vision.position_embedding, resize_positions(before, (6, 6), "bicubic"))
    assert "position table resized from 32 to 48 pixels (bicubic)" in report.notes
    with pytest.raises(CheckpointError, match="not a multiple of patch"):
        converted(tmp_path, tmp_path / "port", Options(image_size=50))


def test_surplus_blocks_of_the_image_encoder_are_never_read(tmp_path: Path) -> None:
    tensors = port_state(random_model())[0]
    below, above = (f"bridgetower.vision_model.visual.transformer.resblocks.{i}." for i in (2, 3))
    tensors |= {name.replace(below, above): tensor + 1 for name, tensor in tensors.items() if name.startswith(below)}
    source = port_folder(tmp_path / "port", tensors=tensors, vision_config__num_hidden_layers=4)
    model, report = converted(tmp_path, source)
    assert model.config == CONFIG
    assert sum("topmost layer that is read" in dropped.reason for dropped in report.dropped) == 12


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("link_tower_type", "gated", "link_tower_type must be add or scaled_add or interpolate"),
        ("link_tower_type", 3, "link_tower_type must be a string"),
        ("layer_norm_eps", 1e-6, "layer_norm_eps (of bridges) must be 1e-5"),
        ("hidden_act", "relu", "hidden_act must be gelu or quick_gelu"),
        ("hidden_act", "quick_gelu", "hidden_act (of the masked-language head) must be gelu"),
        ("text_config__hidden_act", "gelu_new", "hidden_act must be gelu or quick_gelu, not 'gelu_new'"),
        ("share_link_tower_layers", True, "share_link_tower_layers is not supported"),
        ("share_cross_modal_transformer_layers", False, "share_cross_modal_transformer_layers must be true"),
        ("share_cross_modal_transformer_layers", "no", "must be true or false"),
        ("vision_config__remove_last_layer", True, "remove_last_layer is not supported"),
        ("text_config__is_decoder", True, "is_decoder is not supported"),
        ("vision_config__num_channels", 4, "num_channels must be 3"),
        ("vision_config__patch_size", [8, 8], "patch_size must be a positive integer"),
        ("vision_config__image_size", 36, "36 is not a multiple of patch 8"),
        ("vision_config__num_hidden_layers", 2, "has 2 layers, fewer than the 3 of its text encoder"),
        ("vision_config__hidden_size", 128, "both encoders need one width"),
        ("num_hidden_layers", 4, "need as many cross-modal layers"),
        ("num_hidden_layers", 1, "have no place in the model"),
        ("text_config__vocab_size", 49, "of another size, or damaged"),
        ("text_config__num_attention_heads", 0, "must be a positive integer"),
        ("text_config__num_attention_heads", 3, "not divisible by its 3 heads"),
        ("contrastive_hidden_size", 13, "of another size, or damaged"),
    ],
)
def test_other_configurations(tmp_path: Path, path: str, value: object, said: str) -> None:
    assert said in problem(tmp_path, port_folder(tmp_path / "port", **{path: value}))


def test_damaged_folders(tmp_path: Path) -> None:
    tensors = port_state(random_model())[0]
    (tmp_path / "a").mkdir()
    for lost, said in (
        ("bridgetower.cross_modal_text_link_tower.0.LayerNorm.bias", "fusion.text_bridges.0.norm.bias"),
        ("itc_cross_modal_head.fc.bias", "pair_embedding.bias"),
        ("mlm_score.transform.dense.weight", "masked_head.head.transform.weight"),
        ("logit_scale", None),
    ):
        some = {name: tensor for name, tensor in tensors.items() if name != lost}
        source = port_folder(tmp_path / "a" / lost, tensors=some)
        if said is not None:
            assert said in problem(tmp_path, source)
        else:  # the heads without their temperature are of use
            _, report = converted(tmp_path, source)
            assert [entry.name for entry in report.missing] == ["temperature"]


def test_a_folder_without_its_configuration(tmp_path: Path) -> None:
    source = port_folder(tmp_path / "port")
    (source / "config.json").unlink()
    assert "has no config.json beside it" in problem(tmp_path, source)
    (source / "config.json").write_text("{")
    assert "not JSON" in problem(tmp_path, source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bridge": "gated"}, "bridges of kind 'gated'"),
        ({"bridged_layers": 1}, "bridges at 1 of 2 layers"),
        ({"bridged_layers": 0}, "bridges at 0 of 2 layers"),
        ({"text_layers": 4}, "3 layers in the image encoder and 4 in the text encoder"),
        ({"vision": replace(VISION, stem="convolution")}, "a convolution stem"),
        ({"vision": replace(VISION, heads=2)}, "2 heads in the image encoder"),
        ({"vision": replace(VISION, activation="gelu")}, "'gelu' in the image encoder"),
        ({"vision": replace(VISION, interpolation="bilinear")}, "bilinear interpolation"),
        ({"text": replace(TEXT, first_position=0)}, "text positions from 0 on"),
    ],
)
def test_what_the_port_cannot_express_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, replace(CONFIG, **changes))


def test_a_tokenizer_with_other_padding_is_refused(tmp_path: Path, vocab: Path) -> None:
    assert "padding of id 0" in refusal(tmp_path, CONFIG, wordpiece_from_vocab(vocab))


def test_only_a_bridgetower_and_only_to_a_new_folder(tmp_path: Path, model: MPlug) -> None:
    save_folder(tmp_path / "mplug", model)
    with pytest.raises(CheckpointError, match="holds a mplug, not a bridgetower"):
        export(tmp_path / "mplug", tmp_path / "port", "bridgetower-hf")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        export(tmp_path / "none", tmp_path / "port", "bridgetower-hf")
    with pytest.raises(CheckpointError, match="unknown layout 'clip'; known are bridgetower-hf"):
        export(tmp_path / "mplug", tmp_path / "port", "clip")
    with pytest.raises(CheckpointError, match="--image-size does not apply to --to bridgetower-hf"):
        export(tmp_path / "mplug", tmp_path / "port", "bridgetower-hf", Options(image_size=32))
    (tmp_path / "port").mkdir()
    (tmp_path / "port" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already; name a new folder"):
        exported(tmp_path, random_model())
    assert [file.name for file in (tmp_path / "port").iterdir()] == ["notes.txt"]


def test_what_is_left_out_is_reported(tmp_path: Path) -> None:
    config = replace(CONFIG, contrast="encoders", decoder_layers=1, fusion_norm_eps=1e-12)
    task = {"task": {"vqa": {}}, "task_state": {"head.classify.bias": torch.zeros(3)}}
    folder, report = exported(tmp_path, random_model(config), **task)
    reasons = {dropped.name.split(".")[0]: dropped.reason for dropped in report.dropped}
    assert reasons.keys() == {"decoder", "text_embedding", "image_embedding", "temperature"}
    assert reasons["decoder"] == "the port has no decoder"
    notes = " ".join(report.notes)
    for said in ("one eps for text encoder and cross-modal layers", "head of the task is left out", "no tokenizer"):
        assert said in notes
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["BridgeTowerForImageAndTextRetrieval"]
    assert not any(name.startswith(("itc_", "logit")) for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("resize", ["crop", "squash", "port"])
def test_the_ports_processor_does_what_ours_does(tmp_path: Path, resize: Resize) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer, preprocessing = byte_level(), Preprocessing(32, resize=resize)
    folder, _ = exported(tmp_path, random_model(), tokenizer, preprocessing)
    processor = transformers.BridgeTowerProcessor.from_pretrained(folder)
    texts = ["a cat sat", "two red dogs on the mat <mask>"]
    noise = torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0)).mul(255).byte().permute(1, 2, 0)
    for size in ((40, 30), (33, 64), (32, 32), (90, 41)):
        if resize == "port" and max(size) > 5 / 3 * min(size):
            continue  # so small, the port's side of 32 becomes 0
        picture = Image.fromarray(noise.numpy()).resize(size)
        found = processor(images=[picture, picture], text=texts, padding=True, return_tensors="pt")
        expected = preprocessing.normalize(preprocessing.test_transform()(picture)[None])[0]
        assert (found["pixel_values"][0] - expected).abs().mean() < 0.01  # it resizes tensors, not pictures
    ids_BL, mask_BL = tokenizer.encode_batch(texts, max_length=None, end=True)
    assert torch.equal(found["input_ids"], ids_BL)
    assert torch.equal(found["attention_mask"].bool(), mask_BL)
    assert processor.decode(ids_BL[0], skip_special_tokens=True) == "a cat sat"


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizer = byte_level()
    folder, _ = exported(tmp_path, random_model(), tokenizer)
    convert(folder, tmp_path / "out", "bridgetower-hf")
    loaded = load_folder(tmp_path / "out").tokenizer
    assert loaded is not None
    for mine, theirs in zip(
        loaded.encode_batch(["a cat"], max_length=9, end=True),
        tokenizer.encode_batch(["a cat"], max_length=9, end=True),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "ours", random_model())
    convert_command(tmp_path / "ours", tmp_path / "port", to="bridgetower-hf")
    written = json.loads(capsys.readouterr().out)
    assert len(written["mapped"]) == len(load_file(tmp_path / "port" / "model.safetensors")) - 2  # the pooler
    convert_command(tmp_path / "port", tmp_path / "out", "bridgetower-hf")
    assert_same_weights(load_folder(tmp_path / "out").model, random_model())  # type: ignore[arg-type]
    for both in ({}, {"from_": "bridgetower-hf", "to": "bridgetower-hf"}):
        with pytest.raises(ValueError, match="either --from or --to"):
            convert_command(tmp_path / "port", tmp_path / "more", **both)  # type: ignore[arg-type]
