"""``triptych score``: the exact metrics by themselves, on the official files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from triptych.commands.output import print_json, say


def score_captions(references: Path, predictions: Path, allow_missing: bool = False, java: bool = False) -> None:
    """Score captions that any program wrote: BLEU, ROUGE-L and CIDEr, exactly as the field's scorer gives them.

    Args:
        references: COCO caption annotations.
        predictions: COCO results: a list of {"image_id", "caption"}.
        allow_missing: score only the pictures that have a prediction.
        java: also METEOR and SPICE, which need the extra "java-metrics" and Java.
    """
    from triptych.metrics.captions import java_metrics, read_coco_references, read_coco_results, score_captions

    expected, found = read_coco_references(references), read_coco_results(predictions)
    scores = score_captions(expected, found, allow_missing=allow_missing)
    if java:
        scores |= java_metrics(expected, found)
    else:
        say("METEOR and SPICE: not computed (--java computes them)")
    print_json(scores)


def score_vqa(
    questions: Path,
    annotations: Path,
    predictions: Path,
    rules: Literal["2021", "2016"] = "2021",
    by: Literal["answer_type", "question_type"] = "answer_type",
    allow_missing: bool = False,
) -> None:
    """Score answers that any program wrote: VQA v2's accuracy in percent, exactly as its owners' scorer gives it.

    Args:
        questions: the official questions.
        annotations: the official annotations with the human answers.
        predictions: results: a list of {"question_id", "answer"}.
        rules: of the official scorer since March 2021, or those that papers before it used.
        by: what accuracies beside the overall one are given by.
        allow_missing: score only the questions that have a prediction.
    """
    from triptych.metrics.vqa import read_vqa_annotations, read_vqa_questions, read_vqa_results, score_vqa

    asked, expected = read_vqa_questions(questions), read_vqa_annotations(annotations)
    unknown = {one.question_id for one in expected} - {one.question_id for one in asked}
    if unknown:
        raise ValueError(f"{annotations} answers question {min(unknown)}, which {questions} does not have")
    found = read_vqa_results(predictions)
    print_json(score_vqa(expected, found, rules, by=by, allow_missing=allow_missing))


def score_nlvr2(data: Path, predictions: Path) -> None:
    """Score judgements that any program wrote: NLVR2's accuracy and consistency in percent, as its owners' script.

    Args:
        data: the official JSON lines.
        predictions: lines "identifier,True" or "identifier,False".
    """
    from triptych.metrics.nlvr2 import read_nlvr2_labels, read_nlvr2_predictions
    from triptych.metrics.nlvr2 import score_nlvr2 as run

    print_json(run(read_nlvr2_labels(data), read_nlvr2_predictions(predictions)))
