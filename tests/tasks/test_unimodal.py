"""Tasks on one encoder: labels, pooling, the head, and the probe of a frozen encoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from triptych.data.samples import BrokenSample, Record
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.mplug import MPlug
from triptych.models.protocol import Encoded
from triptych.tasks.image_classification import ImageClassification, ImageClassificationConfig
from triptych.tasks.unimodal import UnimodalConfig, class_of, collect_labels, pool

PIXELS = Preprocessing(16, HALF, HALF)


def record(label: Any = None, key: str = "k") -> Record:
    return Record(key, b"", (), "7", {} if label is None else {"label": label})


def test_labels_are_collected_in_a_fixed_order() -> None:
    assert collect_labels(map(record, ["dog", "cat", None, "dog", 3])) == ("3", "cat", "dog")
    assert collect_labels(map(record, [10, "9", 2])) == ("2", "9", "10")
    assert UnimodalConfig().completed([record("b"), record("a")]).labels == ("a", "b")
    assert UnimodalConfig(("x", "y")).completed([]).labels == ("x", "y")


def test_labels_that_are_no_classes() -> None:
    with pytest.raises(ValueError, match="have no labels: no record has a field 'label'"):
        collect_labels([record(), record()])
    with pytest.raises(ValueError, match="have only the label 'cat'; classes must be two at least"):
        collect_labels([record("cat"), record("cat")])
    for wrong in (True, 0.5, "", ["a"]):
        with pytest.raises(ValueError, match="have no labels: k: its label must be a text or a whole number, not"):
            collect_labels([record(wrong)])
    assert collect_labels([record("a"), record(0.5), record("b")]) == ("a", "b")


def test_the_class_of_a_record() -> None:
    assert class_of(record("b"), ("a", "b")) == 1
    assert class_of(record(1), ("0", "1")) == 1
    assert class_of(record(), ("a", "b")) is None
    with pytest.raises(BrokenSample, match=r"f\.jsonl:3: its label must be one of a, b, not 'c'"):
        class_of(record("c", "f.jsonl:3"), ("a", "b"))
    with pytest.raises(BrokenSample, match=r"one of 0, .*, 9 and 90 more, not 'c'"):
        class_of(record("c"), tuple(map(str, range(100))))


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="pooling must be one of first, mean"):
        UnimodalConfig(pooling="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="head must be one of linear, hidden"):
        UnimodalConfig(head="mlp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a linear probe has a linear head"):
        UnimodalConfig(linear_probe=True, head="hidden")
    with pytest.raises(ValueError, match="a label occurs twice among a, b, a"):
        UnimodalConfig(("a", "b", "a"))


def test_pooling_by_hand() -> None:
    hidden_BLD = torch.tensor([[[1.0], [2.0], [6.0]], [[4.0], [float("nan")], [0.0]]])
    mask_BL = torch.tensor([[True, True, True], [True, False, False]])
    text = Encoded(hidden_BLD, mask_BL)
    assert pool(text, "first").tolist() == [[1.0], [4.0]]
    assert pool(text, "mean").tolist() == [[3.0], [4.0]]  # whatever stands in the padding
    clip = Encoded(torch.tensor([[[1.0], [2.0], [5.0], [8.0]]]), frames=2)
    assert pool(clip, "first").tolist() == [[3.0]]
    assert pool(clip, "mean").tolist() == [[4.0]]


@pytest.fixture
def build(build_model: Callable[[Tokenizer], MPlug]) -> Callable[..., ImageClassification]:
    tokenizer = train_wordpiece(["a few words"] * 3, 60)

    def build(**settings: Any) -> ImageClassification:
        torch.manual_seed(3)
        config = ImageClassificationConfig(("x", "y", "z"), **settings)
        return ImageClassification(build_model(tokenizer), tokenizer, PIXELS, config)

    return build


def test_the_heads(build: Callable[..., ImageClassification]) -> None:
    assert set(build().own_state()) == {"head.weight", "head.bias"}
    hidden = build(head="hidden", head_scale=0.5, head_dropout=0.3)
    assert hidden.head.expand.out_features == 8
    assert hidden.head.dropout.p == 0.3
    with pytest.raises(ValueError, match="image_classification needs two labels at least"):
        ImageClassification(hidden.model, hidden.tokenizer, PIXELS)


def test_a_probed_encoder_stays_as_it_is(build: Callable[..., ImageClassification]) -> None:
    task = build(linear_probe=True)
    task.model.train_only(*task.uses)
    task.train()
    assert task.training
    assert task.head.training
    assert not any(part.training for part in task.model.modules())
    torch.manual_seed(2)
    pixels_BCHW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    batch = task.batch(pixels_BCHW, torch.arange(2), task.items()(record("x")) * 2, max_tokens=9)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: (saved.append(kept.shape), kept)[1], lambda kept: kept):
        saved: list[torch.Size] = []
        loss = task(batch)[task.name]
    assert all(len(shape) <= 2 for shape in saved)  # nothing of the encoder's [B, N, D] is kept
    loss.backward()
    assert {name for name, own in task.named_parameters() if own.grad is not None} == {"head.weight", "head.bias"}
    assert {name for name, own in task.named_parameters() if own.requires_grad} == {"head.weight", "head.bias"}
    assert torch.equal(task(batch)[task.name], loss)  # no dropout


def test_a_trained_encoder_trains(build: Callable[..., ImageClassification]) -> None:
    task = build().train()
    assert all(part.training for part in task.model.modules())
    assert task.uses == ("image",)
    assert not task.eval().model.training
