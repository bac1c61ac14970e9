import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.verify import Check, checks_to_json, format_checks, passed, verify

Perturb = Callable[[Path, str, float], Path]


def test_parity_with_the_official_code(recording: Path) -> None:
    checks = verify(recording, 1e-4)
    recorded = {name[4:] for name in load_file(recording / "io.safetensors") if name.startswith("out.")}
    assert {check.name for check in checks} == recorded
    assert len(checks) == len(recorded) == 26
    assert passed(checks), format_checks(checks, 1e-4)
    assert sum(check.ids_equal is True for check in checks) == 4


def failing(folder: Path) -> set[str]:
    checks = verify(folder)
    assert not passed(checks)
    return {check.name for check in checks if not check.ok}


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("out.image_feat", 3e-4),
        ("out.decoder_loss_per_sequence", 3e-4),
        ("out.fused_text_stride1", 3e-4),
        ("out.generate_vqa_beam5_ids", 1),
        ("out.generate_caption_beam5_scores", 3e-4),
        ("out.itm_logits", float("nan")),
    ],
)
def test_a_changed_output_fails(goldens: Path, perturb: Perturb, name: str, by: float) -> None:
    assert failing(perturb(goldens / "mplug_base_stride3", name, by)) == {name[4:]}


def test_a_changed_weight_fails(goldens: Path, perturb: Perturb) -> None:
    folder = perturb(goldens / "mplug_base_stride3", "itm_head.bias", 0.01)
    assert failing(folder) == {"itm_logits"}


def test_a_changed_deep_weight_fails_all_that_depends_on_it(goldens: Path, perturb: Perturb) -> None:
    name = "fusion_encoder.bert.encoder.layer.7.attention.output.LayerNorm.weight"
    failed = failing(perturb(goldens / "mplug_large_stride6", name, 0.1))
    assert {"fused_text_stride6", "itm_logits", "mlm_logits", "decoder_logits"} <= failed
    assert not {"image_embeds", "text_embeds", "caption_logits", "caption_loss_per_sequence"} & failed


def test_the_tolerance_is_the_callers(goldens: Path) -> None:
    checks = verify(goldens / "mplug_base_stride3", 0.0)
    assert not passed(checks)
    assert all(check.ok for check in checks if check.ids_equal is not None)


def edited(goldens: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder = tmp_path / "recording"
    shutil.copytree(goldens / "mplug_base_stride3", folder)
    io = load_file(folder / "io.safetensors")
    edit(io)
    save_file(io, folder / "io.safetensors")
    return folder


def test_unknown_missing_and_strange_tensors_are_errors(goldens: Path, tmp_path: Path) -> None:
    def add(io: dict[str, torch.Tensor]) -> None:
        io["out.depth_map"] = torch.zeros(1)

    def lose(io: dict[str, torch.Tensor]) -> None:
        del io["out.mlm_logits"], io["out.fused_text_stride2"], io["out.generate_vqa_greedy_scores"]

    def lose_input(io: dict[str, torch.Tensor]) -> None:
        del io["in.image"]

    def misname(io: dict[str, torch.Tensor]) -> None:
        io["logits"] = torch.zeros(1)

    def reshape(io: dict[str, torch.Tensor]) -> None:
        io["in.image"] = io["in.image"][:, :2].contiguous()

    for edit, said in (
        (add, "cannot compute: depth_map"),
        (lose, "not recorded: fused_text_stride2, generate_vqa_greedy_scores, mlm_logits"),
        (lose_input, r"has no in\.image"),
        (misname, "logits is neither"),
        (reshape, "do not fit the sizes"),
    ):
        folder = edited(goldens, tmp_path / edit.__name__, edit)
        with pytest.raises(CheckpointError, match=said) as caught:
            verify(folder)
        assert "\n" not in str(caught.value)


def test_other_shapes_fail(goldens: Path, tmp_path: Path) -> None:
    def cut(io: dict[str, torch.Tensor]) -> None:
        io["out.text_embeds"] = io["out.text_embeds"][:, :-1].contiguous()
        io["out.generate_vqa_beam5_ids"] = io["out.generate_vqa_beam5_ids"][:, :2].contiguous()

    assert failing(edited(goldens, tmp_path, cut)) == {"text_embeds", "generate_vqa_beam5_ids"}


def test_padding_beyond_the_longest_hypothesis_is_no_difference(goldens: Path, tmp_path: Path) -> None:
    def pad(io: dict[str, torch.Tensor]) -> None:
        name = "out.generate_vqa_beam5_ids"
        io[name] = torch.nn.functional.pad(io[name], (0, 2), value=-1)

    assert passed(verify(edited(goldens, tmp_path, pad)))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model", "vilt", "cannot be verified yet; known are mplug, bridgetower, eve"),
        ("model", None, "cannot be verified yet"),
        ("model", ["mplug"], "cannot be verified yet"),
        ("stride", "three", "stride must be of type int"),
        ("stride", 0, "stride must be at least 1"),
        ("vision", {"width": 32}, "config.json: vision: field 'layers' is missing"),
        ("text", {"colour": 1}, "unknown field 'colour'"),
        ("generate", {"vqa_a": {"beam": 1}}, "generate.vqa_a.min_length must be of type int"),
        ("generate", {"poem": {}}, "generate.poem must start with"),
        ("generate", [], "generate must be an object"),
        ("text_encoder_layers", 3, "text.blocks.2"),
    ],
)
def test_broken_configurations(goldens: Path, tmp_path: Path, field: str, value: object, said: str) -> None:
    folder = tmp_path / "recording"
    shutil.copytree(goldens / "mplug_base_stride3", folder)
    config = json.loads((folder / "config.json").read_text())
    config[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert said in str(caught.value)


def test_incomplete_folders(goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "none")
    for lost in ("config.json", "io.safetensors", "official_layout.pth"):
        folder = tmp_path / lost
        shutil.copytree(goldens / "mplug_base_stride3", folder)
        (folder / lost).unlink()
        with pytest.raises(CheckpointError, match="official_layout" if "pth" in lost else f"has no {lost}"):
            verify(folder)


def test_output_for_people_and_programs() -> None:
    checks = [
        Check("a", 2e-5, None, True),
        Check("long_name", None, False, False),
        Check("c", float("inf"), None, False),
    ]
    assert format_checks(checks, 1e-4).splitlines() == [
        "a          2.00e-05  ok",
        "long_name    differ  FAILED",
        "c               inf  FAILED",
        "3 outputs, 2 over tolerance 0.0001",
    ]
    values = json.loads(checks_to_json(checks))
    assert values["ok"] is False
    assert values["checks"][0] == {"name": "a", "max_abs_diff": 2e-05, "ids_equal": None, "ok": True}
    assert values["checks"][2]["max_abs_diff"] is None
    assert not passed([])
    assert passed(checks[:1])
