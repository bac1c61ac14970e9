"""Statements about one or two pictures: what is read, the three ways to judge, training, the report."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from triptych.checkpoints.folder import load, save_folder
from triptych.data.pictures import show
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import Source, open_source
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.protocol import Encoded
from triptych.tasks.base import Shown
from triptych.tasks.nlvr2 import AttentionPooling, Nlvr2, Nlvr2Config, ReadStatement, Statement, StatementBatch, Variant

PIXELS = Preprocessing(16, HALF, HALF)
VARIANTS: tuple[Variant, ...] = ("passes", "merged", "biattention")
ITEMS = (
    Statement("dev-1-0-0", "the left one is red", True),
    Statement("dev-1-1-0", "both show two dogs and the right one a cat", False),
    Statement("dev-2-0-0", "it is late", None),
)
PICTURE_Q = torch.tensor([0, 1, 1])
Build = Callable[[Tokenizer], MPlug]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([item.text for item in ITEMS] * 3, 80)


@pytest.fixture(params=VARIANTS)
def task(request: pytest.FixtureRequest, tokenizer: Tokenizer, build_model: Build) -> Nlvr2:
    return make(build_model(tokenizer), tokenizer, variant=request.param)


def make(model: MPlug, tokenizer: Tokenizer, **settings: Any) -> Nlvr2:
    """With every parameter away from its start."""
    task = Nlvr2(model, tokenizer, PIXELS, Nlvr2Config(**settings)).eval()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return task


def make_batch(task: Nlvr2, *shape: int) -> StatementBatch:
    torch.manual_seed(2)
    pixels = torch.randint(0, 256, (2, *shape, 3, 16, 16), dtype=torch.uint8)
    return task.batch(pixels, PICTURE_Q, ITEMS, max_tokens=20)


def fusion_of(build_model: Build, tokenizer: Tokenizer, fusion: str) -> MPlug:
    config = build_model(tokenizer).config
    return MPlug(MPlugConfig(**{**vars(config), "fusion": fusion})).eval()


# ------------------------------------------------------------------------------------------- the three ways to judge


def logits_alone(task: Nlvr2, batch: StatementBatch, row: int) -> Tensor:
    """Of one statement, without padding, one picture after the other."""
    model, length = task.model, int(batch.statement.mask_BL[row].sum())
    pixels = batch.pixels[PICTURE_Q[row]]
    pictures = [model.encode_image(PIXELS.normalize(one[None])) for one in pixels.view(-1, 3, 16, 16)]
    text = model.encode_text(batch.statement.ids_BL[row : row + 1, :length])
    if task.config.variant == "merged":
        return task.head(model.fuse_pair(*pictures, text, task.second_attention).pooled_BP)
    fused = [model.fuse(picture, text) for picture in pictures]
    if task.config.variant == "passes":
        return task.head(torch.cat([one.pooled_BP for one in fused], 1))
    head = task.head
    first, second = (torch.cat([one.image_BND, one.text_BLD], 1) for one in fused)
    pooled = []
    for attention, own, other in ((head.first_to_second, first, second), (head.second_to_first, second, first)):
        joined = F.relu(head.join(torch.cat([attention(own, other), own], 2)))
        weights = F.relu(head.pool.score(joined)).softmax(1)
        pooled.append((weights * joined).sum(1))
    return head.classify(torch.cat(pooled, 1))


def test_the_loss_is_that_of_the_labelled_ones_judged_one_by_one(task: Nlvr2) -> None:
    batch = make_batch(task, 2)
    logits_Q2 = torch.cat([logits_alone(task, batch, row) for row in range(3)])
    assert logits_Q2.std(0).min() > 1e-4
    expected = F.cross_entropy(logits_Q2[:2], torch.tensor([1, 0]))
    assert task(batch)["nlvr2"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert task.predict(batch) == [bool(column) for column in logits_Q2.argmax(1)]


def test_a_single_picture_is_judged_too(tokenizer: Tokenizer, build_model: Build) -> None:
    task = make(build_model(tokenizer), tokenizer, pictures=1)
    batch = make_batch(task)
    logits_Q2 = torch.cat([logits_alone(task, batch, row) for row in range(3)])
    assert task(batch)["nlvr2"].item() == pytest.approx(F.cross_entropy(logits_Q2[:2], torch.tensor([1, 0])).item())
    assert task.head.expand.in_features == 16
    assert task.head.expand.out_features == 24


def test_only_what_runs_is_trained_and_all_of_it(task: Nlvr2) -> None:
    task.model.train_only(*task.uses)
    task(make_batch(task, 2))["nlvr2"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_each_picture_matters_and_which_is_first(task: Nlvr2) -> None:
    batch = make_batch(task, 2)
    loss = task(batch)["nlvr2"]
    for side in (0, 1):
        pixels = batch.pixels.clone()
        pixels[:, side] = 255 - pixels[:, side]
        assert (task(dataclasses.replace(batch, pixels=pixels))["nlvr2"] - loss).abs() > 1e-4
    assert (task(dataclasses.replace(batch, pixels=batch.pixels.flip(1)))["nlvr2"] - loss).abs() > 1e-5


def test_the_gradient_checkpointed_is_the_gradient(task: Nlvr2) -> None:
    batch = make_batch(task, 2)
    gradients = []
    for checkpointing in (False, True):
        task.zero_grad()
        task.model.fusion.checkpointing = checkpointing
        task(batch)["nlvr2"].backward()
        gradients.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_head_is_bridgetowers(tokenizer: Tokenizer, build_model: Build) -> None:
    """From two pooled states to one and a half times the width of one (bt_module.py:169-184)."""
    head = Nlvr2(build_model(tokenizer), tokenizer, PIXELS).head
    assert (head.expand.in_features, head.expand.out_features, head.classify.out_features) == (32, 24, 2)
    assert head.dropout.p == 0.1


def test_weights_of_padding_are_zero() -> None:
    pool = AttentionPooling(4, 0.0)
    hidden_BTD, mask_BT = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    alone = pool(Encoded(hidden_BTD[:1, :2]))
    torch.testing.assert_close(pool(Encoded(hidden_BTD, mask_BT))[:1], alone)


# ------------------------------------------------------------------------------------------- one fusion of two pictures


def encoded(task: Nlvr2) -> tuple[Encoded, Encoded, Encoded]:
    batch = make_batch(task, 2)
    image = task.model.encode_image(PIXELS.normalize(batch.pixels.flatten(0, 1)))
    text = task.model.encode_text(batch.statement.ids_BL[:2], batch.statement.mask_BL[:2])
    return image.rows(slice(0, None, 2)), image.rows(slice(1, None, 2)), text


@pytest.fixture
def asymmetric(tokenizer: Tokenizer, build_model: Build) -> Nlvr2:
    return make(fusion_of(build_model, tokenizer, "asymmetric"), tokenizer, variant="merged")


def test_the_second_attention_starts_as_the_first(tokenizer: Tokenizer, build_model: Build) -> None:
    """So that a pair of equal pictures is at first judged as one picture."""
    model = fusion_of(build_model, tokenizer, "asymmetric")
    task = Nlvr2(model, tokenizer, PIXELS, Nlvr2Config(variant="merged")).eval()
    first, _, text = encoded(task)
    fused, single = model.fuse_pair(first, first, text, task.second_attention), model.fuse(first, text)
    torch.testing.assert_close(fused.text_BLD, single.text_BLD)
    assert fused.image_BND.shape[1] == 2 * single.image_BND.shape[1]
    shared = {id(p) for p in task.second_attention.parameters()} & {id(p) for p in model.parameters()}
    assert len(list(task.second_attention.parameters())) == 12
    assert not shared


def test_the_text_gets_the_mean_of_what_it_sees(asymmetric: Nlvr2) -> None:
    """With the first attention doubled and the second silent, it is the fusion with the first picture alone."""
    first, second, text = encoded(asymmetric)
    expected = asymmetric.model.fuse(first, text).text_BLD
    with torch.no_grad():
        for layer, other in zip(asymmetric.model.fusion.layers, asymmetric.second_attention, strict=True):
            for parameter in layer.block.cross_attention.out.parameters():
                parameter.mul_(2)
            for parameter in other.out.parameters():
                parameter.zero_()
    fused = asymmetric.model.fuse_pair(first, second, text, asymmetric.second_attention)
    torch.testing.assert_close(fused.text_BLD, expected)


def test_attentions_and_pictures_exchanged_are_the_same(asymmetric: Nlvr2) -> None:
    first, second, text = encoded(asymmetric)
    expected = asymmetric.model.fuse_pair(first, second, text, asymmetric.second_attention).pooled_BP
    own = asymmetric.model.pair_attention()
    for layer, other in zip(asymmetric.model.fusion.layers, asymmetric.second_attention, strict=True):
        layer.block.cross_attention = other
    torch.testing.assert_close(asymmetric.model.fuse_pair(second, first, text, own).pooled_BP, expected)


def test_connected_layers_attend_over_both_pictures_and_the_text(tokenizer: Tokenizer, build_model: Build) -> None:
    task = make(fusion_of(build_model, tokenizer, "connected"), tokenizer, variant="merged", picture_types=True)
    first, second, text = encoded(task)
    assert len(task.second_attention) == 0
    expected = task.model.fuse(Encoded.join(first, second), text)
    fused = task.model.fuse_pair(first, second, text, task.second_attention)
    torch.testing.assert_close(fused.states().hidden_BLD, expected.states().hidden_BLD)


def test_fusion_of_one_picture_is_refused(
    tokenizer: Tokenizer, build_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = Nlvr2Config(variant="merged")
    with pytest.raises(ValueError, match="sees two pictures alike, whatever their order: set picture_types=True"):
        Nlvr2(fusion_of(build_model, tokenizer, "connected"), tokenizer, PIXELS, merged)
    with pytest.raises(ValueError, match="co-attention takes one picture"):
        Nlvr2(fusion_of(build_model, tokenizer, "co_attention"), tokenizer, PIXELS, merged)
    monkeypatch.delattr(MPlug, "pair_attention")  # then it is any model
    with pytest.raises(ValueError, match="the fusion of this mplug takes one picture"):
        Nlvr2(build_model(tokenizer), tokenizer, PIXELS, merged)


def test_a_checkpoint_keeps_the_head(task: Nlvr2, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And of the merged variant the second attentions, which are no part of the model."""
    save_folder(tmp_path / "c", task.model, tokenizer, PIXELS, task_state=task.own_state())
    loaded = load(tmp_path / "c")
    assert any(name.startswith("second_attention.") for name in loaded.task_state) == (task.config.variant == "merged")
    again = Nlvr2(loaded.vision_language_model(), tokenizer, PIXELS, task.config).eval()
    batch = make_batch(task, 2)
    assert again(batch)["nlvr2"] != task(batch)["nlvr2"]
    again.load_own_state(dict(loaded.task_state))
    assert again(batch)["nlvr2"] == task(batch)["nlvr2"]


# ------------------------------------------------------------------------------------------------ first and second


def test_types_of_pictures_start_at_zero(tokenizer: Tokenizer, build_model: Build) -> None:
    model = build_model(tokenizer)
    torch.manual_seed(5)
    plain = Nlvr2(model, tokenizer, PIXELS).eval()
    torch.manual_seed(5)
    typed = Nlvr2(model, tokenizer, PIXELS, Nlvr2Config(picture_types=True)).eval()
    batch = make_batch(plain, 2)
    assert typed(batch)["nlvr2"] == plain(batch)["nlvr2"]
    typed(batch)["nlvr2"].backward()
    assert typed.picture_types.grad.abs().amin(1).min() > 0
    assert "picture_types" in typed.own_state()


def test_each_picture_gets_its_own_type(tokenizer: Tokenizer, build_model: Build) -> None:
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS, Nlvr2Config(picture_types=True)).eval()
    task.picture_types.data = torch.tensor([[1.0], [-2.0]]).expand(2, 16).clone()
    batch = make_batch(task, 2)
    plain = task.model.encode_image(PIXELS.normalize(batch.pixels.flatten(0, 1))).hidden_BLD
    added = task._encode(batch).hidden_BLD - plain
    expected = torch.tensor([1.0, -2.0, 1.0, -2.0])[:, None, None].expand_as(added)
    torch.testing.assert_close(added, expected)


def test_types_are_added_to_every_level(
    tokenizer: Tokenizer, build_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS, Nlvr2Config(picture_types=True)).eval()
    task.picture_types.data.fill_(3)
    states = Encoded(torch.zeros(4, 5, 16), levels=(torch.ones(4, 5, 16),))
    monkeypatch.setattr(task.model, "encode_image", lambda pixels: states)
    assert task._encode(make_batch(task, 2)).levels[0].unique().tolist() == [4]
    wide = Encoded(torch.zeros(4, 5, 16), levels=(torch.ones(4, 5, 24),))
    monkeypatch.setattr(task.model, "encode_image", lambda pixels: wide)
    with pytest.raises(ValueError, match=r"picture states of width 16, not \[16, 24\]"):
        task._encode(make_batch(task, 2))


def record(tmp_path: Path, **extra: Any) -> Record:
    images = []
    for name, value in (("a", 10), ("b", 240)):
        images.append(str(tmp_path / f"{name}.png"))
        Image.new("RGB", (16, 16), (value, value, value)).save(images[-1])
    return Record(
        "k", None, (), "7", {"images": images, "statement": "a left one, not a leftover", "label": True, **extra}
    )


def prepared(task: Nlvr2, one: Record, seeds: int) -> set[tuple[bool, str]]:
    """Whether the dark picture is first, and the statement, for each of some seeds."""
    prepare = task.training_pipeline(PIXELS.test_transform(), 30, 20).prepare
    shown = [prepare(one, seed) for seed in range(seeds)]
    return {(bool(each.pixels[0].float().mean() < each.pixels[1].float().mean()), each.items[0].text) for each in shown}


def test_pictures_and_sides_are_swapped_together(tokenizer: Tokenizer, build_model: Build, tmp_path: Path) -> None:
    as_is, swapped = (True, "a left one, not a leftover"), (False, "a right one, not a leftover")
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS, Nlvr2Config(swap=True))
    assert prepared(task, record(tmp_path), 20) == {as_is, swapped}
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS)
    assert prepared(task, record(tmp_path), 20) == {as_is}


def test_half_are_swapped_whatever_the_transform_draws(
    tokenizer: Tokenizer, build_model: Build, tmp_path: Path
) -> None:
    """The swap has random numbers of its own: else each would come with certain crops only."""
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS, Nlvr2Config(swap=True))
    drawn: list[float] = []

    def transform(image: Image.Image) -> Tensor:
        drawn.append(torch.rand(()).item())
        return torch.full((3, 16, 16), image.getpixel((0, 0))[0], dtype=torch.uint8)

    prepare = task.training_pipeline(transform, 30, 20).prepare
    one = record(tmp_path)
    swapped = torch.tensor([prepare(one, seed).pixels[0, 0, 0, 0] > 100 for seed in range(400)]).float()
    assert swapped.mean().item() == pytest.approx(0.5, abs=0.1)
    assert abs(torch.corrcoef(torch.stack([swapped, torch.tensor(drawn[::2])]))[0, 1].item()) < 0.15
    assert prepare(one, 3).items == prepare(one, 3).items


def test_evaluation_never_swaps(tokenizer: Tokenizer, build_model: Build, tmp_path: Path) -> None:
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS, Nlvr2Config(swap=True))
    prepare = task._evaluation_pipeline().prepare
    shown: list[Shown[Statement]] = [prepare(record(tmp_path), seed) for seed in range(20)]
    assert {each.items[0].text for each in shown} == {"a left one, not a leftover"}


# -------------------------------------------------------------------------------------------------------- records


def read(extra: dict[str, Any], pictures: int = 2, image: str | None = None) -> list[Statement]:
    return ReadStatement(pictures)(Record("k", image, (), "7", extra))


def test_what_a_record_says() -> None:
    pair = {"images": ["a", "b"], "statement": "x"}
    assert read({**pair, "label": False, "identifier": "dev-12-0-1", "split": "dev"}) == [
        Statement("dev-12-0-1", "x", False, "dev-12-1", "dev")
    ]
    assert read({**pair, "identifier": "dev-12-0"}) == [Statement("dev-12-0", "x", None, "dev-12-x")]
    assert read({**pair, "label": "True"}) == [Statement("k", "x", True)]
    assert read({"statement": "x"}, 1, "a.jpg") == [Statement("k", "x", None)]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"images": ["a", "b"]}, "'statement' is missing"),
        ({"images": ["a", "b"], "statement": 3}, "'statement' must be a text"),
        ({"images": ["a", "b"], "statement": "x", "label": "maybe"}, "'label' must be true or false, got 'maybe'"),
        ({"images": ["a"], "statement": "x"}, "it shows 1 pictures, not 2"),
        ({"statement": "x"}, "it shows 0 pictures, not 2"),
    ],
)
def test_what_is_no_statement_about_a_pair(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(BrokenSample, match=f"k: .*{said}"):
        read(extra)


def test_single_pictures_and_pairs_are_told_apart(tokenizer: Tokenizer, build_model: Build) -> None:
    with pytest.raises(BrokenSample, match="it shows 1 pictures, not 2"):
        read({"statement": "x"}, 2, "a.jpg")
    with pytest.raises(BrokenSample, match="it shows 2 pictures, not 1"):
        read({"images": ["a", "b"], "statement": "x"}, 1)
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS)
    with pytest.raises(ValueError, match="show 1 pictures each, not 2"):
        make_batch(task)
    one, two = (Shown(torch.zeros(*shape, 3, 16, 16, dtype=torch.uint8), ITEMS[:1]) for shape in ((), (2,)))
    with pytest.raises(ValueError, match="show unlike things"):
        task.training_pipeline(PIXELS.test_transform(), 30, 20).collate([two, one])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variant": "both"}, "variant must be one of passes, merged, biattention, not 'both'"),
        ({"pictures": 3}, "pictures must be 1 or 2, not 3"),
        ({"pictures": 1, "variant": "merged"}, "merged is for two pictures"),
        ({"pictures": 1, "variant": "biattention"}, "biattention is for two pictures"),
        ({"pictures": 1, "swap": True}, "swap is for two pictures"),
        ({"pictures": 1, "picture_types": True}, "picture_types is for two pictures"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Nlvr2Config(**settings)


# --------------------------------------------------------------------------------------------- report and training


def test_the_report(tokenizer: Tokenizer, build_model: Build) -> None:
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS)
    items = [
        Statement("dev-1-0-0", "x", True, "dev-1-0", "dev"),
        Statement("dev-1-1-0", "x", False, "dev-1-0", "dev"),
        Statement("dev-2-0-0", "x", False, "dev-2-0", "dev"),
        Statement("k", "x", True, None, "test1"),
        Statement("dev-3-0-0", "x", None, "dev-3-0", "dev"),
    ]
    report = task.report(items, [True, True, False, True, False])
    assert report.scores == {"accuracy": 75.0, "dev": 66.6667, "test1": 100.0, "consistency": 50.0}
    assert report.credits == [1.0, 0.0, 1.0, 1.0]
    assert report.predictions[1] == {"identifier": "dev-1-1-0", "prediction": True}
    assert len(report.predictions) == 5
    json.dumps(report.predictions)
    assert task.report(items[3:4], [False]).scores == {"accuracy": 0.0, "test1": 0.0}
    assert task.report(items[4:], [False]).scores == {}


COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """All pairs of a red and a blue picture with the statements that the left, or the right, one is red."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    rows = [
        {"images": [f"{left}.png", f"{right}.png"], "statement": f"the {side} one is red", "label": red == "red"}
        for left in COLOURS
        for right in COLOURS
        for side, red in (("left", left), ("right", right))
    ]
    for number, row in enumerate(rows):
        row["identifier"] = f"dev-1-{number // 2}-{number % 2}"
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(folder / "list.jsonl")


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_which_picture_a_statement_means(
    variant: Variant, tokenizer: Tokenizer, build_model: Build, pairs: Source
) -> None:
    task = Nlvr2(build_model(tokenizer), tokenizer, PIXELS, Nlvr2Config(variant, swap=True, head_dropout=0.0)).eval()
    task.model.train_only(*task.uses)
    pipeline = task.training_pipeline(PIXELS.test_transform(), 30, 20)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    for step in range(90):
        batch = pipeline.collate([pipeline.prepare(one, step * 8 + row) for row, one in enumerate(pairs)])
        task(batch)["nlvr2"].backward()
        optimizer.step()
        optimizer.zero_grad()
    report = task.evaluate(pairs)
    assert report.scores == {"accuracy": 100.0, "consistency": 100.0}
    assert {entry["identifier"] for entry in report.predictions} == {
        f"dev-1-{pair}-{n}" for pair in range(4) for n in (0, 1)
    }
    assert task.evaluate(pairs, blank=True).scores["accuracy"] == 50.0


def test_pictures_of_the_shared_nlvr_are_read(shared: Path) -> None:
    folder = shared / "data" / "nlvr"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    source = open_source(folder / "dev.jsonl", image_root=folder / "images.tar")
    records = [record for _, record in zip(range(200), source, strict=False)]
    statements = [ReadStatement(1)(record)[0] for record in records]
    assert {one.label for one in statements} == {True, False}
    assert show(records[0], PIXELS.test_transform(), PIXELS.frames).shape == (3, 16, 16)
