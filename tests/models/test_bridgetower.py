"""BridgeTower against transformers' port with equal random weights, and its published sizes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.checkpoints.bridgetower_hf import port_config, port_state
from triptych.checkpoints.building import shapes_of
from triptych.models.bridgetower import SIZES, BridgeTower, BridgeTowerConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig

VOCABULARY = 70


def sizes(width: int, depth: int, fusion: int, heads: int, eps: float, **more: Any) -> BridgeTowerConfig:
    vision = VisionConfig(width, depth, width // 64, patch=8, image_size=32, interpolation="bicubic")
    activation = more.pop("activation", "gelu")
    text = TextConfig(VOCABULARY, width, heads, 90, 30, eps, 0.0, 0.0, activation, first_position=2)
    return BridgeTowerConfig(
        vision,
        text,
        text_layers=depth,
        fusion_layers=fusion,
        fusion_norm_eps=eps,
        contrast="projected",
        embed_dim=20,
        **more,
    )


CASES = {
    "add": sizes(64, 3, 3, 2, 1e-5),
    "add, eps 1e-12": sizes(128, 4, 2, 4, 1e-12),
    "one layer": sizes(64, 2, 1, 4, 1e-5),
    "scaled_add": sizes(128, 3, 2, 2, 1e-5, bridge="scaled_add"),
    "scaled_add, eps 1e-12": sizes(64, 3, 3, 4, 1e-12, bridge="scaled_add"),
    "interpolate": sizes(64, 5, 4, 1, 1e-5, bridge="interpolate", activation="quick_gelu"),
    "interpolate, eps 1e-12": sizes(64, 2, 2, 2, 1e-12, bridge="interpolate"),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model(request: pytest.FixtureRequest) -> BridgeTower:
    return random_model(request.param)


def random_model(config: BridgeTowerConfig) -> BridgeTower:
    """With every parameter away from its start, so that none can be ignored unnoticed."""
    torch.manual_seed(0)
    model = BridgeTower(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temperature":
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def port_of(model: BridgeTower, name: str) -> Any:
    """A class of the port with our weights. Its eager attention is right, its SDPA is not (spec: ``is_causal``)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BridgeTowerConfig(**port_config(model))
    port = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    prefix = "bridgetower." if name == "BridgeTowerModel" else ""
    state = {key.removeprefix(prefix): tensor for key, tensor in port_state(model)[0].items()}
    port.load_state_dict({key: state[key] for key in port.state_dict()})
    if hasattr(port, "mlm_score"):  # one eps for bridges and this norm; the official one is that of cross-modal layers
        port.mlm_score.transform.LayerNorm.eps = model.config.fusion_norm_eps
    return port


def inputs(side: int = 32) -> dict[str, Tensor]:
    """Three pictures and texts of different lengths, padded."""
    torch.manual_seed(1)
    ids_BL = torch.randint(4, VOCABULARY, (3, 9))
    mask_BL = torch.arange(9) < torch.tensor([9, 6, 2])[:, None]
    ids_BL = ids_BL.masked_fill(~mask_BL, 1)
    return {"input_ids": ids_BL, "attention_mask": mask_BL.long(), "pixel_values": torch.randn(3, 3, side, side)}


def ours(model: BridgeTower, given: dict[str, Tensor]) -> dict[str, Tensor]:
    image = model.encode_image(given["pixel_values"])
    text = model.encode_text(given["input_ids"], given["attention_mask"].bool())
    fused = model.fuse(image, text)
    return {
        "text_features": fused.text_BLD,
        "image_features": fused.image_BND,
        "pooler_output": fused.pooled_BP,
        "mlm": model.masked_logits(fused.text_BLD),
        "itm": model.match_logits(fused.pooled_BP),
        "text_embeds": model.embed_text(text),
        "image_embeds": model.embed_image(image),
        "cross_embeds": model.embed_pair(fused.pooled_BP),
    }


def assert_within(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_states_are_the_ports(model: BridgeTower) -> None:
    given = inputs()
    mine, theirs = ours(model, given), port_of(model, "BridgeTowerModel")(**given)
    for name in ("text_features", "image_features", "pooler_output"):
        assert_within(mine[name], theirs[name], 1e-5)


@torch.no_grad()
def test_single_levels_are_the_ports(model: BridgeTower) -> None:
    given = inputs()
    theirs = port_of(model, "BridgeTowerModel")(**given).hidden_states
    levels = model.text.levels(given["input_ids"], given["attention_mask"].bool(), model.config.text_layers)
    for mine, their in zip(levels, theirs[0][1:], strict=True):
        assert_within(mine, their, 1e-5)
    pictures = model.vision.levels(given["pixel_values"], model.config.vision.layers)
    for mine, their in zip(pictures, theirs[1][1:], strict=True):  # without ln_post, positions first
        assert_within(mine, model.vision.post_norm(their.transpose(0, 1)), 1e-5)


@torch.no_grad()
def test_heads_are_the_ports(model: BridgeTower) -> None:
    given = inputs()
    mine = ours(model, given)
    assert_within(mine["mlm"], port_of(model, "BridgeTowerForMaskedLM")(**given).logits, 1e-5)
    assert_within(mine["itm"], port_of(model, "BridgeTowerForImageAndTextRetrieval")(**given).logits, 1e-5)
    contrastive = port_of(model, "BridgeTowerForContrastiveLearning")(**given)
    for name in ("text_embeds", "image_embeds", "cross_embeds"):
        assert_within(mine[name], contrastive[name], 1e-5)


@torch.no_grad()
def test_the_pooled_state_alone_is_the_same(model: BridgeTower) -> None:
    given = inputs()
    image = model.encode_image(given["pixel_values"])
    text = model.encode_text(given["input_ids"], given["attention_mask"].bool())
    assert_within(model.pool(image, text), port_of(model, "BridgeTowerModel")(**given).pooler_output, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [24, 48])
def test_other_resolutions_are_the_ports(side: int) -> None:
    model = random_model(CASES["add"])
    given = inputs(side)
    theirs = port_of(model, "BridgeTowerModel")(**given, interpolate_pos_encoding=True)
    assert_within(ours(model, given)["image_features"], theirs.image_features, 1e-5)


def loss_of(name: str, mine: dict[str, Tensor], labels_BL: Tensor, temperature: Tensor) -> Tensor:
    """What each class of the port computes as its loss."""
    if name == "BridgeTowerForMaskedLM":
        return F.cross_entropy(mine["mlm"].flatten(0, 1), labels_BL.flatten())
    if name == "BridgeTowerForImageAndTextRetrieval":
        return F.cross_entropy(mine["itm"], torch.tensor([1, 0, 1]))
    text, image, cross = (mine[f"{part}_embeds"] for part in ("text", "image", "cross"))
    own = torch.arange(3)
    pairs = ((text, image), (text, cross), (image, cross))
    return torch.stack([F.cross_entropy(a @ b.T / temperature, own) for a, b in pairs]).mean()


@pytest.mark.parametrize(
    "name", ["BridgeTowerForMaskedLM", "BridgeTowerForImageAndTextRetrieval", "BridgeTowerForContrastiveLearning"]
)
@pytest.mark.parametrize("sized", ["add", "scaled_add, eps 1e-12", "interpolate"])
def test_gradients_are_the_ports(name: str, sized: str) -> None:
    model, given = random_model(CASES[sized]), inputs()
    port = port_of(model, name)
    labels_BL = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    asked = {
        "BridgeTowerForMaskedLM": {"labels": labels_BL},
        "BridgeTowerForImageAndTextRetrieval": {"labels": torch.tensor([1, 0, 1])},
        "BridgeTowerForContrastiveLearning": {"return_loss": True},
    }
    theirs = port(**given, **asked[name]).loss
    mine = loss_of(name, ours(model, given), labels_BL, model.temperature)
    assert_within(mine, theirs, 1e-5)
    theirs.backward()
    mine.backward()  # type: ignore[no-untyped-call]

    if name == "BridgeTowerForContrastiveLearning":  # logit_scale is minus the logarithm of the temperature
        assert model.temperature.grad is not None
        assert_within(-model.temperature.detach() * model.temperature.grad, port.logit_scale.grad, 1e-4)
    gradients = copy.deepcopy(model)  # gradients take the way of the weights into the port's names
    with torch.no_grad():
        for copied, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            copied.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    expected = port_state(gradients)[0]
    compared = 0
    for key, parameter in port.named_parameters():
        if key == "logit_scale" or parameter.grad is None:
            continue
        assert_within(expected[key], parameter.grad, 1e-4)
        compared += bool(parameter.grad.abs().max() > 1e-3)
    assert compared > 40


POOLER = {768: 590_592, 1024: 1_049_600}
"""Of the text encoder: in the port, never run, and not in ours."""


@pytest.mark.parametrize(
    ("size", "side", "parameters"),
    [
        ("base", 288, 326_347_008),
        ("base", 384, 326_540_544),
        ("base", 576, 327_093_504),
        ("large", 294, 864_514_048),
        ("large", 574, 865_783_808),
    ],
)
def test_published_sizes(size: str, side: int, parameters: int) -> None:
    config = SIZES[size]
    config = BridgeTowerConfig(
        vision=VisionConfig(**{**vars(config.vision), "image_size": side}),
        **{name: value for name, value in vars(config).items() if name != "vision"},
    )
    shapes = shapes_of(lambda: BridgeTower(config), "")
    heads = ("masked_head", "match_head", "image_embedding", "text_embedding", "temperature")
    count = dict.fromkeys(("network", *heads), 0)
    for name, shape in shapes.items():
        part = name.split(".")[0]
        count[part if part in heads else "network"] += torch.Size(shape).numel()
    network = count["network"] + POOLER[config.text.width]
    assert network == parameters
    if side not in (288, 294):
        return
    with_mlm, with_itm = {"base": (365_592_921, 326_350_082), "large": (917_087_321, 864_518_146)}[size]
    assert network + count["masked_head"] == with_mlm
    assert network + count["match_head"] == with_itm
    if size == "base":  # the official pre-training module: with the temperature and CLIP's left-overs
        assert network + count["masked_head"] + count["match_head"] + 1 + 39_424 + 1_024 == 365_636_444


@pytest.mark.parametrize(("size", "parameters"), [("base", 327_921_409), ("large", 866_612_737)])
def test_published_sizes_with_contrastive_heads(size: str, parameters: int) -> None:
    config = BridgeTowerConfig(**{**vars(SIZES[size]), "contrast": "projected", "embed_dim": 512})
    shapes = shapes_of(lambda: BridgeTower(config), "")
    count = sum(
        torch.Size(shape).numel() for name, shape in shapes.items() if not name.startswith(("masked_", "match_"))
    )
    assert count + POOLER[config.text.width] == parameters
