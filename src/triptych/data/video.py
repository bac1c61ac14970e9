"""Frames of video files, chosen by number.

T frames of a clip, C 3 colours, H and W height and width in pixels.

A video is read twice. First its packets are listed without decoding them, which takes about a hundredth of the
time: that gives the number of frames, which headers leave out or get wrong, and, where the container stores when
each frame is shown, the number of every frame, also at a variable rate. Then what the wanted frames need is
decoded, by jumps from key frame to key frame where that saves decoding, and only the wanted ones are kept.

Decoding runs in one thread. Loader workers are processes, as many as there are cores, and more threads in each
would compete; decoders that work on several frames at once also hold more memory, and can hang when they are
left before the end of a video, which is what reading a few frames means.

Where it is asked for, torchcodec decodes in place of PyAV, which still lists the packets and sets the limits.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image
from torch import Tensor

from triptych.data.samples import MAX_PIXELS, BrokenSample, open_binary, read_bytes
from triptych.data.transforms import FrameDecoder, FrameRule, Transform

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

CONTAINERS = ("asf", "avi", "flv", "gif", "matroska", "mov", "mpeg", "mpegts", "ogg", "webm")
"""Formats that are opened, by FFmpeg's names ("mov" is MP4 too). Playlists are not among them: a record of a
data set must not make us open other files or addresses."""
MAX_PACKETS = 1_000_000
"""Videos of more frames are refused; it is nine hours at 30 frames a second."""

_TIMED = {"matroska", "mov"}
"""Containers that store when each frame is shown, and that can be entered at any key frame."""
_MAX_ERRORS = 1000
"""After so many packets that do not decode the rest of a video is given up."""
_WORTH_JUMPING = 16
"""Frames that a jump to a key frame must save; it costs about as much as decoding a few."""
_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
"""Counterclockwise, by the number of quarter turns."""


def frame_indices(length: int, count: int, rule: FrameRule = "uniform") -> list[int]:
    """The numbers, in ascending order, of `count` frames of a clip of `length` frames.

    "uniform" cuts the clip into `count` equal segments and takes the frame in the middle of each. A frame occurs
    twice only if `length` is less than `count`.

    "official" is mPLUG's `np.arange(0, length, length / count, dtype=int)`, whose step is rounded down to an
    integer: the end of the clip may never be seen (of 299 frames the last of 16 is number 270), and a clip of
    fewer than `count` frames gives its first frame `count` times. Where rounding makes NumPy's list one longer,
    it is cut.

    Raises:
        ValueError: `length` or `count` is less than 1, or there is no such rule.
    """
    if length < 1 or count < 1:
        raise ValueError(f"a clip and what is taken of it have at least 1 frame, got {length} and {count}")
    match rule:
        case "uniform":
            return [(2 * segment + 1) * length // (2 * count) for segment in range(count)]
        case "official":
            return [segment * (length // count) for segment in range(count)]
        case _:
            raise ValueError(f"unknown rule {rule!r}; there are {', '.join(get_args(FrameRule))}")


def read_frames(
    location: bytes | str,
    count: int,
    key: str,
    rule: FrameRule = "uniform",
    *,
    shorter_side: int | None = 512,
    decoder: FrameDecoder = "pyav",
) -> list[Image.Image]:
    """`count` frames of a video, in the order in which they are shown.

    The rule counts the frames that the file holds, whatever its header says. A wanted frame that does not decode
    is replaced by the next one that does, or by the last of all; at least half must decode.

    Args:
        location: the encoded video, or a path, an fsspec URL, or "file.tar:member".
        count: how many frames.
        key: names the video in errors.
        rule: which frames, see `frame_indices`.
        shorter_side: larger frames are scaled down until their shorter side has so many pixels; None keeps them.
            All wanted frames are held in memory at this size, so give what the transform needs.
        decoder: with "torchcodec" it decodes what is in MP4, MOV, Matroska and WebM; PyAV decodes other containers, of
            which torchcodec gave neighbours of the wanted frames. Of undamaged videos the pictures are the same, but
            for about a level of grey where they are scaled down. Of damaged ones torchcodec loses more: it does not
            go on behind an error before the first frame that it gives, and what it cannot decode is replaced by the
            next *wanted* frame.

    Returns:
        Upright 8-bit RGB pictures, all of one size; one that is wanted twice is the same picture twice.
        `transform_clip` makes a tensor of them.

    Raises:
        BrokenSample: naming `key`, when the video cannot be read, is of no format of `CONTAINERS`, has no video
            stream or more than `MAX_PACKETS` frames, claims more pixels than `samples.MAX_PIXELS`, or when fewer
            than half of the wanted frames decode.
        ValueError: `count`, `rule`, `shorter_side` or `decoder` is out of range.
        ImportError: PyAV, or torchcodec where it is asked for, is not installed.
    """
    frame_indices(1, count, rule)  # a wrong argument is no fault of the video
    if shorter_side is not None and shorter_side < 1:
        raise ValueError(f"shorter_side must be at least 1, got {shorter_side}")
    if decoder not in get_args(FrameDecoder):
        raise ValueError(f"unknown decoder {decoder!r}; there are {', '.join(get_args(FrameDecoder))}")
    ffmpeg_error = import_av().FFmpegError
    if decoder == "torchcodec":
        import_torchcodec()
    try:
        file = _open_file(location)
    except (OSError, ValueError) as error:
        raise BrokenSample(key, f"cannot read {location!r}: {error}") from error
    with file:
        try:
            return _read(file, count, key, rule, shorter_side, decoder)
        except (ffmpeg_error, OSError) as error:
            raise BrokenSample(key, f"cannot read the video: {error.strerror or error}") from error


def transform_clip(frames: Sequence[Image.Image], transform: Transform) -> Tensor:
    """The frames of one clip through one transform, as uint8 pixels_TCHW.

    Every frame finds torch's global CPU generator in the same state, so that a random transform crops, mirrors
    and colours all of them alike; afterwards the state is as after one picture.
    """
    before = torch.get_rng_state()
    pixels_T = []
    for frame in frames:
        torch.set_rng_state(before)
        pixels_T.append(transform(frame))
    return torch.stack(pixels_T)


# --- reading ------------------------------------------------------------------------------------------------


def import_av() -> Any:
    """PyAV.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError('Videos need PyAV: pip install "triptych-vl[video]"') from error
    return av


def import_torchcodec() -> Any:
    """torchcodec, of version 0.12 or later.

    Raises:
        ImportError: it is not installed, or does not find FFmpeg; the message says what to install.
    """
    needs = 'Decoding with torchcodec needs it (pip install "triptych-vl[torchcodec]") and'
    needs = f"{needs} the shared libraries of FFmpeg 4 to 8 where the system finds them; PyAV needs neither"
    try:
        import torchcodec
    except (ImportError, OSError, RuntimeError) as error:  # earlier versions' RuntimeError: there is no FFmpeg
        raise ImportError(needs) from error
    if torchcodec.ffmpeg_major_version is None:
        raise ImportError(needs)
    return torchcodec


def _open_file(location: bytes | str) -> Any:
    """A binary file that can be wound back; of paths and URLs only what is needed is in memory."""
    if isinstance(location, bytes):
        return BytesIO(location)
    return BytesIO(read_bytes(location)) if ".tar:" in location else open_binary(location)


def _read(
    file: Any, count: int, key: str, rule: FrameRule, shorter_side: int | None, decoder: FrameDecoder
) -> list[Image.Image]:
    with _open_video(file, key) as video:
        index = video.list_packets(key)
        wanted = frame_indices(index.length, count, rule)
        if index.times:
            if decoder == "torchcodec":
                file.seek(0)
                return _choose(_by_torchcodec(file, video.stream, index, wanted, key), wanted, shorter_side, key)
            try:
                return _choose(video.jump(index, wanted), wanted, shorter_side, key)
            except _LostError:
                pass
    file.seek(0)  # opened afresh rather than wound back: not every container finds its beginning again
    with _open_video(file, key) as video:
        return _choose(index.number(video.decode(video.packets())), wanted, shorter_side, key)


def _choose(
    numbered: Iterable[tuple[int, VideoFrame]], wanted: list[int], shorter_side: int | None, key: str
) -> list[Image.Image]:
    """The picture of each wanted number, from frames with their numbers; see `read_frames` for substitutes."""
    to_picture = _ToPicture(shorter_side)
    missing = sorted(set(wanted), reverse=True)
    pictures: dict[int, Image.Image] = {}
    found, last = 0, None
    for number, last in numbered:
        if number < missing[-1]:
            continue
        found += number in missing
        picture = to_picture(last)
        while missing and missing[-1] <= number:
            pictures[missing.pop()] = picture
        if not missing:
            break
    if last is None:
        raise BrokenSample(key, "no frame of the video can be decoded")
    if 2 * found < len(set(wanted)):
        raise BrokenSample(key, f"only {found} of {len(set(wanted))} wanted frames can be decoded")
    if missing:
        pictures |= dict.fromkeys(missing, to_picture(last))
    return [pictures[number] for number in wanted]


def _by_torchcodec(
    file: Any, stream: VideoStream, index: _Index, wanted: list[int], key: str
) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames that torchcodec decodes, upright, with their numbers."""
    settings = {"dimension_order": "NHWC", "num_ffmpeg_threads": 1, "device": "cpu"}
    try:
        decoder = import_torchcodec().decoders.VideoDecoder(file, stream_index=stream.index, **settings)
    except (RuntimeError, ValueError) as error:
        raise BrokenSample(key, "torchcodec cannot open the video") from error
    for number in dict.fromkeys(wanted):
        try:
            shown = decoder.get_frame_at(number)
        except (IndexError, RuntimeError):  # it does not decode, or torchcodec counts fewer frames
            continue
        height, width, _ = shown.data.shape
        if height * width <= MAX_PIXELS:
            # Its time says which frame it is: in place of a lost one torchcodec gives a later one.
            given = bisect_left(index.times, round(shown.pts_seconds / stream.time_base))
            yield given, import_av().VideoFrame.from_ndarray(shown.data.numpy(), format="rgb24")


class _ToPicture:
    """Makes pictures of frames, all of the size of the first, which is scaled down to `shorter_side`."""

    def __init__(self, shorter_side: int | None) -> None:
        from av.video.reformatter import VideoReformatter

        self._scaler = VideoReformatter()
        self._shorter_side = shorter_side
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> Image.Image:
        if self._size is None:
            shorter_side = min(frame.width, frame.height)
            scale = min(shorter_side, self._shorter_side or shorter_side) / shorter_side
            self._size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        width, height = self._size
        rgb = self._scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        picture = Image.fromarray(rgb.to_ndarray())
        turn = _TURNS[round(frame.rotation / 90) % 4]
        return picture if turn is None else picture.transpose(turn)


# --- one open video -----------------------------------------------------------------------------------------


class _LostError(Exception):
    """A jump did not lead where the list of packets says."""


@dataclass(frozen=True)
class _Index:
    """What the packets of a video say.

    Attributes:
        length: number of frames.
        times: when each is shown, ascending, in units of the stream; empty where the container does not store it.
        keyframes: times of the frames from which decoding can start, ascending.
    """

    length: int
    times: list[int]
    keyframes: list[int]

    def number(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[int, VideoFrame]]:
        """Frames with their numbers: by time where times are known, so that lost frames leave gaps."""
        for count, frame in enumerate(frames):
            if not self.times:
                yield count, frame
            elif frame.pts is not None:
                yield bisect_left(self.times, frame.pts), frame


@contextmanager
def _open_video(file: Any, key: str) -> Iterator[_Video]:
    from av.stream import Disposition

    # Not `options`, which are for streams too: PyAV 17 crashes on them where streams are found late (MPEG).
    options = {"format_whitelist": ",".join(CONTAINERS)}
    try:
        opened = import_av().open(file, container_options=options, metadata_errors="ignore")
    except import_av().FFmpegError as error:
        known = ", ".join(CONTAINERS)
        raise BrokenSample(key, f"the file is damaged or none of {known}: {error.strerror}") from error
    with opened as container:
        streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
        if not streams:
            raise BrokenSample(key, "the file has no video stream")
        context = streams[0].codec_context
        if context is None:
            raise BrokenSample(key, "there is no decoder for the video")
        if context.width * context.height > MAX_PIXELS:
            raise BrokenSample(key, f"{context.width} x {context.height} pixels are more than {MAX_PIXELS:,}")
        context.options = {"max_pixels": str(MAX_PIXELS)}  # a later frame may claim more
        context.thread_count = 1
        yield _Video(container, streams[0])


@dataclass(frozen=True)
class _Video:
    container: InputContainer
    stream: VideoStream

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """The encoded frames in the order of the file, until it ends or cannot be read any further."""
        ffmpeg_error = import_av().FFmpegError
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:  # to the decoder, an empty one would mean the end
                    yield packet
        except (ffmpeg_error, IndexError):  # PyAV's IndexError: at the end, damage had made up new streams
            return

    def list_packets(self, key: str) -> _Index:
        """Reads on to the end."""
        times: list[int | None] = []
        keyframes = []
        for count, packet in enumerate(self.packets()):
            if count == MAX_PACKETS:
                raise BrokenSample(key, f"the video has more than {MAX_PACKETS:,} frames")
            if packet.is_keyframe and packet.pts is not None:
                keyframes.append(packet.pts)
            if not packet.is_discard:  # only there to decode others, and not shown
                times.append(packet.pts)
        if not times:
            raise BrokenSample(key, "the video has no frames")
        known = [time for time in times if time is not None]
        timed = _TIMED.intersection(self.container.format.name.split(","))
        if not timed or len(set(known)) < len(times):
            known = []
        return _Index(len(times), sorted(known), sorted(keyframes))

    def decode(self, packets: Iterable[Packet[VideoStream]]) -> Iterator[VideoFrame]:
        """The frames, in the order in which they are shown, that decode without an error."""
        errors = 0
        for packet in chain(packets, (None,)):  # None asks for the frames that the decoder holds back
            try:
                frames = self.stream.decode(packet)
            except import_av().FFmpegError:
                errors += 1
                if errors > _MAX_ERRORS:
                    return
            else:
                yield from (frame for frame in frames if not frame.is_corrupt)

    def jump(self, index: _Index, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Frames with their numbers, as from the beginning, but leaving out what no wanted frame needs.

        Raises:
            _LostError: they may not be those that decoding from the beginning would give.
        """
        frames: Iterator[tuple[int, VideoFrame]] = iter(())
        reached = -_WORTH_JUMPING - 1
        for number in wanted:
            place = bisect_right(index.keyframes, index.times[number]) - 1
            if place < 0:
                raise _LostError
            keyframe = index.keyframes[place]
            if bisect_left(index.times, keyframe) - reached > _WORTH_JUMPING:
                frames = index.number(self.decode(self._packets_from(keyframe)))
            while reached < number:
                following = next(frames, None)
                if following is None:  # the last frame that decodes may be one that was left out
                    raise _LostError
                reached = following[0]
                yield following

    def _packets_from(self, keyframe: int) -> Iterator[Packet[VideoStream]]:
        try:
            self.container.seek(keyframe, stream=self.stream)
        except import_av().FFmpegError as error:
            raise _LostError from error
        packets = self.packets()
        first = next(packets, None)
        if first is None or not first.is_keyframe or first.pts is None or first.pts > keyframe:
            raise _LostError
        return chain((first,), packets)
