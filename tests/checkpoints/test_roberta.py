"""RoBERTa from transformers' files, against transformers itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from triptych.checkpoints.bert import Bert
from triptych.checkpoints.convert import convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder
from triptych.checkpoints.mapping import Report
from triptych.checkpoints.options import Options

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
IDS_BL = torch.tensor([[0, 7, 9, 30, 2], [0, 5, 2, 1, 1], [0, 8, 4, 2, 1]])
MASK_BL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)


def published(kind: str, **changes: Any) -> Any:
    """A network of transformers in which every tensor matters."""
    torch.manual_seed(0)
    network = getattr(transformers, kind)(transformers.RobertaConfig(**(SIZES | changes))).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def converted(source: Path, tmp_path: Path, options: Options | None = None) -> tuple[Bert, Report]:
    report = convert(source, tmp_path / "out", "roberta-hf", options)
    loaded = load_folder(tmp_path / "out")
    assert loaded.model_type == "bert"
    assert isinstance(loaded.model, Bert)
    return loaded.model, report


def assert_parity(ours: Bert, theirs: Any) -> None:
    with torch.inference_mode():
        out = theirs(input_ids=IDS_BL, attention_mask=MASK_BL.long(), output_hidden_states=True)
        levels = ours.encoder.levels(IDS_BL, MASK_BL, ours.config.layers)
        for own, expected in zip(levels, out.hidden_states[1:], strict=True):
            torch.testing.assert_close(own[MASK_BL], expected[MASK_BL], atol=1e-5, rtol=1e-5)
        if ours.head is not None:
            logits = ours.head(levels[-1], ours.encoder.embeddings.word.weight)
            torch.testing.assert_close(logits[MASK_BL], out.logits[MASK_BL], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("safe", [True, False])
def test_with_its_head(tmp_path: Path, safe: bool) -> None:
    theirs = published("RobertaForMaskedLM")
    if safe:
        theirs.save_pretrained(tmp_path)
    else:  # with the tied tensors under both names, and the constants of older versions
        constants = dict(theirs.named_buffers())
        torch.save(theirs.state_dict() | constants, tmp_path / "pytorch_model.bin")
        theirs.config.save_pretrained(tmp_path)
    ours, report = converted(tmp_path, tmp_path)
    assert ours.head is not None
    assert_parity(ours, theirs)
    text = ours.config.text
    assert (text.first_position, text.max_positions, text.max_tokens, text.layer_norm_eps) == (2, 20, 18, 1e-5)
    assert (ours.config.layers, text.vocab_size, text.heads, text.ffn) == (3, 40, 2, 64)
    assert not report.missing
    assert not report.unexpected
    reasons = {dropped.name: dropped.reason for dropped in report.dropped}
    assert set(reasons) == (
        set()
        if safe
        else {
            "lm_head.decoder.weight",
            "lm_head.decoder.bias",
            "roberta.embeddings.position_ids",
            "roberta.embeddings.token_type_ids",
        }
    )


def test_a_bare_model_with_its_pooler(tmp_path: Path) -> None:
    theirs = published("RobertaModel")
    theirs.save_pretrained(tmp_path)
    ours, report = converted(tmp_path, tmp_path)
    assert ours.head is None
    assert_parity(ours, theirs)
    assert {dropped.name: dropped.reason for dropped in report.dropped} == dict.fromkeys(
        ("pooler.dense.weight", "pooler.dense.bias"), "the pooler, unused by every model here"
    )
    assert any("no vocabulary head" in note for note in report.notes)


def test_without_a_configuration(tmp_path: Path) -> None:
    theirs = published("RobertaModel", hidden_size=128, hidden_dropout_prob=0.3)
    theirs.save_pretrained(tmp_path)
    ours, _ = converted(tmp_path, tmp_path)
    assert ours.config.text.dropout == 0.3
    (tmp_path / "config.json").unlink()
    ours, report = converted(tmp_path / "model.safetensors", tmp_path)
    assert ours.config.text.dropout == 0.1
    assert "2 attention heads in the text layers, assumed from width 128 / 64" in report.notes
    assert_parity(ours, theirs)


def test_another_padding_token_moves_the_positions(tmp_path: Path) -> None:
    theirs = published("RobertaModel", pad_token_id=3)
    theirs.save_pretrained(tmp_path)
    ours, _ = converted(tmp_path, tmp_path)
    assert ours.config.text.first_position == 4
    with torch.inference_mode():
        ids_BL = IDS_BL.masked_fill(~MASK_BL, 3)
        expected = theirs(input_ids=ids_BL, attention_mask=MASK_BL.long()).last_hidden_state
        hidden_BLD = ours.encoder(ids_BL, MASK_BL)
        torch.testing.assert_close(hidden_BLD[MASK_BL], expected[MASK_BL], atol=1e-5, rtol=1e-5)


def test_a_decoder_that_is_not_tied(tmp_path: Path) -> None:
    theirs = published("RobertaForMaskedLM", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.decoder\.weight should be the same tensor as roberta\.embedd"):
        converted(tmp_path, tmp_path)


def test_bert_and_roberta_are_not_confused(tmp_path: Path) -> None:
    published("RobertaModel").save_pretrained(tmp_path / "roberta")
    with pytest.raises(CheckpointError, match=r"not a BERT: a table of 1 segments is that of a RoBERTa \(--from robe"):
        convert(tmp_path / "roberta", tmp_path / "out", "bert-hf")
    tensors = load_file(tmp_path / "roberta" / "model.safetensors")
    tensors["embeddings.token_type_embeddings.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "roberta" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a RoBERTa: a table of 2 segments is that of a BERT"):
        converted(tmp_path / "roberta", tmp_path)
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(3, 4)}, tmp_path / "bert.safetensors")
    with pytest.raises(CheckpointError, match=r"not a RoBERTa: it looks like transformers' BERT \(--from bert-hf\)"):
        converted(tmp_path / "bert.safetensors", tmp_path)


def test_its_vocabulary(tmp_path: Path) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["a cat and a dog isn't"] * 3, 270, special_tokens=special)
    weights, words = tmp_path / "weights", tmp_path / "words"
    published("RobertaModel", vocab_size=280).save_pretrained(weights)
    words.mkdir()
    trained.save_model(str(words))
    for given in (words, words / "vocab.json"):
        _, report = converted(weights, tmp_path, Options(vocab=given))
        assert f"{given.name} uses 270 of the 280 word embeddings" in report.notes
        tokenizer = load_folder(tmp_path / "out").tokenizer
        assert tokenizer is not None
        ids_BL, _ = tokenizer.encode_batch(["a cat"], max_length=None, end=True)
        assert ids_BL[0].tolist() == [0, *trained.encode("a cat").ids, 2]
    trained.save_model(str(weights))
    _, report = converted(weights, tmp_path)
    assert "vocab.json uses 270 of the 280 word embeddings" in report.notes
    (weights / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(CheckpointError, match=r"vocab\.json: not a vocabulary: .*lacks <pad>"):
        converted(weights, tmp_path)
