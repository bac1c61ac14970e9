"""GLUE's tables: each official header, test files, own tables, damaged lines, and submissions."""

import json
from pathlib import Path

import pytest

from triptych.data.glue import read_glue, write_submission
from triptych.data.sources import open_source

MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
STS_B = "index genre filename year old_index source1 source2"


def table(header, *rows):
    lines = [header.replace(" ", "\t") if "\t" not in header else header, *("\t".join(row) for row in rows)]
    return "\n".join(lines) + "\n"


PAIR = ("one text", "another text")
OFFICIAL = {
    "CoLA/train.tsv": ("gj04\t1\t\tOne is good.\ncj99\t0\t*\tOther bad is.\n", ["1", "0"]),
    "SST-2/dev.tsv": (table("sentence label", ("it 's \" good", "1"), ("so \" so ' .", "0")), ["1", "0"]),
    "MRPC/train.tsv": (
        "\ufeff" + table("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ("1", "7", "8", *PAIR)).replace("\n", "\r\n"),
        ["1"],
    ),
    "QQP/train.tsv": (table("id qid1 qid2 question1 question2 is_duplicate", ("133273", "7", "8", *PAIR, "0")), ["0"]),
    "STS-B/dev.tsv": (table(f"{STS_B} sentence1 sentence2 score", ("0", *"abcdef", *PAIR, "3.800")), [3.8]),
    "MNLI/train.tsv": (
        table(f"{MNLI} sentence1 sentence2 label1 gold_label", ("0", *"abcdefg", *PAIR, "neutral", "entailment")),
        ["entailment"],
    ),
    "MNLI/dev_matched.tsv": (
        table(
            f"{MNLI} sentence1 sentence2 label1 label2 label3 label4 label5 gold_label",
            ("0", *"abcdefg", *PAIR, *["neutral"] * 5, "contradiction"),
        ),
        ["contradiction"],
    ),
    "QNLI/dev.tsv": (table("index question sentence label", ("0", *PAIR, "not_entailment")), ["not_entailment"]),
    "RTE/train.tsv": (table("index sentence1 sentence2 label", ("0", *PAIR, "entailment")), ["entailment"]),
    "WNLI/train.tsv": (table("index sentence1 sentence2 label", ("0", *PAIR, "1")), ["1"]),
}
TESTS = {
    "CoLA/test.tsv": table("index sentence", ("0", "One.")),
    "MRPC/test.tsv": table("index\t#1 ID\t#2 ID\t#1 String\t#2 String", ("0", "7", "8", *PAIR)),
    "QQP/test.tsv": table("id question1 question2", ("0", *PAIR)),
    "STS-B/test.tsv": table(f"{STS_B} sentence1 sentence2", ("0", *"abcdef", *PAIR)),
    "MNLI/test_mismatched.tsv": table(f"{MNLI} sentence1 sentence2", ("0", *"abcdefg", *PAIR)),
    "QNLI/test.tsv": table("index question sentence", ("0", *PAIR)),
    "RTE/test.tsv": table("index sentence1 sentence2", ("0", *PAIR)),
}


def write(folder: Path, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("name", OFFICIAL)
def test_training_and_development_files(tmp_path, name):
    content, labels = OFFICIAL[name]
    path = write(tmp_path, name, content)
    source = open_source(path)
    assert source.formats == {str(path): "glue"}
    records = list(source)
    assert [record.extra["label"] for record in records] == labels
    assert all(record.image is None and record.captions == () for record in records)
    assert {record.extra["split"] for record in records} == {path.stem}
    if name.split("/")[0] not in ("CoLA", "SST-2"):
        assert [(record.extra["text"], record.extra["text_pair"]) for record in records] == [PAIR]
    else:
        assert all("text_pair" not in record.extra for record in records)


@pytest.mark.parametrize("name", TESTS)
def test_test_files_have_no_labels(tmp_path, name):
    (record,) = open_source(write(tmp_path, name, TESTS[name]))
    assert "label" not in record.extra
    assert record.extra["index"] == 0
    assert ("text_pair" in record.extra) == (not name.startswith("CoLA"))


def test_keys_are_lines_and_indices_are_counted(tmp_path):
    path = write(tmp_path, "train.tsv", OFFICIAL["CoLA/train.tsv"][0] + "\n\nl-93\t1\t\t# A third.\n")
    records = list(open_source(path))
    assert [record.key for record in records] == [f"{path}:{n}" for n in (1, 2, 5)]
    assert [record.extra["index"] for record in records] == [0, 1, 2]
    assert records[2].extra["text"] == "# A third."
    quotes = list(open_source(write(tmp_path, "dev.tsv", OFFICIAL["SST-2/dev.tsv"][0])))
    assert [record.extra["text"] for record in quotes] == ["it 's \" good", "so \" so ' ."]
    odd = table("index sentence label", ("x7", "a\u2028b", "yes"))
    (record,) = read_glue("own.tsv", odd)
    assert (record.extra["text"], record.extra["label"], record.extra["index"]) == ("a\u2028b", "yes", "x7")


def problem(content):
    (record,) = read_glue("f.tsv", content)
    return f"{record.key}: {record.problem}"


def test_damaged_lines_name_file_line_and_column():
    qqp = "id qid1 qid2 question1 question2 is_duplicate"
    assert problem(table(qqp, ('"', "what?", "0"))) == "f.tsv:2: it has 3 columns, not 6"
    assert problem(table(qqp, ("1", "2", "3", "a", " ", "0"))) == "f.tsv:2: the column 'question2' is empty"
    wrong = problem(table(qqp, ("1", "2", "3", "a", "b", "2")))
    assert wrong == "f.tsv:2: 'is_duplicate' must be one of 0, 1, not '2'"
    for value in ("much", "nan", "inf"):
        number = problem(table("sentence1 sentence2 score", (*PAIR, value)))
        assert number == f"f.tsv:2: 'score' must be a number, not '{value}'"
    assert problem(table("sentence label", ("a", ""))) == "f.tsv:2: the column 'label' is empty"
    mnli = problem(table("sentence1 sentence2 gold_label", (*PAIR, "-")))
    assert mnli == "f.tsv:2: 'gold_label' must be one of entailment, neutral, contradiction, not '-'"
    cola = read_glue("f.tsv", "gj04\t1\t\tGood.\ngj04\t3\t\tBad.\ngj04\t1")
    assert [record.problem for record in cola] == [
        None,
        "'label' must be one of 0, 1, not '3'",
        "it has 2 columns, not 4",
    ]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"bad\.tsv:1: the header 'text', 'class' has no texts; known are #1 String"):
        open_source(write(tmp_path, "bad.tsv", table("text class", ("a", "1"))))
    for content in ("", "\n", "sentence\tlabel\n"):
        with pytest.raises(ValueError, match=r"the data set is empty: no usable record in .*void\.tsv"):
            open_source(write(tmp_path, "void.tsv", content))
    with pytest.raises(ValueError, match=r"no usable record in .*all\.tsv.*columns"):
        open_source(write(tmp_path, "all.tsv", "sentence\tlabel\na\n"))
    with pytest.raises(FileNotFoundError, match=r"none\.tsv does not exist"):
        open_source(tmp_path / "none.tsv")
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.tsv cannot be read"):
        open_source(tmp_path / "binary.tsv")


def test_files_are_splits(tmp_path):
    rows = table("index sentence1 sentence2 label", ("0", *PAIR, "1"))
    for name in ("dev_matched.tsv", "dev_mismatched.tsv"):
        write(tmp_path, name, rows)
    both = open_source(tmp_path / "dev_{matched,mismatched}.tsv")
    assert [record.extra["split"] for record in both] == ["dev_matched", "dev_mismatched"]
    with pytest.raises(ValueError, match="has the splits dev_matched, not train"):
        open_source(tmp_path / "dev_matched.tsv", splits=["train"])


def test_your_own_texts_may_be_json_lines(tmp_path):
    rows = [{"text": "good", "label": "yes"}, {"text": "a", "text_pair": "b", "label": "no"}]
    path = write(tmp_path, "own.jsonl", "\n".join(map(json.dumps, rows)))
    assert [record.extra for record in open_source(path)] == rows


def test_a_submission(tmp_path):
    path = tmp_path / "CoLA.tsv"
    write_submission([{"index": 0, "prediction": "1"}, {"index": 1, "prediction": "not_entailment"}], path)
    assert path.read_text() == "index\tprediction\n0\t1\n1\tnot_entailment\n"
    write_submission([{"index": 3, "prediction": 2.34567}], path)
    assert path.read_text() == "index\tprediction\n3\t2.346\n"
    with pytest.raises(ValueError, match="index 3 is predicted twice"):
        write_submission([{"index": 3, "prediction": "1"}] * 2, path)
