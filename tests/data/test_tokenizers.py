import os
import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triptych.data.tokenizers import Tokenizer, train_wordpiece, wordpiece_from_vocab

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *SPECIAL,
    *"abcdefghijklmnopqrstuvwxyz.,!?'-",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    "中",
    "0",
    "##0",
]
WORDS = ["the", "cat", "dog", "un", "##aff", "##able", "run", "##ning", "do", "not", "don", "it"]
FULL = Path(os.environ.get("TRIPTYCH_SHARED", "../shared")) / "data/tokenizers/bert-base-uncased-vocab.txt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*PIECES, *WORDS]) + "\n", encoding="utf-8")
    return wordpiece_from_vocab(path)


@pytest.fixture(scope="module")
def full():
    if not FULL.is_file():
        pytest.skip(f"the BERT vocabulary is not at {FULL}")
    return wordpiece_from_vocab(FULL)


# The algorithm of the BERT release (basic tokenisation, then greedy longest match), written from its description.
def reference(text, vocabulary):
    spaced = ""
    for c in text:
        category = unicodedata.category(c)
        if c in "\t\n\r" or category == "Zs":
            spaced += " "
        elif c in "\0\ufffd" or category.startswith("C"):
            continue
        elif is_chinese(ord(c)) or is_punctuation(c):
            spaced += f" {c} "
        else:
            spaced += c
    pieces = []
    for word in spaced.split():
        plain = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        # stripping may lay bare punctuation or nothing at all
        for part in "".join(f" {c} " if is_punctuation(c) else c for c in plain).split():
            pieces += greedy(part, vocabulary)
    return pieces


def is_chinese(code):
    blocks = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)]
    blocks += [(0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]
    return any(first <= code <= last for first, last in blocks)


def is_punctuation(c):
    symbols = 33 <= ord(c) <= 47 or 58 <= ord(c) <= 64 or 91 <= ord(c) <= 96 or 123 <= ord(c) <= 126
    return symbols or unicodedata.category(c).startswith("P")


def greedy(word, vocabulary):
    if len(word) > 100:
        return ["[UNK]"]
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
        end = next(ends, None)
        if end is None:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def pieces_of(tokenizer, text):
    ids_BL, _ = tokenizer.encode_batch([text], max_length=None, end=False)
    return [tokenizer.backend.id_to_token(index) for index in ids_BL[0, 1:].tolist()]


# Characters of Unicode 3.2, whose properties every later table agrees on; without the capital sigma, whose lower
# case depends on its place in the word in Python only.
OLD = st.characters(exclude_categories=["Cs"]).filter(
    lambda c: c != "Σ" and unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) != "Cn"
)
TEXTS = st.lists(
    st.one_of(st.text(OLD, max_size=6), st.sampled_from(["cats", "don't", "un", " ", "--", "running"]))
).map("".join)


@given(text=TEXTS)
@example("Héllo, WÖRLD! naïve\tcafé\r\nİstanbul")
@example("中文cat狗 don't-stop [x] $5.00 ^_^ `~|")
@example("a" * 100)
@example("a" * 101 + " cat")
@example("unaffable running cats\u200b\x00\ufffd\u00a0dogs\u3000it")
@example("")
@settings(max_examples=200, deadline=None, derandomize=True)
def test_wordpiece_equals_the_published_algorithm(tokenizer, text):
    assert pieces_of(tokenizer, text) == reference(text, set(PIECES + WORDS))


@given(text=TEXTS)
@example("A man in a blue t-shirt isn't skateboarding; the über-long antidisestablishmentarianism (2019).")
@example("photo: émigré's café №5 — ½ price! \U0001f600 東京")
@settings(max_examples=100, deadline=None, derandomize=True)
def test_full_vocabulary_equals_the_published_algorithm(full, text):
    vocabulary = full.backend.get_vocab()
    assert pieces_of(full, text) == reference(text, vocabulary)


def test_known_ids_of_bert_base_uncased(full):
    assert (full.vocab_size, full.pad_id, full.unk_id, full.bos_id, full.eos_id, full.mask_id) == (
        30522,
        0,
        100,
        101,
        102,
        103,
    )
    ids_BL, _ = full.encode_batch(["Hello, world!"], max_length=None, end=True)
    assert ids_BL.tolist() == [[101, 7592, 1010, 2088, 999, 102]]


def test_encode_batch_pads_truncates_and_ends(tokenizer):
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    cat, dog, s = map(tokenizer.backend.token_to_id, ["cat", "dog", "##s"])
    ids_BL, mask_BL = tokenizer.encode_batch(["cat", "Cats DOG"], max_length=9, end=True)
    assert ids_BL.tolist() == [[bos, cat, eos, pad, pad], [bos, cat, s, dog, eos]]
    assert mask_BL.tolist() == [[True, True, True, False, False], [True] * 5]
    assert ids_BL.dtype == torch.int64
    assert mask_BL.dtype == torch.bool
    ids_BL, _ = tokenizer.encode_batch(["cat", "cats dog"], max_length=9, end=False)
    assert ids_BL.tolist() == [[bos, cat, pad, pad], [bos, cat, s, dog]]
    ids_BL, _ = tokenizer.encode_batch(["dog", "cats dog"], max_length=3, end=True)
    assert ids_BL.tolist() == [[bos, dog, eos], [bos, cat, eos]]
    ids_BL, _ = tokenizer.encode_batch(["", "cats"], max_length=1, end=False)
    assert ids_BL.tolist() == [[bos], [bos]]
    assert tokenizer.encode_batch([], max_length=5, end=True)[0].shape == (0, 0)


def test_a_written_special_token_is_that_token(tokenizer):
    assert pieces_of(tokenizer, "dog[SEP]") == ["dog", "[SEP]"]
    assert pieces_of(tokenizer, "a [MASK] cat") == ["a", "[MASK]", "cat"]
    assert "[SEP]" not in pieces_of(tokenizer, "[sep]")
    one, _ = tokenizer.encode_batch(["cat"], max_length=None, end=True)
    other, _ = tokenizer.encode_batch(["cat[SEP]"], max_length=None, end=False)
    assert torch.equal(one, other)


def test_encode_batch_refuses_misuse(tokenizer):
    with pytest.raises(ValueError, match="at least 2"):
        tokenizer.encode_batch(["cat"], max_length=1, end=True)
    with pytest.raises(ValueError, match="list of texts"):
        tokenizer.encode_batch("cat", max_length=5, end=True)


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("Unaffable cats, running!", "unaffable cats, running!"),
        ("do not run. don't run?", "do not run. don't run?"),
        ("it's", "it's"),
        ("[CLS] cat [SEP] dog [PAD]", "cat dog"),
        ("", ""),
    ],
)
def test_decode(tokenizer, text, decoded):
    ids_BL, _ = tokenizer.encode_batch([text], max_length=None, end=True)
    assert tokenizer.decode(ids_BL[0]) == decoded
    assert tokenizer.decode(ids_BL[0].tolist()) == decoded


def test_decode_refuses_foreign_ids(tokenizer):
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        tokenizer.decode([0, tokenizer.vocab_size])
    with pytest.raises(ValueError, match="outside"):
        tokenizer.decode([-100])


def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = ["Unaffable cats[SEP]", "été"]
    for other in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        mine, theirs = (t.encode_batch(texts, max_length=7, end=True) for t in (tokenizer, other))
        assert all(map(torch.equal, mine, theirs))
        assert other.decode(mine[0][0]) == tokenizer.decode(mine[0][0])
        assert other.special_ids == tokenizer.special_ids == (0, 1, 2, 3, 4)


def test_missing_and_foreign_files(tmp_path):
    for read in (wordpiece_from_vocab, Tokenizer.load):
        with pytest.raises(FileNotFoundError, match="none"):
            read(tmp_path / "none")
    path = tmp_path / "file"
    contents = [b"", b"the\ncat\n", b"\xff\xfe\n", "\n".join([*SPECIAL, "cat", "cat"]).encode()]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file"):
            wordpiece_from_vocab(path)
    for content in ['{"a": 1}', "not json"]:
        path.write_text(content)
        with pytest.raises(ValueError, match=r"file is not a tokenizer\.json"):
            Tokenizer.load(path)
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(ValueError, match="file: the tokenizer has neither"):
        Tokenizer.load(path)


# Many pairs of letters occur equally often, so any order that differs between processes would show.
TRAIN = """
import random
from triptych.data.tokenizers import train_wordpiece
draw = random.Random(0)
texts = [" ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in "xyz") for _ in range(300)]
vocabulary = train_wordpiece(texts, 200).backend.get_vocab()
print(*sorted(vocabulary, key=vocabulary.get))
"""


def test_training_is_deterministic():
    command = [sys.executable, "-c", TRAIN]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert len(set(runs)) == 1
    pieces = runs[0].split()
    assert pieces[:5] == SPECIAL
    assert len(set(pieces)) == 200


def test_trained_tokenizer_reads_its_texts():
    texts = ["The red circle", "a blue square?", "Été 中文"]
    tokenizer = train_wordpiece(texts, 100)
    assert tokenizer.backend.token_to_id("circle") is not None
    ids_BL, _ = tokenizer.encode_batch(texts, max_length=None, end=False)
    assert tokenizer.unk_id not in ids_BL
    assert [tokenizer.decode(ids) for ids in ids_BL] == ["the red circle", "a blue square?", "ete 中 文"]
    with pytest.raises(ValueError, match="vocab_size 20"):
        train_wordpiece(texts, 20)
    with pytest.raises(ValueError, match="no words"):
        train_wordpiece([" ", ""], 20)
