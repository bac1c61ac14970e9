"""Records that have one item of a task, or a list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from triptych.data.fields import Row, as_object, listed
from triptych.data.samples import BrokenSample, Record

Item = TypeVar("Item")


def read_nested(record: Record, many: str, one: str, read: Callable[[int, Row], Item]) -> list[Item]:
    """What ``read`` makes of each object of the record's list ``many``, or of the record itself if it has ``one``.

    Args:
        read: takes the item's number, from 0 on, and its fields; raises ValueError where they are wrong.

    Returns:
        No items where the record has neither.

    Raises:
        BrokenSample: naming the place in the list and the field.
    """
    place = ""
    try:
        if record.extra.get(many) is None:
            return [read(0, record.extra)] if record.extra.get(one) is not None else []
        found = []
        for number, row in enumerate(listed(record.extra, many)):
            place = f"{many}[{number}]: "
            found.append(read(number, as_object(row)))
        return found
    except ValueError as error:
        raise BrokenSample(record.key, f"{place}{error}") from error
