"""Our own format: a folder.

- ``config.json``: ``format``, ``format_version``, ``triptych_version``, ``model_type``, ``model`` (the configuration's
  fields), ``preprocessing`` and ``task`` (each may be null)
- ``model.safetensors``: every tensor of the model, under its module names
- ``tokenizer.json``, where there is a tokenizer
- ``task.safetensors``: the parameters of a task's own head; ``ema.safetensors``: averaged weights;
  ``queues.safetensors``: contrastive queues
- ``conversion.json``: what a converter did
- ``README.md``: the model card
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import triptych
from triptych.checkpoints.beit import Beit, BeitConfig
from triptych.checkpoints.bert import Bert, BertConfig
from triptych.checkpoints.beside import read_json
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.configs import from_json, to_json
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.reading import Tensors
from triptych.data.tokenizers import Tokenizer
from triptych.data.transforms import Preprocessing
from triptych.models import MODELS
from triptych.models.protocol import VisionLanguageModel
from triptych.models.vision import VisionConfig, VisionTransformer, resize_positions

FORMAT = "triptych-checkpoint"
FORMAT_VERSION = 1

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
TASK_WEIGHTS, EMA, QUEUES, CONVERSION = (
    "task.safetensors",
    "ema.safetensors",
    "queues.safetensors",
    "conversion.json",
)
FILES = (CONFIG, WEIGHTS, TOKENIZER, CARD, TASK_WEIGHTS, EMA, QUEUES, CONVERSION)
_POSITION_TABLES = ("vision.position_embedding", "image_embeddings.position_embedding")
_HUB_FILES = (".gitattributes", ".cache", ".gitignore", ".git")


@dataclass(frozen=True)
class Family:
    """A kind of model that a folder can hold."""

    model: type[nn.Module]
    config: type[Any]


FAMILIES: dict[str, Family] = {
    **{model_type: Family(family.model, family.config) for model_type, family in MODELS.items()},
    "clip-vision": Family(VisionTransformer, VisionConfig),
    "bert": Family(Bert, BertConfig),
    "beit": Family(Beit, BeitConfig),
}
"""By ``model_type``: every network, and parts to initialise one from."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory; the model is in evaluation mode.

    Attributes:
        config: the model's configuration dataclass.
        task: what was saved about the task it was fine-tuned for, and ``task_state`` the parameters of its head.
    """

    model: nn.Module
    config: Any
    model_type: str
    tokenizer: Tokenizer | None = None
    preprocessing: Preprocessing | None = None
    task: dict[str, Any] | None = None
    task_state: Tensors = field(default_factory=dict)
    path: Path = Path()

    def vision_language_model(self) -> VisionLanguageModel:
        """The model, for callers that need a whole one and not a part."""
        if not isinstance(self.model, VisionLanguageModel):
            raise CheckpointError(
                self.path,
                f"holds only a part ({self.model_type}), to initialise a model from; a whole model is needed",
            )
        return self.model


def save_folder(
    folder: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    preprocessing: Preprocessing | None = None,
    *,
    card: str | None = None,
    task: Mapping[str, Any] | None = None,
    task_state: Tensors | None = None,
    extra: Mapping[str, Tensors] | None = None,
    conversion: str | None = None,
    state: Tensors | None = None,
) -> Path:
    """Write a checkpoint; one that is there already is replaced.

    At every moment either the old or the new checkpoint is complete on the disk; :func:`load_folder` finds it.

    Args:
        card: text of the model card; by default one from the configuration.
        task: JSON values that describe the task the weights are for, and ``task_state`` the parameters of its head.
        extra: further safetensors files (``ema.safetensors``...) by name.
        conversion: JSON of a conversion's report.
        state: the model's tensors where they are not in the model itself (sharded training).

    Raises:
        CheckpointError: the folder holds other things than a checkpoint, or a model of a kind without a format.
    """
    folder = Path(folder).resolve()
    if not folder.name:
        raise CheckpointError(folder, "is not a folder of its own; name another one")
    model_type = _type_of(model)
    files: dict[str, Tensors] = {WEIGHTS: dict(model.state_dict()) if state is None else state, **(extra or {})}
    if task_state:
        files[TASK_WEIGHTS] = task_state
    assert files.keys() <= set(FILES), f"not files of the format: {sorted(files.keys() - set(FILES))}"
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "triptych_version": triptych.__version__,
        "model_type": model_type,
        "model": to_json(model.config),
        "preprocessing": preprocessing.to_dict() if preprocessing else None,
        "task": dict(task) if task is not None else None,
    }
    try:
        text = json.dumps(config, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(folder, f"the task's description is not JSON: {error}") from error

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        _refuse_to_replace(folder)
        new = _aside(folder, "new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        (new / CONFIG).write_text(text + "\n", encoding="utf-8")
        for name, tensors in files.items():
            _save_tensors(new / name, tensors)
        if tokenizer is not None:
            tokenizer.save(new / TOKENIZER)
        if conversion is not None:
            (new / CONVERSION).write_text(conversion + "\n", encoding="utf-8")
        (new / CARD).write_text(card or _default_card(folder.name, model_type, config, files), encoding="utf-8")
        for file in new.iterdir():
            _sync(file)
        _sync(new)
        _publish(new, folder)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be written: {error}") from error
    return folder


def load_folder(path: str | Path, *, image_size: int | None = None) -> Loaded:
    """Read a checkpoint folder.

    Args:
        image_size: pixels of a side, where the model is to go on at another resolution than it was saved with: its
            position table is interpolated, configuration and preprocessing follow.

    Raises:
        CheckpointError: something is missing, damaged, of a newer format, or does not fit the configuration.
    """
    folder = _complete(Path(path).resolve())
    if not folder.is_dir():
        raise CheckpointError(path, "no such checkpoint folder")
    config = _read_config(folder)
    family = FAMILIES[config["model_type"]]
    where = f"{folder / CONFIG}: "
    model_config = from_json(family.config, config["model"], f"{where}model")
    preprocessing = None
    if config["preprocessing"] is not None:
        try:
            preprocessing = Preprocessing.from_dict(config["preprocessing"])
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}preprocessing", str(error)) from error
    task = config["task"]
    if task is not None and not isinstance(task, dict):
        raise CheckpointError(f"{where}task", f"must be an object or null, not {task!r}")

    def build() -> nn.Module:
        return family.model(model_config)

    state = _load_tensors(folder / WEIGHTS)
    _check_fit(folder / WEIGHTS, state, build)
    if image_size is not None:
        model_config, state = _resized(folder, config["model_type"], model_config, state, image_size)
        preprocessing = replace(preprocessing, image_size=image_size) if preprocessing else None
    return Loaded(
        model=build_with(build, state),
        config=model_config,
        model_type=config["model_type"],
        tokenizer=_load_tokenizer(folder / TOKENIZER),
        preprocessing=preprocessing,
        task=task,
        task_state=_load_tensors(folder / TASK_WEIGHTS) if (folder / TASK_WEIGHTS).exists() else {},
        path=folder,
    )


def load(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    image_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Load a checkpoint from a local folder, or by its Hub id (``owner/name``) from the Hub or its local cache.

    Nothing is downloaded where a local folder of that name exists.

    Args:
        revision: branch, tag or commit on the Hub.
        image_size: as in :func:`load_folder`.
        device, dtype: where to put the model and what to cast its weights to; by default as saved, on the CPU.
    """
    local = _complete(Path(path_or_hub_id).resolve())
    if local.exists():
        if revision is not None:
            raise CheckpointError(local, "is a local folder, which has no revisions: leave the revision out")
        loaded = load_folder(local, image_size=image_size)
    else:
        loaded = load_folder(_download(str(path_or_hub_id), revision), image_size=image_size)
    loaded.model.to(device=device, dtype=dtype)
    return loaded


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a checkpoint folder to the Hub (creating the repository) and return its address.

    The folder is loaded first, so that nothing broken is published.
    """
    folder = load_folder(folder).path
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(folder, f"cannot be uploaded to {repo_id}: {error}") from error
    return str(address)


def _download(name: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise CheckpointError(name, "no such folder (and not a Hub id, which is owner/name)")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES))).resolve()
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(name, f"no such folder here, and not loadable from the Hub: {error}") from error


def _type_of(model: nn.Module) -> str:
    for model_type, family in FAMILIES.items():
        if type(model) is family.model:
            return model_type
    raise CheckpointError(type(model).__name__, f"no checkpoint format for this class; known are {', '.join(FAMILIES)}")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(folder, "no checkpoint of this library: it has no config.json")
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            folder, "a checkpoint of another library: convert it first (triptych convert --from KIND)"
        )
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(path, f"format_version must be a positive integer, not {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(path, f"written by a newer version of triptych (format {version}): upgrade to read it")
    known = {"format", "format_version", "triptych_version", "model_type", "model", "preprocessing", "task"}
    for name in sorted(config.keys() - known):
        raise CheckpointError(path, f"unknown field {name!r}; known are {', '.join(sorted(known))}")
    for name in sorted(known - config.keys()):
        raise CheckpointError(path, f"field {name!r} is missing")
    if config["model_type"] not in list(FAMILIES):
        raise CheckpointError(path, f"model_type must be one of {', '.join(FAMILIES)}, not {config['model_type']!r}")
    return config


def _check_fit(path: Path, state: Tensors, build: Callable[[], nn.Module]) -> None:
    expected = shapes_of(build, path.with_name(CONFIG))
    for name in [*expected, *state]:
        if name not in state:
            raise CheckpointError(path, f"has no {name}, which config.json's model needs")
        if name not in expected:
            raise CheckpointError(path, f"has {name}, which config.json's model has not")
        if tuple(state[name].shape) != expected[name]:
            raise CheckpointError(
                path,
                f"{name} is {list(state[name].shape)}, but {list(expected[name])} in config.json's model",
            )


def _resized(folder: Path, model_type: str, config: Any, state: Tensors, image_size: int) -> tuple[Any, Tensors]:
    """Configuration and tensors for another image size."""
    if model_type not in MODELS:
        raise CheckpointError(folder, f"the image size of a {model_type} cannot be changed on loading")
    if image_size < 1:
        raise CheckpointError(folder, f"image_size must be at least 1, not {image_size}")
    name = next(name for name in _POSITION_TABLES if name in state)
    try:
        vision = replace(config.vision, image_size=image_size)
        side = image_size // vision.patch
        table_ND = resize_positions(state[name], (side, side), vision.interpolation)
    except ValueError as error:
        raise CheckpointError(folder, str(error)) from error
    return replace(config, vision=vision), {**state, name: table_ND}


def _load_tokenizer(path: Path) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        return Tokenizer.load(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(path, str(error)) from error


def _load_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(path, "the file is missing; save, download or copy the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"damaged ({error}); save, download or copy it again") from error


def _save_tensors(path: Path, tensors: Tensors) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def _default_card(name: str, model_type: str, config: Mapping[str, Any], files: Mapping[str, Tensors]) -> str:
    parameters = sum(tensor.numel() for tensor in files[WEIGHTS].values())
    sizes = json.dumps(config["model"], indent=1)
    return (
        "---\nlibrary_name: triptych\ntags: [vision-language]\n---\n\n"
        f"# {name}\n\nA `{model_type}` checkpoint with {parameters / 1e6:.1f} M parameters, written by triptych "
        f"{triptych.__version__}.\n\n```python\nfrom triptych.checkpoints.folder import load\n\n"
        f'loaded = load("{name}")\n```\n\n```json\n{sizes}\n```\n'
    )


# Replacing: the new checkpoint is written to .NAME.new; then NAME -> .NAME.previous, .NAME.new -> NAME, and the
# previous one is deleted. A reader that finds no NAME takes .NAME.previous, which is there between the two renames.


def _aside(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")


def _complete(folder: Path) -> Path:
    """Where the checkpoint ``folder`` stands, also if a writer was stopped between the two renames."""
    previous = _aside(folder, "previous") if folder.name else folder
    return previous if not folder.exists() and previous.is_dir() else folder


def _recover(folder: Path) -> None:
    """Tidy up after a writer that was stopped."""
    previous = _aside(folder, "previous")
    if previous.is_dir() and not folder.exists():
        previous.rename(folder)
    elif previous.is_dir():
        shutil.rmtree(previous)


def _refuse_to_replace(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(folder, "is a file; name a folder to save to")
    names = {entry.name for entry in folder.iterdir()}
    foreign = sorted(names - set(FILES) - set(_HUB_FILES))
    if foreign or (names and CONFIG not in names):
        what = f"holds {foreign[0]}" if foreign else "has no config.json"
        raise CheckpointError(
            folder, f"{what}, so it is not just a checkpoint, and is not replaced; name another folder"
        )


def _publish(new: Path, folder: Path) -> None:
    previous = _aside(folder, "previous")
    if folder.exists():
        folder.rename(previous)
    try:
        new.rename(folder)
    except OSError:
        if previous.is_dir():
            previous.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
