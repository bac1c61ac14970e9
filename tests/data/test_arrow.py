import logging
import pickle
import sys
from io import BytesIO
from itertools import pairwise

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.data import arrow as arrow_module
from triptych.data import arrow_writing
from triptych.data.arrow import ArrowShard, open_arrow
from triptych.data.arrow_writing import write_arrow
from triptych.data.lists import ENTAILMENT
from triptych.data.loader import Loader
from triptych.data.samples import Record, decode_image
from triptych.data.sources import Source, open_source

pa = pytest.importorskip("pyarrow")


def png(number=0):
    file = BytesIO()
    Image.new("RGB", (4, 3), (number, 255 - number, 7)).save(file, "PNG")
    return file.getvalue()


TEXTS = pa.list_(pa.string())
CAPTIONS = pa.schema([("image", pa.binary()), ("caption", TEXTS), ("image_id", pa.string()), ("split", pa.string())])
VG = pa.schema(
    [("image", pa.binary()), ("caption", TEXTS)]
    + [(name, pa.list_(pa.int64())) for name in ("width", "height", "x", "y")]
    + [("image_id", pa.string())]
)
VQA = pa.schema(
    [
        ("image", pa.binary()),
        ("questions", TEXTS),
        ("answers", pa.list_(TEXTS)),
        ("answer_labels", pa.list_(pa.list_(pa.int64()))),
        ("answer_scores", pa.list_(pa.list_(pa.float64()))),
        ("image_id", pa.int64()),
        ("question_id", pa.list_(pa.int64())),
        ("split", pa.string()),
    ]
)
NLVR2 = pa.schema(
    [
        ("image_0", pa.binary()),
        ("image_1", pa.binary()),
        ("questions", TEXTS),
        ("answers", TEXTS),
        ("identifier", pa.string()),
    ]
)
SNLI = pa.schema([("image", pa.binary()), ("sentences", pa.list_(TEXTS)), ("labels", pa.list_(pa.int64()))])


def official(path, schema, rows, batch_rows=None, stream=False):
    """A table as the official scripts write it; `rows` are tuples in the order of the columns."""
    table = pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


def caption_rows(count):
    return [(png(n), [f"{n} a", f"{n} b"], f"{n}.jpg", "train") for n in range(count)]


def read(path, **options):
    return [record for shard in open_arrow(path, **options) for record in shard.read()]


def table_of(path):
    return pa.ipc.open_file(path.read_bytes()).read_all()


def caption_records(count):
    return [Record(f"r{n}", png(n), (f"{n} a", f"{n} b"), f"{n}.jpg", {"split": "val"}) for n in range(count)]


def question(key, image_id, text="what?", image=None, **extra):
    return Record(key, image or png(), (), str(image_id), {"question": text, **extra})


# ------------------------------------------------------------------------------------ official tables are read


def test_official_captions(tmp_path):
    rows = [
        (png(1), [" one", "two "], "1.jpg", "restval"),
        (png(2), [], "2.jpg", "val"),
        (png(), [" ", "x"], "3", None),
    ]
    path = official(tmp_path / "coco.arrow", CAPTIONS, rows)
    first, second, third = read(path)
    assert first == Record(f"{path}:0", png(1), ("one", "two"), "1.jpg", {"split": "restval"})
    assert decode_image(first).size == (4, 3)
    assert second.captions == ()
    assert (third.captions, third.extra) == (("x",), {})


def test_official_regions_stay_beside_their_captions(tmp_path):
    path = official(
        tmp_path / "vg.arrow", VG, [(png(), ["a", " ", "c"], [1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 2], "5")]
    )
    (record,) = read(path)
    assert record.captions == ("a", "c")
    assert record.extra == {"width": [1, 3], "height": [4, 6], "x": [7, 9], "y": [0, 2]}
    assert record.image_id == "5"


def test_official_questions(tmp_path):
    row = (png(), [" q0 ", "q1"], [["yes", "no"], ["2"]], [[3, 0], [7]], [[1.0, 0.3], [0.6]], 42, [420, 421], "val")
    path = official(tmp_path / "vqav2_val_fix.arrow", VQA, [row])
    one, two = read(path)
    assert one.key == f"{path}:0#0"
    assert one.captions == ()
    assert one.extra == {
        "question": "q0",
        "question_id": 420,
        "split": "val",
        "answers": ["yes", "no"],
        "labels": [3, 0],
        "scores": [1.0, 0.3],
    }
    assert two.extra["scores"] == [0.6]
    assert one.image_id == two.image_id == "42"
    assert one.image is two.image  # one copy in memory, whatever the number of questions


def test_official_test_tables_have_no_answers(tmp_path):
    none = pa.list_(pa.null())  # what pandas makes of nothing but empty lists
    schema = pa.schema([(f.name, none if f.name.startswith("answer") else f.type) for f in VQA])
    one, two = read(
        official(tmp_path / "vqav2_test.arrow", schema, [(png(), ["a", "b"], [], [], [], 1, [10, 11], "test")])
    )
    assert one.extra == {"question": "a", "question_id": 10, "split": "test"}
    assert two.extra["question_id"] == 11
    bare = pa.schema([f for f in VQA if not f.name.startswith("answer")])
    assert read(official(tmp_path / "bare.arrow", bare, [(png(), ["a"], 1, [10], "test")]))[0].extra == one.extra


def test_official_statements(tmp_path):
    path = official(tmp_path / "nlvr2_dev.arrow", NLVR2, [(png(1), png(2), ["s0", "s1"], ["True", "False"], "dev-3-0")])
    one, two = read(path)
    assert one.extra == {"images": [png(1), png(2)], "statement": "s0", "label": True, "identifier": "dev-3-0"}
    assert two.extra["label"] is False
    assert one.image is None
    assert one.image_id == two.image_id == "dev-3-0"


def test_official_entailment(tmp_path):
    pairs = [[f"p{n}", f" h{n} "] for n in range(3)]
    path = official(tmp_path / "snli_dev.arrow", SNLI, [(png(), pairs, [0, 1, 2]), (png(), pairs[:1], [2])])
    records = read(path)
    assert [record.extra["label"] for record in records] == [*ENTAILMENT, "entailment"]
    assert records[1].extra == {"premise": "p1", "hypothesis": "h1", "label": "neutral"}
    assert [record.image_id for record in records] == [f"{path}:0"] * 3 + [f"{path}:1"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batch_rows", [None, 1, 4])
def test_virtual_shards(tmp_path, stream, batch_rows):
    path = official(tmp_path / "a.arrow", CAPTIONS, caption_rows(10), batch_rows, stream)
    shards = open_arrow(path, shard_rows=3)
    assert [shard.name for shard in shards] == [f"{path}#{row}" for row in (0, 3, 6, 9)]
    records = [shard.read() for shard in shards]
    assert [len(part) for part in records] == [3, 3, 3, 1]
    flat = [record for part in records for record in part]
    assert [record.key for record in flat] == [f"{path}:{n}" for n in range(10)]
    assert [(r.image, list(r.captions), r.image_id, r.extra["split"]) for r in flat] == caption_rows(10)
    assert len(open_arrow(path)) == 1


def test_a_shard_is_a_few_bytes_and_opens_the_file_where_it_is_read(tmp_path):
    path = official(tmp_path / "a.arrow", CAPTIONS, caption_rows(300), batch_rows=100)
    shard = open_arrow(path, shard_rows=150)[1]
    packed = pickle.dumps(shard)
    assert len(packed) < 400
    assert pickle.loads(packed).read() == shard.read()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.arrow does not exist"):
        shard.read()


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_url_only_what_is_needed_is_read(tmp_path, stream, monkeypatch):
    noise = [(png() + bytes(50_000), [f"{n}"], f"{n}.jpg", "train") for n in range(8)]
    content = official(tmp_path / "a.arrow", CAPTIONS, noise, 2, stream).read_bytes()
    with fsspec.open("memory://tables/a.arrow", "wb") as file:
        file.write(content)
    fetched = []

    class Counting(BytesIO):
        def read(self, size=-1):
            fetched.append(size)
            return super().read(size)

    shards = open_arrow("memory://tables/a.arrow", shard_rows=2)
    assert [shard.read()[0].captions for shard in shards] == [("0",), ("2",), ("4",), ("6",)]
    monkeypatch.setattr(arrow_module, "open_binary", lambda location: Counting(content))
    assert len(open_arrow("memory://tables/a.arrow", shard_rows=2)) == 4
    assert stream or sum(fetched) < 10_000
    fetched.clear()
    shards[1].read()
    assert sum(fetched) < len(content) * (0.6 if stream else 0.3)


def test_other_writers_types(tmp_path):
    schema = pa.schema(
        [
            ("split", pa.large_string()),
            ("image_id", pa.int32()),
            ("caption", pa.large_list(pa.large_string())),
            ("image", pa.large_binary()),
            ("url", pa.string()),
        ]
    )
    (record,) = read(official(tmp_path / "a.arrow", schema, [("val", 7, ["a"], png(), "http://x")]))
    assert (record.captions, record.image_id, record.extra) == (("a",), "7", {"split": "val"})


# ----------------------------------------------------------------------------------------------- what is broken


def test_broken_rows_have_a_problem(tmp_path):
    good = (png(), ["q"], [["a"]], [[0]], [[1.0]], 1, [5], "val")
    rows = [
        good,
        (None, *good[1:]),
        (b"", *good[1:]),
        (png(), None, *good[2:]),
        (png(), ["q", "r"], *good[2:]),
        (*good[:2], [["a"], ["b"]], *good[3:]),
        (*good[:6], None, "val"),
        (*good[:2], [["a", "b"]], *good[3:]),
        (*good[:2], [None], *good[3:]),
        (*good[:3], [[None]], *good[4:]),
        (png(), [None, " ", "q"], [["a"]] * 3, [[0]] * 3, [[1.0]] * 3, 1, [5, 6, 7], "val"),
    ]
    path = official(tmp_path / "a.arrow", VQA, rows)
    problems = {record.key.rpartition(":")[2]: record.problem for record in read(path)}
    assert [key for key, problem in problems.items() if problem is None] == ["0#0", "10#2"]
    assert problems["1"] == problems["2"] == "the row has no picture in 'image'"
    assert problems["3"] == "'questions' is null"
    assert problems["4"] == "1 entries in 'answers' for 2 in 'questions'"
    assert problems["6"] == "0 entries in 'question_id' for 1 in 'questions'"
    assert "different length" in problems["7#0"]
    assert "holds null" in problems["8#0"]
    assert "holds null" in problems["9#0"]
    assert problems["10#0"] == problems["10#1"] == "the question is empty"


def test_broken_statements_and_pairs(tmp_path):
    rows = [(png(), png(), ["a", "b"], ["True", "yes"], "i"), (png(), None, ["a"], ["True"], "j")]
    problems = [record.problem for record in read(official(tmp_path / "n.arrow", NLVR2, rows))]
    assert problems == [None, "the answer must be 'True' or 'False', not 'yes'", "the row has no picture in 'image_1'"]
    rows = [(png(), [["p", "h"], ["p"], None, ["p", None], ["p", "h"], ["p", "h"]], [0, 0, 0, 0, 3, None])]
    problems = [record.problem for record in read(official(tmp_path / "s.arrow", SNLI, rows))]
    assert problems[0] is None
    assert all("pairs" in problem for problem in problems[1:4])
    assert problems[4:] == ["the label must be 0, 1 or 2, not 3", "the label must be 0, 1 or 2, not None"]


def test_unusable_tables_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.arrow does not exist"):
        open_arrow(tmp_path / "none.arrow")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_arrow("memory://none.arrow")
    for name, content in (("empty", b""), ("json", b'{"images": []}'), ("feather", b"FEA1" + bytes(50) + b"FEA1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} (is not an Arrow table|cannot be read)|table .*{name}"):
            open_arrow(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        open_arrow(tmp_path)
    other = official(tmp_path / "other.arrow", pa.schema([("jpg", pa.binary()), ("text", pa.string())]), [(b"", "x")])
    with pytest.raises(
        ValueError, match=r"other\.arrow is no table of BridgeTower: it has the columns jpg, text; known"
    ):
        open_arrow(other)
    with pytest.raises(ValueError, match="shard_rows"):
        open_arrow(other, shard_rows=0)


@pytest.mark.parametrize(
    ("schema", "missing"),
    [
        (CAPTIONS, "image_id"),
        (VQA, "question_id"),
        (NLVR2, "image_0"),
        (NLVR2, "answers"),
        (SNLI, "labels"),
        (VG, "image"),
    ],
)
def test_a_missing_column_is_named(tmp_path, schema, missing):
    path = official(tmp_path / "a.arrow", pa.schema([entry for entry in schema if entry.name != missing]), [])
    with pytest.raises(ValueError, match=rf"a\.arrow lacks the column '{missing}' of a '\w+' table"):
        open_arrow(path)


@pytest.mark.parametrize(
    ("name", "kind", "official_type"),
    [
        ("image", pa.string(), "binary"),
        ("caption", pa.string(), "list<string>"),
        ("caption", pa.list_(TEXTS), "list<string>"),
        ("image_id", pa.list_(pa.string()), "id"),
        ("image", pa.struct([("bytes", pa.binary())]), "binary"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, name, kind, official_type):
    schema = pa.schema([(entry.name, kind if entry.name == name else entry.type) for entry in CAPTIONS])
    with pytest.raises(ValueError, match=rf"the column '{name}' of .*a\.arrow is of type .*, not {official_type}"):
        open_arrow(official(tmp_path / "a.arrow", schema, []))


@pytest.mark.parametrize("stream", [False, True])
def test_a_table_that_is_cut_off_is_refused(tmp_path, stream):
    path = official(tmp_path / "a.arrow", CAPTIONS, caption_rows(6), 2, stream)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.arrow"):
            open_arrow(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_give_records_or_a_value_error(tmp_path, stream, changes):
    path = official(tmp_path / "a.arrow", VQA, [(png(), ["q"], [["a"]], [[0]], [[1.0]], 1, [5], "v")] * 4, 2, stream)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    try:
        read(path)
    except ValueError as error:
        assert "a.arrow" in str(error)  # noqa: PT017 - there need not be one


def test_an_offset_beyond_the_column_is_not_followed(tmp_path):
    path = official(
        tmp_path / "a.arrow", CAPTIONS, [(b"\xaa" * 1000, ["a"], "i", "s"), (b"\xbb" * 1000, ["b"], "j", "s")]
    )
    content = path.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 1000, 2000))
    assert content.count(offsets) == 1
    (shard,) = open_arrow(path)
    path.write_bytes(content.replace(offsets, offsets[:4] + (2**31 - 1).to_bytes(4, "little") + offsets[8:]))
    with pytest.raises(ValueError, match=r"a\.arrow is damaged"):
        shard.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("left", [1, 3])
def test_a_table_that_has_become_shorter_is_an_error(tmp_path, stream, left):
    path = official(tmp_path / "a.arrow", CAPTIONS, caption_rows(4), 2, stream)
    (shard,) = open_arrow(path)
    official(path, CAPTIONS, caption_rows(left), 2, stream)
    with pytest.raises(ValueError, match=r"a\.arrow has fewer rows than when it was opened"):
        shard.read()


def test_an_empty_table_has_no_shards(tmp_path):
    assert open_arrow(official(tmp_path / "a.arrow", CAPTIONS, [])) == []


def test_the_extra_is_named_where_pyarrow_is_missing(tmp_path, monkeypatch):
    path = official(tmp_path / "a.arrow", CAPTIONS, caption_rows(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"triptych-vl\[arrow\]"):
        open_arrow(path)
    with pytest.raises(ImportError, match=r"triptych-vl\[arrow\]"):
        write_arrow(caption_records(1), tmp_path / "b.arrow", "captions")


# ------------------------------------------------------------------------------------------------------- loader


def prepare(record, seed):
    decode_image(record)
    return record.image_id, record.captions[0], seed


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_resumes_over_shards_of_tables(tmp_path, workers):
    rows = caption_rows(20)
    for broken, picture in ((4, None), (11, b"no picture")):
        rows[broken] = (picture, *rows[broken][1:])
    source = Source(tuple(open_arrow(official(tmp_path / "a.arrow", CAPTIONS, rows, 7), shard_rows=3)))

    def make(workers=0):
        return Loader(source, prepare, list, batch_size=4, seed=3, window=2, workers=workers)

    whole = make(workers)
    iterator = iter(whole)
    batches, states = [], []
    for _ in range(9):
        states.append(whole.state_dict())
        batches.append(next(iterator))
    iterator.close()
    assert {name for batch in batches[:4] for name, _, _ in batch} <= {f"{n}.jpg" for n in range(20)} - {
        "4.jpg",
        "11.jpg",
    }
    assert whole.skipped_count >= 2
    for start in (0, 3, 7) if workers == 0 else (5,):
        resumed = make()
        resumed.load_state_dict(states[start])
        again = iter(resumed)
        assert [next(again) for _ in range(9 - start)] == batches[start:]
        again.close()


# ------------------------------------------------------------------------------------------------------ writing


def test_captions_round_trip(tmp_path):
    path = tmp_path / "new" / "coco_caption_karpathy_val.arrow"
    written = write_arrow(caption_records(5), path, "captions")
    assert (written.path, written.rows, written.texts, written.skipped_count) == (path, 5, 10, 0)
    table = table_of(path)
    assert table.schema == CAPTIONS
    assert [tuple(row.values()) for row in table.to_pylist()] == [(*row[:3], "val") for row in caption_rows(5)]
    back = read(path)
    assert [(r.image, r.captions, r.image_id, r.extra) for r in back] == [
        (r.image, r.captions, r.image_id, r.extra) for r in caption_records(5)
    ]
    write_arrow(back, tmp_path / "again.arrow", "captions")
    assert table_of(tmp_path / "again.arrow") == table
    write_arrow([Record("k", png(), ("a",), "i")], tmp_path / "b.arrow", "captions", split="restval")
    assert read(tmp_path / "b.arrow")[0].extra == {"split": "restval"}


def test_questions_are_scored_as_the_official_writer_does(tmp_path):
    asked = ["Yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["two"]
    records = [
        question("a", 9, "q0", question_id=90, answers=asked),
        question("b", 9, "q1", question_id=91, answers=["unheard of"] * 10),
        question("c", 9, "q2", question_id=92, answer="no"),
        question("d", 10, "q3", question_id=100, answers=("two", "two")),
    ]
    classes = ["no", "two", "yes", "maybe"]
    written = write_arrow(records, tmp_path / "a.arrow", "vqa", answers=classes, normalize=str.lower, split="val")
    assert (written.rows, written.texts, written.unanswerable, written.skipped_count) == (2, 3, 1, 0)
    table = table_of(tmp_path / "a.arrow")
    assert table.schema == VQA
    one, two = table.drop_columns("image").to_pylist()
    assert one == {
        "questions": ["q0", "q2"],
        "answers": [["yes", "no", "maybe", "two"], ["no"]],
        "answer_labels": [[2, 0, 3, 1], [0]],
        "answer_scores": [[1.0, 0.9, 0.6, 0.3], [1.0]],
        "image_id": 9,
        "question_id": [90, 92],
        "split": "val",
    }
    assert two["answer_scores"] == [[0.6]]
    write_arrow(records[:1], tmp_path / "raw.arrow", "vqa", answers=classes)  # without normalisation "Yes" is unknown
    assert read(tmp_path / "raw.arrow")[0].extra["answers"] == ["no", "maybe", "two"]


def test_questions_round_trip_with_their_scores(tmp_path):
    row = (png(), ["q", "r"], [["yes", "no"], ["no"]], [[1, 0], [0]], [[1.0, 0.3], [0.6]], 42, [420, 421], "val")
    first = official(tmp_path / "a.arrow", VQA, [row])
    write_arrow(read(first), tmp_path / "b.arrow", "vqa")
    assert table_of(tmp_path / "b.arrow") == table_of(first)
    write_arrow(read(first), tmp_path / "c.arrow", "vqa", answers=["blue", "yes"])  # other classes
    (record,) = read(tmp_path / "c.arrow")
    assert (record.extra["labels"], record.extra["scores"]) == ([1], [1.0])


def test_questions_without_answers_make_a_test_table(tmp_path):
    records = [question("a", 1, question_id=10, answers=[]), question("b", 1, question_id=11)]
    write_arrow(records, tmp_path / "a.arrow", "vqa", split="test")
    assert table_of(tmp_path / "a.arrow").schema == VQA
    assert [r.extra for r in read(tmp_path / "a.arrow")] == [
        {"question": "what?", "question_id": number, "split": "test"} for number in (10, 11)
    ]


def test_the_questions_of_one_record(tmp_path):
    asked = [{"question": "a?", "answer": "yes", "kind": "x"}, {"question": "b?", "answer": "no"}]
    record = Record("s", png(), ("caption",), "scene-1", {"questions": asked, "question": "ignored"})
    write_arrow([record], tmp_path / "a.arrow", "vqa", answers=["no", "yes"])
    assert [(r.extra["question"], r.extra["labels"], r.image_id) for r in read(tmp_path / "a.arrow")] == [
        ("a?", [1], "scene-1"),
        ("b?", [0], "scene-1"),
    ]
    assert "question_id" not in read(tmp_path / "a.arrow")[0].extra


@pytest.mark.parametrize(
    ("ids", "stored", "skipped"),
    [
        (["7", "train2014/COCO_train2014_000000000009.jpg", "000000100667.jpg"], [7, 9, 100667], 0),
        (["a.jpg", "12"], ["a.jpg", "12"], 0),
        (["12", "a.jpg"], [12], 1),
        (["007", "b"], ["007", "b"], 0),
    ],
)
def test_ids_of_pictures_are_numbers_where_the_first_is(tmp_path, ids, stored, skipped):
    written = write_arrow([question(name, name) for name in ids], tmp_path / "a.arrow", "vqa")
    assert table_of(tmp_path / "a.arrow")["image_id"].to_pylist() == stored
    assert written.skipped_count == skipped
    assert not skipped or "no number" in written.skipped[0][1]


def test_statements_round_trip(tmp_path):
    def statement(number, pair, identifier, text, label):
        images = [png(2 * pair), png(2 * pair + 1)]
        extra = {"images": images, "statement": text, "label": label, "identifier": identifier}
        return Record(f"r{number}", None, (), str(number), extra)

    records = [
        statement(0, 0, "dev-3-0-0", "s", True),
        statement(1, 0, "dev-3-0-1", "t", False),
        statement(2, 1, "dev-3-1-0", "s", False),
    ]
    written = write_arrow(iter(records), tmp_path / "a.arrow", "nlvr2")
    assert (written.rows, written.texts) == (2, 3)
    assert table_of(tmp_path / "a.arrow").schema == NLVR2
    assert table_of(tmp_path / "a.arrow").to_pylist()[0] == {
        "image_0": png(0),
        "image_1": png(1),
        "questions": ["s", "t"],
        "answers": ["True", "False"],
        "identifier": "dev-3-0",
    }
    write_arrow(read(tmp_path / "a.arrow"), tmp_path / "b.arrow", "nlvr2")
    assert table_of(tmp_path / "b.arrow") == table_of(tmp_path / "a.arrow")


def test_entailment_round_trips(tmp_path):
    records = [
        Record(
            str(n), png(n // 2), (), str(n // 2), {"premise": "p", "hypothesis": f"h{n}", "label": ENTAILMENT[n % 3]}
        )
        for n in range(4)
    ]
    assert write_arrow(records, tmp_path / "a.arrow", "snli").rows == 2
    table = table_of(tmp_path / "a.arrow")
    assert table.schema == SNLI
    assert table["sentences"].to_pylist() == [[["p", "h0"], ["p", "h1"]], [["p", "h2"], ["p", "h3"]]]
    assert table["labels"].to_pylist() == [[0, 1], [2, 0]]
    assert [r.extra for r in read(tmp_path / "a.arrow")] == [r.extra for r in records]
    bare = Record("k", png(), (), "i", {"hypothesis": "h", "label": "neutral"})
    write_arrow([bare], tmp_path / "b.arrow", "snli")
    assert read(tmp_path / "b.arrow")[0].extra["premise"] == ""
    write_arrow(read(tmp_path / "b.arrow"), tmp_path / "c.arrow", "snli")
    assert table_of(tmp_path / "c.arrow") == table_of(tmp_path / "b.arrow")


def test_records_of_a_picture_are_grouped(tmp_path):
    records = [Record(f"r{n}", png(n % 2), (f"c{n}",), str(n % 2)) for n in range(6)]
    written = write_arrow(records, tmp_path / "a.arrow", "captions")
    assert (written.rows, written.texts) == (2, 6)
    assert [r.captions for r in read(tmp_path / "a.arrow")] == [("c0", "c2", "c4"), ("c1", "c3", "c5")]
    records.sort(key=lambda record: record.image_id)
    assert write_arrow(iter(records), tmp_path / "b.arrow", "captions").rows == 2
    assert table_of(tmp_path / "a.arrow") == table_of(tmp_path / "b.arrow")
    apart = [records[0], records[3], records[1]]
    with pytest.raises(ValueError, match="the records of picture '0' do not follow each other"):
        write_arrow(iter(apart), tmp_path / "a.arrow", "captions")
    assert table_of(tmp_path / "a.arrow") == table_of(tmp_path / "b.arrow")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.arrow", "b.arrow"]


def test_a_list_of_pictures_is_read_and_its_broken_records_are_counted(tmp_path, caplog):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.png").write_bytes(b"<html>not found</html>")
    lines = [
        '{"image": "0.png", "caption": "a"}',
        '{"image": "1.png", "caption": "b"}',
        '{"image": "2.png", "caption": ["c", "d"]}',
        "{",
        '{"image": "0.png", "caption": "e"}',
        '{"image": "0.png"}',
        '{"caption": "no picture"}',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    source = open_source(tmp_path / "list.jsonl")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        written = write_arrow(source, tmp_path / "a.arrow", "captions")
    assert (written.rows, written.texts, written.skipped_count) == (1, 2, 5)
    reasons = {key.rpartition(":")[2]: reason for key, reason in written.skipped}
    assert reasons["2"] == "the image is of no known format"
    assert reasons["3"].startswith("cannot read")
    assert reasons["4"].startswith("not JSON")
    assert reasons["6"] == "it has no caption"
    assert reasons["7"] == "the record has no image"
    assert "5 records are not in" in caplog.text
    assert read(tmp_path / "a.arrow")[0].image == png(0)


def test_unusable_records_are_skipped(tmp_path):
    good = question("good", 1, question_id=1, answers=["a"])
    bad = {
        "no text": question("1", 2, text=" ", answers=["a"]),
        "answers": question("2", 3, answers=[1]),
        "lengths": question("3", 4, answers=["a", "b"], scores=[1.0]),
        "scores": question("4", 5, answers=["a"], scores=["x"]),
        "surrogate": question("5", 6, text="\ud800", answers=["a"]),
        "other picture": question("6", 1, image=png(9), answers=["a"]),
        "not a mapping": Record("7", png(), (), "7", {"questions": ["what?"]}),
        "one score": question("8", 8, answers=["a"], scores=1.0),
    }
    written = write_arrow([good, *bad.values()], tmp_path / "a.arrow", "vqa", answers=["a", "b"])
    assert (written.rows, written.texts, written.skipped_count) == (1, 1, len(bad))
    assert sorted(key for key, _ in written.skipped) == [str(n) for n in range(1, 9)]
    mixed = [good, question("8", 8, answers=["a"]), question("9", 8)]
    written = write_arrow(mixed, tmp_path / "a.arrow", "vqa", answers=["a"])
    assert dict(written.skipped)["9"] == "some questions of this picture have answers and others have none"
    wrong = [
        Record("n", None, (), "n", {"images": [png()], "statement": "s", "label": True}),
        Record("n", None, (), "m", {"images": [png()] * 2, "statement": "s", "label": "True"}),
    ]
    with pytest.raises(
        ValueError, match=r"no usable record for .*: n: .*two pictures; n: 'label' must be true or false"
    ):
        write_arrow(wrong, tmp_path / "n.arrow", "nlvr2")
    with pytest.raises(ValueError, match="'label' must be one of"):
        write_arrow([Record("s", png(), (), "s", {"hypothesis": "h", "label": "-"})], tmp_path / "n.arrow", "snli")
    assert not (tmp_path / "n.arrow").exists()


def test_the_list_of_skipped_records_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_writing, "LISTED", 3)
    records = caption_records(1) + [Record(str(n), None, ("a",), str(n)) for n in range(9)]
    written = write_arrow(records, tmp_path / "a.arrow", "captions")
    assert (len(written.skipped), written.skipped_count) == (3, 9)


@pytest.mark.parametrize(("limit", "value", "batches"), [("BATCH_ROWS", 3, 4), ("BATCH_BYTES", 1, 10)])
def test_record_batches_are_bounded(tmp_path, monkeypatch, limit, value, batches):
    monkeypatch.setattr(arrow_writing, limit, value)
    write_arrow(caption_records(10), tmp_path / "a.arrow", "captions")
    reader = pa.ipc.open_file((tmp_path / "a.arrow").read_bytes())
    assert reader.num_record_batches == batches
    assert reader.read_all().num_rows == 10
    assert [shard.parts[0].row for shard in open_arrow(tmp_path / "a.arrow", shard_rows=4)] == [0, 4, 8]


def test_records_are_taken_as_they_are_written(tmp_path, monkeypatch):
    """No more than a batch is held: of 30 records those of the first batches are gone when the last comes."""
    monkeypatch.setattr(arrow_writing, "BATCH_ROWS", 4)
    sizes = []

    def records():
        for record in caption_records(30):
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob(".a.arrow.*.part")))
            yield record

    write_arrow(records(), tmp_path / "a.arrow", "captions")
    assert sizes[0] == 0
    assert sizes[-1] > 20 * len(png())
    assert all(earlier <= later for earlier, later in pairwise(sizes))


def test_bad_arguments(tmp_path):
    path = tmp_path / "a.arrow"
    with pytest.raises(ValueError, match="unknown kind 'vg'; there are captions, vqa, nlvr2, snli"):
        write_arrow(caption_records(1), path, "vg")
    with pytest.raises(ValueError, match="local path"):
        write_arrow(caption_records(1), "s3://bucket/a.arrow", "captions")
    for answers in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="all different"):
            write_arrow(caption_records(1), path, "vqa", answers=answers)
    with pytest.raises(ValueError, match="give answers="):
        write_arrow([question("k", 1, answers=["a"])], path, "vqa")
    with pytest.raises(ValueError, match="no usable record"):
        write_arrow([], path, "captions")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_request(tmp_path, capsys):
    write_arrow(caption_records(3), tmp_path / "a.arrow", "captions")
    assert capsys.readouterr() == ("", "")
    write_arrow(caption_records(3), tmp_path / "a.arrow", "captions", total=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "records/s" in err


def test_shards_satisfy_the_protocol(tmp_path):
    write_arrow(caption_records(3), tmp_path / "a.arrow", "captions")
    source = Source(tuple(open_arrow(tmp_path / "a.arrow", shard_rows=2)))
    assert not source.in_memory
    assert source.count() == 3
    assert all(isinstance(shard, ArrowShard) for shard in source.shards)
