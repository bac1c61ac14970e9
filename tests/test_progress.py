"""Counting batches while they pass."""

from collections.abc import Iterator

import pytest

from triptych import progress
from triptych.progress import counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What was shown: the start of each bar, its steps, and its end."""
    seen: list[tuple[object, ...]] = []

    class Bar:
        def __init__(self, *columns: object, console: object) -> None:
            pass

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            seen.append(("end",))

        def add_task(self, label: str, *, total: int | None) -> int:
            seen.append(("start", label, total))
            return 0

        def advance(self, task: int, count: int) -> None:
            seen.append(("step", count))

    monkeypatch.setattr(progress, "Progress", Bar)
    return seen


def test_batches_pass_as_they_are_and_are_counted_when_done(calls: list[tuple[object, ...]]) -> None:
    given = [["a", "b"], ["c"], ["d", "e", "f"]]
    passed = []
    for batch in counted(iter(given), "reading", 6, len):
        steps = [call for call in calls if call[0] == "step"]
        assert len(steps) == len(passed)  # a batch counts when the next one is asked for
        passed.append(batch)
    assert all(own is other for own, other in zip(passed, given, strict=True))
    assert calls == [("start", "reading", 6), ("step", 2), ("step", 1), ("step", 3), ("end",)]


def test_nothing_is_read_before_it_is_wanted(calls: list[tuple[object, ...]]) -> None:
    def batches() -> Iterator[str]:
        raise AssertionError("too early")
        yield ""

    counted(batches(), "reading", 3, len)
    assert calls == []


def test_the_bar_ends_when_no_more_is_wanted_or_reading_fails(calls: list[tuple[object, ...]]) -> None:
    passing = counted(iter(["ab", "c"]), "reading", None, len)
    assert next(passing) == "ab"
    passing.close()  # type: ignore[attr-defined]
    assert calls == [("start", "reading", None), ("end",)]
    calls.clear()

    def broken() -> Iterator[str]:
        yield "ab"
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        list(counted(broken(), "reading", None, len))
    assert calls == [("start", "reading", None), ("step", 2), ("end",)]


@pytest.mark.parametrize(("total", "shown"), [(5, "5/5 "), (None, "5/? ")])
def test_what_is_shown(total: int | None, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(["ab", "cde"], "matching", total, len, unit="pairs")) == ["ab", "cde"]
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("matching", shown, "pairs/s"):
        assert text in err


def test_no_batches_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted([], "matching", None, len)) == []
    assert "0/?" in capsys.readouterr().err
