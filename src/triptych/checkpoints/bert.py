"""BERT and RoBERTa as transformers publishes them (``--from bert-hf``, ``roberta-hf``): the text side's initialisation.

:func:`embeddings`, :func:`layer` and :func:`add_head` are also how mPLUG's own files spell their three BERT stacks.
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
from triptych.models.bridgetower import ROBERTA
from triptych.models.text import LanguageHead, TextConfig, TextEncoder

OPTIONS = frozenset({"text_heads", "allow_missing", "allow_unexpected", "vocab"})


@dataclass(frozen=True)
class BertConfig:
    """A BERT to initialise text encoders, fusion layers and decoders from.

    Attributes:
        text: sizes; a RoBERTa is a BERT whose positions do not begin with the first (``first_position``).
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


@dataclass(frozen=True)
class _Family:
    """How transformers spells one of the two.

    Attributes:
        kind: the value of ``--from``.
        prefix: of the encoder's names, where it is a part of a larger model.
        segments: rows of its table of segments, which tells the two apart where there is no prefix.
        head: the vocabulary head, and below it the names of its linear layer and of its norm.
        default: sizes that no tensor tells.
    """

    name: str
    kind: str
    prefix: str
    segments: int
    head: tuple[str, str, str]
    default: TextConfig


_BERT = _Family(
    "a BERT",
    "bert-hf",
    "bert.",
    segments=2,
    head=("cls.predictions", "transform.dense", "transform.LayerNorm"),
    default=TextConfig(),
)
_ROBERTA = _Family(
    "a RoBERTa", "roberta-hf", "roberta.", segments=1, head=("lm_head", "dense", "layer_norm"), default=ROBERTA
)


def convert_bert(source: Path, tensors: Tensors, options: Options) -> Converted:
    """BertModel, BertForPreTraining or BertForMaskedLM to a :class:`Bert`."""
    return _convert(source, tensors, options, _BERT)


def convert_roberta(source: Path, tensors: Tensors, options: Options) -> Converted:
    """RobertaModel or RobertaForMaskedLM to a :class:`Bert` whose text begins at position 2."""
    return _convert(source, tensors, options, _ROBERTA)


def _convert(source: Path, tensors: Tensors, options: Options, family: _Family) -> Converted:
    prefix = _prefix(source, tensors, family)
    beside = Beside(source, "config.json")
    text, notes = text_config(tensors, prefix, source, beside, options.text_heads, family.default)
    head, linear_name, norm_name = family.head
    config = BertConfig(
        text, layers=count(tensors, f"{prefix}encoder.layer."), head=f"{head}.{linear_name}.weight" in tensors
    )
    names = NameMap()
    names.add(embeddings("encoder.embeddings", f"{prefix}embeddings", tensors, segments=_segments(tensors, prefix)))
    for i in range(config.layers):
        names.add(layer(f"encoder.blocks.{i}", f"{prefix}encoder.layer.{i}", tensors, cross=False))
    if config.head:
        words = f"{prefix}embeddings.word_embeddings.weight"
        add_head(names, "head", head, words, tensors, transform=linear_name, norm_name=norm_name)
    names.drop("the pooler, unused by every model here", f"{prefix}pooler.*")
    names.drop("next-sentence head, unused by every model here", "cls.seq_relationship.*")
    names.drop("a constant", f"{prefix}embeddings.position_ids", f"{prefix}embeddings.token_type_ids")

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


def _prefix(source: Path, tensors: Tensors, family: _Family) -> str:
    """What stands before the encoder's names, which without it are the same in both families."""
    if any(name.startswith(family.prefix) for name in tensors):
        expect(family.name, [f"{family.prefix}embeddings."], tensors, source)
        return family.prefix
    expect(family.name, ["embeddings.word_embeddings."], tensors, source)
    segments = _segments(tensors, "")
    for other in (_BERT, _ROBERTA):
        if segments == other.segments != family.segments:
            raise CheckpointError(
                source,
                f"not {family.name}: a table of {segments} segments is that of {other.name} (--from {other.kind})",
            )
    return ""


def _segments(tensors: Tensors, prefix: str) -> int:
    segments = tensors.get(f"{prefix}embeddings.token_type_embeddings.weight")
    return segments.shape[0] if segments is not None and segments.dim() == 2 else 0


def embeddings(target: str, source: str, names: Collection[str], *, segments: int = 2) -> list[Rule]:
    """Word, position and segment embeddings and their norm."""
    segment, every = f"{target}.segment", f"{source}.token_type_embeddings.weight"
    return [
        rename(f"{target}.word.weight", f"{source}.word_embeddings.weight"),
        rename(f"{target}.position.weight", f"{source}.position_embeddings.weight"),
        row(segment, every, 0, "only segment 0 is ever used")
        if segments > 1
        else Rule((segment,), (every,), lambda tensors: [tensors[0][0]]),
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


def add_head(
    names: NameMap,
    target: str,
    source: str,
    words: str,
    present: Collection[str],
    *,
    transform: str = "transform.dense",
    norm_name: str = "transform.LayerNorm",
) -> None:
    """The vocabulary head ``source`` (``cls.predictions``), its decoder tied to the word embeddings ``words``."""
    bias, copy = f"{source}.bias", f"{source}.decoder.bias"
    if bias not in present and copy in present:  # transformers writes a tied tensor under one of its names
        bias, copy = copy, bias
    names.add(
        linear(f"{target}.transform", f"{source}.{transform}"),
        norm(f"{target}.norm", f"{source}.{norm_name}", present),
        rename(f"{target}.bias", bias),
    )
    names.ties += [Tie(f"{source}.decoder.weight", words), Tie(copy, bias)]


def text_config(
    tensors: Tensors,
    prefix: str,
    source: Path,
    beside: Beside,
    heads: int | None,
    default: TextConfig = _BERT.default,
) -> tuple[TextConfig, list[str]]:
    """Sizes of the BERT whose names start with ``prefix``, and what had to be assumed.

    ``default`` has what the file does not say.
    """
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
    eps, dropout = beside.number("layer_norm_eps"), beside.number("hidden_dropout_prob")
    attention_dropout = beside.number("attention_probs_dropout_prob")
    padding = beside.number("pad_token_id")
    first_position = default.first_position
    if first_position and padding is not None:  # BERT has a padding token too, but its positions begin with the first
        first_position = int(padding) + 1
    config = TextConfig(
        vocab_size=vocab_size,
        width=width,
        heads=heads,
        ffn=ffn,
        max_positions=max_positions,
        layer_norm_eps=default.layer_norm_eps if eps is None else eps,
        dropout=default.dropout if dropout is None else dropout,
        attention_dropout=default.attention_dropout if attention_dropout is None else attention_dropout,
        first_position=first_position,
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
