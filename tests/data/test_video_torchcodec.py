"""torchcodec in place of PyAV: the real one where it is installed, and one that is made up here."""

import random
import sys
from fractions import Fraction
from io import BytesIO
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from triptych.data import video
from triptych.data.pictures import show
from triptych.data.samples import BrokenSample, Record
from triptych.data.transforms import FrameChoice, Preprocessing
from triptych.data.video import read_frames

av = pytest.importorskip("av", reason="reading videos needs PyAV")

STEP = 6
"""The number of a frame times this is its grey."""
WANTED = [2, 7, 12, 17, 22, 27, 32, 37]
"""8 frames of 40."""


class FakeDecoder:
    """VideoDecoder's interface over PyAV. Frames of `later` are given in place of others, as torchcodec does."""

    opened = 0
    later: ClassVar[dict[int, int]] = {}

    def __init__(self, source, *, stream_index, dimension_order, num_ffmpeg_threads, device):
        assert (dimension_order, num_ffmpeg_threads, device) == ("NHWC", 1, "cpu")
        FakeDecoder.opened += 1
        self.frames = {}
        with av.open(source) as container:
            self.time_base = container.streams[stream_index].time_base
            for packet in container.demux(container.streams[stream_index]):
                try:
                    for frame in packet.decode():
                        self.frames[frame.pts] = frame
                except av.FFmpegError:
                    self.frames[packet.pts] = None
        self.frames = [self.frames[time] for time in sorted(self.frames)]

    def get_frame_at(self, index):
        frame = self.frames[self.later.get(index, index)]
        if frame is None:
            raise RuntimeError("Could not push packet to decoder")
        pixels_HWC = np.rot90(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"), frame.rotation // 90)
        seconds = float(frame.pts * self.time_base)
        return SimpleNamespace(data=torch.from_numpy(pixels_HWC.copy()), pts_seconds=seconds)


def fake(monkeypatch, decoder, version=8):
    module = ModuleType("torchcodec")
    module.ffmpeg_major_version = version
    module.decoders = SimpleNamespace(VideoDecoder=decoder)
    monkeypatch.setitem(sys.modules, "torchcodec", module)


@pytest.fixture
def later(monkeypatch):
    """A made-up torchcodec, and which frames it gives in place of others."""
    monkeypatch.setattr(FakeDecoder, "opened", 0)
    monkeypatch.setattr(FakeDecoder, "later", {})
    fake(monkeypatch, FakeDecoder)
    return FakeDecoder.later


@pytest.fixture(params=["fake", "real"])
def torchcodec(request):
    if request.param == "fake":
        request.getfixturevalue("later")
        return
    try:
        video.import_torchcodec()
    except ImportError:
        pytest.skip("torchcodec or its FFmpeg is not installed")


def clip(codec="png", format="mov", length=40, size=(64, 32), turn=None):
    """Frames of one grey each, black on the left."""
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"PyAV has no encoder {codec}")
    file = BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        stream.gop_size = 12
        stream.codec_context.max_b_frames = 0 if codec == "png" else 2
        stream.options = {"q": "3", "crf": "20"}
        if turn is not None:
            stream.set_display_rotation(turn)
        for number in range(length):
            pixels_HWC = np.full((size[1], size[0], 3), STEP * number, np.uint8)
            pixels_HWC[:, : size[0] // 2] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def destroy(encoded, which):
    """The clip with some of its packets overwritten."""
    damaged = bytearray(encoded)
    with av.open(BytesIO(encoded)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for number in which:
        start, size = places[number]
        damaged[start : start + min(size, 40)] = bytes(min(size, 40))
    return bytes(damaged)


def numbers(frames):
    return [round(np.asarray(frame)[:, frame.width * 3 // 4].mean() / STEP) for frame in frames]


def read(encoded, count=8, key="k", **options):
    return read_frames(encoded, count, key, decoder="torchcodec", **options)


def alike(first, second):
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


# --- the same pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mov", "png"), ("mp4", "mpeg4"), ("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9")],
)
@pytest.mark.usefixtures("torchcodec")
def test_the_same_pictures_as_with_pyav(format, codec):
    encoded = clip(codec, format)
    for count, rule in ((8, "uniform"), (16, "official"), (60, "uniform")):
        frames = read(encoded, count, rule=rule)
        assert alike(frames, read_frames(encoded, count, "k", rule))
        assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 32))}


@pytest.mark.parametrize(("format", "codec"), [("avi", "mpeg4"), ("mpegts", "libx264"), ("mpeg", "mpeg2video")])
@pytest.mark.usefixtures("torchcodec")
def test_where_frames_have_no_times_pyav_decodes(format, codec):
    encoded = clip(codec, format)
    assert alike(read(encoded), read_frames(encoded, 8, "k"))


def test_only_where_frames_have_times_torchcodec_decodes(later):
    for format, opened in (("avi", 0), ("mp4", 1), ("mpegts", 1), ("matroska", 2)):
        read(clip("mpeg4", format))
        assert FakeDecoder.opened == opened
    read_frames(clip("mpeg4", "mp4"), 8, "k")
    assert FakeDecoder.opened == 2


@pytest.mark.parametrize("turn", [90, 180, -90])
@pytest.mark.usefixtures("torchcodec")
def test_frames_are_upright(turn):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotations")
    encoded = clip("mpeg4", "mp4", 6, turn=turn)
    frames = read(encoded, 6)
    assert alike(frames, read_frames(encoded, 6, "k"))
    assert frames[0].size == ((64, 32) if turn == 180 else (32, 64))


@pytest.mark.usefixtures("torchcodec")
def test_large_frames_are_scaled_down():
    encoded = clip(size=(320, 160))
    for shorter_side, size in ((None, (320, 160)), (512, (320, 160)), (40, (80, 40))):
        frames = read(encoded, shorter_side=shorter_side)
        assert [frame.size for frame in frames] == [size] * 8
        assert numbers(frames) == WANTED


def test_records_are_shown_by_the_decoder_that_was_chosen(later):
    record = Record("clip", None, (), "clip", {"video": clip()})
    transform = Preprocessing(16).test_transform()
    expected, chosen = (show(record, transform, FrameChoice(8, decoder=name)) for name in ("pyav", "torchcodec"))
    assert FakeDecoder.opened == 1
    assert torch.equal(chosen, expected)


# --- damaged files ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("torchcodec")
def test_a_wanted_frame_that_does_not_decode_is_replaced_by_the_next_or_the_last():
    encoded = clip()
    assert numbers(read(encoded)) == WANTED
    assert numbers(read(destroy(encoded, [7, 17, 18]))) == [2, 12, 12, 22, 22, 27, 32, 37]
    assert numbers(read(destroy(encoded, [2, 3, 32, 37]))) == [7, 7, 12, 17, 22, 27, 27, 27]


@pytest.mark.usefixtures("torchcodec")
def test_at_least_half_of_the_wanted_frames_must_decode():
    encoded = clip()
    assert numbers(read(destroy(encoded, WANTED[:4]))) == [22] * 5 + WANTED[5:]
    with pytest.raises(BrokenSample, match=r"^list:3: only 3 of 8 wanted frames can be decoded$"):
        read(destroy(encoded, WANTED[:5]), key="list:3")
    with pytest.raises(BrokenSample, match=r"^k: no frame of the video can be decoded$"):
        read(destroy(encoded, range(40)))


def test_a_later_frame_in_place_of_a_lost_one_does_not_count_as_found(later):
    later.update({2: 3, 7: 8, 12: 13, 17: 19})
    assert numbers(read(clip())) == [3, 8, 13, 19, *WANTED[4:]]
    later[22] = 23
    with pytest.raises(BrokenSample, match="only 3 of 8 wanted frames can be decoded"):
        read(clip())


def test_one_later_frame_in_place_of_several(later):
    later.update(dict.fromkeys([7, 12, 17], 17))
    assert numbers(read(clip())) == [2, 17, 17, *WANTED[3:]]


def test_frames_of_an_earlier_time_are_not_taken(later):
    later.update({37: 36})
    assert numbers(read(clip())) == [*WANTED[:-1], 36]  # the last of all that decode
    later.update({7: 5})
    assert numbers(read(clip())) == [2, 12, *WANTED[2:-1], 36]


@pytest.mark.usefixtures("torchcodec")
def test_absurd_sizes_are_refused(monkeypatch):
    small = clip()
    large = clip(size=(320, 160))
    monkeypatch.setattr(video, "MAX_PIXELS", 40_000)
    with pytest.raises(BrokenSample, match="320 x 160 pixels are more than 40,000"):
        read(large)
    file = BytesIO()
    with av.open(file, "w", format="mov") as target:
        copy, time = None, 0
        for encoded in (small, large):
            with av.open(BytesIO(encoded)) as source:
                copy = copy or target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = time
                        packet.time_base = Fraction(1, 1000)
                        packet.stream = copy
                        target.mux(packet)
                        time += 40
    frames = read(file.getvalue())
    assert {frame.size for frame in frames} == {(64, 32)}
    assert numbers(frames) == [5, 15, 25, 35, 35, 35, 35, 35]


@pytest.mark.parametrize(("format", "codec"), [("mp4", "libx264"), ("matroska", "mpeg4")])
@pytest.mark.usefixtures("torchcodec")
def test_random_damage_gives_pictures_or_a_broken_sample(format, codec):
    whole = clip(codec, format)
    outcomes = set()
    for seed in range(30):
        draw = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 10, 100])):
            start = draw.randrange(len(damaged))
            damaged[start : start + 4] = draw.randbytes(4)
        try:
            outcomes.add(len(read(bytes(damaged))))
        except BrokenSample:
            outcomes.add(None)
    assert outcomes == {8, None}


class Unsteady(BytesIO):
    """A remote file whose connection may break."""

    broken = False

    def read(self, size=-1):
        if self.broken:
            raise OSError("connection lost")
        return super().read(size)


@pytest.mark.usefixtures("torchcodec")
def test_a_connection_that_breaks(monkeypatch):
    file = Unsteady(clip("libx264", "mp4"))
    monkeypatch.setattr(video, "_open_file", lambda location: file)
    by_torchcodec = video._by_torchcodec

    def breaking(*arguments):
        file.broken = True
        return by_torchcodec(*arguments)

    monkeypatch.setattr(video, "_by_torchcodec", breaking)
    with pytest.raises(BrokenSample, match=r"^k: cannot read the video: connection lost$"):
        read("memory://a.mp4")
    assert file.closed


@pytest.mark.parametrize("error", [RuntimeError("SingleStreamDecoder.cpp:70,\nFailed"), ValueError("No stream 0.\n")])
def test_what_torchcodec_cannot_open(error, monkeypatch):
    def refuse(*arguments, **options):
        raise error

    fake(monkeypatch, refuse)
    with pytest.raises(BrokenSample, match=r"^k: torchcodec cannot open the video$"):
        read(clip())


# --- what must be installed ---------------------------------------------------------------------------------

NEEDS = r"triptych-vl\[torchcodec\].*FFmpeg 4 to 8"


def test_without_torchcodec(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(ImportError, match=NEEDS):
        read(clip())
    with pytest.raises(ImportError, match=NEEDS):
        read(b"no video: what is missing is said first")
    assert numbers(read_frames(clip(), 8, "k")) == WANTED


def test_without_ffmpeg(monkeypatch, tmp_path):
    fake(monkeypatch, FakeDecoder, version=None)
    with pytest.raises(ImportError, match=NEEDS):
        read(clip())
    monkeypatch.delitem(sys.modules, "torchcodec")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchcodec.py").write_text("raise RuntimeError('Could not load libtorchcodec')\n")
    with pytest.raises(ImportError, match=NEEDS):
        read(clip())


def test_unknown_decoders():
    with pytest.raises(ValueError, match="unknown decoder 'decord'; there are pyav, torchcodec") as error:
        read_frames(b"", 4, "k", decoder="decord")
    assert not isinstance(error.value, BrokenSample)
    with pytest.raises(ValueError, match="decoded by pyav or torchcodec, not 'decord'"):
        FrameChoice(decoder="decord")


def test_the_decoder_is_kept_with_the_model():
    pixels = Preprocessing(16, frames=FrameChoice(3, decoder="torchcodec"))
    assert Preprocessing.from_dict(pixels.to_dict()) == pixels
    older = pixels.to_dict() | {"frames": {"count": 3, "rule": "official"}}
    assert Preprocessing.from_dict(older).frames == FrameChoice(3, "official", "pyav")


# --- real clips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flipping_a_pancake.mkv", "j2Dhf-xFUxU_13_20.avi"])
@pytest.mark.usefixtures("torchcodec")
def test_real_clips(shared, name):
    path = str(shared / "data" / "video" / name)
    assert alike(read(path, 16, shorter_side=None), read_frames(path, 16, "k", shorter_side=None))


@pytest.mark.usefixtures("torchcodec")
def test_a_real_damaged_clip(shared):
    frames = read(str(shared / "data" / "video" / "corrupted.mp4"))
    assert {frame.size for frame in frames} == {(910, 512)}
    assert len(frames) == 8
