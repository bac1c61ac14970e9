"""Which parameter goes to which optimiser, at which rate, with which decay."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from triptych.data.tokenizers import train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.tasks.grounding import Grounding, GroundingConfig
from triptych.tasks.nlvr2 import Nlvr2, Nlvr2Config
from triptych.training.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate

CONFIG = OptimConfig(lr=1e-3, vision_lr=1e-4, warmup_steps=10, warmup_lr=0.0, min_lr=1e-5)


@pytest.fixture(scope="module")
def model() -> MPlug:
    vision = VisionConfig(width=16, layers=1, heads=2, patch=8, image_size=16, stem="convolution")
    text = TextConfig(vocab_size=40, width=24, heads=2, ffn=32, max_positions=16)
    return MPlug(MPlugConfig(vision, text, text_layers=1, fusion_layers=2, decoder_layers=1, stride=1, embed_dim=8))


def groups_of(model: nn.Module, config: OptimConfig) -> dict[str, tuple[str, float, float]]:
    """Name of every parameter -> (optimiser, peak rate, decay)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (type(part).__name__, group["peak_lr"], group["weight_decay"])
        for part in build_optimizer(model, config).parts
        for group in part.param_groups
        for parameter in group["params"]
    }


def test_every_parameter_is_in_one_group(model: MPlug) -> None:
    for config in (CONFIG, dataclasses.replace(CONFIG, muon_lr=0.02)):
        optimizer = build_optimizer(model, config)
        together = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(together) == sorted(id(parameter) for parameter in model.parameters())


def test_adamw_alone_without_a_rate_for_muon(model: MPlug) -> None:
    assert {optimiser for optimiser, _, _ in groups_of(model, CONFIG).values()} == {"AdamW"}


def test_muon_takes_the_matrices_of_layers(model: MPlug) -> None:
    found = groups_of(model, dataclasses.replace(CONFIG, muon_lr=0.02))
    assert found["text.blocks.0.ffn.expand.weight"] == ("Muon", 0.02, 0.02)
    assert found["vision.blocks.0.attention.query.weight"] == ("Muon", pytest.approx(0.002), 0.02)
    for name in (
        "text.embeddings.word.weight",
        "text.embeddings.position.weight",
        "decoder.embeddings.word.weight",
        "masked_head.word.weight",
        "vision.position_embedding",
        "vision.patch_embedding.0.weight",
        "text.embeddings.norm.weight",
        "text.blocks.0.ffn.expand.bias",
        "temperature",
    ):
        assert found[name][0] == "AdamW", name


def test_tables_of_tasks_are_not_for_muon(model: MPlug) -> None:
    """And vectors that are added to states do not decay, as the position table's."""
    tokenizer, config = train_wordpiece(["a red circle"] * 2, 40), dataclasses.replace(CONFIG, muon_lr=0.02)
    pixels = Preprocessing(16, HALF, HALF)
    statements = groups_of(Nlvr2(model, tokenizer, pixels, Nlvr2Config(picture_types=True)), config)
    assert statements["picture_types"] == ("AdamW", CONFIG.lr, 0.0)
    assert statements["head.expand.weight"] == ("Muon", 0.02, 0.02)
    phrases = groups_of(Grounding(model, tokenizer, pixels, GroundingConfig(bins=4)), config)
    assert phrases["coordinates.word.weight"] == ("AdamW", CONFIG.lr, 0.02)
    assert {name for name, (kind, _, _) in (statements | phrases).items() if kind == "Muon"} == {
        name
        for name in statements | phrases
        if name.startswith("head.") and name.endswith("weight") and "norm" not in name
    } | {f"model.{name}" for name, (kind, _, _) in groups_of(model, config).items() if kind == "Muon"}


def test_frozen_parameters_are_left_out(model: MPlug) -> None:
    frozen = model.match_head.requires_grad_(False)
    try:
        assert not any(name.startswith("match_head") for name in groups_of(model, CONFIG))
    finally:
        frozen.requires_grad_(True)


def test_decay_of_matrices_or_as_the_official_code(model: MPlug) -> None:
    ours = groups_of(model, CONFIG)
    official = groups_of(model, dataclasses.replace(CONFIG, decay="official"))
    decays = {
        "text.blocks.0.ffn.expand.weight": (True, True),
        "text.embeddings.norm.weight": (False, False),
        "text.blocks.0.ffn.expand.bias": (False, False),
        "vision.post_norm.weight": (False, True),
        "vision.class_embedding": (False, True),
        "vision.position_embedding": (False, True),
        "bridge.norm.weight": (False, True),
        "temperature": (False, True),
    }
    assert {name: (ours[name][2] > 0, official[name][2] > 0) for name in decays} == decays


def test_the_schedule() -> None:
    rates = [learning_rate(CONFIG, CONFIG.lr, step, 110, 110) for step in range(111)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(CONFIG.lr / 2)
    assert max(rates) == rates[10] == pytest.approx(CONFIG.lr)
    assert rates[60] == pytest.approx((CONFIG.lr + CONFIG.min_lr) / 2)
    assert rates[110] == pytest.approx(CONFIG.min_lr)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_an_epoch_of_the_official_schedule_has_one_rate() -> None:
    config = dataclasses.replace(CONFIG, schedule="epoch_cosine")
    rates = [learning_rate(config, 1.0, step, 40, 20) for step in range(40)]
    assert len(set(rates[10:20])) == len(set(rates[20:])) == 1
    assert rates[20] == pytest.approx(1e-5 + 0.5 * (1 - 1e-5) * (1 + math.cos(math.pi / 2)))


def test_a_straight_schedule() -> None:
    config = dataclasses.replace(CONFIG, schedule="linear")
    rates = [learning_rate(config, CONFIG.lr, step, 110, 110) for step in range(111)]
    assert max(rates) == rates[10] == pytest.approx(CONFIG.lr)
    assert rates[35] == pytest.approx(CONFIG.lr + 0.25 * (CONFIG.min_lr - CONFIG.lr))
    assert rates[110] == pytest.approx(CONFIG.min_lr)


def test_all_groups_follow_the_schedule(model: MPlug) -> None:
    config = dataclasses.replace(CONFIG, muon_lr=0.02)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, config, 5, 110, 110)
    assert {group["lr"] / group["peak_lr"] for group in optimizer.param_groups} == {0.5}


def test_a_saved_state_goes_on_as_if_never_saved() -> None:
    config = dataclasses.replace(CONFIG, vision_lr=None, muon_lr=0.05)

    def step(layer: nn.Linear, optimizer: object) -> None:
        layer(torch.eye(4)).square().sum().backward()
        optimizer.step()  # type: ignore[attr-defined]
        optimizer.zero_grad()  # type: ignore[attr-defined]

    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = build_optimizer(layer, config)
    step(layer, optimizer)
    other = nn.Linear(4, 4)
    other.load_state_dict(layer.state_dict())
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = layer.weight.detach().clone()
    step(layer, optimizer)
    step(other, resumed)
    assert not torch.equal(before, layer.weight)
    torch.testing.assert_close(dict(other.named_parameters()), dict(layer.named_parameters()), rtol=0, atol=0)


def test_a_state_of_other_optimisers_is_refused() -> None:
    layer = nn.Linear(4, 4)
    saved = build_optimizer(layer, CONFIG).state_dict()
    with pytest.raises(ValueError, match="1 optimisers does not fit 2"):
        build_optimizer(layer, dataclasses.replace(CONFIG, muon_lr=0.05)).load_state_dict(saved)
