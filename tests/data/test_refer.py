import json
import os
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from triptych.data.boxes import record_expressions
from triptych.data.refer import load_plain_pickle, read_refer, read_transvg


def place(name):
    return f"train2014/{name}"


def sentence(number, text):
    return {"tokens": text.split(), "raw": text.upper(), "sent_id": number, "sent": text}


def reference(number, split, *texts, **values):
    return {
        "ref_id": number,
        "ann_id": 100 + number,
        "image_id": 10 + number,
        "category_id": 1,
        "file_name": f"COCO_train2014_{10 + number:012}_{100 + number}.jpg",  # REFER says to ignore it, and so do we
        "split": split,
        "sent_ids": [number * 10 + position for position in range(len(texts))],
        "sentences": [sentence(number * 10 + position, text) for position, text in enumerate(texts)],
        **values,
    }


REFS = [
    reference(1, "train", "the dog", "a brown dog"),
    reference(2, "val", "man on left"),
    reference(3, "testA", "woman"),
    reference(4, "testB", "red bus", "the bus"),
]


def instances(**boxes):
    box = {number: [10.6, 20.25, 30.5, 40.9] for number in range(101, 105)}
    box |= {int(name.removeprefix("box_")): value for name, value in boxes.items()}
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 480} for number in range(11, 15)],
        "annotations": [{"id": n, "image_id": n - 90, "bbox": value, "iscrowd": 0} for n, value in box.items()],
    }


def write(folder, refs=REFS, name="refs(unc).p", protocol=0, annotations=None):
    file = folder / name
    file.write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol))
    (folder / "instances.json").write_text(json.dumps(annotations or instances()))
    return str(file)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_one_record_a_phrase(tmp_path, protocol):
    file = write(tmp_path, protocol=protocol)
    records = read_refer(file, None, place)
    assert [record.extra["phrase"] for record in records] == [s["sent"] for ref in REFS for s in ref["sentences"]]
    assert [record.problem for record in records] == [None] * 6
    assert records[1].key == f"{file}:0.1"
    assert records[1].image == "train2014/11.jpg"
    assert records[1].image_id == "11"
    assert records[1].captions == ()
    assert records[1].extra == {
        "phrase": "a brown dog",
        "box_xyxy": pytest.approx([10.6, 20.25, 41.1, 61.15]),
        "split": "train",
        "ref_id": 1,
        "sent_id": 11,
    }
    assert record_expressions(records[1])[0].text == "a brown dog"  # what data.boxes takes


def test_a_folder_means_its_one_pickle(tmp_path):
    write(tmp_path, name="refs(umd).p")
    assert len(read_refer(str(tmp_path), None, place)) == 6
    write(tmp_path, name="refs(google).p")
    with pytest.raises(ValueError, match=r"several reference files; give one of refs\(google\).p, refs\(umd\).p"):
        read_refer(str(tmp_path), None, place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no refs\(...\).p"):
        read_refer(str(tmp_path / "empty"), None, place)


def test_instances_from_elsewhere_and_whole_pixels(tmp_path):
    file = write(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(instances(box_101=[1.9, 2.9, 3.9, 4.9])))
    box = read_refer(file, str(other), place)[0].extra["box_xyxy"]
    assert box == pytest.approx([1.9, 2.9, 5.8, 7.8])
    assert read_refer(file, str(other), place, whole_pixels=True)[0].extra["box_xyxy"] == [1, 2, 4, 6]


@pytest.mark.parametrize(
    ("splits", "phrases"),
    [(["testA"], ["woman"]), (("val", "testB"), ["man on left", "red bus", "the bus"]), ([], [])],
)
def test_splits(tmp_path, splits, phrases):
    records = read_refer(write(tmp_path), None, place, splits)
    assert [record.extra["phrase"] for record in records] == phrases


def test_unknown_splits_name_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="has the splits testA, testB, train, val, not test, val"):
        read_refer(write(tmp_path), None, place, ["test", "val"])


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("text", "must be a dictionary, got 'text'"),
        ({"split": "train"}, "the field 'image_id' is missing"),
        ({"image_id": 11}, "'ann_id' is missing"),
        (reference(9, "train", "dog"), "has no image 19"),
        (reference(1, "train", "dog", ann_id=99), "has no annotation 99"),
        (reference(1, "train", "dog", ann_id=[1]), r"has no annotation \[1\]"),
        (reference(1, "train", "dog", ann_id=102), "annotation 102 of .* is of another image than 11"),
        (reference(1, "train", "dog", sentences=None), "not iterable"),
        (reference(1, "train", " "), "phrase must be a text, got ' '"),
        (reference(1, "train", "dog", sentences=[{"sent_id": 1}]), "'sent' is missing"),
        (reference(1, "train", "dog", sentences=[{"sent": "dog"}]), "'sent_id' is missing"),
        (reference(1, "train", "dog", sentences=[{"sent": b"dog", "sent_id": 1}]), "must be a text, got b'dog'"),
        (reference(1, "train", "dog", sentences=["dog"]), "indices must be"),
    ],
)
def test_broken_references_are_kept_with_their_problem(tmp_path, bad, problem):
    file = write(tmp_path, [bad, REFS[1]], protocol=2)
    broken, good = read_refer(file, None, place)
    assert good.extra["phrase"] == "man on left"
    assert broken.key.startswith(f"{file}:0")
    assert broken.image is None
    with pytest.raises(ValueError, match=problem):
        raise ValueError(broken.problem)
    assert "\n" not in broken.problem


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([1, 2, 0, 4], "has no area"),
        ([1, 2, 3], "four numbers"),
        ([1, 2, 3, "4"], "four numbers"),
        (None, "four numbers"),
        ([1, 2, 3, float("nan")], "finite"),
        ([1, 2, 3, 10**400], "too large"),
    ],
)
def test_broken_boxes_are_kept_with_their_problem(tmp_path, box, problem):
    records = read_refer(write(tmp_path, annotations=instances(box_102=box)), None, place)
    assert [record.problem is None for record in records] == [True, True, False, True, True, True]
    assert problem in records[2].problem


def test_a_reference_without_split_is_not_lost(tmp_path):
    nowhere = {name: value for name, value in REFS[0].items() if name != "split"}
    broken, good = read_refer(write(tmp_path, [nowhere, REFS[1]]), None, place, ["val"])
    assert broken.problem == "the field 'split' is missing"
    assert good.problem is None


# ------------------------------------------------------------------------------------------------ plain pickles


def test_pickles_of_python_2(tmp_path):
    """By hand: texts of 8 bits (S, U), unicode (V), a long (L), a set as an instance (protocol 0) and a truth."""
    content = (
        b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'raw'\nVcaf\\u00e9\nsS'id'\nL5L\nsS'ok'\nI01\n"
        b"sS'set'\nc__builtin__\nset\n((lI1\naI2\natRsa."
    )
    file = tmp_path / "refs(unc).p"
    file.write_bytes(content)
    assert load_plain_pickle(str(file)) == [{"sent": "café", "raw": "café", "id": 5, "ok": True, "set": {1, 2}}]
    file.write_bytes(b"\x80\x02]q\x00(U\x03abcq\x01U\x01\xffe.")
    assert load_plain_pickle(str(file)) == ["abc", "\ufffd"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_of_any_protocol(tmp_path, protocol):
    values = [1, -(2**70), 1.5, True, None, "text", b"\x00\xff", (1, (2,)), {"a": [1]}, {3}, frozenset([4])]
    values.append(OrderedDict(x=1))
    file = tmp_path / "plain.p"
    file.write_bytes(pickle.dumps(values, protocol))
    assert load_plain_pickle(str(file)) == values


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "(posix|nt).mkdir"), (eval, "builtins.eval|__builtin__.eval"), (getattr, ".*builtin.*getattr")],
)
def test_malicious_pickles_are_refused(tmp_path, protocol, function, name):
    trace = tmp_path / "trace"
    arguments = {os.mkdir: [str(trace)], eval: [f"__import__('os').mkdir({str(trace)!r})"], getattr: ["", "upper"]}
    refs = [*REFS, Malicious(function, *arguments[function])]
    file = write(tmp_path, refs, protocol=protocol)
    with pytest.raises(ValueError, match=rf"refs\(unc\).p is not a pickle .* tries to load '({name})'") as caught:
        read_refer(file, None, place)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(refs, protocol))  # it would have run
    assert trace.exists() or function is getattr


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",  # an instance of protocol 0
        b"(cos\nsystem\no.",  # another kind of instance
        b"\x80\x04\x8c\x08builtins\x94\x8c\x0bset.__new__\x94\x93\x94.",  # an attribute of what is allowed
        b"\x80\x02c__builtin__\nset\nq\x00}q\x01U\x03addq\x02K\x01sb.",  # the allowed type altered
        b"\x80\x02ccollections\nOrderedDict\nN}U\x03addK\x01s\x86b.",  # through its slots
        b"\x80\x02\x82\x01.",  # an extension code
        b"Pabc\n.",  # a persistent id
    ],
)
def test_other_ways_into_an_unpickler(tmp_path, content):
    file = tmp_path / "refs(unc).p"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not a pickle of plain values"):
        load_plain_pickle(str(file))
    assert callable(set.add)
    assert not hasattr(OrderedDict, "add")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(REFS)[:-20], b"[]", b"\x80\x63."])
def test_damaged_pickles(tmp_path, content):
    with pytest.raises(ValueError, match=r"refs\(unc\).p is not a pickle of plain values: ."):
        read_refer(write(tmp_path, content), None, place)


def test_other_content(tmp_path):
    with pytest.raises(ValueError, match="not a list of references but a dict"):
        read_refer(write(tmp_path, {"refs": REFS}), None, place)
    file = write(tmp_path)
    for content, message in (("{", "COCO annotations: "), ('{"images": []}', "'annotations'"), ("[]", "COCO")):
        (tmp_path / "instances.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_refer(file, None, place)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances.json does not exist"):
        read_refer(file, None, place)
    with pytest.raises(FileNotFoundError, match=r"refs\(no\).p does not exist"):
        read_refer(str(tmp_path / "refs(no).p"), None, place)


# ------------------------------------------------------------------------------------------------------ TransVG

ATTRIBUTES = [("r1", ["dog"]), ("r2", ["none"])]
BOX = [10.6, 20.25, 30.5, 40.9]


def save(folder, entries, name="unc_testA.pth", **options):
    torch.save(entries, folder / name, **options)
    return str(folder / name)


@pytest.mark.parametrize("zipped", [False, True])
def test_transvg_lists_of_the_refcoco_family(tmp_path, zipped):
    entries = [("a.jpg", "482.pth", BOX, "the dog ", ATTRIBUTES), ("b.jpg", "9_7.pth", BOX, "cat", ATTRIBUTES)]
    file = save(tmp_path, entries, _use_new_zipfile_serialization=zipped)
    first, second = read_transvg(file, place)
    assert first.key == f"{file}:0"
    assert first.image == first.image_id == "train2014/a.jpg"
    assert first.extra == {
        "phrase": "the dog",
        "box_xyxy": pytest.approx([10.6, 20.25, 41.1, 61.15]),
        "split": "testA",
        "ref_id": "482",
        "sent_id": 0,
    }
    assert (second.extra["ref_id"], second.extra["sent_id"]) == ("9_7", 1)
    assert read_transvg(file, place, whole_pixels=True)[0].extra["box_xyxy"] == [10, 20, 40, 60]
    assert read_transvg(file, place, xywh=False)[0].extra["box_xyxy"] == BOX


@pytest.mark.parametrize(
    ("name", "split", "xywh"),
    [
        ("unc_train.pth", "train", True),
        ("unc+_testB.pth", "testB", True),
        ("gref_val.pth", "val", True),
        ("gref_umd_test.pth", "test", True),
        ("referit_trainval.pth", "trainval", False),
        ("flickr_test.pth", "test", False),
    ],
)
def test_names_say_the_split_and_how_boxes_are_written(tmp_path, name, split, xywh):
    (record,) = read_transvg(save(tmp_path, [("a.jpg", "1.pth", [1, 2, 30, 40], "dog", [])], name), place)
    assert record.extra["split"] == split
    assert record.extra["box_xyxy"] == ([1, 2, 31, 42] if xywh else [1, 2, 30, 40])


def test_other_names(tmp_path):
    entries = [("a.jpg", "1.pth", [1, 2, 30, 40], "dog", [])]
    for name in ("mine.pth", "mine_val.pth"):
        file = save(tmp_path, entries, name)
        with pytest.raises(ValueError, match=rf"the name of .*{name} does not say how .* give xywh"):
            read_transvg(file, place)
        assert read_transvg(file, place, xywh=True)[0].extra["box_xyxy"] == [1, 2, 31, 42]
    assert read_transvg(save(tmp_path, entries, "mine.pth"), place, xywh=True)[0].extra["split"] is None
    assert read_transvg(save(tmp_path, entries, "mine_val.pth"), place, xywh=True)[0].extra["split"] == "val"


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint16"])
def test_flickr_lists_hold_arrays(tmp_path, dtype):
    entries = [("1.jpg", np.array([53, 45, 110, 203], dtype), "man"), ("1.jpg", np.array([1, 1, 2, 2], dtype), "hat")]
    file = save(tmp_path, entries, "flickr_val.pth")
    with ThreadPoolExecutor(8) as pool:  # sources are opened by threads, and torch's list of allowed names is global
        found = list(pool.map(partial(read_transvg, place=place), [file] * 24))
    assert all(records == found[0] for records in found)
    assert [record.extra["ref_id"] for record in found[0]] == [0, 1]
    assert found[0][0].extra["box_xyxy"] == [53, 45, 110, 203]
    assert all(type(number) is float for number in found[0][0].extra["box_xyxy"])


def test_broken_entries_are_kept_with_their_problem(tmp_path):
    good = ("a.jpg", "1.pth", BOX, "dog", [])
    bad = {
        "an entry must have 5 parts": ("a.jpg", "dog"),
        "got 'dogs!'": "dogs!",
        "file name must be a text, got 3": (3, *good[1:]),
        "phrase must be a text, got 5": ("a.jpg", "1.pth", BOX, 5, []),
        "four numbers": ("a.jpg", "1.pth", [1, 2], "dog", []),
        "no area": ("a.jpg", "1.pth", [1, 2, -3, 4], "dog", []),
        "too large": ("a.jpg", "1.pth", [1, 2, 3, 10**400], "dog", []),
    }
    records = read_transvg(save(tmp_path, [good, *bad.values()]), place)
    assert records[0].problem is None
    for record, problem in zip(records[1:], bad, strict=True):
        assert problem in record.problem
        assert record.image is None


def test_malicious_lists_are_refused(tmp_path):
    trace = tmp_path / "trace"
    file = save(tmp_path, [Malicious(os.mkdir, str(trace))])
    with pytest.raises(ValueError, match=r"unc_testA.pth is not one .* it tries to load (posix|nt).mkdir") as caught:
        read_transvg(file, place)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_damaged_lists(tmp_path):
    file = tmp_path / "unc_val.pth"
    for content in (b"", b"nonsense", json.dumps([1]).encode()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or of another kind"):
            read_transvg(str(file), place)
    with pytest.raises(ValueError, match="lists but a dict"):
        read_transvg(save(tmp_path, {"a": 1}), place)
    with pytest.raises(FileNotFoundError, match=r"gref_val.pth does not exist"):
        read_transvg(str(tmp_path / "gref_val.pth"), place)
