"""Convert a published checkpoint to our format, or one of ours to a published layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from triptych.checkpoints import beit, bert, bridgetower, bridgetower_hf, clip, eve, mplug
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import save_folder
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.options import Converted, Options
from triptych.checkpoints.reading import Tensors, read_tensors
from triptych.data.tokenizers import VOCABULARY_FILES, Tokenizer, open_tokenizer


@dataclass(frozen=True)
class Kind:
    """A published layout.

    Attributes:
        convert: from the file, its tensors and the options.
        options: which fields of :class:`Options` mean something to it.
    """

    convert: Callable[[Path, Tensors, Options], Converted]
    options: frozenset[str]


KINDS: dict[str, Kind] = {
    "mplug": Kind(mplug.convert_mplug, mplug.OPTIONS),
    "mplug-modelscope": Kind(mplug.convert_mplug_modelscope, mplug.OPTIONS),
    "bridgetower": Kind(bridgetower.convert_bridgetower, bridgetower.OPTIONS),
    "bridgetower-hf": Kind(bridgetower_hf.convert_bridgetower_hf, bridgetower_hf.OPTIONS),
    "eve": Kind(eve.convert_eve, eve.OPTIONS),
    "clip": Kind(clip.convert_clip, clip.OPTIONS),
    "clip-hf": Kind(clip.convert_clip_hf, clip.OPTIONS),
    "bert-hf": Kind(bert.convert_bert, bert.OPTIONS),
    "roberta-hf": Kind(bert.convert_roberta, bert.OPTIONS),
    "beit2": Kind(beit.convert_beit, beit.OPTIONS),
}
"""The values of ``--from``."""

EXPORTS: dict[str, Callable[[Path, Path], Report]] = {"bridgetower-hf": bridgetower_hf.export_bridgetower_hf}
"""The values of ``--to``: from a checkpoint folder to the folder to write."""


def convert(source: str | Path, folder: str | Path, kind: str, options: Options | None = None) -> Report:
    """Convert ``source`` (a file, or a folder that holds one) and write the checkpoint ``folder``.

    Args:
        kind: one of :data:`KINDS`.

    Returns:
        What became of every tensor; it is also written to the folder as ``conversion.json``.

    Raises:
        CheckpointError: the source cannot be read, is of another kind, or does not fit; nothing is written then.
    """
    options = options or Options()
    source = Path(source)
    if kind not in KINDS:
        raise CheckpointError(source, f"unknown kind {kind!r}; known are {', '.join(KINDS)}")
    options.refuse_others(KINDS[kind].options, f"--from {kind}", source)
    tensors = read_tensors(source)
    converted = KINDS[kind].convert(source, tensors, options)
    tokenizer = None
    if converted.vocab_size is not None:
        tokenizer = _tokenizer(source, options.vocab, converted.vocab_size, converted.report)
    save_folder(
        folder,
        converted.model,
        tokenizer,
        converted.preprocessing,
        task=converted.task,
        task_state=converted.task_state,
        extra=converted.extra,
        conversion=converted.report.to_json(),
    )
    return converted.report


def export(folder: str | Path, target: str | Path, kind: str, options: Options | None = None) -> Report:
    """Write the checkpoint ``folder`` in a published layout, to a new folder ``target``.

    Args:
        kind: one of :data:`EXPORTS`.
        options: none of them applies.

    Returns:
        What became of every tensor.

    Raises:
        CheckpointError: no checkpoint of ours, or one that the layout has no place for; nothing is written then.
    """
    if kind not in EXPORTS:
        raise CheckpointError(folder, f"unknown layout {kind!r}; known are {', '.join(EXPORTS)}")
    (options or Options()).refuse_others(frozenset(), f"--to {kind}", folder)
    return EXPORTS[kind](Path(folder), Path(target))


def _tokenizer(source: Path, vocab: Path | None, words: int, report: Report) -> Tokenizer | None:
    """The given vocabulary, or the one beside the weights."""
    path = vocab
    if path is None:
        beside = source if source.is_dir() else source.parent
        path = next((beside / name for name in VOCABULARY_FILES if (beside / name).is_file()), None)
    if path is None:
        report.notes.append(
            "no vocabulary beside the file, so no tokenizer saved: give its vocab.txt, vocab.json or "
            "tokenizer.json with --vocab"
        )
        return None
    try:
        tokenizer = open_tokenizer(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(path, f"not a vocabulary: {error}") from error
    if tokenizer.vocab_size > words:
        raise CheckpointError(
            path, f"has {tokenizer.vocab_size} entries, more than the model's {words} word embeddings"
        )
    if tokenizer.vocab_size < words:
        report.notes.append(f"{path.name} uses {tokenizer.vocab_size} of the {words} word embeddings")
    return tokenizer
