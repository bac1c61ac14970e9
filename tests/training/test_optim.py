"""Which parameter goes to which optimiser, at which rate, with which decay."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from triptych.data.tokenizers import train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.models import eve
from triptych.models.bridgetower import SIZES, BridgeTower
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.protocol import VisionLanguageModel
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.objectives.alignment import Alignment, AlignmentConfig
from triptych.tasks.grounding import Grounding, GroundingConfig
from triptych.tasks.nlvr2 import Nlvr2, Nlvr2Config
from triptych.tasks.vqa import VisualQuestionAnswering, VqaConfig
from triptych.training.loop import TrainConfig, Trainer
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


BRIDGETOWER = OptimConfig(
    lr=1e-5, vision_lr=None, fusion_lr=5e-5, head_lr=5e-4, weight_decay=0.01, decay="official", clip=None
)


def narrow_bridgetower(**changes: object) -> BridgeTower:
    """The layers of the base size, eight numbers wide."""
    base = SIZES["base"]
    vision = dataclasses.replace(base.vision, width=8, heads=2, image_size=32)
    text = dataclasses.replace(base.text, width=8, heads=2, ffn=16, vocab_size=40, max_positions=16)
    return BridgeTower(dataclasses.replace(base, vision=vision, text=text, embed_dim=8, **changes))


def both(official: str, ours: str) -> dict[str, list[str]]:
    return {f"{official}.{name}": [f"{ours}.{name}"] for name in ("weight", "bias")}


def bert_layer(official: str, ours: str, *, cross: bool) -> dict[str, list[str]]:
    """A layer of RoBERTa, or a cross-modal one: official name -> ours, where keys and values are one matrix."""
    names: dict[str, list[str]] = {}
    attentions = {"attention": ("attention", "attention_norm")}
    if cross:
        attentions["crossattention"] = ("cross_attention", "cross_norm")
    for theirs, (attention, norm) in attentions.items():
        names |= both(f"{official}.{theirs}.self.query", f"{ours}.{attention}.query")
        names |= both(f"{official}.{theirs}.self.key", f"{ours}.{attention}.key_value")
        names |= both(f"{official}.{theirs}.self.value", f"{ours}.{attention}.key_value")
        names |= both(f"{official}.{theirs}.output.dense", f"{ours}.{attention}.out")
        names |= both(f"{official}.{theirs}.output.LayerNorm", f"{ours}.{norm}")
    names |= both(f"{official}.intermediate.dense", f"{ours}.ffn.expand")
    names |= both(f"{official}.output.dense", f"{ours}.ffn.contract")
    return names | both(f"{official}.output.LayerNorm", f"{ours}.ffn_norm")


def clip_layer(number: int) -> dict[str, list[str]]:
    official, ours = f"vit_model.visual.transformer.resblocks.{number}", f"vision.blocks.{number}"
    names = both(f"{official}.attn.out_proj", f"{ours}.attention.out")
    for kind in ("weight", "bias"):
        names[f"{official}.attn.in_proj_{kind}"] = [
            f"{ours}.attention.{name}.{kind}" for name in ("query", "key_value")
        ]
    for theirs, mine in {
        "ln_1": "attention_norm",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn.expand",
        "mlp.c_proj": "ffn.contract",
    }.items():
        names |= both(f"{official}.{theirs}", f"{ours}.{mine}")
    return names


def official_names() -> dict[str, list[str]]:
    """Every parameter of the official base model with its VQA classifier -> ours."""
    embeddings = "text_transformer.embeddings"
    names = {
        "vit_model.visual.conv1.weight": ["vision.patch_embedding.weight"],
        "vit_model.visual.class_embedding": ["vision.class_embedding"],
        "vit_model.visual.positional_embedding": ["vision.position_embedding"],
        f"{embeddings}.word_embeddings.weight": ["text.embeddings.word.weight"],
        f"{embeddings}.position_embeddings.weight": ["text.embeddings.position.weight"],
        f"{embeddings}.token_type_embeddings.weight": ["text.embeddings.segment"],
        "token_type_embeddings.weight": ["image_projection.token_type", "text_projection.token_type"],
        "temperature": ["temperature"],
        "mlm_score.decoder.weight": ["masked_head.word.weight"],
        "mlm_score.bias": ["masked_head.head.bias"],
    }
    for theirs, ours in {
        "vit_model.visual.ln_pre": "vision.pre_norm",
        "vit_model.visual.ln_post": "vision.post_norm",
        f"{embeddings}.LayerNorm": "text.embeddings.norm",
        "mlm_score.transform.dense": "masked_head.head.transform",
        "mlm_score.transform.LayerNorm": "masked_head.head.norm",
        "itm_score.fc": "match_head",
    }.items():
        names |= both(theirs, ours)
    for number in range(12):
        names |= clip_layer(number)
        names |= bert_layer(f"text_transformer.encoder.layer.{number}", f"text.blocks.{number}", cross=False)
    for side in ("text", "image"):
        names |= both(f"cross_modal_{side}_transform", f"{side}_projection.linear")
        names |= both(f"cross_modal_{side}_layernorm", f"fusion.{side}_norm")
        names |= both(f"cross_modal_{side}_pooler.dense", f"{side}_pooler.linear")
        names |= both(f"itc_{side}_head.fc", f"{side}_embedding")
        for number in range(5):
            official, ours = f"cross_modal_{side}_link_tower.{number}.LayerNorm", f"fusion.{side}_bridges.{number}.norm"
            names |= both(official, ours)
        for number in range(6):
            official, ours = f"cross_modal_{side}_layers.{number}", f"fusion.layers.{number}.{side}_block"
            names |= bert_layer(official, ours, cross=True)
    names = {official: [f"model.{name}" for name in ours] for official, ours in names.items()}
    for number, ours in {0: "expand", 1: "norm", 3: "classify"}.items():
        names |= both(f"vqa_classifier.{number}", f"head.{ours}")
    return names


def official_group(name: str) -> tuple[float, float]:
    """Rate and decay by the official rules on names (``meter_utils.py:265-356``)."""
    spared = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
    heads = ("vqa_classifier", "mlm_score", "itm_score", "itc_text_head", "itc_image_head")
    rate = 1e-5
    if any(part in name for part in heads):
        rate = 5e-4
    elif "cross_modal" in name:
        rate = 5e-5
    return rate, 0.0 if any(part in name for part in spared) else 0.01


def test_bridgetower_has_the_official_groups() -> None:
    tokenizer = train_wordpiece(["a red circle"] * 2, 40)
    config = VqaConfig("classify", answers=("red", "blue"))
    task = VisualQuestionAnswering(narrow_bridgetower(), tokenizer, Preprocessing(32), config)
    expected = {ours: official_group(official) for official, names in official_names().items() for ours in names}
    found = {name: group[1:] for name, group in groups_of(task, BRIDGETOWER).items()}
    assert found.keys() == expected.keys()
    assert {name: group for name, group in found.items() if group != pytest.approx(expected[name])} == {}
    # What one might expect to be otherwise (specification 2.3).
    assert found["model.vision.blocks.0.attention_norm.weight"] == (1e-5, 0.01)
    assert found["head.norm.weight"] == (5e-4, 0.01)
    assert found["model.fusion.image_norm.weight"] == (5e-5, 0.0)


def eve_names(experts: int) -> dict[str, str]:
    """Every parameter of the released base backbone with its VQA classifier -> ours."""
    names = {
        "class_embedding_vision": "image_embeddings.class_embedding",
        "pos_embed_vision": "image_embeddings.position_embedding",
        "type_embed_vision": "image_embeddings.token_type",
        "patch_embed.weight": "image_embeddings.patch_embedding.weight",
        "patch_embed.bias": "image_embeddings.patch_embedding.bias",
        "word_embedding.weight": "text_embeddings.word.weight",
        "pos_embed_text": "text_embeddings.position_embedding",
        "type_embed_text": "text_embeddings.token_type",
    }

    def add(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")})

    add("layer_norm_text", "text_embeddings.norm")
    add("pre_layrnorm", "network.pre_norm")
    add("norm", "network.norm")
    for number in range(12):
        theirs, ours = f"encoder.layers.{number}", f"network.blocks.{number}"
        add(f"{theirs}.norm1", f"{ours}.attention_norm")
        add(f"{theirs}.attn.proj", f"{ours}.attention.out")
        names |= {
            f"{theirs}.attn.qkv.weight": f"{ours}.attention.query.weight",  # and of keys and values
            f"{theirs}.attn.q_bias": f"{ours}.attention.query.bias",
            f"{theirs}.attn.v_bias": f"{ours}.attention.value_bias",
            f"{theirs}.gamma_1": f"{ours}.attention_scale",
            f"{theirs}.gamma_2": f"{ours}.ffn_scale",
        }
        if number < 10:
            for own, modality in (("imag", "image"), ("text", "text")):
                add(f"{theirs}.norm2_{own}", f"{ours}.ffn.{modality}.norm")
                add(f"{theirs}.mlp_{own}.fc1", f"{ours}.ffn.{modality}.ffn.expand")
                add(f"{theirs}.mlp_{own}.fc2", f"{ours}.ffn.{modality}.ffn.contract")
            continue
        add(f"{theirs}.norm2_vl", f"{ours}.ffn.norm")
        names[f"{theirs}.mlp_moe.moe.gate.wg.weight"] = f"{ours}.ffn.moe.router.gate.weight"
        names[f"{theirs}.mlp_moe.moe.vision_embed"] = f"{ours}.ffn.moe.router.modality"
        for expert in range(experts):
            for theirs_layer, our_layer in (("fc1", "expand"), ("fc2", "contract")):
                own = f"{theirs}.mlp_moe.moe.experts.experts.{expert}.{theirs_layer}"
                names[f"{own}.weight"] = f"{ours}.ffn.moe.experts.{our_layer}"
                names[f"{own}.bias"] = f"{ours}.ffn.moe.experts.{our_layer}_bias"
    names = {f"backbone.{theirs}": f"model.{ours}" for theirs, ours in names.items()}
    for number, ours in {0: "expand", 1: "norm", 3: "classify"}.items():
        names |= {f"output.{number}.{kind}": f"head.{ours}.{kind}" for kind in ("weight", "bias")}
    return names


def eve_group(name: str) -> tuple[float, float]:
    """Rate and decay by the released rules on names (ssyze/EVE ``optim.py``); what a task adds has ten times the rate.

    Only ends in "norm", "norm1" and "norm2" are spared, and no name of a modality ends so.
    """
    spared = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
    return 3e-4 if name.startswith("output.") else 3e-5, 0.0 if any(part in name for part in spared) else 0.01


def test_eve_has_the_released_groups() -> None:
    base = eve.SIZES["base"]
    vision = dataclasses.replace(base.vision, width=8, heads=2, image_size=32)
    text = dataclasses.replace(base.text, width=8, heads=2, ffn=16, vocab_size=40, max_positions=16)
    moe = dataclasses.replace(base.moe, experts=3)
    network = eve.Eve(dataclasses.replace(base, vision=vision, text=text, moe=moe, embed_dim=8))
    config = VqaConfig("classify", answers=("red", "blue"))
    tokenizer = train_wordpiece(["a red circle"] * 2, 40)
    task = VisualQuestionAnswering(network, tokenizer, Preprocessing(32), config)
    task.freeze_rest()
    optim = OptimConfig(lr=3e-5, vision_lr=None, head_lr=3e-4, weight_decay=0.01, decay="official")
    found = {name: group[1:] for name, group in groups_of(task, optim).items()}
    expected = {ours: eve_group(theirs) for theirs, ours in eve_names(moe.experts).items()}
    with_keys = {name for name in found if name.endswith("attention.key_value.weight")}
    assert found.keys() - with_keys == expected.keys()
    expected |= dict.fromkeys(with_keys, (3e-5, 0.01))
    assert {name: group for name, group in found.items() if group != pytest.approx(expected[name])} == {}
    # What one might expect to be otherwise.
    assert found["model.network.blocks.0.ffn.image.norm.weight"][1] == 0.01
    assert found["model.text_embeddings.norm.weight"][1] == 0.01
    assert found["model.network.pre_norm.weight"][1] == 0.0


def test_groups_that_the_published_network_lacks() -> None:
    """METER's gates are at the base rate (``meter_module.py:118``), bridges and a decoder at that of the fusion."""
    meter = groups_of(narrow_bridgetower(bridged_layers=0, gather_layers=True, decoder_layers=1), BRIDGETOWER)
    assert meter["image_projection.gate.weight"][1] == 1e-5
    assert meter["decoder.blocks.0.ffn.expand.weight"][1] == pytest.approx(5e-5)
    weighted = groups_of(narrow_bridgetower(bridge="weighted"), BRIDGETOWER)
    assert weighted["fusion.image_bridges.0.share"][1] == pytest.approx(5e-5)
    tokenizer = train_wordpiece(["a red circle"] * 2, 40)
    pairs = groups_of(
        Nlvr2(narrow_bridgetower(), tokenizer, Preprocessing(32), Nlvr2Config(picture_types=True)), BRIDGETOWER
    )
    assert pairs["picture_types"][1:] == (1e-5, 0.01)
    assert pairs["head.expand.weight"][1] == pytest.approx(5e-4)


def test_rates_of_fusion_and_heads_of_mplug(model: MPlug) -> None:
    """Its projections are heads (of ITC), those of BridgeTower lead to the fusion; attention to a second picture is
    the fusion's, too."""
    config = dataclasses.replace(CONFIG, fusion_lr=5e-3, head_lr=1e-2)
    tokenizer = train_wordpiece(["a red circle"] * 2, 40)
    rates = {
        name: group[1]
        for name, group in groups_of(
            Nlvr2(model, tokenizer, Preprocessing(16, HALF, HALF), Nlvr2Config("merged")), config
        ).items()
    }
    expected = {
        "model.vision.position_embedding": 1e-4,
        "model.bridge.norm.weight": 1e-3,
        "model.text.blocks.0.ffn.expand.weight": 1e-3,
        "model.temperature": 1e-3,
        "model.fusion.layers.0.block.ffn.expand.weight": 5e-3,
        "model.decoder.embeddings.word.weight": 5e-3,
        "second_attention.0.query.weight": 5e-3,
        "model.image_projection.weight": 1e-2,
        "model.masked_head.word.weight": 1e-2,
        "model.match_head.bias": 1e-2,
        "head.classify.weight": 1e-2,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_a_teacher_changes_no_rate(model: MPlug) -> None:
    config = dataclasses.replace(CONFIG, fusion_lr=5e-3, head_lr=1e-2)
    plain = groups_of(Alignment(model, AlignmentConfig(0, None, 0.0), mean=HALF, std=HALF), config)
    taught = groups_of(Alignment(model, AlignmentConfig(), mean=HALF, std=HALF), config)
    model.requires_grad_(True)
    assert taught == plain


def test_muon_follows_the_rates_of_fusion_and_heads(model: VisionLanguageModel) -> None:
    found = groups_of(model, dataclasses.replace(CONFIG, fusion_lr=5e-3, head_lr=1e-2, muon_lr=0.02))
    assert found["text.blocks.0.ffn.expand.weight"][:2] == ("Muon", 0.02)
    assert found["vision.blocks.0.attention.query.weight"][:2] == ("Muon", pytest.approx(0.002))
    assert found["decoder.blocks.0.ffn.expand.weight"][:2] == ("Muon", pytest.approx(0.1))
    assert found["masked_head.head.transform.weight"][:2] == ("Muon", pytest.approx(0.2))


def test_without_rates_of_their_own_fusion_and_heads_make_no_group(model: MPlug) -> None:
    """So that the states of earlier runs fit; and the first group, whose rate is logged, is at the base rate."""
    rates = [group["peak_lr"] for group in build_optimizer(model, CONFIG).param_groups]
    assert rates == [CONFIG.lr, CONFIG.lr, CONFIG.vision_lr, CONFIG.vision_lr]
    first = build_optimizer(model, dataclasses.replace(CONFIG, fusion_lr=5e-3, head_lr=1e-2)).param_groups[0]
    assert first["peak_lr"] == CONFIG.lr


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


class Slope(nn.Module):
    """Its loss falls by 3 and 4 for each of two weights, so that its gradient is 5 long."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.kept = nn.Identity()

    def forward(self, batch: Tensor, step: int, part: int) -> dict[str, Tensor]:
        return {"slope": self.weight @ batch}


class Slopes:
    skipped_count = 0

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(torch.tensor([3.0, 4.0]))

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        pass


@pytest.mark.parametrize(("clip", "gradient"), [(None, (3.0, 4.0)), (10.0, (3.0, 4.0)), (1.0, (0.6, 0.8))])
def test_gradients_are_cut_or_not(clip: float | None, gradient: tuple[float, float], tmp_path: Path) -> None:
    """What AdamW's first step makes of a gradient g, g / (g + eps), shows it where eps is large."""
    task = Slope()
    optim = OptimConfig(lr=1.0, vision_lr=None, warmup_steps=0, weight_decay=0.0, eps=1.0, clip=clip)
    Trainer(task, Slopes(), tmp_path, TrainConfig(steps=1, batch_size=1, precision="fp32"), optim).run()
    assert task.weight.tolist() == pytest.approx([-g / (g + 1) for g in gradient], rel=1e-4)
