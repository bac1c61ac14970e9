"""What a caller can say about a conversion, and what a converter returns."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.reading import Tensors
from triptych.data.transforms import Preprocessing
from triptych.models.layers import ACTIVATIONS, Activation


@dataclass(frozen=True)
class Options:
    """Settings of a conversion; what is not given is read from the tensors, or from a config.json beside them.

    Attributes:
        image_size: pixels of a side; the position table is interpolated where the file has another one.
        vision_heads, text_heads: attention heads; by default width / 64. EVE's only Transformer has ``vision_heads``.
        activation: of the image encoder; by default ``quick_gelu``, as OpenAI's.
        stride: mPLUG's S, which no tensor tells: by default 6 where there is a width bridge (large), else 3.
        fusion_layers: how many of the allocated fusion layers, counted from the top, the network runs.
        decoder_layers: for files without a decoder.
        keep_momentum: also write the momentum copies, to ``ema.safetensors``.
        keep_queues: also write the contrastive queues, to ``queues.safetensors``.
        allow_missing: globs of our names that may keep their initial values.
        allow_unexpected: globs of official names that may be ignored.
        answers: the classes of a BridgeTower or an EVE fine-tuned for questions, see
            :func:`triptych.checkpoints.bridgetower_heads.read_answers`.
        resize: of other aspect ratios, see :class:`triptych.data.transforms.Preprocessing`; by default as published.
        vocab: a ``vocab.txt`` (BERT), ``vocab.json`` with ``merges.txt`` (RoBERTa) or ``tokenizer.json``; by default
            the one beside the weights.
    """

    image_size: int | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    activation: Activation | None = None
    stride: int | None = None
    fusion_layers: int | None = None
    decoder_layers: int | None = None
    keep_momentum: bool = False
    keep_queues: bool = False
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()
    answers: Path | None = None
    resize: Literal["squash", "crop", "port"] | None = None
    vocab: Path | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "vision_heads", "text_heads", "stride", "fusion_layers", "decoder_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")

    def refuse_others(self, applicable: frozenset[str], direction: str, source: str | Path) -> None:
        """An option that does nothing for this kind of file (``--from mplug``) is an error."""
        default = Options()
        for name in (spec.name for spec in fields(self)):
            if getattr(self, name) != getattr(default, name) and name not in applicable:
                raise CheckpointError(source, f"--{name.replace('_', '-')} does not apply to {direction}")


@dataclass
class Converted:
    """A converted checkpoint, before it is written.

    Attributes:
        vocab_size: word embeddings, where the model has some.
        extra: further safetensors files by name.
        task, task_state: what a fine-tuned file is for, and the tensors of its head, as
            :func:`triptych.checkpoints.folder.save_folder` takes them.
    """

    model: nn.Module
    report: Report
    preprocessing: Preprocessing | None = None
    vocab_size: int | None = None
    extra: dict[str, Tensors] = field(default_factory=dict)
    task: dict[str, Any] | None = None
    task_state: Tensors | None = None
