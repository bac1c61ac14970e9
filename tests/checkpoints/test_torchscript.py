"""Reading TorchScript archives without running them, on a small module of CLIP's layout."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.reading import read_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x_LBD: Tensor) -> Tensor:
        x_LBD = x_LBD + self.attn(self.ln_1(x_LBD), self.ln_1(x_LBD), self.ln_1(x_LBD), need_weights=False)[0]
        return x_LBD + self.mlp(self.ln_2(x_LBD))


class Visual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(Block(width), Block(width))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, 6))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BND = self.conv1(pixels_BCHW).flatten(2).transpose(1, 2)
        cls_B1D = self.class_embedding + torch.zeros(len(x_BND), 1, x_BND.shape[-1])
        x_BND = self.ln_pre(torch.cat([cls_B1D, x_BND], 1) + self.positional_embedding)
        return self.ln_post(self.transformer.resblocks(x_BND.transpose(0, 1))[0]) @ self.proj


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.token_embedding = nn.Embedding(7, 6)
        self.register_buffer("input_resolution", torch.tensor(8))
        # A view with gaps, and a second name of a tensor.
        self.text_projection = nn.Parameter(torch.randn(6, 12).half()[:, ::2])
        self.tied = self.token_embedding

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.visual(pixels_BCHW) * self.logit_scale.exp()


def test_tensors_equal_the_state_dict(tmp_path: Path) -> None:
    module = Clip().eval()
    program = torch.jit.trace(module, torch.randn(1, 3, 8, 8))
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.save(program, path)
    read = read_tensors(path)
    wanted = module.state_dict()
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


def rewritten(tmp_path: Path, data: bytes, keep: bool = True) -> Path:
    """A TorchScript archive with another data.pkl."""
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "honest.pt")
    path = tmp_path / "hostile.pt"
    with zipfile.ZipFile(tmp_path / "honest.pt") as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            is_pickle = record.filename.endswith("/data.pkl")
            if keep or "/data/" not in record.filename:
                new.writestr(record.filename, data if is_pickle else old.read(record))
    return path


class Payload:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.victim}",)


def test_code_in_the_archive_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    path = rewritten(tmp_path, pickle.dumps(Payload(victim), protocol=2))
    with pytest.raises(CheckpointError, match=r"hostile\.pt.*posix\.system.*state_dict") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    assert not victim.exists()


def test_other_functions_of_torch_are_refused(tmp_path: Path) -> None:
    for target in ("torch load", "torch._utils _rebuild_parameter", "builtins getattr", "torch.jit._pickle exec"):
        path = rewritten(tmp_path, b"\x80\x02c" + target.replace(" ", "\n").encode() + b"\n.")
        with pytest.raises(CheckpointError, match=target.replace(" ", r"\.")):
            read_tensors(path)


def test_a_view_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    assert data.count(b"K\x02K\x02\x86") + data.count(b"(K\x02K\x02t") >= 1
    path = rewritten(tmp_path, data.replace(b"(K\x02K\x02t", b"(K\x02K\x7ft", 1))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(path)


def test_damaged_archives(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.jit.save(torch.jit.script(nn.Linear(20, 20)), whole)
    data = whole.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-200])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        read_tensors(tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(rewritten(tmp_path, data[:0]))
    honest = rewritten(tmp_path, b"", keep=True)
    with zipfile.ZipFile(tmp_path / "honest.pt") as archive:
        described = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    assert honest == rewritten(tmp_path, described, keep=False)
    with pytest.raises(CheckpointError, match="cannot be read"):  # storages are gone
        read_tensors(honest)
