"""EVE's masked signals: against a slow form, what each pass sees, what is hidden, and what trains.

Shape legend: B batch, C channels, H height, W width, N image tokens, L text tokens, P patches, K visible patches,
D width, V vocabulary, X selected tokens, Y numbers of a patch.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.batches import PretrainingBatch
from triptych.models import MODELS, build
from triptych.models.eve import Eve, EveConfig, HardRouter, PixelDecoderConfig
from triptych.models.moe import MoEConfig, Router
from triptych.models.protocol import Fused
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.objectives.distributed import StepNoise
from triptych.objectives.masked_language import mask_tokens
from triptych.objectives.masked_signal import (
    MaskedSignal,
    MaskedSignalConfig,
    normalise_patches,
    patches_of,
    picture_of,
    restore_patches,
    visible_patches,
)
from triptych.objectives.pretraining import TextIds

MakeBatch = Callable[..., PretrainingBatch]
BatchOf = Callable[..., PretrainingBatch]

IDS = TextIds(pad=0, mask=3, special=(0, 1, 2, 3), vocab_size=40)
MEAN, STD = (0.5, 0.4, 0.6), (0.5, 0.3, 0.4)
PIXELS, PATCH, PATCHES = 32, 8, 16
REPEATED = [1, 2, 1, 3, 2]
SMALLEST_DECODER = PixelDecoderConfig(width=16, layers=1, heads=2)


def eve(stem: str = "patch", decoder: PixelDecoderConfig | None = SMALLEST_DECODER, **changes: Any) -> Eve:
    """A network of width 32 on pictures of 16 patches, without dropout, its parameters stirred."""
    torch.manual_seed(0)
    vision = VisionConfig(32, layers=3, heads=2, patch=PATCH, image_size=PIXELS, layer_norm_eps=1e-6, stem=stem)
    text = TextConfig(40, 32, 2, 48, max_positions=20, layer_norm_eps=1e-6, dropout=0.0, attention_dropout=0.0)
    config = EveConfig(vision, text, deep_layers=1, moe=MoEConfig(experts=3), drop_path=0.0, embed_dim=16)
    model = Eve(dataclasses.replace(config, pixel_decoder=decoder, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def objective(model: nn.Module, seed: int = 5, **settings: Any) -> MaskedSignal:
    return MaskedSignal(model, MaskedSignalConfig(**settings), IDS, mean=MEAN, std=STD, seed=seed).train()


@pytest.fixture
def batch_of(make_batch: MakeBatch) -> BatchOf:
    """A batch of pictures with these ids."""

    def make(image_ids: list[int], seed: int = 2) -> PretrainingBatch:
        generator = torch.Generator().manual_seed(seed)
        pixels_BCHW = torch.randint(0, 256, (len(image_ids), 3, PIXELS, PIXELS), dtype=torch.uint8, generator=generator)
        batch = make_batch(len(image_ids), seed=seed, image_ids=image_ids)
        return dataclasses.replace(batch, pixels_BCHW=pixels_BCHW)

    return make


def gradients(task: MaskedSignal, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    task.zero_grad()
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def kept_patches(task: MaskedSignal, rows: int, step: int) -> Tensor:
    """Which patches a step shows, [B, K], in the slow way."""
    uniform_BP = StepNoise(task.seed, step, stream=2).uniform(rows, PATCHES, device=torch.device("cpu"))
    count = int(PATCHES * (1 - task.settings.image_ratio))
    return torch.tensor([sorted(sorted(range(PATCHES), key=row.__getitem__)[:count]) for row in uniform_BP.tolist()])


# --- values -------------------------------------------------------------------------------------------------------


def slow(task: MaskedSignal, batch: PretrainingBatch, step: int) -> dict[str, Tensor]:
    """MLM and MIM of a step, a pair at a time and without padding, sharing nothing but the random numbers."""
    model, settings = task.model, task.settings
    B, L = batch.text.ids_BL.shape
    masking = StepNoise(task.seed, step, stream=1).uniform(B, L, 3, device=torch.device("cpu")).tolist()
    words, errors = [], []
    for b, kept_K in enumerate(kept_patches(task, B, step)):
        channels = [(batch.pixels_BCHW[b, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)]
        picture_1CHW = torch.stack(channels)[None]
        ids_L = batch.text.ids_BL[b][batch.text.mask_BL[b]]
        corrupted_L, chosen = ids_L.clone(), []
        for x, token in enumerate(ids_L.tolist()):
            choose, action, random = masking[b][x]
            if token in IDS.special or choose >= settings.text_ratio:
                continue
            chosen.append(x)
            if settings.corruption == "mask" or action < 0.8:
                corrupted_L[x] = IDS.mask
            elif action < 0.9:
                corrupted_L[x] = int(random * IDS.vocab_size)
        whole = model.encode_image(picture_1CHW)
        visible = model.encode_visible(picture_1CHW, kept_K[None])
        both = settings.passes == "simultaneous"
        read = model.fuse(visible if both else whole, model.encode_text(corrupted_L[None]))
        seen = read if both else model.fuse(visible, model.encode_text(ids_L[None]))
        logits_LV = model.masked_logits(read.text_BLD[0])
        words += [F.cross_entropy(logits_LV[x], ids_L[x]) for x in chosen]
        painted_PY = model.paint(seen, kept_K[None], (4, 4))[0]
        for patch in set(range(PATCHES)) - set(kept_K.tolist()):
            top, left = PATCH * (patch // 4), PATCH * (patch % 4)
            colours_CYX = picture_1CHW[0, :, top : top + PATCH, left : left + PATCH]
            target_Y = torch.stack([colours_CYX[:, y, x] for y in range(PATCH) for x in range(PATCH)]).flatten()
            if settings.normalise_pixels:
                target_Y = (target_Y - target_Y.mean()) / (target_Y.var() + 1e-6).sqrt()
            errors.append(((painted_PY[patch] - target_Y) ** 2).mean())
    return {"mlm": torch.stack(words).mean(), "mim": torch.stack(errors).mean()}


CROSS = dataclasses.replace(SMALLEST_DECODER, cross_attention=True)


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({}, {}),
        ({"passes": "simultaneous", "image_ratio": 0.5}, {}),
        ({"normalise_pixels": True, "corruption": "mask", "text_ratio": 0.9}, {"stem": "convolution"}),
        ({"image_ratio": 0.9}, {"decoder": CROSS}),
    ],
    ids=["paper", "simultaneous", "normalised", "cross-attention"],
)
def test_the_step_equals_the_slow_one(settings: dict[str, Any], model: dict[str, Any], batch_of: BatchOf) -> None:
    task, batch = objective(eve(**model), **settings), batch_of(REPEATED)
    expected = slow(task, batch, 3)
    expected_grads = gradients(task, expected)
    found = task(batch, 3)
    assert list(found) == ["mlm", "mim"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(task, found).items():
        torch.testing.assert_close(
            grad, expected_grads[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_one_signal_is_a_half_of_both(batch_of: BatchOf) -> None:
    model, batch = eve(), batch_of(REPEATED)
    both = objective(model)(batch, 2)
    torch.testing.assert_close(objective(model, signals="text")(batch, 2), {"mlm": both["mlm"]})
    torch.testing.assert_close(objective(model, signals="image")(batch, 2), {"mim": both["mim"]})


def test_words_alone_are_learnt_by_any_network(batch_of: BatchOf) -> None:
    sizes = MODELS["bridgetower"].sizes["tiny"]
    text = dataclasses.replace(sizes.text, vocab_size=40)
    model = build(
        "bridgetower", dataclasses.replace(sizes, text=text, vision=dataclasses.replace(sizes.vision, image_size=32))
    )
    task = objective(model, signals="text", contrast="itc", matching="hard")
    losses = task(batch_of(REPEATED), 0)
    assert list(losses) == ["mlm", "itc", "itm"]
    assert gradients(task, losses).keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="this bridgetower has no pixel_decoder"):
        objective(model, signals="image")


# --- what each pass sees ------------------------------------------------------------------------------------------


def painted_from(task: MaskedSignal, batch: PretrainingBatch) -> tuple[Tensor, Tensor]:
    """The states that the decoder of pixels is given, [B, 1 + K, D], and the loss."""
    seen: list[Tensor] = []
    assert task.model.pixel_decoder is not None
    handle = task.model.pixel_decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = task(batch, 3)["mim"]
    handle.remove()
    return seen[0], loss


@pytest.mark.parametrize("stem", ["patch", "convolution"])
def test_hidden_pixels_are_not_seen_and_visible_ones_are(stem: str, batch_of: BatchOf) -> None:
    task, batch = objective(eve(stem), signals="image"), batch_of(REPEATED)
    before_BND, loss = painted_from(task, batch)
    assert before_BND.shape == (5, 1 + PATCHES // 4, 32)
    patches_BPY, kept_BK = patches_of(batch.pixels_BCHW, PATCH), kept_patches(task, 5, 3)
    kept_BP = torch.zeros(5, PATCHES, dtype=torch.bool).scatter(1, kept_BK, True)
    for changed_BP, seen in ((~kept_BP, False), (kept_BP, True)):
        other_BPY = torch.where(changed_BP[:, :, None], 255 - patches_BPY, patches_BPY)
        other = dataclasses.replace(batch, pixels_BCHW=picture_of(other_BPY, (4, 4), PATCH))
        after_BND, other_loss = painted_from(task, other)
        assert torch.equal(before_BND, after_BND) != seen
        assert not torch.isclose(other_loss, loss)  # the hidden ones count as what is to be painted


def test_targets_of_visible_patches_do_not_count(batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    task, batch = objective(eve(), signals="image"), batch_of(REPEATED)
    loss, paint = task(batch, 3)["mim"], task.model.paint

    def worse(fused: Fused, kept_BK: Tensor, grid: tuple[int, int]) -> Tensor:
        painted_BPY = paint(fused, kept_BK, grid)
        index_BKY = kept_BK[:, :, None].expand(-1, -1, painted_BPY.shape[2])
        return painted_BPY.scatter_add(1, index_BKY, torch.full(index_BKY.shape, 100.0))

    monkeypatch.setattr(task.model, "paint", worse)
    assert task(batch, 3)["mim"] == loss


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, [(1 + PATCHES, True), (1 + PATCHES // 4, False)]),
        ({"passes": "simultaneous", "image_ratio": 0.5}, [(1 + PATCHES // 2, True)]),
        ({"signals": "text"}, [(1 + PATCHES, True)]),
        ({"signals": "image"}, [(1 + PATCHES // 4, False)]),
    ],
)
def test_the_passes(
    settings: dict[str, Any], lengths: list[tuple[int, bool]], batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image tokens of each pass through the network, and whether its text is masked; text tokens are always text."""
    task, batch = objective(eve(), corruption="mask", **settings), batch_of(REPEATED)
    network = task.model.network
    assert isinstance(network.blocks[0].ffn, HardRouter)
    (router,) = (module for module in network.modules() if isinstance(module, Router))
    images: list[int] = []
    texts: list[int] = []
    tagged: list[Tensor] = []
    embedded: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: images.append(args[1]))
    network.blocks[0].ffn.text.register_forward_pre_hook(lambda _, args: texts.append(args[0].shape[1]))
    router.register_forward_pre_hook(lambda _, args: tagged.append(args[1]))
    task.model.text_embeddings.register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
    task(batch, 3)
    B, L = batch.text.ids_BL.shape
    assert images == [count for count, _ in lengths]
    assert texts == [L] * len(lengths)
    for (count, _), modality_S in zip(lengths, tagged, strict=True):
        assert modality_S.view(B, -1).tolist() == [[0] * count + [1] * L] * B
    assert [bool((ids_BL == IDS.mask).any()) for ids_BL in embedded] == [masked for _, masked in lengths]


def test_pictures_and_texts_are_encoded_once(batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = eve(), Counter()
    for name in ("encode_image", "encode_visible", "encode_text"):
        own = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *args, name=name, own=own: calls.update([name]) or own(*args))
    objective(model, contrast="itc", matching="hard")(batch_of(REPEATED), 0)
    assert calls == {"encode_image": 1, "encode_visible": 1, "encode_text": 2}


def test_special_tokens_and_padding_are_never_predicted(batch_of: BatchOf) -> None:
    task, batch = objective(eve(), text_ratio=1.0), batch_of(REPEATED)
    seen: list[int] = []
    task.model.masked_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    task(batch, 0)
    assert seen == [int((batch.text.ids_BL >= 4).sum())]


def test_clips_are_refused(batch_of: BatchOf) -> None:
    batch = batch_of(REPEATED)
    clips = dataclasses.replace(batch, pixels_BCHW=batch.pixels_BCHW[:, None].expand(-1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match="is for pictures, and these are clips: give data without videos"):
        objective(eve())(clips, 0)


def test_a_batch_of_which_nothing_is_chosen(batch_of: BatchOf) -> None:
    """By chance no token of a small batch is: its loss is 0, and every parameter still has a gradient."""
    task, batch = objective(eve(), text_ratio=1e-6), batch_of(REPEATED)
    losses = task(batch, 0)
    assert losses["mlm"] == 0
    assert task.measures["mlm_accuracy"] == 0
    assert gradients(task, losses).keys() == {name for name, p in task.model.named_parameters() if p.requires_grad}


# --- patches ------------------------------------------------------------------------------------------------------


@examples(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_patches_make_the_picture_again(batch: int, rows: int, columns: int, patch: int, seed: int) -> None:
    pixels_BCHW = torch.rand(batch, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(seed))
    patches_BPY = patches_of(pixels_BCHW, patch)
    assert patches_BPY.shape == (batch, rows * columns, 3 * patch * patch)
    assert torch.equal(picture_of(patches_BPY, (rows, columns), patch), pixels_BCHW)
    last_Y = pixels_BCHW[-1, :, -patch:, -patch:].permute(1, 2, 0).flatten()
    assert torch.equal(patches_BPY[-1, -1], last_Y)


def test_normalised_patches_and_back() -> None:
    patches_BPY = 3 * torch.randn(2, 5, 12) + torch.randn(2, 5, 1)
    normalised_BPY = normalise_patches(patches_BPY)
    torch.testing.assert_close(normalised_BPY.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised_BPY.var(-1), torch.ones(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(restore_patches(normalised_BPY, patches_BPY), patches_BPY)
    assert normalise_patches(torch.ones(1, 1, 12)).isfinite().all()  # a patch of one colour


@examples(deadline=None, max_examples=100)
@given(st.integers(2, 50), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_visible_patches(patches: int, ratio: float, seed: int) -> None:
    uniform_BP = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed))
    kept_BK = visible_patches(uniform_BP, ratio)
    assert 1 <= kept_BK.shape[1] < patches
    exact = patches * (1 - ratio)
    assert kept_BK.shape[1] in (1, patches - 1) or exact - 1 <= kept_BK.shape[1] <= exact + 1e-5
    assert (kept_BK.diff(dim=1) > 0).all()
    assert kept_BK.min() >= 0
    assert kept_BK.max() < patches
    hidden_BP = torch.ones_like(uniform_BP).scatter(1, kept_BK, 0.0).bool()
    assert (uniform_BP.masked_fill(hidden_BP, -1).amax(1) <= uniform_BP.masked_fill(~hidden_BP, 2).amin(1)).all()


@pytest.mark.parametrize(("patches", "ratio", "count"), [(196, 0.75, 49), (196, 0.5, 98), (100, 0.9, 10), (9, 0.75, 2)])
def test_how_many_patches_are_visible(patches: int, ratio: float, count: int) -> None:
    """As MAE, of whose product a rounding error may take one away: 100 (1 - 0.9) is 9.99..."""
    assert visible_patches(torch.rand(2, patches), ratio).shape == (2, count)


def test_a_single_patch_cannot_be_shown_in_part() -> None:
    with pytest.raises(ValueError, match="a picture of a single patch"):
        visible_patches(torch.rand(2, 1), 0.75)


def test_every_patch_is_as_often_visible(batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row of the batch, over steps; and what is visible is a function of seed, step and part alone."""
    model, batch = eve(), batch_of([1, 2])
    task, other = objective(model, signals="image"), objective(model, signals="image", seed=6)
    shown: list[Tensor] = []
    monkeypatch.setattr(model, "encode_visible", lambda _, kept_BK: shown.append(kept_BK))
    pixels_BCHW = batch.pixels_BCHW.float()

    def kept(task: MaskedSignal, step: int, part: int = 0) -> Tensor:
        task._hide_patches(pixels_BCHW, StepNoise(task.seed, step, part, stream=2))
        return shown[-1]

    steps = 600
    counts_BP = torch.zeros(2, PATCHES)
    for step in range(steps):
        counts_BP += F.one_hot(kept(task, step), PATCHES).sum(1)
    assert (counts_BP.sum(1) == steps * 4).all()
    expected = steps / 4
    assert ((counts_BP - expected).abs() < 5 * (expected * 0.75) ** 0.5).all()
    first = kept(task, 7)
    assert torch.equal(kept(task, 7), first)
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(shown, first) for shown in (kept(task, 8), kept(task, 7, 1), kept(other, 7)))


# --- randomness ---------------------------------------------------------------------------------------------------


def test_a_step_depends_on_seed_step_and_part_alone(batch_of: BatchOf) -> None:
    model, batch = eve(), batch_of(REPEATED)

    def losses(seed: int = 5, step: int = 1, part: int = 0) -> list[float]:
        task = objective(model, seed, contrast="itc", matching="random")
        return [loss.item() for name, loss in task(batch, step, part).items() if name != "itc"]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = losses()
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn elsewhere
    torch.manual_seed(1)
    assert losses() == first
    for other in (losses(seed=6), losses(step=2), losses(part=1)):
        assert all(one != same for one, same in zip(other, first, strict=True))


def test_the_same_tokens_are_chosen_however_they_are_corrupted() -> None:
    ids_BL = torch.randint(4, 40, (20, 30))
    masks = {}
    for corruption in ("bert", "mask"):
        masks[corruption] = mask_tokens(
            ids_BL,
            torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(1)),
            special=(0, 1, 2, 3),
            mask_id=3,
            vocab_size=40,
            probability=0.5,
            corruption=corruption,
        )
    (bert_BL, chosen_BL), (always_BL, same_BL) = masks["bert"], masks["mask"]
    assert torch.equal(chosen_BL, same_BL)
    assert torch.equal(always_BL == 3, chosen_BL)
    assert torch.equal(always_BL[~chosen_BL], ids_BL[~chosen_BL])
    assert not torch.equal(bert_BL, always_BL)


# --- settings -----------------------------------------------------------------------------------------------------

EVERY = [
    {"signals": signals, "passes": passes, "contrast": contrast, "matching": matching}
    for signals, passes, contrast, matching in itertools.product(
        ("both", "text", "image"), ("separate", "simultaneous"), ("none", "itc"), ("none", "random", "hard")
    )
    if not (passes == "simultaneous" and signals != "both") and not (matching == "hard" and contrast == "none")
]


@pytest.mark.parametrize("settings", EVERY, ids=lambda settings: "-".join(settings.values()))
def test_losses_and_gradients_of_every_combination(settings: dict[str, Any], batch_of: BatchOf) -> None:
    """What trains has a gradient, and nothing else: in several processes nothing may be left over."""
    model = eve()
    task = objective(model, **settings)
    losses = task(batch_of(REPEATED), 3)
    signals, contrast, matching = settings["signals"], settings["contrast"], settings["matching"]
    wanted = [("mlm", signals != "image"), ("mim", signals != "text"), ("itc", contrast == "itc")]
    wanted.append(("itm", matching != "none"))
    assert list(losses) == [name for name, there in wanted if there]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert set(task.measures) == {f"{name}_accuracy" for name in ("mlm", "itm") if name in losses}
    assert all(0 <= measure <= 1 for measure in task.measures.values())
    grads = gradients(task, losses)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained
    assert {name for name, grad in grads.items() if not grad.any()} == set()
    heads = {"masked_head": "mlm", "pixel_decoder": "mim", "image_projection": "itc", "temperature": "itc"}
    heads |= {"text_projection": "itc", "match_head": "itm"}
    own = {name.partition(".")[0] for name in trained}
    assert own == {"image_embeddings", "text_embeddings", "network"} | {
        head for head, loss in heads.items() if loss in losses
    }
    assert task.metric == ("mean" if {"itc", "itm"} & losses.keys() else "minus_loss")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching": "hard"}, "set contrast='itc' for matching='hard'"),
        ({"signals": "sound"}, "signals must be one of both, text, image, not 'sound'"),
        ({"passes": "three"}, "passes must be one of separate, simultaneous, not 'three'"),
        ({"corruption": "drop"}, "corruption must be one of bert, mask, not 'drop'"),
        ({"contrast": "cca"}, "contrast must be one of none, itc, not 'cca'"),
        ({"matching": "easy"}, "matching must be one of none, random, hard, not 'easy'"),
        ({"negatives": "some"}, "negatives must be one of all, local, not 'some'"),
        ({"image_ratio": 0.0}, "image_ratio must be between 0 and 1, not 0.0"),
        ({"image_ratio": 1.0}, "image_ratio must be between 0 and 1, not 1.0"),
        ({"text_ratio": 0.0}, r"text_ratio must be in \(0, 1\], not 0.0"),
        ({"text_ratio": 1.1}, r"text_ratio must be in \(0, 1\], not 1.1"),
        ({"passes": "simultaneous", "signals": "image"}, "passes='simultaneous' is for both, not image"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedSignalConfig(**settings)


def test_the_papers_settings_are_the_defaults() -> None:
    assert MaskedSignalConfig() == MaskedSignalConfig(
        "both", 0.75, 0.5, "separate", False, "bert", "none", "none", "all"
    )


def test_a_network_that_cannot_paint_is_refused() -> None:
    with pytest.raises(ValueError, match="this eve has no pixel_decoder to paint hidden patches with"):
        objective(eve(decoder=None))
    objective(eve(decoder=None), signals="text")


# --- evaluation and learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"passes": "simultaneous"}, {"signals": "text"}, {"signals": "image"}])
def test_evaluation_is_of_all_tokens_and_patches(settings: dict[str, Any], batch_of: BatchOf) -> None:
    """Means over everything, not over batches of different sizes; with the same things hidden every time."""
    task = objective(eve(), **settings)
    batches = [batch_of(REPEATED, seed=1), batch_of([7, 8], seed=2)]
    found = task.evaluate(batches)
    assert task.evaluate(iter(batches)) == found
    tokens, losses, right, errors = 0, 0.0, 0.0, []
    task.eval()
    for number, batch in enumerate(batches):
        chosen: list[int] = []
        handle = task.model.masked_head.register_forward_pre_hook(
            lambda _, args, chosen=chosen: chosen.append(len(args[0]))
        )
        step = {name: loss.item() for name, loss in task(batch, number).items()}
        handle.remove()
        if "mlm" in step:
            tokens += chosen[0]
            losses += step["mlm"] * chosen[0]
            right += float(task.measures["mlm_accuracy"]) * chosen[0]
        errors += [step["mim"]] * len(batch) if "mim" in step else []
    expected: dict[str, float] = {}
    if tokens:
        expected |= {"mlm": losses / tokens, "mlm_accuracy": 100 * right / tokens}
    if errors:
        expected["mim"] = sum(errors) / len(errors)
    expected["minus_loss"] = -sum(expected.get(name, 0.0) for name in ("mlm", "mim"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_evaluation_changes_nothing(batch_of: BatchOf) -> None:
    task = objective(eve(), contrast="itc")
    state = {name: value.clone() for name, value in task.state_dict().items()}
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    random = torch.get_rng_state()
    task.evaluate([batch_of(REPEATED)])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert {name for name, p in task.model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in task.parameters())
    assert task.measures == {}


def test_there_must_be_something_to_evaluate() -> None:
    with pytest.raises(ValueError, match="no picture with a caption to evaluate on"):
        objective(eve()).evaluate([])


def test_both_signals_are_learnt(batch_of: BatchOf) -> None:
    """Pictures of one colour and texts of one word, which are told by each other: other parts are hidden each step."""
    colours_V3 = torch.randint(0, 256, (4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    number_B = torch.arange(8) % 4
    batch = batch_of(list(range(8)))
    ids_BL = torch.where(batch.text.ids_BL >= 4, (number_B + 4)[:, None], batch.text.ids_BL)
    batch = dataclasses.replace(
        batch,
        pixels_BCHW=colours_V3[number_B][:, :, None, None].expand(-1, -1, PIXELS, PIXELS).contiguous(),
        text=dataclasses.replace(batch.text, ids_BL=ids_BL),
    )
    task = objective(eve())
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    losses: list[dict[str, float]] = []
    for step in range(40):
        found = task(batch, step)
        losses.append({name: loss.item() for name, loss in found.items()})
        optimizer.zero_grad()
        sum(found.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    for name in ("mlm", "mim"):
        first, last = (sum(loss[name] for loss in part) / 5 for part in (losses[:5], losses[-5:]))
        assert last < first / 2, name
