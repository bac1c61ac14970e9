"""Accuracy and consistency of NLVR2, and the files of its owners' scorer."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.metrics.nlvr2 import (
    consistency,
    read_nlvr2_labels,
    read_nlvr2_predictions,
    score_nlvr2,
    sentence_group,
    write_nlvr2_predictions,
)

IDENTIFIER = st.builds("{}-{}-{}-{}".format, st.sampled_from(["dev", "test1"]), *[st.integers(0, n) for n in (2, 3, 1)])
JUDGED = st.dictionaries(IDENTIFIER, st.tuples(st.booleans(), st.booleans()), min_size=1)


def test_a_sentence_is_judged_about_several_pairs() -> None:
    assert sentence_group("dev-12-0-1") == sentence_group("dev-12-3-1")
    others = ["dev-12-0-0", "dev-13-0-1", "test1-12-0-1"]
    assert len({sentence_group(name) for name in [*others, "dev-12-0-1"]}) == 4


def test_without_its_number_the_sentence_itself_counts() -> None:
    assert sentence_group("dev-12-0", "a cat") == sentence_group("dev-12-2", "a cat")
    assert sentence_group("dev-12-0", "a cat") != sentence_group("dev-12-0", "a dog")
    assert sentence_group("dev-12-0-1", "a cat") == sentence_group("dev-12-0-1")


@pytest.mark.parametrize("name", ["dev-12-0", "list.json:17", "dev-12-0-1.png", "my-dev-12-0-1", "dev-12-a-1", ""])
def test_other_identifiers_tell_nothing(name: str) -> None:
    assert sentence_group(name) is None


def test_consistency_by_hand() -> None:
    groups, right = ["a", "a", "b", "c", "c", "c"], [True, False, True, True, True, True]
    assert consistency(groups, right) == 2 / 3


@given(JUDGED)
def test_scores_follow_the_definition(judged: dict[str, tuple[bool, bool]]) -> None:
    labels = {name: label for name, (label, _) in judged.items()}
    predictions = {name: prediction for name, (_, prediction) in judged.items()}
    wrong = {name for name in judged if labels[name] != predictions[name]}
    sentences = {(split, number, which) for split, number, _, which in (name.split("-") for name in judged)}
    spoiled = {(split, number, which) for split, number, _, which in (name.split("-") for name in wrong)}
    assert score_nlvr2(labels, predictions) == {
        "accuracy": round(100 * (1 - len(wrong) / len(judged)), 4),
        "consistency": round(100 * (1 - len(spoiled) / len(sentences)), 4),
    }


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1), st.randoms(use_true_random=False))
def test_consistency_does_not_depend_on_the_order_and_never_falls_with_a_right_one(
    judged: list[tuple[int, bool]], random: Any
) -> None:
    def of(rows: list[tuple[int, bool]]) -> float:
        return consistency([group for group, _ in rows], [right for _, right in rows])

    assert of(random.sample(judged, len(judged))) == of(judged)
    assert (of(judged) == 1) == all(right for _, right in judged)
    better = [(group, right or index == 0) for index, (group, right) in enumerate(judged)]
    assert of(better) >= of(judged)


def test_predictions_of_another_split_are_left_aside() -> None:
    labels = {"dev-1-0-0": True, "dev-1-1-0": False}
    predictions = {"dev-1-0-0": True, "dev-1-1-0": False, "test1-1-0-0": True}
    assert score_nlvr2(labels, predictions) == {"accuracy": 100.0, "consistency": 100.0}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({}, "no statements"),
        ({"dev-1-0": True}, "not SPLIT-SET-PAIR-SENTENCE: 'dev-1-0'"),
        ({f"dev-1-0-{n}": True for n in range(9)}, "without a prediction: 'dev-1-0-1', .*'dev-1-0-5' and 3 more"),
    ],
)
def test_what_cannot_be_scored(labels: dict[str, bool], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        score_nlvr2(labels, {"dev-1-0-0": True})


def test_groups_without_statements() -> None:
    with pytest.raises(ValueError, match="not 0 for 0"):
        consistency([], [])
    with pytest.raises(ValueError, match="not 1 for 2"):
        consistency(["a"], [True, False])


# ----------------------------------------------------------------------------------------------------------- files


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_the_official_files(tmp_path: Path) -> None:
    lines = [
        {"identifier": "dev-1-0-0", "label": "True", "sentence": "a"},
        {"identifier": "dev-1-1-0", "label": "False"},
    ]
    dev = write(tmp_path / "dev.json", "\n".join(map(json.dumps, lines)) + "\n\n")
    found = write(tmp_path / "p.csv", "dev-1-0-0,TRUE\r\ndev-1-1-0,true,0.7\n\ndev-1-0-0,True\n")
    assert read_nlvr2_labels(dev) == {"dev-1-0-0": True, "dev-1-1-0": False}
    assert read_nlvr2_predictions(found) == {"dev-1-0-0": True, "dev-1-1-0": True}
    assert score_nlvr2(read_nlvr2_labels(dev), read_nlvr2_predictions(found))["accuracy"] == 50.0


@given(JUDGED)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, judged: dict[str, tuple[bool, bool]]
) -> None:
    path = tmp_path_factory.mktemp("predictions") / "p.csv"
    predictions = {name: prediction for name, (_, prediction) in judged.items()}
    write_nlvr2_predictions(path, [{"identifier": name, "prediction": p} for name, p in predictions.items()])
    assert read_nlvr2_predictions(path) == predictions


def test_the_official_form_of_predictions(tmp_path: Path) -> None:
    predictions = [{"identifier": "dev-1-0-0", "prediction": True}, {"identifier": "dev-1-1-0", "prediction": False}]
    write_nlvr2_predictions(tmp_path / "p.csv", [*predictions, predictions[0]])
    assert (tmp_path / "p.csv").read_text() == "dev-1-0-0,True\ndev-1-1-0,False\n"


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        ([("a,b", True)], "without a comma, not 'a,b'"),
        ([("a\nb", True)], "one line"),
        ([("", True)], "one line"),
        ([("dev-1-0", True), ("dev-1-0", False)], "two statements have the identifier 'dev-1-0'"),
    ],
)
def test_predictions_that_cannot_be_written(tmp_path: Path, predictions: list[tuple[str, bool]], said: str) -> None:
    path = tmp_path / "p.csv"
    with pytest.raises(ValueError, match=said):
        write_nlvr2_predictions(path, [{"identifier": name, "prediction": p} for name, p in predictions])
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1: not JSON"),
        ("\n[1]", 'line 2: needs "identifier"'),
        ('{"identifier": 3, "label": "True"}', 'line 1: needs "identifier"'),
        ('{"identifier": "dev-1-0-0"}', 'line 1: "label" must be True or False, not None'),
        ('{"identifier": "dev-1-0-0", "label": "yes"}', "line 1: \"label\" must be True or False, not 'yes'"),
        ('{"identifier": "a", "label": true}\n{"identifier": "a", "label": true}', "line 2: a second statement 'a'"),
    ],
)
def test_bad_labels_are_named(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"dev\.json: {said}"):
        read_nlvr2_labels(write(tmp_path / "dev.json", content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("identifier,prediction\n", "line 1: the prediction must be True or False, not 'prediction'"),
        ("a,True\nb, False\n", "line 2: the prediction must be True or False, not ' False'"),
        ("a\n", "line 1: must be IDENTIFIER,True or IDENTIFIER,False, not 'a'"),
        ("a,True\na,False\n", "line 2: 'a' was True before"),
    ],
)
def test_bad_predictions_are_named(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"p\.csv: {said}"):
        read_nlvr2_predictions(write(tmp_path / "p.csv", content))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_nlvr2_labels(tmp_path / "none.json")
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p\.csv: not a text file"):
        read_nlvr2_predictions(tmp_path / "p.csv")
