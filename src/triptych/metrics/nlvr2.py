"""Accuracy and consistency of statements about pictures, equal to the scorer of NLVR2's owners.

Source: lil-lab/nlvr ``nlvr2/eval/metrics.py`` and ``nlvr2/README.md``. An identifier is SPLIT-SET-PAIR-SENTENCE
("dev-12-0-1"): one sentence is judged about up to four pairs of pictures of a set, so those that differ in PAIR alone
are one group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMED_IDS = 5  # how many offending ids an error lists

_IDENTIFIER = re.compile(r"(\w+)-(\d+)-(\d+)(?:-(\d+))?")
_TRUTH = {"true": True, "false": False}


# ---------------------------------------------------------------------------------------------------------- scores


def sentence_group(identifier: str, sentence: str | None = None) -> str | None:
    """What all statements of one sentence have in common; None where the identifier does not tell.

    The identifiers of BridgeTower's tables are those of pairs ("dev-12-0"); there the set and the `sentence` itself
    make the group.
    """
    match = _IDENTIFIER.fullmatch(identifier)
    split, picture_set, _, number = match.groups() if match else (None,) * 4
    number = number or sentence
    return None if match is None or number is None else f"{split}-{picture_set}-{number}"


def consistency(groups: Sequence[Hashable], right: Sequence[bool]) -> float:
    """Share of the groups whose statements are all right, 0 to 1.

    Args:
        groups: of each statement.
        right: whether it was judged rightly.

    Raises:
        ValueError: no statements, or lengths that differ.
    """
    if not groups or len(groups) != len(right):
        raise ValueError(f"give one group for each of one or more statements, not {len(groups)} for {len(right)}")
    all_right: dict[Hashable, bool] = {}
    for group, hit in zip(groups, right, strict=True):
        all_right[group] = all_right.get(group, True) and hit
    return sum(all_right.values()) / len(all_right)


def score_nlvr2(labels: Mapping[str, bool], predictions: Mapping[str, bool]) -> dict[str, float]:
    """ "accuracy" and "consistency" in percent, to four decimals.

    As in the official script, predictions of statements that `labels` does not have are left aside: one file may hold
    those of several splits.

    Args:
        labels: by identifier, as `read_nlvr2_labels` gives them.
        predictions: by identifier.

    Raises:
        ValueError: nothing to score, an identifier that is not SPLIT-SET-PAIR-SENTENCE, or a missing prediction.
    """
    if not labels:
        raise ValueError("no statements: there is nothing to score")
    groups = {name: sentence_group(name) for name in labels}
    _refuse("identifiers that are not SPLIT-SET-PAIR-SENTENCE", (name for name in labels if groups[name] is None))
    _refuse("statements without a prediction", (name for name in labels if name not in predictions))
    right = [predictions[name] == label for name, label in labels.items()]
    return {
        "accuracy": round(100 * sum(right) / len(right), 4),
        "consistency": round(100 * consistency(list(groups.values()), right), 4),
    }


def _refuse(what: str, names: Iterable[str]) -> None:
    found = list(names)
    if found:
        more = f" and {len(found) - _NAMED_IDS} more" if len(found) > _NAMED_IDS else ""
        raise ValueError(f"{what}: {', '.join(map(repr, found[:_NAMED_IDS]))}{more}")


# ----------------------------------------------------------------------------------------------------------- files


def read_nlvr2_labels(path: str | Path) -> dict[str, bool]:
    """The label of each statement of an official file: JSON lines with "identifier" and "label" ("True" or "False").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming file, line and field: a line is no such JSON, or an identifier occurs twice.
    """
    labels: dict[str, bool] = {}
    for where, line in _lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        name = entry.get("identifier") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ValueError(f'{where}: needs "identifier", a string')
        if name in labels:
            raise ValueError(f"{where}: a second statement {name!r}")
        labels[name] = _truth(entry.get("label"), f'{where}: "label"')
    return labels


def read_nlvr2_predictions(path: str | Path) -> dict[str, bool]:
    """The prediction of each statement of an official file: lines IDENTIFIER,True or IDENTIFIER,False, no header.

    As in the official script, upper and lower case are the same and further columns are ignored. A statement may occur
    again if its prediction is the same, as in files that several processes wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming file and line: a line is of another form, or two predictions of a statement differ. (The
            official script counts anything but True and False as wrong, and the last of several predictions.)
    """
    predictions: dict[str, bool] = {}
    for where, line in _lines(path):
        name, found, rest = line.partition(",")
        if not found:
            raise ValueError(f"{where}: must be IDENTIFIER,True or IDENTIFIER,False, not {line[:60]!r}")
        prediction = _truth(rest.split(",")[0], f"{where}: the prediction")
        if predictions.setdefault(name, prediction) != prediction:
            raise ValueError(f"{where}: {name!r} was {not prediction} before")
    return predictions


def write_nlvr2_predictions(path: str | Path, predictions: Iterable[Mapping[str, Any]]) -> None:
    """Write what `read_nlvr2_predictions` and the official script read.

    Args:
        predictions: of each statement "identifier" and "prediction" (bool), as the task's report has them.

    Raises:
        ValueError: an identifier with a comma or a line break, or that occurs twice with different predictions (those
            of BridgeTower's tables name pairs of pictures, which can have two statements).
    """
    written: dict[str, bool] = {}
    for entry in predictions:
        name, prediction = entry["identifier"], entry["prediction"]
        if "," in name or len(name.splitlines()) != 1:
            raise ValueError(f"an identifier must be one line without a comma, not {name!r}")
        if written.setdefault(name, prediction) != prediction:
            raise ValueError(f"two statements have the identifier {name!r}, and different predictions")
    Path(path).write_text("".join(f"{name},{prediction}\n" for name, prediction in written.items()), encoding="utf-8")


def _lines(path: str | Path) -> list[tuple[str, str]]:
    """Place and content of each line that is not empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from error
    numbered = enumerate(map(str.strip, text.split("\n")), start=1)
    return [(f"{path}: line {number}", line) for number, line in numbered if line]


def _truth(value: Any, where: str) -> bool:
    known = value if isinstance(value, bool) else _TRUTH.get(value.lower()) if isinstance(value, str) else None
    if known is None:
        raise ValueError(f"{where} must be True or False, not {value!r}")
    return known
