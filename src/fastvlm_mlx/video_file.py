"""Video files through PyAV: an index of their packets, and single frames, without ever holding all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice, pairwise
from statistics import median_low
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import ImageError, MissingDependencyError
from fastvlm_mlx.types import Frame

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

_PROBED = 32  # frames that tell whether timestamps are in the order in which frames are seen

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
        self._times, self._keys, self.end, stored = _index(self._rewind(), name)
        # Whether frames are told by their number, not by their time.
        self._counts = stored == sorted(stored) and self._is_shuffled()
        if self._counts:
            *self._times, self.end = _spread(stored)
        self._seeks = not self._counts  # whether its index leads to where it should

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
        for frame in self._frames(self._rewind()):
            if before is None or frame.pts > before:  # what comes out of order has no place in time
                before = frame.pts
                yield before, frame.reformat(side, side, "rgb24", interpolation="AREA").to_ndarray()

    def at(self, times: Sequence[int]) -> Iterator[Frame]:
        """The frames that are seen then, one after another; one that can't be decoded is left out.

        Each is decoded from the key frame before it. A file whose index leads elsewhere is decoded from its beginning.

        Args:
            times: of `times` or `thumbnails`, ascending.

        Raises:
            ImageError: none of them can be decoded.
        """
        shown: int | None = None
        keys, cursor = sorted(self._keys), self._begin()
        for time in times:
            key = keys[bisect_right(keys, time) - 1]
            if self._seeks and key > (self._times[0] if cursor.time is None else cursor.time):
                # By when it is seen, as most containers have it, or by when it is decoded.
                self._seeks = any(cursor.seek(place, time) for place in (key, self._keys[key]))
                cursor = cursor if self._seeks else self._begin()
            frame = cursor.seen_at(time)
            if frame is not None and (shown is None or frame.pts > shown):
                shown = frame.pts
                yield self._frame(frame)
        if shown is None:
            raise ImageError(f"{self._name} has no frame that can be decoded; it may be truncated or damaged")

    def _begin(self) -> _Cursor:
        stream = self._rewind()
        return _Cursor(stream, self._frames(stream))

    def _frames(self, stream: VideoStream) -> Iterator[VideoFrame]:
        """All frames of a stream that was opened just now, in order of time."""
        return _counted(stream.container.decode(stream), self._times) if self._counts else _decode(stream)

    def _is_shuffled(self) -> bool:
        """Whether frames come out in another order than their timestamps, which were ascending in the file.

        AVI knows no timestamps. FFmpeg numbers the frames as they are stored, and of a codec that stores some of them
        after one that follows them these numbers are wrong. So they are in what was copied from an AVI.
        """
        import av

        times: list[int] = []
        if not _has_delay(self._stream) or self._stream.container.format.name == "avi":
            return _has_delay(self._stream)
        with suppress(av.FFmpegError, OSError):  # what is damaged here is told when it is asked for
            times.extend(frame.pts for frame in islice(_decode(self._rewind()), _PROBED))
        return any(after <= before for before, after in pairwise(times))

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
        frames: all of it, in order of time.

    Attributes:
        time: of the frame that was given last.
    """

    def __init__(self, stream: VideoStream, frames: Iterator[VideoFrame]) -> None:
        self._stream, self._frames = stream, frames
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


def _has_delay(stream: VideoStream) -> bool:
    """Whether a frame may be stored after one that follows it."""
    return bool(stream.codec_context.has_b_frames)


def _decode(stream: VideoStream) -> Iterator[VideoFrame]:
    """All frames from where the stream's container is, in order of time."""
    return (frame for frame in stream.container.decode(stream) if frame.pts is not None)


def _counted(frames: Iterable[VideoFrame], times: Sequence[int]) -> Iterator[VideoFrame]:
    """Frames in the order in which they are seen, each with the next of the times."""
    for frame, time in zip(frames, times, strict=False):
        frame.pts = time
        yield frame


def _spread(stored: Sequence[int]) -> list[int]:
    """Ascending times, each once, and the end: FFmpeg has the last two frames of some files begin together."""
    gap = _median_gap(sorted(set(stored)))
    times = [stored[0]]
    for time in stored[1:]:
        times.append(time if time > times[-1] else times[-1] + gap)
    return [*times, times[-1] + gap]


def _median_gap(times: Sequence[int]) -> int:
    gaps = [after - before for before, after in pairwise(times)]
    return median_low(gaps) if gaps else 1


def _index(stream: VideoStream, name: str) -> tuple[list[int], dict[int, int], int, list[int]]:
    """What a file says of its frames; nothing is decoded.

    Returns:
        When they begin, ascending; when key frames do, and when they are decoded; when the last one ends; when they
        begin in the order in which they are stored.
    """
    stored: list[int] = []
    keys: dict[int, int] = {}
    durations: dict[int, int] = {}
    untimed = False
    for packet in stream.container.demux(stream):
        if not packet.size or packet.is_discard:  # the last one is empty; what an edit list cuts off isn't shown
            continue
        if packet.pts is None:
            untimed = True
            continue
        stored.append(packet.pts)
        durations[packet.pts] = packet.duration or 0
        if packet.is_keyframe:
            keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
    if not durations:
        remedy = "no timestamps; put it into a container such as MP4" if untimed else "no frames; it may be truncated"
        raise ImageError(f"{name} has {remedy}")
    times = sorted(durations)
    keys.setdefault(times[0], times[0])  # its key frame may be cut off
    return times, keys, times[-1] + (durations[times[-1]] or _median_gap(times)), stored


def _axes(frame: VideoFrame) -> tuple[int, ...]:
    """What the frame's display matrix does to its axes, as in `_TURNS`; phones record how they were held."""
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return (1, 0, 0, 1)
    matrix = np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]].astype(np.float64)
    return tuple(int(value) for value in np.round(matrix / max(np.abs(matrix).max(), 1)))
