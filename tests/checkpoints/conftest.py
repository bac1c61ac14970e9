"""Recorded networks, small models and vocabularies for the tests of checkpoints."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig

Tensors = dict[str, Tensor]
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are so small that a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def goldens() -> Path:
    """The folder of recordings."""
    return GOLDENS


@pytest.fixture(params=["mplug_base_stride3", "mplug_large_stride6"])
def recording(request: pytest.FixtureRequest) -> Path:
    """Each recording of mPLUG."""
    return GOLDENS / str(request.param)


@pytest.fixture
def official() -> Tensors:
    """The official tensors of the small mPLUG-base: 8 fusion layers of which 6 run, 3 decoder layers, width 32."""
    content: Tensors = torch.load(GOLDENS / "mplug_base_stride3" / "official_layout.pth", weights_only=True)["model"]
    return content


@pytest.fixture
def config() -> MPlugConfig:
    """A whole mPLUG of width 32."""
    vision = VisionConfig(width=32, layers=2, heads=2, patch=8, image_size=16)
    text = TextConfig(vocab_size=30, width=32, heads=2, ffn=64, max_positions=16)
    return MPlugConfig(vision, text, text_layers=2, fusion_layers=3, decoder_layers=2, stride=2, embed_dim=8)


@pytest.fixture
def model(config: MPlugConfig) -> MPlug:
    """A random model of that size, in evaluation mode."""
    return MPlug(config).eval()


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    """A vocab.txt of 12 entries."""
    path = tmp_path / "vocabulary" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]) + "\n")
    return path


@pytest.fixture
def perturb(tmp_path: Path) -> Callable[[Path, str, float], Path]:
    """Copies a recording with one tensor of its io.safetensors or its weights changed."""

    def change(folder: Path, name: str, by: float) -> Path:
        from safetensors.torch import load_file

        copy = tmp_path / "recording"
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        io = load_file(folder / "io.safetensors")
        weights = torch.load(folder / "official_layout.pth", weights_only=True)["model"]
        changed = io if name in io else weights
        flat = changed[name].view(-1)
        flat[0] += by if flat.is_floating_point() else int(by)
        save_file(io, copy / "io.safetensors")
        torch.save({"model": weights}, copy / "official_layout.pth")
        return copy

    return change
