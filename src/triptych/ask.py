"""Asking a saved model about picture and video files: every task, for ``triptych predict``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from triptych.data.pictures import alike, file_record, is_video, show, stack
from triptych.data.samples import BrokenSample, Record
from triptych.predict import Predictor
from triptych.tasks.base import ItemTask
from triptych.tasks.retrieval import encode_collection, evaluate_retrieval
from triptych.tasks.text_classification import TextClassification
from triptych.training.parallel import autocast

_AT_ONCE = 32

logger = logging.getLogger(__name__)

Answer = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How a task's texts are asked of one picture, and what an answer is called.

    Attributes:
        texts: the field of a record that lists what is asked; empty where nothing is.
        text: what each is called there.
        asked, answer: what text and answer are called in the output.
    """

    texts: str
    text: str
    asked: str
    answer: str


FORMS: Mapping[str, Form] = {
    "vqa": Form("questions", "question", "question", "answer"),
    "grounding": Form("phrases", "text", "phrase", "box_xyxy"),
    "entailment": Form("entailment", "hypothesis", "hypothesis", "label"),
    "image_classification": Form("", "", "", "label"),
}


def ask(predictor: Predictor, task: str, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[Answer]:
    """One JSON object an answer.

    Args:
        task: any; ``retrieval`` orders the files by how well they fit each text, ``nlvr2`` judges statements about all
            files together, and ``text_classification`` takes texts alone.
        paths: pictures and videos.
        texts: questions, phrases, hypotheses, statements or descriptions.

    Raises:
        ValueError: the checkpoint was not trained for the task, texts or files are missing or not wanted, or none of
            the files can be read.
        BrokenSample: a file cannot be read, where all are judged together; elsewhere it is skipped and logged.
    """
    _check(task, paths, texts)
    predictor.check(task)
    answered = False
    for answer in _answers(predictor, task, paths, texts):
        answered = True
        yield answer
    if not answered:
        raise ValueError("none of the files can be read")


def _answers(predictor: Predictor, task: str, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[Answer]:
    if task == "caption":
        yield from ({"image": str(path), "caption": text} for path, text in predictor.caption_files(paths))
    elif task == "retrieval":
        yield from _search(predictor, paths, texts)
    elif task == "nlvr2":
        yield from _judge(predictor, paths, texts)
    elif task == "text_classification":
        yield from _classify(predictor, texts)
    else:
        yield from _ask_each(predictor, task, paths, texts)


def _check(task: str, paths: Sequence[Path], texts: Sequence[str]) -> None:
    wants_texts = task not in ("caption", "image_classification")
    if wants_texts != bool(texts):
        raise ValueError(f"{task} {'needs --text' if wants_texts else 'takes no --text'}")
    if task in ("grounding", "nlvr2") and any(map(is_video, paths)):
        raise ValueError(f"{task} looks at pictures, not at videos")
    wants_files = task != "text_classification"
    if wants_files != bool(paths):
        raise ValueError(f"{task} {'needs files' if wants_files else 'takes no files'}")


def _ask_each(predictor: Predictor, task: str, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[Answer]:
    """All texts of each file, a few files at a time."""
    form, own = FORMS[task], predictor.item_task(task)
    if getattr(own.config, "premise", False):
        raise ValueError("this model judges a hypothesis by a premise, too: evaluate it on a list that has both")
    extra = {form.texts: [{form.text: text} for text in texts]} if form.texts else {}
    for some in alike(paths, at_once=_AT_ONCE):
        for path, answers in _answered(predictor, own, [(path, file_record(path, extra=extra)) for path in some]):
            for text, answer in zip(texts or ("",), answers, strict=True):
                asked = {form.asked: text} if form.asked else {}
                yield {"image": str(path), **asked, form.answer: _plain(answer)}


def _plain(answer: Any) -> Any:
    """An answer as JSON has it; boxes to a hundredth of a pixel."""
    return [round(number, 2) for number in answer] if isinstance(answer, tuple) else answer


def _answered(
    predictor: Predictor, task: ItemTask[Any, Any], files: Sequence[tuple[Path, Record]]
) -> Iterator[tuple[Path, list[Any]]]:
    """The answers about each file; where one cannot be read, it is skipped, and the others are asked one by one."""
    try:
        with autocast(predictor.device, predictor.precision):
            answers = task.answer([record for _, record in files])
    except BrokenSample as error:
        if len(files) == 1:
            logger.warning("skipped %s", error)
            return
        for one in files:
            yield from _answered(predictor, task, [one])
        return
    each = len(answers) // len(files)
    for number, (path, _) in enumerate(files):
        yield path, answers[number * each : (number + 1) * each]


def _judge(predictor: Predictor, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[Answer]:
    """Statements about one picture, or two in their order."""
    names = [str(path) for path in paths]
    image, images = (names[0], {}) if len(names) == 1 else (None, {"images": names})
    shown = " ".join(names)
    records = [Record(shown, image, (), shown, {**images, "statement": text}) for text in texts]
    with autocast(predictor.device, predictor.precision):
        judged = predictor.item_task("nlvr2").answer(records)
    for text, truth in zip(texts, judged, strict=True):
        yield {"images": names, "statement": text, "prediction": truth}


def _classify(predictor: Predictor, texts: Sequence[str]) -> Iterator[Answer]:
    task = predictor.task("text_classification")
    assert isinstance(task, TextClassification)
    records = [Record(text, None, (), text, {"text": text}) for text in texts]
    with autocast(predictor.device, predictor.precision):
        labels = task.answer(records)
    yield from ({"text": text, "label": label} for text, label in zip(texts, labels, strict=True))


def _search(predictor: Predictor, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[Answer]:
    """The files for each text, best first: by the matching of the checkpoint's candidates, or by embeddings."""
    if len({is_video(path) for path in paths}) > 1:
        raise ValueError("pictures and videos are searched apart")
    preprocessing = predictor.preprocessing
    transform = preprocessing.test_transform()

    def shown() -> Iterator[tuple[Sequence[Record], Tensor]]:
        asked = tuple(texts)  # as if they were captions of the first file
        for some in alike(paths, at_once=_AT_ONCE):
            records, pixels = [], []
            for path in some:
                try:
                    pixels.append(show(file_record(path), transform, preprocessing.frames))
                except BrokenSample as error:
                    logger.warning("skipped %s", error)
                    continue
                records.append(replace(file_record(path), captions=asked))
                asked = ()
            if records:
                yield records, stack(pixels)

    with autocast(predictor.device, predictor.precision):
        collection = encode_collection(
            predictor.model, predictor.tokenizer, preprocessing, shown(), predictor.retrieval
        )
        found = evaluate_retrieval(predictor.model, collection, predictor.retrieval)
    for text, best in zip(texts, found.images_of_text, strict=True):
        yield {"text": text, "images": [collection.records[index].image_id for index in best.tolist()]}
