"""CIDEr with given document frequencies: counting, keeping, and equality with a corpus scored as a whole."""

import gzip
import json
import math
from collections.abc import Hashable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.metrics.captions import CiderD, score_captions
from triptych.metrics.cider import DocumentFrequencies, cider, vector
from triptych.metrics.ptb import ptb_tokenize

CORPUS: dict[Hashable, list[str]] = {
    1: ["A red boat on the lake.", "a small red boat"],
    2: ["Two dogs run on grass", "dogs run on the grass"],
    3: ["the hat is green", "a green hat"],
    4: ["the lake is green"],
}
WORD = st.sampled_from(["red", "dog", "cat", "on"])
GROUPS = st.lists(st.lists(st.lists(WORD, max_size=5), min_size=1, max_size=3), min_size=1, max_size=5)


def frequencies(corpus: dict[Hashable, list[str]]) -> DocumentFrequencies:
    return DocumentFrequencies.count([ptb_tokenize(captions) for captions in corpus.values()])


@given(GROUPS)
def test_pictures_are_counted_and_not_captions(groups: list[list[list[str]]]) -> None:
    counted = DocumentFrequencies.count(groups)
    for gram in [("red",), ("dog", "on"), ("cat", "cat", "on"), ("on", "red", "red", "dog"), ("zebra",)]:
        text = f" {' '.join(gram)} "
        pictures = sum(any(text in f" {' '.join(tokens)} " for tokens in group) for group in groups)
        assert counted.weights(list(gram))[gram] == pytest.approx(math.log(len(groups) / max(1, pictures)))
        assert (gram in counted.counts) == (pictures > 1)


def test_a_part_of_the_corpus_scores_as_the_whole() -> None:
    images: list[Hashable] = [3, 1, 3]
    candidates = ["a hat on grass", "a red boat", "The green hat."]
    whole = CiderD(CORPUS).scores(images, candidates)
    part = CiderD({image: CORPUS[image] for image in (1, 3)}, frequencies(CORPUS)).scores(images, candidates)
    assert part.tolist() == whole.tolist()
    assert part.tolist() != CiderD({image: CORPUS[image] for image in (1, 3)}).scores(images, candidates).tolist()


def test_the_mean_is_what_an_evaluation_prints() -> None:
    predictions: dict[Hashable, str] = {1: "a boat on the lake", 2: "two dogs", 3: "a hat", 4: "green lake"}
    rewards = CiderD(CORPUS, frequencies(CORPUS)).scores(list(predictions), list(predictions.values()))
    assert rewards.mean() == pytest.approx(score_captions(CORPUS, predictions)["CIDEr"], abs=1e-12)


def test_by_hand() -> None:
    """Of ten pictures five have "a", two have "b"; candidate and reference share both words but not their order."""
    known = DocumentFrequencies(10, {("a",): 5, ("b",): 2})
    a, b = math.log(2), math.log(5)
    ours, theirs = vector(["a", "b"], known), vector(["b", "a", "a"], known)
    cosine = (a * 2 * a + b * b) / (math.hypot(a, b) * math.hypot(2 * a, b))  # of the single words; no bigram is shared
    assert cider(ours, [theirs], plain=True) == pytest.approx(10 * cosine / 4)
    assert cider(ours, [theirs]) == pytest.approx(10 * cosine / 4 * math.exp(-1 / 72))
    turned = (a * a + b * b) / (math.hypot(a, b) * math.hypot(2 * a, b))  # clipped: the second "a" is not wanted
    assert cider(theirs, [ours]) == pytest.approx(10 * turned / 4 * math.exp(-1 / 72))
    assert cider(theirs, [ours, theirs]) == pytest.approx((10 * turned / 4 * math.exp(-1 / 72) + 10 * 3 / 4) / 2)


def test_nothing_said_scores_nothing() -> None:
    known = frequencies(CORPUS)
    assert cider(vector([], known), [vector(["a"], known)]) == 0
    assert cider(vector(["a"], known), [vector([], known)]) == 0
    assert DocumentFrequencies(1, {}).weights(["a"]) == {("a",): 0}  # of a single picture every word is common


def test_files_hold_what_was_counted(tmp_path: Path) -> None:
    file = tmp_path / "frequencies.json.gz"
    known = frequencies(CORPUS)
    known.write(file)
    again = DocumentFrequencies.read(file)
    assert (again.pictures, again.counts) == (4, known.counts)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    first = file.read_bytes()
    known.write(file)
    assert file.read_bytes() == first


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"{"),
        gzip.compress(b"[]"),
        gzip.compress(b'{"pictures": 3}'),
        gzip.compress(b'{"pictures": 0, "counts": {}}'),
        gzip.compress(b'{"pictures": 3, "counts": {"a": 4}}'),
        gzip.compress(json.dumps({"pictures": 3, "counts": {"a": 2.5}}).encode()),
        gzip.compress(json.dumps({"pictures": 3, "counts": ["a"]}).encode()),
        gzip.compress(json.dumps({"pictures": 3, "counts": {"a": 2}}).encode())[:-6],
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "frequencies.json.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"frequencies\.json\.gz holds no document frequencies"):
        DocumentFrequencies.read(file)


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        DocumentFrequencies.count([])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DocumentFrequencies.read(tmp_path / "nowhere")
