import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.reading import read_tensors

TENSORS = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2)}


def assert_same(read: dict[str, Tensor], wanted: dict[str, Tensor] = TENSORS) -> None:
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(read[name], tensor)


def problem(path: Path) -> str:
    """The message for a file that cannot be read: one line, with the file's name."""
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "tar", "ckpt", "safetensors"])
@pytest.mark.parametrize("old_format", [False, True])
def test_any_suffix_and_both_formats_of_torch_save(tmp_path: Path, suffix: str, old_format: bool) -> None:
    path = tmp_path / f"weights.{suffix}"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=not old_format)
    if suffix == "safetensors":
        save_file(TENSORS, path)
    assert_same(read_tensors(path))


def test_safetensors_are_known_by_content_too(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    save_file(TENSORS, path)
    assert_same(read_tensors(path))


@pytest.mark.parametrize(
    "wrapped",
    [
        {"model": TENSORS, "epoch": 3},
        {"module": TENSORS},
        {"state_dict": OrderedDict(TENSORS), "hyper_parameters": {"lr": 1}},
        {"model": {"module": {"state_dict": TENSORS}}},
        {f"module.{name}": tensor for name, tensor in TENSORS.items()},
        {"model": {f"module.model.{name}": tensor for name, tensor in TENSORS.items()}},
        {**TENSORS, **{f"module.{name}": tensor for name, tensor in TENSORS.items()}},
    ],
    ids=["model", "module", "state_dict", "nested", "prefix", "both", "twice"],
)
def test_wrappers_and_prefixes_come_off(tmp_path: Path, wrapped: object) -> None:
    torch.save(wrapped, tmp_path / "weights.pth")
    assert_same(read_tensors(tmp_path / "weights.pth"))


def test_the_same_name_twice_with_other_values_is_refused(tmp_path: Path) -> None:
    torch.save({**TENSORS, "module.layer.bias": torch.zeros(2)}, tmp_path / "weights.pth")
    assert "layer.bias twice" in problem(tmp_path / "weights.pth")


def test_shards(tmp_path: Path) -> None:
    weight_map = {"layer.weight": "a.safetensors", "layer.bias": "b.safetensors"}
    for name, shard in weight_map.items():
        save_file({name: TENSORS[name]}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(read_tensors(index))
    assert_same(read_tensors(tmp_path))  # the folder

    (tmp_path / "b.safetensors").unlink()
    assert "needs b.safetensors" in problem(index)
    index.write_text(json.dumps({"weight_map": {"layer.weight": "../secret.safetensors"}}))
    assert "not beside it" in problem(index)
    index.write_text(json.dumps({"weight_map": {**weight_map, "layer.bias": "a.safetensors"}}))
    assert "in no shard: layer.bias" in problem(index)
    index.write_text("[1]")
    assert "not an index" in problem(index)


def test_missing_file_empty_file_and_folder(tmp_path: Path) -> None:
    assert "no such file" in problem(tmp_path / "none.pth")
    (tmp_path / "empty.pth").touch()
    assert "is empty" in problem(tmp_path / "empty.pth")
    (tmp_path / "folder.d").mkdir()
    assert "no weights file" in problem(tmp_path / "folder.d")


@pytest.mark.parametrize("kept", [1, 8, 60, 0.5, 0.99])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_truncated_files(tmp_path: Path, form: str, kept: float) -> None:
    path = tmp_path / ("cut.safetensors" if form == "safetensors" else "cut.pth")
    big = {"weight": torch.randn(50, 50)}
    if form == "safetensors":
        save_file(big, path)
    else:
        torch.save(big, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    problem(path)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_any_damage_is_one_line_or_goes_unnoticed(tmp_path: Path, form: str) -> None:
    whole = tmp_path / ("whole.safetensors" if form == "safetensors" else "whole.pth")
    if form == "safetensors":
        save_file(TENSORS, whole)
    else:
        torch.save(TENSORS, whole, _use_new_zipfile_serialization=form == "zip")
    data, dice = whole.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(80):
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 3, 20])):
            damaged[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path / f"damaged{whole.suffix}").write_bytes(damaged)
        try:
            read_tensors(tmp_path / f"damaged{whole.suffix}")
        except CheckpointError as error:
            refused += "\n" not in str(error)
    assert refused > 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "text file"),
        (b'  {"error": "not found"}', "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"just some words, no weights at all", "not a checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
        (bytes(257) + b"ustar" + bytes(300), "tar xf"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "download.pth").write_bytes(content)
    assert said in problem(tmp_path / "download.pth")


def test_pickles_and_zips_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    assert "no tensors" in problem(tmp_path / "a.pth")
    torch.save([torch.ones(1)], tmp_path / "b.pth")
    assert "holds a list" in problem(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("readme.txt", "weights are elsewhere")
    assert "without weights" in problem(tmp_path / "c.zip")


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("form", ["zip", "old", "pickle2", "pickle4", "hidden"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, victim = tmp_path / "weights.pth", tmp_path / "executed"
    content = {"model": dict(TENSORS), "extra": Payload(victim)}
    if form in ("zip", "old"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    elif form == "hidden":  # under another name and behind honest content
        path = tmp_path / "weights.safetensors"
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Payload(victim)}, protocol=int(form[-1])))
    message = problem(path)
    assert "posix.system" in message
    assert "may be malicious" in message
    assert not victim.exists()

    with pytest.raises(ValueError, match="refused"):  # the payload is real: an ordinary load would run it
        read_tensors(path)
    if form == "pickle2":
        pickle.loads(path.read_bytes())
        assert victim.exists()


def test_harmless_objects_are_refused_by_name(tmp_path: Path) -> None:
    import argparse

    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "weights.pth")
    assert "argparse.Namespace" in problem(tmp_path / "weights.pth")
