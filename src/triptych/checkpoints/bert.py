"""BERT as transformers and Google publish it (``--from bert-hf``): the text side's initialisation.

:func:`embeddings`, :func:`layer` and :func:`head` are also how mPLUG's own files spell their three BERT stacks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from triptych.checkpoints.beside import Beside
from triptych.checkpoints.building import build_with, shapes_of
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.families import expect
from triptych.checkpoints.mapping import NameMap, Rule, Tie, concatenate, convert_tensors, linear, rename, row
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors
from triptych.models.text import LanguageHead, TextConfig, TextEncoder

OPTIONS = frozenset({"text_heads", "allow_missing", "allow_unexpected", "vocab"})


@dataclass(frozen=True)
class BertConfig:
    """A BERT to initialise text encoders, fusion layers and decoders from.

    Attributes:
        layers: depth (bert-base: 12).
        head: whether it comes with its vocabulary head.
    """

    text: TextConfig = field(default_factory=TextConfig)
    layers: int = 12
    head: bool = True


class Bert(nn.Module):
    """A plain BERT: the encoder, and the vocabulary head where the source had one."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config.text, config.layers)
        self.head = LanguageHead(config.text) if config.head else None


def convert_bert(source: Path, tensors: Tensors, options: Options) -> Converted:
    """BertModel, BertForPreTraining or BertForMaskedLM to a :class:`Bert`."""
    expect("a BERT", ["bert.embeddings." if _prefixed(tensors) else "embeddings.word_embeddings."], tensors, source)
    prefix = "bert." if _prefixed(tensors) else ""
    beside = Beside(source, "config.json")
    text, notes = text_config(tensors, prefix, source, beside, options.text_heads)
    config = BertConfig(
        text,
        layers=count(tensors, f"{prefix}encoder.layer."),
        head="cls.predictions.transform.dense.weight" in tensors,
    )
    names = NameMap()
    names.add(embeddings("encoder.embeddings", f"{prefix}embeddings", tensors))
    for i in range(config.layers):
        names.add(layer(f"encoder.blocks.{i}", f"{prefix}encoder.layer.{i}", tensors, cross=False))
    if config.head:
        add_head(names, "head", "cls.predictions", f"{prefix}embeddings.word_embeddings.weight", tensors)
    names.drop("the pooler, unused by every model here", f"{prefix}pooler.*")
    names.drop("next-sentence head, unused by every model here", "cls.seq_relationship.*")
    names.drop("a constant", f"{prefix}embeddings.position_ids")

    def build() -> Bert:
        return Bert(config)

    state, report = convert_tensors(
        tensors,
        names,
        shapes_of(build, source),
        source,
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    report.notes += notes
    if not config.head:
        report.notes.append("no vocabulary head in the file: decoders and masked heads will start at random")
    return Converted(build_with(build, state), report, vocab_size=text.vocab_size)


def _prefixed(tensors: Tensors) -> bool:
    return any(name.startswith("bert.") for name in tensors)


def embeddings(target: str, source: str, names: Collection[str]) -> list[Rule]:
    """Word, position and segment embeddings and their norm."""
    return [
        rename(f"{target}.word.weight", f"{source}.word_embeddings.weight"),
        rename(f"{target}.position.weight", f"{source}.position_embeddings.weight"),
        row(f"{target}.segment", f"{source}.token_type_embeddings.weight", 0, "only segment 0 is ever used"),
        *norm(f"{target}.norm", f"{source}.LayerNorm", names),
    ]


def layer(target: str, source: str, names: Collection[str], *, cross: bool) -> list[Rule]:
    """One Transformer layer."""
    rules = [
        *_attention(f"{target}.attention", f"{source}.attention"),
        *norm(f"{target}.attention_norm", f"{source}.attention.output.LayerNorm", names),
        *linear(f"{target}.ffn.expand", f"{source}.intermediate.dense"),
        *linear(f"{target}.ffn.contract", f"{source}.output.dense"),
        *norm(f"{target}.ffn_norm", f"{source}.output.LayerNorm", names),
    ]
    if cross:
        rules += _attention(f"{target}.cross_attention", f"{source}.crossattention")
        rules += norm(f"{target}.cross_norm", f"{source}.crossattention.output.LayerNorm", names)
    return rules


def _attention(target: str, source: str) -> list[Rule]:
    key_value = [
        concatenate(f"{target}.key_value.{part}", f"{source}.self.key.{part}", f"{source}.self.value.{part}")
        for part in ("weight", "bias")
    ]
    return [
        *linear(f"{target}.query", f"{source}.self.query"),
        *key_value,
        *linear(f"{target}.out", f"{source}.output.dense"),
    ]


def norm(target: str, source: str, names: Collection[str]) -> list[Rule]:
    """A LayerNorm, also by its old names ``gamma`` and ``beta``."""
    if f"{source}.gamma" in names:
        return [rename(f"{target}.weight", f"{source}.gamma"), rename(f"{target}.bias", f"{source}.beta")]
    return linear(target, source)


def add_head(names: NameMap, target: str, source: str, words: str, present: Collection[str]) -> None:
    """The vocabulary head ``cls.predictions``, its decoder tied to the word embeddings ``words``."""
    bias, copy = f"{source}.bias", f"{source}.decoder.bias"
    if bias not in present and copy in present:  # transformers writes a tied tensor under one of its names
        bias, copy = copy, bias
    names.add(
        linear(f"{target}.transform", f"{source}.transform.dense"),
        norm(f"{target}.norm", f"{source}.transform.LayerNorm", present),
        rename(f"{target}.bias", bias),
    )
    names.ties += [Tie(f"{source}.decoder.weight", words), Tie(copy, bias)]


def text_config(
    tensors: Tensors, prefix: str, source: Path, beside: Beside, heads: int | None
) -> tuple[TextConfig, list[str]]:
    """Sizes of the BERT whose names start with ``prefix``, and what had to be assumed."""
    vocab_size, width = table(tensors, f"{prefix}embeddings.word_embeddings.weight", source)
    max_positions, _ = table(tensors, f"{prefix}embeddings.position_embeddings.weight", source)
    ffn, _ = table(tensors, f"{prefix}encoder.layer.0.intermediate.dense.weight", source)
    activation = beside.text("hidden_act")
    if activation not in (None, "gelu"):
        raise CheckpointError(source, f"its text layers use {activation!r}; only 'gelu' is supported")
    notes = []
    heads = heads or beside.integer("num_attention_heads", "heads")
    if heads is None:
        heads = heads_of(width, "text", source)
        notes.append(f"{heads} attention heads in the text layers, assumed from width {width} / 64")
    default = TextConfig()
    eps, dropout = beside.number("layer_norm_eps"), beside.number("hidden_dropout_prob")
    attention_dropout = beside.number("attention_probs_dropout_prob")
    config = TextConfig(
        vocab_size=vocab_size,
        width=width,
        heads=heads,
        ffn=ffn,
        max_positions=max_positions,
        layer_norm_eps=default.layer_norm_eps if eps is None else eps,
        dropout=default.dropout if dropout is None else dropout,
        attention_dropout=default.attention_dropout if attention_dropout is None else attention_dropout,
    )
    return config, notes


def table(tensors: Tensors, name: str, source: Path) -> tuple[int, int]:
    """Rows and columns of a tensor that must be there for the sizes to be known."""
    if name not in tensors:
        raise CheckpointError(source, f"has no {name}, from which the sizes are read")
    tensor = tensors[name]
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise CheckpointError(source, f"{name} should be a table of numbers but has shape {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def count(names: Collection[str], prefix: str) -> int:
    """How many numbered layers there are below ``prefix``."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def heads_of(width: int, part: str, source: Path) -> int:
    """width / 64, the size of a head in every published model."""
    if width % 64:
        raise CheckpointError(
            source,
            f"the number of heads cannot be guessed from width {width}, no multiple of 64: give --{part}-heads",
        )
    return width // 64
