import json
import tarfile
from io import BytesIO

import pytest

from triptych.data.sources import open_source


def vqa_annotation(question_id, image_id, answer):
    return {"question_id": question_id, "image_id": image_id, "answers": [{"answer": answer, "answer_id": 1}]}


def nlvr2(name, label, **more):
    urls = {"left_url": "http://x/l.jpg", "right_url": "http://x/r.jpg"}
    return {"identifier": name, "sentence": "There are two dogs.", "label": label, **urls, **more}


def test_vqa_v2_with_and_without_annotations(tmp_path, write, read, official):
    questions = write(tmp_path / "questions.json", official["vqa_v2"])
    annotations = write(tmp_path / "annotations.json", official["vqa_v2_annotations"])
    plain = read(questions, image_root="memory://coco")
    assert [record.extra for record in plain] == [
        {"question": "Is it red?", "question_id": 42000, "dataset": "vqa"},
        {"question": "How many?", "question_id": 42001, "dataset": "vqa"},
    ]
    assert [record.image_id for record in plain] == ["42", "42"]
    assert plain[0].key == f"{questions}:questions[0]"
    for order in ((questions, annotations), (annotations, questions)):
        source = open_source(order, image_root="memory://coco")
        assert set(source.formats.values()) == {"vqa_v2", "vqa_v2_annotations"}
        first, second = source
        assert first.image == "memory://coco/COCO_val2014_000000000042.jpg"
        assert first.extra["answers"] == ["no"] * 10
        assert second.extra == {
            **plain[1].extra,
            "answers": ["2"] * 9 + ["two"],
            "answer_type": "number",
            "question_type": "how many",
        }


def test_vqa_v2_of_two_splits_at_once(tmp_path, write, read, official):
    train = {**official["vqa_v2"], "data_subtype": "train2014"}
    train["questions"] = [{"image_id": 5, "question": "What?", "question_id": "5000"}]
    answers = {"annotations": [vqa_annotation(5000, 5, "tea")]}  # ids may be numbers here and texts there
    files = [
        ("q1.json", official["vqa_v2"]),
        ("q2.json", train),
        ("a1.json", official["vqa_v2_annotations"]),
        ("a2.json", answers),
    ]
    records = read(*(write(tmp_path / name, content) for name, content in files))
    assert [record.extra["question_id"] for record in records] == [42000, 42001, "5000"]
    assert records[2].extra["answers"] == ["tea"]
    assert records[2].image == f"{tmp_path}/COCO_train2014_000000000005.jpg"


@pytest.mark.parametrize(
    ("subtype", "there", "expected"),
    [
        ("val2014", "COCO_val2014_000000000042.jpg", None),
        ("val2014", "000000000042.jpg", None),
        ("val2014", "val2014/COCO_val2014_000000000042.jpg", None),
        ("val2014", "val2014/000000000042.jpg", None),
        ("test-dev2015", "test2015/COCO_test2015_000000000042.jpg", None),
        ("val2014", "other.jpg", "COCO_val2014_000000000042.jpg"),
        (None, "other.jpg", "000000000042.jpg"),
    ],
)
def test_vqa_pictures_have_the_names_that_are_there(tmp_path, subtype, there, expected, write, put, read, official):
    put(tmp_path / "images", there)
    path = write(tmp_path / "q.json", {**official["vqa_v2"], "data_subtype": subtype})
    images = {record.image for record in read(path, image_root=tmp_path / "images")}
    assert images == {f"{tmp_path}/images/{expected or there}"}


def test_pictures_are_looked_for_in_tar_files_too(tmp_path, write, read, official):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        member = tarfile.TarInfo("val2014/000000000042.jpg")
        archive.addfile(member, BytesIO())
    records = read(write(tmp_path / "q.json", official["vqa_v2"]), image_root=tmp_path / "images.tar")
    assert records[0].image == f"{tmp_path}/images.tar:val2014/000000000042.jpg"


def test_broken_questions_and_annotations_are_told_with_their_place(tmp_path, write, read, official):
    questions = [
        *official["vqa_v2"]["questions"],
        {"question": "No picture?", "question_id": 1},
        {"image_id": "x", "question": "A text?", "question_id": 2},
        {"image_id": 3, "question": " ", "question_id": 3},
        {"image_id": 4, "question": "No id?"},
        {"image_id": 5, "question": "Not answered?", "question_id": 5},
        {"image_id": 6, "question": "No answers?", "question_id": 6},
        {"image_id": 7, "question": "Another picture?", "question_id": 7},
        "nonsense",
    ]
    annotations = [
        *official["vqa_v2_annotations"]["annotations"],
        {"question_id": 6, "image_id": 6, "answers": []},
        vqa_annotation(7, 8, "a"),
        vqa_annotation(7, 7, "b"),
        {"answers": []},
    ]
    paths = [
        write(tmp_path / "q.json", {**official["vqa_v2"], "questions": questions}),
        write(tmp_path / "a.json", {"annotations": annotations}),
    ]
    found = {record.key.removeprefix(f"{tmp_path}/"): record.problem for record in read(*paths)}
    assert [found.pop(f"q.json:questions[{n}]") for n in (0, 1)] == [None, None]
    place = f"{tmp_path}/a.json:annotations"
    assert found == {
        "q.json:questions[2]": "the field 'image_id' is missing",
        "q.json:questions[3]": "'image_id' must be a whole number, got 'x'",
        "q.json:questions[4]": "'question' must be a text, got ' '",
        "q.json:questions[5]": "the field 'question_id' is missing",
        "q.json:questions[6]": "the annotations have no answers to question 5",
        "q.json:questions[7]": f"{place}[2]: 'answers' must be a text or a list of texts, got '[]'",
        "q.json:questions[8]": f"{place}[3]: 'image_id' is 8, but 7 in the questions",
        "q.json:questions[9]": "not a JSON object but 'nonsense'",
        "a.json:annotations[4]": f"question 7 has another annotation, {place}[3]",
        "a.json:annotations[5]": "the field 'question_id' is missing",
    }


def test_gqa(tmp_path, write, read, official):
    path = write(tmp_path / "val_balanced_questions.json", official["gqa"])
    first, second = read(path)
    assert first.key == f"{path}:0517"
    assert first.image == f"{tmp_path}/n161313.jpg"
    assert first.image_id == "n161313"
    assert first.extra == {
        "question": "Is the hat red?",
        "question_id": "0517",
        "answers": ["yes"],
        "question_type": "verify",
        "dataset": "gqa",
    }
    assert second.extra == {"question": "What is it?", "question_id": "0518", "answers": ["a hat"], "dataset": "gqa"}
    test = {name: {"imageId": row["imageId"], "question": row["question"]} for name, row in official["gqa"].items()}
    assert all("answers" not in record.extra for record in read(write(tmp_path / "test.json", test)))
    mixed = {
        **official["gqa"],
        "1": {"imageId": "1", "question": "Why?"},
        "2": {"question": "Where?", "answer": "there"},
    }
    problems = [record.problem for record in read(write(tmp_path / "mixed.json", mixed))]
    assert problems == [None, None, "the field 'answer' is missing", "the field 'imageId' is missing"]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (("2.jpg",), ("1.jpg", "2.jpg")),
        (("VG_100K/1.jpg", "VG_100K_2/2.jpg"), ("VG_100K/1.jpg", "VG_100K_2/2.jpg")),
        (("VG_100K_2/2.jpg",), ("VG_100K/1.jpg", "VG_100K_2/2.jpg")),
        ((), ("1.jpg", "2.jpg")),
    ],
)
def test_visual_genome_questions(tmp_path, there, expected, write, put, read, official):
    put(tmp_path, *there)
    path = write(
        tmp_path / "question_answers.json", [*official["visual_genome_qa"], {"id": 3}, {"qas": [{"question": "Why?"}]}]
    )
    records = read(path)
    assert [record.image for record in records[:3]] == [f"{tmp_path}/{expected[n]}" for n in (0, 0, 1)]
    assert records[1].extra == {"question": "Where?", "question_id": 8, "answers": ["Left."], "dataset": "vg"}
    assert [record.image_id for record in records[:3]] == ["1", "1", "2"]
    assert records[0].key == f"{path}:0.qas[0]"
    assert [record.problem for record in records[3:]] == ["it has no list 'qas'", "the field 'image_id' is missing"]


@pytest.mark.parametrize("folder", ["", "val2017/"])
def test_coco_captions(tmp_path, folder, write, put, read, official):
    put(tmp_path, f"{folder}000000000002.jpg")
    records = read(write(tmp_path / "captions_val2017.json", official["coco_captions"]))
    assert [record.image_id for record in records] == ["9", "2"]
    assert [record.captions for record in records] == [("a dog",), ("a cat", "one cat")]
    assert [record.image for record in records] == [f"{tmp_path}/{folder}00000000000{n}.jpg" for n in (9, 2)]
    assert all(record.extra == {} for record in records)


def test_coco_captions_of_2014_and_of_a_test_set(tmp_path, write, put, read):
    put(tmp_path, "val2014/COCO_val2014_000000000007.jpg")
    images = [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}]
    (record,) = read(write(tmp_path / "a.json", {"images": images}))
    assert record.image == f"{tmp_path}/val2014/COCO_val2014_000000000007.jpg"
    assert record.captions == ()


def test_broken_captions_of_coco(tmp_path, write, read, official):
    images = [*official["coco_captions"]["images"], {"id": 3}, {"file_name": "a.jpg"}, 4]
    annotations = [
        *official["coco_captions"]["annotations"],
        {"image_id": 5, "caption": "a"},
        {"image_id": 2},
        {"caption": "a"},
    ]
    path = write(tmp_path / "c.json", {"images": images, "annotations": annotations})
    records = read(path)
    assert [(record.key.removeprefix(f"{path}:"), record.problem) for record in records[2:]] == [
        ("images[2]", "the field 'file_name' is missing"),
        ("images[3]", "the field 'id' is missing"),
        ("images[4]", "not a JSON object but '4'"),
        ("annotations[3]", "the picture 5 is not among 'images'"),
        ("annotations[4]", "the field 'caption' is missing"),
        ("annotations[5]", "the field 'image_id' is missing"),
    ]
    with pytest.raises(ValueError, match=r"c\.json has no list 'annotations'"):
        open_source(write(path, {**official["coco_captions"], "annotations": 3}), format="coco_captions")


def test_nocaps(tmp_path, write, put, read, official):
    put(tmp_path, "val/00aa.jpg")
    first, second = read(write(tmp_path / "nocaps_val_4500_captions.json", official["nocaps"]))
    assert (first.image_id, first.captions, first.extra) == ("0", ("a baby",), {"domain": "in-domain"})
    assert (second.image_id, second.captions, second.extra) == ("1", (), {"domain": "out-domain"})
    assert first.image == f"{tmp_path}/val/0013ea.jpg"
    test = {"images": [{k: v for k, v in image.items() if k != "domain"} for image in official["nocaps"]["images"]]}
    assert [record.extra for record in read(write(tmp_path / "test.json", test))] == [{}, {}]
    wrong = {"images": [*official["nocaps"]["images"], {"id": 2, "file_name": "x.jpg", "domain": "far-domain"}]}
    problem = read(write(tmp_path / "wrong.json", wrong))[2].problem
    assert problem == "'domain' must be one of in-domain, near-domain, out-domain, got 'far-domain'"


def test_broken_pictures_of_karpathy(tmp_path, write, read, official):
    rows = [
        *official["karpathy"]["images"],
        {"filename": "3.jpg", "split": "val", "imgid": 3},
        {"filename": "4.jpg", "split": "val", "sentences": [{"raw": "a"}]},
        {"filename": "5.jpg", "split": "val", "imgid": 5, "sentences": [{"tokens": []}]},
        {"filename": "6.jpg", "split": "val", "imgid": 6, "sentences": [3], "filepath": ""},
        {"filename": "7.jpg", "filepath": 7, "split": "val", "imgid": 7, "sentences": []},
        {"imgid": 8, "sentences": []},
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": rows})
    assert [record.problem for record in read(path)[2:]] == [
        "the field 'sentences' is missing",
        "the field 'cocoid' or 'imgid' is missing",
        "the field 'raw' is missing",
        "not a JSON object but '3'",
        "'filepath' must be a path, got '7'",
        "the field 'filename' is missing",
    ]
    # A broken picture belongs to its split; one without a split could be of any.
    assert [record.problem is None for record in read(path, splits=["train"])] == [True, False]


@pytest.mark.parametrize("folder", ["", "dev/"])
def test_nlvr2(tmp_path, folder, write, put, read, official):
    put(tmp_path, f"{folder}dev-850-0-img0.png")
    rows = [*official["nlvr2"], nlvr2("dev-1-0-0", "perhaps"), nlvr2("dev-1-0-1", None), nlvr2(None, "True")]
    path = write(tmp_path / "dev.jsonl", rows)
    records = read(path)
    images = [f"{tmp_path}/{folder}dev-850-0-img{side}.png" for side in (0, 1)]
    common = {"images": images, "statement": "There are two dogs."}
    assert [record.extra for record in records[:2]] == [
        {**common, "identifier": "dev-850-0-0", "label": False},
        {**common, "identifier": "dev-850-0-1", "label": True},
    ]
    assert [(record.image, record.image_id) for record in records[:2]] == [(None, "dev-850-0")] * 2
    assert [record.problem for record in records[2:]] == [
        "'label' must be true or false, got 'perhaps'",
        "the field 'label' is missing",
        "the field 'identifier' is missing",
    ]


@pytest.mark.parametrize("folder", ["", "train/", "56/", "train/56/", "images/train/56/"])
def test_nlvr2_train_pictures_lie_in_directories(tmp_path, folder, write, put, read):
    put(tmp_path, f"{folder}train-1-0-img0.png")
    rows = [nlvr2("train-1-0-0", "True", directory=56), nlvr2("train-2-0-0", "True", directory=57)]
    first, second = read(write(tmp_path / "train.json", "\n".join(map(json.dumps, rows))))
    assert first.extra["images"][1] == f"{tmp_path}/{folder}train-1-0-img1.png"
    assert second.extra["images"][0] == f"{tmp_path}/{folder.replace('56', '57')}train-2-0-img0.png"


@pytest.mark.parametrize(
    ("name", "key", "there"),
    [("3416050480", "Flickr30K_ID", ""), ("3416050480.jpg", "Flikr30kID", "flickr30k-images/")],
)
def test_snli_ve(tmp_path, name, key, there, write, put, read):
    put(tmp_path, f"{there}3416050480.jpg")
    pair = {"sentence1": "A man walks.", "sentence2": "A man sits.", key: name}
    rows = [{**pair, "gold_label": label} for label in ("contradiction", "neutral", "-", "maybe")]
    records = read(write(tmp_path / "snli_ve_dev.jsonl", rows))
    assert records[0].extra == {"hypothesis": "A man sits.", "premise": "A man walks.", "label": "contradiction"}
    assert records[0].image == f"{tmp_path}/{there}3416050480.jpg"
    assert [record.image_id for record in records[:2]] == ["3416050480"] * 2
    assert [record.problem for record in records[2:]] == [
        "'gold_label' is '-': the annotators did not agree",
        "'gold_label' must be one of contradiction, neutral, entailment, got 'maybe'",
    ]
