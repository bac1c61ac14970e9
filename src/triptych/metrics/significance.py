"""Is one system better than another on the same questions? McNemar's exact test, and the paired bootstrap.

Both are two-sided and read one score a question of each system, in the same order. McNemar's test is for answers that
are right or wrong; the bootstrap is for any score, such as the soft accuracy of VQA.

Shapes: N questions, D different values of the difference, S samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK_CELLS = 2**22  # counts drawn at once


class McNemar(NamedTuple):
    """What McNemar's test found.

    Attributes:
        only_a, only_b: how many questions only this system answers rightly.
        p_value: how likely a split at least as uneven would be, if each of these were a toss of a fair coin.
    """

    only_a: int
    only_b: int
    p_value: float


class PairedBootstrap(NamedTuple):
    """What the bootstrap found.

    Attributes:
        difference: mean score of the first system minus that of the second.
        low, high: the 95 % interval of the difference, by percentiles.
        p_value: how likely a difference at least as large would be, if the true one were zero; never below
            1 / (samples + 1).
    """

    difference: float
    low: float
    high: float
    p_value: float


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """The exact binomial test of McNemar (1947) on N right (True, 1) and wrong (False, 0) answers of two systems.

    Raises:
        ValueError: no questions, lengths that differ, or a value that is neither 0 nor 1.
    """
    a_N, b_N = _paired(correct_a, correct_b)
    if not np.isin([a_N, b_N], [0, 1]).all():
        raise ValueError("McNemar's test needs right (1) or wrong (0); for other scores use paired_bootstrap")
    only_a, only_b = int((a_N > b_N).sum()), int((a_N < b_N).sum())
    return McNemar(only_a, only_b, _both_tails(min(only_a, only_b), only_a + only_b))


def paired_bootstrap(scores_a: ArrayLike, scores_b: ArrayLike, samples: int = 10_000, seed: int = 0) -> PairedBootstrap:
    """Draws N questions with replacement, `samples` times, and looks at how the mean difference varies.

    Efron and Tibshirani 1993, chapters 13 and 16; for the p value the samples are moved to a mean of zero. The same
    seed gives the same result. Fast where differences have few values (VQA's have at most some twenty); each further
    value costs as much again.

    Raises:
        ValueError: no questions, lengths that differ, a score that is no finite number, or no samples.
    """
    a_N, b_N = _paired(scores_a, scores_b)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    difference = float(np.mean(a_N - b_N))
    means_S = _resampled_means(a_N - b_N, samples, seed)
    low, high = np.percentile(means_S, [2.5, 97.5])
    rounding = 1e-12 * float(np.abs(a_N - b_N).max())  # equal means can differ by it
    extreme = np.count_nonzero(np.abs(means_S - difference) >= abs(difference) - rounding)
    return PairedBootstrap(difference, float(low), float(high), (1 + int(extreme)) / (1 + samples))


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    try:
        a_N, b_N = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores must be two lists of numbers: {error}") from error
    if a_N.ndim != 1 or a_N.shape != b_N.shape or a_N.size == 0:
        raise ValueError(f"scores must be two non-empty lists of one length, got shapes {a_N.shape} and {b_N.shape}")
    if not (np.isfinite(a_N).all() and np.isfinite(b_N).all()):
        raise ValueError("scores must be finite numbers")
    return a_N, b_N


def _both_tails(fewer: int, tosses: int) -> float:
    """Twice the probability of at most `fewer` heads in `tosses` of a fair coin, at most 1."""
    heads = np.arange(1, fewer + 1)
    log_choices = np.concatenate([[0.0], np.cumsum(np.log((tosses - heads + 1) / heads))])
    log_probability = np.logaddexp.reduce(log_choices) - tosses * np.log(2)
    return min(1.0, 2 * float(np.exp(log_probability)))


def _resampled_means(difference_N: Floats, samples: int, seed: int) -> Floats:
    # N draws of single differences are one draw of how often each of their values comes.
    value_D, count_D = np.unique(difference_N, return_counts=True)
    share_D = count_D / len(difference_N)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK_CELLS // len(value_D))
    means: list[NDArray[Any]] = []
    for start in range(0, samples, rows):
        counts_SD = generator.multinomial(len(difference_N), share_D, size=min(rows, samples - start))
        means.append(counts_SD @ value_D / len(difference_N))
    return np.concatenate(means)
