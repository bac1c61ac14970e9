import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triptych.metrics import vqa
from triptych.metrics.vqa import (
    Rules,
    VqaAnnotation,
    VqaQuestion,
    normalize_answer,
    question_accuracies,
    read_vqa_annotations,
    read_vqa_questions,
    read_vqa_results,
    score_vqa,
    strip_punctuation,
    vqa_accuracy,
    write_vqa_results,
)

MARKS = ';/[]"{}()=+\\_-><@`,?!'

# By hand, and the same from the official file, run unchanged under Python 2.7.
NORMALIZED = [
    # white space
    ("  red \n", "red"),
    ("on\nthe\tleft", "on left"),
    ("red   and  blue", "red and blue"),
    ("red\r\nblue", "red blue"),
    ("", ""),
    # marks: a space in their place, or nothing where the text has them beside a space anywhere
    ("t-shirt", "t shirt"),
    ("t- shirt", "t shirt"),
    ("t-shirt -", "tshirt"),
    ("well-known t -shirt", "wellknown t shirt"),
    ("black/white", "black white"),
    ("black / white", "black white"),
    ("yes,no", "yes no"),
    ("yes, no", "yes no"),
    ("red,green, blue", "redgreen blue"),
    ("(red)", "red"),
    ("is it?yes!", "is it yes"),
    ("-x-\n", "x"),
    ("salt & pepper: $5 * 3 ~ 10% #1 a|b 2^3", "salt & pepper: $5 * 3 ~ 10% #1 a|b 2^3"),
    ("don’t — stop…", "don’t — stop…"),
    # a comma between digits: it goes, and so does every other mark
    ("1,000", "1000"),
    ("1,000,000", "1000000"),
    ("1,2,3", "123"),
    ("1, 2", "1 2"),
    ("t-shirt 1,000", "tshirt 1000"),
    ("٣,٤ t-shirt", "٣ ٤ t shirt"),
    # periods, unless a digit follows
    ("St. Louis.", "st louis"),
    ("3.5", "3.5"),
    ("a.5", "a.5"),
    (".5.", ".5"),
    ("5.m", "5m"),
    ("u.s.a.", "usa"),
    ("...", ""),
    ("x" + "." * 40, "x" + "." * 8),
    ("1.2" * 40 + ".", "1.2" * 40),
    # number words, articles
    ("none zero one two three four five", "0 0 1 2 3 4 5"),
    ("Six SEVEN eight nine ten eleven twenty", "6 7 8 9 10 eleven twenty"),
    ("twenty-one", "twenty 1"),
    ("The cat", "cat"),
    ("a an the", ""),
    ("A.", ""),
    ("vitamin a/b", "vitamin b"),
    ("another theatre", "another theatre"),
    # contractions
    ("dont", "don't"),
    ("Don't", "don't"),
    ("it isnt", "it isn't"),
    ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve"),
    ("yall'd've y'alld've y'all'dve", "y'all'd've y'all'd've y'all'd've"),
    ("ow's'at 'ows'at 'ow'sat", "'ow's'at 'ow's'at 'ow's'at"),
    ("5 oclock", "5 o'clock"),
    ("twas", "'twas"),
    ("somebody'd somebodyd", "somebodyd somebodyd"),
    ("hes shes its", "he's shes its"),
    ("Im Ive I'dve Id've", "im ive i'dve id've"),
    ("let's she's", "let's she's"),
]


@pytest.mark.parametrize(("text", "expected"), NORMALIZED)
def test_normalized_answers(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize("mark", MARKS)
def test_every_mark(mark: str) -> None:
    assert strip_punctuation(f"x{mark}y") == "x y"
    assert strip_punctuation(f"x{mark}y{mark} z") == "xy z"
    assert strip_punctuation(f"x{mark}y {mark}z") == "xy z"
    assert strip_punctuation(f"x{mark}y 1,0") == "xy 10"


def test_no_other_ascii_character_is_a_mark() -> None:
    others = [chr(code) for code in range(33, 127) if chr(code) not in MARKS + "."]
    assert [strip_punctuation(f"x{character} y") for character in others] == [f"x{c} y" for c in others]


def test_the_contractions_are_those_of_the_official_table() -> None:
    # Computed from the official table without the entries that cannot change a word: six of 120.
    lines = "\n".join(f"{word} {mended}" for word, mended in sorted(vqa._MENDED.items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == "f2c800b1132e79302dd72686ce8bba16120f1873f98a85561222e89317336e7a"


# ------------------------------------------------------------------------------------ a slow and literal scorer


def slow_strip(text: str) -> str:
    kept = ""
    number = any(text[i] == "," and text[i - 1 : i + 2 : 2] in PAIRS for i in range(1, len(text) - 1))
    for character in text:
        if character not in MARKS:
            kept += character
        elif not number and all(pair not in text for pair in (character + " ", " " + character)):
            kept += " "
    removed, result = 0, ""
    for place, character in enumerate(kept):
        if character == "." and removed < 32 and kept[place + 1 : place + 2] not in DIGITS:
            removed += 1
        else:
            result += character
    return result


DIGITS = set("0123456789")
PAIRS = {first + second for first in DIGITS for second in DIGITS}
NAMES = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = dict(zip(NAMES, [0, *range(11)], strict=True))
SOME_CONTRACTIONS = {"dont": "don't", "isnt": "isn't", "thats": "that's", "oclock": "o'clock", "hed've": "he'd've"}


def slow_normalize(text: str) -> str:
    words = []
    for word in slow_strip(text.translate({10: 32, 9: 32}).strip()).lower().split():
        word = str(NUMBERS.get(word, word))
        if word not in ("a", "an", "the"):
            words.append(SOME_CONTRACTIONS.get(word, word))
    return " ".join(words)


def slow_accuracy(answers: list[str], prediction: str, rules: Rules) -> float:
    if rules == "2016":
        prediction = slow_normalize(prediction)
        if any(answer != answers[0] for answer in answers):
            answers = [slow_strip(answer) for answer in answers]
    else:
        answers = [answer.translate({10: 32, 9: 32}).strip() for answer in answers]
        prediction = prediction.translate({10: 32, 9: 32}).strip()
        if any(answer != answers[0] for answer in answers):
            answers, prediction = [slow_normalize(answer) for answer in answers], slow_normalize(prediction)
    earned = 0.0
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        earned += min(1.0, sum(answer == prediction for answer in others) / 3)
    return earned / len(answers)


WORD = st.sampled_from([*NUMBERS, *SOME_CONTRACTIONS, "a", "The", "an", "blue", "Yes", "3", "1,000", "2.5", "t-shirt"])
GLUE = st.sampled_from(["", " ", "  ", "\n", "\t", ".", ". ", ", ", ",", *MARKS, *(f" {mark}" for mark in MARKS)])
TEXT = st.lists(st.one_of(WORD, GLUE), max_size=8).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXT)
@example("." * 70)
def test_normalisation_follows_the_slow_rules(text: str) -> None:
    assert normalize_answer(text) == slow_normalize(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=4), st.lists(st.integers(0, 3), min_size=9, max_size=9), TEXT)
def test_accuracy_follows_the_slow_rules(texts: list[str], votes: list[int], other: str) -> None:
    answers = [texts[0], *(texts[vote % len(texts)] for vote in votes)]
    for prediction in (*texts, other, normalize_answer(texts[0])):
        for rules in ("2021", "2016"):
            assert vqa_accuracy(answers, prediction, rules) == pytest.approx(slow_accuracy(answers, prediction, rules))


@given(st.text(max_size=40))
def test_any_text_becomes_words_on_one_line(text: str) -> None:
    normalized = normalize_answer(text)
    assert " ".join(normalized.split()) == normalized
    assert not {"a", "an", "the"} & set(normalized.split())


# ------------------------------------------------------------------------------------------------- one question

TEN = [0.0, 0.3, 0.6, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("matches", "expected"), list(enumerate(TEN)))
def test_leaving_each_human_out(matches: int, expected: float) -> None:
    answers = ["red"] * matches + ["blue", "dark blue"][: 10 - matches] + ["navy"] * (8 - matches)
    assert len(answers) == 10
    assert vqa_accuracy(answers, "red") == expected


@pytest.mark.parametrize(
    ("people", "by_matches"),
    [
        (1, [0, 1]),
        (2, [0, 1 / 2, 1]),
        (3, [0, 1 / 3, 2 / 3, 1]),
        (4, [0, 1 / 4, 1 / 2, 3 / 4, 1]),
        (5, [0, 4 / 15, 8 / 15, 12 / 15, 1, 1]),
    ],
)
def test_other_numbers_of_humans(people: int, by_matches: list[float]) -> None:
    for matches, expected in enumerate(by_matches):
        answers = ["red"] * matches + ["blue"] * (people - matches)
        assert vqa_accuracy(answers, "red") == pytest.approx(expected)


SAME, DIFFERENT = ["The two"] * 10, ["The two"] * 9 + ["x"]


@pytest.mark.parametrize(
    ("answers", "prediction", "by_2021", "by_2016"),
    [
        (SAME, "The two", 1, 0),  # as they are; 2016 compares "2" with "The two"
        (SAME, " The\ttwo\n", 1, 0),
        (SAME, "two", 0, 0),
        (["2"] * 10, "The two", 0, 1),
        (["2"] * 10, "2", 1, 1),
        (["2"] * 9 + [" 2\n"], "2", 1, 1),  # the same only after stripping
        (["The two"] * 9 + ["The two\n"], "2", 0, 0),
        (DIFFERENT, "two", 1, 0),  # 2016 leaves words of humans alone
        (DIFFERENT, "The two", 1, 0),
        (["t-shirt"] * 9 + ["x"], "T shirt!", 1, 1),
        (["T-shirt"] * 9 + ["x"], "T shirt!", 1, 0),
        (["t-shirt"] * 10, "t shirt", 0, 0),
        (["t-shirt"] * 10, "t-shirt", 1, 0),
        (["x "] * 5 + ["y"] * 5, "x", 1, 0),  # 2016 strips the prediction alone
    ],
)
def test_what_is_compared(answers: list[str], prediction: str, by_2021: float, by_2016: float) -> None:
    assert vqa_accuracy(answers, prediction) == vqa_accuracy(answers, prediction, "2021") == by_2021
    assert vqa_accuracy(answers, prediction, "2016") == by_2016


@pytest.mark.parametrize(
    ("answers", "prediction", "rules", "message"),
    [
        ([], "yes", "2021", r"at least one string, got \[\]"),
        ("yes", "yes", "2021", "list .* got 'yes'"),
        (["yes", 2], "yes", "2021", "list of at least one string"),
        (["yes"], None, "2021", "prediction must be a string, got None"),
        (["yes"], "yes", "2020", "unknown rules '2020'; there are 2021, 2016"),
    ],
)
def test_bad_answers_are_named(answers: Any, prediction: Any, rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vqa_accuracy(answers, prediction, rules)


# ------------------------------------------------------------------------------------------------ many questions


def asked(question: str, *answers: str, kind: str = "other", first_words: str = "what") -> VqaAnnotation:
    return VqaAnnotation(question, "1", answers, kind, first_words)


ANNOTATIONS = [
    asked("12", *["yes"] * 10, kind="yes/no", first_words="is"),
    asked("5", *["2"] * 2, *["3"] * 8, kind="number", first_words="how many"),
    asked("7", *["red"] * 3, *["blue"] * 7, first_words="what"),
    asked("x", *["red"] * 10, first_words="is"),
]
PREDICTIONS = {12: "yes", "5": "Two", 7: "the red", "x": "blue"}


def test_scores_of_each_type_in_percent() -> None:
    assert score_vqa(ANNOTATIONS, PREDICTIONS) == {"overall": 62.5, "number": 60, "other": 45, "yes/no": 100}
    scores = score_vqa(ANNOTATIONS, PREDICTIONS, by="question_type")
    assert scores == {"overall": 62.5, "how many": 60, "is": 50, "what": 90}
    assert list(scores) == ["overall", "how many", "is", "what"]
    assert score_vqa(ANNOTATIONS, {**PREDICTIONS, "x": "Red"}, "2016")["other"] == 95


def test_scores_are_rounded_to_four_decimals() -> None:
    annotations = [asked(str(n), *["red"] * 10) for n in range(3)]
    assert score_vqa(annotations, {0: "red", 1: "x", 2: "red"})["overall"] == 66.6667


def test_accuracy_of_each_question_in_the_order_of_the_annotations() -> None:
    accuracies = question_accuracies(ANNOTATIONS, PREDICTIONS)
    assert list(accuracies.items()) == [("12", 1), ("5", 0.6), ("7", 0.9), ("x", 0)]


def test_a_type_that_is_not_known_has_no_score() -> None:
    assert score_vqa([VqaAnnotation("1", "1", ("a",))], {1: "a"}) == {"overall": 100}


def test_missing_predictions_can_be_left_out() -> None:
    some = {7: "red", "5": "3"}
    assert score_vqa(ANNOTATIONS, some, allow_missing=True) == {"overall": 95, "number": 100, "other": 90}
    assert list(question_accuracies(ANNOTATIONS, some, allow_missing=True)) == ["5", "7"]


@pytest.mark.parametrize(
    ("annotations", "predictions", "message"),
    [
        (ANNOTATIONS, {**PREDICTIONS, 99: "a"}, "without annotations: '99'"),
        (ANNOTATIONS, {12: "yes"}, "questions without a prediction: '5', '7', 'x'"),
        ([asked(str(n), "a") for n in range(20)], {0: "a"}, "'1', '2', '3', '4', '5' and 14 more"),
        (ANNOTATIONS, {}, "no predictions"),
        (ANNOTATIONS, {**PREDICTIONS, "12": "no"}, "predictions: question '12' occurs twice"),
        ([*ANNOTATIONS, ANNOTATIONS[1]], PREDICTIONS, "annotations: question '5' occurs twice"),
        (ANNOTATIONS, {**PREDICTIONS, 7: ["red"]}, "must be strings: '7'"),
        (ANNOTATIONS, {**PREDICTIONS, 7.5: "red"}, "whole number or a string, got 7.5"),
        (ANNOTATIONS, {True: "red"}, "whole number or a string, got True"),
        ([asked("3")], {3: "a"}, "without human answers: '3'"),
        ([VqaAnnotation("3", "1", "yes")], {3: "a"}, "without human answers: '3'"),  # type: ignore[arg-type]
    ],
)
def test_bad_predictions_are_named(annotations: Any, predictions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_vqa(annotations, predictions)


# --------------------------------------------------------------------------------------------------------- files


def write(path: Path, content: object) -> Path:
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


ENTRY = {
    "question_id": 9,
    "image_id": 4,
    "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}, {"answer": "Red "}],
    "answer_type": "other",
    "question_type": "what color",
    "multiple_choice_answer": "red",
}


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_official_files(tmp_path: Path, suffix: str) -> None:
    entries = [
        {"question_id": 9, "image_id": 4, "question": "What?"},
        {"question_id": "b", "image_id": "x", "question": ""},
    ]
    questions = write(tmp_path / f"q.{suffix}", {"info": {}, "questions": entries})
    assert read_vqa_questions(questions) == [VqaQuestion("9", "4", "What?"), VqaQuestion("b", "x", "")]
    bare = {"question_id": "b", "image_id": "x", "answers": [{"answer": "1"}]}
    annotations = write(tmp_path / f"a.{suffix}", {"annotations": [ENTRY, bare]})
    assert read_vqa_annotations(annotations) == [
        VqaAnnotation("9", "4", ("red", "Red "), "other", "what color", "red"),
        VqaAnnotation("b", "x", ("1",)),
    ]
    results = write(tmp_path / f"r.{suffix}", [{"question_id": 9, "answer": "red"}, {"question_id": "b", "answer": ""}])
    assert read_vqa_results(results) == {"9": "red", "b": ""}


QUESTION = {"question_id": 1, "image_id": 1, "question": "?"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], 'list "questions"'),
        ({"questions": {}}, 'list "questions"'),
        ({"questions": [QUESTION, "x"]}, r"questions\[1\]: expected an object, got str"),
        (
            {"questions": [QUESTION, {**QUESTION, "question_id": "1"}]},
            r"questions\[1\]: question_id '1' occurs a second",
        ),
        ({"questions": [{**QUESTION, "question_id": True}]}, r'questions\[0\]: needs "question_id"'),
        ({"questions": [{**QUESTION, "question_id": 1.5}]}, r'questions\[0\]: needs "question_id"'),
        ({"questions": [{**QUESTION, "image_id": None}]}, r'questions\[0\]: needs "image_id"'),
        ({"questions": [{**QUESTION, "question": 3}]}, r'questions\[0\]: needs "question", a string'),
    ],
)
def test_bad_question_files_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"q\.json: .*{message}"):
        read_vqa_questions(write(tmp_path / "q.json", content))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answers": None}, 'needs "answers"'),
        ({"answers": []}, 'needs "answers"'),
        ({"answers": ["yes"]}, 'needs "answers", a list of objects'),
        ({"answers": [{"answer": "a"}, {"answer": 2}]}, r'answers\[1\]: needs "answer", a string'),
        ({"answer_type": 1}, 'needs "answer_type"'),
        ({"question_type": None}, 'needs "question_type"'),
        ({"multiple_choice_answer": 1}, 'needs "multiple_choice_answer"'),
    ],
)
def test_bad_annotation_files_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.json: annotations\[0\]: {message}"):
        read_vqa_annotations(write(tmp_path / "a.json", {"annotations": [{**ENTRY, **fields}]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"results": []}, "expected a JSON list"),
        (
            [{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}],
            r"entry\[1\]: question_id '1' occurs a sec",
        ),
        ([{"question_id": 1, "answer": None}], r'entry\[0\]: needs "answer"'),
        ([{"answer": "a"}], r'entry\[0\]: needs "question_id"'),
    ],
)
def test_bad_result_files_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"r\.json: {message}"):
        read_vqa_results(write(tmp_path / "r.json", content))


@pytest.mark.parametrize(
    "content", [b"", b"[{", b"\xff\xfe\x00\x01", b"\x1f\x8bno gzip", gzip.compress(b"[]" * 99)[:-12]]
)
def test_what_is_no_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json: not a JSON file"):
        read_vqa_results(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_vqa_annotations(tmp_path / "none.json")


def test_written_results_are_what_the_server_wants(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_vqa_results(path, {"42": "yes", 7: "café", "007": "x", "b1": ""})
    assert json.loads(path.read_text()) == [
        {"question_id": 42, "answer": "yes"},
        {"question_id": 7, "answer": "café"},
        {"question_id": "007", "answer": "x"},
        {"question_id": "b1", "answer": ""},
    ]
    assert read_vqa_results(path) == {"42": "yes", "7": "café", "007": "x", "b1": ""}


def test_results_that_cannot_be_written_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_vqa_results(path, {1: "old"})
    for bad, message in [({1: "a", "1": "b"}, "'1' occurs twice"), ({1: "a", 2: None}, "must be strings: '2'")]:
        with pytest.raises(ValueError, match=message):
            write_vqa_results(path, bad)  # type: ignore[arg-type]
    assert read_vqa_results(path) == {"1": "old"}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


# ----------------------------------------------------------------------------------------------- real questions


def most_frequent_of_the_other_nine(row: int, answers: tuple[str, ...]) -> str:
    return Counter(answers[1:]).most_common(1)[0][0]  # of equally frequent ones, the first


def yes(row: int, answers: tuple[str, ...]) -> str:
    return "yes"


def the_first_answer_disturbed(row: int, answers: tuple[str, ...]) -> str:
    answer = answers[0]
    words = {str(number): word for word, number in NUMBERS.items()}
    return [
        answer.upper(),
        f"The {answer}.",
        f" {answer}\n",
        answer.replace("'", ""),
        answer.replace(" ", "-"),
        f"({answer})",
        answer.replace(" ", "\t"),
        words.get(answer, answer),
        f"{answer}, 1,000",
        answer,
    ][row % 10]


PREDICTORS = (most_frequent_of_the_other_nine, yes, the_first_answer_disturbed)

# Printed with four decimals by the official files of both rules, run unchanged under Python 2.7 on these predictions.
OFFICIAL = {
    "most_frequent_of_the_other_nine": {
        "2021": {"overall": 96.3195, "number": 96.1771, "other": 92.9396, "yes/no": 99.9966},
        "2016": {"overall": 96.1179, "number": 96.0346, "other": 92.4886, "yes/no": 99.9966},
    },
    "yes": {
        "2021": {"overall": 20.8477, "number": 0.2035, "other": 1.061, "yes/no": 62.1921},
        "2016": {"overall": 20.8477, "number": 0.2035, "other": 1.061, "yes/no": 62.1921},
    },
    "the_first_answer_disturbed": {
        "2021": {"overall": 68.0495, "number": 68.8704, "other": 64.2148, "yes/no": 71.2385},
        "2016": {"overall": 78.3836, "number": 78.9009, "other": 69.5685, "yes/no": 87.0852},
    },
}


@pytest.fixture(scope="module")
def real(shared: Path) -> list[VqaAnnotation]:
    folder = shared / "data" / "vqa_v2_sample"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return read_vqa_annotations(folder / "vqa_annotatons_valid.json.gz")


@pytest.mark.parametrize("rules", ["2021", "2016"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_scores_of_real_questions_are_the_official_ones(
    real: list[VqaAnnotation], predictor: Any, rules: Rules
) -> None:
    predictions = {known.question_id: predictor(row, known.answers) for row, known in enumerate(real)}
    assert score_vqa(real, predictions, rules) == OFFICIAL[predictor.__name__][rules]


def test_each_real_question_has_the_score_of_the_slow_rules(real: list[VqaAnnotation]) -> None:
    some = [known for known in real if not any("'" in answer for answer in known.answers)][:2000]
    predictions = {known.question_id: the_first_answer_disturbed(row, known.answers) for row, known in enumerate(some)}
    for rules in ("2021", "2016"):
        expected = [slow_accuracy(list(known.answers), predictions[known.question_id], rules) for known in some]
        assert list(question_accuracies(some, predictions, rules).values()) == pytest.approx(expected, abs=1e-12)
