"""Official files of BridgeTower and METER. (transformers' layout: test_bridgetower_hf.py)"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn

from triptych.checkpoints.bridgetower_heads import read_answers
from triptych.checkpoints.bridgetower_hf import port_state
from triptych.checkpoints.convert import convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import Loaded, load_folder
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.options import Options
from triptych.checkpoints.verify import format_checks, passed, verify
from triptych.data.tokenizers import Tokenizer
from triptych.models.bridgetower import BridgeTower, BridgeTowerConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig, resize_positions
from triptych.predict import Predictor
from triptych.tasks.base import Task

Tensors = dict[str, Tensor]
D = 64

VISION = VisionConfig(D, 3, 1, patch=8, image_size=32, interpolation="bicubic")
TEXT = TextConfig(50, D, 1, 80, 30, 1e-5, first_position=2)
BASE = BridgeTowerConfig(VISION, TEXT, text_layers=3, fusion_layers=2, embed_dim=12)
METER = replace(BASE, bridged_layers=0)

PORT_TO_OFFICIAL = (
    ("vision_model.visual.embeddings.patch_embedding.weight", "vit_model.visual.conv1.weight"),
    ("vision_model.visual.embeddings.class_embedding", "vit_model.visual.class_embedding"),
    ("vision_model.visual.embeddings.position_embedding.weight", "vit_model.visual.positional_embedding"),
    ("vision_model.", "vit_model."),
    ("text_model.", "text_transformer."),
)


def random_model(config: BridgeTowerConfig) -> BridgeTower:
    torch.manual_seed(0)
    model = BridgeTower(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.temperature.fill_(0.0713)
    return model


def official_name(name: str) -> str:
    name = name.removeprefix("bridgetower.")
    port, official = next((pair for pair in PORT_TO_OFFICIAL if name.startswith(pair[0])), ("", ""))
    return official + name.removeprefix(port)


def official(model: BridgeTower, *, contrastive: bool = False) -> Tensors:
    """The state dict of a pre-trained file; or of one fine-tuned for retrieval, which has no masked-language head."""
    tensors = {official_name(name): tensor for name, tensor in port_state(model)[0].items()}
    tensors["temperature"] = model.temperature.detach()
    tensors["vit_model.positional_embedding"] = torch.randn(7, 24)
    tensors |= {"vit_model.ln_final.weight": torch.ones(24), "vit_model.ln_final.bias": torch.zeros(24)}
    tensors["text_transformer.embeddings.position_ids"] = torch.arange(30)[None]
    if not contrastive:
        return tensors
    for side in ("text", "image"):
        head = getattr(model, f"{side}_embedding")
        tensors |= {f"itc_{side}_head.fc.{name}": tensor.detach() for name, tensor in head.named_parameters()}
    return without(tensors, "mlm_score.")


def without(tensors: Tensors, *prefixes: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def lightning(tensors: Tensors) -> dict[str, object]:
    """What Lightning saves around the weights."""
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": tensors,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-5}]}],
        "lr_schedulers": [{"last_epoch": 100}],
        "hyper_parameters": {"config": {"vit": "CLIP-ViT-B/16", "image_size": 32}},
    }


def converted(tmp_path: Path, tensors: Tensors, options: Options | None = None) -> tuple[Loaded, Report]:
    torch.save(lightning(tensors), tmp_path / "bridgetower.ckpt")
    report = convert(tmp_path / "bridgetower.ckpt", tmp_path / "out", "bridgetower", options)
    return load_folder(tmp_path / "out"), report


def problem(tmp_path: Path, tensors: Tensors, options: Options | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, tensors, options)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(found: nn.Module, expected: nn.Module, *but: str) -> None:
    theirs = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert name.startswith(but) or torch.equal(tensor, theirs[name]), name


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A byte-level tokenizer.json beside the weights."""
    backend = Backend(tokenizer_models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=45, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["a cat sat on the mat", "two red dogs"], trainer)
    Tokenizer(backend).save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def test_a_pretrained_file(tmp_path: Path) -> None:
    model = random_model(BASE)
    tensors = official(model)
    loaded, report = converted(tmp_path, tensors)
    heads = ("image_embedding.", "text_embedding.")
    assert loaded.config == replace(BASE, embed_dim=256)
    assert_same_weights(loaded.model, model, *heads)

    reasons = {dropped.name: dropped.reason for dropped in report.dropped}
    used = {source for mapped in report.mapped for source in mapped.sources}
    assert used | reasons.keys() == tensors.keys()  # every tensor of the file is accounted for
    assert {mapped.name for mapped in report.mapped} | {entry.name for entry in report.missing} == set(
        loaded.model.state_dict()
    )
    assert all(entry.name.startswith(heads) for entry in report.missing)
    assert "not in the file, so at their initial values: image_embedding, text_embedding" in report.notes
    assert reasons["vit_model.ln_final.bias"] == "CLIP's left-overs, never run"
    assert reasons["text_transformer.pooler.dense.weight"] == "RoBERTa's pooler, never run"
    assert reasons["text_transformer.embeddings.position_ids"] == "a constant"
    assert loaded.preprocessing is not None
    assert (loaded.preprocessing.image_size, loaded.preprocessing.resize) == (32, "crop")
    assert loaded.task is not None
    assert loaded.task["retrieval"]["candidates"] is None  # random embeddings must choose nothing
    assert not loaded.task_state


def test_a_file_for_retrieval_with_contrastive_heads(tmp_path: Path) -> None:
    model = random_model(BASE)
    loaded, report = converted(tmp_path, official(model, contrastive=True))
    assert loaded.config == BASE
    assert_same_weights(loaded.model, model, "masked_head.")
    assert {entry.name.split(".")[0] for entry in report.missing} == {"masked_head"}
    assert loaded.preprocessing is not None
    assert loaded.preprocessing.resize == "squash"
    assert loaded.task is not None
    assert (loaded.task["retrieval"]["candidates"], loaded.task["retrieval"]["shared_scores"]) == (128, True)


def test_the_ranking_head_takes_the_place_of_the_row_for_matches(tmp_path: Path) -> None:
    tensors = without(official(random_model(BASE)), "mlm_score.")
    tensors |= {"rank_output.weight": torch.randn(1, 2 * D), "rank_output.bias": torch.randn(1)}
    loaded, report = converted(tmp_path, tensors)
    head = loaded.vision_language_model().match_head
    assert isinstance(head, nn.Linear)
    assert torch.equal(head.weight[0], tensors["itm_score.fc.weight"][0])
    assert torch.equal(head.weight[1:], tensors["rank_output.weight"])
    assert torch.equal(head.bias, torch.cat([tensors["itm_score.fc.bias"][:1], tensors["rank_output.bias"]]))
    reasons = {dropped.name: dropped.reason for dropped in report.dropped}
    assert "rank_output" in reasons["itm_score.fc.weight"]
    assert any("probabilities of a match mean nothing" in note for note in report.notes)


@pytest.mark.parametrize("gather", [False, True])
def test_meter(tmp_path: Path, gather: bool) -> None:
    vision = replace(VISION, layers=2)  # its encoders need not be equally deep: official METER leaves out a layer
    model = random_model(replace(METER, gather_layers=gather, vision=vision))
    loaded, report = converted(tmp_path, official(model, contrastive=True))
    assert loaded.config == model.config
    assert_same_weights(loaded.model, model, "masked_head.")
    assert "no bridges in the file: it is a METER" in report.notes


def classifier(name: str, width: int, hidden: int, classes: int) -> tuple[nn.Sequential, Tensors]:
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return head.eval(), {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}


def fine_tuned(model: BridgeTower, head: Tensors) -> Tensors:
    return without(official(model), "mlm_score.", "itm_score.") | head


def task_of(folder: Path, name: str) -> tuple[Task, BridgeTower]:
    """As ``triptych evaluate`` and ``predict`` make it."""
    task = Predictor.load(folder).task(name)
    assert isinstance(task.model, BridgeTower)
    return task, task.model


@torch.no_grad()
@pytest.mark.parametrize("hidden", [256, 128, 200, 171])
def test_a_classifier_for_questions(tmp_path: Path, tokenizer: Path, hidden: int) -> None:
    model = random_model(BASE)
    head, tensors = classifier("vqa_classifier", 2 * D, hidden, 3)
    (tmp_path / "answers.json").write_text('["yes", "no", "2"]')
    loaded, report = converted(tmp_path, fine_tuned(model, tensors), Options(answers=tmp_path / "answers.json"))
    assert loaded.task is not None
    assert (loaded.task["vqa"]["answering"], loaded.task["vqa"]["answers"]) == ("classify", ["yes", "no", "2"])
    assert {"masked_head", "match_head"} <= {entry.name.split(".")[0] for entry in report.missing}
    task, _ = task_of(tmp_path / "out", "vqa")
    pooled_QP = torch.randn(5, 2 * D)
    assert torch.equal(task.head(pooled_QP), head(pooled_QP))  # type: ignore[operator]
    assert loaded.preprocessing is not None
    assert loaded.preprocessing.resize == "squash"


def test_a_classifier_without_its_answers_is_left_out(tmp_path: Path) -> None:
    _, tensors = classifier("vqa_classifier", 2 * D, 256, 3)
    loaded, report = converted(tmp_path, fine_tuned(random_model(BASE), tensors))
    reasons = {dropped.name: dropped.reason for dropped in report.dropped}
    assert reasons["vqa_classifier.3.weight"] == ("its 3 answers are not in the file: give their list with --answers")
    assert (loaded.task, loaded.task_state) == ({"recipe": "published, without a head"}, {})  # and so no task


@torch.no_grad()
def test_a_classifier_for_entailment(tmp_path: Path, tokenizer: Path) -> None:
    head, tensors = classifier("snli_classifier", 2 * D, 256, 3)
    converted(tmp_path, fine_tuned(random_model(BASE), tensors))
    task, _ = task_of(tmp_path / "out", "entailment")
    pooled_QP = torch.randn(5, 2 * D)
    assert torch.equal(task.head(pooled_QP), head(pooled_QP))  # type: ignore[operator]


@torch.no_grad()
def test_nlvr2_with_a_type_for_each_picture(tmp_path: Path, tokenizer: Path) -> None:
    model = random_model(BASE)
    head, tensors = classifier("nlvr2_classifier", 4 * D, int(2 * D * 1.5), 2)
    second_D = torch.randn(D)
    file = fine_tuned(model, tensors)
    file["token_type_embeddings.weight"] = torch.cat([file["token_type_embeddings.weight"], second_D[None]])
    _, report = converted(tmp_path, file)
    assert any("equal but for rounding" in note for note in report.notes)

    task, _ = task_of(tmp_path / "out", "nlvr2")
    pixels = torch.randint(256, (2, 2, 3, 32, 32), dtype=torch.uint8)  # two pairs
    batch = task.batch(pixels, torch.arange(2), [], max_tokens=9)  # type: ignore[operator]
    text = task.tokens(["a cat sat", "two red dogs on the mat"], 9)  # type: ignore[operator]
    batch = replace(batch, statement=text)
    pooled = []
    for side, type_D in ((0, model.image_projection.token_type.clone()), (1, second_D)):
        model.image_projection.token_type.copy_(type_D)
        image = model.encode_image(task.preprocessing.normalize(pixels[:, side]))
        pooled.append(model.fuse(image, model.encode_text(text.ids_BL, text.mask_BL)).pooled_BP)
    expected = head(torch.cat(pooled, dim=1))
    torch.testing.assert_close(task._logits(batch), expected, atol=1e-5, rtol=0)  # type: ignore[operator]


def test_a_third_type_without_its_classifier_is_reported(tmp_path: Path) -> None:
    tensors = official(random_model(BASE))
    table = tensors["token_type_embeddings.weight"]
    tensors["token_type_embeddings.weight"] = torch.cat([table, table[1:]])
    loaded, report = converted(tmp_path, tensors)
    assert any(dropped.name == "token_type_embeddings.weight" for dropped in report.dropped)
    assert_same_weights(loaded.model, random_model(BASE), "image_embedding.", "text_embedding.")


def test_a_classifier_of_one_layer_is_left_out(tmp_path: Path) -> None:
    tensors = {"snli_classifier.0.weight": torch.randn(3, 2 * D), "snli_classifier.0.bias": torch.randn(3)}
    loaded, report = converted(tmp_path, fine_tuned(random_model(BASE), tensors))
    assert {dropped.reason for dropped in report.dropped} >= {"a classifier of one layer, which no task here has"}
    assert loaded.task == {"recipe": "published, without a head"}


def test_another_resolution_is_interpolated_bicubically(tmp_path: Path) -> None:
    model = random_model(BASE)
    loaded, report = converted(tmp_path, official(model), Options(image_size=48))
    table = loaded.model.state_dict()["vision.position_embedding"]
    assert torch.equal(table, resize_positions(model.vision.position_embedding.detach(), (6, 6), "bicubic"))
    assert "position table resized from 32 to 48 pixels (bicubic)" in report.notes
    assert loaded.preprocessing is not None
    assert loaded.preprocessing.image_size == 48


def test_blocks_above_the_depth_of_the_text_encoder_are_never_read(tmp_path: Path) -> None:
    deeper = random_model(replace(BASE, vision=replace(VISION, layers=4)))
    loaded, report = converted(tmp_path, official(deeper))
    assert loaded.config.vision.layers == 3
    names = {dropped.name for dropped in report.dropped if dropped.reason == "above the topmost layer that is read"}
    assert len(names) == 12
    assert all("resblocks.3." in name for name in names)


def test_an_image_encoder_that_is_too_shallow(tmp_path: Path) -> None:
    shallow = random_model(replace(BASE, vision=replace(VISION, layers=2)))
    assert "has 2 layers, fewer than the 3 of its text encoder" in problem(tmp_path, official(shallow))


def changed(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def lost(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lost("mlm_score.transform.dense.bias"), "masked_head.head.transform.bias"),
        (lost("cross_modal_text_link_tower.0.LayerNorm.bias"), "fusion.text_bridges.0.norm.bias"),
        (lost("cross_modal_image_layers.1.output.dense.weight"), "fusion.layers.1.image_block.ffn.contract.weight"),
        (lost("temperature"), "temperature"),
        (lost("vit_model.visual.positional_embedding"), "from which the sizes are read"),
        (lost("text_transformer.embeddings.word_embeddings.weight"), "from which the sizes are read"),
        (changed("itm_score.fc.weight", torch.zeros(2, 3)), "of another size, or damaged"),
        (changed("cross_modal_text_layers.0.attention.self.key.weight", torch.zeros(3, 3)), "cannot make"),
        (changed("token_type_embeddings.weight", torch.zeros(1, D)), "cannot make text_projection.token_type"),
        (changed("text_transformer.embeddings.token_type_embeddings.weight", torch.zeros(2, D)), "no RoBERTa"),
        (changed("colour.weight", torch.zeros(2)), "no place in the model: colour.weight"),
        (changed("rank_output.weight", torch.zeros(1, 3)), "cannot make match_head.weight"),
        (changed("vit_model.visual.class_embedding", torch.zeros(96)), "give --vision-heads"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Tensors], None], said: str) -> None:
    tensors = official(random_model(BASE))
    damage(tensors)
    assert said in problem(tmp_path, tensors)


def test_a_damaged_classifier(tmp_path: Path) -> None:
    _, tensors = classifier("nlvr2_classifier", 4 * D, 192, 2)
    file = fine_tuned(random_model(BASE), tensors)
    assert "picture_types" in problem(tmp_path, file)  # without the row of the second picture
    file["token_type_embeddings.weight"] = torch.zeros(3, D)
    del file["nlvr2_classifier.1.bias"]
    assert "task.head.norm.bias" in problem(tmp_path, file)


def test_answers_without_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    options = Options(answers=tmp_path / "answers.txt")
    assert "--answers is for a file with vqa_classifier" in problem(tmp_path, official(random_model(BASE)), options)


def test_other_kinds_of_files_say_what_they_are(tmp_path: Path) -> None:
    model = random_model(BASE)
    port = port_state(model)[0]
    save_file(port, tmp_path / "model.safetensors")
    save_file(without(official(model), "text_transformer.embeddings.position_ids"), tmp_path / "official.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers' BridgeTower \(--from bridgetower-hf\)"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", "bridgetower")
    with pytest.raises(CheckpointError, match=r"a BridgeTower checkpoint \(--from bridgetower\)"):
        convert(tmp_path / "official.safetensors", tmp_path / "out", "bridgetower-hf")


class Callbacks:
    """Stands for what a training script might have pickled."""


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    content = lightning(official(random_model(BASE)))
    content["hyper_parameters"] = {"config": Callbacks()}
    torch.save(content, tmp_path / "bridgetower.ckpt")
    with pytest.raises(CheckpointError, match="refused"):
        convert(tmp_path / "bridgetower.ckpt", tmp_path / "out", "bridgetower")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("answers.json", ["yes", "no", "2"]),
        ("answers.json", {"no": 1, "yes": 0, "2": 2}),
        ("answers.json", {"1": "no", "2": "2", "0": "yes"}),
        ("answers.json", {"ans2label": {"no": 1, "yes": 0, "2": 2}, "other": 1}),
        ("answers.json", {"label2ans": ["yes", "no", "2"]}),
        ("config.json", {"model_type": "vilt", "id2label": {"0": "yes", "1": "no", "2": "2"}}),
        ("answers.txt", "yes\nno\n2\n"),
        ("answers", "yes\nno\n2"),
    ],
)
def test_lists_of_answers(tmp_path: Path, name: str, content: object) -> None:
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_answers(tmp_path / name, 3) == ("yes", "no", "2")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '["yes", "no"]', "has 2 answers, but the classifier 3 classes"),
        ("a.json", '["yes", "no", "yes"]', "has the answer 'yes' twice"),
        ("a.json", '["yes", "no"', "not JSON"),
        ("a.json", '["yes", "no", 2]', "must hold a list of answers"),
        ("a.json", "3", "must hold a list of answers"),
        ("a.json", '{"yes": 0, "no": 1, "maybe": 3}', "must number the answers 0 to 2, each once"),
        ("a.json", '{"yes": 0, "no": 1, "maybe": null}', "must number the answers 0 to 2"),
        ("a.txt", "yes\nno", "has 2 answers"),
        ("none.txt", None, "cannot be read"),
        ("a.txt", b"\xff\xfe", "not a text file"),
    ],
)
def test_wrong_lists_of_answers(tmp_path: Path, name: str, content: str | bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        read_answers(tmp_path / name, 3)
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.fixture
def recording(shared: Path) -> Path:
    return shared / "goldens" / "bridgetower_tiny"


def test_parity_with_the_official_code(recording: Path) -> None:
    checks = verify(recording, 1e-5)
    recorded = {name[4:] for name in load_file(recording / "io.safetensors") if name.startswith("out.")}
    assert {check.name for check in checks} == recorded
    assert len(recorded) == 8
    assert passed(checks), format_checks(checks, 1e-5)


def test_the_official_file_converts(recording: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("".join(f"answer {number}\n" for number in range(17)))
    options = Options(text_heads=2, answers=tmp_path / "answers.txt")
    report = convert(recording / "official_layout.ckpt", tmp_path / "out", "bridgetower", options)
    loaded = load_folder(tmp_path / "out")
    assert (report.missing, report.unexpected) == ([], [])
    assert loaded.task_state.keys() == {
        f"head.{part}.{kind}" for part in ("expand", "norm", "classify") for kind in ("weight", "bias")
    }


def copied(recording: Path, tmp_path: Path, edit: Callable[[dict[str, object], Tensors, Tensors], None]) -> Path:
    """The recording with its config.json, weights or io.safetensors changed."""
    folder = tmp_path / "recording"
    folder.mkdir()
    config = json.loads((recording / "config.json").read_text())
    weights = torch.load(recording / "official_layout.ckpt", weights_only=True)["state_dict"]
    io = load_file(recording / "io.safetensors")
    edit(config, weights, io)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": weights}, folder / "official_layout.ckpt")
    save_file(io, folder / "io.safetensors")
    return folder


def test_changes_of_a_recording_fail(recording: Path, tmp_path: Path) -> None:
    def worse(config: dict[str, object], weights: Tensors, io: Tensors) -> None:
        io["out.pooled"][0, 0] += 3e-4
        weights["vqa_classifier.3.bias"][2] += 0.01

    checks = verify(copied(recording, tmp_path, worse))
    assert {check.name for check in checks if not check.ok} == {"pooled", "vqa_logits"}


def test_a_recording_without_heads(recording: Path, tmp_path: Path) -> None:
    def bare(config: dict[str, object], weights: Tensors, io: Tensors) -> None:
        for name in [key for key in weights if key.startswith(("mlm_", "itm_", "itc_", "vqa_"))]:
            del weights[name]
        for name in [key for key in io if "logits" in key or "itc" in key]:
            del io[name]

    checks = verify(copied(recording, tmp_path, bare))
    assert {check.name for check in checks} == {"text_features", "image_features", "pooled"}
    assert passed(checks)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("width", "64", "width must be of type int"),
        ("vision", [], "vision must be of type dict"),
        ("vision", {"layers": 4}, "config.json: vision: field 'heads' is missing"),
        ("text", {"layers": 4, "pad": 1, "colour": 1}, "cross_modal must have heads and ffn of text"),
        (
            "cross_modal",
            {"layers": 2, "heads": 4, "ffn": 256, "layer_norm_eps": 1e-12},
            "must have heads and ffn of text",
        ),
        ("cross_modal", {"heads": 2, "ffn": 256, "layer_norm_eps": 1e-12}, "cross_modal.layers must be of type int"),
        ("bridge", "rope", "bridge must be one of add"),
        ("answers", 16, "do not fit the sizes"),
        ("head_hidden_scale", None, "head_hidden_scale must be of type float"),
    ],
)
def test_broken_configurations(recording: Path, tmp_path: Path, field: str, value: object, said: str) -> None:
    def edit(config: dict[str, object], weights: Tensors, io: Tensors) -> None:
        config[field] = value

    with pytest.raises(CheckpointError) as caught:
        verify(copied(recording, tmp_path, edit))
    assert said in str(caught.value)
