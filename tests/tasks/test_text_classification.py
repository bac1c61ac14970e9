"""Text classification: how texts and pairs are encoded, the losses, the report, and that it learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from torch.nn import functional as F

from triptych.checkpoints.configs import from_json, to_json
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import open_source
from triptych.data.tokenizers import Tokenizer, open_tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.mplug import MPlug
from triptych.tasks.text_classification import (
    LabelledText,
    ReadText,
    TextBatch,
    TextClassification,
    TextClassificationConfig,
    encode_texts,
)

PIXELS = Preprocessing(16, HALF, HALF)
LABELS = ("no", "yes")
ITEMS = (
    LabelledText(0, "the dog runs", "a dog is running fast", 1),
    LabelledText(1, "it is late", None, None),
    LabelledText(2, "the dog", "nobody", 0),
)
TOKENIZER = train_wordpiece(["the dog runs a is running fast it late nobody"] * 3, 90)


@pytest.fixture
def model(build_model: Callable[[Tokenizer], MPlug]) -> MPlug:
    model = build_model(TOKENIZER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def task_of(model: MPlug, **changes: Any) -> TextClassification:
    torch.manual_seed(1)
    config = TextClassificationConfig(**({"labels": LABELS} | changes))
    return TextClassification(model, TOKENIZER, PIXELS, config).eval()


def batch_of(task: TextClassification, targets: tuple[Any, ...] = (1, None, 0)) -> TextBatch:
    items = [LabelledText(i.index, i.first, i.second, t) for i, t in zip(ITEMS, targets, strict=True)]
    return task.batch(items, max_tokens=30)


def pooled_alone(task: TextClassification, batch: TextBatch, row: int, pooling: str) -> torch.Tensor:
    length = int(batch.text.mask_BL[row].sum())
    hidden_LD = task.model.encode_text(batch.text.ids_BL[row : row + 1, :length]).hidden_BLD[0]
    return hidden_LD[0] if pooling == "first" else hidden_LD.mean(0)


# ------------------------------------------------------------------------------------------------------- inputs


def test_pairs_are_what_the_tokenizer_makes_of_the_written_separator() -> None:
    tokens = encode_texts(TOKENIZER, [(item.first, item.second) for item in ITEMS], 30)
    written = [item.first if item.second is None else f"{item.first} [SEP] {item.second}" for item in ITEMS]
    ids_BL, mask_BL = TOKENIZER.encode_batch(written, max_length=None, end=True)
    assert torch.equal(tokens.ids_BL, ids_BL)
    assert torch.equal(tokens.mask_BL, mask_BL)


def test_between_robertas_texts_stand_two_separators() -> None:
    vocabulary = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True) for token in list(vocabulary)[:5]])
    tokens = encode_texts(Tokenizer(backend), [("a b", "b"), ("a", None)], 20)
    assert tokens.ids_BL.tolist() == [[0, 5, 6, 2, 2, 6, 2], [0, 5, 2, 1, 1, 1, 1]]


def test_robertas_pairs_are_the_references(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["the dog isn't running"] * 3, 270, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    trained.save_model(str(tmp_path))
    reference = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    pairs = [("the dog", "a dog isn't it"), ("a", None), ("the dog is running on", "é dog")]
    tokens = encode_texts(open_tokenizer(tmp_path), pairs, 10)
    for (first, second), ids_L, mask_L in zip(pairs, tokens.ids_BL, tokens.mask_BL, strict=True):
        expected = reference(first, second, truncation=True, max_length=10)["input_ids"]
        assert ids_L[mask_L].tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(5, 20))
def test_the_longer_text_is_cut_first(first: int, second: int, max_tokens: int) -> None:
    the, dog = (TOKENIZER.backend.token_to_id(word) for word in ("the", "dog"))
    tokens = encode_texts(TOKENIZER, [("the " * first, "dog " * second)], max_tokens)
    (row,) = tokens.ids_BL.tolist()
    while first + second > max_tokens - 3:
        first, second = (first - 1, second) if first > second else (first, second - 1)
    assert row == [TOKENIZER.bos_id, *[the] * first, TOKENIZER.eos_id, *[dog] * second, TOKENIZER.eos_id]


def test_long_texts_are_cut_to_what_the_model_reads(model: MPlug) -> None:
    task = task_of(model)
    long = [LabelledText(0, "dog " * 100, None, 1), LabelledText(1, "dog " * 100, "the " * 100, 1)]
    assert task.batch(long, max_tokens=500).text.ids_BL.shape[1] == model.max_text == 32
    batch = task.batch(long, max_tokens=9)
    assert batch.text.ids_BL.shape[1] == 9
    assert (batch.text.ids_BL[:, -1] == TOKENIZER.eos_id).all()
    with pytest.raises(ValueError, match="max_tokens must be at least 5 for pairs of texts, got 4"):
        task.batch(long, max_tokens=4)


def read(extra: dict[str, Any], kind: Any = "classify") -> LabelledText:
    return ReadText(LABELS, kind)(Record("f.tsv:3", None, (), "7", extra))


def test_what_is_read() -> None:
    extra = {"text": "a", "text_pair": "b", "label": "yes", "index": 4, "split": "dev"}
    assert read(extra) == LabelledText(4, "a", "b", 1, "dev")
    assert read({"text": "a"}) == LabelledText("f.tsv:3", "a", None, None)
    assert read({"text": "a", "label": 2.5}, "regress").target == 2.5
    assert read({"text": "a"}, "regress").target is None


def test_what_cannot_be_read() -> None:
    for extra, name in (({}, "text"), ({"text": " "}, "text"), ({"text": "a", "text_pair": 3}, "text_pair")):
        with pytest.raises(BrokenSample, match=rf"f\.tsv:3: its '{name}' must be a text, not"):
            read(extra)
    with pytest.raises(BrokenSample, match=r"f\.tsv:3: its label must be one of no, yes, not 'maybe'"):
        read({"text": "a", "label": "maybe"})
    for label in ("2.5", True, float("nan")):
        with pytest.raises(BrokenSample, match=r"f\.tsv:3: its label must be a number, not"):
            read({"text": "a", "label": label}, "regress")
    with pytest.raises(BrokenSample, match="k: it has 3 columns"):
        ReadText(LABELS, "classify")(Record("k", None, (), "k", {}, "it has 3 columns, not 6"))


# ------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_loss_of_classes(model: MPlug, pooling: str) -> None:
    task = task_of(model, pooling=pooling)
    batch = batch_of(task)
    logits_BK = torch.stack([task.head(pooled_alone(task, batch, row, pooling)) for row in range(3)])
    expected = F.cross_entropy(logits_BK[[0, 2]], torch.tensor([1, 0]))
    assert task(batch)["text_classification"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert task.predict(batch) == [LABELS[index] for index in logits_BK.argmax(1).tolist()]


def test_the_loss_of_numbers(model: MPlug) -> None:
    task = task_of(model, labels=(), kind="regress", score="spearman", head="hidden")
    batch = batch_of(task, (3.5, None, 1.0))
    value_B = torch.cat([task.head(pooled_alone(task, batch, row, "first")[None])[0] for row in range(3)])
    expected = ((value_B[0] - 3.5) ** 2 + (value_B[2] - 1.0) ** 2) / 2
    assert task(batch)["text_classification"].item() == pytest.approx(expected.item(), abs=1e-4)
    assert task.predict(batch) == pytest.approx(value_B.tolist(), abs=1e-5)


@pytest.mark.parametrize("linear_probe", [True, False])
def test_only_what_runs_is_trained(model: MPlug, linear_probe: bool) -> None:
    task = task_of(model, linear_probe=linear_probe)
    model.train_only(*task.uses)
    task(batch_of(task))["text_classification"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert task.uses == (() if linear_probe else ("text",))


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="kind must be one of classify, regress"):
        TextClassificationConfig(kind="rank")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the score to regress by must be one of pearson, spearman, not 'accuracy'"):
        TextClassificationConfig(kind="regress")
    with pytest.raises(ValueError, match="to classify by must be one of accuracy, f1, matthews, not 'pearson'"):
        TextClassificationConfig(score="pearson")
    records = [Record("k", None, (), "k", {"text": "a", "label": label}) for label in "abc"]
    with pytest.raises(ValueError, match="f1 is a score of two classes, not of 3: a, b, c"):
        TextClassification.complete(TextClassificationConfig(score="f1"), records)


def test_the_configuration_goes_through_json() -> None:
    config = TextClassificationConfig(LABELS, pooling="mean", kind="classify", score="matthews")
    assert from_json(TextClassificationConfig, json.loads(json.dumps(to_json(config))), "here") == config
    number = TextClassificationConfig(kind="regress", score="pearson")
    assert TextClassification.complete(number, []) == number


# ------------------------------------------------------------------------------------------------------- report


def labelled(truths: str, split: str | None = None) -> list[LabelledText]:
    targets = {"y": 1, "n": 0, "-": None}
    return [LabelledText(n, "a", None, targets[truth], split) for n, truth in enumerate(truths)]


def said(words: str) -> list[str]:
    return [{"y": "yes", "n": "no"}[letter] for letter in words]


def test_the_report_of_two_classes(model: MPlug) -> None:
    report = task_of(model, score="matthews").report(labelled("yyyn-"), said("yynny"))
    assert report.scores == {"score": 57.735, "accuracy": 75.0, "matthews": 57.735, "f1": 80.0}
    assert report.credits == [1.0, 1.0, 0.0, 1.0]
    assert report.predictions[4] == {"index": 4, "prediction": "yes"}
    assert task_of(model).report(labelled("--"), said("yn")).scores == {}


def test_the_score_of_two_parts_is_their_mean(model: MPlug) -> None:
    items = [*labelled("yn", "dev_matched"), *labelled("yyyn", "dev_mismatched")]
    report = task_of(model).report(items, said("yy" + "yyyn"))
    assert report.scores["accuracy"] == pytest.approx(83.3333)
    assert report.scores["accuracy/dev_matched"] == 50.0
    assert report.scores["accuracy/dev_mismatched"] == 100.0
    assert report.scores["score"] == 75.0


def test_three_classes_have_no_f1(model: MPlug) -> None:
    task = task_of(model, labels=("contradiction", "entailment", "neutral"))
    report = task.report(labelled("yn"), ["entailment", "neutral"])
    assert report.scores == {"score": 50.0, "accuracy": 50.0, "matthews": 50.0}


def test_the_report_of_numbers(model: MPlug) -> None:
    task = task_of(model, labels=(), kind="regress", score="spearman")
    items = [LabelledText(n, "a", "b", target) for n, target in enumerate((0.0, 2.5, 5.0, None))]
    report = task.report(items, [1.0, 2.0, 4.0, 3.0])
    assert report.scores == {"score": 100.0, "pearson": 98.1981, "spearman": 100.0}
    assert report.credits == []
    assert report.predictions[3] == {"index": 3, "prediction": 3.0}


# --------------------------------------------------------------------------------------------------- whole files


def test_a_text_has_nothing_to_hide(model: MPlug, tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\nthe dog\tyes\n")
    with pytest.raises(ValueError, match="looks at no pictures: evaluate it without blank"):
        task_of(model).evaluate(open_source(path), blank=True)


def test_it_learns_which_word_counts(model: MPlug, tmp_path: Path) -> None:
    texts = [f"{first} {second}" for first in ("the", "a", "it", "is") for second in ("dog", "runs", "late")]
    rows = [f"{text}\t{'yes' if 'dog' in text else 'no'}" for text in texts]
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(["sentence\tlabel", *rows, "odd"]) + "\n")
    source = open_source(path)
    config = TextClassification.complete(TextClassificationConfig(), source)
    assert config.labels == LABELS
    torch.manual_seed(0)
    task = TextClassification(model, TOKENIZER, PIXELS, config)
    model.train_only(*task.uses)
    pipeline = task.training_pipeline(PIXELS.test_transform(), 30, 20)
    batch = pipeline.collate([pipeline.prepare(record, 0) for record in source])
    assert len(batch) == 12
    optimizer = torch.optim.Adam([own for own in task.parameters() if own.requires_grad], lr=0.01)
    task.train()
    for _ in range(40):
        optimizer.zero_grad()
        task(batch)["text_classification"].backward()
        optimizer.step()
    report = task.eval().evaluate(source, texts=5)
    assert report.scores["score"] == 100.0
    assert [row["index"] for row in report.predictions] == list(range(12))
    assert len(task.evaluate(source, limit=7, texts=5).predictions) == 7
    assert task.answer(list(source)[:2]) == ["yes", "no"]
