"""Recall at K for image-text retrieval, from full score matrices and from re-ranked candidate lists.

Shapes: T texts, I images, Q queries. Ranks start at 1. Ties count against the system: a wrong answer with the score
of the right one ranks before it, so that a constant score cannot look like a perfect one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ranks = NDArray[np.int64]
Scores = NDArray[np.floating[Any]]

NOT_FOUND = int(np.iinfo(np.int64).max)
"""The rank of a query none of whose right answers is among its candidates."""

_CHUNK_BYTES = 64 * 2**20


def recall_at(ranks: ArrayLike, ks: Sequence[int]) -> dict[int, float]:
    """Percentage of queries whose rank (1 is best) is at most k, for each k.

    Raises:
        ValueError: no ranks, a rank or k below 1, or ranks that are not whole numbers.
    """
    ranks_Q = np.asarray(ranks)
    if ranks_Q.ndim != 1 or ranks_Q.size == 0 or ranks_Q.dtype.kind not in "iu":
        raise ValueError(f"ranks must be a non-empty list of whole numbers, got {ranks_Q.dtype} {ranks_Q.shape}")
    if ranks_Q.min() < 1:
        raise ValueError(f"ranks start at 1, got {ranks_Q.min()} for query {int(ranks_Q.argmin())}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive, got {list(ks)}")
    return {k: 100.0 * float(np.mean(ranks_Q <= k)) for k in ks}


def retrieval_recalls(scores_TI: Scores, image_of_text: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at K in percent, both ways, of a text-by-image score matrix (higher is better).

    `image_of_text` (T) gives the column of the image each text describes; an image may have several texts. The
    matrix is read in blocks of rows, so it may be a memory map. Keys as in `recall_summary`.

    Raises:
        ValueError: shapes that do not fit, an image index out of range, or a NaN score.
    """
    return recall_summary(*retrieval_ranks(scores_TI, image_of_text), ks)


def retrieval_ranks(scores_TI: Scores, image_of_text: ArrayLike) -> tuple[Ranks, Ranks]:
    """Rank of the right image for each text, and of the best right text for each image that has any.

    Arguments and errors as in `retrieval_recalls`. Images without a text are distractors for the texts and ask
    nothing themselves. The other texts of an image never count against it.
    """
    image_T = _checked_image_of_text(scores_TI, image_of_text)
    texts, images = scores_TI.shape
    right_T = np.asarray(scores_TI[np.arange(texts), image_T])
    best_I = np.full(images, -np.inf, dtype=right_T.dtype)
    np.fmax.at(best_I, image_T, right_T)

    text_ranks_T = np.zeros(texts, dtype=np.int64)
    at_least_best_I = np.zeros(images, dtype=np.int64)
    for start, block_BI in _row_blocks(scores_TI):
        rows = slice(start, start + len(block_BI))
        text_ranks_T[rows] = np.count_nonzero(block_BI >= right_T[rows, None], axis=1)
        at_least_best_I += np.count_nonzero(block_BI >= best_I, axis=0)
    own_at_best_I = np.bincount(image_T[right_T >= best_I[image_T]], minlength=images)
    asked_I = np.bincount(image_T, minlength=images) > 0
    return text_ranks_T, (1 + at_least_best_I - own_at_best_I)[asked_I]


def candidate_ranks(
    candidates: Sequence[ArrayLike] | NDArray[Any],
    scores: Sequence[ArrayLike] | NDArray[Any],
    right: Sequence[Collection[int]],
) -> Ranks:
    """Rank of the best right answer of each query within its own candidate list, `NOT_FOUND` where it has none.

    For re-ranking, where a costly model scores only the candidates a cheap one let through. `candidates[q]` are ids
    in any order, `scores[q]` their scores (higher is better), `right[q]` the ids that count as found.

    Raises:
        ValueError: lengths that differ, an id twice in one list, no right answer, or a NaN score.
    """
    if not len(candidates) == len(scores) == len(right):
        raise ValueError(
            f"one list a query is needed: {len(candidates)} candidates, {len(scores)} scores, {len(right)} right"
        )
    ranks_Q = np.full(len(candidates), NOT_FOUND, dtype=np.int64)
    for query in range(len(candidates)):
        ids_K, scores_K = np.asarray(candidates[query]), np.asarray(scores[query], dtype=np.float64)
        _check_candidates(query, ids_K, scores_K, right[query])
        is_right_K = np.isin(ids_K, list(right[query]))
        if is_right_K.any():
            best = scores_K[is_right_K].max()
            ranks_Q[query] = 1 + np.count_nonzero(scores_K[~is_right_K] >= best)
    return ranks_Q


def recall_summary(text_ranks: ArrayLike, image_ranks: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recalls in percent of both directions: "t2i_r1", ..., "i2t_r1", ... for each k, and their "mean".

    `text_ranks` are those of text queries (text to image), `image_ranks` those of image queries. Errors as in
    `recall_at`.
    """
    recalls = {f"t2i_r{k}": recall for k, recall in recall_at(text_ranks, ks).items()}
    recalls |= {f"i2t_r{k}": recall for k, recall in recall_at(image_ranks, ks).items()}
    return recalls | {"mean": float(np.mean(list(recalls.values())))}


def _row_blocks(scores_TI: Scores) -> Iterator[tuple[int, Scores]]:
    rows = max(1, _CHUNK_BYTES // max(1, scores_TI.itemsize * scores_TI.shape[1]))
    for start in range(0, len(scores_TI), rows):
        block_BI = np.asarray(scores_TI[start : start + rows])
        if np.isnan(block_BI).any():
            row, column = np.argwhere(np.isnan(block_BI))[0]
            raise ValueError(f"scores hold NaN, first at text {start + row}, image {column}")
        yield start, block_BI


def _checked_image_of_text(scores_TI: Scores, image_of_text: ArrayLike) -> NDArray[np.int64]:
    image_T = np.asarray(image_of_text)
    if scores_TI.ndim != 2 or 0 in scores_TI.shape or scores_TI.dtype.kind != "f":
        raise ValueError(
            f"scores must be a non-empty float matrix (texts, images), got {scores_TI.dtype} {scores_TI.shape}"
        )
    if image_T.shape != scores_TI.shape[:1] or image_T.dtype.kind not in "iu":
        raise ValueError(
            f"image_of_text must hold one image index for each of the {len(scores_TI)} texts, "
            f"got {image_T.dtype} {image_T.shape}"
        )
    outside = np.flatnonzero((image_T < 0) | (image_T >= scores_TI.shape[1]))
    if outside.size:
        text = int(outside[0])
        raise ValueError(f"text {text} names image {image_T[text]}, but there are {scores_TI.shape[1]} images")
    return image_T.astype(np.int64)


def _check_candidates(query: int, ids_K: NDArray[Any], scores_K: Scores, right: Collection[int]) -> None:
    if ids_K.ndim != 1 or ids_K.shape != scores_K.shape:
        raise ValueError(f"query {query}: candidates {ids_K.shape} and scores {scores_K.shape} do not match")
    if not right:
        raise ValueError(f"query {query} has no right answer")
    if len(np.unique(ids_K)) != len(ids_K):
        raise ValueError(f"query {query} lists a candidate twice")
    if np.isnan(scores_K).any():
        raise ValueError(f"query {query}: scores hold NaN")
