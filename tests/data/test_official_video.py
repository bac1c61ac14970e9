import pytest

from triptych.data.sources import open_source


def test_msrvtt(tmp_path, write, put, read, official):
    put(tmp_path, "video1.avi")
    path = write(tmp_path / "train_val_videodatainfo.json", official["msrvtt"])
    first, second = read(path)
    assert first.image is None
    assert first.extra == {"video": f"{tmp_path}/video0.avi", "split": "train"}
    assert (first.image_id, first.captions) == ("video0", ("a dog runs",))
    assert second.captions == ("a cat jumps", "it jumps")
    assert [record.image_id for record in read(path, splits=["test"])] == ["video1"]
    with pytest.raises(ValueError, match="has the splits test, train, not dev"):
        open_source(path, splits=["dev"])
    sentences = [*official["msrvtt"]["sentences"], {"video_id": "video9", "caption": "a"}, {"video_id": "video0"}]
    videos = [*official["msrvtt"]["videos"], {"split": "test"}]
    broken = read(write(tmp_path / "b.json", {"videos": videos, "sentences": sentences}))[2:]
    assert [record.problem for record in broken] == [
        "the field 'video_id' is missing",
        "the video 'video9' is not among 'videos'",
        "the field 'caption' is missing",
    ]


def test_vatex(tmp_path, write, put, read, official):
    put(tmp_path, "Ptf_2VRj-V0_000122_000132.webm")
    rows = [*official["vatex"], {"videoID": "other"}, {"enCap": ["a"]}, {"videoID": "x", "enCap": 3}]
    records = read(write(tmp_path / "vatex.json", rows))
    assert records[0].extra == {"video": f"{tmp_path}/Ptf_2VRj-V0_000122_000132.webm"}
    assert records[0].captions == ("a man runs", "he runs")
    assert (records[1].captions, records[1].problem) == ((), None)
    assert [record.problem for record in records[2:]] == [
        "the field 'videoID' is missing",
        "the caption is neither a text nor a list of texts",
    ]


def test_msvd_captions(tmp_path, write, put, read, official):
    put(tmp_path, "-4wsuPCjDBc_5_15.avi")
    path = write(tmp_path / "AllVideoDescriptions.txt", official["msvd_captions"] + "nonsense\r\n")
    bird, squirrel, broken = read(path)
    assert (bird.key, bird.image_id, bird.captions) == (f"{path}:3", "mv89psg6zh4_33_46", ("a bird bathes", "a bird"))
    assert squirrel.extra == {"video": f"{tmp_path}/-4wsuPCjDBc_5_15.avi"}
    assert (broken.key, broken.problem) == (f"{path}:6", "not a clip and a caption")


@pytest.mark.parametrize("name", ["video6513.mp4", "video6513.webm", "vid6513.avi", "6513.mp4"])
def test_questions_about_numbered_videos(tmp_path, name, write, put, read, official):
    put(tmp_path, name)
    (record,) = read(write(tmp_path / "test_qa.json", official["video_questions"]))
    assert record.image is None
    assert record.extra == {
        "video": f"{tmp_path}/{name}",
        "question": "who is it?",
        "question_id": 158581,
        "answers": ["couch"],
        "category_id": 14,
    }


def test_questions_about_msvd_with_the_names_of_its_clips(tmp_path, write, put, read, official):
    put(tmp_path, "mv89psg6zh4_33_46.avi")
    mapping = write(tmp_path / "youtube_mapping.txt", official["msvd_mapping"])
    questions = official["video_questions of MSVD"]
    path = write(tmp_path / "train_qa.json", [*questions, {**questions[0], "video_id": 3}])
    records = read(mapping, path)
    assert [record.extra["video"] for record in records[:2]] == [
        f"{tmp_path}/mv89psg6zh4_33_46.avi",
        f"{tmp_path}/-4wsuPCjDBc_5_15.avi",
    ]
    assert records[2].problem == "the mapping of MSVD's clips has no vid3"
    bad = write(tmp_path / "bad.txt", official["msvd_mapping"] + "x_1_2 seven\n")
    with pytest.raises(ValueError, match=r"bad\.txt:3: not a clip and its number"):
        open_source([path, bad])


def test_users_questions_about_videos(tmp_path, write, read):
    rows = [
        {"video": "a.MP4", "question": "What?", "answer": "tea", "question_id": 3, "source": "me"},
        {"video_id": "video7", "question": "Who?", "answer": "me"},
        {"video": "a.mp4", "question": "How?"},
        {"question": "How?", "answer": "so"},
        {"video": 1.5, "question": "How?", "answer": "so"},
    ]
    path = write(tmp_path / "q.jsonl", rows)
    first, second, *broken = read(path)
    expected = {"question": "What?", "question_id": 3, "answers": ["tea"], "source": "me"}
    assert first.extra == {"video": f"{tmp_path}/a.MP4", **expected}
    assert first.image_id == f"{tmp_path}/a.MP4"
    assert second.extra["video"] == f"{tmp_path}/video7.mp4"
    assert second.extra["question_id"] == f"{path}:2"
    assert [record.problem for record in broken] == [
        "the field 'answers' or 'answer' is missing",
        "the field 'video' or 'video_id' is missing",
        "'video' must be a whole number or a text, got '1.5'",
    ]


def test_lists_of_videos_with_captions(tmp_path, write, put, read, official):
    put(tmp_path, "bP5KfdFJzC4_660.0_810.0.mkv", "video7020.mkv")
    rows = [
        *official["videos"],
        {"video": "bP5KfdFJzC4_660.0_810.0", "captions": ["a", "b"]},
        {"video": "sub/c.mpeg", "caption": "c", "image_id": 8},
        {"video": 3, "caption": "d"},
        {"video": "e.mp4", "caption": 4},
    ]
    records = read(write(tmp_path / "v.jsonl", rows))
    assert [record.extra for record in records[:3]] == [
        {"video": f"{tmp_path}/video7020.mkv", "retrieval_key": "ret0"},
        {"video": f"{tmp_path}/bP5KfdFJzC4_660.0_810.0.mkv"},
        {"video": f"{tmp_path}/sub/c.mpeg"},
    ]
    assert [record.captions for record in records[:3]] == [("a cat",), ("a", "b"), ("c",)]
    assert records[2].image_id == "8"
    assert all(record.image is None for record in records)
    assert [record.problem for record in records[3:]] == [
        "'video' must be a path, got '3'",
        "the caption is neither a text nor a list of texts",
    ]
