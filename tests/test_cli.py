"""The installed command from end to end: a newcomer's session on a few generated pictures."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from triptych import cli

SHORT = ["--steps", "2", "--batch-size", "4", "--precision", "fp32"]
Run = Callable[..., Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command and gives what it printed to stdout, which must be JSON and nothing else."""

    def call(*arguments: object) -> Any:
        capsys.readouterr()
        cli.main([str(argument) for argument in arguments])
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the command, which must end with code 2, and gives the one line that says why."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == ""
        assert "Traceback" not in err
        return err

    return call


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 16 training and 6 test scenes, and two of the pictures as files."""
    folder = tmp_path_factory.mktemp("world")
    cli.main(["data", "shapes", str(folder), "--train", "16", "--test", "6", "--compositions", "2", "--size", "48"])
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (60, 40), colour).save(folder / f"{colour}-{number}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(world: Path) -> Path:
    """A model pre-trained for two steps."""
    folder = world / "pretrained"
    cli.main(["pretrain", "shapes_tiny", "--data", str(world / "train-*.tar"), "--folder", str(folder), *SHORT])
    return folder / "model"


def test_shapes_says_what_it_wrote(run: Run, tmp_path: Path) -> None:
    written = run("data", "shapes", tmp_path, "--train", 3, "--test", 2, "--compositions", 0)
    assert set(written) == {"train", "test"}
    assert all(Path(path).exists() for paths in written.values() for path in paths)
    assert run("data", "check", written["train"][0])["pictures"] == 3


def test_a_table_is_written_and_read_again(run: Run, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    table = tmp_path / "shapes.arrow"
    written = run("data", "arrow", world / "test-*.tar", "--to", table, "--kind", "captions", "--split", "test")
    assert (written["path"], written["rows"], written["skipped_count"]) == (str(table), 6, 0)
    checked = run("data", "check", table)
    assert checked["formats"] == {str(table): "arrow"}
    assert (checked["pictures"], checked["captions"]) == (6, written["texts"])


def test_pretraining_evaluates_and_goes_on(run: Run, world: Path, tmp_path: Path) -> None:
    command = ["pretrain", "shapes_tiny", "--data", world / "train-*.tar", "--folder", tmp_path, *SHORT]
    command += ["--evaluate-data", world / "test-*.tar"]
    result = run(*command)
    assert result["finished"]
    assert result["step"] == 2
    assert {"mean", "t2i_r1", "CIDEr"} <= set(result["metrics"])
    log = (tmp_path / "log.jsonl").read_bytes()
    assert run(*command)["step"] == 2  # nothing is left to do
    assert (tmp_path / "log.jsonl").read_bytes() == log
    longer = run(*command, "--steps", 3)
    assert longer["step"] == 3


@pytest.mark.parametrize("task", ["caption", "retrieval"])
def test_finetuning_starts_from_a_checkpoint(
    run: Run, world: Path, pretrained: Path, task: str, tmp_path: Path
) -> None:
    result = run(
        *("finetune", task, "shapes_tiny", "--start", pretrained, "--data", world / "train-*.tar"),
        *("--evaluate-data", world / "test-*.tar", "--folder", tmp_path, *SHORT),
    )
    assert result["finished"]
    assert ("CIDEr" if task == "caption" else "t2i_r1") in result["metrics"]
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (pretrained, tmp_path / "model")]
    assert tokenizers[0] == tokenizers[1]


def test_captions_are_evaluated_and_scored_alike(run: Run, world: Path, pretrained: Path, tmp_path: Path) -> None:
    common = ["evaluate", "caption", "--checkpoint", pretrained, "--data", world / "test-*.tar"]
    scores = run(*common, "--predictions", tmp_path / "captions.json")
    assert {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"} <= set(scores)
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 6
    assert set(run(*common, "--blank", "--limit", 3)) == set(scores)


def test_retrieval_is_evaluated(run: Run, world: Path, pretrained: Path) -> None:
    scores = run("evaluate", "retrieval", "--checkpoint", pretrained, "--data", world / "test-*.tar")
    assert scores["t2i_r10"] == 100  # of six pictures
    assert 0 <= scores["t2i_r1"] <= 100


def test_predictions_come_a_picture_a_line(world: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in sorted(world.glob("*.png"))]
    cli.main(["predict", "caption", *paths, "--checkpoint", str(pretrained), "--beams", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == paths
    assert all(isinstance(line["caption"], str) for line in lines)


def test_scores_of_captions_that_another_program_wrote(run: Run, tmp_path: Path) -> None:
    references = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "A dog runs on the beach."},
            {"id": 2, "image_id": 2, "caption": "Two cats sleep on a sofa."},
        ],
    }
    results = [{"image_id": 1, "caption": "a dog runs on the beach"}, {"image_id": 2, "caption": "a red car"}]
    for name, value in (("references", references), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    files = ["--references", tmp_path / "references.json", "--predictions", tmp_path / "results.json"]
    scores = run("score", "captions", *files)
    assert list(scores)[:4] == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"]
    # 7 of 9 words: "a dog runs on the beach" and the "a" of the other.
    assert scores["Bleu_1"] == pytest.approx(7 / 9 * 2.718281828 ** (1 - 12 / 9), abs=1e-4)


@pytest.fixture(scope="module")
def answering(world: Path, pretrained: Path) -> Path:
    """A model fine-tuned to answer questions for two steps."""
    folder = world / "answering"
    data = ["--data", str(world / "train-*.tar"), "--evaluate-data", str(world / "test-*.tar")]
    cli.main(["finetune", "vqa", "shapes_tiny", "--start", str(pretrained), *data, "--folder", str(folder), *SHORT])
    return folder / "model"


def test_answers_are_evaluated_and_written(run: Run, world: Path, answering: Path, tmp_path: Path) -> None:
    common = ["evaluate", "vqa", "--checkpoint", answering, "--data", world / "test-*.tar"]
    scores = run(*common, "--predictions", tmp_path / "answers.json")
    assert {"overall", "colour", "count"} <= set(scores)
    assert all(0 <= score <= 100 for score in scores.values())
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) > 6
    assert all(set(answer) == {"question_id", "answer"} for answer in answers)
    assert set(run(*common, "--blank")) == set(scores)


def test_questions_about_pictures(world: Path, answering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in sorted(world.glob("*.png"))]
    questions = ["what colour is the circle ?", "how many objects are there ?"]
    cli.main(["predict", "vqa", *paths, "--checkpoint", str(answering), "--text", *questions])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["image"], line["question"]) for line in lines] == [(p, q) for p in paths for q in questions]
    assert all(isinstance(line["answer"], str) for line in lines)


def test_answers_are_chosen_from_a_list(
    run: Run, fails: Callable[..., str], world: Path, answering: Path, tmp_path: Path
) -> None:
    common = ["evaluate", "vqa", "--checkpoint", answering, "--data", world / "test-*.tar"]
    for name, answers in (("list", ["red", "two"]), ("keys", {"blue": 0, "no": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(answers))
        run(*common, "--answers", tmp_path / f"{name}.json", "--predictions", tmp_path / "found.json")
        found = {line["answer"] for line in json.loads((tmp_path / "found.json").read_text())}
        assert found
        assert found <= set(answers)
    (tmp_path / "wrong.json").write_text('[["red"]]')
    assert "wrong.json must be a JSON list of texts" in fails(*common, "--answers", tmp_path / "wrong.json")
    (tmp_path / "empty.json").write_text("[]")
    assert "the list is empty" in fails(*common, "--answers", tmp_path / "empty.json")
    missing = fails(*common, "--answers", tmp_path / "none.json")
    assert "none.json" in missing
    assert "No such file" in missing


def test_a_comparison_with_grey_pictures_and_the_commonest_answer(
    run: Run, fails: Callable[..., str], world: Path, answering: Path, pretrained: Path
) -> None:
    common = ["compare", "vqa", "--checkpoint", answering, "--data", world / "test-*.tar", "--limit", 4]
    found = run(*common, "--training-data", world / "train-*.tar")
    assert list(found) == ["metric", "model", "blind", "majority", "model against blind"]
    assert found["metric"] == "overall"
    assert found["majority"]["overall"] > 0
    assert found["model against blind"]["test"] == "McNemar"
    without = run(*common)
    assert "majority" not in without
    assert {name: without[name] for name in without} == {name: found[name] for name in without}
    common[3] = pretrained
    assert "no commonest answer" in fails("compare", "caption", *common[2:], "--training-data", world / "train-*.tar")
    captions = run("compare", "caption", *common[2:])
    assert list(captions) == ["metric", "model", "blind", "model against blind"]
    assert captions["model against blind"] == {}
    for task in ("retrieval", "text_classification"):
        assert f"invalid choice '{task}'" in " ".join(fails("compare", task, *common[2:]).split())


@pytest.fixture(scope="module")
def locating(world: Path, pretrained: Path) -> Path:
    """A model fine-tuned to locate phrases for two steps."""
    folder = world / "locating"
    data = ["--data", str(world / "train-*.tar")]
    cli.main(
        ["finetune", "grounding", "shapes_tiny", "--start", str(pretrained), *data, "--folder", str(folder), *SHORT]
    )
    return folder / "model"


def test_boxes_are_drawn(
    world: Path, locating: Path, tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(world.glob("*.png"))
    phrases = ["the circle", "it"]
    ask = ["predict", "grounding", *map(str, paths), "--checkpoint", str(locating), "--text", *phrases]
    capsys.readouterr()
    cli.main([*ask, "--save", str(tmp_path / "boxes")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["image"], line["phrase"]) for line in lines] == [(str(p), t) for p in paths for t in phrases]
    assert sorted(line["saved"] for line in lines) == sorted(map(str, (tmp_path / "boxes").iterdir()))
    for line in lines:
        saved, original = Image.open(line["saved"]), Image.open(line["image"])
        assert saved.size == original.size
        assert saved.tobytes() != original.convert("RGB").tobytes()
    cli.main(ask)
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert plain == [{name: line[name] for name in line if name != "saved"} for line in lines]


def test_statements_from_training_to_the_official_file(
    run: Run, world: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = world / "statements-train.jsonl", world / "statements-test.jsonl"
    start = ["--start", pretrained, "--data", train, "--evaluate-data", test, "--folder", tmp_path / "run", *SHORT]
    trained = run("finetune", "nlvr2", "shapes_tiny", *start)
    checkpoint = ["--checkpoint", tmp_path / "run" / "model"]
    predictions = tmp_path / "predictions.csv"
    scores = run("evaluate", "nlvr2", *checkpoint, "--data", test, "--predictions", predictions)
    assert scores == trained["metrics"]
    statements = [json.loads(line) for line in test.read_text().splitlines()]
    written = dict(line.split(",") for line in predictions.read_text().splitlines())
    assert list(written) == [statement["identifier"] for statement in statements]
    assert set(written.values()) <= {"True", "False"}
    assert run("score", "nlvr2", "--data", test, "--predictions", predictions) == scores
    run("evaluate", "nlvr2", *checkpoint, "--data", test, "--predictions", tmp_path / "predictions.json")
    as_json = json.loads((tmp_path / "predictions.json").read_text())
    assert {line["identifier"]: str(line["prediction"]) for line in as_json} == written
    pair = [str(path) for path in sorted(world.glob("*.png"))]
    asked = ["predict", "nlvr2", *pair, *map(str, checkpoint), "--text", "both are red", "none is"]
    cli.main(asked)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["images"], line["statement"]) for line in lines] == [(pair, "both are red"), (pair, "none is")]


def test_scores_of_judgements_that_another_program_wrote(run: Run, fails: Callable[..., str], tmp_path: Path) -> None:
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-2-0-1": "True"}
    data, predictions = tmp_path / "dev.json", tmp_path / "predictions.csv"
    data.write_text("".join(json.dumps({"identifier": n, "label": v}) + "\n" for n, v in labels.items()))
    predictions.write_text("dev-1-0-0,True\ndev-1-1-0,True\ndev-2-0-1,true\n")
    command = ["score", "nlvr2", "--data", data, "--predictions", predictions]
    assert run(*command) == {"accuracy": 66.6667, "consistency": 50.0}
    predictions.write_text("dev-1-0-0,True\n")
    assert "statements without a prediction: 'dev-1-1-0', 'dev-2-0-1'" in fails(*command)


def test_a_submission_of_texts(
    run: Run, fails: Callable[..., str], world: Path, pretrained: Path, tmp_path: Path
) -> None:
    rows = [("a small red circle", "good"), ("two large blue stars", "bad"), ("a green square", "good")]
    for name in ("train", "dev"):
        table = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
        (tmp_path / f"{name}.tsv").write_text(table)
    start = ["--start", pretrained, "--data", tmp_path / "train.tsv", "--folder", tmp_path / "run", *SHORT[:2]]
    run("finetune", "text_classification", "glue_sst2", *start, "--batch-size", 3, "--precision", "fp32")
    common = ["evaluate", "text_classification", "--checkpoint", tmp_path / "run" / "model"]
    common += ["--data", tmp_path / "dev.tsv"]
    scores = run(*common, "--predictions", tmp_path / "SST-2.tsv")
    assert scores["score"] == scores["accuracy"]
    written = [line.split("\t") for line in (tmp_path / "SST-2.tsv").read_text().splitlines()]
    assert written[0] == ["index", "prediction"]
    assert [row[0] for row in written[1:]] == ["0", "1", "2"]
    right = [label == row[1] for (_, label), row in zip(rows, written[1:], strict=True)]
    assert scores["accuracy"] == pytest.approx(100 * sum(right) / 3, abs=1e-3)
    found = run("predict", "text_classification", "--checkpoint", tmp_path / "run" / "model", "--text", rows[0][0])
    assert found == {"text": rows[0][0], "label": written[1][1]}
    assert "looks at no pictures" in fails(*common, "--blank")


def test_frames_of_clips(
    run: Run, fails: Callable[..., str], pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    counts = ["--train", 0, "--test", 2, "--compositions", 0]
    written = run("data", "shapes", tmp_path, *counts, "--size", 48, "--max-objects", 2, "--clips", 2)
    assert list(written) == ["test"]
    listed = [path for path in written["test"] if path.endswith(".jsonl")]
    assert len(listed) == 3  # statements, captions and questions of clips
    clips = next(path for path in listed if Path(path).name.startswith("clips"))
    checked = run("data", "check", clips)
    assert (checked["records"], checked["videos"], checked["broken"]) == (2, 2, 0)
    common = ["evaluate", "caption", "--checkpoint", pretrained, "--data", clips]

    def captions(*options: object) -> list[dict[str, str]]:
        run(*common, "--predictions", tmp_path / "captions.json", *options)
        found = json.loads((tmp_path / "captions.json").read_text())
        assert isinstance(found, list)
        return found

    assert len(captions("--frames", 2, "--frame-rule", "official")) == 2
    assert captions() == captions("--frames", 8, "--frame-rule", "uniform")
    assert "frames need a count" in fails(*common, "--frames", 0)
    assert "invalid choice 'last'" in " ".join(fails(*common, "--frame-rule", "last").split())
    assert captions("--frame-decoder", "pyav") == captions()
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    assert "triptych-vl[torchcodec]" in fails(*common, "--frame-decoder", "torchcodec")
    given = ["--checkpoint", pretrained, "--frame-decoder", "torchcodec"]
    (tmp_path / "clip.mp4").touch()
    assert "triptych-vl[torchcodec]" in fails("predict", "caption", tmp_path / "clip.mp4", *given)


def test_scores_of_answers_that_another_program_wrote(run: Run, fails: Callable[..., str], tmp_path: Path) -> None:
    ids = (1, 2)
    given = (["two"] * 3 + ["2"] * 4 + ["3"] * 3, ["Yes"] * 10)
    annotations = [
        {"question_id": number, "image_id": 1, "answer_type": kind, "answers": [{"answer": a} for a in answers]}
        for number, kind, answers in zip(ids, ("number", "yes/no"), given, strict=True)
    ]
    files = {
        "questions": {"questions": [{"question_id": number, "image_id": 1, "question": "?"} for number in ids]},
        "annotations": {"annotations": annotations},
        "predictions": [{"question_id": 1, "answer": "3"}, {"question_id": 2, "answer": "yes"}],
    }
    command: list[object] = ["score", "vqa"]
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        command += [f"--{name}", tmp_path / f"{name}.json"]
    assert run(*command) == {"overall": 45.0, "number": 90.0, "yes/no": 0.0}  # all wrote "Yes", so "yes" is another
    assert run(*command, "--rules", "2016")["overall"] == 45.0
    (tmp_path / "questions.json").write_text(json.dumps({"questions": files["questions"]["questions"][:1]}))  # type: ignore[call-overload]
    assert "answers question 2" in fails(*command)


def test_mistakes_are_one_line(fails: Callable[..., str], world: Path, pretrained: Path, tmp_path: Path) -> None:
    data = ["--data", world / "train-*.tar", "--folder", tmp_path]
    assert "no recipe 'lettuce'" in fails("pretrain", "lettuce", *data)
    assert "missing-*.tar" in fails("pretrain", "shapes_tiny", "--data", world / "missing-*.tar", "--folder", tmp_path)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    assert "broken.pth" in fails("convert", broken, tmp_path / "converted", "--from", "mplug")
    assert "nothing-here" in fails("evaluate", "retrieval", "--checkpoint", tmp_path / "nothing-here", *data[:2])
    assert "was not trained for vqa, only for: retrieval, caption" in fails(
        "evaluate", "vqa", "--checkpoint", pretrained, *data[:2]
    )
    assert "vqa needs --text" in fails("predict", "vqa", "x.png", "--checkpoint", pretrained)
    assert "caption needs files" in fails("predict", "caption", "--checkpoint", pretrained)
    assert "--save is for grounding" in fails("predict", "caption", "x.png", "--checkpoint", pretrained, "--save", ".")
    assert "frames need a count" in fails("predict", "caption", "x.mp4", "--checkpoint", pretrained, "--frames", 0)
    assert "none of the files" in fails("predict", "caption", tmp_path / "nowhere.png", "--checkpoint", pretrained)


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in cli.COMMANDS), *([group, name] for group in cli.GROUPS for name in cli.GROUPS[group])],
)
def test_help_explains_every_option(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: triptych" in capsys.readouterr().out


def test_torchrun_starts_processes_that_train_together(world: Path, tmp_path: Path) -> None:
    """One of them prints and logs; that the arithmetic is one process's is tested with the objectives."""
    common = ["pretrain", "shapes_tiny", "--data", str(world / "train-*.tar"), "--steps", "1", "--precision", "fp32"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "triptych", *common, "--batch-size", "4", "--folder", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["finished"]
    logged = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged] == [1]
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()
    assert len(list((tmp_path / "two" / "checkpoints" / "step-00000001").glob("rank-*.pt"))) == 2


def test_recalls_of_folds(run: Run, fails: Callable[..., str], world: Path, pretrained: Path) -> None:
    common = ["evaluate", "retrieval", "--checkpoint", pretrained, "--data", world / "test-*.tar"]
    first = run(*common, "--limit", 3)
    assert run(*common, "--limit", 3, "--fold", 3) == first
    assert run(*common, "--limit", 4, "--fold", 3) == first  # the rest is less than a fold
    assert run(*common, "--fold", 1000) == run(*common)
    assert run(*common, "--fold", 3)["t2i_r1"] != pytest.approx(0)
    assert "--fold is for retrieval" in fails("evaluate", "caption", *common[2:], "--fold", 3)
    assert "must not be negative" in fails(*common, "--fold", -1)
