"""Scores of classifiers: hand values, and what must hold of any labels and numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.metrics.classification import accuracy, f1, matthews, pearson, spearman

# 6 true positives, 2 false negatives, 1 false positive, 3 true negatives.
EXPECTED = [1] * 8 + [0] * 4
PREDICTED = [1] * 6 + [0] * 2 + [1] * 1 + [0] * 3

labels = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30)
numbers = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=30)


def test_two_classes_by_hand() -> None:
    assert accuracy(EXPECTED, PREDICTED) == 9 / 12
    assert f1(EXPECTED, PREDICTED, 1) == pytest.approx(2 * 6 / (8 + 7))
    assert f1(EXPECTED, PREDICTED, 0) == pytest.approx(2 * 3 / (4 + 5))
    assert matthews(EXPECTED, PREDICTED) == pytest.approx((6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5))


def test_three_classes_by_hand() -> None:
    expected, predicted = ["a", "b", "c", "a"], ["a", "c", "c", "b"]
    above = 2 * 4 - (2 * 1 + 1 * 1 + 1 * 2)
    assert matthews(expected, predicted) == pytest.approx(above / math.sqrt((16 - 6) * (16 - 6)))


def test_what_is_undefined_is_zero() -> None:
    assert f1(["a", "a"], ["a", "a"], "b") == 0
    assert matthews(["a", "a", "b"], ["a", "a", "a"]) == 0
    assert matthews(["a"], ["a"]) == 0
    assert pearson([1, 2, 3], [5, 5, 5]) == spearman([5, 5, 5], [1, 2, 3]) == 0
    assert pearson([0.1, 0.1, 0.1], [1, 2, 3]) == 0  # its mean is not exactly 0.1


@settings(max_examples=100, deadline=None)
@given(labels)
def test_matthews_is_the_correlation_of_indicators(pairs: list[tuple[str, str]]) -> None:
    expected, predicted = map(list, zip(*pairs, strict=True))
    one_hot = [np.array([[label == name for name in "abc"] for label in own], float) for own in (expected, predicted)]
    a_NK, b_NK = (own - own.mean(0) for own in one_hot)
    below = math.sqrt((a_NK * a_NK).sum() * (b_NK * b_NK).sum())
    slow = (a_NK * b_NK).sum() / below if below > 1e-9 else 0.0
    assert matthews(expected, predicted) == pytest.approx(slow, abs=1e-9)
    assert matthews(predicted, expected) == pytest.approx(matthews(expected, predicted))


@settings(max_examples=100, deadline=None)
@given(labels)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs: list[tuple[str, str]]) -> None:
    expected, predicted = map(list, zip(*pairs, strict=True))
    hits = sum(a == b == "a" for a, b in pairs)
    if hits == 0:
        assert f1(expected, predicted, "a") == 0
        return
    precision, recall = hits / predicted.count("a"), hits / expected.count("a")
    assert f1(expected, predicted, "a") == pytest.approx(2 / (1 / precision + 1 / recall))


@settings(max_examples=100, deadline=None)
@given(numbers)
def test_correlations_equal_the_slow_way(pairs: list[tuple[int, int]]) -> None:
    first, second = map(list, zip(*pairs, strict=True))

    def ranks(values: list[int]) -> list[float]:
        return [sum(own < one for own in values) + (values.count(one) + 1) / 2 for one in values]

    def slow(a: list[float], b: list[float]) -> float:
        return float(np.corrcoef(a, b)[0, 1]) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0

    assert pearson(first, second) == pytest.approx(slow(first, second), abs=1e-9)
    assert spearman(first, second) == pytest.approx(slow(ranks(first), ranks(second)), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(numbers)
def test_only_the_order_counts_for_spearman(pairs: list[tuple[int, int]]) -> None:
    first, second = map(np.array, zip(*pairs, strict=True))
    assert spearman(np.exp(first / 5), second * 3 + 1) == pytest.approx(spearman(first, second))


def test_sizes_of_numbers_do_not_matter() -> None:
    first, second = np.array([1.0, 2, 3, 5]), np.array([2.0, 1, 4, 4])
    expected = pearson(first, second)
    for size in (1e-200, 1e200, 1e308 / 5):
        assert pearson(first * size, second) == pytest.approx(expected)
    assert pearson(first, -first) == pytest.approx(-1)


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="two non-empty lists of one length, got 0 and 0"):
        accuracy([], [])
    for score in (accuracy, matthews, lambda a, b: f1(a, b, 1)):
        with pytest.raises(ValueError, match="got 2 and 1"):
            score([1, 0], [1])
    for correlation in (pearson, spearman):
        with pytest.raises(ValueError, match="of one length"):
            correlation([1, 2], [1])
        with pytest.raises(ValueError, match="must be finite"):
            correlation([1, 2], [1, math.nan])
