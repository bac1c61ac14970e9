import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from triptych.checkpoints.convert import convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.options import Options
from triptych.models.mplug import MPlug
from triptych.models.vision import resize_positions

Tensors = dict[str, Tensor]
HEADS = Options(vision_heads=4, text_heads=4)
"""The recorded networks are narrower than one head of 64."""


def converted(
    tmp_path: Path, content: object, options: Options = HEADS, kind: str = "mplug"
) -> tuple[MPlug, Report, Path]:
    """Written as a .pth, converted and loaded again."""
    torch.save(content, tmp_path / "mplug_base.pth")
    report = convert(tmp_path / "mplug_base.pth", tmp_path / "out", kind, options)
    loaded = load_folder(tmp_path / "out")
    assert isinstance(loaded.model, MPlug)
    return loaded.model, report, loaded.path


def problem(tmp_path: Path, content: object, options: Options = HEADS, kind: str = "mplug") -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, content, options, kind)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def renamed(official: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): tensor for name, tensor in official.items()}


def fine_tuned(official: Tensors, *lacks: str) -> Tensors:
    """As fine-tuning saves it: the fusion encoder without ``bert.``, and without the heads its task does not run."""
    return {
        name.replace("fusion_encoder.bert.", "fusion_encoder."): tensor
        for name, tensor in official.items()
        if not name.startswith(("fusion_encoder.cls.", *lacks))
    }


def momentum(official: Tensors) -> Tensors:
    """With momentum copies (twice the weights) and queues."""
    parts = ("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder", "vision_proj", "text_proj")
    copies = {
        name.replace(part, f"{part}_m", 1): tensor * 2 if tensor.is_floating_point() else tensor
        for name, tensor in official.items()
        for part in parts
        if name.split(".")[0] == part
    }
    queues = {name: torch.randn(16, 8) for name in ("image_queue", "text_queue")}
    return {**official, **copies, **queues, "queue_ptr": torch.zeros(1, dtype=torch.long)}


def assert_same_weights(first: MPlug, second: MPlug) -> None:
    theirs = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_pretrained_file(tmp_path: Path, official: Tensors) -> None:
    model, report, folder = converted(tmp_path, {"model": official})
    config = model.config
    assert (config.vision.width, config.vision.layers, config.vision.patch, config.vision.image_size) == (32, 3, 8, 32)
    assert (config.text.vocab_size, config.text.width, config.text.ffn, config.text.max_positions) == (120, 32, 128, 64)
    assert (config.text_layers, config.fusion_layers, config.decoder_layers) == (2, 6, 3)
    assert (config.stride, config.embed_dim, config.vision.attention_dropout) == (3, 16, 0.1)
    assert (report.missing, report.unexpected) == ([], [])

    reasons = {dropped.name: dropped.reason for dropped in report.dropped}
    assert reasons["fusion_encoder.bert.encoder.layer.1.intermediate.dense.weight"].startswith("fusion layer below")
    assert "never run" in reasons["fusion_encoder.bert.encoder.layer.5.crossattention.self.query.weight"]
    assert "tied" in reasons["text_decoder.cls.predictions.decoder.weight"]
    assert "segment 0" in reasons["text_encoder.embeddings.token_type_embeddings.weight"]
    assert "never run" in reasons["fusion_encoder.bert.embeddings.LayerNorm.weight"]
    assert reasons["fusion_encoder.bert.embeddings.position_ids"] == "a constant"
    assert reasons["visual_encoder.visual.proj"] == "CLIP's projection, unused"
    used = {source for mapped in report.mapped for source in mapped.sources}
    assert used | reasons.keys() == official.keys()  # every tensor of the file is accounted for
    assert {mapped.name for mapped in report.mapped} == model.state_dict().keys()
    assert "stride 3 (default for this size; no tensor tells)" in report.notes
    assert "the upper 6 of 8 fusion layers run (default; no tensor tells)" in report.notes
    assert any("no vocabulary" in note for note in report.notes)
    assert (folder / "conversion.json").read_text() == report.to_json() + "\n"
    preprocessing = load_folder(folder).preprocessing
    assert preprocessing is not None
    assert (preprocessing.image_size, preprocessing.resize) == (32, "squash")


def test_the_large_layout(tmp_path: Path, goldens: Path) -> None:
    content = torch.load(goldens / "mplug_large_stride6" / "official_layout.pth", weights_only=True)
    model, report, _ = converted(tmp_path, content, Options(vision_heads=6, text_heads=4))
    assert model.config.stride == 6
    assert torch.equal(model.state_dict()["bridge.linear.weight"], content["model"]["visn_fc.weight"])
    assert not any("crossattention" in dropped.name and "layer.5" in dropped.name for dropped in report.dropped)


@pytest.mark.parametrize("fusion", ["bert.", "fusion.", "", "fusion.bert."])
@pytest.mark.parametrize("text", ["bert.", ""])
@pytest.mark.parametrize("outer", ["", "module.", "model."])
def test_prefix_variants(tmp_path: Path, official: Tensors, fusion: str, text: str, outer: str) -> None:
    def change(name: str) -> str:
        name = name.replace("fusion_encoder.bert.", f"fusion_encoder.{fusion}")
        return outer + name.replace("text_encoder.", f"text_encoder.{text}")

    (tmp_path / "plain").mkdir()
    plain, _, _ = converted(tmp_path / "plain", {"model": official})
    model, report, _ = converted(tmp_path, {"model": {"module": renamed(official, change)}})
    assert_same_weights(model, plain)
    assert f"text_encoder.{text}embeddings.LayerNorm.bias" in {m.sources[0] for m in report.mapped}


def test_two_spellings_in_one_file_are_refused(tmp_path: Path, official: Tensors) -> None:
    both = {**official, **fine_tuned(official)}
    assert "no place in the model: fusion_encoder." in problem(tmp_path, both)


def test_clip_text_tower_is_dropped(tmp_path: Path, official: Tensors) -> None:
    tower = {
        f"visual_encoder.{name}": torch.randn(3)
        for name in (
            "positional_embedding",
            "text_projection",
            "logit_scale",
            "token_embedding.weight",
            "ln_final.weight",
            "transformer.resblocks.0.attn.in_proj_weight",
        )
    }
    _, report, _ = converted(tmp_path, {**official, **tower})
    assert tower.keys() <= {d.name for d in report.dropped if d.reason == "CLIP's text tower, unused"}


def test_fine_tuned_for_vqa_keeps_its_fusion_encoder(tmp_path: Path, official: Tensors) -> None:
    """The official loader deletes it (spec section 4): a name that needs no renaming is removed."""
    content = fine_tuned(official, "itm_head", "vision_proj", "text_proj", "temp")
    message = problem(tmp_path, content)
    assert "fine-tuned for question answering or captioning" in message
    for glob in ("'image_projection.*'", "'text_projection.*'", "'match_head.*'", "'masked_head.*'", "temperature"):
        assert glob in message
    allowed = ("masked_head.*", "*_projection.*", "match_head.*", "temperature")
    model, report, _ = converted(tmp_path, content, Options(vision_heads=4, text_heads=4, allow_missing=allowed))
    (tmp_path / "full").mkdir()
    whole, _, _ = converted(tmp_path / "full", official)
    missing = {entry.name for entry in report.missing}
    theirs = whole.state_dict()
    for name, tensor in model.state_dict().items():
        assert (name in missing) != torch.equal(tensor, theirs[name]) or name == "temperature", name
    assert any(name.startswith("fusion.") for name in theirs)
    assert not any(name.startswith(("fusion.", "text.", "vision.", "decoder.")) for name in missing)
    assert torch.equal(model.masked_head.word.weight, official["fusion_encoder.bert.embeddings.word_embeddings.weight"])
    assert any("question answering" in note for note in report.notes)


def test_missing_heads_are_initialised_alike_every_time(tmp_path: Path, official: Tensors) -> None:
    content = fine_tuned(official, "itm_head", "vision_proj", "text_proj", "temp")
    first, _, _ = converted(tmp_path, content, Options(vision_heads=4, text_heads=4, allow_missing=("*",)))
    torch.manual_seed(5)
    second, _, _ = converted(tmp_path, content, Options(vision_heads=4, text_heads=4, allow_missing=("*",)))
    assert_same_weights(first, second)
    assert first.match_head.weight.std() > 0


def test_fine_tuned_for_retrieval(tmp_path: Path, official: Tensors) -> None:
    content = {**fine_tuned(official, "text_decoder"), "idx_queue": torch.zeros(1, 8, dtype=torch.long)}
    assert "fine-tuned for retrieval" in problem(tmp_path, content)
    options = Options(vision_heads=4, text_heads=4, decoder_layers=2, allow_missing=("masked_head.head.*", "decoder.*"))
    model, report, _ = converted(tmp_path, content, options)
    assert model.config.decoder_layers == 2
    assert {entry.name.split(".")[0] for entry in report.missing} == {"decoder", "masked_head"}


def test_modelscope(tmp_path: Path, official: Tensors) -> None:
    content = {
        "model": {"module": renamed(fine_tuned(official, "itm", "vision_proj", "text_proj", "temp"), "model.{}".format)}
    }
    options = Options(
        vision_heads=4, text_heads=4, allow_missing=("masked_head.*", "*_projection.*", "match_head.*", "temperature")
    )
    model, report, _ = converted(tmp_path, content, options, "mplug-modelscope")
    assert model.config.vision.attention_dropout == 0.0
    assert any("[SEP]" in note for note in report.notes)
    last = official["fusion_encoder.bert.encoder.layer.7.output.dense.weight"]
    assert torch.equal(model.state_dict()["fusion.layers.5.block.ffn.contract.weight"], last)


def test_momentum_copies_and_queues_are_dropped_or_kept(tmp_path: Path, official: Tensors) -> None:
    content = momentum(official)
    model, report, folder = converted(tmp_path, content)
    reasons = {dropped.reason for dropped in report.dropped}
    assert {"momentum copy", "contrastive queue"} <= reasons
    assert not (folder / "ema.safetensors").exists()

    options = Options(vision_heads=4, text_heads=4, keep_momentum=True, keep_queues=True)
    model, report, folder = converted(tmp_path, content, options)
    assert not {"momentum copy", "contrastive queue"} & {dropped.reason for dropped in report.dropped}
    ema, weights = load_file(folder / "ema.safetensors"), model.state_dict()
    assert weights.keys() - ema.keys() == {"match_head.weight", "match_head.bias", "temperature"}
    for name, tensor in ema.items():
        assert torch.equal(tensor, weights[name] * 2), name
    queues = load_file(folder / "queues.safetensors")
    assert torch.equal(queues["image_queue"], content["image_queue"])
    assert queues.keys() == {"image_queue", "text_queue", "queue_ptr"}


def test_nothing_to_keep(tmp_path: Path, official: Tensors) -> None:
    assert "no momentum" in problem(tmp_path, official, Options(vision_heads=4, text_heads=4, keep_momentum=True))
    assert "no queues" in problem(tmp_path, official, Options(vision_heads=4, text_heads=4, keep_queues=True))


def test_tied_weights_that_differ_are_refused(tmp_path: Path, official: Tensors) -> None:
    for name in ("text_decoder", "fusion_encoder"):
        changed = dict(official)
        changed[f"{name}.cls.predictions.decoder.weight"] = changed[f"{name}.cls.predictions.decoder.weight"] + 1
        assert f"{name}.cls.predictions.decoder.weight should be the same tensor" in problem(tmp_path, changed)


def test_missing_and_unexpected_tensors(tmp_path: Path, official: Tensors) -> None:
    lost = "text_encoder.encoder.layer.1.attention.self.value.bias"
    assert lost in problem(tmp_path, {name: tensor for name, tensor in official.items() if name != lost})
    more = {**official, "cls_head.0.weight": torch.zeros(2, 3)}
    assert "cls_head.0.weight [2, 3]" in problem(tmp_path, more)
    options = Options(vision_heads=4, text_heads=4, allow_unexpected=("cls_head.*",))
    _, report, _ = converted(tmp_path, more, options)
    assert [entry.name for entry in report.unexpected] == ["cls_head.0.weight"]


def test_other_image_size_resizes_the_position_table(tmp_path: Path, official: Tensors) -> None:
    model, report, folder = converted(tmp_path, official, Options(vision_heads=4, text_heads=4, image_size=48))
    table = official["visual_encoder.visual.positional_embedding"]
    assert torch.equal(model.vision.position_embedding, resize_positions(table, (6, 6)))
    assert "position table resized from 32 to 48 pixels (bilinear)" in report.notes
    preprocessing = load_folder(folder).preprocessing
    assert preprocessing is not None
    assert preprocessing.image_size == 48
    (tmp_path / "odd").mkdir()
    assert "not a multiple" in problem(tmp_path / "odd", official, Options(vision_heads=4, text_heads=4, image_size=50))


def test_settings_come_from_the_configuration_beside_the_file(tmp_path: Path, official: Tensors) -> None:
    beside = tmp_path / "config_bert.json"
    beside.write_text(
        '{"num_attention_heads": 2, "stride_layer": 2, "fusion_layers": 4, "layer_norm_eps": 1e-6, '
        '"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "hidden_act": "gelu"}'
    )
    model, report, _ = converted(tmp_path, official, Options(vision_heads=4))
    config = model.config
    assert (config.stride, config.fusion_layers, config.text.heads, config.text.layer_norm_eps) == (2, 4, 2, 1e-6)
    assert (config.text.dropout, config.text.attention_dropout) == (0.2, 0.3)
    assert any(f"stride 2 ({beside})" in note for note in report.notes)
    model, _, _ = converted(tmp_path, official, Options(vision_heads=4, stride=1, text_heads=4))
    assert (model.config.stride, model.config.text.heads) == (1, 4)


def test_a_recording_says_its_sizes(tmp_path: Path, recording: Path) -> None:
    report = convert(recording / "official_layout.pth", tmp_path / "out", "mplug")
    config, wanted = load_folder(tmp_path / "out").config, json.loads((recording / "config.json").read_text())
    assert {name: getattr(config.vision, name) for name in wanted["vision"]} == wanted["vision"]
    assert {name: getattr(config.text, name) for name in wanted["text"]} == wanted["text"]
    assert (config.stride, config.embed_dim) == (wanted["stride"], wanted["embed_dim"])
    assert not any("assumed" in note for note in report.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"stride_layer": "four"}', "stride_layer must be a positive integer"),
        ('{"layer_norm_eps": -1}', "layer_norm_eps must be a number"),
        ('{"hidden_act": "relu"}', "'relu'"),
        ("{", "not JSON"),
        ("[]", "JSON object"),
    ],
)
def test_a_broken_configuration_beside_the_file(tmp_path: Path, official: Tensors, text: str, said: str) -> None:
    (tmp_path / "config_bert.json").write_text(text)
    assert said in problem(tmp_path, official)


def test_options_that_do_not_fit(tmp_path: Path, official: Tensors) -> None:
    assert "--vision-heads" in problem(tmp_path, official, Options(text_heads=4))
    assert "not divisible" in problem(tmp_path, official, Options(vision_heads=5, text_heads=4))
    assert "has 8 fusion layers, 9" in problem(
        tmp_path, official, Options(vision_heads=4, text_heads=4, fusion_layers=9)
    )
    assert "has 3 decoder layers, 2" in problem(
        tmp_path, official, Options(vision_heads=4, text_heads=4, decoder_layers=2)
    )


def test_other_families_are_named(tmp_path: Path) -> None:
    bert = {"bert.embeddings.word_embeddings.weight": torch.zeros(3, 4)}
    assert "it looks like transformers' BERT (--from bert-hf)" in problem(tmp_path, bert)
    assert "--from eve" in problem(tmp_path, {"backbone.type_embed_vision": torch.zeros(1)})
    assert "--from bridgetower" in problem(tmp_path, {"cross_modal_image_layers.0.x": torch.zeros(1)})
    assert "does not know (first tensor: conv.weight)" in problem(tmp_path, {"conv.weight": torch.zeros(1)})
    vision = {"visual.conv1.weight": torch.zeros(1), "visual.class_embedding": torch.zeros(1)}
    assert "OpenAI's CLIP (--from clip)" in problem(tmp_path, vision)


def test_damaged_sizes(tmp_path: Path, official: Tensors) -> None:
    for name in ("visual_encoder.visual.positional_embedding", "text_encoder.embeddings.word_embeddings.weight"):
        assert name in problem(tmp_path, {**official, name: torch.zeros(3)})
    table = "visual_encoder.visual.positional_embedding"
    assert "square grid" in problem(tmp_path, {**official, table: torch.zeros(12, 32)})
    name = "text_encoder.encoder.layer.1.intermediate.dense.weight"
    assert "[64, 32] in the file" in problem(tmp_path, {**official, name: torch.zeros(64, 32)})
