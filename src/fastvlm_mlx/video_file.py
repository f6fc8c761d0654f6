"""Video files through PyAV: an index of their packets, and single frames, without ever holding all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from statistics import median_low
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import ImageError, MissingDependencyError
from fastvlm_mlx.types import Frame

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

# What a display matrix does to the axes of a picture (a, b, c, d: x goes to (a, b), y, which points down, to (c, d)).
_TURNS: dict[tuple[int, ...], Image.Transpose] = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow's turns are counter-clockwise
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@contextmanager
def open_video(file: IO[bytes], name: str, thumbnail: int) -> Iterator[VideoFile]:
    """Open a video.

    PyAV gets the open file, not its name: FFmpeg would take some names for addresses or for patterns.

    Args:
        file: seekable; left open.
        name: for errors.
        thumbnail: side of its thumbnails in pixels.

    Raises:
        MissingDependencyError: PyAV isn't installed. ImageError: no video, sound alone, damaged, or without timestamps.
    """
    try:
        import av
    except ImportError as exc:
        raise MissingDependencyError(f"reading {name} needs PyAV: pip install 'fastvlm-mlx[video]'") from exc
    try:
        with closing(VideoFile(file, name, thumbnail)) as video:
            yield video
    except (av.FFmpegError, OSError) as exc:  # OSError: of the file, which was asked for a place beyond its end
        raise ImageError(f"{name} can't be decoded ({exc.strerror}); it may be truncated or damaged") from exc


class VideoFile:
    """A video; its times are in units of its stream's time base.

    Args:
        file: seekable.
        name: for errors.
        thumbnail: side of its thumbnails in pixels.

    Attributes:
        end: when the last frame ends; as long as the median of the others where the file doesn't say.
    """

    def __init__(self, file: IO[bytes], name: str, thumbnail: int) -> None:
        self._file, self._name, self._thumbnail = file, name, thumbnail
        self._container: InputContainer | None = None
        self._seeks = True  # whether its index leads to where it should
        self._times, self._keys, self.end = _index(self._rewind(), name)

    def close(self) -> None:
        """Close it, but not the file."""
        if self._container is not None:
            self._container.close()

    def times(self) -> list[int]:
        """When each frame begins, ascending."""
        return self._times

    def thumbnails(self) -> Iterator[tuple[int, np.ndarray]]:
        """Decode everything: the time and a (side, side, 3) uint8 thumbnail of each frame."""
        side, before = self._thumbnail, None
        for frame in _decode(self._rewind()):
            if before is None or frame.pts > before:  # what comes out of order has no place in time
                before = frame.pts
                yield before, frame.reformat(side, side, "rgb24", interpolation="AREA").to_ndarray()

    def at(self, times: Sequence[int]) -> list[Frame]:
        """The frames that are seen then; one that can't be decoded is left out.

        Each is decoded from the key frame before it. A file whose index leads elsewhere is decoded from its beginning.

        Args:
            times: of `times` or `thumbnails`, ascending.

        Raises:
            ImageError: none of them can be decoded.
        """
        found: dict[int, Frame] = {}
        keys, cursor = sorted(self._keys), _Cursor(self._rewind())
        for time in times:
            key = keys[bisect_right(keys, time) - 1]
            if self._seeks and key > (self._times[0] if cursor.time is None else cursor.time):
                # By when it is seen, as most containers have it, or by when it is decoded.
                self._seeks = any(cursor.seek(place, time) for place in (key, self._keys[key]))
                cursor = cursor if self._seeks else _Cursor(self._rewind())
            frame = cursor.seen_at(time)
            if frame is not None and frame.pts not in found:
                found[frame.pts] = self._frame(frame)
        if not found:
            raise ImageError(f"{self._name} has no frame that can be decoded; it may be truncated or damaged")
        return [found[time] for time in sorted(found)]

    def _rewind(self) -> VideoStream:
        """Open it anew: not every file can be sought back to its beginning. Returns the stream of its pictures."""
        import av
        from av.stream import Disposition

        self.close()
        self._file.seek(0)
        try:
            self._container = av.open(self._file, "r", metadata_errors="replace")
        except (av.FFmpegError, OSError) as exc:
            raise ImageError(f"{self._name} is empty or no video that PyAV reads ({exc.strerror})") from exc
        streams = self._container.streams
        # A song's cover is a video stream as well.
        found = [stream for stream in streams.video if not stream.disposition & Disposition.attached_pic]
        if not found:
            there = "only sound or other data" if len(streams) else "nor anything else; it may be truncated"
            raise ImageError(f"{self._name} has no pictures, {there}; give a file with a video track")
        self._stream: VideoStream = found[0]
        self._stream.thread_type = "AUTO"
        return self._stream

    def _frame(self, frame: VideoFrame) -> Frame:
        picture: Image.Image = frame.to_image()
        shape = float(self._stream.sample_aspect_ratio or 1)  # of a pixel, width to height
        if shape != 1:
            picture = picture.resize((max(round(picture.width * shape), 1), picture.height), Image.Resampling.BICUBIC)
        turn = _TURNS.get(_axes(frame))
        seconds = (frame.pts - self._times[0]) * self._stream.time_base
        return Frame(picture if turn is None else picture.transpose(turn), float(seconds))


class _Cursor:
    """Goes forward through the frames of a video.

    Args:
        stream: that was opened just now.

    Attributes:
        time: of the frame that was given last.
    """

    def __init__(self, stream: VideoStream) -> None:
        self._stream, self._frames = stream, _decode(stream)
        self._seen: VideoFrame | None = None
        self._following: VideoFrame | None = None

    @property
    def time(self) -> int | None:
        return None if self._seen is None else self._seen.pts

    def seek(self, place: int, time: int) -> bool:
        """Go to the key frame that a place leads to; False if there is none at or before a time."""
        import av

        self._seen = self._following = None
        try:
            self._stream.container.seek(place, stream=self._stream)
        except (av.FFmpegError, OSError):
            return False
        self._frames = _decode(self._stream)
        # Some containers lead into the middle; what a decoder makes of the frames from there is no picture.
        self._following = next((frame for frame in self._frames if frame.key_frame), None)
        return self._following is not None and self._following.pts <= time

    def seen_at(self, time: int) -> VideoFrame | None:
        """The last frame that begins then or before; None if there is none from here on."""
        while self.time is None or self.time < time:
            if self._following is None:
                self._following = next(self._frames, None)
            if self._following is None or self._following.pts > time:
                break
            self._seen, self._following = self._following, None
        return self._seen


def _decode(stream: VideoStream) -> Iterator[VideoFrame]:
    """All frames from where the stream's container is, in order of time."""
    return (frame for frame in stream.container.decode(stream) if frame.pts is not None)


def _index(stream: VideoStream, name: str) -> tuple[list[int], dict[int, int], int]:
    """When frames begin; when key frames do, and when they are decoded; when the last one ends. Nothing is decoded."""
    keys: dict[int, int] = {}
    durations: dict[int, int] = {}
    untimed = False
    for packet in stream.container.demux(stream):
        if not packet.size or packet.is_discard:  # the last one is empty; what an edit list cuts off isn't shown
            continue
        if packet.pts is None:
            untimed = True
            continue
        durations[packet.pts] = packet.duration or 0
        if packet.is_keyframe:
            keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
    if not durations:
        remedy = "no timestamps; put it into a container such as MP4" if untimed else "no frames; it may be truncated"
        raise ImageError(f"{name} has {remedy}")
    times = sorted(durations)
    keys.setdefault(times[0], times[0])  # its key frame may be cut off
    gaps = [after - before for before, after in pairwise(times)]
    last = durations[times[-1]] or (median_low(gaps) if gaps else 1)
    return times, keys, times[-1] + last


def _axes(frame: VideoFrame) -> tuple[int, ...]:
    """What the frame's display matrix does to its axes, as in `_TURNS`; phones record how they were held."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return (1, 0, 0, 1)
    matrix = np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]].astype(np.float64)
    return tuple(int(value) for value in np.round(matrix / max(np.abs(matrix).max(), 1)))
