"""Accuracy of visual question answering against ten human answers, equal to the scorer of VQA's owners.

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, at commit a013f00 of March 2021 (rules
"2021") and at 458a8b2 of October 2016, its predecessor (rules "2016"). The formula is that of Antol et al. 2015.

The rules have quirks that move scores, and are kept: a comma between digits changes what happens to every mark of the
text, at most 32 periods are removed, ten is a number word and eleven is not, and no contraction of "I" is mended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from triptych.metrics.files import read_json

Rules = Literal["2021", "2016"]
T = TypeVar("T")

_NAMED_IDS = 5  # how many offending ids an error lists
_CACHED_ANSWERS = 2**18  # some tens of megabytes when full

# ------------------------------------------------------------------------------------- normalisation of one answer

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile("[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")  # the official pattern means to look behind as well, but its "(?!<=" never does
_MOST_PERIODS = int(re.UNICODE)  # 32: the official call gives this flag where `sub` takes a count

_COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTING)}
_ARTICLES = {"a", "an", "the"}

# Each is what the word becomes when exactly one of its apostrophes is missing. The official table has "I'm", "I've" and
# "I'd've" too, under keys with a capital that no lower-cased word equals.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_MENDED = {
    contraction[:place] + contraction[place + 1 :]: contraction
    for contraction in _CONTRACTIONS.split()
    for place, character in enumerate(contraction)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the one entry that is the wrong way round


@lru_cache(_CACHED_ANSWERS)
def normalize_answer(text: str) -> str:
    """An answer after all rules, for comparing answers and for building answer vocabularies.

    In order: newlines and tabs become spaces and the ends are stripped; `strip_punctuation`; lower case; number words
    (none to ten) become digits; the articles a, an, the go; contractions that lack one apostrophe get it; runs of
    white space become one space. The result may be empty ("The"). Both sets of rules treat predictions alike, so there
    is nothing to choose here; what they do with the human answers: `vqa_accuracy`.
    """
    words = strip_punctuation(_on_one_line(text)).lower().split()
    numbers = (_NUMBER_WORDS.get(word, word) for word in words)
    return " ".join(_MENDED.get(word, word) for word in numbers if word not in _ARTICLES)


def strip_punctuation(text: str) -> str:
    """Removes each of ``; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? !`` or puts a space in its place, and removes periods.

    A mark is removed everywhere if the text has it beside a space anywhere, and all marks are if a comma stands between
    two digits; else a space takes its place. Of the periods that no digit follows, the first 32 are removed.
    """
    all_go = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in _MARKS:
        if mark in text:
            goes = all_go or f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


# ---------------------------------------------------------------------------------------------------------- scores


def vqa_accuracy(answers: Sequence[str], prediction: str, rules: Rules = "2021") -> float:
    """How far the humans agree with a prediction, 0 to 1.

    Each human in turn is left out, and the prediction earns min(1, matches / 3) against the others; the mean counts.
    With ten humans, 0, 1, 2, 3, 4 and more matches give 0, 0.3, 0.6, 0.9 and 1. With fewer than four humans the
    official formula never gives 1; here their score is the fraction that matches: for one human, exact match. (Where
    two entries of a file are equal in every field, the official scorer leaves both out; VQA's differ in "answer_id".)

    What is compared: if all human answers are the same, answers and prediction as they are, but for newlines, tabs and
    spaces at the ends ("Yes" does not match "yes"); else all after `normalize_answer`. By the rules of 2016, the
    prediction is always normalised, and human answers are never, but pass through `strip_punctuation` if they differ.

    Raises:
        ValueError: no human answers, one string instead of a list of them, a prediction that is no string, or unknown
            rules.
    """
    if not _are_answers(answers):
        raise ValueError(f"human answers must be a list of at least one string, got {answers!r}")
    if not isinstance(prediction, str):
        raise ValueError(f"a prediction must be a string, got {prediction!r}")
    answers, prediction = _as_compared(answers, prediction, rules)
    people, matches = len(answers), answers.count(prediction)
    if people < 4:
        return matches / people
    # The answer left out is one of the matches `matches` times. Whole numbers, so that 3 of 10 give 0.9 and not nearly.
    thirds = matches * min(3, matches - 1) + (people - matches) * min(3, matches)
    return thirds / (3 * people)


def _are_answers(answers: object) -> bool:
    return isinstance(answers, list | tuple) and bool(answers) and all(isinstance(text, str) for text in answers)


def _as_compared(answers: Sequence[str], prediction: str, rules: Rules) -> tuple[Sequence[str], str]:
    if rules == "2021":
        lines = [_on_one_line(answer) for answer in answers]
        if len(set(lines)) == 1:
            return lines, _on_one_line(prediction)
        return [normalize_answer(answer) for answer in answers], normalize_answer(prediction)
    if rules == "2016":
        differ = len(set(answers)) > 1
        return [strip_punctuation(answer) if differ else answer for answer in answers], normalize_answer(prediction)
    raise ValueError(f"unknown rules {rules!r}; there are {', '.join(get_args(Rules))}")


@dataclass(frozen=True)
class VqaAnnotation:
    """What people answered to a question.

    Attributes:
        answers: VQA v2 has ten.
        answer_type: "yes/no", "number" or "other"; "" if the data set does not say.
        question_type: the first words of the question, such as "how many"; "" if the data set does not say.
        multiple_choice_answer: the most frequent answer, as published; "" if the data set does not say.
    """

    question_id: str
    image_id: str
    answers: tuple[str, ...]
    answer_type: str = ""
    question_type: str = ""
    multiple_choice_answer: str = ""


def score_vqa(
    annotations: Iterable[VqaAnnotation],
    predictions: Mapping[Any, str],
    rules: Rules = "2021",
    *,
    by: Literal["answer_type", "question_type"] = "answer_type",
    allow_missing: bool = False,
) -> dict[str, float]:
    """Mean accuracy in percent, to four decimals: "overall", then that of each type, in alphabetical order.

    `predictions` are answers by question id, a number or the same number as a string. Errors as in
    `question_accuracies`.
    """
    annotations = list(annotations)
    accuracies = question_accuracies(annotations, predictions, rules, allow_missing=allow_missing)
    groups: dict[str, list[float]] = {}
    for annotation in annotations:
        accuracy = accuracies.get(str(annotation.question_id))
        if accuracy is not None and (name := getattr(annotation, by)):
            groups.setdefault(name, []).append(accuracy)
    return {"overall": _percent(list(accuracies.values()))} | {name: _percent(groups[name]) for name in sorted(groups)}


def question_accuracies(
    annotations: Iterable[VqaAnnotation],
    predictions: Mapping[Any, str],
    rules: Rules = "2021",
    *,
    allow_missing: bool = False,
) -> dict[str, float]:
    """`vqa_accuracy` of each question (0 to 1), by its id as a string, in the order of `annotations`.

    To compare two systems question by question, see `triptych.metrics.significance`.

    Raises:
        ValueError: nothing to score, a question that is annotated twice or without answers, two predictions for a
            question, a prediction that is no string or whose question is not annotated, or a question without a
            prediction (with `allow_missing` such questions are left out of every score instead).
    """
    annotation_of = _by_id(((annotation.question_id, annotation) for annotation in annotations), "annotations")
    prediction_of = _checked(predictions)
    if not prediction_of:
        raise ValueError("no predictions: there is nothing to score")
    _refuse("predictions for questions without annotations", prediction_of.keys() - annotation_of.keys())
    if not allow_missing:
        _refuse("questions without a prediction", annotation_of.keys() - prediction_of.keys())
    scored = {key: annotation for key, annotation in annotation_of.items() if key in prediction_of}
    _refuse("questions without human answers", (key for key in scored if not _are_answers(scored[key].answers)))
    return {key: vqa_accuracy(scored[key].answers, prediction_of[key], rules) for key in scored}


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 4)


def _checked(predictions: Mapping[Any, str]) -> dict[str, str]:
    found = _by_id(predictions.items(), "predictions")
    _refuse("predictions must be strings", (key for key, text in found.items() if not isinstance(text, str)))
    return found


def _by_id(pairs: Iterable[tuple[Any, T]], what: str) -> dict[str, T]:
    found: dict[str, T] = {}
    for question, value in pairs:
        if not _is_id(question):
            raise ValueError(f"{what}: a question id must be a whole number or a string, got {question!r}")
        if str(question) in found:
            raise ValueError(f"{what}: question {str(question)!r} occurs twice")
        found[str(question)] = value
    return found


def _is_id(value: object) -> bool:
    return isinstance(value, str | Integral) and not isinstance(value, bool)


def _refuse(what: str, questions: Iterable[str]) -> None:
    ids = sorted(questions, key=lambda question: (len(question), question))  # numbers in their order
    if ids:
        more = f" and {len(ids) - _NAMED_IDS} more" if len(ids) > _NAMED_IDS else ""
        raise ValueError(f"{what}: {', '.join(map(repr, ids[:_NAMED_IDS]))}{more}")


# ----------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class VqaQuestion:
    """A question about a picture."""

    question_id: str
    image_id: str
    question: str


def read_vqa_questions(path: str | Path) -> list[VqaQuestion]:
    """The questions of an official file: {"questions": [{"question_id", "image_id", "question"}]}.

    The file may be gzipped. Ids become strings: some write the number, others the same number as text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming file, entry and field: the file is no such JSON, or a question occurs twice.
    """
    return [
        VqaQuestion(question, _id(entry, "image_id", where), _text(entry, "question", where))
        for question, entry, where in _entries(path, "questions")
    ]


def read_vqa_annotations(path: str | Path) -> list[VqaAnnotation]:
    """The human answers of an official file: {"annotations": [{"question_id", "image_id", "answers", ...}]}.

    "answers" is a list of {"answer"}; "answer_type", "question_type" and "multiple_choice_answer" may be absent, as
    other data sets in this format have not all of them. Else as `read_vqa_questions`.
    """
    return [
        VqaAnnotation(
            question,
            _id(entry, "image_id", where),
            _answers(entry, where),
            answer_type=_text(entry, "answer_type", where, default=""),
            question_type=_text(entry, "question_type", where, default=""),
            multiple_choice_answer=_text(entry, "multiple_choice_answer", where, default=""),
        )
        for question, entry, where in _entries(path, "annotations")
    ]


def read_vqa_results(path: str | Path) -> dict[str, str]:
    """The answer to each question in a results file: [{"question_id", "answer"}]. Else as `read_vqa_questions`."""
    return {question: _text(entry, "answer", where) for question, entry, where in _entries(path, None)}


def write_vqa_results(path: str | Path, predictions: Mapping[Any, str]) -> None:
    """Writes answers by question id as the test server wants them: [{"question_id": 42, "answer": "yes"}].

    Ids that are written like a whole number become one; others, which VQA has not, stay strings. The file is replaced
    at once or not at all.

    Raises:
        ValueError: an answer that is no string, or two answers to one question.
    """
    entries = [{"question_id": _as_number(key), "answer": text} for key, text in _checked(predictions).items()]
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(entries), encoding="utf-8")
    temporary.replace(path)


def _as_number(question: str) -> int | str:
    return int(question) if re.fullmatch("-?[1-9][0-9]*|0", question) else question  # "007" is not the id 7


def _entries(path: str | Path, name: str | None) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Question id, entry and its place for messages, of the list `name` of the file or of the file that is a list."""
    content = read_json(path)
    if name is None:
        expected, entries = "list", content
    else:
        expected, entries = f'object with a list "{name}"', content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON {expected}")
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        where = f"{path}: {name or 'entry'}[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
        question = _id(entry, "question_id", where)
        if question in seen:
            raise ValueError(f"{where}: question_id {question!r} occurs a second time")
        seen.add(question)
        yield question, entry, where


def _id(entry: Mapping[str, Any], field: str, where: str) -> str:
    value = entry.get(field)
    if not _is_id(value):
        raise ValueError(f'{where}: needs "{field}", a whole number or a string')
    return str(value)


def _text(entry: Mapping[str, Any], field: str, where: str, default: str | None = None) -> str:
    text = entry.get(field, default)
    if not isinstance(text, str):
        raise ValueError(f'{where}: needs "{field}", a string')
    return text


def _answers(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answers = entry.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError(f'{where}: needs "answers", a list of objects')
    return tuple(_text(answer, "answer", f"{where}: answers[{number}]") for number, answer in enumerate(answers))
