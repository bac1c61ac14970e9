"""What every conversion has in common; the kinds have tests of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from triptych.checkpoints.convert import KINDS, convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder, save_folder
from triptych.checkpoints.options import Options
from triptych.models.mplug import MPlug

HEADS = Options(vision_heads=4, text_heads=4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_foreign_files_give_one_line(tmp_path: Path, kind: str) -> None:
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    for source in (tmp_path / "other.pth", tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            convert(source, tmp_path / "out", kind)
        assert str(caught.value).startswith(f"{source}: ")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_our_own_format_needs_no_conversion(tmp_path: Path, model: MPlug) -> None:
    source = save_folder(tmp_path / "ours", model)
    with pytest.raises(CheckpointError, match="a checkpoint of this library, which needs no conversion"):
        convert(source, tmp_path / "out", "mplug")


def test_a_conversion_can_be_repeated_and_replaces(tmp_path: Path, official: dict[str, Tensor], vocab: Path) -> None:
    torch.save(official, tmp_path / "mplug.pth")
    convert(tmp_path / "mplug.pth", tmp_path / "out", "mplug", HEADS)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    report = convert(
        tmp_path / "mplug.pth", tmp_path / "out", "mplug", Options(vision_heads=4, text_heads=4, vocab=vocab)
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    loaded = load_folder(tmp_path / "out")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab_size == 12
    assert "vocab.txt uses 12 of the 120 word embeddings" in report.notes


def test_a_failed_conversion_keeps_what_was_there(tmp_path: Path, official: dict[str, Tensor]) -> None:
    torch.save(official, tmp_path / "mplug.pth")
    convert(tmp_path / "mplug.pth", tmp_path / "out", "mplug", HEADS)
    del official["temp"]
    torch.save(official, tmp_path / "mplug.pth")
    with pytest.raises(CheckpointError, match="temperature"):
        convert(tmp_path / "mplug.pth", tmp_path / "out", "mplug", HEADS)
    assert load_folder(tmp_path / "out").model_type == "mplug"


def test_a_tokenizer_json_beside_the_weights(tmp_path: Path, official: dict[str, Tensor], vocab: Path) -> None:
    from triptych.data.tokenizers import wordpiece_from_vocab

    torch.save(official, tmp_path / "mplug.pth")
    wordpiece_from_vocab(vocab).save(tmp_path / "tokenizer.json")
    convert(tmp_path / "mplug.pth", tmp_path / "out", "mplug", HEADS)
    assert load_folder(tmp_path / "out").tokenizer is not None


@pytest.mark.parametrize("values", [{"stride": 0}, {"image_size": -1}, {"vision_heads": 0}, {"activation": "relu"}])
def test_impossible_options(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Options(**values)


def test_a_single_option_that_does_not_apply(tmp_path: Path) -> None:
    for kind, option in (
        ("bert-hf", Options(image_size=32)),
        ("clip", Options(keep_momentum=True)),
        ("clip-hf", Options(fusion_layers=3)),
    ):
        with pytest.raises(CheckpointError, match=f"does not apply to --from {kind}"):
            convert(tmp_path / "none", tmp_path / "out", kind, option)
