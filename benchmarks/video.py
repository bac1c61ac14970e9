"""Wanted frames per second of reading clips, beside plain decoding with PyAV.

    python benchmarks/video.py > benchmarks/results/video.json  # generated clips
    python benchmarks/video.py --clips clips/*.mp4 --count 16

Plain decoding goes through a clip from its beginning and converts the wanted frames, whose numbers it is given for
nothing; "plain" in one thread, "plain threads" in as many as FFmpeg likes. "torchcodec" is ours with torchcodec as the
decoder, where it is installed and finds FFmpeg. Frames keep their size. Without --clips it makes H.264 clips of
10 seconds (of 320 x 240 and 1280 x 720 pixels) and of 2 minutes (320 x 240), with a key frame every 2 seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from common import Options, Work, in_turns, options, parser, report
from triptych.data.video import frame_indices, import_torchcodec, read_frames

RATE = 25


def write_clip(path: Path, seconds: int, width: int, height: int) -> Path:
    """Smooth noise that moves to the side."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    picture_HWC = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 2 * RATE
        stream.options = {"preset": "veryfast"}
        for number in range(seconds * RATE):
            moved_HWC = np.roll(picture_HWC, 3 * number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_clips(folder: Path, quick: bool) -> list[Path]:
    sizes = [(1, 64, 48)] if quick else [(10, 320, 240), (10, 1280, 720), (120, 320, 240)]
    return [
        write_clip(folder / f"{width}x{height} {seconds} s.mp4", seconds, width, height)
        for seconds, width, height in sizes
    ]


def plain(path: str, wanted: list[int], thread_type: str, thread_count: int) -> list[Image.Image]:
    """What one would write with PyAV alone."""
    pictures = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = thread_type
        stream.codec_context.thread_count = thread_count
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                pictures.append(frame.to_image())
            if number == wanted[-1]:
                break
    return pictures


def count_frames(path: str) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


def torchcodec_version() -> str | None:
    try:
        found = import_torchcodec()
    except ImportError:
        return None
    return f"{found.__version__} with FFmpeg {found.ffmpeg_major_version}"


def measure(path: Path, count: int, with_torchcodec: bool, how: Options) -> dict[str, object]:
    length = count_frames(str(path))
    wanted = frame_indices(length, count)
    calls: dict[str, Callable[[], list[Image.Image]]] = {
        "ours": partial(read_frames, str(path), count, path.name, shorter_side=None),
        "plain": partial(plain, str(path), wanted, "SLICE", 1),
        "plain threads": partial(plain, str(path), wanted, "AUTO", 0),
    }
    if with_torchcodec:
        calls["torchcodec"] = partial(calls["ours"], decoder="torchcodec")
    for call in calls.values():
        call()
    timings = in_turns({name: Work(call, count) for name, call in calls.items()}, how)
    return {
        "clip": path.name,
        "frames": length,
        "wanted": count,
        **{f"{name}, frames/s": round(timings.rate(name), 1) for name in calls},
        **{f"{name} / ours": round(timings.ratio(name, "ours"), 2) for name in calls if name != "ours"},
    }


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--clips", type=Path, nargs="+", help="video files; generated ones if not given")
    arguments_of.add_argument("--count", type=int, default=16, help="frames of a clip")
    arguments = arguments_of.parse_args()
    how = options(arguments)
    version = torchcodec_version()
    settings = {"pyav": av.__version__, "torchcodec": version or "not there: torchcodec or the libraries of FFmpeg"}
    with tempfile.TemporaryDirectory() as folder:
        clips = arguments.clips or write_clips(Path(folder), how.quick)
        rows = [measure(path, arguments.count, version is not None, how) for path in clips]
    report("video", {"clips": "given" if arguments.clips else "generated", **settings}, rows, {})


if __name__ == "__main__":
    main()
