"""Text to token ids and back, on the `tokenizers` library.

Shapes: B batch, L tokens of the longest text of the batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens by role, in the order in which a new vocabulary lists them."""

    pad: str
    unk: str
    bos: str
    eos: str
    mask: str


BERT = SpecialTokens("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = SpecialTokens("<pad>", "<unk>", "<s>", "</s>", "<mask>")

# What transformers' clean_up_tokenization joins, so that decoded captions equal those of the official code.
_JOINED = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")


class Tokenizer:
    """A `tokenizers.Tokenizer` whose special tokens have roles.

    Attributes:
        backend: the wrapped tokenizer.
        special: the special tokens by role.
        pad_id, bos_id, eos_id, mask_id, unk_id: their ids; BERT's [CLS] is `bos`, its [SEP] `eos`.
        special_ids: all of them.
        vocab_size: number of ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps a tokenizer of any model (WordPiece, or BPE as EVE's) with the special tokens of BERT or RoBERTa.

        Raises:
            ValueError: it has neither BERT's nor RoBERTa's special tokens.
        """
        backend.no_padding()
        backend.no_truncation()
        backend.decoder = _decoder(backend)
        self.backend = backend
        self.special = _special_tokens(backend)
        self.pad_id = self._id(self.special.pad)
        self.unk_id = self._id(self.special.unk)
        self.bos_id = self._id(self.special.bos)
        self.eos_id = self._id(self.special.eos)
        self.mask_id = self._id(self.special.mask)
        self.special_ids = (self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id)
        self.vocab_size = backend.get_vocab_size()

    def _id(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        assert index is not None
        return index

    def encode_batch(self, texts: Sequence[str], *, max_length: int | None, end: bool) -> tuple[Tensor, Tensor]:
        """Token ids, padded to the longest text.

        A special token written in a text ("[SEP]") is that special token.

        Args:
            texts: B texts.
            max_length: longest L, special tokens included; longer texts lose their last tokens, never the
                end token. None for no limit.
            end: True for "[CLS] text [SEP]"; False for "[CLS] text", which mPLUG's encoders read.

        Returns:
            ids_BL (int64) and mask_BL (bool, True where a token is real).
        """
        shell = 1 + int(end)
        if max_length is not None and max_length < shell:
            raise ValueError(f"max_length must be at least {shell} to hold the special tokens, got {max_length}")
        if isinstance(texts, str):
            raise ValueError("encode_batch takes a list of texts, got one text")
        room = None if max_length is None else max_length - shell
        tail = [self.eos_id] if end else []
        # One by one: the library's encode_batch starts threads, which no fork of loader workers survives.
        rows = [[self.bos_id, *self.backend.encode(text, add_special_tokens=False).ids[:room], *tail] for text in texts]
        longest = max(map(len, rows), default=0)
        ids_BL = torch.full((len(rows), longest), self.pad_id, dtype=torch.int64)
        mask_BL = torch.zeros((len(rows), longest), dtype=torch.bool)
        for index, row in enumerate(rows):
            ids_BL[index, : len(row)] = torch.tensor(row)
            mask_BL[index, : len(row)] = True
        return ids_BL, mask_BL

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one sequence of ids, without special tokens and without white space around it.

        Word pieces are joined, and punctuation with the word before it; bytes are read as they are. It reads to the
        end: cut the ids first if they go on after the end token.
        """
        numbers = [int(index) for index in ids]
        foreign = [index for index in numbers if not 0 <= index < self.vocab_size]
        if foreign:
            raise ValueError(f"ids {foreign[:5]} are outside of the vocabulary of {self.vocab_size}")
        text = self.backend.decode(numbers, skip_special_tokens=True)
        if not isinstance(self.backend.decoder, _SPACED):
            text = text.replace(" ' ", "'")
            for ending in _JOINED:
                text = text.replace(ending, ending[1:])
        return text.strip()

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json."""
        self.backend.save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json: ours, or one of a model of the hub with BERT's or RoBERTa's special tokens.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a tokenizer, or of another family.
        """
        path = _existing(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        try:
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def wordpiece_from_vocab(path: str | Path, *, lowercase: bool = True) -> Tokenizer:
    """A BERT tokenizer from its vocab.txt (one word piece a line; the line number is the id).

    With `lowercase`, as bert-base-uncased: control characters dropped, Chinese characters set apart, accents
    stripped, lower case; punctuation set apart; words of more than 100 characters are [UNK].

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not such a vocabulary.
    """
    path = _existing(path)
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file with one word piece a line: {error}") from error
    return _wordpiece(pieces, str(path), lowercase)


def byte_level_from_files(vocabulary: str | Path, merges: str | Path) -> Tokenizer:
    """A RoBERTa tokenizer from its vocab.json (tokens and ids) and merges.txt (one pair a line, in order).

    Bytes are merged within words, a space belongs to the word that follows it, none is put before the text, and
    `<mask>` takes the space before it: roberta-base's (transformers ``RobertaTokenizer``). The special tokens may also
    be BERT's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the files are not such a vocabulary, or do not belong together.
    """
    vocabulary, merges = _existing(vocabulary), _existing(merges)
    ids, special = _byte_level_ids(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(ids, _merges(merges, ids, vocabulary)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, lstrip=token == special.mask)
            for token in sorted(astuple(special), key=ids.__getitem__)
        ]
    )
    return Tokenizer(backend)


def _byte_level_ids(path: Path) -> tuple[dict[str, int], SpecialTokens]:
    """The tokens of a vocab.json and the special ones among them, checked."""
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a vocab.json: {error}") from error
    if not isinstance(ids, dict) or any(type(index) is not int for index in ids.values()):
        raise ValueError(f"{path} is not a vocab.json, which has an id for each token")
    missing_of = {family: [token for token in astuple(family) if token not in ids] for family in (ROBERTA, BERT)}
    special = min(missing_of, key=lambda family: len(missing_of[family]))
    if missing := missing_of[special]:
        name = "RoBERTa vocabulary" if special is ROBERTA else "vocabulary with BERT's special tokens"
        raise ValueError(f"{path} is not a {name}: it lacks {', '.join(missing)}")
    bytes_missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in ids]
    if bytes_missing:  # the library would leave these out of texts without a word
        raise ValueError(
            f"{path} is not a byte-level vocabulary: it lacks {len(bytes_missing)} of the 256 bytes. How another one "
            "cuts texts into words, only its tokenizer.json says"
        )
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path}: the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once")
    return ids, special


def _merges(path: Path, ids: Mapping[str, int], vocabulary: Path) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, checked against the vocabulary."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file with one merge a line: {error}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"{path}: line {number} is not two tokens: {line[:60]!r}")
        unknown = next((token for token in (left, right, left + right) if token not in ids), None)
        if unknown is not None:
            raise ValueError(f"{path}: line {number} needs the token {unknown!r}, which {vocabulary.name} lacks")
        pairs.append((left, right))
    return pairs


VOCABULARY_FILES = ("vocab.txt", "tokenizer.json", "vocab.json")
"""What :func:`open_tokenizer` looks for in a folder, in this order."""


def open_tokenizer(path: str | Path) -> Tokenizer:
    """A ``tokenizer.json``, BERT's ``vocab.txt``, a ``vocab.json`` beside its ``merges.txt``, or the folder of one.

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        ValueError: the file is not a tokenizer, or of another family.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in VOCABULARY_FILES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no tokenizer file in {path}: it has none of {', '.join(VOCABULARY_FILES)}")
        path = found
    if path.name.endswith("vocab.json"):  # "roberta-vocab.json" has "roberta-merges.txt"
        return byte_level_from_files(path, path.with_name(path.name.replace("vocab.json", "merges.txt")))
    return Tokenizer.load(path) if path.suffix == ".json" else wordpiece_from_vocab(path)


def train_wordpiece(texts: Iterable[str], vocab_size: int, *, lowercase: bool = True) -> Tokenizer:
    """A BERT tokenizer with a vocabulary learnt from `texts`; the same texts give the same vocabulary.

    Raises:
        ValueError: no words, or `vocab_size` does not even hold the characters that occur.
    """
    normalizer, pre_tokenizer = _bert_normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text, times in Counter(texts).items():  # generated texts come again and again
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)):
            counts[word] += times
    letters = sorted(set("".join(counts)))
    # Given beforehand: the trainer would number the letters in the order of a hash map, and so break ties
    # between equally frequent pairs differently in every run.
    given = [*astuple(BERT), *letters, *(f"##{letter}" for letter in letters)]
    if not counts:
        raise ValueError("cannot train a tokenizer: the texts have no words")
    if vocab_size < len(given):
        raise ValueError(f"vocab_size {vocab_size} is less than the {len(given)} single characters of the texts")
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token=BERT.unk))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=given, show_progress=False)
    learner.train_from_iterator((" ".join([word] * count) for word, count in counts.items()), trainer)
    vocabulary = learner.get_vocab()
    return _wordpiece(sorted(vocabulary, key=vocabulary.__getitem__), "the trained vocabulary", lowercase)


def _wordpiece(pieces: Sequence[str], origin: str, lowercase: bool) -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    missing = [token for token in astuple(BERT) if token not in vocabulary]
    if missing:
        raise ValueError(f"{origin} is not a BERT vocabulary: it lacks {', '.join(missing)}")
    if len(vocabulary) < len(pieces):
        line = next(index for index, piece in enumerate(pieces) if vocabulary[piece] != index)
        raise ValueError(f"{origin}: {pieces[line]!r} of line {line + 1} occurs again")
    model = models.WordPiece(vocabulary, unk_token=BERT.unk, max_input_chars_per_word=100)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = _bert_normalizer(lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in astuple(BERT)])
    return Tokenizer(backend)


def _bert_normalizer(lowercase: bool) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )


_SPACED = (decoders.ByteLevel, decoders.Metaspace, decoders.Sequence)
"""Decoders whose tokens know the spaces between words; without, punctuation was set apart and is joined again."""


def _decoder(backend: tokenizers.Tokenizer) -> Any:
    """What joins tokens to a text: the tokenizer's own decoder, or where it has none what its tokens show."""
    model, own = backend.model, backend.decoder
    prefix = "##" if isinstance(model, models.WordPiece) else None
    if isinstance(model, models.BPE):
        prefix = model.continuing_subword_prefix
    if prefix and (own is None or isinstance(own, decoders.WordPiece)):
        # the library cleans piece by piece and leaves "it ' s" apart; see `Tokenizer.decode`
        return decoders.WordPiece(prefix=prefix, cleanup=False)
    if own is not None or not isinstance(model, models.BPE):
        return own
    if model.end_of_word_suffix:
        return decoders.BPEDecoder(suffix=model.end_of_word_suffix)
    cuts = _names_of(backend.pre_tokenizer)
    if "ByteLevel" in cuts:
        return decoders.ByteLevel()
    return decoders.Metaspace() if "Metaspace" in cuts else None


def _names_of(pre_tokenizer: Any) -> set[str]:
    """The types of a pre-tokenizer and of those it is made of."""
    if pre_tokenizer is None:
        return set()
    state = json.loads(pre_tokenizer.__getstate__())
    return {part["type"] for part in [state, *state.get("pretokenizers", [])]}


def _special_tokens(backend: tokenizers.Tokenizer) -> SpecialTokens:
    for family in (BERT, ROBERTA):
        if all(backend.token_to_id(token) is not None for token in astuple(family)):
            return family
    raise ValueError("the tokenizer has neither BERT's ([CLS], [SEP]...) nor RoBERTa's (<s>, </s>...) special tokens")


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file at {path}")
    return path
