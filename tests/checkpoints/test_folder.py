import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from triptych.checkpoints import folder as folder_module
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load, load_folder, push, save_folder
from triptych.data.tokenizers import Tokenizer, wordpiece_from_vocab
from triptych.data.transforms import Preprocessing
from triptych.models import MODELS, build
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.vision import VisionTransformer, resize_positions


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    theirs = second.state_dict()
    assert first.state_dict().keys() == theirs.keys()
    for name, tensor in first.state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def problem(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_folder(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path: Path, model: MPlug, vocab: Path) -> None:
    tokenizer = wordpiece_from_vocab(vocab)
    preprocessing = Preprocessing(16, mean=(0.1, 0.2, 0.3), resize="crop")
    head = {"classifier.weight": torch.randn(3, 2)}
    path = save_folder(
        tmp_path / "deep" / "run",
        model,
        tokenizer,
        preprocessing,
        card="# mine",
        task={"name": "vqa", "answers": 3},
        task_state=head,
    )
    loaded = load_folder(path)
    assert_same_weights(loaded.model, model)
    assert loaded.config == model.config
    assert (loaded.model_type, loaded.path) == ("mplug", path)
    assert loaded.preprocessing == preprocessing
    assert isinstance(loaded.tokenizer, Tokenizer)
    assert loaded.tokenizer.backend.get_vocab() == tokenizer.backend.get_vocab()
    assert loaded.task == {"name": "vqa", "answers": 3}
    assert torch.equal(loaded.task_state["classifier.weight"], head["classifier.weight"])
    assert (path / "README.md").read_text() == "# mine"
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    ids_BL, pixels_BCHW = torch.tensor([[1, 2]]), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for network in (model, loaded.vision_language_model()):
            network.eval()
        ours, theirs = (
            network.fuse(network.encode_image(pixels_BCHW), network.encode_text(ids_BL)).text_BLD
            for network in (model, loaded.vision_language_model())
        )
    assert torch.equal(ours, theirs)
    assert sorted(file.name for file in path.parent.iterdir()) == ["run"]


@pytest.mark.parametrize("model_type", list(MODELS))
def test_every_model_round_trips(tmp_path: Path, model_type: str) -> None:
    model = build(model_type, "tiny")
    loaded = load_folder(save_folder(tmp_path / "run", model))
    assert_same_weights(loaded.model, model)
    assert (loaded.tokenizer, loaded.preprocessing, loaded.task, loaded.task_state) == (None, None, None, {})
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"`{model_type}`" in card
    assert "M parameters" in card


def test_type_and_device(tmp_path: Path, model: MPlug) -> None:
    path = save_folder(tmp_path / "half", model.bfloat16())
    assert load_folder(path).model.state_dict()["temperature"].dtype == torch.bfloat16
    assert_same_weights(load_folder(path).model, model)
    loaded = load(path, device="cpu", dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_state_from_elsewhere(tmp_path: Path, model: MPlug) -> None:
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    loaded = load_folder(save_folder(tmp_path / "sharded", model, state=state))
    assert torch.equal(loaded.model.state_dict()["temperature"], model.temperature + 1)


def test_parts(tmp_path: Path, config: MPlugConfig) -> None:
    part = VisionTransformer(config.vision)
    loaded = load_folder(save_folder(tmp_path / "part", part))
    assert_same_weights(loaded.model, part)
    with pytest.raises(CheckpointError, match="holds only a part"):
        loaded.vision_language_model()
    with pytest.raises(CheckpointError, match="Linear: no checkpoint format"):
        save_folder(tmp_path / "other", torch.nn.Linear(2, 2))


def test_another_image_size(tmp_path: Path, model: MPlug) -> None:
    path = save_folder(tmp_path / "run", model, preprocessing=Preprocessing(16))
    loaded = load(path, image_size=32)
    assert loaded.config.vision.image_size == 32
    assert loaded.preprocessing == Preprocessing(32)
    state = loaded.model.state_dict()
    assert torch.equal(state["vision.position_embedding"], resize_positions(model.vision.position_embedding, (4, 4)))
    assert torch.equal(state["vision.class_embedding"], model.vision.class_embedding)
    assert_same_weights(load(path, image_size=16).model, model)
    for size, said in ((20, "not a multiple of patch"), (0, "image_size must be at least 1")):
        with pytest.raises(CheckpointError, match=said):
            load(path, image_size=size)
    part = save_folder(tmp_path / "part", VisionTransformer(model.config.vision))
    with pytest.raises(CheckpointError, match="image size of a clip-vision cannot be changed"):
        load(part, image_size=32)


class StoppedError(BaseException):
    """The process ends here."""


def stop_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int) -> None:
    """Let the ``call``-th call of a function end the process."""
    real: Callable[..., Any] = getattr(target, name)
    calls = 0

    def fake(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise StoppedError
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, fake)


@pytest.mark.parametrize(
    ("target", "name", "call", "replaced"),
    [
        (folder_module, "save_file", 1, False),
        (folder_module, "_default_card", 1, False),
        (folder_module, "_sync", 1, False),
        (folder_module, "_sync", 4, False),
        (Path, "rename", 1, False),
        (Path, "rename", 2, False),
        (folder_module, "_sync", 5, True),
        (shutil, "rmtree", 2, True),
    ],
)
def test_a_stopped_writer_leaves_a_whole_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: MPlugConfig,
    target: Any,
    name: str,
    call: int,
    replaced: bool,
) -> None:
    old, new, newest = MPlug(config), MPlug(config), MPlug(config)
    path = save_folder(tmp_path / "run", old)
    with monkeypatch.context() as patch:
        stop_at(patch, target, name, call)
        with pytest.raises(StoppedError):
            save_folder(path, new)
    assert_same_weights(load_folder(path).model, new if replaced else old)
    assert_same_weights(load(path).model, new if replaced else old)
    save_folder(path, newest)  # and the next one tidies up
    assert_same_weights(load_folder(path).model, newest)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_failing_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MPlugConfig
) -> None:
    old = MPlug(config)
    path = save_folder(tmp_path / "run", old)
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*Input/output error"):
            save_folder(path, MPlug(config))
    assert path.is_dir()
    assert_same_weights(load_folder(path).model, old)


def test_a_new_checkpoint_through_a_link(tmp_path: Path, model: MPlug) -> None:
    real = save_folder(tmp_path / "real", model)
    (tmp_path / "link").symlink_to(real)
    with torch.no_grad():
        model.temperature += 1
    save_folder(tmp_path / "link", model)
    assert (tmp_path / "link").is_symlink()
    assert_same_weights(load_folder(real).model, model)


def test_other_peoples_files_are_not_replaced(tmp_path: Path, model: MPlug) -> None:
    path = save_folder(tmp_path / "run", model)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        save_folder(path, model)
    assert (path / "notes.txt").read_text() == "mine"
    (tmp_path / "README.md").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        save_folder(tmp_path / "home", model)
    with pytest.raises(CheckpointError, match="is a file"):
        save_folder(tmp_path / "README.md", model)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_folder(tmp_path / "README.md" / "run", model)
    with pytest.raises(CheckpointError, match="not a folder of its own"):
        save_folder("/", model)
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "empty", model)


def test_a_task_that_is_no_json(tmp_path: Path, model: MPlug) -> None:
    with pytest.raises(CheckpointError, match="task's description is not JSON"):
        save_folder(tmp_path / "run", model, task={"labels": {1, 2}})
    assert not (tmp_path / "run").exists()


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        if value is ...:
            del config[name]
        else:
            config[name] = value
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": ...}, "of another library: convert it first"),
        ({"format_version": 2}, "newer version of triptych (format 2)"),
        ({"format_version": "1"}, "format_version must be a positive integer"),
        ({"model_type": "blip"}, "model_type must be one of"),
        ({"model_type": ["mplug"]}, "model_type must be one of"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"task": ...}, "field 'task' is missing"),
        ({"task": 3}, "task: must be an object or null"),
        ({"preprocessing": {"size": 3}}, "preprocessing"),
        ({"preprocessing": {"image_size": 0}}, "image_size must be at least 1"),
        ({"preprocessing": 3}, "preprocessing"),
        ({"model": {}}, "model: field 'vision' is missing"),
        ({"model": 3}, "model: must be an object"),
    ],
)
def test_broken_configurations(tmp_path: Path, model: MPlug, changes: dict[str, object], said: str) -> None:
    path = save_folder(tmp_path / "run", model)
    edit(path, **changes)
    assert said in problem(path)


def test_configuration_and_weights_must_agree(tmp_path: Path, model: MPlug) -> None:
    path = save_folder(tmp_path / "run", model)
    config = json.loads((path / "config.json").read_text())
    for field, value, said in (
        ("embed_dim", 9, "image_projection.weight is [8, 32], but [9, 32]"),
        ("text_layers", 3, "has no text.blocks.2.attention.query.weight"),
        ("text_layers", 1, "has text.blocks.1."),
        ("text", {**config["model"]["text"], "heads": 5}, "no model has these sizes"),
        ("vision", {**config["model"]["vision"], "patch": 5}, "not a multiple of patch"),
    ):
        edit(path, model={**config["model"], field: value})
        assert said in problem(path)


def test_damaged_files(tmp_path: Path, model: MPlug, vocab: Path) -> None:
    assert "no such checkpoint folder" in problem(tmp_path / "none")
    path = save_folder(tmp_path / "run", model, wordpiece_from_vocab(vocab))
    (path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in problem(path)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-10])
    assert "model.safetensors: damaged" in problem(path)
    (path / "model.safetensors").unlink()
    assert "model.safetensors: the file is missing" in problem(path)
    (path / "config.json").write_text("{")
    assert "config.json: not JSON" in problem(path)
    (path / "config.json").unlink()
    assert "it has no config.json" in problem(path)


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: MPlug) -> None:
    cached = save_folder(tmp_path / "cache" / "snapshot", model)
    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        assert "model.safetensors" in allow_patterns
        if repo_id != "someone/mplug":
            raise LocalEntryNotFoundError("offline, and not in the cache")
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert_same_weights(load("someone/mplug", revision="v1").model, model)
    assert asked == [("someone/mplug", "v1")]
    with pytest.raises(
        CheckpointError, match="someone/else: no such folder here, and not loadable from the Hub: offline"
    ):
        load("someone/else")
    asked.clear()

    save_folder(tmp_path / "local" / "run", model)
    load("local/run")  # looks like an id, but is a folder
    for name in ("nowhere", "./runs/vqa", "a/b/c", "/abs/path"):
        with pytest.raises(CheckpointError, match="not a Hub id"):
            load(name)
    with pytest.raises(CheckpointError, match="has no revisions"):
        load("local/run", revision="v1")
    assert asked == []  # nothing was downloaded


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: MPlug) -> None:
    path = save_folder(tmp_path / "run", model)
    done: list[object] = []

    class FakeApi:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            if repo_id == "not/allowed":
                raise OSError("403")
            done.append(("create", repo_id, private, exist_ok))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
            done.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    assert push(path, "me/model", private=True) == "https://hub/me/model"
    assert done == [("create", "me/model", True, True), ("upload", "me/model", path)]
    with pytest.raises(CheckpointError, match="cannot be uploaded to not/allowed: 403"):
        push(path, "not/allowed")
    state = load_file(path / "model.safetensors")
    del state["temperature"]
    save_file(state, path / "model.safetensors")
    done.clear()
    with pytest.raises(CheckpointError, match="has no temperature"):
        push(path, "me/model")
    assert done == []
