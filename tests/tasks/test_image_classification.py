"""Image classification: the loss, predictions, the report, and that it learns."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import open_source
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.mplug import MPlug
from triptych.tasks.image_classification import (
    ImageClassification,
    ImageClassificationConfig,
    ImageLabelBatch,
    LabelledImage,
    ReadLabel,
)

PIXELS = Preprocessing(16, HALF, HALF)
LABELS = ("cat", "dog", "fish")
ITEMS = (LabelledImage("1", 2), LabelledImage("2", None), LabelledImage("3", 0))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(["a few words"] * 3, 60)


@pytest.fixture
def model(tokenizer: Tokenizer, build_model: Callable[[Tokenizer], MPlug]) -> MPlug:
    model = build_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def task(model: MPlug, tokenizer: Tokenizer) -> ImageClassification:
    return ImageClassification(model, tokenizer, PIXELS, ImageClassificationConfig(LABELS)).eval()


def batch_of(task: ImageClassification) -> ImageLabelBatch:
    torch.manual_seed(2)
    pixels_BCHW = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    return task.batch(pixels_BCHW, torch.arange(3), ITEMS, max_tokens=9)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_loss_is_that_of_the_labelled_ones(model: MPlug, tokenizer: Tokenizer, pooling: str) -> None:
    config = ImageClassificationConfig(LABELS, pooling=pooling)  # type: ignore[arg-type]
    task = ImageClassification(model, tokenizer, PIXELS, config).eval()
    batch = batch_of(task)
    alone = [model.encode_image(PIXELS.normalize(own_CHW[None])).hidden_BLD[0] for own_CHW in batch.pixels]
    pooled_BD = torch.stack([own_ND[0] if pooling == "first" else own_ND.mean(0) for own_ND in alone])
    logits_BK = pooled_BD @ task.head.weight.T + task.head.bias
    expected = F.cross_entropy(logits_BK[[0, 2]], torch.tensor([2, 0]))
    assert task(batch)["image_classification"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert task.predict(batch) == [LABELS[index] for index in logits_BK.argmax(1).tolist()]


def test_a_batch_without_labels_has_no_loss(task: ImageClassification) -> None:
    batch = batch_of(task)
    unlabelled = task.batch(batch.pixels, batch.picture_Q, [ITEMS[1]] * 3, max_tokens=9)
    assert task(unlabelled)["image_classification"].item() == 0


def test_only_what_runs_is_trained(task: ImageClassification) -> None:
    task.model.train_only(*task.uses)
    task(batch_of(task))["image_classification"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_clips_are_classified(task: ImageClassification) -> None:
    pixels = batch_of(task).pixels
    still = task.batch(pixels[:, None].expand(-1, 2, -1, -1, -1), torch.arange(3), ITEMS, max_tokens=9)
    torch.testing.assert_close(task.logits(still), task.logits(batch_of(task)))


def test_what_is_read() -> None:
    read = ReadLabel(LABELS)
    assert read(Record("k", b"", (), "7", {"label": "dog"})) == [LabelledImage("7", 1)]
    assert read(Record("k", b"", (), "7")) == [LabelledImage("7", None)]
    with pytest.raises(BrokenSample, match="k: its label must be one of cat, dog, fish, not 'cow'"):
        read(Record("k", b"", (), "7", {"label": "cow"}))


def test_the_report(task: ImageClassification, model: MPlug, tokenizer: Tokenizer) -> None:
    items = [*ITEMS, LabelledImage("4", 2), LabelledImage("5", 1)]
    predictions = ["fish", "dog", "cat", "dog", "dog"]
    report = task.report(items, predictions)
    assert report.scores == {"accuracy": 75.0}
    assert report.credits == [1.0, 1.0, 0.0, 1.0]
    assert report.predictions[1] == {"image_id": "2", "label": "dog"}
    detailed = ImageClassification(model, tokenizer, PIXELS, ImageClassificationConfig(LABELS, per_class=True))
    assert detailed.report(items, predictions).scores == {
        "accuracy": 75.0,
        "accuracy/cat": 100.0,
        "accuracy/dog": 100.0,
        "accuracy/fish": 50.0,
    }
    assert task.report(ITEMS[1:2], ["dog"]).scores == {}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Red and blue pictures, and one with a label that is neither."""
    path = tmp_path / "labels.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(16):
            picture = io.BytesIO()
            label = ("red", "blue")[number % 2] if number != 7 else "odd"
            shade = 130 + 8 * number
            Image.new("RGB", (16, 16), (shade, 20, 20) if label == "red" else (20, 20, shade)).save(picture, "PNG")
            for name, content in (
                (f"{number}.png", picture.getvalue()),
                (f"{number}.json", f'{{"image_id": "p{number}", "label": "{label}"}}'.encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("linear_probe", [True, False])
def test_it_learns_colours(tokenizer: Tokenizer, model: MPlug, shard: Path, linear_probe: bool) -> None:
    torch.manual_seed(0)
    source = open_source(shard)
    config = ImageClassificationConfig(("blue", "red"), linear_probe=linear_probe)
    task = ImageClassification(model, tokenizer, PIXELS, config)
    model.train_only(*task.uses)
    before = [own.clone() for own in model.parameters()]
    pipeline = task.training_pipeline(PIXELS.test_transform(), 30, 20)
    usable = [record for record in source if record.extra["label"] != "odd"]
    batch = pipeline.collate([pipeline.prepare(record, 0) for record in usable])
    optimizer = torch.optim.Adam([own for own in task.parameters() if own.requires_grad], lr=0.02)
    task.train()
    for _ in range(30):
        optimizer.zero_grad()
        task(batch)["image_classification"].backward()
        optimizer.step()
    report = task.eval().evaluate(source)
    assert report.scores == {"accuracy": 100.0}
    assert len(report.predictions) == 15  # the odd one is skipped
    moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert moved != linear_probe
    assert len(task.evaluate(source, limit=4).predictions) == 4
    assert len({row["label"] for row in task.evaluate(source, blank=True).predictions}) == 1
    assert task.answer(usable[:2]) == ["red", "blue"]
    assert ImageClassification.complete(ImageClassificationConfig(), source).labels == ("blue", "odd", "red")
