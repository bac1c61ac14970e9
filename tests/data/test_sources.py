import gzip
import json
import logging
import pickle
import tarfile
from io import BytesIO

import fsspec
import pytest
import torch
from PIL import Image

from triptych.data import sources
from triptych.data.samples import decode_image
from triptych.data.sources import expand, open_source


def png(color=0):
    file = BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


def tar_bytes(members):
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return file.getvalue()


def pair(name, **values):
    return [(f"{name}.png", png()), (f"{name}.json", json.dumps(values))]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_tar_shard_as_img2dataset_writes_it(tmp_path):
    members = [
        *pair("0001", caption="a cat", image_id=17, url="http://x", width=4),
        *pair("0002", captions=["a dog", " ", "the dog "]),
        ("0003.jpg", png()),
        ("0003.txt", "a bird\n"),
        ("0004.WEBP", png()),
        *pair("0005", caption=None),
        ("0005.txt", "from the text"),
        ("readme.md", "ignored"),
    ]
    path = write(tmp_path / "0.tar", tar_bytes(members))
    records = list(open_source(path))
    assert [record.captions for record in records] == [
        ("a cat",),
        ("a dog", "the dog"),
        ("a bird",),
        (),
        ("from the text",),
    ]
    assert records[0].image_id == "17"
    assert records[0].extra == {"url": "http://x", "width": 4}
    assert records[1].key == records[1].image_id == f"{path}:0002"
    assert all(decode_image(record).size == (4, 4) for record in records)


def test_tar_members_with_odd_names(tmp_path):
    names = ["dir/a.b.c", "ünï cödé (1)", "x" * 180 + "/" + "y" * 120, "colon:name", "-dash", "{a,b}[0]"]
    members = [member for name in names for member in pair(name, caption=name)]
    path = write(tmp_path / "odd [x]{1,2}.tar", tar_bytes(members))
    assert [record.captions[0] for record in open_source(path)] == names


def test_broken_records_of_a_tar_carry_their_problem(tmp_path, caplog):
    members = [
        ("a.png", png()),
        ("a.json", "{"),
        *pair("b", caption=3),
        *pair("c", caption="good"),
        ("d.png", png()),
        ("d.json", "[1]"),
        ("e.png", png()),
        ("e.txt", b"\xff\xfe"),
        *pair("f", caption="first"),
        *pair("f", caption="second"),
    ]
    source = open_source(write(tmp_path / "a.tar", tar_bytes(members)))
    problems = {record.key[-1]: record.problem for record in source.shards[0].read()}
    assert problems.pop("c") is None
    assert sorted(problems) == ["a", "b", "d", "e", "f"]
    assert all(problems.values())
    with caplog.at_level(logging.WARNING):
        assert [record.captions for record in source] == [("good",)]
    assert sum("skipped" in message for message in caplog.messages) == 5
    assert source.count() == 1


def test_json_list_of_albef(tmp_path):
    entries = [
        {"image": "a.png", "caption": "one", "image_id": 5},
        {"image": "sub/b.png", "caption": ["two", "three"]},
        {"image": "/abs/c.png", "question": "what?", "answer": ["x"], "question_id": 3},
        {"images": ["a.png", "b.png"], "sentence": "same", "label": True},
        "nonsense",
        {"image": 3},
    ]
    path = write(tmp_path / "train.json", json.dumps(entries))
    records = open_source(path, image_root=tmp_path).shards[0].read()
    assert [record.image for record in records[:4]] == [
        f"{tmp_path}/a.png",
        f"{tmp_path}/sub/b.png",
        "/abs/c.png",
        None,
    ]
    assert [record.captions for record in records[:3]] == [("one",), ("two", "three"), ()]
    assert records[0].image_id == "5"
    assert records[1].image_id == f"{tmp_path}/sub/b.png"
    assert records[2].extra == {"image": "/abs/c.png", "question": "what?", "answer": ["x"], "question_id": 3}
    assert records[3].extra["images"] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert [record.problem is None for record in records] == [True] * 4 + [False] * 2
    assert records[4].key == f"{path}:4"


def test_jsonl_with_broken_lines_and_gzip(tmp_path):
    lines = ['{"image": "a.png", "caption": "one"}', "", "{broken", '{"image": "b.png", "captions": ["two"]}']
    for name, content in [
        ("a.jsonl", "\n".join(lines).encode()),
        ("b.jsonl.gz", gzip.compress("\n".join(lines).encode())),
    ]:
        path = write(tmp_path / name, content)
        records = open_source(path).shards[0].read()
        assert [record.key for record in records] == [f"{path}:1", f"{path}:3", f"{path}:4"]
        assert [record.problem is None for record in records] == [True, False, True]
        assert records[2].image == f"{tmp_path}/b.png"


def test_image_root_may_be_a_tar(tmp_path):
    root = write(tmp_path / "images.tar", tar_bytes([("x/a.png", png(9))]))
    path = write(tmp_path / "a.jsonl", '{"image": "x/a.png", "caption": "c"}')
    (record,) = open_source(path, image_root=root)
    assert decode_image(record).getpixel((0, 0)) == (9, 0, 0)


def karpathy(tmp_path):
    def picture(name, split, **ids):
        return {
            "filename": name,
            "split": split,
            "sentences": [{"raw": f"{name} {n}", "tokens": []} for n in "ab"],
            **ids,
        }

    pictures = [
        picture("0.jpg", "train", filepath="val2014", cocoid=391895, imgid=0),
        picture("1.jpg", "restval", filepath="val2014", cocoid=5, imgid=1),
        picture("2.jpg", "test", imgid=2),
        {"filename": "3.jpg", "split": "train"},
    ]
    return write(tmp_path / "dataset_coco.json", json.dumps({"images": pictures, "dataset": "coco"}))


def test_karpathy(tmp_path):
    path = karpathy(tmp_path)
    source = open_source(path, image_root="memory://coco", splits=["train", "restval"])
    records = source.shards[0].read()
    assert [record.image for record in records[:2]] == ["memory://coco/val2014/0.jpg", "memory://coco/val2014/1.jpg"]
    assert records[0].image_id == "391895"
    assert records[0].captions == ("0.jpg a", "0.jpg b")
    assert records[0].extra == {
        "filename": "0.jpg",
        "split": "train",
        "filepath": "val2014",
        "cocoid": 391895,
        "imgid": 0,
    }
    assert records[2].problem == "the field 'sentences' is missing"
    assert [record.image_id for record in open_source(path)] == ["391895", "5", "2"]
    with pytest.raises(ValueError, match=r"has the splits restval, test, train, not dev"):
        open_source(path, splits=["dev"])


def test_splits_are_for_karpathy_files_only(tmp_path):
    tar = write(tmp_path / "a.tar", tar_bytes(pair("a")))
    lines = write(tmp_path / "a.jsonl", '{"image": "a"}')
    for path in (tar, lines):
        with pytest.raises(ValueError, match="splits are for Karpathy"):
            open_source(path, splits=["train"])


def test_lists_are_cut_into_virtual_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LIST_SHARD", 4)
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"image": str(n)}) for n in range(10)))
    source = open_source(path)
    assert [len(shard.read()) for shard in source.shards] == [4, 4, 2]
    assert len({shard.name for shard in source.shards}) == 3
    assert source.in_memory
    assert not open_source(write(tmp_path / "a.tar", tar_bytes(pair("a")))).in_memory


def test_the_size_is_known_where_all_records_are_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LIST_SHARD", 2)
    listed = write(tmp_path / "a.jsonl", '{"image": "a"}\n{broken\n{"image": "b"}\n{"image": "c"}')
    tar = write(tmp_path / "a.tar", tar_bytes(pair("a")))
    source = open_source(listed)
    assert source.size == 4  # an unusable one too
    assert source.count() == 3
    assert open_source([listed, listed]).size == 8
    assert open_source(tar).size is None
    assert open_source([listed, tar]).size is None
    assert open_source(karpathy(tmp_path), splits=["train"]).size == 2


def test_braces_globs_and_several_locations(tmp_path):
    for number in range(12):
        write(tmp_path / f"t-{number:03d}.tar", tar_bytes(pair("a", caption=str(number))))

    def captions(*locations):
        return [record.captions[0] for record in open_source([f"{tmp_path}/{name}" for name in locations])]

    assert captions("t-{008..011}.tar") == ["8", "9", "10", "11"]
    assert captions("t-0{0,1}{0..1}.tar", "t-005.tar") == ["0", "1", "10", "11", "5"]
    assert captions("t-00[0-2].tar") == ["0", "1", "2"]
    assert captions("t-*.tar") == [str(number) for number in range(12)]
    assert expand("a{x}b") == ["a{x}b"]
    with pytest.raises(ValueError, match="is empty"):
        expand("{5..3}.tar")
    with pytest.raises(ValueError, match="nested"):
        expand("{1,2{3..4}}.tar")


def test_urls():
    for number in range(3):
        with fsspec.open(f"memory://shards/{number:02d}.tar", "wb") as file:
            file.write(tar_bytes(pair("a", caption=str(number))))
    for location in ("memory://shards/{00..02}.tar", "memory://shards/*.tar"):
        source = open_source(location)
        assert [record.captions[0] for record in source] == ["0", "1", "2"]
        assert source.shards[0].name.endswith("00.tar")
        assert "memory:" in source.shards[0].name
    with fsspec.open("memory://lists/a.jsonl", "wb") as file:
        file.write(b'{"image": "p/a.png"}')
    with fsspec.open("memory://lists/p/a.png", "wb") as file:
        file.write(png(7))
    (record,) = open_source("memory://lists/a.jsonl")
    assert decode_image(record).getpixel((0, 0)) == (7, 0, 0)
    for missing in ("memory://shards/{00..03}.tar", "memory://shards/x*.tar"):
        with pytest.raises(FileNotFoundError, match="shards"):
            open_source(missing)
    with pytest.raises(ValueError, match="nonsense"):
        open_source("nonsense://a.tar")


def test_missing_and_damaged_files_are_errors_at_once(tmp_path):
    write(tmp_path / "0.tar", tar_bytes(pair("a")))
    for location in ("{0..1}.tar", "1.tar", "x*.tar", "none.jsonl"):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            open_source(tmp_path / location)
    write(tmp_path / "bad.tar", "not a tar" * 200)
    write(tmp_path / "short.tar", "x")
    write(tmp_path / "void.tar", "")
    write(tmp_path / "bad.json", '[{"image": ')
    write(tmp_path / "bad.json.gz", "not gzip")
    write(tmp_path / "binary.jsonl", b"\xff\xfe\x00")
    write(tmp_path / "other.json", '{"no": "images"}')
    write(tmp_path / "broken.jsonl", "{\n{")
    for name in (
        "bad.tar",
        "short.tar",
        "void.tar",
        "bad.json",
        "bad.json.gz",
        "binary.jsonl",
        "other.json",
        "broken.jsonl",
    ):
        with pytest.raises(ValueError, match=name):
            open_source(tmp_path / name)
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(ValueError, match=r"folder\.tar"):
        open_source(tmp_path / "folder.tar")


def test_a_truncated_tar_is_an_error_when_it_is_read(tmp_path):
    content = tar_bytes([*pair("a"), *pair("b")])
    path = write(tmp_path / "cut.tar", content[:700])
    with pytest.raises(ValueError, match=r"cut\.tar is damaged"):
        open_source(path).count()


def test_empty_data_sets_and_unknown_formats(tmp_path):
    write(tmp_path / "empty.tar", tar_bytes([]))
    write(tmp_path / "empty.json", "[]")
    write(tmp_path / "empty.jsonl", "\n\n")
    write(tmp_path / "karpathy.json", '{"images": []}')
    for name in ("empty.tar", "empty.json", "empty.jsonl", "karpathy.json"):
        with pytest.raises(ValueError, match=f"empty: no usable record in .*{name}"):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match="no location"):
        open_source([])
    write(tmp_path / "data.csv", "a,b")
    with pytest.raises(ValueError, match=r"cannot guess the format of .*data\.csv"):
        open_source(tmp_path / "data.csv")
    with pytest.raises(ValueError, match="unknown format 'tar'"):
        open_source(tmp_path / "data.csv", format="tar")
    with pytest.raises(FileNotFoundError, match="image root"):
        open_source(tmp_path / "empty.json", image_root=tmp_path / "none")


def test_an_empty_shard_among_others_is_fine(tmp_path):
    write(tmp_path / "0.tar", tar_bytes([]))
    write(tmp_path / "1.tar", tar_bytes(pair("a")))
    assert open_source(tmp_path / "*.tar").count() == 1


def test_a_given_format_overrules_the_name(tmp_path):
    path = write(tmp_path / "lines.txt", '{"image": "a.png", "caption": "c"}')
    assert open_source(path, format="jsonl").count() == 1
    shard = write(tmp_path / "shard", tar_bytes(pair("a")))
    assert open_source(shard, format="webdataset").count() == 1


def test_refer_and_transvg_files_are_opened_by_their_names(tmp_path):
    write(tmp_path / "a.png", png())
    sentences = [{"sent_id": 5, "raw": "the dog", "sent": "the dog"}]
    reference = {"ref_id": 1, "ann_id": 9, "image_id": 3, "split": "train", "sentences": sentences}
    write(tmp_path / "refs(unc).p", pickle.dumps([reference, {**reference, "ref_id": 2, "split": "val"}], protocol=2))
    instances = {
        "images": [{"id": 3, "file_name": "a.png", "width": 4, "height": 4}],
        "annotations": [{"id": 9, "image_id": 3, "bbox": [1, 1, 2, 2]}],
    }
    write(tmp_path / "instances.json", json.dumps(instances))
    for location in (tmp_path / "refs(unc).p", tmp_path):
        source = open_source(location, image_root=tmp_path, splits=["val"])
        (record,) = source
        assert (record.extra["phrase"], record.extra["box_xyxy"]) == ("the dog", [1, 1, 3, 3])
        assert decode_image(record).size == (4, 4)
        assert source.formats == {str(location): "refer"}
    torch.save([("a.png", "9.pth", [1, 1, 2, 2], "the dog", None)], tmp_path / "unc_train.pth")
    (record,) = open_source(tmp_path / "unc_train.pth", image_root=tmp_path)
    assert record.extra["box_xyxy"] == [1, 1, 3, 3]
    with pytest.raises(ValueError, match="has the splits train, not val"):
        open_source(tmp_path / "unc_train.pth", image_root=tmp_path, splits=["val"])


def test_a_table_has_no_splits(tmp_path):
    write(tmp_path / "a.arrow", "")
    with pytest.raises(ValueError, match=r"splits are for .*; .*a.arrow is a table"):
        open_source(tmp_path / "a.arrow", splits=["val"])
