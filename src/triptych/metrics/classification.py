"""Scores of classifiers and of predicted numbers: accuracy, F1, Matthews, Pearson, Spearman.

They equal scikit-learn's and SciPy's. What those leave undefined or warn about is 0 here: the F1 of a class that nobody
has or predicts, and any correlation with a constant.

Shapes: N items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def accuracy(expected: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Share of the N labels that were predicted, 0 to 1.

    Raises:
        ValueError: no labels, or lengths that differ.
    """
    _check_labels(expected, predicted)
    return sum(map(lambda a, b: a == b, expected, predicted)) / len(expected)


def f1(expected: Sequence[Hashable], predicted: Sequence[Hashable], positive: Hashable) -> float:
    """Harmonic mean of precision and recall of the class `positive`, 0 to 1. Errors as in `accuracy`."""
    _check_labels(expected, predicted)
    hits = sum(a == b == positive for a, b in zip(expected, predicted, strict=True))
    named = sum(label == positive for labels in (expected, predicted) for label in labels)
    return 2 * hits / named if named else 0.0


def matthews(expected: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Matthews correlation coefficient, -1 to 1, of any number of classes (R_K of Gorodkin 2004, equation 8).

    Errors as in `accuracy`.
    """
    _check_labels(expected, predicted)
    total, hits = len(expected), sum(map(lambda a, b: a == b, expected, predicted))
    is_N, said_N = Counter(expected), Counter(predicted)
    above = hits * total - sum(count * said_N[label] for label, count in is_N.items())
    # Whole numbers up to here, so that a constant is recognised exactly.
    below = [total**2 - sum(count**2 for count in counts.values()) for counts in (is_N, said_N)]
    return above / (below[0] ** 0.5 * below[1] ** 0.5) if all(below) else 0.0


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Correlation coefficient of two lists of N numbers, -1 to 1.

    Raises:
        ValueError: no numbers, lengths that differ, or numbers that are not finite.
    """
    a_N, b_N = _paired(first, second)
    if np.ptp(a_N) == 0 or np.ptp(b_N) == 0:
        return 0.0
    return float(np.clip(_unit(a_N) @ _unit(b_N), -1, 1))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation of two lists of N numbers, -1 to 1; equal numbers share their mean rank. Errors as `pearson`."""
    a_N, b_N = _paired(first, second)
    return pearson(_ranks(a_N), _ranks(b_N))


def _check_labels(expected: Sequence[Hashable], predicted: Sequence[Hashable]) -> None:
    if not expected or len(expected) != len(predicted):
        raise ValueError(f"labels must be two non-empty lists of one length, got {len(expected)} and {len(predicted)}")


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    a_N, b_N = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a_N.ndim != 1 or a_N.shape != b_N.shape or a_N.size == 0:
        raise ValueError(f"numbers must be two non-empty lists of one length, got shapes {a_N.shape} and {b_N.shape}")
    if not (np.isfinite(a_N).all() and np.isfinite(b_N).all()):
        raise ValueError("the numbers to correlate must be finite")
    return a_N, b_N


def _unit(x_N: Floats) -> Floats:
    """Centred and of length 1; scaled first, since squares of tiny or huge numbers leave the range of floats."""
    x_N = x_N / np.abs(x_N).max()
    x_N = x_N - x_N.mean()
    x_N = x_N / np.abs(x_N).max()
    return x_N / np.linalg.norm(x_N)


def _ranks(x_N: Floats) -> Floats:
    _, place_N, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_N]
