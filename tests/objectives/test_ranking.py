"""Ranking texts: false ones are never the picture's own, and the losses are those of their definition."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from triptych.data.batches import ImageTextBatch, Tokens
from triptych.models.mplug import MPlug, MPlugConfig
from triptych.models.text import TextConfig
from triptych.models.vision import VisionConfig
from triptych.objectives.ranking import RankingConfig, TextRanking, draw_false

HALF = (0.5, 0.5, 0.5)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7), st.integers(1, 9), st.integers(0, 1000))
def test_false_texts_are_different_and_of_other_pictures(pictures: list[int], count: int, seed: int) -> None:
    id_B = torch.tensor(pictures)
    uniform_BB = torch.rand(len(id_B), len(id_B), generator=torch.Generator().manual_seed(seed))
    false_BK, exists_BK = draw_false(id_B[:, None] == id_B, uniform_BB, count)
    for row, own in enumerate(pictures):
        others = [index for index, other in enumerate(pictures) if other != own]
        drawn = false_BK[row][exists_BK[row]].tolist()
        assert set(drawn) <= set(others)
        assert len(drawn) == len(set(drawn)) == min(count, len(others))


def test_all_others_are_as_likely() -> None:
    same_BB = torch.eye(4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(3000):
        false_BK, _ = draw_false(same_BB, torch.rand(4, 4, generator=generator), 2)
        counts[false_BK[0]] += 1
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:] / 3000, torch.full((3,), 2 / 3), atol=0.03, rtol=0)


def ranking(**config: int) -> TextRanking:
    torch.manual_seed(0)
    text = TextConfig(vocab_size=31, width=16, heads=2, ffn=24, max_positions=12, dropout=0.0, attention_dropout=0.0)
    vision = VisionConfig(16, layers=1, heads=2, patch=8, image_size=16)
    model = MPlug(MPlugConfig(vision, text, text_layers=1, fusion_layers=2, decoder_layers=1, stride=1, embed_dim=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TextRanking(model, RankingConfig(**config), mean=HALF, std=HALF)


@pytest.fixture
def batch() -> ImageTextBatch:
    torch.manual_seed(1)
    mask_BL = torch.arange(6) < torch.tensor([6, 4, 5, 6])[:, None]
    pixels_BCHW = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    tokens = Tokens(torch.randint(4, 31, (4, 6)), mask_BL)
    return ImageTextBatch(pixels_BCHW, tokens, torch.tensor([7, 8, 7, 9]))


def test_the_losses_are_those_of_every_pair_alone(batch: ImageTextBatch) -> None:
    """With more false texts than the batch has, which ones are drawn does not matter to ``rank``."""
    task = ranking(false_texts=9)
    model = task.model
    losses = task(batch, 0)

    def logits(picture: int, text: int) -> torch.Tensor:
        pixels_BCHW = (batch.pixels_BCHW[picture : picture + 1].float() / 255 - 0.5) / 0.5
        length = int(batch.text.mask_BL[text].sum())
        encoded = model.encode_text(batch.text.ids_BL[text : text + 1, :length])
        return model.match_logits(model.fuse(model.encode_image(pixels_BCHW), encoded).pooled_BP)[0]

    others = {0: [1, 3], 1: [0, 2, 3], 2: [1, 3], 3: [0, 1, 2]}
    expected = []
    for picture, false in others.items():
        scores = torch.stack([logits(picture, text)[1] for text in (picture, *false)])
        expected.append(-scores.log_softmax(0)[0])
    torch.testing.assert_close(losses["rank"], torch.stack(expected).mean())
    own = [F.cross_entropy(logits(picture, picture)[None], torch.tensor([1])) for picture in range(4)]
    assert losses["itm"] > torch.stack(own).mean() / 2


def test_the_matching_loss_has_a_match_and_a_false_text(batch: ImageTextBatch) -> None:
    task = ranking(false_texts=1)
    with torch.no_grad():
        task.model.match_head.weight.zero_()
        task.model.match_head.bias.copy_(torch.tensor([0.0, 1.0]))
    matched, unmatched = F.softplus(torch.tensor(-1.0)), F.softplus(torch.tensor(1.0))
    torch.testing.assert_close(task(batch, 0)["itm"], (matched + unmatched) / 2)


def test_false_texts_depend_on_the_step_alone(batch: ImageTextBatch) -> None:
    task = ranking(false_texts=1)
    losses = [task(batch, step)["rank"].item() for step in (0, 0, 1, 2, 3)]
    assert losses[0] == losses[1]
    assert len(set(losses)) > 2


def test_a_batch_of_one_picture_has_nothing_to_rank(batch: ImageTextBatch) -> None:
    alone = dataclasses.replace(batch, image_id_B=torch.full((4,), 7))
    losses = ranking()(alone, 0)
    assert losses["rank"] == 0
    assert losses["itm"].isfinite()


def test_only_what_it_uses_is_trained(batch: ImageTextBatch) -> None:
    task = ranking()
    sum(task(batch, 0).values()).backward()
    for name, parameter in task.model.named_parameters():
        used = name.partition(".")[0] in {"vision", "text", "fusion", "match_head"}
        assert parameter.requires_grad == used, name
        assert (parameter.grad is not None) == used, name


def test_out_of_range() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RankingConfig(false_texts=0)
