import json
from pathlib import Path

import pytest
import torch

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.mapping import (
    Dropped,
    Entry,
    Mapped,
    NameMap,
    Report,
    Tie,
    concatenate,
    convert_tensors,
    linear,
    positions,
    rename,
    row,
    split,
)

FILE = Path("weights.pth")


def test_every_operation() -> None:
    official = {
        "fc.weight": torch.randn(4, 3),
        "fc.bias": torch.randn(4),
        "qkv": torch.randn(6, 2),
        "k": torch.randn(2, 2),
        "v": torch.randn(2, 2),
        "types": torch.randn(2, 5),
        "table": torch.randn(5, 3),
    }
    names = NameMap()
    names.add(
        linear("layer", "fc"),
        split("qkv", ("query", 1), ("key_value", 2)),
        concatenate("both", "k", "v"),
        row("segment", "types", 0, "one segment"),
        positions("positions", "table", 4),
    )
    shapes = {"layer.weight": (4, 3), "layer.bias": (4,), "query": (2, 2), "key_value": (4, 2)}
    shapes |= {"both": (4, 2), "segment": (5,), "positions": (17, 3)}
    state, report = convert_tensors(official, names, shapes, FILE)
    assert torch.equal(state["layer.weight"], official["fc.weight"])
    assert torch.equal(state["query"], official["qkv"][:2])
    assert torch.equal(state["key_value"], official["qkv"][2:])
    assert torch.equal(state["both"], torch.cat([official["k"], official["v"]]))
    assert torch.equal(state["segment"], official["types"][0])
    assert torch.equal(state["positions"][0], official["table"][0])
    grid_1DHW = official["table"][1:].T.reshape(1, 3, 2, 2)
    wanted = torch.nn.functional.interpolate(grid_1DHW, (4, 4), mode="bilinear").flatten(2)[0].T
    torch.testing.assert_close(state["positions"][1:], wanted)

    assert Mapped("both", (4, 2), ("k", "v")) in report.mapped
    assert [entry.name for entry in report.mapped] == list(shapes)
    assert report.dropped == [Dropped("types", (2, 5), "all rows but 0: one segment")]
    assert (report.missing, report.unexpected, report.notes) == ([], [], [])
    assert not {tensor.data_ptr() for tensor in state.values()} & {t.data_ptr() for t in official.values()}


def names_of(*pairs: tuple[str, str]) -> NameMap:
    return NameMap([rename(ours, theirs) for ours, theirs in pairs])


def test_missing_tensors_are_named_with_their_shape_origin_and_remedy() -> None:
    names = names_of(("a.x", "A"), ("head.w", "B"), ("head.b", "C"))
    shapes = {"a.x": (2,), "head.w": (3,), "head.b": (1,)}
    official = {"A": torch.zeros(2)}
    with pytest.raises(CheckpointError) as caught:
        convert_tensors(official, names, shapes, FILE, hint="a file of a friend")
    assert str(caught.value) == (
        "weights.pth: 2 tensors of the model are not in the file: head.w [3], head.b [1] (head.w would come from B). "
        "It looks like a file of a friend. If they may keep their initial values, allow it: --allow-missing 'head.*'"
    )
    with pytest.raises(CheckpointError, match=r"1 tensors.*head\.b \[1\]"):
        convert_tensors(official, names, shapes, FILE, allow_missing=["head.w", "unrelated.*"])
    state, report = convert_tensors(official, names, shapes, FILE, allow_missing=["head.*"])
    assert list(state) == ["a.x"]
    assert report.missing == [Entry("head.w", (3,)), Entry("head.b", (1,))]


def test_half_of_a_concatenation_is_missing_and_unexpected() -> None:
    names = NameMap([concatenate("kv", "k", "v")])
    with pytest.raises(CheckpointError, match=r"no place in the model: k \[1\]"):
        convert_tensors({"k": torch.zeros(1)}, names, {"kv": (2,)}, FILE, allow_missing=["kv"])


def test_unexpected_tensors() -> None:
    official = {"A": torch.zeros(2), "extra.w": torch.zeros(3), "extra.b": torch.zeros(4), "noise": torch.zeros(5)}
    names = names_of(("a", "A"))
    with pytest.raises(CheckpointError, match=r"3 tensors.*extra\.w \[3\].*--allow-unexpected 'extra\.\*' noise"):
        convert_tensors(official, names, {"a": (2,)}, FILE)
    with pytest.raises(CheckpointError, match=r"1 tensors have no place.*noise"):
        convert_tensors(official, names, {"a": (2,)}, FILE, allow_unexpected=["extra.*"])
    _, report = convert_tensors(official, names, {"a": (2,)}, FILE, allow_unexpected=["extra.*", "noi?e"])
    assert report.unexpected == [Entry("extra.w", (3,)), Entry("extra.b", (4,)), Entry("noise", (5,))]
    names.drop("not needed", "extra.*", "noise")
    _, report = convert_tensors(official, names, {"a": (2,)}, FILE)
    assert Dropped("extra.b", (4,), "not needed") in report.dropped


def test_other_shapes_name_both() -> None:
    with pytest.raises(CheckpointError, match=r"a is \[2, 3\] in the file \(A \[2, 3\]\) but \[2, 4\] in the model"):
        convert_tensors({"A": torch.zeros(2, 3)}, names_of(("a", "A")), {"a": (2, 4)}, FILE)
    official = {"k": torch.zeros(2, 3), "v": torch.zeros(2, 4)}
    with pytest.raises(CheckpointError, match=r"cannot make kv from k \[2, 3\], v \[2, 4\]"):
        convert_tensors(official, NameMap([concatenate("kv", "k", "v")]), {"kv": (4, 3)}, FILE)
    halves = NameMap([split("qkv", ("q", 1), ("kv", 2))])
    with pytest.raises(CheckpointError, match="cannot make q from qkv"):
        convert_tensors({"qkv": torch.zeros(7, 2)}, halves, {"q": (2, 2), "kv": (4, 2)}, FILE)


def test_ties_are_verified() -> None:
    names = names_of(("a", "A"))
    names.ties.append(Tie("copy", "A"))
    official = {"A": torch.ones(2), "copy": torch.ones(2)}
    _, report = convert_tensors(official, names, {"a": (2,)}, FILE)
    assert report.dropped == [Dropped("copy", (2,), "tied, verified equal to its original")]
    official["copy"][1] += 1e-6
    with pytest.raises(CheckpointError, match="copy should be the same tensor as A but differs"):
        convert_tensors(official, names, {"a": (2,)}, FILE)
    with pytest.raises(CheckpointError, match="no place in the model: copy"):
        convert_tensors({"copy": torch.ones(2)}, names, {"a": (2,)}, FILE, allow_missing=["a"])


def test_types() -> None:
    state, report = convert_tensors({"A": torch.ones(2).half()}, names_of(("a", "A")), {"a": (2,)}, FILE)
    assert state["a"].dtype == torch.float32
    assert report.notes == ["float16 cast to float32"]
    with pytest.raises(CheckpointError, match=r"A holds torch\.int64"):
        convert_tensors({"A": torch.ones(2).long()}, names_of(("a", "A")), {"a": (2,)}, FILE)


def test_report_reads_well() -> None:
    report = Report(
        [Mapped("a", (2,), ("A",))],
        [Dropped(f"x{i}", (1,), "unused") for i in range(6)] + [Dropped("y", (1,), "a constant")],
        [Entry("b", (3, 4))],
        [Entry("C", (5,))],
        ["stride 3"],
    )
    assert str(report).splitlines() == [
        "1 tensors mapped",
        "7 dropped on purpose:",
        "  a constant: y",
        "  unused: x0, x1, x2, x3 and 2 more",
        "1 missing, left at their initial values:",
        "  b [3, 4]",
        "1 unexpected, ignored:",
        "  C [5]",
        "note: stride 3",
    ]
    values = json.loads(report.to_json())
    assert values["mapped"] == [{"name": "a", "shape": [2], "sources": ["A"]}]
    assert len(values["dropped"]) == 7
