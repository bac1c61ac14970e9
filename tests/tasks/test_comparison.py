"""What pictures are worth: a task with its pictures, with grey ones, and beside the commonest answer."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from triptych.data.samples import Record
from triptych.data.sources import Source, open_source
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.metrics.significance import mcnemar, paired_bootstrap
from triptych.models.mplug import MPlug
from triptych.tasks.base import ItemBatch, ItemTask, Report, mean_credits, most_common
from triptych.tasks.captioning import Captioning, CaptioningConfig
from triptych.tasks.comparison import Comparison, compare, paired_test
from triptych.tasks.entailment import Entailment
from triptych.tasks.grounding import Grounding, GroundingConfig
from triptych.tasks.image_classification import ImageClassification, ImageClassificationConfig
from triptych.tasks.nlvr2 import Nlvr2, Nlvr2Config
from triptych.tasks.text_classification import TextClassification, TextClassificationConfig
from triptych.tasks.vqa import VisualQuestionAnswering

PIXELS = Preprocessing(16, HALF, HALF)
BRIGHTNESS = (20, 200, 250, 60)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(["how bright is it", "dark bright grey", "a small thing"] * 3, 70)


def encoded(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (grey,) * 3).save(file, "png")
    return file.getvalue()


def shard(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> Source:
    """Pictures of one grey each, with what is said of them."""
    with tarfile.open(path, "w") as archive:
        for number, (grey, values) in enumerate(rows):
            for ending, content in (("png", encoded(grey)), ("json", json.dumps(values).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return open_source(path)


# --- a task that reads brightness: what compare does can be computed by hand -----------------------------------------


class Brightness(ItemTask[dict[str, Any], ItemBatch]):
    """Says whether a picture is bright, from its first pixel; ``soft`` items have a credit between 0 and 1."""

    name = "brightness"
    metric = "right"
    config_type = dict

    def __init__(self, model: MPlug, tokenizer: Tokenizer, with_credits: bool = True) -> None:
        super().__init__(model, tokenizer, PIXELS)
        self.with_credits = with_credits
        self.seen: list[list[int]] = []

    @property
    def uses(self) -> tuple[Any, ...]:
        return ()

    def forward(self, batch: ItemBatch, step: int = 0, part: int = 0) -> dict[str, Tensor]:
        return {}  # there is nothing to learn

    def items(self) -> Callable[[Record], Sequence[dict[str, Any]]]:
        return asked_of

    def batch(self, pixels: Tensor, picture_Q: Tensor, items: Sequence[Any], *, max_tokens: int) -> ItemBatch:
        return ItemBatch(pixels, picture_Q)

    def predict(self, batch: ItemBatch) -> list[str]:
        self.seen.append(batch.pixels[:, 0, 0, 0].tolist())
        return ["bright" if batch.pixels[row, 0, 0, 0] > 128 else "dark" for row in batch.picture_Q.tolist()]

    def report(self, items: Sequence[Any], predictions: Sequence[Any]) -> Report:
        credits = [
            item.get("weight", 1.0) * float(item["answer"] == own) for item, own in zip(items, predictions, strict=True)
        ]
        scores = mean_credits([(None, credit) for credit in credits], "right")
        return Report(scores, [{"said": own} for own in predictions], credits if self.with_credits else [])

    def commonest(self, seen: Sequence[Any]) -> Callable[[Any], str]:
        answer = most_common(item["answer"] for item in seen)
        return lambda item: str(answer)


def asked_of(record: Record) -> list[dict[str, Any]]:
    return list(record.extra["asked"])


def rows_of(weight: float = 1.0) -> list[tuple[int, dict[str, Any]]]:
    """Two items a picture; what is asked in the second the network never says."""
    return [
        (grey, {"asked": [{"answer": "bright" if grey > 128 else "dark", "weight": weight}, {"answer": "red"}]})
        for grey in BRIGHTNESS
    ]


@pytest.fixture
def brightness(build_model: Callable[[Tokenizer], MPlug], tokenizer: Tokenizer) -> Callable[..., Brightness]:
    return lambda **settings: Brightness(build_model(tokenizer), tokenizer, **settings)


def test_with_pictures_without_and_by_habit(brightness: Callable[..., Brightness], tmp_path: Path) -> None:
    task = brightness()
    training = [(9, {"asked": [{"answer": answer}]}) for answer in ("bright", "dark", "bright")]
    found = compare(task, shard(tmp_path / "test.tar", rows_of()), shard(tmp_path / "train.tar", training))
    assert task.seen == [list(BRIGHTNESS), [128] * 4]  # blind all pictures are grey
    assert found.metric == "right"
    assert found.model.credits == [1, 0, 1, 0, 1, 0, 1, 0]
    assert found.blind.predictions == [{"said": "dark"}] * 8
    assert found.blind.credits == [1, 0, 0, 0, 0, 0, 1, 0]
    assert found.majority is not None
    assert found.majority.predictions == [{"said": "bright"}] * 8
    assert found.majority.credits == [0, 0, 1, 0, 1, 0, 0, 0]
    assert found.test == {"test": "McNemar", **mcnemar(found.model.credits, found.blind.credits)._asdict()}
    assert (found.test["only_a"], found.test["only_b"], found.test["p_value"]) == (2, 0, 0.5)


def test_as_json(brightness: Callable[..., Brightness], tmp_path: Path) -> None:
    source = shard(tmp_path / "test.tar", rows_of())
    found = compare(brightness(), source, source).to_dict()
    assert json.loads(json.dumps(found)) == {
        "metric": "right",
        "model": {"right": 50.0},
        "blind": {"right": 25.0},
        "majority": {"right": 50.0},  # "red", twice as often as "bright" and "dark"
        "model against blind": {"test": "McNemar", "only_a": 2, "only_b": 0, "p_value": 0.5},
    }


def test_without_training_data_there_is_no_commonest_answer(
    brightness: Callable[..., Brightness], tmp_path: Path
) -> None:
    found = compare(brightness(), shard(tmp_path / "test.tar", rows_of()))
    assert found.majority is None
    assert "majority" not in found.to_dict()


def test_a_limit_is_of_the_data_to_evaluate_on(brightness: Callable[..., Brightness], tmp_path: Path) -> None:
    answers = ("dark", "dark", "bright", "bright", "bright")
    training = shard(tmp_path / "train.tar", [(9, {"asked": [{"answer": answer}]}) for answer in answers])
    source = shard(tmp_path / "test.tar", rows_of())
    task = brightness()
    found = compare(task, source, training, limit=3)
    assert task.seen == [list(BRIGHTNESS[:3]), [128] * 3]
    assert found.majority is not None
    assert found.majority.predictions == [{"said": "bright"}] * 6  # of all training data
    assert len(found.model.credits) == len(found.blind.credits) == len(found.majority.credits) == 6


def test_partial_credits_are_compared_by_the_bootstrap(brightness: Callable[..., Brightness], tmp_path: Path) -> None:
    found = compare(brightness(), shard(tmp_path / "test.tar", rows_of(weight=0.3)))
    expected = paired_bootstrap(found.model.credits, found.blind.credits)
    assert found.test == {"test": "paired bootstrap", **expected._asdict()}
    assert found.test["difference"] == pytest.approx(0.3 * 2 / 8)


def test_without_credits_nothing_is_tested(brightness: Callable[..., Brightness], tmp_path: Path) -> None:
    found = compare(brightness(with_credits=False), shard(tmp_path / "test.tar", rows_of()))
    assert found.test == {}
    assert found.to_dict()["model against blind"] == {}


def test_which_test_credits_ask_for() -> None:
    assert paired_test([], []) == {}
    assert paired_test([1.0, 0.0], [0.0, 0.0])["test"] == "McNemar"
    assert paired_test([1.0, 0.0], [0.6, 0.0])["test"] == "paired bootstrap"  # of either
    assert paired_test([0.6, 0.0], [1.0, 0.0])["test"] == "paired bootstrap"
    with pytest.raises(ValueError, match="lists of one length"):
        paired_test([1.0, 0.0], [1.0])


# --- the commonest answers of each task ----------------------------------------------------------------------------

TRAINING: dict[str, list[dict[str, Any]]] = {
    "vqa": [
        {"questions": [{"question": "?", "answer": "Two"}, {"question": "?", "answers": ["red", "blue", "blue"]}]},
        {"questions": [{"question": "?", "answer": "2"}, {"question": "?", "question_id": 7}]},
    ],
    "entailment": [
        {"entailment": [{"hypothesis": "h", "label": label} for label in ("neutral", "entailment", "neutral")]},
        {"entailment": [{"hypothesis": "h", "label": "contradiction"}, {"hypothesis": "h"}]},
    ],
    "nlvr2": [{"statement": "s", "label": label} for label in (True, False, False)],
    "image_classification": [{"label": "b"}, {"label": "a"}, {"label": "b"}, {}],
}


def tasks(model: MPlug, tokenizer: Tokenizer) -> dict[str, ItemTask[Any, Any]]:
    labels = ImageClassificationConfig(("a", "b"))
    return {
        "vqa": VisualQuestionAnswering(model, tokenizer, PIXELS),
        "entailment": Entailment(model, tokenizer, PIXELS),
        "nlvr2": Nlvr2(model, tokenizer, PIXELS, Nlvr2Config(pictures=1)),
        "image_classification": ImageClassification(model, tokenizer, PIXELS, labels),
    }


@pytest.mark.parametrize(
    ("name", "expected"), [("vqa", "2"), ("entailment", "neutral"), ("nlvr2", False), ("image_classification", "b")]
)
def test_the_commonest_answer(
    name: str, expected: Any, build_model: Callable[[Tokenizer], MPlug], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = tasks(build_model(tokenizer), tokenizer)[name]
    source = shard(tmp_path / "train.tar", [(90, values) for values in TRAINING[name]])
    found = compare(task, source, source)
    assert found.majority is not None
    field = {"vqa": "answer", "nlvr2": "prediction"}.get(name, "label")
    assert {line[field] for line in found.majority.predictions} == {expected}
    assert len(found.majority.predictions) == len(found.model.predictions) == len(found.blind.predictions)
    assert set(found.majority.scores) == set(found.model.scores)
    assert task.metric in found.model.scores


@pytest.mark.parametrize("name", ["vqa", "entailment", "nlvr2", "image_classification"])
def test_training_data_without_answers(
    name: str, build_model: Callable[[Tokenizer], MPlug], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = tasks(build_model(tokenizer), tokenizer)[name]
    source = shard(tmp_path / "test.tar", [(90, values) for values in TRAINING[name]])
    empty = {"vqa": {"question": "?"}, "entailment": {"hypothesis": "h"}, "nlvr2": {"statement": "s"}}.get(name, {})
    training = shard(tmp_path / "train.tar", [(90, empty)])
    with pytest.raises(ValueError, match="the training data have no answers"):
        compare(task, source, training)


def test_the_mean_box(build_model: Callable[[Tokenizer], MPlug], tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = Grounding(build_model(tokenizer), tokenizer, PIXELS, GroundingConfig(bins=16))
    boxes = ([0, 0, 8, 8], [4, 2, 16, 12])
    phrases = [{"phrases": [{"text": "it", "box_xyxy": box}]} for box in boxes]
    training = shard(tmp_path / "train.tar", [(90, values) for values in phrases])
    found = compare(task, training, training)
    assert found.majority is not None
    for line in found.majority.predictions:  # centres (4, 4) and (10, 7), sizes (8, 8) and (12, 10)
        assert line["box_xyxy"] == [2.0, 1.0, 12.0, 10.0]
    unknown = shard(tmp_path / "unknown.tar", [(90, {"phrases": [{"text": "it"}]})])
    with pytest.raises(ValueError, match="have no boxes"):
        compare(task, training, unknown)


def test_captions_have_neither_a_commonest_answer_nor_a_test(
    build_model: Callable[[Tokenizer], MPlug], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = Captioning(build_model(tokenizer), tokenizer, PIXELS, CaptioningConfig())
    source = shard(tmp_path / "test.tar", [(grey, {"caption": "a small thing"}) for grey in BRIGHTNESS])
    found = compare(task, source, source)
    assert isinstance(found, Comparison)
    assert found.majority is None
    assert found.test == {}
    assert len({line["caption"] for line in found.blind.predictions}) == 1
    assert "CIDEr" in found.model.scores


def test_texts_have_no_pictures_to_compare(
    build_model: Callable[[Tokenizer], MPlug], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = TextClassificationConfig(("a", "b"))
    task = TextClassification(build_model(tokenizer), tokenizer, PIXELS, config)
    (tmp_path / "texts.jsonl").write_text('{"text": "dark", "label": "a"}\n')
    with pytest.raises(ValueError, match="looks at no pictures"):
        compare(task, open_source(tmp_path / "texts.jsonl"))


def test_blind_predictions_do_not_depend_on_the_pictures(
    build_model: Callable[[Tokenizer], MPlug], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Of a real task, whose network normalises the pixels itself."""
    torch.manual_seed(2)
    task = Grounding(build_model(tokenizer), tokenizer, PIXELS, GroundingConfig(locating="regression"))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    source = shard(tmp_path / "t.tar", [(grey, {"phrases": [{"text": "it"}]}) for grey in BRIGHTNESS])
    found = compare(task, source)
    assert len({str(line["box_xyxy"]) for line in found.blind.predictions}) == 1
    assert len({str(line["box_xyxy"]) for line in found.model.predictions}) == 4
