"""Clips are made here with PyAV; each frame shows its own number in black and white blocks."""

import random
import sys
import tarfile
from fractions import Fraction
from functools import partial
from io import BytesIO
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from triptych.data import video
from triptych.data.samples import BrokenSample
from triptych.data.transforms import Preprocessing
from triptych.data.video import frame_indices, read_frames, transform_clip

av = pytest.importorskip("av", reason="reading videos needs PyAV")

BITS, BLOCK, HEIGHT = 10, 16, 32
WIDTH = BITS * BLOCK
INTRA = "png"
"""A codec of whole pictures without loss, whose damaged packets are always noticed."""
COVER = av.stream.Disposition.attached_pic
"""The picture on the cover of a record, which is no video."""


def picture(number):
    bits = [number >> bit & 1 for bit in range(BITS)]
    row_WC = np.repeat(np.array(bits, np.uint8) * 255, BLOCK)[:, None].repeat(3, axis=1)
    return np.broadcast_to(row_WC, (HEIGHT, WIDTH, 3)).copy()


def numbers(frames):
    """What the frames show."""
    found = []
    for frame in frames:
        grey_HW = np.asarray(frame.resize((WIDTH, HEIGHT)).convert("L"))
        bits = grey_HW[HEIGHT // 4, BLOCK // 2 :: BLOCK] > 127
        found.append(sum(int(bit) << place for place, bit in enumerate(bits)))
    return found


def clip(
    length=40, codec="mpeg4", format="mp4", gop=12, times=None, size=(WIDTH, HEIGHT), turn=None, b_frames=2, **options
):
    """The encoded clip; `times` are in milliseconds."""
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"PyAV has no encoder {codec}")
    file = BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = {"png": "rgb24", "gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if codec not in ("png", "gif", "mjpeg"):
            stream.gop_size = gop
            stream.codec_context.max_b_frames = b_frames
        stream.options = {"q": "3", "crf": "20", **options}
        if turn is not None:
            stream.set_display_rotation(turn)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(length):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(*size)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def remux(encoded, format, change=lambda packet, number: None, disposition=None):
    """The same packets in another container, each after `change`."""
    file = BytesIO()
    with av.open(BytesIO(encoded)) as source, av.open(file, "w", format=format) as target:
        copy = target.add_stream_from_template(source.streams[0])
        if disposition is not None:
            copy.disposition = disposition.value
        for number, packet in enumerate(source.demux()):
            if packet.size:
                change(packet, number)
                packet.stream = copy
                target.mux(packet)
    return file.getvalue()


def packets(encoded):
    """Place and size of each packet in the file."""
    with av.open(BytesIO(encoded)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def up_to(encoded, number):
    """The file cut off before one of its packets."""
    return encoded[: packets(encoded)[number][0]]


def destroy(encoded, which):
    """The clip with some of its packets overwritten."""
    damaged = bytearray(encoded)
    places = packets(encoded)
    for number in which:
        start, size = places[number]
        damaged[start : start + min(size, 40)] = bytes(min(size, 40))
    return bytes(damaged)


@pytest.fixture
def decoded(monkeypatch):
    """Numbers of the frames that were decoded, jump by jump."""
    runs = []
    decode = video._Video.decode

    def watch(self, packets):
        runs.append(0)
        for frame in decode(self, packets):
            runs[-1] += 1
            yield frame

    monkeypatch.setattr(video._Video, "decode", watch)
    return runs


def without_jumps(monkeypatch):
    def lost(self, keyframe):
        raise video._LostError

    monkeypatch.setattr(video._Video, "_packets_from", lost)


# --- which frames -------------------------------------------------------------------------------------------

LENGTHS, COUNTS = st.integers(1, 100_000), st.integers(1, 64)


@given(LENGTHS, COUNTS)
def test_uniform_frames_are_spread_over_the_clip(length, count):
    indices = frame_indices(length, count)
    assert len(indices) == count
    assert indices[0] >= 0
    assert indices[-1] < length
    steps = np.diff(indices)
    assert ((steps >= length // count) & (steps <= -(-length // count))).all()
    assert (len(set(indices)) == count) == (length >= count)
    assert abs(indices[0] - (length - 1 - indices[-1])) <= 1


@given(LENGTHS, COUNTS)
def test_official_frames_are_those_of_arange(length, count):
    assert frame_indices(length, count, "official") == np.arange(0, length, length / count, dtype=int)[:count].tolist()


def test_examples_of_the_rules():
    assert frame_indices(10, 2) == [2, 7]
    assert frame_indices(3, 6) == [0, 0, 1, 1, 2, 2]
    assert frame_indices(299, 16, "official")[-1] == 270
    assert frame_indices(5, 8, "official") == [0] * 8


def test_wrong_arguments():
    for length, count in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            frame_indices(length, count)
    with pytest.raises(ValueError, match="unknown rule 'random'; there are uniform, official"):
        read_frames(b"", 4, "k", "random")
    with pytest.raises(ValueError, match="shorter_side") as error:
        read_frames(b"", 4, "k", shorter_side=0)
    assert not isinstance(error.value, BrokenSample)


# --- the right frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "codec", "gop"),
    [
        ("mp4", "mpeg4", 1),
        ("mp4", "mpeg4", 12),
        ("mp4", "libx264", 5),
        ("mp4", "libx264", 100),
        ("matroska", "libx264", 12),
        ("matroska", "mjpeg", 1),
        ("webm", "libvpx", 12),
        ("webm", "libvpx-vp9", 12),
        ("avi", "mpeg4", 12),
        ("avi", "libx264", 12),
        ("mpegts", "libx264", 12),
        ("mpeg", "mpeg2video", 12),
        ("gif", "gif", 1),
    ],
)
def test_the_right_frames_of_each_format(format, codec, gop):
    encoded = clip(90, codec, format, gop)
    for count, rule in ((1, "uniform"), (7, "uniform"), (16, "official"), (90, "uniform")):
        frames = read_frames(encoded, count, "k", rule)
        assert numbers(frames) == frame_indices(90, count, rule)
        assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (WIDTH, HEIGHT))}


def test_open_groups_of_pictures():
    """Frames before a key frame that need it and the group before it."""
    encoded = clip(120, "libx264", "matroska", 20, **{"x264-params": "open-gop=1:bframes=3:scenecut=0"})
    for count in (3, 6, 11):
        assert numbers(read_frames(encoded, count, "k")) == frame_indices(120, count)


def test_colours_without_loss():
    frames = read_frames(clip(3, INTRA, "mov"), 3, "k")
    assert all(np.array_equal(np.asarray(frame), picture(number)) for number, frame in enumerate(frames))


def test_a_clip_with_fewer_frames_than_wanted():
    assert numbers(read_frames(clip(3), 7, "k")) == frame_indices(3, 7)
    assert numbers(read_frames(clip(3), 7, "k", "official")) == [0] * 7
    assert numbers(read_frames(clip(1), 4, "k")) == [0] * 4


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_long_clips_are_entered_at_key_frames(format, decoded, monkeypatch):
    encoded = clip(700, "mpeg4", format, 20)
    jumped = read_frames(encoded, 8, "k")
    assert numbers(jumped) == frame_indices(700, 8)
    assert len(decoded) == 8
    assert sum(decoded) < 8 * 25
    decoded.clear()
    without_jumps(monkeypatch)
    from_the_beginning = read_frames(encoded, 8, "k")
    assert len(decoded) == 1
    assert decoded[0] > 600
    assert all(np.array_equal(*pair) for pair in zip(jumped, from_the_beginning, strict=True))


class Stub:
    """A container of which some methods are others."""

    def __init__(self, container, methods):
        self.container = container
        self.methods = methods

    def __getattr__(self, name):
        if name in self.methods:
            return partial(self.methods[name], self.container)
        return getattr(self.container, name)


def replace_methods(monkeypatch, **methods):
    right = video._Video
    monkeypatch.setattr(video, "_Video", lambda container, stream: right(Stub(container, methods), stream))


@pytest.mark.parametrize(("seconds", "any_frame"), [(4, False), (-0.2, True)])
def test_jumps_that_lead_astray_are_noticed(seconds, any_frame, decoded, monkeypatch):
    def seek(container, time, stream):
        container.seek(time + round(seconds / stream.time_base), stream=stream, any_frame=any_frame)

    replace_methods(monkeypatch, seek=seek)
    assert numbers(read_frames(clip(300), 4, "k")) == frame_indices(300, 4)
    assert max(decoded) > 250


def test_jumps_that_save_little_are_not_made(decoded):
    assert numbers(read_frames(clip(60, gop=5), 12, "k")) == frame_indices(60, 12)
    assert len(decoded) == 1


def test_decoding_ends_with_the_last_wanted_frame(decoded):
    read_frames(clip(90, "mpeg4", "avi"), 2, "k", "official")
    assert sum(decoded) < 60


def test_equal_times_are_not_trusted():
    def round_down(packet, number):
        packet.pts = packet.dts = packet.pts // 80 * 80  # milliseconds; each frame is shown for 40

    encoded = remux(clip(90, "mpeg4", "matroska", b_frames=0), "matroska", round_down)
    assert numbers(read_frames(encoded, 9, "k")) == frame_indices(90, 9)


def test_variable_frame_rate_counts_frames_not_time():
    times = np.cumsum([1 if number % 10 else 2000 for number in range(90)]).tolist()
    encoded = clip(90, "libx264", "matroska", 12, times=times)
    assert numbers(read_frames(encoded, 9, "k")) == frame_indices(90, 9)


def test_frames_before_the_beginning_of_an_edited_clip_are_not_counted():
    """A clip cut without encoding begins at a key frame; an edit list hides what is too early."""

    def earlier(packet, number):
        packet.pts -= round(Fraction(10, 25) / packet.time_base)
        packet.dts = packet.pts

    encoded = remux(clip(60, gop=30, b_frames=0), "mp4", earlier)
    with av.open(BytesIO(encoded)) as container:
        shown = sum(1 for _ in container.decode(video=0))
    assert shown == 50
    assert numbers(read_frames(encoded, 5, "k")) == [10 + number for number in frame_indices(50, 5)]


@pytest.mark.parametrize("claim", [0, 7, 100_000])
def test_the_header_may_lie_about_the_number_of_frames(claim):
    encoded = bytearray(clip(40, "mpeg4", "avi"))
    for name, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # dwTotalFrames, dwLength
        start = encoded.index(name) + offset
        assert int.from_bytes(encoded[start : start + 4], "little") == 40
        encoded[start : start + 4] = claim.to_bytes(4, "little")
    assert numbers(read_frames(bytes(encoded), 8, "k")) == frame_indices(40, 8)


# --- pictures -----------------------------------------------------------------------------------------------


def test_large_frames_are_scaled_down_with_their_shape():
    encoded = clip(4, size=(4 * WIDTH, 4 * HEIGHT))
    for shorter_side, size in ((None, (640, 128)), (512, (640, 128)), (64, (320, 64)), (1, (5, 1))):
        frames = read_frames(encoded, 2, "k", shorter_side=shorter_side)
        assert [frame.size for frame in frames] == [size, size]
    assert numbers(read_frames(encoded, 4, "k", shorter_side=64)) == [0, 1, 2, 3]


def join(*clips):
    """Clips one after the other in one file, as broadcasts change their resolution."""
    file = BytesIO()
    with av.open(file, "w", format="mov") as target:
        copy, time = None, 0
        for encoded in clips:
            with av.open(BytesIO(encoded)) as source:
                copy = copy or target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = time
                        packet.time_base = Fraction(1, 1000)
                        packet.stream = copy
                        target.mux(packet)
                        time += 40
    return file.getvalue()


def test_all_frames_have_the_size_of_the_first():
    encoded = join(clip(3, INTRA, "mov"), clip(3, INTRA, "mov", size=(2 * WIDTH, HEIGHT)))
    frames = read_frames(encoded, 6, "k")
    assert {frame.size for frame in frames} == {(WIDTH, HEIGHT)}
    assert numbers(frames) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_frames_are_upright(turn):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write rotations")
    upright = [np.asarray(frame) for frame in read_frames(clip(3), 3, "k")]
    turned = [np.asarray(frame) for frame in read_frames(clip(3, turn=turn), 3, "k")]
    assert all(np.array_equal(np.rot90(a, turn // 90), b) for a, b in zip(upright, turned, strict=True))


def test_all_frames_of_a_clip_are_transformed_alike():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    transform = Preprocessing(32).train_transform()
    results = set()
    for seed in range(8):
        torch.manual_seed(seed)
        pixels_TCHW = transform_clip([noise] * 3, transform)
        after = torch.rand(())
        assert pixels_TCHW.shape == (3, 3, 32, 32)
        assert pixels_TCHW.dtype == torch.uint8
        assert (pixels_TCHW == pixels_TCHW[0]).all()
        torch.manual_seed(seed)
        assert torch.equal(transform(noise), pixels_TCHW[0])
        assert torch.rand(()) == after
        results.add(pixels_TCHW.sum().item())
    assert len(results) > 4


# --- where videos come from ---------------------------------------------------------------------------------


def test_locations(tmp_path):
    encoded = clip(20)
    (tmp_path / "a.mp4").write_bytes(encoded)
    with fsspec.open("memory://clips/a.mp4", "wb") as file:
        file.write(encoded)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.mp4", "x/a.mp4")
    for location in (encoded, f"{tmp_path}/a.mp4", "memory://clips/a.mp4", f"{tmp_path}/a.tar:x/a.mp4"):
        assert numbers(read_frames(location, 4, "k")) == frame_indices(20, 4)
    for location in (f"{tmp_path}/b.mp4", f"{tmp_path}/a.tar:b.mp4", str(tmp_path), "memory://b.mp4", "nonsense://b"):
        with pytest.raises(BrokenSample, match=r"^k: cannot read '"):
            read_frames(location, 4, "k")


class Unsteady(BytesIO):
    """A remote file whose connection breaks."""

    def __init__(self, encoded, limit):
        super().__init__(encoded)
        self.left = limit

    def read(self, size=-1):
        self.left -= size
        if self.left < 0:
            raise OSError("connection lost")
        return super().read(size)


@pytest.mark.parametrize("share", [0, 0.5, 1.1])  # while opening, listing and decoding
def test_a_connection_that_breaks(share, monkeypatch):
    encoded = clip(700)
    file = Unsteady(encoded, share * len(encoded))
    monkeypatch.setattr(video, "_open_file", lambda location: file)
    with pytest.raises(BrokenSample, match=r"^k: cannot read the video: connection lost$"):
        read_frames("memory://a.mp4", 4, "k")
    assert file.closed


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"triptych-vl\[video\]"):
        read_frames(b"", 4, "k")


# --- damaged files ------------------------------------------------------------------------------------------


def sound():
    file = BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "the file is damaged or none of asf, avi"),
        (lambda: b"no video at all" * 100, "the file is damaged or none of asf, avi"),
        (lambda: random.Random(0).randbytes(100_000), "the file is damaged or none of asf, avi"),
        (sound, "the file is damaged or none of asf, avi"),
        (lambda: remux(sound(), "matroska"), "no video stream"),
        (lambda: remux(clip(1, "mjpeg", "matroska"), "mp4", disposition=COVER), "no video stream"),
        (lambda: up_to(clip(9, "mpeg4", "avi"), 0), "no frames"),
        (lambda: destroy(clip(30, INTRA, "mov"), range(30)), "no frame of the video can be decoded"),
        (lambda: clip(30)[:-500], "the file is damaged"),  # an MP4 ends with its list of contents
    ],
)
def test_unusable_files(make, reason):
    with pytest.raises(BrokenSample) as error:
        read_frames(make(), 4, "list.json:3")
    assert error.value.key == "list.json:3"
    assert reason in error.value.reason
    assert "\n" not in error.value.reason


def test_playlists_do_not_open_other_files(tmp_path):
    (tmp_path / "a.ts").write_bytes(clip(20, "mpeg4", "mpegts"))
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path}/a.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.m3u8").write_text(text)
    with av.open(f"{tmp_path}/a.m3u8") as container:
        assert container.streams.video  # or the test would prove nothing
    with pytest.raises(BrokenSample, match="none of"):
        read_frames(f"{tmp_path}/a.m3u8", 4, "k")


@pytest.mark.parametrize(("format", "codec"), [("avi", "mpeg4"), ("matroska", "mpeg4"), ("mpegts", "libx264")])
def test_a_file_that_was_cut_off_counts_what_is_there(format, codec):
    encoded = clip(80, codec, format)
    found = numbers(read_frames(up_to(encoded, 50), 8, "k"))
    assert 45 <= found[-1] * 16 / 15 <= 52
    assert max(abs(a - b) for a, b in zip(found, frame_indices(50, 8), strict=True)) <= 3


def test_a_frame_that_does_not_decode_is_replaced_by_the_next_or_the_last():
    assert frame_indices(40, 8) == [2, 7, 12, 17, 22, 27, 32, 37]
    encoded = clip(40, INTRA, "mov")
    assert numbers(read_frames(destroy(encoded, [7, 8, 17]), 8, "k")) == [2, 9, 12, 18, 22, 27, 32, 37]
    assert numbers(read_frames(destroy(encoded, range(31, 40)), 8, "k")) == [2, 7, 12, 17, 22, 27, 30, 30]
    assert numbers(read_frames(destroy(encoded, range(20)), 8, "k")) == [20, 20, 20, 20, 22, 27, 32, 37]


def test_with_and_without_jumps_substitutes_are_the_same(monkeypatch):
    whole = clip(200, INTRA, "mov")
    encoded = destroy(whole, [37, 62, *range(180, 200)])
    expected = [12, 38, 63, 87, 112, 137, 162, 179]
    assert numbers(read_frames(encoded, 8, "k")) == expected
    without_jumps(monkeypatch)
    assert numbers(read_frames(encoded, 8, "k")) == expected


def test_at_least_half_of_the_wanted_frames_must_decode():
    encoded = clip(40, INTRA, "mov")
    read_frames(destroy(encoded, [2, 7, 12, 17]), 8, "k")
    with pytest.raises(BrokenSample, match="only 3 of 8 wanted frames can be decoded"):
        read_frames(destroy(encoded, [2, 7, 12, 17, 22]), 8, "k")


def test_wanted_frames_that_stand_in_for_others_count_as_decoded():
    """Lost from a wanted frame up to the next, which does decode, four times over."""
    lost = [number for start in (2, 12, 22, 32) for number in range(start, start + 5)]
    assert numbers(read_frames(destroy(clip(40, INTRA, "mov"), lost), 8, "k")) == [7, 7, 17, 17, 27, 27, 37, 37]


def test_errors_are_bounded(monkeypatch, decoded):
    monkeypatch.setattr(video, "_MAX_ERRORS", 3)
    encoded = destroy(clip(40, INTRA, "mov"), range(10))
    with pytest.raises(BrokenSample, match="no frame"):
        read_frames(encoded, 8, "k")
    assert decoded == [0, 0]  # by a jump, and from the beginning
    monkeypatch.setattr(video, "MAX_PACKETS", 39)
    with pytest.raises(BrokenSample, match="more than 39 frames"):
        read_frames(encoded, 8, "k")


def test_frames_that_the_decoder_calls_corrupt_are_left_out():
    frames = [SimpleNamespace(is_corrupt=corrupt) for corrupt in (False, True, False)]
    opened = video._Video(None, SimpleNamespace(decode=lambda packet: frames if packet else []))
    assert list(opened.decode(["packet"])) == [frames[0], frames[2]]


def test_streams_that_damage_makes_up_do_not_matter(monkeypatch):
    def demux(container, stream):
        yield from (packet for packet in container.demux(stream) if packet.size)
        raise IndexError("list index out of range")

    replace_methods(monkeypatch, demux=demux)
    assert numbers(read_frames(clip(90, "libx264", "mpegts"), 4, "k")) == frame_indices(90, 4)


def test_absurd_sizes_are_refused(monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 40_000)  # FFmpeg counts the edges that decoders add
    small = clip(6, INTRA, "mov")
    large = clip(2, INTRA, "mov", size=(4 * WIDTH, 4 * HEIGHT))
    with pytest.raises(BrokenSample, match="640 x 128 pixels are more than 40,000"):
        read_frames(large, 2, "k")
    assert numbers(read_frames(join(small, large), 8, "k")) == [0, 1, 2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize(("format", "codec"), [("avi", "mpeg4"), ("matroska", "libx264"), ("mp4", "libx264")])
def test_random_damage_gives_pictures_or_a_broken_sample(format, codec):
    whole = clip(40, codec, format)
    outcomes = set()
    for seed in range(60):
        draw = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 10, 100])):
            start = draw.randrange(len(damaged))
            damaged[start : start + 4] = draw.randbytes(4)
        try:
            outcomes.add(len(read_frames(bytes(damaged), 8, "k")))
        except BrokenSample:
            outcomes.add(None)
    assert outcomes == {8, None}


# --- real clips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length"),
    [("flipping_a_pancake.mkv", 310), ("WTf5EgVY5uU_124_128.avi", 120), ("j2Dhf-xFUxU_13_20.avi", 106)],
)
def test_real_clips(shared, name, length):
    path = str(shared / "data" / "video" / name)
    wanted = frame_indices(length, length), frame_indices(length, 16, "official")
    with av.open(path) as container:
        shown = list(container.decode(video=0))
    assert len(shown) == length
    for numbers_T, rule in zip(wanted, ("uniform", "official"), strict=True):
        frames = read_frames(path, len(numbers_T), "k", rule, shorter_side=None)
        expected = [shown[number].to_image(interpolation="BICUBIC") for number in numbers_T]
        assert all(np.array_equal(*pair) for pair in zip(frames, expected, strict=True))


def test_a_real_damaged_clip(shared):
    frames = read_frames(str(shared / "data" / "video" / "corrupted.mp4"), 8, "k")
    assert len(frames) == 8
    assert frames[0].size == (910, 512)
