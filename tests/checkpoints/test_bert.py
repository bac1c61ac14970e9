"""BERT from transformers' files, against its arithmetic written out here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from triptych.checkpoints.bert import Bert
from triptych.checkpoints.convert import convert
from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import load_folder
from triptych.checkpoints.options import Options

Tensors = dict[str, Tensor]
WIDTH, LAYERS, WORDS = 16, 3, 12
HEADS = Options(text_heads=2)


def bert(*, head: bool = True) -> Tensors:
    """A BertForPreTraining as transformers saves it."""
    linears = {}
    norms = ["bert.embeddings.LayerNorm"]
    for i in range(LAYERS):
        layer = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linears[f"{layer}.attention.self.{part}"] = (WIDTH, WIDTH)
        linears[f"{layer}.attention.output.dense"] = (WIDTH, WIDTH)
        linears[f"{layer}.intermediate.dense"] = (32, WIDTH)
        linears[f"{layer}.output.dense"] = (WIDTH, 32)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    linears["bert.pooler.dense"] = (WIDTH, WIDTH)
    tensors = {f"bert.embeddings.{kind}_embeddings.weight": torch.randn(rows, WIDTH) for kind, rows in _TABLES.items()}
    if head:
        linears["cls.predictions.transform.dense"] = (WIDTH, WIDTH)
        linears["cls.seq_relationship"] = (2, WIDTH)
        norms.append("cls.predictions.transform.LayerNorm")
        tensors["cls.predictions.bias"] = torch.randn(WORDS)
    for name, shape in linears.items():
        tensors |= {f"{name}.weight": torch.randn(shape) * 0.3, f"{name}.bias": torch.randn(shape[0])}
    for name in norms:
        tensors |= {f"{name}.weight": torch.randn(WIDTH), f"{name}.bias": torch.randn(WIDTH)}
    return tensors


_TABLES = {"word": WORDS, "position": 10, "token_type": 2}


def reference(tensors: Tensors, ids_BL: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """States and vocabulary logits, in functions of torch alone."""

    def apply(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    words = tensors["bert.embeddings.word_embeddings.weight"]
    x = words[ids_BL] + tensors["bert.embeddings.position_embeddings.weight"][: ids_BL.shape[1]]
    x = norm(x + tensors["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"bert.encoder.layer.{i}"
        q, k, v = (
            apply(x, f"{layer}.attention.self.{part}").unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        y = ((q @ k.transpose(-1, -2) / (WIDTH // 2) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(x + apply(y, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        y = apply(F.gelu(apply(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(x + y, f"{layer}.output.LayerNorm")
    h = norm(F.gelu(apply(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
    return x, h @ words.T + tensors["cls.predictions.bias"]


IDS = torch.tensor([[2, 7, 9, 3], [2, 5, 6, 11]])


def converted(tmp_path: Path, tensors: Tensors, options: Options = HEADS) -> Bert:
    save_file(tensors, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "out", "bert-hf", options)
    model = load_folder(tmp_path / "out").model
    assert isinstance(model, Bert)
    return model


def assert_parity(model: Bert, tensors: Tensors, eps: float = 1e-12) -> None:
    states, logits = reference(tensors, IDS, eps)
    assert model.head is not None
    with torch.no_grad():
        ours = model.encoder(IDS)
        torch.testing.assert_close(ours, states, atol=1e-5, rtol=1e-4)
        words = model.encoder.embeddings.word.weight
        torch.testing.assert_close(model.head(ours, words), logits, atol=1e-4, rtol=1e-4)


def test_pretraining_model(tmp_path: Path) -> None:
    tensors = bert()
    model = converted(tmp_path, tensors)
    assert_parity(model, tensors)
    assert (model.config.layers, model.config.text.max_positions, model.config.text.ffn) == (LAYERS, 10, 32)


def test_old_norm_names_tied_decoder_and_position_ids(tmp_path: Path) -> None:
    tensors = bert()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(10)[None]
    assert_parity(converted(tmp_path, old), tensors)

    del old["cls.predictions.bias"]  # the other name of the tied pair
    assert_parity(converted(tmp_path, old), tensors)

    old["cls.predictions.decoder.weight"] += 1
    with pytest.raises(CheckpointError, match=r"should be the same tensor as bert\.embeddings\.word_embeddings"):
        converted(tmp_path, old)


def test_bare_model_without_prefix_and_head(tmp_path: Path) -> None:
    tensors = {name.removeprefix("bert."): tensor for name, tensor in bert(head=False).items()}
    model = converted(tmp_path, tensors)
    assert model.head is None
    assert torch.equal(model.encoder.embeddings.word.weight, tensors["embeddings.word_embeddings.weight"])
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert any("no vocabulary head" in note for note in report["notes"])
    assert {d["name"] for d in report["dropped"]} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
        "embeddings.token_type_embeddings.weight",
    }


def test_configuration_and_vocabulary_beside_the_weights(tmp_path: Path, vocab: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "layer_norm_eps": 1e-3}))
    (tmp_path / "vocab.txt").write_bytes(vocab.read_bytes())
    tensors = bert()
    assert_parity(converted(tmp_path, tensors, Options()), tensors, eps=1e-3)
    tokenizer = load_folder(tmp_path / "out").tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size == WORDS
    assert tokenizer.encode_batch(["a b g"], max_length=9, end=True)[0].tolist() == [[2, 5, 6, 11, 3]]


def test_vocabularies_that_do_not_fit(tmp_path: Path, vocab: Path) -> None:
    vocab.write_text(vocab.read_text() + "h\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: has 13 entries, more than the model's 12"):
        converted(tmp_path, bert(), Options(text_heads=2, vocab=vocab))
    with pytest.raises(CheckpointError, match=r"none\.txt: not a vocabulary"):
        converted(tmp_path, bert(), Options(text_heads=2, vocab=tmp_path / "none.txt"))
    vocab.write_text("the\na\n")
    with pytest.raises(CheckpointError, match="not a vocabulary"):
        converted(tmp_path, bert(), Options(text_heads=2, vocab=vocab))


def test_other_families(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a BERT: it is of a family this library does not know"):
        converted(tmp_path, {"albert.embeddings.word_embeddings.weight": torch.zeros(3, 4)})
    with pytest.raises(CheckpointError, match=r"not a BERT: it looks like transformers' RoBERTa \(--from roberta-hf\)"):
        converted(tmp_path, {"roberta.embeddings.word_embeddings.weight": torch.zeros(3, 4)})
    decoder = {**bert(), "bert.encoder.layer.0.crossattention.self.query.weight": torch.zeros(WIDTH, WIDTH)}
    with pytest.raises(CheckpointError, match=r"no place in the model: .*crossattention"):
        converted(tmp_path, decoder)
