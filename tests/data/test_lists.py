from hypothesis import given
from hypothesis import strategies as st

from triptych.data.fields import Parsed
from triptych.data.lists import read_grounding


def test_mplugs_questions(tmp_path, write, read, official):
    vqa, vg, gqa = read(write(tmp_path / "vqa_train.json", official["questions"]), image_root="memory://coco")
    assert vqa.image == "memory://coco/val2014/COCO_val2014_000000000042.jpg"
    assert vqa.extra == {
        "question": "What does it say?",
        "question_id": 42002,
        "answers": ["stop"] * 9 + ["go"],
        "dataset": "vqa",
        "ocr": "STOP sign",
        "object_labels": "sign street light",
    }
    expected = {"question": "What?", "question_id": 3, "answers": ["clock"], "answer_weights": [0.5], "dataset": "vg"}
    assert vg.extra == expected
    assert gqa.extra["answer_weights"] == [0.5]
    test = [
        {name: row[name] for name in ("dataset", "image", "question", "question_id")} for row in official["questions"]
    ]
    for record in read(write(tmp_path / "vqa_test.json", test)):
        assert not {"answers", "answer_weights"} & set(record.extra)


def test_users_questions(tmp_path, write, read):
    rows = [
        {"image": "a.jpg", "question": "What? ", "answer": "tea", "source": "me", "image_id": 7, "caption": "a cup"},
        {
            "image": "a.jpg",
            "question": "How?",
            "answers": ["so", "thus"],
            "answer_weights": [1, 0.3],
            "ocr": "EXIT",
            "image_id": None,
        },
        {"image": "a.jpg", "question": "Who?", "answers": [{"answer": "me"}], "question_id": "q3", "ocr": ["a", "b"]},
        {"image": "a.jpg", "question": "Why?", "answer": "so", "object_labels": ["cup", "tea pot"], "ocr": []},
        {"image": "a.jpg", "question": "Which?", "answer": None},
        {"question": "Which?", "answer": "a"},
        {"image": 3, "question": "Which?", "answer": "a"},
        {"image": "a.jpg", "question": ["Which?"], "answer": "a"},
        {"image": "a.jpg", "question": "Which?", "answers": ["a", 3]},
        {"image": "a.jpg", "question": "Which?", "answers": ["a"], "answer_weights": [1, 2]},
        {"image": "a.jpg", "question": "Which?", "answers": ["a"], "answer_weights": [-1]},
        {"image": "a.jpg", "question": "Which?", "answers": ["a"], "question_id": True},
        {"image": "a.jpg", "question": "Which?", "answers": ["a"], "ocr": [3]},
        {"image": "a.jpg", "question": "Which?", "answers": ["a"], "answer_type": 3},
    ]
    path = write(tmp_path / "q.jsonl", rows)
    records = read(path)
    second = {"question": "How?", "question_id": f"{path}:2", "answers": ["so", "thus"]}
    assert [record.extra for record in records[:4]] == [
        {"question": "What?", "question_id": f"{path}:1", "answers": ["tea"], "source": "me"},
        {**second, "answer_weights": [1.0, 0.3], "ocr": "EXIT"},
        {"question": "Who?", "question_id": "q3", "answers": ["me"], "ocr": "a b"},
        {"question": "Why?", "question_id": f"{path}:4", "answers": ["so"], "object_labels": "cup tea pot"},
    ]
    assert records[0].captions == ("a cup",)
    assert [record.image_id for record in records[:2]] == ["7", f"{tmp_path}/a.jpg"]
    assert [record.problem for record in records[4:]] == [
        "the field 'answers' or 'answer' is missing",
        "the field 'image' is missing",
        "'image' must be a path, got '3'",
        "'question' must be a text, got \"['Which?']\"",
        "'answers' must be a text or a list of texts, got \"['a', 3]\"",
        "'answer_weights' must be 1 numbers from 0 on, one for each answer, got '[1, 2]'",
        "'answer_weights' must be 1 numbers from 0 on, one for each answer, got '[-1]'",
        "'question_id' must be a whole number or a text, got 'True'",
        "'ocr' must be a text, a list of texts, or a list of [place, text], got '[3]'",
        "'answer_type' must be a text, got '3'",
    ]


def test_users_statements_about_two_pictures_or_one(tmp_path, write, read):
    pair = ["a.png", "/abs/b.png"]
    rows = [
        {"images": pair, "statement": "Both are red.", "label": True, "identifier": "x-1", "source": "me"},
        {"images": pair, "sentence": "Both are red.", "label": "false"},
        {"image": "a.png", "sentence": "It is red.", "label": "True", "image_id": 3},
        {"images": pair, "sentence": "No label."},
        {"images": ["a.png"], "sentence": "One.", "label": True},
        {"images": [1, 2], "sentence": "Numbers.", "label": True},
        {"images": "a.png", "sentence": "No list.", "label": True},
        {"sentence": "None.", "label": True},
        {"images": pair, "label": True},
        {"images": pair, "sentence": "A number.", "label": 1},
    ]
    path = write(tmp_path / "s.jsonl", rows)
    records = read(path)
    placed = [f"{tmp_path}/a.png", "/abs/b.png"]
    assert [record.extra for record in records[:3]] == [
        {"images": placed, "statement": "Both are red.", "label": True, "identifier": "x-1", "source": "me"},
        {"images": placed, "statement": "Both are red.", "label": False, "identifier": f"{path}:2"},
        {"statement": "It is red.", "label": True, "identifier": f"{path}:3"},
    ]
    assert [(record.image, record.image_id) for record in records[:3]] == [
        (None, " ".join(placed)),
        (None, " ".join(placed)),
        (placed[0], "3"),
    ]
    assert [record.problem for record in records[3:]] == [
        "the field 'label' is missing",
        "'images' must be two paths, got \"['a.png']\"",
        "'images' must be a list of paths, got '[1, 2]'",
        "'images' must be a list, got 'a.png'",
        "the field 'image' or 'images' is missing",
        "the field 'statement' or 'sentence' is missing",
        "'label' must be true or false, got '1'",
    ]
    unlabelled = [{"images": pair, "sentence": "Both?"}]
    assert "label" not in read(write(tmp_path / "test.jsonl", unlabelled))[0].extra


def test_users_entailment(tmp_path, write, read):
    rows = [
        {"image": 4705552913, "sentence": "They hug.", "label": "neutral"},
        {"image": "b.png", "hypothesis": "It rains.", "premise": "Wet.", "label": "entailment", "source": "me"},
        {"image": "b.png", "hypothesis": "It rains.", "label": "no"},
        {"image": "b.png", "hypothesis": "It rains."},
        {"hypothesis": "It rains.", "label": "neutral"},
        {"image": "b.png", "label": "neutral"},
        {"image": "b.png", "hypothesis": "It rains.", "label": ["neutral"]},
    ]
    records = read(write(tmp_path / "ve.json", rows))
    assert [record.image for record in records[:2]] == [f"{tmp_path}/4705552913.jpg", f"{tmp_path}/b.png"]
    assert [record.extra for record in records[:2]] == [
        {"hypothesis": "They hug.", "label": "neutral"},
        {"hypothesis": "It rains.", "premise": "Wet.", "label": "entailment", "source": "me"},
    ]
    assert [record.problem for record in records[2:]] == [
        "'label' must be one of contradiction, neutral, entailment, got 'no'",
        "the field 'label' is missing",
        "the field 'image' is missing",
        "the field 'hypothesis' or 'sentence' is missing",
        "'label' must be one of contradiction, neutral, entailment, got \"['neutral']\"",
    ]
    unlabelled = [{"image": "a.jpg", "hypothesis": "It rains."}]
    assert read(write(tmp_path / "test.jsonl", unlabelled))[0].extra == {"hypothesis": "It rains."}


def test_grounding(tmp_path, write, read, official):
    wrong = [
        *({"box_xyxy": [1, 2, 3]}, {"box_xyxy": "1,2,3,4"}, {"bbox_xywh": [1, 2, 0, 4]}, {"box_xyxy": [5, 2, 3, 4]}),
        *({"box_xyxy": [1, 2, True, 4]}, {"box_xyxy": [0, 0, float("nan"), 1]}, {}),
    ]
    rows = [
        *official["grounding"],
        *({"image": "a.jpg", "phrase": "x", **box} for box in wrong),
        {"image": "a", "box_xyxy": []},
    ]
    records = read(write(tmp_path / "g.jsonl", rows))
    assert [record.extra for record in records[:2]] == [
        {"phrase": "the red car", "box_xyxy": [10.0, 20.0, 40.0, 60.0]},
        {"phrase": "it", "box_xyxy": [1.5, 2.0, 3.0, 4.0]},
    ]
    assert [record.problem for record in records[2:]] == [
        "'box_xyxy' must be four numbers, got '[1, 2, 3]'",
        "'box_xyxy' must be four numbers, got '1,2,3,4'",
        "'bbox_xywh' must be a box with an area, got '[1, 2, 0, 4]'",
        "'box_xyxy' must be a box with an area, got '[5, 2, 3, 4]'",
        "'box_xyxy' must be four numbers, got '[1, 2, True, 4]'",
        "'box_xyxy' must be four numbers, got '[0, 0, nan, 1]'",
        "the field 'box_xyxy' or 'bbox_xywh' is missing",
        "the field 'phrase' is missing",
    ]
    unboxed = [{"image": "a.jpg", "phrase": "the car"}]
    assert read(write(tmp_path / "test.jsonl", unboxed))[0].extra == {"phrase": "the car"}


@given(*[st.floats(-1e3, 1e3).map(lambda x: round(x, 2)) for _ in range(2)], *[st.floats(1, 1e3) for _ in range(2)])
def test_boxes_of_both_kinds_are_the_same(left, top, width, height):
    common = {"image": "a", "phrase": "b"}
    rows = [
        {**common, "bbox_xywh": [left, top, width, height]},
        {**common, "box_xyxy": [left, top, left + width, top + height]},
    ]
    first, second = read_grounding(Parsed("f", rows, ["f:0", "f:1"]), str)
    assert first.extra == second.extra
