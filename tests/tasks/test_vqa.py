"""Visual question answering: what is read, the losses, the three ways to answer, the report."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from triptych.data.batches import Tokens
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import ListShard, Source, open_source
from triptych.data.tokenizers import Tokenizer, train_wordpiece
from triptych.data.transforms import HALF, Preprocessing
from triptych.generation import BeamSearch, rank_texts
from triptych.models.mplug import MPlug
from triptych.tasks.vqa import Question, ReadQuestions, VisualQuestionAnswering, VqaBatch, VqaConfig

PIXELS = Preprocessing(16, HALF, HALF)
ANSWERS = ("red", "two", "a large blue star", "yes", "no", "blue star")
QUESTIONS = (
    Question(1, "what colour is it ?", ("red",) * 7 + ("blue star",) * 3, (0.1,) * 10, "other"),
    Question(2, "how many stars are there ?", ("two",), (0.5,), "number"),
    Question("q3", "is it red ?", (), ()),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece([*ANSWERS, *(question.text for question in QUESTIONS)] * 3, 120)


@pytest.fixture
def model(tokenizer: Tokenizer, build_model: Callable[[Tokenizer], MPlug]) -> MPlug:
    model = build_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def task_of(model: MPlug, tokenizer: Tokenizer, **changes: Any) -> VisualQuestionAnswering:
    torch.manual_seed(1)
    config = dataclasses.replace(VqaConfig(answers=ANSWERS, search=BeamSearch(2, 1, 4)), **changes)
    return VisualQuestionAnswering(model, tokenizer, PIXELS, config).eval()


def batch_of(task: VisualQuestionAnswering) -> VqaBatch:
    """Two pictures; the first has two questions."""
    torch.manual_seed(2)
    pixels_BCHW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    return task.batch(pixels_BCHW, torch.tensor([0, 0, 1]), QUESTIONS, max_tokens=20)


def fused_one(task: VisualQuestionAnswering, batch: VqaBatch, row: int) -> Any:
    """A question's fused state computed alone, without padding."""
    picture = int(batch.picture_Q[row])
    length = int(batch.question.mask_BL[row].sum())
    image = task.model.encode_image(PIXELS.normalize(batch.pixels[picture : picture + 1]))
    return task.model.fuse(image, task.model.encode_text(batch.question.ids_BL[row : row + 1, :length]))


def log_probability(task: VisualQuestionAnswering, memory: Any, text: str, rule: str = "chain") -> float:
    """Of ``text [SEP]``, from scratch."""
    ids_1L, _ = task.tokenizer.encode_batch([text], max_length=None, end=True)
    decoder = task.model.decoder
    assert decoder is not None
    logits_1LV = decoder.logits(decoder(ids_1L[:, :-1], memory))
    each_L = logits_1LV.log_softmax(-1).gather(2, ids_1L[:, 1:, None])[0, :, 0]
    return (each_L.sum() + (each_L[0] if rule == "official" else 0)).item()


def test_the_generation_loss_is_the_official_sum(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer)
    batch = batch_of(task)
    first, second = (fused_one(task, batch, row).states() for row in (0, 1))
    expected = -(0.7 * log_probability(task, first, "red") + 0.3 * log_probability(task, first, "blue star"))
    expected -= 0.5 * log_probability(task, second, "two")
    assert task(batch)["vqa"].item() == pytest.approx(expected / 3, abs=1e-4)  # the third has no answer


def test_the_classification_loss_has_soft_targets(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer, answering="classify")
    batch = batch_of(task)
    index = {answer: number for number, answer in enumerate(ANSWERS)}
    target_QK = torch.zeros(3, len(ANSWERS))
    target_QK[0, index["red"]] = 1.0  # seven of ten
    target_QK[0, index["blue star"]] = 0.9  # three of ten
    target_QK[1, index["two"]] = 1.0  # the only one asked
    assert torch.allclose(batch.target_QK, target_QK)
    logits_QK = torch.cat([task.head(fused_one(task, batch, row).pooled_BP) for row in range(3)])
    expected = F.binary_cross_entropy_with_logits(logits_QK, target_QK) * len(ANSWERS)
    assert task(batch)["vqa"].item() == pytest.approx(expected.item(), abs=1e-4)
    assert task.predict(batch) == [ANSWERS[number] for number in logits_QK.argmax(1).tolist()]


@pytest.mark.parametrize("answering", ["generate", "rank", "classify"])
def test_only_what_runs_is_trained(model: MPlug, tokenizer: Tokenizer, answering: str) -> None:
    task = task_of(model, tokenizer, answering=answering)
    model.train_only(*task.uses)
    task(batch_of(task))["vqa"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


@pytest.mark.parametrize("rule", ["chain", "official"])
@pytest.mark.parametrize("candidates", [0, 3])
@pytest.mark.parametrize("rows_at_once", [1, 6, 1000])
def test_ranking_equals_scoring_each_pair_from_scratch(
    model: MPlug, tokenizer: Tokenizer, rule: Any, candidates: int, rows_at_once: int
) -> None:
    task = task_of(model, tokenizer)
    batch = batch_of(task)
    assert model.decoder is not None
    memory = task.fuse(batch, batch.question).states()
    texts = Tokens(*tokenizer.encode_batch(ANSWERS, max_length=None, end=True))
    best_QK, score_QK = rank_texts(
        model.decoder, memory, texts, candidates=candidates, rule=rule, rows_at_once=rows_at_once
    )
    for row in range(3):
        alone = fused_one(task, batch, row).states()
        scores = {answer: log_probability(task, alone, answer, rule) for answer in ANSWERS}
        if candidates:
            first_V = model.decoder.logits(model.decoder(torch.tensor([[tokenizer.bos_id]]), alone))[0, 0]
            firsts = {answer: first_V[texts.ids_BL[number, 1]].item() for number, answer in enumerate(ANSWERS)}
            kept = sorted(scores, key=lambda answer: -firsts[answer])[:candidates]
            scores = {answer: scores[answer] for answer in kept}
        expected = sorted(scores.items(), key=lambda pair: -pair[1])
        assert [ANSWERS[number] for number in best_QK[row].tolist()] == [answer for answer, _ in expected]
        torch.testing.assert_close(score_QK[row], torch.tensor([score for _, score in expected]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("answering", ["generate", "rank", "classify"])
def test_questions_are_answered_alone_as_together(model: MPlug, tokenizer: Tokenizer, answering: str) -> None:
    task = task_of(model, tokenizer, answering=answering)
    batch = batch_of(task)
    alone = [
        task.predict(task.batch(batch.pixels[p : p + 1], torch.tensor([0]), [QUESTIONS[row]], max_tokens=20))[0]
        for row, p in enumerate(batch.picture_Q.tolist())
    ]
    assert task.predict(batch) == alone


def test_the_inputs_of_mplug(tokenizer: Tokenizer) -> None:
    extra = {"question": "What?", "question_id": 5, "answers": ["a"], "ocr": "STOP. now!", "object_labels": "sign pole"}
    record = Record("k", None, (), "7", extra)
    assert ReadQuestions("[SEP]", False, False)(record)[0].text == "What?"
    assert ReadQuestions("[SEP]", True, True)(record)[0].text == "What? [SEP] stop now [SEP] sign pole"
    with pytest.raises(BrokenSample, match="k: it has no question"):
        ReadQuestions("[SEP]", True, True)(Record("k", None, ("a caption",), "7"))


def test_many_questions_of_a_picture_and_their_weights() -> None:
    listed = [{"question": "a?", "answer": "x", "kind": "colour"}, {"question": "b?", "answers": ["y", "z"]}]
    found = ReadQuestions("[SEP]", False, False)(Record("k", None, (), "7", {"questions": listed}))
    assert [(q.question_id, q.answers, q.weights, q.answer_type) for q in found] == [
        ("7#0", ("x",), (1.0,), "colour"),
        ("7#1", ("y", "z"), (0.5, 0.5), None),
    ]
    weighted = Record("k", None, (), "7", {"question": "a?", "answers": ["x"], "answer_weights": [0.5]})
    assert ReadQuestions("[SEP]", False, False)(weighted)[0].weights == (0.5,)


def wrong(field: str) -> list[dict[str, Any]]:
    """Two questions, of which the second has a wrong value."""
    values = {
        "question": 3,
        "question_id": 1.5,
        "answers": [2],
        "answer_weights": [1.0],
        "scores": [0.5, float("nan")],
        "kind": 7,
    }
    right = {"question": "a?", "answers": ["x", "y"]}
    return [right, {**right, field: values[field]}]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "it has no question"),
        ({"question": "a?"}, "'questions' must be a list, got"),
        (["a?"], r"questions\[0\]: not a JSON object but 'a\?'"),
        ([{"answer": "x"}], r"questions\[0\]: the field 'question' is missing"),
        (wrong("question"), r"questions\[1\]: 'question' must be a text, got '3'"),
        (wrong("question_id"), r"questions\[1\]: 'question_id' must be a whole number or a text, got '1.5'"),
        (wrong("answers"), r"questions\[1\]: 'answers' must be a text or a list of texts, got '\[2\]'"),
        (wrong("answer_weights"), r"questions\[1\]: 'answer_weights' must be 2 numbers from 0 on, one for each answer"),
        (wrong("scores"), r"questions\[1\]: 'scores' must be 2 numbers from 0 on, one for each answer, got"),
        (wrong("kind"), r"questions\[1\]: 'kind' must be a text, got '7'"),
        (
            [{"question": "a?", "answer": "x", "scores": [0.0]}],
            r"questions\[0\]: 'scores' must be above 0 for one answer at least, got '\[0.0\]'",
        ),
        ([{"question": "a?", "answer": "x", "scores": [10**400]}], r"questions\[0\]: 'scores' must be 1 numbers"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(listed: Any, message: str) -> None:
    with pytest.raises(BrokenSample, match=f"^k: {message}"):
        ReadQuestions("[SEP]", False, False)(Record("k", None, (), "7", {"questions": listed}))


def test_a_question_may_have_no_answers() -> None:
    for extra in ({"answers": []}, {"answer": None}, {"answers": [], "scores": []}):
        (question,) = ReadQuestions("[SEP]", False, False)(Record("k", None, (), "7", {"question": "a?", **extra}))
        assert (question.answers, question.weights) == ((), ())


def test_a_wrong_record_is_skipped(model: MPlug, tokenizer: Tokenizer) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "png")
    rows = [{"questions": wrong("scores")}, {"question": "is it red ?", "question_id": 5, "answer": "no"}]
    records = tuple(Record(str(n), file.getvalue(), (), str(n), row) for n, row in enumerate(rows))
    report = task_of(model, tokenizer).evaluate(Source((ListShard("rows", records),)))
    assert [one["question_id"] for one in report.predictions] == [5]
    assert VqaConfig("classify", min_count=1).completed(records).answers == ("no",)


def test_what_all_say_can_be_answered(model: MPlug, tokenizer: Tokenizer) -> None:
    """Where all agree the scorer compares letter by letter: a class is called what people call it."""
    records = [Record(str(n), None, (), "7", {"question": "how many ?", "answer": "two"}) for n in range(2)]
    config = VqaConfig("classify", min_count=1).completed(records)
    task = task_of(model, tokenizer, answering="classify", answers=config.answers)
    (question,) = task.items()(records[0])
    assert task._targets(question).tolist() == [1.0]
    assert task.report([question], list(config.answers)).scores["overall"] == 100


def test_scores_of_the_source_are_the_targets(model: MPlug, tokenizer: Tokenizer) -> None:
    extra = {"question": "?", "answers": ["red", "no"], "scores": [0.9, 0.3]}
    (question,) = ReadQuestions("[SEP]", False, False)(Record("k", None, (), "7", extra))
    assert question.weights == (pytest.approx(0.75), pytest.approx(0.25))
    target_K = task_of(model, tokenizer, answering="classify")._targets(question)
    assert target_K.tolist() == [pytest.approx(0.9), 0, 0, 0, pytest.approx(0.3), 0]


def test_the_list_of_answers_comes_from_the_data() -> None:
    def record(*answers: str) -> Record:
        return Record("k", None, (), "7", {"question": "?", "answers": list(answers)})

    counted = [record("Two", "2", "two"), record("two"), record("two")]
    records = [record("the cat"), *counted, record("cat"), record("cat"), record("dog")]
    config = VqaConfig(answering="classify", min_count=3)
    assert config.completed(records).answers == ("cat", "two")
    assert dataclasses.replace(config, answering="generate").completed(records).answers == ()
    assert dataclasses.replace(config, answers=("a",)).completed(records).answers == ("a",)
    with pytest.raises(ValueError, match="no answer occurs 9 times"):
        VqaConfig(answering="rank").completed(records)


def test_what_cannot_work_is_refused(model: MPlug, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="answering must be one of"):
        VqaConfig(answering="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a list of answers"):
        VisualQuestionAnswering(model, tokenizer, PIXELS, VqaConfig(answering="rank"))
    model.decoder = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="has no decoder: answer with answering='classify'"):
        VisualQuestionAnswering(model, tokenizer, PIXELS)


def test_the_report_is_the_official_accuracy_by_type(model: MPlug, tokenizer: Tokenizer) -> None:
    report = task_of(model, tokenizer).report(QUESTIONS, ["blue star", "two", "yes"])
    assert report.scores == {"overall": 95.0, "number": 100.0, "other": 90.0}
    assert report.credits == [pytest.approx(0.9), 1.0]
    assert report.predictions == [
        {"question_id": 1, "answer": "blue star"},
        {"question_id": 2, "answer": "two"},
        {"question_id": "q3", "answer": "yes"},
    ]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "questions.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(5):
            picture = io.BytesIO()
            Image.new("RGB", (20, 16), (50 * number, 90, 10)).save(picture, "PNG")
            asked = [{"question": "what colour is it ?", "answer": "red"}, {"question": "is it red ?", "answer": "no"}]
            values = json.dumps({"image_id": f"p{number}", "questions": asked[: 1 + number % 2]}).encode()
            for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.json", values)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_evaluation_asks_every_question_once(model: MPlug, tokenizer: Tokenizer, shard: Path) -> None:
    task = task_of(model, tokenizer)
    report = task.evaluate(open_source(str(shard)), pictures=2)
    asked = [row["question_id"] for row in report.predictions]
    assert asked == ["p0#0", "p1#0", "p1#1", "p2#0", "p3#0", "p3#1", "p4#0"]
    assert report.predictions == task.evaluate(open_source(str(shard))).predictions
    assert len(task.evaluate(open_source(str(shard)), limit=3, pictures=2).predictions) == 4
    blank = task.evaluate(open_source(str(shard)), blank=True)
    assert len({row["answer"] for row in blank.predictions if row["question_id"].endswith("#0")}) == 1


def test_training_draws_some_questions_of_each_picture(model: MPlug, tokenizer: Tokenizer, shard: Path) -> None:
    task = task_of(model, tokenizer, per_picture=1)
    pipeline = task.training_pipeline(PIXELS.test_transform(), 30, 20)
    record = list(open_source(str(shard)))[1]
    drawn = {pipeline.prepare(record, seed).items[0].question_id for seed in range(20)}
    assert drawn == {"p1#0", "p1#1"}
    assert pipeline.prepare(record, 3).items == pipeline.prepare(record, 3).items
    everything = task_of(model, tokenizer, per_picture=0).training_pipeline(PIXELS.test_transform(), 30, 20)
    batch = everything.collate([everything.prepare(record, 0) for record in open_source(str(shard))])
    assert batch.picture_Q.tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert len(batch) == 7


def test_a_head_is_kept_apart_from_the_model(model: MPlug, tokenizer: Tokenizer) -> None:
    task = task_of(model, tokenizer, answering="classify")
    state = {name: value + 1 for name, value in task.own_state().items()}
    assert state
    assert all(name.startswith("head.") for name in state)
    other = task_of(model, tokenizer, answering="classify")
    other.load_own_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.own_state().items())
    with pytest.raises(ValueError, match="has not the head"):
        other.load_own_state({})
    with pytest.raises(ValueError, match="does not fit"):
        other.load_own_state({name: value[..., :1] for name, value in state.items()})
