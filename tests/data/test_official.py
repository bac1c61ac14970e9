import gzip
import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data.fields import Parsed, naming
from triptych.data.official import LAYOUTS, recognise
from triptych.data.sources import FORMATS, open_source


def lines_of(content):
    """Content as `recognise` sees it."""
    return [line for line in content.splitlines() if line and line[0] != "#"] if isinstance(content, str) else content


def format_of(name):
    return name.split()[0]


def test_each_layout_is_recognised_as_nothing_else(official):
    for name, content in official.items():
        matching = [layout.name for layout in LAYOUTS if layout.matches(lines_of(content))]
        assert matching in ([format_of(name)], [format_of(name), "captions"]), name
        assert recognise(lines_of(content)).name == format_of(name)


def test_every_format_has_an_example_and_a_name(official):
    assert {format_of(name) for name in official} == {layout.name for layout in LAYOUTS}
    assert {"webdataset", "arrow", "refer", "transvg", "json", "jsonl"} < set(FORMATS)
    assert len(set(FORMATS)) == len(FORMATS)


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    st.integers(1, 60),
    st.integers(0, 30),
    st.sampled_from(["x", None, 3, {}, {"id": 1}]),
    st.sets(st.sampled_from(["width", "height", "split", "image_id", "source", "caption"])),
    st.randoms(use_true_random=False),
)
def test_broken_rows_and_other_fields_do_not_change_what_a_list_is(official, data, count, bad, broken, fields, random):
    lists = {name: lines_of(content) for name, content in official.items() if not isinstance(content, dict)}
    name, rows = data.draw(st.sampled_from(sorted(lists.items())))
    good = [rows[n % len(rows)] for n in range(count + bad)]
    if isinstance(rows[0], dict):
        good = [{**dict.fromkeys(fields, "y"), **row} for row in good]
    mixed = [*good, *([broken] * bad)]
    random.shuffle(mixed)
    assert recognise(mixed).name == format_of(name)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["image", "images", "question", "phrase", "statement", "sentence", "hypothesis", "label"]),
        st.sampled_from(["True", "entailment", "x", True]),
    )
)
def test_a_row_of_a_users_list_is_one_thing_at_most(row):
    matching = [layout.name for layout in LAYOUTS if layout.matches([row])]
    assert len(matching) <= 2
    assert matching[-1] == "captions"


@pytest.mark.parametrize(
    "content",
    [
        {"no": "images"},
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]},
        {"annotations": [{"image_id": 1, "caption": "a"}]},
        {},
        {"questions": "many"},
        3,
        "text",
        None,
        ["a", "b"],
    ],
)
def test_unknown_content_is_an_error(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot tell the format of .*x\.json: it is .*formats are webdataset"):
        open_source(tmp_path / "x.json")


def test_unknown_text_is_an_error(tmp_path, write):
    with pytest.raises(ValueError, match=r"cannot tell the format of .*x\.txt"):
        open_source(write(tmp_path / "x.txt", "just\nsome words\n"))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_format_can_be_forced_whatever_the_name_of_the_file(tmp_path, write, read, official, suffix):
    for name, content in official.items():
        if name not in ("vqa_v2_annotations", "msvd_mapping") and (suffix == "json" or isinstance(content, list)):
            path = write(tmp_path / (f"x.{suffix}" if not isinstance(content, str) else "x.txt"), content)
            plain = [(record.captions, record.extra.get("video"), record.problem) for record in read(path)]
            other = path.rename(tmp_path / "data")
            source = open_source(other, format=format_of(name))
            assert source.formats == {str(other): format_of(name)}
            assert [(record.captions, record.extra.get("video"), record.problem) for record in source] == plain


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS if layout.read is not None])
def test_a_file_that_is_not_of_the_forced_format_is_an_error(tmp_path, name, write):
    for content in ({"other": 1}, [3, "other"], "some words"):
        path = write(tmp_path / ("x.txt" if isinstance(content, str) else "x.json"), content)
        with pytest.raises(ValueError, match=r"x\.(json|txt)"):
            open_source(path, format=name)


JUNK = st.sampled_from([None, True, -1, 2.5, "", " ", "x", [], [3], ["x"], {}, {"x": 1}, [[]], 10**400])


def spoiled(value, junk, random):
    """A JSON value of which one part, at any depth, is gone or replaced."""
    if not value or not isinstance(value, dict | list) or random.random() < 0.1:
        return junk
    if isinstance(value, dict):
        name = random.choice(list(value))
        rest = {key: part for key, part in value.items() if key != name}
        return rest if random.random() < 0.3 else {**rest, name: spoiled(value[name], junk, random)}
    index = random.randrange(len(value))
    return [*value[:index], spoiled(value[index], junk, random), *value[index + 1 :]]


@settings(max_examples=300, deadline=None)
@given(st.data(), JUNK, st.randoms(use_true_random=False))
def test_whatever_is_in_a_file_it_gives_records_or_a_value_error(official, data, junk, random):
    name, content = data.draw(st.sampled_from(sorted((n, c) for n, c in official.items() if not isinstance(c, str))))
    layout = next(layout for layout in LAYOUTS if layout.name == format_of(name))
    for _ in range(random.randint(1, 3)):
        content = spoiled(content, junk, random)
    keys = [f"f:{index}" for index in range(len(content))] if isinstance(content, list) else []
    recognise(content)
    partner = Parsed("a", spoiled(official["vqa_v2_annotations"], junk, random)) if layout.partner else None
    if layout.read is None or not isinstance(content, dict | list):
        return
    records = []
    with suppress(ValueError):
        records = layout.read(Parsed("f", content, keys), "root/{}".format, [partner] if name == "vqa_v2" else [])
    for record in records:
        assert record.key.startswith(("f", "a"))
        assert record.image is None or record.image.startswith("root/")
        json.dumps(dict(record.extra))


def test_gzip_bom_and_json_lines_under_any_name(tmp_path, official):
    lines = "\ufeff\n" + "\n".join(map(json.dumps, official["nlvr2"])) + "\n"
    for name in ("dev.json", "dev.jsonl", "dev.txt"):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(lines.encode()))
        source = open_source(path)
        assert list(source.formats.values()) == ["nlvr2"]
        assert [record.key for record in source] == [f"{path}:2", f"{path}:3"]


def test_a_naming_is_decided_once_for_a_file(tmp_path, put):
    put(tmp_path, "b/2.jpg", "c/3.jpg")
    named = naming(
        lambda name: f"{tmp_path}/{name}", ("a/{id}.jpg", "b/{id}.jpg", "c/{id}.jpg"), [{"id": 1}, {"id": 2}]
    )
    assert [named(id=number) for number in (1, 2, 3)] == [f"{tmp_path}/b/{number}.jpg" for number in (1, 2, 3)]


def test_files_that_complete_others_need_them(tmp_path, write, official):
    with pytest.raises(ValueError, match=r"a\.json \(vqa_v2_annotations\) only completes .* \(vqa_v2\) too"):
        open_source(write(tmp_path / "a.json", official["vqa_v2_annotations"]))
    captions = write(tmp_path / "c.txt", official["msvd_captions"])
    with pytest.raises(ValueError, match=r"m\.txt \(msvd_mapping\) only completes .* \(video_questions\) too"):
        open_source([write(tmp_path / "m.txt", official["msvd_mapping"]), captions])
    other = {"annotations": [{"question_id": 1, "image_id": 1, "answers": ["a"]}]}
    with pytest.raises(ValueError, match=r"no usable record in .*q\.json: .*no answers to question 42000"):
        open_source([write(tmp_path / "q.json", official["vqa_v2"]), write(tmp_path / "b.json", other)])


def test_splits_of_any_list_whose_records_name_theirs(tmp_path, write, read, official):
    rows = [{"image": "a", "question": "What?", "answer": "x", "split": split} for split in ("train", "val", "train")]
    path = write(tmp_path / "q.jsonl", [*rows, {"image": "a", "split": "val", "question": 3}, {"image": "a"}])
    assert [record.key[-1] for record in read(path, splits=["train"])] == ["1", "3", "5"]
    assert [record.key[-1] for record in read(path, splits=["val"])] == ["2", "4", "5"]
    with pytest.raises(ValueError, match=r"splits are for Karpathy files and others .*those of .*c\.json do not"):
        open_source(write(tmp_path / "c.json", official["captions"]), splits=["train"])


def test_several_files_of_different_formats(tmp_path, write, official):
    paths = {}
    for number, (name, content) in enumerate(official.items()):
        if name != "video_questions":  # MSVD's mapping is not for MSR-VTT's numbers
            paths[name] = write(tmp_path / (f"{number}.txt" if isinstance(content, str) else f"{number}.json"), content)
    source = open_source(list(paths.values()))
    assert list(source.formats.values()) == [format_of(name) for name in paths]
    assert source.in_memory


@pytest.mark.parametrize(
    ("name", "format", "count", "fields"),
    [
        ("easy_vqa/test.jsonl", "questions", 9673, {"question", "question_id", "answers"}),
        ("daquar/train.jsonl", "questions", 6630, {"question", "question_id", "answers"}),
        ("nlvr/dev.jsonl", "statements", 989, {"statement", "label", "identifier"}),
        ("nlvr/dev_grounding.jsonl", "grounding", 2832, {"phrase", "box_xyxy"}),
        ("snli_ve/train.jsonl", "entailment", 2895, {"hypothesis", "label"}),
        ("coco_mini/val2017.jsonl", "captions", 79, {"boxes"}),
        ("vqa_v2_sample/vqa_questions_test.json.gz", "vqa_v2", 2962, {"question", "question_id"}),
        ("vqa_v2_sample/with_images.jsonl", "questions", 112, {"question", "question_id", "answers", "answer_type"}),
        ("metrics/coco_captions_val2017.json", "coco_captions", 5000, set()),
    ],
)
def test_real_files(shared, name, format, count, fields):
    path = shared / "data" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    source = open_source(path)
    assert list(source.formats.values()) == [format]
    records = [record for shard in source.shards for record in shard.read()]
    assert len(records) == count
    assert all(record.problem is None and fields <= record.extra.keys() for record in records)


def test_real_questions_of_vqa_with_their_annotations(shared, read):
    folder = shared / "data" / "vqa_v2_sample"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    records = read(folder / "vqa_questions_test.json.gz", folder / "vqa_annotatons_test.json.gz", splits=["test"])
    assert len(records) == 2962
    assert {len(record.extra["answers"]) for record in records} == {10}
    assert {record.extra["answer_type"] for record in records} == {"yes/no", "number", "other"}
