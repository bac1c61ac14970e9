"""Captioning: the loss, what the decoder looks at, prompts, and the report."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch, Tokens
from triptych.data.samples import Record
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch
from triptych.metrics.captions import score_captions
from triptych.models.mplug import MPlug
from triptych.tasks.captioning import Captioning, CaptioningConfig, evaluate_captions

PIXELS = Preprocessing(16, HALF, HALF)
TEXTS = ("a red circle", "two large blue stars", "a picture of a green square")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(list(TEXTS) * 3, 80)


@pytest.fixture
def model(tokenizer: Tokenizer, build_model: Callable[[Tokenizer], MPlug]) -> MPlug:
    return build_model(tokenizer)


@pytest.fixture
def batch(tokenizer: Tokenizer) -> ImageTextBatch:
    pixels_BCHW = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens = Tokens(*tokenizer.encode_batch(list(TEXTS), max_length=None, end=True))
    return ImageTextBatch(pixels_BCHW, tokens, torch.arange(3))


def task_of(model: MPlug, tokenizer: Tokenizer, **changes: object) -> Captioning:
    config = CaptioningConfig(search=BeamSearch(2, 1, 6), **changes)  # type: ignore[arg-type]
    return Captioning(model, tokenizer, PIXELS, config).eval()


def test_the_loss_is_the_mean_over_real_tokens(model: MPlug, tokenizer: Tokenizer, batch: ImageTextBatch) -> None:
    image = model.encode_image(PIXELS.normalize(batch.pixels_BCHW))
    losses = []
    for row in range(3):  # each caption alone, without padding
        ids_1L = batch.text.ids_BL[row : row + 1, : int(batch.text.mask_BL[row].sum())]
        assert model.decoder is not None
        logits_LV = model.decoder.logits(model.decoder(ids_1L[:, :-1], image.rows(slice(row, row + 1))))[0]
        losses.append(F.cross_entropy(logits_LV, ids_1L[0, 1:], reduction="none"))
    loss = task_of(model, tokenizer)(batch, 0)["caption"]
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    smoothed = task_of(model, tokenizer, label_smoothing=0.2)(batch, 0)["caption"]
    assert smoothed.item() != pytest.approx(loss.item())


@pytest.mark.parametrize("context", ["image", "fused"])
def test_only_the_parts_that_run_are_trained(
    model: MPlug, tokenizer: Tokenizer, batch: ImageTextBatch, context: str
) -> None:
    task = task_of(model, tokenizer, context=context)
    model.train_only(*task.uses)
    task(batch, 0)["caption"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert model.text.blocks[0].ffn.expand.weight.requires_grad == (context == "fused")


def test_the_picture_matters(model: MPlug, tokenizer: Tokenizer, batch: ImageTextBatch) -> None:
    task = task_of(model, tokenizer)
    changed = ImageTextBatch(255 - batch.pixels_BCHW, batch.text, batch.image_id_B)
    assert not torch.equal(task(batch, 0)["caption"], task(changed, 0)["caption"])


@pytest.mark.parametrize("context", ["image", "fused"])
def test_the_prompt_is_not_a_part_of_the_caption(
    model: MPlug, tokenizer: Tokenizer, batch: ImageTextBatch, context: str
) -> None:
    task = task_of(model, tokenizer, context=context, prompt="a picture of")
    found, captions = task.hypotheses(batch.pixels_BCHW), task.caption(batch.pixels_BCHW)
    begin_1L, _ = tokenizer.encode_batch(["a picture of" if context == "image" else ""], max_length=None, end=False)
    for hypotheses, caption in zip(found, captions, strict=True):
        ids = list(hypotheses[0].ids)
        assert ids[: begin_1L.shape[1]] == begin_1L[0].tolist()
        assert caption == tokenizer.decode(ids[begin_1L.shape[1] :])


def test_one_picture_or_many(model: MPlug, tokenizer: Tokenizer, batch: ImageTextBatch) -> None:
    task = task_of(model, tokenizer)
    together = task.caption(batch.pixels_BCHW)
    assert together == [task.caption(batch.pixels_BCHW[row : row + 1])[0] for row in range(3)]


def test_a_report_has_every_reference_and_the_coco_format(
    model: MPlug, tokenizer: Tokenizer, batch: ImageTextBatch
) -> None:
    records = [
        Record("1", None, ("a red circle",), "7"),
        Record("2", None, ("two large blue stars", "stars"), "street"),
        Record("3", None, ("a circle",), "7"),  # a list may have one record a caption
    ]
    task = task_of(model, tokenizer)
    report = evaluate_captions(task, [(records[:2], batch.pixels_BCHW[:2]), (records[2:], batch.pixels_BCHW[:1])])
    assert report.references["7"] == ("a red circle", "a circle")
    captions = task.caption(batch.pixels_BCHW[:2])
    assert report.results() == [
        {"image_id": 7, "caption": captions[0]},
        {"image_id": "street", "caption": captions[1]},
    ]
    blank = evaluate_captions(task, [(records[:2], batch.pixels_BCHW[:2])], blank=True)
    grey = task.caption(torch.full_like(batch.pixels_BCHW[:1], 128))[0]
    assert set(blank.predictions.values()) == {grey}


def nocaps(captions: bool = True) -> list[Record]:
    """Six pictures, two of each domain."""
    domains = ("in-domain", "near-domain", "out-domain")
    return [
        Record(str(n), None, (f"{text} {n}", text) if captions else (), str(n), {"domain": domain})
        for n, (text, domain) in enumerate(zip((*TEXTS, *TEXTS), domains * 2, strict=True))
    ]


def test_scores_by_domain(model: MPlug, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [*nocaps(), Record("6", None, ("a star",), "6")]  # one of no domain
    pixels = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
    captions = iter(["a red circle 0", "two blue stars", "a square", "red", "two stars", "a green 5", "star"])
    task = task_of(model, tokenizer)
    monkeypatch.setattr(task, "caption", lambda pixels: [next(captions) for _ in pixels])
    report = evaluate_captions(task, [(records[:4], pixels[:4]), (records[4:], pixels[4:])])
    expected = score_captions(report.references, report.predictions)
    for domain, ids in {"in-domain": "03", "near-domain": "14", "out-domain": "25"}.items():
        alone = score_captions({i: report.references[i] for i in ids}, {i: report.predictions[i] for i in ids})
        expected[f"CIDEr/{domain}"] = alone["CIDEr"]
    assert report.scores == expected
    assert len({score for name, score in expected.items() if name.startswith("CIDEr")}) == 4


def test_pictures_without_references_are_only_captioned(model: MPlug, tokenizer: Tokenizer) -> None:
    pixels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    report = evaluate_captions(task_of(model, tokenizer), [(nocaps(captions=False), pixels)])
    assert report.scores == {}
    assert [result["image_id"] for result in report.results()] == [0, 1, 2, 3, 4, 5]


def test_some_without_references_are_left_out_of_the_scores(
    model: MPlug, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last domain has none left, and so no score."""
    records = [nocaps(captions=number not in (0, 2, 5))[number] for number in range(6)]
    pixels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    captions = iter(["a red circle 0", "two blue stars", "a square", "red", "two stars", "a green 5"])
    task = task_of(model, tokenizer)
    monkeypatch.setattr(task, "caption", lambda pixels: [next(captions) for _ in pixels])
    report = evaluate_captions(task, [(records[:4], pixels[:4]), (records[4:], pixels[4:])])
    assert [result["image_id"] for result in report.results()] == [0, 1, 2, 3, 4, 5]
    scored = {i: report.references[i] for i in "134"}
    expected = score_captions(scored, {i: report.predictions[i] for i in scored})
    assert {name: report.scores[name] for name in expected} == expected
    assert set(report.scores) - set(expected) == {"CIDEr/in-domain", "CIDEr/near-domain"}
    assert [record.getMessage() for record in caplog.records] == ["3 of 6 pictures have no captions: not in the scores"]
