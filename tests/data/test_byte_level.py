"""RoBERTa's tokenizer: equality with the reference, files and what is wrong with them."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triptych.data.tokenizers import Tokenizer, byte_level_from_files, open_tokenizer

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TRAINING = [
    "A man in a blue t-shirt isn't riding the horse; they're waiting, aren't they?",
    "two cats   and 3 dogs, 12 of them\tsitting\n\non the mat. I'll say: we've seen it!",
    "naïve café über 東京 \U0001f600\U0001f600 é",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.json and a merges.txt, trained as RoBERTa's were."""
    path = tmp_path_factory.mktemp("byte_level")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(TRAINING * 3, 500, special_tokens=SPECIAL)
    trained.save_model(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return byte_level_from_files(folder / "vocab.json", folder / "merges.txt")


@pytest.fixture(scope="module")
def reference(folder: Path):
    transformers = pytest.importorskip("transformers")
    # the hub's configuration of roberta-base says of <mask> what is said here
    mask = transformers.AddedToken("<mask>", lstrip=True, special=True, normalized=False)
    return transformers.RobertaTokenizer.from_pretrained(folder, mask_token=mask)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text], max_length=None, end=True)[0][0].tolist()


SNIPPETS = [
    *SPECIAL,
    " <mask>",
    "<mask> ",
    "<mask",
    "isn't",
    "they'll",
    "I'VE",
    " 's",
    "   ",
    "\n\n",
    " \t ",
    "\u00a0",
    "\u3000",
    "café",
    "cafe\u0301",
    "東京",
    "\U0001f468\u200d\U0001f469",
    "\U0001f3f3\ufe0f",
    "\x00",
    "１２",
    "½",
    ".",
    " .",
    "A man",
    " horse",
]
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SNIPPETS)), max_size=8).map("".join)


@given(text=TEXTS)
@example("A man isn't riding the horse, aren't they?")
@example(" leading and trailing  ")
@example("")
@example("a  <mask>  b<mask>c </s><s><pad>")
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_ids_and_texts_are_the_references(tokenizer: Tokenizer, reference, text: str) -> None:
    ids = reference(text)["input_ids"]
    assert ids_of(tokenizer, text) == ids
    decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids) == decoded.strip()
    plain = text
    for token in SPECIAL:
        plain = plain.replace(token, "")
    if plain == text:  # bytes are neither lost nor altered
        assert tokenizer.decode(ids) == text.strip()


def test_any_ids_decode_as_in_the_reference(tokenizer: Tokenizer, reference) -> None:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    def check(ids: list[int]) -> None:
        decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == decoded.strip()

    check()


def test_roles_and_shape(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size() > 300
    ids_BL, mask_BL = tokenizer.encode_batch(["A man", "A man in a blue t-shirt"], max_length=6, end=True)
    assert ids_BL.shape == (2, 6)
    assert ids_BL[:, 0].tolist() == [0, 0]
    assert ids_BL[1, -1] == 2
    assert ids_BL[0][~mask_BL[0]].tolist() == [1] * int((~mask_BL[0]).sum())


def test_a_space_belongs_to_the_next_word_and_mask_takes_one(tokenizer: Tokenizer) -> None:
    assert ids_of(tokenizer, " man") != ids_of(tokenizer, "man")
    assert ids_of(tokenizer, "man <mask>") == ids_of(tokenizer, "man<mask>")
    assert ids_of(tokenizer, "man </s>") != ids_of(tokenizer, "man</s>")
    assert tokenizer.decode(ids_of(tokenizer, "a man , isn ' t it .")) == "a man , isn ' t it ."


def test_every_way_to_the_same_tokenizer(tokenizer: Tokenizer, folder: Path, tmp_path: Path, reference) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    reference.save_pretrained(tmp_path / "hub")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"roberta-{name}").write_bytes((folder / name).read_bytes())
    others = [
        Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
        open_tokenizer(tmp_path / "hub" / "tokenizer.json"),
        open_tokenizer(tmp_path),
        open_tokenizer(folder),
        open_tokenizer(folder / "vocab.json"),
        open_tokenizer(tmp_path / "roberta-vocab.json"),
    ]
    text = "A man isn't <mask> the café \U0001f600</s> 東京!"
    for other in others:
        assert ids_of(other, text) == ids_of(tokenizer, text)
        assert other.decode(ids_of(other, text)) == tokenizer.decode(ids_of(tokenizer, text))
        assert other.special_ids == tokenizer.special_ids


def test_a_foreign_tokenizer_json(tmp_path: Path) -> None:
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(TRAINING, 300, special_tokens=SPECIAL)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    roberta = Tokenizer.load(tmp_path / "tokenizer.json")
    assert roberta.decode(ids_of(roberta, "a cat, and a dog")) == "a cat, and a dog"
    assert len(ids_of(roberta, "a cat, and a dog")) > 4


def renamed(folder: Path, to: Path, names: Mapping[str, str]) -> Path:
    """The vocabulary with other names for the special tokens, which are in no merge."""
    to.mkdir()
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (to / "vocab.json").write_text(json.dumps({names.get(token, token): index for token, index in vocabulary.items()}))
    (to / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    return to


BERT_NAMES = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}


def test_the_special_tokens_may_be_berts(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """As EVE's may be, whose 64,000 are byte pairs with [CLS] and [SEP]."""
    bert = open_tokenizer(renamed(folder, tmp_path / "eve", BERT_NAMES))
    assert bert.special_ids == tokenizer.special_ids
    assert bert.special.bos == "[CLS]"
    assert (bert.bos_id, bert.eos_id) == (0, 2)
    text = "A man isn't riding the café \U0001f600!"
    assert ids_of(bert, text) == ids_of(tokenizer, text)
    assert bert.decode(ids_of(bert, text)) == text
    assert ids_of(bert, "man [MASK]") == ids_of(tokenizer, "man <mask>")
    missing = renamed(folder, tmp_path / "odd", {**BERT_NAMES, "<mask>": "[mask]"})
    with pytest.raises(ValueError, match=r"vocabulary with BERT's special tokens: it lacks \[MASK\]"):
        open_tokenizer(missing)


def test_an_open_tokenizer_of_bert(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]) + "\n")
    for path in (tmp_path, tmp_path / "vocab.txt", str(tmp_path / "vocab.txt")):
        assert open_tokenizer(path).vocab_size == 6


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of vocab\.txt, tokenizer\.json, vocab\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_bytes((folder / "vocab.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file at .*merges\.txt"):
        open_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file at .*none\.txt"):
        open_tokenizer(tmp_path / "none.txt")


def test_damaged_vocabularies(folder: Path, tmp_path: Path) -> None:
    whole, path = json.loads((folder / "vocab.json").read_text()), tmp_path / "vocab.json"

    def problem(content: str | bytes) -> str:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ValueError, match=r"vocab\.json") as caught:
            byte_level_from_files(path, folder / "merges.txt")
        return str(caught.value)

    def without(*tokens: str) -> str:
        return json.dumps({token: index for token, index in whole.items() if token not in tokens})

    assert "is not a vocab.json: " in problem("{")
    assert "is not a vocab.json: " in problem(b"\xff\xfe")
    for content in ("[1]", '{"a": "b"}', '{"a": true}'):
        assert "is not a vocab.json, which has an id for each token" in problem(content)
    assert "is not a RoBERTa vocabulary: it lacks <mask>" in problem(without("<mask>"))
    assert "is not a byte-level vocabulary: it lacks 2 of the 256 bytes" in problem(without("a", "Ā"))
    assert f"the ids of its {len(whole)} tokens are not 0 to {len(whole) - 1}" in problem(json.dumps(whole | {"a": 0}))


def test_damaged_merges(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "merges.txt"

    def problem(content: str | bytes) -> str:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ValueError, match=r"merges\.txt") as caught:
            byte_level_from_files(folder / "vocab.json", path)
        return str(caught.value)

    assert "is not a text file with one merge a line" in problem(b"\xff\xfe")
    assert "line 2 is not two tokens: 'a'" in problem("#version: 0.2\na\n")
    assert "line 1 is not two tokens: 'a b c'" in problem("a b c\n")
    assert "line 3 needs the token 'zx', which vocab.json lacks" in problem("#version: 0.2\n\nq zx\n")
    assert "line 1 needs the token 'qz', which vocab.json lacks" in problem("q z\n")
