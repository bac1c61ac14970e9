import json
import tarfile
from io import BytesIO

import pytest
from PIL import Image

from triptych.data.check import check

COUNTS = ("records", "pictures", "videos", "captions", "questions", "answers", "phrases", "boxes", "statements")
COUNTS = (*COUNTS, "hypotheses", "texts", "labels", "missing", "broken")


def picture(path, width=4, height=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def counts(found):
    """All counts that are not zero."""
    return {name: found[name] for name in COUNTS if found[name]}


def test_captions_with_a_broken_line_and_a_missing_picture(tmp_path):
    picture(tmp_path / "a.png", 64, 48)
    picture(tmp_path / "b.png", 8, 9)
    data = lines(
        tmp_path / "captions.jsonl",
        {"image": "a.png", "caption": "a dog runs"},
        {"image": "b.png", "caption": ["two cats", "cats"]},
        "{broken",
        {"image": "none.png", "caption": "nothing"},
    )
    found = check([data])
    assert found["formats"] == {data: "captions"}
    assert found["shards"] == 1
    assert counts(found) == {"records": 4, "pictures": 2, "captions": 4, "missing": 1, "broken": 2}
    assert [broken["key"] for broken in found["first_broken"]] == [f"{data}:3", f"{data}:4"]
    assert found["first_broken"][1]["reason"].startswith(f"cannot read '{tmp_path}/none.png'")
    assert found["first_missing"] == [f"{tmp_path}/none.png"]
    assert (found["smallest"], found["largest"]) == ((8, 9), (64, 48))
    assert found["examples"][0] == {"image_id": f"{tmp_path}/a.png", "captions": ["a dog runs"]}
    assert len(found["examples"]) == 3
    json.dumps(found)


def test_a_picture_of_many_questions_is_looked_at_once(tmp_path, monkeypatch):
    from triptych.data import check as module

    looked = []
    monkeypatch.setattr(module, "load_image", lambda image, key: looked.append(image) or Image.new("RGB", (2, 2)))
    questions = [{"image": name, "question": "What?", "answers": ["a", "b"]} for name in "aabab"]
    found = check([lines(tmp_path / "q.jsonl", *questions)])
    assert looked == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert counts(found) == {"records": 5, "pictures": 2, "questions": 5, "answers": 10}
    assert found["examples"][0]["question"] == "What?"


def test_what_is_missing_is_counted_by_picture_and_the_texts_all_the_same(tmp_path):
    questions = [{"image": f"{n // 2}.png", "question": "What?", "answer": "a"} for n in range(16)]
    (tmp_path / "7.png").write_bytes(b"there, but no picture")
    found = check([lines(tmp_path / "q.jsonl", *questions)])
    assert counts(found) == {"records": 16, "questions": 16, "answers": 16, "missing": 7, "broken": 16}
    assert found["first_missing"] == [f"{tmp_path}/{n}.png" for n in range(5)]
    assert found["first_broken"][-1]["reason"] == "the image is of no known format"
    assert found["smallest"] is None
    assert found["largest"] is None


def test_questions_and_annotations_of_vqa(tmp_path, official):
    picture(tmp_path / "images" / "COCO_val2014_000000000042.jpg")
    files = []
    for name in ("vqa_v2", "vqa_v2_annotations"):
        (tmp_path / f"{name}.json").write_text(json.dumps(official[name]))
        files.append(str(tmp_path / f"{name}.json"))
    found = check(files, image_root=str(tmp_path / "images"))
    assert list(found["formats"].values()) == ["vqa_v2", "vqa_v2_annotations"]
    assert counts(found) == {"records": 2, "pictures": 1, "questions": 2, "answers": 20}


def test_pairs_boxes_and_hypotheses(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    statements = lines(
        tmp_path / "s.jsonl",
        {"images": ["a.png", "b.png"], "statement": "Both.", "label": True},
        {"images": ["none.png", "no.png"], "statement": "Neither.", "label": False},
        {"images": ["a.png"], "statement": "One.", "label": False},
    )
    found = check([statements])
    assert counts(found) == {"records": 3, "pictures": 2, "statements": 2, "labels": 2, "missing": 2, "broken": 2}
    boxes = lines(tmp_path / "g.jsonl", {"image": "a.png", "phrase": "it", "box_xyxy": [0, 0, 1, 1]})
    assert counts(check([boxes])) == {"records": 1, "pictures": 1, "phrases": 1, "boxes": 1}
    hypotheses = lines(tmp_path / "h.jsonl", {"image": "a.png", "hypothesis": "It rains."})
    found = check([statements, boxes, hypotheses])
    assert list(found["formats"].values()) == ["statements", "grounding", "entailment"]
    assert found["hypotheses"] == 1
    assert found["pictures"] == 2


def test_texts_need_no_picture(tmp_path):
    table = tmp_path / "train.tsv"
    table.write_text("sentence1\tsentence2\tlabel\nit rains\tit is wet\tentailment\nit\tis\nall\tis dry\tno\n")
    found = check([str(table)])
    assert found["formats"] == {str(table): "glue"}
    assert counts(found) == {"records": 3, "texts": 4, "labels": 2, "broken": 1}
    assert found["first_broken"] == [{"key": f"{table}:3", "reason": "it has 2 columns, not 3"}]
    own = lines(
        tmp_path / "own.jsonl",
        {"text": "it rains", "label": 1},
        {"text": "it is dry", "text_pair": "or not"},
        {"text": "it"},
    )
    found = check([own])
    assert counts(found) == {"records": 3, "texts": 4, "labels": 1}
    assert found["smallest"] is None
    assert [example["text"] for example in found["examples"]] == ["it rains", "it is dry", "it"]
    assert found["examples"][1]["text_pair"] == "or not"


def test_labels_of_pictures_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    data = lines(tmp_path / "a.jsonl", {"image": "a.png", "label": "cat"}, {"image": "none.png", "label": "dog"})
    found = check([data], format="captions")
    assert counts(found) == {"records": 2, "pictures": 1, "labels": 2, "missing": 1, "broken": 1}


def test_a_text_beside_a_missing_picture_does_not_excuse_it(tmp_path):
    data = lines(tmp_path / "a.jsonl", {"image": "none.png", "text": "it rains", "caption": "rain"})
    assert counts(check([data]))["missing"] == 1


def test_videos_must_be_there(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    data = lines(
        tmp_path / "v.jsonl",
        {"video": "a.mp4", "caption": "a"},
        {"video": "b.mp4", "captions": ["b", "c"]},
        {"video": "nonsense://c.mp4", "caption": "c"},
    )
    found = check([data])
    assert counts(found) == {"records": 3, "videos": 1, "captions": 4, "missing": 2, "broken": 2}
    assert found["first_missing"] == [f"{tmp_path}/b.mp4", "nonsense://c.mp4"]
    assert found["first_broken"][0] == {"key": f"{data}:2", "reason": f"there is no video '{tmp_path}/b.mp4'"}


def test_tar_shards_of_the_built_in_world(tmp_path):
    encoded = BytesIO()
    Image.new("RGB", (5, 6)).save(encoded, "PNG")
    truth = {
        "caption": "a red ball",
        "questions": [{"question": "What?", "answer": "ball"}, {"question": "How many?", "answer": "1"}],
        "phrases": [{"text": "the ball", "box_xyxy": [0, 0, 2, 2]}],
        "entailment": [{"hypothesis": "It is red.", "label": "entailment"}],
    }
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in [("0.png", encoded.getvalue()), ("0.json", json.dumps(truth).encode())]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    found = check([str(tmp_path / "0.tar")])
    assert found["formats"] == {str(tmp_path / "0.tar"): "webdataset"}
    text = {"captions": 1, "questions": 2, "answers": 2, "phrases": 1, "boxes": 1, "hypotheses": 1}
    assert counts(found) == {"records": 1, "pictures": 1, **text}


def test_a_format_may_be_given_and_mistakes_are_errors(tmp_path):
    data = lines(tmp_path / "q", {"image": "a", "question": "What?"})
    assert check([data], format="questions")["questions"] == 1
    with pytest.raises(ValueError, match="cannot guess the format"):
        check([data])
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        check([str(tmp_path / "none.jsonl")])


def test_real_grounding(shared):
    folder = shared / "data" / "nlvr"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    found = check([str(folder / "dev_grounding.jsonl")], image_root=str(folder / "images.tar"))
    assert counts(found) == {"records": 2832, "pictures": 639, "phrases": 2832, "boxes": 2832}
    assert found["largest"] == (400, 100)
