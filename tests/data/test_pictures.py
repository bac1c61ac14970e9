"""What a record shows: a picture, several, or the frames of a video."""

from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from triptych.data.pictures import alike, file_record, is_video, read_pictures, show, stack
from triptych.data.samples import BrokenSample, Record
from triptych.data.sources import open_source
from triptych.data.transforms import FrameChoice, Preprocessing

PIXELS = Preprocessing(16, frames=FrameChoice(3))
PLAIN = PIXELS.test_transform()


def picture(colour: tuple[int, int, int]) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (20, 16), colour).save(buffer, "png")
    return buffer.getvalue()


def video(path: Path, count: int = 6) -> str:
    """Frame number n is grey of 40 n."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10, width=16, height=16, pix_fmt="yuv444p")
        for number in range(count):
            frame = av.VideoFrame.from_image(Image.new("RGB", (16, 16), (40 * number,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


RED = Record("red", picture((255, 0, 0)), (), "red")
PAIR = Record("pair", None, (), "pair", {"images": [picture((255, 0, 0)), picture((0, 0, 255))]})


def test_a_picture() -> None:
    pixels_CHW = show(RED, PLAIN, FrameChoice())
    assert pixels_CHW.shape == (3, 16, 16)
    assert pixels_CHW[:, 0, 0].tolist() == [255, 0, 0]


def test_several_pictures_follow_one_another() -> None:
    pixels_FCHW = show(PAIR, PLAIN, FrameChoice())
    assert pixels_FCHW[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_several_pictures_are_augmented_each_by_itself() -> None:
    noisy = v2.Compose([PLAIN, v2.Lambda(lambda pixels: torch.randint_like(pixels, 256))])
    first, second = show(PAIR, noisy, FrameChoice())
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("choice", "shown"), [(FrameChoice(3), [1, 3, 5]), (FrameChoice(2, "official"), [0, 3])])
def test_a_video_shows_the_frames_that_were_chosen(tmp_path: Path, choice: FrameChoice, shown: list[int]) -> None:
    record = Record("clip", None, (), "clip", {"video": video(tmp_path / "clip.mkv")})
    pixels_FCHW = show(record, PLAIN, choice)
    assert [round(value / 40) for value in pixels_FCHW[:, 0, 0, 0].tolist()] == shown


def test_frames_of_a_video_are_augmented_alike(tmp_path: Path) -> None:
    record = Record("clip", None, (), "clip", {"video": video(tmp_path / "clip.mkv")})
    noisy = v2.Compose([PLAIN, v2.Lambda(lambda pixels: torch.randint_like(pixels, 256))])
    pixels_FCHW = show(record, noisy, FrameChoice(3))
    assert torch.equal(pixels_FCHW[0], pixels_FCHW[2])


@pytest.mark.parametrize(
    "record",
    [
        replace(RED, problem="no such field"),
        replace(RED, image=None),
        replace(PAIR, extra={"images": [picture((0, 0, 0)), "nowhere.png"]}),
        Record("clip", None, (), "clip", {"video": "nowhere.mp4"}),
    ],
)
def test_what_cannot_be_shown_is_a_broken_sample(record: Record) -> None:
    with pytest.raises(BrokenSample, match=record.key):
        show(record, PLAIN, FrameChoice())


def test_pictures_and_clips_do_not_mix_in_a_batch() -> None:
    with pytest.raises(ValueError, match="unlike"):
        stack([torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 4)])


def test_videos_are_told_by_their_names() -> None:
    for name in ("a.mp4", "b.MKV", "c.d.webm", "e.avi", "f.Mov"):
        assert is_video(Path("folder") / name), name
    for name in ("a.png", "mp4", "a.mp4.jpg", "mkv.tar", ".mp4", "a.gif"):
        assert not is_video(Path("folder") / name), name


def test_records_of_files(tmp_path: Path) -> None:
    (tmp_path / "red.PNG").write_bytes(picture((255, 0, 0)))
    still = file_record(tmp_path / "red.PNG", extra={"questions": []})
    assert still == Record(*(str(tmp_path / "red.PNG"),) * 2, (), str(tmp_path / "red.PNG"), {"questions": []})
    assert show(still, PLAIN, FrameChoice()).shape == (3, 16, 16)
    assert file_record(tmp_path / "red.PNG").extra == {}
    moving = file_record(Path(video(tmp_path / "clip.mkv")), extra={"questions": [], "video": "of someone else"})
    assert moving.image is None
    assert moving.extra == {"questions": [], "video": str(tmp_path / "clip.mkv")}
    assert moving.key == moving.image_id == str(tmp_path / "clip.mkv")
    assert show(moving, PLAIN, FrameChoice(2)).shape == (2, 3, 16, 16)


def test_extra_of_the_caller_stays_as_it_is() -> None:
    extra = {"questions": ["?"]}
    assert "video" in file_record(Path("a.mp4"), extra=extra).extra
    assert extra == {"questions": ["?"]}


def test_like_files_by_hand() -> None:
    paths = [Path(name) for name in ("1.png", "2.jpg", "3.png", "a.mp4", "4.png", "b.mkv", "c.mov")]
    groups = [tuple(path.stem for path in group) for group in alike(paths, at_once=2)]
    assert groups == [("1", "2"), ("3",), ("a",), ("4",), ("b", "c")]
    assert list(alike([])) == []


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_like_files_are_grouped_in_their_order(videos: list[bool], at_once: int) -> None:
    paths = [Path(f"{number}.{'mp4' if own else 'png'}") for number, own in enumerate(videos)]
    groups = list(alike(iter(paths), at_once=at_once))
    assert [path for group in groups for path in group] == paths
    for group in groups:
        assert 1 <= len(group) <= at_once
        assert len({is_video(path) for path in group}) == 1
    for first, second in pairwise(groups):  # none is shorter than it must be
        assert len(first) == at_once or is_video(first[-1]) != is_video(second[0])


def test_a_damaged_video_is_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    video(tmp_path / "good.mkv")
    (tmp_path / "bad.mkv").write_bytes(b"no video")
    rows = [{"video": f"{name}.mkv", "captions": ["it fades"]} for name in ("good", "bad", "good")]
    listed = tmp_path / "clips.jsonl"
    listed.write_text("".join(f"{str(row).replace(chr(39), chr(34))}\n" for row in rows))
    source = open_source((str(listed),))
    batches = list(read_pictures(source, PIXELS))
    assert [pixels.shape for _, pixels in batches] == [(2, 3, 3, 16, 16)]
    assert all(record.captions == ("it fades",) for records, _ in batches for record in records)


@pytest.mark.parametrize(("count", "rule"), [(0, "uniform"), (4, "random")])
def test_frames_out_of_range(count: int, rule: str) -> None:
    with pytest.raises(ValueError, match="frames need"):
        FrameChoice(count, rule)


def test_the_choice_of_frames_is_kept_with_the_model() -> None:
    assert Preprocessing.from_dict(PIXELS.to_dict()) == PIXELS
    older = {name: value for name, value in PIXELS.to_dict().items() if name != "frames"}
    assert Preprocessing.from_dict(older).frames == FrameChoice()
