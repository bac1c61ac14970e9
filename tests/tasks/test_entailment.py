"""Visual entailment: what is read, the loss, the report."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from triptych.data.lists import ENTAILMENT
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import ListShard, Source
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.mplug import MPlug
from triptych.tasks.entailment import Entailment, EntailmentBatch, EntailmentConfig, Hypothesis, ReadHypotheses

PIXELS = Preprocessing(16, HALF, HALF)
ITEMS = (
    Hypothesis("1", "a dog runs", ENTAILMENT.index("entailment")),
    Hypothesis("2", "nobody is there at all", ENTAILMENT.index("contradiction")),
    Hypothesis("3", "it is late", None),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([item.text for item in ITEMS] * 3, 80)


@pytest.fixture
def task(tokenizer: Tokenizer, build_model: Callable[[Tokenizer], MPlug]) -> Entailment:
    model = build_model(tokenizer)
    task = Entailment(model, tokenizer, PIXELS).eval()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return task


@pytest.fixture
def batch(task: Entailment) -> EntailmentBatch:
    torch.manual_seed(2)
    pixels_BCHW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    return task.batch(pixels_BCHW, torch.tensor([0, 0, 1]), ITEMS, max_tokens=20)


def logits_alone(task: Entailment, batch: EntailmentBatch, row: int) -> torch.Tensor:
    """Of one hypothesis, without padding."""
    picture, length = int(batch.picture_Q[row]), int(batch.hypothesis.mask_BL[row].sum())
    image = task.model.encode_image(PIXELS.normalize(batch.pixels[picture : picture + 1]))
    text = task.model.encode_text(batch.hypothesis.ids_BL[row : row + 1, :length])
    return task.head(task.model.fuse(image, text).pooled_BP)


def test_the_loss_is_that_of_the_labelled_ones_alone(task: Entailment, batch: EntailmentBatch) -> None:
    logits_QK = torch.cat([logits_alone(task, batch, row) for row in range(3)])
    expected = F.cross_entropy(logits_QK[:2], torch.tensor([2, 0]))
    assert task(batch)["entailment"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert task.predict(batch) == [ENTAILMENT[index] for index in logits_QK.argmax(1).tolist()]


def test_only_what_runs_is_trained(task: Entailment, batch: EntailmentBatch) -> None:
    task.model.train_only(*task.uses)
    task(batch)["entailment"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def read(extra: dict[str, Any], premise: bool = False) -> list[Hypothesis]:
    return ReadHypotheses("[SEP]", premise)(Record("k", None, (), "7", extra))


def test_one_hypothesis_or_many() -> None:
    assert read({"hypothesis": "a", "label": "neutral"}) == [Hypothesis("k#0", "a", 1)]
    listed = {"entailment": [{"hypothesis": "a", "label": "entailment"}, {"hypothesis": "b", "identifier": "x"}]}
    assert read(listed) == [Hypothesis("k#0", "a", 2), Hypothesis("x", "b", None)]


def test_the_premise_stands_before() -> None:
    extra = {"hypothesis": "a dog", "premise": "an animal", "label": "neutral"}
    assert read(extra, premise=True)[0].text == "an animal [SEP] a dog"
    assert read(extra)[0].text == "a dog"
    with pytest.raises(BrokenSample, match="k: it has no premise"):
        read({"hypothesis": "a"}, premise=True)


def test_what_is_no_hypothesis() -> None:
    with pytest.raises(BrokenSample, match="k: it has no hypothesis"):
        read({})
    with pytest.raises(BrokenSample, match="k: 'label' must be one of contradiction, neutral, entailment, got 'maybe'"):
        read({"hypothesis": "a", "label": "maybe"})


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "it has no hypothesis"),
        ("a dog runs", "'entailment' must be a list, got 'a dog runs'"),
        ([{"hypothesis": "a"}, "b"], r"entailment\[1\]: not a JSON object but 'b'"),
        ([{"hypothesis": "a"}, {"label": "neutral"}], r"entailment\[1\]: the field 'hypothesis' is missing"),
        ([{"hypothesis": 3}], r"entailment\[0\]: 'hypothesis' must be a text, got '3'"),
        ([{"hypothesis": "a", "label": ["neutral"]}], r"entailment\[0\]: 'label' must be one of contradiction"),
        ([{"hypothesis": "a", "label": "-"}], r"entailment\[0\]: 'label' is '-': the annotators did not agree"),
        ([{"hypothesis": "a", "identifier": 1.5}], r"'identifier' must be a whole number or a text, got '1.5'"),
        ([{"hypothesis": "a", "premise": ["b"]}], r"entailment\[0\]: 'premise' must be a text, got"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(listed: Any, message: str) -> None:
    with pytest.raises(BrokenSample, match=f"^k: {message}" if message.startswith(("it", "ent")) else message):
        read({"entailment": listed}, premise=any("premise" in row for row in listed))


def test_a_wrong_record_is_skipped(task: Entailment) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "png")
    rows = [{"entailment": [{"label": "neutral"}]}, {"entailment": [{"hypothesis": "a dog runs", "label": "neutral"}]}]
    records = tuple(Record(str(n), file.getvalue(), (), str(n), row) for n, row in enumerate(rows))
    report = task.evaluate(Source((ListShard("rows", records),)))
    assert [one["id"] for one in report.predictions] == ["1#0"]


def test_the_report_is_by_label(task: Entailment) -> None:
    items = [*ITEMS, Hypothesis("4", "x", ENTAILMENT.index("entailment"))]
    report = task.report(items, ["entailment", "neutral", "neutral", "neutral"])
    assert report.scores == {"accuracy": 33.3333, "contradiction": 0.0, "entailment": 50.0}
    assert report.credits == [1.0, 0.0, 0.0]
    assert report.predictions[2] == {"id": "3", "label": "neutral"}


def test_settings_of_the_head(tokenizer: Tokenizer, build_model: Callable[[Tokenizer], MPlug]) -> None:
    task = Entailment(build_model(tokenizer), tokenizer, PIXELS, EntailmentConfig(head_scale=0.5, head_dropout=0.3))
    assert task.head.expand.out_features == 8
    assert task.head.dropout.p == 0.3
