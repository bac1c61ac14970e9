"""Visual grounding: what is read, coordinates as words, the losses, where boxes end up, the report."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from triptych.data.boxes import EvaluationTransform
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import open_source
from triptych.data.tokenizers import Tokenizer, train_wordpiece, wordpiece_from_vocab
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.heads import BoxHead
from triptych.models.mplug import MPlug
from triptych.tasks.grounding import Grounding, GroundingBatch, GroundingConfig, Phrase, Place, read_phrases

PIXELS = Preprocessing(16, HALF, HALF)
BINS = 6
SQUARE = Place((0, 0, 16, 16), 16, 16)
WIDE = Place((0, 4, 16, 12), 32, 16)  # twice as wide as high, scaled by a half
PHRASES = (
    Phrase("p", "the red dog", (4.0, 4.0, 12.0, 8.0), target=(0.5, 0.375, 0.5, 0.25), place=SQUARE),
    Phrase("p", "a cat on the left of it", (0.0, 0.0, 8.0, 16.0), target=(0.25, 0.5, 0.5, 1.0), place=SQUARE),
    Phrase("w", "dog", (16.0, 0.0, 32.0, 16.0), target=(0.75, 0.5, 0.5, 0.5), place=WIDE),
)
UNUSED = ["[unused339]", *(f"[unused{340 + number}]" for number in range(BINS + 1))]
Builder = Callable[[Tokenizer], MPlug]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([item.text for item in PHRASES] * 3, 80)


@pytest.fixture(scope="module")
def bert_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With the words that mPLUG writes coordinates in."""
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    words = sorted({word for item in PHRASES for word in item.text.split()})
    path.write_text("\n".join(["[PAD]", *UNUSED[:4], "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *UNUSED[4:]]) + "\n")
    return wordpiece_from_vocab(path)


def shaken(model: MPlug) -> MPlug:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def model(tokenizer: Tokenizer, build_model: Builder) -> MPlug:
    return shaken(build_model(tokenizer))


def task_of(model: MPlug, tokenizer: Tokenizer, preprocessing: Preprocessing = PIXELS, **changes: Any) -> Grounding:
    torch.manual_seed(1)
    task = Grounding(model, tokenizer, preprocessing, GroundingConfig(**{"bins": BINS, **changes})).eval()
    if changes.get("locating") == "regression":
        with torch.no_grad():  # boxes that differ
            for parameter in task.head.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return task


def batch_of(task: Grounding) -> GroundingBatch:
    """Two pictures; the first has two phrases."""
    torch.manual_seed(2)
    pixels_BCHW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    return task.batch(pixels_BCHW, torch.tensor([0, 0, 1]), PHRASES, max_tokens=20)


def fused_one(task: Grounding, batch: GroundingBatch, row: int, pixels: Preprocessing = PIXELS) -> Any:
    """A phrase's fused state computed alone, without padding."""
    picture, length = int(batch.picture_Q[row]), int(batch.phrase.mask_BL[row].sum())
    image = task.model.encode_image(pixels.normalize(batch.pixels[picture : picture + 1]))
    return task.model.fuse(image, task.model.encode_text(batch.phrase.ids_BL[row : row + 1, :length]))


def true_bins(box: Any) -> list[int]:
    return [int(min(max(number, 0.0), 1.0) * BINS) for number in box]


def corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def giou(first: list[float], second: list[float]) -> float:
    """From the definition, of two cxcywh boxes."""
    (a, b, c, d), (e, f, g, h) = corners(first), corners(second)
    overlap = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = (c - a) * (d - b) + (g - e) * (h - f) - overlap
    hull = (max(c, g) - min(a, e)) * (max(d, h) - min(b, f))
    return overlap / union - (hull - union) / hull


def losses_and_weights(task: Grounding, batch: GroundingBatch) -> tuple[list[list[float]], list[list[float]]]:
    """Cross-entropy and own weight of each token, phrase by phrase and token by token."""
    decoder = task.model.decoder
    assert decoder is not None
    words_VD = task.coordinates.word.weight
    losses, weights = [], []
    for row in range(len(batch)):
        box = batch.box_Q4[row].tolist()
        bins, memory = true_bins(box), fused_one(task, batch, row).states()
        loss, guess = [], []
        for step in range(4):
            written_1L = torch.tensor([[BINS + 1, *bins[:step]]])
            hidden_1D = decoder(written_1L, memory, word_VD=words_VD)[:, -1]
            logits_K = decoder.head(hidden_1D, words_VD[: BINS + 1], task.coordinates.bias)[0]
            loss.append(-logits_K.log_softmax(0)[bins[step]].item())
            guess.append(int(logits_K.argmax()) / BINS)
        apart = 1 - giou(guess, box)
        losses.append(loss)
        weights.append([min(abs(a - b), 5.0) * apart for a, b in zip(guess, box, strict=True)])
    return losses, weights


# ------------------------------------------------------------------------------------------------- coordinate words


def test_a_decoder_reads_rows_of_another_table(model: MPlug) -> None:
    decoder = model.decoder
    ids_BL, memory = torch.tensor([[3, 1, 4], [1, 5, 9]]), model.encode_text(torch.tensor([[1, 2], [3, 4]]))
    expected_BLD = decoder(ids_BL, memory)
    turned_VD = decoder.embeddings.word.weight.flip(0)
    turned_BL = len(turned_VD) - 1 - ids_BL
    assert torch.equal(decoder(turned_BL, memory, word_VD=turned_VD), expected_BLD)
    assert not torch.allclose(decoder(ids_BL, memory, word_VD=turned_VD), expected_BLD)
    bias_V = torch.randn(len(turned_VD))
    logits_BLV = decoder.head(expected_BLD, turned_VD, bias_V)
    assert torch.allclose(logits_BLV - bias_V, (decoder.logits(expected_BLD) - decoder.head.bias).flip(-1), atol=1e-5)


def test_with_berts_vocabulary_it_is_the_official_network(bert_like: Tokenizer, build_model: Builder) -> None:
    """Words of the vocabulary, and -10000 for all that are no coordinate, as the released code has it."""
    task = task_of(shaken(build_model(bert_like)), bert_like)
    decoder = task.model.decoder
    assert decoder is not None
    batch = batch_of(task)
    start, *coordinates = (bert_like.backend.token_to_id(token) for token in UNUSED)
    barred_V = torch.full((bert_like.vocab_size,), -10000.0)
    barred_V[coordinates] = 0
    states = task.fuse(batch, batch.phrase).states()

    def official(written_QL: torch.Tensor) -> torch.Tensor:
        ids_QL = torch.cat([torch.full((len(batch), 1), start), torch.tensor(coordinates)[written_QL]], 1)
        return (decoder.logits(decoder(ids_QL, states)) + barred_V).softmax(-1)

    written_QL = torch.tensor([[0, 6, 3], [2, 2, 1], [5, 0, 4]])
    expected_QLV = official(written_QL)
    found_QLK = task.coordinates.logits(decoder, states, written_QL).softmax(-1)
    torch.testing.assert_close(found_QLK, expected_QLV[:, :, coordinates])
    assert expected_QLV.sum().item() == pytest.approx(found_QLK.sum().item())
    greedy_QL = torch.empty(3, 0, dtype=torch.long)
    for _ in range(4):
        best_Q = official(greedy_QL)[:, -1].argmax(-1)
        greedy_QL = torch.cat([greedy_QL, torch.tensor([[coordinates.index(int(best))] for best in best_Q])], 1)
    torch.testing.assert_close(task._write(states), greedy_QL / BINS)
    assert len({tuple(row) for row in greedy_QL.tolist()}) > 1


def test_the_table_is_a_copy(bert_like: Tokenizer, build_model: Builder) -> None:
    model = shaken(build_model(bert_like))
    before_VD = model.decoder.embeddings.word.weight.clone()
    task = task_of(model, bert_like)
    task(batch_of(task))["grounding"].backward()
    with torch.no_grad():
        task.coordinates.word.weight.add_(1)
    assert torch.equal(model.decoder.embeddings.word.weight, before_VD)
    assert task.coordinates.word.weight.grad is not None
    assert (task.coordinates.word.weight.grad.abs().sum(1) > 0).all()  # coordinates are scored, the start is read


def test_other_vocabularies_begin_with_a_new_table(
    model: MPlug, tokenizer: Tokenizer, bert_like: Tokenizer, build_model: Builder
) -> None:
    for task in (
        task_of(model, tokenizer, bins=200),
        task_of(shaken(build_model(bert_like)), bert_like, bins=BINS + 1),  # one word is missing
    ):
        table_VD = task.coordinates.word.weight
        assert table_VD.shape == (task.config.bins + 2, 16)
        assert table_VD.std().item() == pytest.approx(0.02 * (768 / 16) ** 0.5, rel=0.3)
        assert not task.coordinates.bias.any()


# ----------------------------------------------------------------------------------------------------------- losses


def test_the_loss_weighs_each_token_by_its_own_error(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer)
    batch = batch_of(task)
    losses, weights = losses_and_weights(task, batch)
    expected = sum(a * b for row, own in zip(losses, weights, strict=True) for a, b in zip(row, own, strict=True)) / 12
    assert task(batch)["grounding"].item() == pytest.approx(expected, rel=1e-4)
    assert len({round(weight, 3) for own in weights for weight in own}) > 6


def test_the_official_loss_meets_all_weights_of_the_batch(model: MPlug, tokenizer: Tokenizer) -> None:
    """mean_k [ mean_i CE_ik * mean_j w_jk g_j ], as the released code computes it."""
    task = task_of(model, tokenizer, weighting="official")
    batch = batch_of(task)
    losses, weights = losses_and_weights(task, batch)
    pairs = [losses[i][k] * weights[j][k] for i in range(3) for j in range(3) for k in range(4)]
    found = task(batch)["grounding"].item()
    assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    own = task_of(model, tokenizer)(batch)["grounding"].item()
    assert found != pytest.approx(own, rel=1e-2)


def test_the_plain_loss_is_the_mean_cross_entropy(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer, weighting="none")
    batch = batch_of(task)
    losses, _ = losses_and_weights(task, batch)
    assert task(batch)["grounding"].item() == pytest.approx(sum(map(sum, losses)) / 12, rel=1e-4)


@pytest.mark.parametrize("weighting", ["own", "official"])
def test_no_gradient_flows_through_the_weights(model: MPlug, tokenizer: Tokenizer, weighting: str) -> None:
    task = task_of(model, tokenizer, weighting=weighting)
    batch = batch_of(task)
    bias_K = task.coordinates.bias
    (found_K,) = torch.autograd.grad(task(batch)["grounding"], bias_K)
    _, weights = losses_and_weights(task, batch)
    weight_Q4 = torch.tensor(weights)
    if weighting == "official":
        weight_Q4 = weight_Q4.mean(0).expand(3, 4)
    bins_Q4 = torch.tensor([true_bins(box) for box in batch.box_Q4.tolist()])
    states = task.fuse(batch, batch.phrase).states()
    chances_Q4K = task.coordinates.logits(task._decoder, states, bins_Q4[:, :3]).softmax(-1)
    expected_K = ((chances_Q4K - F.one_hot(bins_Q4, BINS + 1)) * weight_Q4[..., None]).sum((0, 1)) / 12
    torch.testing.assert_close(found_K, expected_K, atol=1e-5, rtol=1e-4)


def test_regression_has_the_losses_of_transvg_weighted_as_detr(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer, locating="regression")
    batch = batch_of(task)
    distance, apart = 0.0, 0.0
    for row in range(3):
        box, found = batch.box_Q4[row].tolist(), task.head(fused_one(task, batch, row).pooled_BP)[0].tolist()
        distance += sum(abs(a - b) for a, b in zip(box, found, strict=True))
        apart += 1 - giou(found, box)
    losses = task(batch)
    assert losses["l1"].item() == pytest.approx(5 * distance / 3, rel=1e-4)
    assert losses["giou"].item() == pytest.approx(2 * apart / 3, rel=1e-4)


def test_the_box_head_gives_numbers_of_a_box() -> None:
    torch.manual_seed(0)
    head = BoxHead(8)
    pooled_XP = torch.randn(5, 8)
    hidden_XP = (pooled_XP @ head.first.weight.T + head.first.bias).clamp(min=0)
    hidden_XP = (hidden_XP @ head.second.weight.T + head.second.bias).clamp(min=0)
    expected_X4 = 1 / (1 + (-(hidden_XP @ head.box.weight.T + head.box.bias)).exp())
    torch.testing.assert_close(head(pooled_XP), expected_X4)
    assert head.to(torch.bfloat16)(pooled_XP.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("locating", ["tokens", "regression"])
def test_only_what_runs_is_trained(model: MPlug, tokenizer: Tokenizer, locating: str) -> None:
    task = task_of(model, tokenizer, locating=locating)
    task.freeze_rest()
    sum(task(batch_of(task)).values()).backward()  # type: ignore[union-attr]
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


# ------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("locating", ["tokens", "regression"])
def test_phrases_are_located_alone_as_together(model: MPlug, tokenizer: Tokenizer, locating: str) -> None:
    task = task_of(model, tokenizer, locating=locating)
    batch = batch_of(task)
    found = task.predict(batch)
    for row, item in enumerate(PHRASES):
        picture = int(batch.picture_Q[row])
        alone = task.batch(batch.pixels[picture : picture + 1], torch.tensor([0]), [item], max_tokens=20)
        assert task.predict(alone)[0] == pytest.approx(found[row], abs=1e-3)


def test_boxes_are_mapped_back_to_the_picture(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer, locating="regression")
    batch = batch_of(task)
    with torch.no_grad():
        task.head.box.weight.zero_()
        task.head.box.bias.copy_(torch.tensor([0.75, 0.5, 0.5, 0.25]).logit())  # on the canvas 8, 6, 16, 10
    expected = [(8, 6, 16, 10), (8, 6, 16, 10), (16, 4, 32, 12)]
    for found, wanted in zip(task.predict(batch), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_the_official_evaluation_normalises_otherwise(model: MPlug, tokenizer: Tokenizer) -> None:
    ours = task_of(model, tokenizer, locating="regression")
    theirs = task_of(model, tokenizer, locating="regression", official_normalisation=True)
    batch = batch_of(ours)
    seen = Preprocessing(16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for row in range(2):
        box_14 = theirs.head(fused_one(theirs, batch, row, seen).pooled_BP)
        x, y, w, h = (box_14[0] * 16).tolist()
        wanted = [min(max(number, 0), 16) for number in corners([x, y, w, h])]
        assert theirs.predict(batch)[row] == pytest.approx(wanted, abs=1e-3)
    assert theirs.predict(batch)[0] != pytest.approx(ours.predict(batch)[0], abs=1e-4)
    assert {name: loss.item() for name, loss in theirs(batch).items()} == {
        name: loss.item() for name, loss in ours(batch).items()
    }
    example = theirs._evaluation_pipeline().prepare(pictured((32, 16), phrase="dog"), 0)
    assert example.pixels[:, 0, 0].tolist() == [round(255 * mean) for mean in seen.mean]


def test_boxes_of_picture_files(model: MPlug, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What a user asks: phrases without boxes."""
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20), (250, 0, 0)).save(path)
    record = Record("a.png", str(path), (), "a.png", {"phrases": [{"text": "a dog"}, {"text": "cat"}]})
    task = task_of(model, tokenizer)
    found = task.answer([record, replace(record, extra={"phrase": "dog"})])
    assert len(found) == 3
    for left, top, right, bottom in found:
        assert 0 <= left <= right <= 40
        assert 0 <= top <= bottom <= 20


# ------------------------------------------------------------------------------------------------------------- data


def pictured(size: tuple[int, int] = (16, 16), **extra: Any) -> Record:
    content = io.BytesIO()
    Image.new("RGB", size, (10, 90, 200)).save(content, "PNG")
    return Record("k", content.getvalue(), (), "7", extra)


def boxed(text: str, *box: float) -> dict[str, Any]:
    return {"text": text, "box_xyxy": list(box)}


def test_phrases_of_a_record() -> None:
    one = Record("k", None, (), "7", {"phrase": "dog", "box_xyxy": [1, 2, 3, 4], "split": "testA", "sent_id": 5})
    assert read_phrases(one) == [Phrase("7", "dog", (1, 2, 3, 4), {"sent_id": 5}, "testA")]
    assert read_phrases(Record("k", None, (), "7", {"phrases": [{"text": "dog"}]})) == [Phrase("7", "dog")]
    with pytest.raises(BrokenSample, match="k: the phrase must be a text"):
        read_phrases(Record("k", None, (), "7", {}))


def test_training_draws_phrases_and_moves_their_boxes_together(model: MPlug, tokenizer: Tokenizer) -> None:
    listed = [boxed(f"left one {n}", 2 * n, 2 * n, 2 * n + 3, 2 * n + 2) for n in range(5)]
    record = pictured((32, 16), phrases=[*listed, {"text": "left without a box"}])
    pipeline = task_of(model, tokenizer, per_picture=2).training_pipeline(PIXELS.test_transform(), 30, 20)
    pipeline = pickle.loads(pickle.dumps(pipeline))  # it goes to worker processes
    texts, mirrored = set(), 0
    for seed in range(20):
        shown = pipeline.prepare(record, seed)
        assert shown.items == pipeline.prepare(record, seed).items
        first, second = shown.items
        assert first.target is not None
        assert second.target is not None
        assert first.target[2:] == pytest.approx(second.target[2:])
        assert first.place == second.place
        numbers = int(first.text[-1]), int(second.text[-1])
        sign = -1 if first.text.startswith("right") else 1
        mirrored += sign < 0
        apart = (numbers[1] - numbers[0]) * 2 / 3 * first.target[2]
        assert second.target[0] - first.target[0] == pytest.approx(sign * apart, abs=1e-5)
        texts |= {numbers}
    assert len(texts) > 8
    assert 3 < mirrored < 17
    assert {n for pair in texts for n in pair} == set(range(5))


def test_without_augmentation_training_sees_what_evaluation_sees(model: MPlug, tokenizer: Tokenizer) -> None:
    record = pictured((32, 16), phrase="left dog", box_xyxy=[16, 0, 40, 16], split="val")
    task = task_of(model, tokenizer, augment=False)
    shown = task.training_pipeline(PIXELS.test_transform(), 30, 20).prepare(record, 3)
    assert shown.items == task._evaluation_pipeline().prepare(record, 0).items
    (item,) = shown.items
    assert item.place == WIDE
    assert item.target == pytest.approx((0.75, 0.5, 0.5, 0.5))
    assert item.box_xyxy == (16, 0, 32, 16)  # cut at the picture's edge
    grounded = EvaluationTransform(PIXELS)(Image.new("RGB", (32, 16), (10, 90, 200)), torch.empty(0, 4), [])
    assert torch.equal(shown.pixels, grounded.pixels_CHW)


def test_the_official_augmentation_mirrors_letters(model: MPlug, tokenizer: Tokenizer) -> None:
    record = pictured(phrase="a bright dog", box_xyxy=[2, 2, 9, 9])

    def texts(**changes: Any) -> set[str]:
        pipeline = task_of(model, tokenizer, **changes).training_pipeline(PIXELS.test_transform(), 30, 20)
        return {pipeline.prepare(record, seed).items[0].text for seed in range(20)}

    assert texts() == {"a bright dog"}
    assert texts(official_augmentation=True) == {"a bright dog", "a bleft dog"}


def test_a_batch(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer, per_picture=0)
    batch = batch_of(task)
    ids = batch.phrase.ids_BL[2, : int(batch.phrase.mask_BL[2].sum())].tolist()
    assert ids == [tokenizer.bos_id, *tokenizer.backend.encode("dog", add_special_tokens=False).ids, tokenizer.eos_id]
    assert batch.box_Q4.tolist() == [list(item.target) for item in PHRASES if item.target is not None]
    assert batch.places == (SQUARE, SQUARE, WIDE)
    assert batch.to("cpu").places == batch.places
    short = task.batch(batch.pixels, batch.picture_Q, PHRASES, max_tokens=4)
    assert short.phrase.ids_BL.shape == (3, 4)
    assert short.phrase.ids_BL[1, -1] == tokenizer.eos_id
    records = [pictured(phrases=[boxed("a", 0, 0, 9, 9), {"text": "b"}]), pictured(phrase="c")]
    pipeline = task._evaluation_pipeline()
    asked = pipeline.collate([pipeline.prepare(record, 0) for record in records])
    assert asked.picture_Q.tolist() == [0, 0, 1]
    assert asked.box_Q4.isfinite().all(1).tolist() == [True, False, False]


def test_unusable_records_are_skipped(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer)
    training = task.training_pipeline(PIXELS.test_transform(), 30, 20)
    for pipeline in (training, task._evaluation_pipeline()):
        outside = pictured(phrase="dog", box_xyxy=[50, 0, 60, 10])
        with pytest.raises(BrokenSample, match=r"k: the box .* has no area in the picture of 16 x 16 pixels"):
            pipeline.prepare(outside, 0)
        with pytest.raises(BrokenSample, match="k: missing boxes"):
            pipeline.prepare(Record("k", None, (), "7", {}, "missing boxes"), 0)
        with pytest.raises(BrokenSample, match="k: the record has no image"):
            pipeline.prepare(Record("k", None, (), "7", {"phrase": "dog"}), 0)
    with pytest.raises(BrokenSample, match="k: none of its phrases has a box"):
        training.prepare(pictured(phrase="dog"), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"locating": "guess"}, "locating must be one of tokens, regression, not 'guess'"),
        ({"weighting": "mean"}, "weighting must be one of own, official, none, not 'mean'"),
        ({"bins": 0}, "bins must be at least 1, not 0"),
        ({"augment": False, "official_augmentation": True}, "official_augmentation needs augment"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroundingConfig(**changes)


def test_tokens_need_a_decoder(model: MPlug, tokenizer: Tokenizer) -> None:
    model.decoder = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="this mplug has no decoder: locate with locating='regression'"):
        task_of(model, tokenizer)
    task = task_of(model, tokenizer, locating="regression")
    assert task.uses == ("image", "text", "fusion", "pooled")
    assert len(task.predict(batch_of(task))) == 3


def test_unknown_boxes_cannot_be_learned(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer)
    batch = task.batch(batch_of(task).pixels, torch.tensor([0]), [replace(PHRASES[0], target=None)], max_tokens=20)
    with pytest.raises(ValueError, match="not finite"):
        task(batch)


# ----------------------------------------------------------------------------------------------- report, evaluation


def test_the_report(model: MPlug, tokenizer: Tokenizer) -> None:
    items = [
        Phrase("1", "a", (0, 0, 10, 20), {"sent_id": 3}, "testA"),
        Phrase("1", "b", (0, 0, 10, 20), {"sent_id": 4}, "testA"),
        Phrase("2", "c", (0, 0, 30, 10), {}, "testB"),
        Phrase("2", "d", None, {"sent_id": 6}, "testB"),
    ]
    boxes = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 9.0), (0.0, 0.0, 30.0, 10.0), (1.0, 2.0, 3.0, 4.123)]
    report = task_of(model, tokenizer).report(items, boxes)
    # exactly a half counts
    assert report.scores == {"accuracy": 66.6667, "testA": 50.0, "testB": 100.0, "mean_iou": 65.0}
    assert report.credits == [1.0, 0.0, 1.0]
    assert report.predictions[0] == {"image": "1", "phrase": "a", "sent_id": 3, "box_xyxy": [0, 0, 10, 10]}
    assert report.predictions[3] == {"image": "2", "phrase": "d", "sent_id": 6, "box_xyxy": [1, 2, 3, 4.12]}
    assert json.loads(json.dumps(report.predictions)) == report.predictions
    unknown = task_of(model, tokenizer).report(items[3:], boxes[3:])
    assert (unknown.scores, len(unknown.predictions), unknown.credits) == ({}, 1, [])
    assert "testA" not in task_of(model, tokenizer).report([replace(items[0], split=None)], boxes[:1]).scores


COLOURS = {"red": (250, 20, 20), "blue": (20, 20, 250), "green": (20, 200, 20)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of three colours in the corners of pictures that are wider than high."""
    path = tmp_path_factory.mktemp("world") / "squares.tar"
    torch.manual_seed(0)
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            picture, phrases = Image.new("RGB", (32, 24), (128, 128, 128)), []
            for colour, corner in zip(COLOURS, torch.randperm(4).tolist(), strict=False):
                left, top = 16 * (corner % 2), 12 * (corner // 2)
                picture.paste(COLOURS[colour], (left, top, left + 16, top + 12))
                phrases.append(boxed(f"the {colour} one", left, top, left + 16, top + 12))
            content = io.BytesIO()
            picture.save(content, "PNG")
            values = json.dumps({"image_id": f"p{number}", "phrases": phrases}).encode()
            for name, data in ((f"{number}.png", content.getvalue()), (f"{number}.json", values)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("locating", "rate", "steps", "expected"), [("tokens", 5e-3, 100, 90), ("regression", 3e-3, 200, 60)]
)
def test_it_learns_where_colours_are(
    world: Path, build_model: Builder, locating: str, rate: float, steps: int, expected: float
) -> None:
    words = train_wordpiece([f"the {colour} one" for colour in COLOURS] * 3, 80)
    settings = {"bins": 16, "per_picture": 0, "augment": False, "weighting": "none"}
    task = task_of(build_model(words), words, locating=locating, **settings)
    source = open_source(str(world))
    assert task.evaluate(source).scores["accuracy"] < 50
    pipeline = task.training_pipeline(PIXELS.test_transform(), 30, 20)
    batch = pipeline.collate([pipeline.prepare(record, 0) for record in source])
    task.freeze_rest()
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack(list(task(batch).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    report = task.evaluate(source, pictures=3)
    assert report.scores["accuracy"] > expected
    assert [row["image"] for row in report.predictions] == [f"p{number}" for number in range(4) for _ in range(3)]
    assert task.evaluate(source, limit=2).predictions == report.predictions[:6]
    assert task.evaluate(source, blank=True).scores["accuracy"] < 60


def test_a_table_is_kept_apart_from_the_model(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer)
    state = {name: value + 1 for name, value in task.own_state().items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "coordinates.word.weight": (BINS + 2, 16),
        "coordinates.bias": (BINS + 1,),
    }
    other = task_of(model, tokenizer)
    other.load_own_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.own_state().items())
    with pytest.raises(ValueError, match="does not fit the task 'grounding'"):
        task_of(model, tokenizer, bins=BINS + 1).load_own_state(state)
    with pytest.raises(ValueError, match="has not the head that the task 'grounding' needs"):
        task_of(model, tokenizer, locating="regression").load_own_state(state)
