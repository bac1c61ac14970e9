"""MLM and ITM as BridgeTower pre-trains: in both forms, against a slow one, and how pairs are drawn.

Shape legend: B batch, L tokens, D width, V vocabulary, X selected tokens or pairs.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.data.batches import PretrainingBatch
from triptych.models import MODELS, build
from triptych.models.protocol import Encoded, VisionLanguageModel
from triptych.objectives.distributed import StepNoise
from triptych.objectives.masked_matching import MaskedMatching, MaskedMatchingConfig
from triptych.objectives.pretraining import TextIds

MakeBatch = Callable[..., PretrainingBatch]

IDS = TextIds(pad=0, mask=3, special=(0, 1, 2, 3), vocab_size=40)
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
DISTINCT, REPEATED = [1, 2, 3, 4, 5], [1, 2, 1, 3, 2]
NETWORKS = [
    name
    for name, family in MODELS.items()
    if {"image", "text", "fusion", "embedding", "matching", "masked"} <= family.model.parts.keys()
]
ITC = {"contrast": "itc"}
HARD = {"contrast": "itc", "matching": "hard"}


def network(model_type: str) -> VisionLanguageModel:
    """The tiny size on pictures of 32 pixels and 40 tokens, without dropout, its parameters stirred."""
    torch.manual_seed(0)
    tiny = MODELS[model_type].sizes["tiny"]
    text = dataclasses.replace(tiny.text, vocab_size=40, dropout=0.0, attention_dropout=0.0)
    vision = dataclasses.replace(tiny.vision, image_size=32, attention_dropout=0.0)
    model = build(model_type, dataclasses.replace(tiny, text=text, vision=vision))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def objective(model: VisionLanguageModel, seed: int = 5, **settings: Any) -> MaskedMatching:
    config = MaskedMatchingConfig(**{"mlm_probability": 0.4, **settings})
    return MaskedMatching(model, config, IDS, mean=MEAN, std=STD, seed=seed).train()


@pytest.fixture
def batch_of(make_batch: MakeBatch) -> Callable[[list[int]], PretrainingBatch]:
    """A batch of pictures with these ids."""

    def make(image_ids: list[int], seed: int = 2) -> PretrainingBatch:
        generator = torch.Generator().manual_seed(seed)
        pixels_BCHW = torch.randint(0, 256, (len(image_ids), 3, 32, 32), dtype=torch.uint8, generator=generator)
        batch = make_batch(len(image_ids), seed=seed, image_ids=image_ids)
        return dataclasses.replace(batch, pixels_BCHW=pixels_BCHW)

    return make


BatchOf = Callable[..., PretrainingBatch]


def gradients(task: MaskedMatching, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    task.zero_grad()
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, ITC, HARD], ids=["mlm+itm", "itc", "hard"])
@pytest.mark.parametrize("model_type", NETWORKS)
def test_both_forms_give_equal_losses_and_gradients(
    model_type: str, settings: dict[str, Any], batch_of: BatchOf
) -> None:
    model, batch = network(model_type), batch_of(REPEATED)
    found = []
    for passes in ("shared", "two"):
        task = objective(model, passes=passes, **settings)
        losses = task(batch, step=7)
        found.append((losses, task.measures, gradients(task, losses)))
    (ours, measures, grads), (official, official_measures, official_grads) = found
    assert list(ours) == list(official) == ["mlm", "itm", *(["itc"] if settings else [])]
    torch.testing.assert_close(ours, official, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measures, official_measures)
    # What trains has a gradient: in several processes nothing may be left over.
    assert grads.keys() == official_grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in official_grads.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("passes", "image_calls", "text_rows"), [("shared", 1, [10]), ("two", 2, [5, 5])], ids=["shared", "two"]
)
def test_how_often_encoders_run(
    passes: str, image_calls: int, text_rows: list[int], batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network("bridgetower")
    images, texts, encode_image, encode_text = [], [], model.encode_image, model.encode_text
    monkeypatch.setattr(model, "encode_image", lambda *args: images.append(1) or encode_image(*args))
    monkeypatch.setattr(model, "encode_text", lambda *args: texts.append(len(args[0])) or encode_text(*args))
    objective(model, passes=passes)(batch_of(DISTINCT), step=0)
    assert len(images) == image_calls
    assert texts == text_rows


def slow(task: MaskedMatching, batch: PretrainingBatch, step: int) -> dict[str, Tensor]:
    """One step, a pair at a time and without padding, sharing nothing but the random numbers."""
    model, (B, L) = task.model, batch.text.ids_BL.shape
    ids = [batch.text.ids_BL[b][batch.text.mask_BL[b]] for b in range(B)]
    names = batch.image_id_B.tolist()
    masking = StepNoise(task.seed, step, stream=1).uniform(B, L, 3, device=torch.device("cpu")).tolist()
    pairing = StepNoise(task.seed, step).uniform(B, 1 + B, device=torch.device("cpu")).tolist()

    def fuse(picture: int, text_L: Tensor) -> tuple[Tensor, Tensor]:
        channels = [(batch.pixels_BCHW[picture, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)]
        fused = model.fuse(model.encode_image(torch.stack(channels)[None]), model.encode_text(text_L[None]))
        return fused.text_BLD[0], fused.pooled_BP

    words, matches = [], []
    for b in range(B):
        corrupted, chosen = ids[b].clone(), []
        for x, token in enumerate(ids[b].tolist()):
            choose, action, random = masking[b][x]
            if token in IDS.special or choose >= task.settings.mlm_probability:
                continue
            chosen.append(x)
            if action < 0.9:
                corrupted[x] = IDS.mask if action < 0.8 else int(random * IDS.vocab_size)
        logits_LV = model.masked_logits(fuse(b, corrupted)[0])
        words += [F.cross_entropy(logits_LV[x], ids[b][x]) for x in chosen]
    true = sorted(range(B), key=lambda b: pairing[b][0])[: B // 2]
    for b in range(B):
        others = [g for g in range(B) if names[g] != names[b]]
        picture = b if b in true else max(others, key=lambda g: pairing[b][1 + g])
        logits_12 = model.match_logits(fuse(picture, ids[b])[1])
        matches.append(F.cross_entropy(logits_12, torch.tensor([int(b in true)])))
    return {"mlm": torch.stack(words).mean(), "itm": torch.stack(matches).mean()}


@pytest.mark.parametrize("model_type", NETWORKS)
def test_the_step_equals_the_slow_one(model_type: str, batch_of: BatchOf) -> None:
    model, batch = network(model_type), batch_of(REPEATED)
    task = objective(model)
    expected = slow(task, batch, 3)
    expected_grads = gradients(task, expected)
    found = task(batch, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = gradients(task, found)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected_grads[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


class Draws:
    """Random pairs of pictures with given ids, without a network."""

    def __init__(self, image_ids: list[int]) -> None:
        self.task = objective(network("bridgetower"))
        self.id_B = torch.tensor(image_ids)
        self.states = Encoded(torch.arange(len(image_ids))[:, None, None].float())

    def __call__(self, step: int) -> tuple[list[int], list[bool], list[bool]]:
        """The picture of each text, whether it is meant to match, and whether it counts."""
        pairs = self.task._draw_random(self.states, self.states, self.id_B, StepNoise(1, step))
        assert pairs.texts is self.states
        shown_B = pairs.images.hidden_BLD[pairs.image_rows].flatten().long()
        return shown_B.tolist(), pairs.matches.tolist(), pairs.counts.tolist()


@pytest.mark.parametrize("rows", range(1, 10))
def test_half_of_the_texts_match_and_the_others_do_not(rows: int) -> None:
    image_ids = [10 + row // 2 for row in range(rows)]
    draw = Draws(image_ids)
    for step in range(20):
        shown, matches, counts = draw(step)
        assert sum(matches) == rows // 2
        for row, picture in enumerate(shown):
            if matches[row]:
                assert picture == row
            elif counts[row]:
                assert image_ids[picture] != image_ids[row]
            assert counts[row] == (matches[row] or len(set(image_ids)) > 1)


def test_which_texts_match_and_what_the_others_are_shown_is_uniform() -> None:
    draw, steps = Draws([1, 1, 2, 3, 4, 5]), 2000
    true: Counter[int] = Counter()
    shown: dict[int, Counter[int]] = {row: Counter() for row in range(6)}
    for step in range(steps):
        pictures, matches, _ = draw(step)
        for row in range(6):
            if matches[row]:
                true[row] += 1
            else:
                shown[row][pictures[row]] += 1
    assert all(abs(true[row] / steps - 0.5) < 0.05 for row in range(6))  # four standard deviations
    for row, counts in shown.items():
        candidates = {2, 3, 4, 5} if row < 2 else {0, 1, 2, 3, 4, 5} - {row}
        assert set(counts) == candidates
        expected = counts.total() / len(candidates)
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 20


@pytest.mark.parametrize("passes", ["shared", "two"])
def test_a_batch_without_any_other_picture(passes: str, batch_of: BatchOf) -> None:
    """Texts that nothing could be drawn for do not count; of a single one nothing is left, and its loss is 0."""
    model = network("bridgetower")
    for image_ids in ([7], [7, 7, 7, 7]):
        task, batch = objective(model, passes=passes), batch_of(image_ids)
        losses = task(batch, step=0)
        assert all(loss.isfinite() for loss in (*losses.values(), *task.measures.values()))
        assert (losses["itm"] == 0) == (len(image_ids) == 1)
        grads = gradients(task, losses)
        assert all(grad.isfinite().all() for grad in grads.values())
        assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_hard_negatives_are_one_text_and_one_picture_a_row(batch_of: BatchOf) -> None:
    task, batch = objective(network("bridgetower"), **HARD), batch_of(REPEATED)
    pixels_BCHW, _ = task._begin(batch, 0, 0)
    image, text = task._encode(pixels_BCHW, batch.text)
    contrast = task._contrast(batch, image, text, None, 0.0)
    pairs = task._pairs(batch, image, text, contrast, StepNoise(5, 0))
    assert pairs.matches.view(3, 5).tolist() == [[True] * 5, [False] * 5, [False] * 5]
    assert pairs.image_rows[:10].tolist() == [0, 1, 2, 3, 4] * 2
    drawn = [REPEATED[row] for row in pairs.image_rows[10:]]
    assert all(one != other for one, other in zip(drawn, REPEATED, strict=True))


def test_a_step_depends_on_seed_step_and_part_alone(batch_of: BatchOf) -> None:
    model, batch = network("bridgetower"), batch_of(DISTINCT)

    def losses(seed: int = 5, step: int = 1, part: int = 0) -> list[float]:
        return [loss.item() for loss in objective(model, seed)(batch, step, part).values()]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = losses()
    torch.manual_seed(1)
    assert losses() == first
    assert all(other != first for other in (losses(seed=6), losses(step=2), losses(part=1)))
    torch.manual_seed(0)
    losses()
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn elsewhere


def test_special_tokens_and_padding_are_never_predicted(batch_of: BatchOf) -> None:
    model, batch = network("bridgetower"), batch_of(DISTINCT)
    task, seen = objective(model, mlm_probability=1.0), []
    model.masked_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    task(batch, step=0)
    assert seen == [int((batch.text.ids_BL >= 4).sum())]


def test_accuracies_are_measured(batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network that always says "matches" and always predicts one word."""
    model, batch = network("bridgetower"), batch_of(DISTINCT)
    task, word = objective(model, mlm_probability=1.0), 7
    monkeypatch.setattr(model, "match_logits", lambda pooled_BP: pooled_BP[:, :2] * 0 + torch.tensor([0.0, 1.0]))
    monkeypatch.setattr(model, "masked_logits", lambda x_XD: x_XD[:, :40] * 0 + F.one_hot(torch.tensor(word), 40))
    task(batch, step=0)
    words = batch.text.ids_BL[batch.text.ids_BL >= 4]
    assert float(task.measures["itm_accuracy"]) == pytest.approx(2 / 5)
    assert float(task.measures["mlm_accuracy"]) == pytest.approx(float((words == word).float().mean()))


@pytest.mark.parametrize("model_type", NETWORKS)
def test_only_what_is_used_trains(model_type: str) -> None:
    model = network(model_type)
    embedding = set(model.parts["embedding"])
    objective(model, **ITC)
    with_itc = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    objective(model)
    without = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert embedding <= with_itc
    assert with_itc - embedding == without
    assert "decoder" not in with_itc


def test_nothing_but_the_model_is_saved() -> None:
    model = network("bridgetower")
    state = objective(model).state_dict()
    assert {name for name in state if not name.startswith("model.")} == {
        f"queue.{name}" for name in ("image_QE", "text_QE", "id_Q", "filled", "position")
    }
    assert objective(model).kept is model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching": "hard"}, "set contrast='itc' for matching='hard'"),
        ({"passes": "three"}, "passes must be one of shared, two, not 'three'"),
        ({"contrast": "cca"}, "contrast must be one of none, itc, not 'cca'"),
        ({"matching": "easy"}, "matching must be one of random, hard, not 'easy'"),
        ({"mlm_probability": 0.0}, r"mlm_probability must be in \(0, 1\], not 0.0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedMatchingConfig(**settings)


def test_the_papers_settings_are_the_defaults() -> None:
    config = MaskedMatchingConfig()
    assert (config.mlm_probability, config.contrast, config.matching) == (0.15, "none", "random")
    assert config.passes == "shared"


def test_both_losses_are_learnt(batch_of: BatchOf) -> None:
    """The same eight pictures with texts again and again, other masks and pairs in each step."""
    model, batch = network("bridgetower"), batch_of(list(range(8)))
    task = objective(model, mlm_probability=0.15)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    losses: list[dict[str, float]] = []
    for step in range(120):
        found = task(batch, step)
        losses.append({name: loss.item() for name, loss in found.items()})
        optimizer.zero_grad()
        sum(found.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    for name in ("mlm", "itm"):
        first, last = (sum(loss[name] for loss in part) / 20 for part in (losses[:20], losses[-20:]))
        assert last < first / 2
