import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from triptych.metrics import ranking
from triptych.metrics.ranking import (
    NOT_FOUND,
    candidate_ranks,
    recall_at,
    recall_summary,
    retrieval_ranks,
    retrieval_recalls,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.float32], list[int]]:
    """A score matrix with many ties, and the image of each text."""
    texts, images = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    scores = draw(st.lists(st.integers(-2, 2), min_size=texts * images, max_size=texts * images))
    image_of_text = draw(st.lists(st.integers(0, images - 1), min_size=texts, max_size=texts))
    return np.array(scores, dtype=np.float32).reshape(texts, images), image_of_text


def naive_ranks(scores: NDArray[np.float32], image_of_text: list[int]) -> tuple[list[int], list[int]]:
    texts, images = scores.shape
    text_ranks = []
    for text in range(texts):
        right = image_of_text[text]
        wrong = [image for image in range(images) if image != right and scores[text, image] >= scores[text, right]]
        text_ranks.append(1 + len(wrong))
    image_ranks = []
    for image in range(images):
        own = [text for text in range(texts) if image_of_text[text] == image]
        if own:
            best = max(scores[text, image] for text in own)
            others = [text for text in range(texts) if text not in own and scores[text, image] >= best]
            image_ranks.append(1 + len(others))
    return text_ranks, image_ranks


@given(problems())
def test_ranks_agree_with_counting_one_by_one(problem: tuple[NDArray[np.float32], list[int]]) -> None:
    scores, image_of_text = problem
    text_ranks, image_ranks = retrieval_ranks(scores, image_of_text)
    expected_texts, expected_images = naive_ranks(scores, image_of_text)
    assert text_ranks.tolist() == expected_texts
    assert image_ranks.tolist() == expected_images


@given(problems())
def test_full_candidate_lists_give_the_ranks_of_the_matrix(
    problem: tuple[NDArray[np.float32], list[int]],
) -> None:
    scores, image_of_text = problem
    texts, images = scores.shape
    text_ranks, image_ranks = retrieval_ranks(scores, image_of_text)
    from_lists = candidate_ranks([np.arange(images)] * texts, list(scores), [{image} for image in image_of_text])
    assert from_lists.tolist() == text_ranks.tolist()
    own = [{t for t in range(texts) if image_of_text[t] == image} for image in range(images)]
    asked = [image for image in range(images) if own[image]]
    from_lists = candidate_ranks(
        [np.arange(texts)] * len(asked), [scores[:, image] for image in asked], [own[image] for image in asked]
    )
    assert from_lists.tolist() == image_ranks.tolist()


@settings(max_examples=30)
@given(problems(), st.integers(1, 40))
def test_block_size_does_not_matter(problem: tuple[NDArray[np.float32], list[int]], chunk_bytes: int) -> None:
    scores, image_of_text = problem
    whole = retrieval_recalls(scores, image_of_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_CHUNK_BYTES", chunk_bytes)
        assert retrieval_recalls(scores, image_of_text) == whole


def test_constant_scores_find_nothing() -> None:
    image_of_text = np.repeat(np.arange(20), 5)
    recalls = retrieval_recalls(np.zeros((100, 20), dtype=np.float32), image_of_text)
    assert set(recalls.values()) == {0.0}


def test_perfect_scores_find_everything_and_keys_are_in_order() -> None:
    image_of_text = np.repeat(np.arange(12), 2)
    recalls = retrieval_recalls(np.eye(12)[image_of_text], image_of_text)
    assert list(recalls) == ["t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10", "mean"]
    assert set(recalls.values()) == {100.0}


def test_recall_counts_ranks_up_to_k() -> None:
    assert recall_at([1, 2, 5, 6], ks=(1, 5)) == {1: 25.0, 5: 75.0}
    assert recall_summary([1, 2], [1, 1], ks=(1,)) == {"t2i_r1": 50.0, "i2t_r1": 100.0, "mean": 75.0}


def test_a_right_answer_outside_the_candidates_is_missed() -> None:
    ranks = candidate_ranks([[3, 9, 4], [7]], [[0.1, 0.9, 0.5], [1.0]], [{4, 5}, {8}])
    assert ranks.tolist() == [2, NOT_FOUND]
    assert recall_at(ranks, ks=(10,)) == {10: 50.0}


@pytest.mark.parametrize(
    ("scores", "image_of_text", "message"),
    [
        (np.array([[0.0, np.nan]]), [0], "NaN, first at text 0, image 1"),
        (np.array([[np.nan, 0.0]]), [0], "NaN"),
        (np.zeros((2, 2)), [0], "one image index for each of the 2 texts"),
        (np.zeros((2, 2)), [0, 2], "text 1 names image 2"),
        (np.zeros((2, 2)), [0, -1], "text 1 names image -1"),
        (np.zeros((2, 2)), [0.0, 1.0], "image_of_text"),
        (np.zeros((0, 2)), [], "non-empty"),
        (np.zeros((2, 2), dtype=np.int64), [0, 1], "float matrix"),
    ],
)
def test_bad_matrices_are_refused(scores: NDArray[np.float64], image_of_text: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_recalls(scores, image_of_text)


def test_bad_candidate_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="query 0: scores hold NaN"):
        candidate_ranks([[1, 2]], [[0.0, float("nan")]], [{1}])
    with pytest.raises(ValueError, match="query 0 lists a candidate twice"):
        candidate_ranks([[1, 1]], [[0.0, 1.0]], [{1}])
    with pytest.raises(ValueError, match="query 0 has no right answer"):
        candidate_ranks([[1]], [[0.0]], [set()])
    with pytest.raises(ValueError, match="query 0: candidates"):
        candidate_ranks([[1, 2]], [[0.0]], [{1}])
    with pytest.raises(ValueError, match="one list a query"):
        candidate_ranks([[1]], [], [{1}])


@pytest.mark.parametrize(("ranks", "ks"), [([], (1,)), ([0], (1,)), ([1.5], (1,)), ([1], ()), ([1], (0,))])
def test_bad_ranks_are_refused(ranks: list[float], ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ranks|ks"):
        recall_at(ranks, ks)
