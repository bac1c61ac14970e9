import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.metrics import significance
from triptych.metrics.significance import McNemar, mcnemar, paired_bootstrap


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 0, 2 / 2**5),
        (1, 9, 2 * (1 + 10) / 2**10),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (6, 6, 1),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p_value: float) -> None:
    found = mcnemar(*outcomes(30, only_a, only_b, 4))
    assert found == McNemar(only_a, only_b, pytest.approx(p_value))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_sum_of_the_binomial_coefficients(only_a: int, only_b: int) -> None:
    tosses = only_a + only_b
    tail = sum(math.comb(tosses, heads) for heads in range(min(only_a, only_b) + 1))
    found = mcnemar(*outcomes(1, only_a, only_b, 0))
    assert found.p_value == pytest.approx(min(1, 2 * tail / 2**tosses), rel=1e-9)
    assert found.p_value == mcnemar(*outcomes(1, only_b, only_a, 0)).p_value


def test_mcnemar_of_very_many_questions_neither_overflows_nor_vanishes() -> None:
    assert mcnemar(*outcomes(100_000, 50_500, 49_500, 0)).p_value == pytest.approx(0.0015824, rel=1e-3)
    assert mcnemar(*outcomes(0, 200_000, 0, 0)).p_value == 0


def test_mcnemar_takes_numbers_and_refuses_soft_scores() -> None:
    assert mcnemar(np.array([1, 0, 1]), [1.0, 1.0, 0.0]) == McNemar(1, 1, 1)
    with pytest.raises(ValueError, match="use paired_bootstrap"):
        mcnemar([0.3, 1], [1, 1])


def index_bootstrap(a: np.ndarray, b: np.ndarray, samples: int) -> np.ndarray:
    """The textbook's way: draw the questions themselves."""
    rows = np.random.default_rng(99).integers(len(a), size=(samples, len(a)))
    return (a - b)[rows].mean(axis=1)


def soft_scores(questions: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([0, 0.3, 0.6, 0.9, 1], size=questions)


def test_bootstrap_has_the_distribution_of_drawn_questions() -> None:
    a, b = soft_scores(400, 1), soft_scores(400, 2)
    b[:350] = a[:350]
    found = paired_bootstrap(a, b)
    means = index_bootstrap(a, b, 10_000)
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert [found.low, found.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.001)
    expected = np.mean(np.abs(means - found.difference) >= abs(found.difference))
    assert found.p_value == pytest.approx(expected, abs=0.03)


def test_bootstrap_of_a_known_normal_case() -> None:
    rng = np.random.default_rng(5)
    noise = rng.standard_normal(1000)
    noise = (noise - noise.mean()) / noise.std()
    found = paired_bootstrap(noise + 2 / math.sqrt(1000), np.zeros(1000))  # two standard errors above zero
    assert found.p_value == pytest.approx(0.0455, abs=0.01)
    half = 1.96 / math.sqrt(1000)
    assert [found.low, found.high] == pytest.approx([found.difference - half, found.difference + half], abs=0.003)


def test_bootstrap_is_symmetric_where_the_samples_are_the_same() -> None:
    a, b = soft_scores(50, 3), soft_scores(50, 4)
    there, back = paired_bootstrap(a, b, samples=2000), paired_bootstrap(b, a, samples=2000)
    assert there.difference == pytest.approx(-back.difference)
    assert there.low == pytest.approx(-back.high, abs=0.02)
    assert there.p_value == pytest.approx(back.p_value, abs=0.05)


def test_equal_systems_and_certain_differences() -> None:
    scores = soft_scores(20, 6)
    assert paired_bootstrap(scores, scores) == (0, 0, 0, 1)
    found = paired_bootstrap(np.full(20, 0.9), np.full(20, 0.6), samples=99)
    assert found[:3] == pytest.approx((0.3, 0.3, 0.3))
    assert found.p_value == 1 / 100


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=12))
def test_any_scores_give_an_interval_and_a_probability(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    found = paired_bootstrap(a, b, samples=200)
    differences = np.subtract(a, b)
    assert differences.min() - 1e-9 <= found.low <= found.high <= differences.max() + 1e-9
    assert 1 / 201 <= found.p_value <= 1


def test_the_seed_decides_and_the_memory_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = soft_scores(100, 7), soft_scores(100, 8)
    first = paired_bootstrap(a, b, samples=500)
    assert first == paired_bootstrap(a, b, samples=500, seed=0)
    assert first != paired_bootstrap(a, b, samples=500, seed=1)
    monkeypatch.setattr(significance, "_CHUNK_CELLS", 50)
    assert first == pytest.approx(paired_bootstrap(a, b, samples=500))


def test_sixty_thousand_questions_are_quick() -> None:
    a, b = soft_scores(60_000, 9), soft_scores(60_000, 10)
    start = time.process_time()
    paired_bootstrap(a, b)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "non-empty"),
        ([1, 0], [1], r"one length, got shapes \(2,\) and \(1,\)"),
        ([[1, 0]], [[1, 0]], "lists of one length"),
        ([1, math.nan], [1, 1], "finite"),
        (["x"], ["y"], "lists of numbers"),
        ([None, {}], [1, 1], "lists of numbers"),
    ],
)
def test_bad_scores_are_named(a: Any, b: Any, message: str) -> None:
    for test in (mcnemar, paired_bootstrap):
        with pytest.raises(ValueError, match=message):
            test(a, b)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        paired_bootstrap([1], [0], samples=0)
