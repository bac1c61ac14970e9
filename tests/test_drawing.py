"""Boxes drawn on pictures."""

import numpy as np
import pytest
from PIL import Image

from triptych.drawing import draw_box

RED = (255, 60, 60)


def reds(image: Image.Image) -> np.ndarray:
    """Where the picture has the colour of the frame, [H, W]."""
    return (np.asarray(image) == RED).all(-1)


def test_the_frame_is_the_box_and_the_rest_stays() -> None:
    picture = Image.new("RGB", (120, 100), (0, 0, 90))
    drawn = draw_box(picture, (30, 50, 80, 90.4), "a dog")
    assert drawn.size == picture.size
    assert set(np.asarray(picture).reshape(-1, 3)[:, 0]) == {0}  # what was given is not changed
    red_HW = reds(drawn)
    assert red_HW[50, 30:81].all()
    assert red_HW[90, 30:81].all()
    assert red_HW[50:91, 30].all()
    assert red_HW[50:91, 80].all()
    assert not red_HW[52:89, 32:79].any()
    assert red_HW[:50, 30:60].any()  # the phrase, above
    changed_HW = (np.asarray(drawn) != np.asarray(picture)).any(-1)
    assert not changed_HW[92:].any()
    assert not changed_HW[:, :30].any()


def test_the_phrase_goes_where_there_is_room() -> None:
    picture = Image.new("RGB", (120, 100))
    below = draw_box(picture, (30, 1, 80, 90), "a dog")
    assert reds(below)[2:8, 32:50].any()
    at_the_edge = draw_box(picture, (115, 50, 119, 90), "a dog")
    assert reds(at_the_edge)[:49, :110].any()


def test_a_long_phrase_is_cut() -> None:
    picture = Image.new("RGB", (60, 60))
    long = draw_box(picture, (10, 30, 50, 50), "the one who has been standing there for a long time")
    assert long.size == (60, 60)
    assert np.array_equal(
        np.asarray(long), np.asarray(draw_box(picture, (10, 30, 50, 50), "the one who has been stan"))
    )


def test_what_can_be_drawn() -> None:
    for picture in (Image.new("RGB", (1, 1)), Image.new("L", (30, 20))):
        assert draw_box(picture, (0, 0, 1, 1), "犬 \n x").mode == "RGB"
    draw_box(Image.new("RGB", (20, 20)), (5, 5, 5, 5), "")
    draw_box(Image.new("RGB", (20, 20)), (-50, -50, 500, 500), "all")


@pytest.mark.parametrize("box", [(0, 0, 1), (0, 0, float("nan"), 1)])
def test_what_is_no_box(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="four finite numbers"):
        draw_box(Image.new("RGB", (20, 20)), box, "x")


def test_exchanged_corners() -> None:
    with pytest.raises(ValueError, match=r"\[9, 0, 1, 5\] has its corners exchanged"):
        draw_box(Image.new("RGB", (20, 20)), (9, 0, 1, 5), "x")
