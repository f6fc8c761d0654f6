"""Small videos, made on the spot. Each frame has a colour of its own, so that a chosen one tells which it is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

# Twelve that differ by 90 and more in some channel; a codec's error on one colour is a few.
COLOURS = [*itertools.product((30, 220), repeat=3), (125, 125, 125), (125, 30, 30), (30, 125, 30), (30, 30, 125)]
CODEC_ERROR = 16  # of 255, on one colour, back and forth through YUV


def solid(colour: Sequence[int], size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, tuple(colour))


def number_of(picture: Image.Image) -> int:
    """Which of COLOURS a picture has."""
    values = np.asarray(picture.convert("RGB"), np.float64).reshape(-1, 3)
    distances = np.abs(np.array(COLOURS) - values.mean(axis=0)).max(axis=1)
    assert distances.min() <= CODEC_ERROR
    assert np.ptp(values, axis=0).max() <= CODEC_ERROR
    return int(distances.argmin())


def numbers_of(frames) -> list[int]:
    return [number_of(frame.image) for frame in frames]


def write_video(
    path: Path,
    pictures: Sequence[Image.Image | int] = range(12),
    times_ms: Sequence[int] | None = None,
    codec: str = "mpeg4",
    gop: int = 4,
    b_frames: int = 0,
    matrix: Sequence[int] | None = None,
    pixel: Fraction | None = None,
    cut_ms: int = 0,
) -> Path:
    """A video of pictures, or numbers of COLOURS.

    Args:
        path: its ending says the container.
        pictures: its frames.
        times_ms: when each begins; default every 100 ms.
        codec: "ffv1" is exact.
        gop: frames from one key frame to the next.
        b_frames: frames that are stored after one that follows them.
        matrix: how it is to be turned.
        pixel: shape of a pixel, width to height.
        cut_ms: so much of its beginning is cut off, in an MP4 by an edit list.
    """
    import av

    shown = [solid(COLOURS[p]) if isinstance(p, int) else p for p in pictures]
    times = times_ms or range(0, 100 * len(shown), 100)
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"} if cut_ms else {}) as out:
        stream = out.add_stream(codec, rate=10 if codec != "mpeg1video" else 25)
        stream.width, stream.height = shown[0].size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        context = stream.codec_context
        context.gop_size, context.max_b_frames = gop, b_frames
        if codec != "mpeg1video":  # which knows a few rates only
            context.time_base = Fraction(1, 1000)
        # Fine steps, and no key frames but those: it would make one of each change of colour.
        context.options = {"qmin": "1", "qmax": "2", "sc_threshold": "1000000000"} if codec == "mpeg4" else {}
        if pixel is not None:
            context.sample_aspect_ratio = pixel
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for time, picture in zip(times, shown, strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.pts, packet.dts = packet.pts - cut_ms, packet.dts - cut_ms
                out.mux(packet)
        out.mux(stream.encode())
    return path


def copy_video(source: Path, path: Path) -> Path:
    """The same packets, with the times that they were found with, in the container that the path's ending says."""
    import av

    with av.open(str(source)) as file, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return path


def write_animation(path: Path, durations_ms: Sequence[int], **options: object) -> Path:
    """An animated GIF, WebP or PNG of as many of COLOURS as there are durations."""
    first, *others = [solid(colour) for colour in COLOURS[: len(durations_ms)]]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=list(durations_ms), **lossless, **options)
    return path
