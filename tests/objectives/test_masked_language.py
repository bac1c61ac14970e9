"""Which tokens are masked, with what, and the two distillation losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from triptych.objectives.masked_language import distillation, mask_tokens, sequence_distillation

PAD, CLS, MASK, VOCAB = 0, 1, 3, 50


def mask(ids_BL: Tensor, uniform_BL3: Tensor, probability: float = 0.15) -> tuple[Tensor, Tensor]:
    return mask_tokens(ids_BL, uniform_BL3, special=(PAD, CLS), mask_id=MASK, vocab_size=VOCAB, probability=probability)


def test_rates() -> None:
    total = 200_000
    ids_BL = torch.full((200, 1000), 7)
    masked_BL, chosen_BL = mask(ids_BL, torch.rand(200, 1000, 3))
    chosen = int(chosen_BL.sum())
    assert abs(chosen - 0.15 * total) < 5 * math.sqrt(total * 0.15 * 0.85)
    assert torch.equal(masked_BL[~chosen_BL], ids_BL[~chosen_BL])
    new_X = masked_BL[chosen_BL]
    shares = {"mask": (new_X == MASK), "kept": new_X == 7, "random": (new_X != MASK) & (new_X != 7)}
    # A random token is the mask or the old one twice in VOCAB times.
    expected = {"mask": 0.8 + 0.1 / VOCAB, "kept": 0.1 + 0.1 / VOCAB, "random": 0.1 * (1 - 2 / VOCAB)}
    for name, share in expected.items():
        assert abs(int(shares[name].sum()) - share * chosen) < 5 * math.sqrt(chosen * share * (1 - share)), name
    drawn_V = torch.bincount(new_X[shares["random"]], minlength=VOCAB)
    assert len(drawn_V) == VOCAB
    assert set((drawn_V == 0).nonzero().flatten().tolist()) == {MASK, 7}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_special_tokens_are_never_touched(seed: int, probability: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(0, 6, (4, 9), generator=generator)
    uniform_BL3 = torch.rand(4, 9, 3, generator=generator)
    masked_BL, chosen_BL = mask(ids_BL, uniform_BL3, probability)
    special_BL = (ids_BL == PAD) | (ids_BL == CLS)
    assert not (chosen_BL & special_BL).any()
    assert torch.equal(chosen_BL, (uniform_BL3[..., 0] < probability) & ~special_BL)
    assert torch.equal(masked_BL[~chosen_BL], ids_BL[~chosen_BL])
    assert ((masked_BL >= 0) & (masked_BL < VOCAB)).all()


@pytest.mark.parametrize(
    ("uniform", "expected", "chosen"),
    [
        ((0.15, 0.0, 0.0), 7, False),
        ((0.1499, 0.0, 0.0), MASK, True),
        ((0.0, 0.7999, 0.5), MASK, True),
        ((0.0, 0.8, 0.5), 25, True),
        ((0.0, 0.8999, 0.0), 0, True),
        ((0.0, 0.8999, 1 - 2**-24), VOCAB - 1, True),
        ((0.0, 0.9, 0.5), 7, True),
        ((0.0, 1 - 2**-24, 0.5), 7, True),
    ],
)
def test_edges(uniform: tuple[float, float, float], expected: int, chosen: bool) -> None:
    masked_BL, chosen_BL = mask(torch.tensor([[7]]), torch.tensor([[uniform]]))
    assert masked_BL.item() == expected
    assert chosen_BL.item() == chosen


def test_nothing_and_everything() -> None:
    ids_BL = torch.randint(4, VOCAB, (3, 5))
    for probability, expected in ((0.0, False), (1.0, True)):
        _, chosen_BL = mask(ids_BL, torch.rand(3, 5, 3), probability)
        assert (chosen_BL == expected).all()
    _, chosen_BL = mask_tokens(ids_BL, torch.rand(3, 5, 3), special=(), mask_id=3, vocab_size=VOCAB, probability=1.0)
    assert chosen_BL.all()


def test_ids_are_not_changed_in_place() -> None:
    ids_BL = torch.randint(4, VOCAB, (3, 5))
    before = ids_BL.clone()
    mask(ids_BL, torch.zeros(3, 5, 3))
    assert torch.equal(ids_BL, before)


def test_distillation_equals_a_loop() -> None:
    logits_XV, teacher_XV = torch.randn(4, 6), 2 * torch.randn(4, 6)
    for found, logits, teacher in zip(distillation(logits_XV, teacher_XV), logits_XV, teacher_XV, strict=True):
        wanted = [math.exp(t) for t in teacher.tolist()]
        given = [math.exp(x) for x in logits.tolist()]
        expected = -sum(w / sum(wanted) * math.log(g / sum(given)) for w, g in zip(wanted, given, strict=True))
        assert float(found) == pytest.approx(expected, abs=1e-5)


def test_distillation_from_a_certain_teacher_is_cross_entropy() -> None:
    logits_XV, labels_X = torch.randn(5, 6), torch.randint(0, 6, (5,))
    certain_XV = 1e4 * F.one_hot(labels_X, 6).float()
    expected_X = F.cross_entropy(logits_XV, labels_X, reduction="none")
    torch.testing.assert_close(distillation(logits_XV, certain_XV), expected_X)
    infinite_XV = torch.where(F.one_hot(labels_X, 6).bool(), 0.0, -math.inf)
    torch.testing.assert_close(distillation(logits_XV, infinite_XV), expected_X)


def test_distillation_is_least_for_the_teacher_itself() -> None:
    teacher_XV = torch.randn(5, 6)
    entropy_X = torch.distributions.Categorical(logits=teacher_XV).entropy()
    torch.testing.assert_close(distillation(teacher_XV + 3.0, teacher_XV), entropy_X)
    assert (distillation(torch.randn(5, 6), teacher_XV) > entropy_X).all()


def test_official_distillation_normalises_over_the_sequence() -> None:
    logits_BLV, teacher_BLV = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    found_BL = sequence_distillation(logits_BLV, teacher_BLV)
    for b in range(2):
        for position in range(3):
            expected = 0.0
            for v in range(4):
                share = math.exp(teacher_BLV[b, position, v]) / sum(math.exp(x) for x in teacher_BLV[b, position])
                over_sequence = sum(math.exp(logits_BLV[b, k, v]) for k in range(3))
                expected -= share * math.log(math.exp(logits_BLV[b, position, v]) / over_sequence)
            assert float(found_BL[b, position]) == pytest.approx(expected, abs=1e-5)


def test_bf16_is_computed_in_fp32() -> None:
    logits_XV = torch.randn(4, 6).bfloat16()
    assert distillation(logits_XV, logits_XV).dtype == torch.float32
    assert sequence_distillation(logits_XV[None], logits_XV[None]).dtype == torch.float32
