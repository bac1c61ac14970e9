"""Byte-pair tokenizers with the special tokens of BERT, as EVE's 64,000, whatever cuts their words."""

import pickle
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from triptych.data.tokenizers import Tokenizer, open_tokenizer

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
TRAINING = [
    "a man in a blue t-shirt isn't riding the horse; they're waiting, aren't they?",
    "two cats and 3 dogs, 12 of them, sitting on the mat. i'll say: we've seen it!",
]
TEXT = "a man isn't riding, they're waiting. two dogs!"
KINDS = {
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), {}),
    "spaces": (pre_tokenizers.Metaspace(), decoders.Metaspace(), {}),
    "endings": (pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(), {"end_of_word_suffix": "</w>"}),
    "middles": (pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), {"continuing_subword_prefix": "##"}),
}


def trained(kind: str, *, decoder: bool) -> tokenizers.Tokenizer:
    cut, joined, affix = KINDS[kind]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", **affix))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut]) if kind == "bytes" else cut
    if decoder:
        backend.decoder = joined
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False, **affix)
    backend.train_from_iterator(TRAINING * 3, trainer)
    return backend


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_tokenizer_json(tmp_path: Path, kind: str, decoder: bool) -> None:
    backend = trained(kind, decoder=decoder)
    expected = backend.encode(TEXT, add_special_tokens=False).ids
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.vocab_size == backend.get_vocab_size()

    ids_BL, mask_BL = tokenizer.encode_batch([TEXT, "a [MASK] man"], max_length=None, end=True)
    assert ids_BL[0].tolist() == [1, *expected, 2]
    assert tokenizer.mask_id in ids_BL[1]
    assert set(ids_BL[1][~mask_BL[1]].tolist()) == {3}
    assert tokenizer.decode(ids_BL[0]) == TEXT
    for other in (pickle.loads(pickle.dumps(tokenizer)), saved_again(tokenizer, tmp_path)):
        assert other.decode(ids_BL[0]) == TEXT
        assert other.special_ids == tokenizer.special_ids
        assert other.encode_batch([TEXT], max_length=None, end=True)[0].tolist() == ids_BL[:1].tolist()


def saved_again(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(folder / "again.json")
    return Tokenizer.load(folder / "again.json")


def test_unknown_letters_and_long_texts(tmp_path: Path) -> None:
    tokenizer = Tokenizer(trained("endings", decoder=False))
    ids_BL, _ = tokenizer.encode_batch(["a 中 man", TEXT], max_length=5, end=True)
    assert ids_BL[:, 0].tolist() == [tokenizer.bos_id] * 2
    assert ids_BL[1, 4] == tokenizer.eos_id
    assert tokenizer.unk_id in ids_BL[0]
    assert tokenizer.decode(ids_BL[0]) == "a man"


def test_a_vocabulary_of_other_pairs_needs_its_tokenizer_json(tmp_path: Path) -> None:
    trained("endings", decoder=False).model.save(str(tmp_path))
    with pytest.raises(ValueError, match=r"not a byte-level vocabulary: .* only its tokenizer\.json says"):
        open_tokenizer(tmp_path)
