"""Pictures in time: frames of a video file, an animation, a folder or anything that yields images.

The published FastVLM weights were trained on single pictures. Several frames at once are several pictures to them:
nothing tells them that time passes, and nothing was measured of how well they understand it.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.frame_choice import choose_evenly, choose_scenes
from fastvlm_mlx.image import check_size, file_of, open_image, unlimited
from fastvlm_mlx.types import FRAMES, IMAGE_SUFFIXES, SAMPLINGS, Frame
from fastvlm_mlx.video_file import open_video

if TYPE_CHECKING:
    from fastvlm_mlx.types import FrameSource, ImageInput

# Of all frames together; a gigabyte. A position stands for 64 x 64 pixels, so a context of 32,768 shows 134 million.
MAX_PIXELS = 256_000_000
_THUMBNAIL = 16  # pixels a side: noise and small things that move are averaged away
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # several pictures of other formats are pages, layers or sizes
_UNTIMED_US = 100_000  # how long browsers show a frame whose duration is 0


def read_frames(
    source: FrameSource, frames: int = FRAMES, sampling: str = "uniform", max_pixels: int = MAX_PIXELS
) -> list[Frame]:
    """Choose frames of a video, to ask about as several images.

    The published weights were trained on single pictures, not on videos: how well they understand what happens
    between frames was never measured.

    Args:
        source: path of a video file, of an animated GIF, WebP, PNG or AVIF, or of a folder of frames, by name in
            natural order (frame2 before frame10); such a file's bytes, or it as a binary file object; or images, read
            to their end. Videos need PyAV: pip install 'fastvlm-mlx[video]'.
        frames: how many, >= 1. All that there are where there are no more.
        sampling: "uniform": the frames that are seen at the centres of equal parts of the video's length, by
            timestamps; pictures of a folder last equally long. "scene": the first frame and those after the strongest
            cuts, found by how much a thumbnail changes; where there are fewer, others are spread evenly over the
            scenes. It decodes the whole video.
        max_pixels: of all frames together, 4 bytes each. A frame of more than its equal part is scaled down to it when
            it is read, so that any number of them fits into the memory. 123 frames of 1920 x 1080 stay as they are;
            of more than that no context of 32,768 positions would show every pixel.

    Returns:
        Frames in order of time, each once, with seconds since the first frame of the video; None for those of a folder
        and for images that aren't frames themselves. Rotation that a phone recorded, and pixels that aren't square, are
        applied.

    Raises:
        ImageError: missing, unreadable, empty, or without pictures. InputError: `frames`, `sampling` or `max_pixels`
            out of range, a folder without pictures, an empty name. MissingDependencyError: a video, and PyAV isn't
            installed.
    """
    for name, number in (("frames", frames), ("max_pixels", max_pixels)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
            raise InputError(f"{name} must be a whole number, 1 or more, got {number!r}")
    if sampling not in SAMPLINGS:
        raise InputError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    with ExitStack() as opened:
        film = _open(source, opened)
        times = _CHOICES[sampling](film, int(frames))
        return [_within(frame, int(max_pixels) // max(len(times), 1)) for frame in film.at(times)]


def _within(frame: Frame, pixels: int) -> Frame:
    """A frame of at most so many pixels, in its shape."""
    width, height = frame.image.size
    if width * height <= pixels:
        return frame
    scale = math.sqrt(pixels / (width * height))
    size = max(int(width * scale), 1), max(int(height * scale), 1)
    return Frame(frame.image.resize(size, Image.Resampling.BICUBIC), frame.time)


class Film(Protocol):
    """Frames in order of time; times are whole numbers in a unit of the film's own."""

    @property
    def end(self) -> int:
        """When the last frame ends."""

    def times(self) -> list[int]:
        """When each frame begins, ascending, at least one."""

    def thumbnails(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each frame's time with a small uint8 RGB array of it."""

    def at(self, times: Sequence[int]) -> Iterator[Frame]:
        """The frames that begin then, one after another."""


def _evenly(film: Film, count: int) -> list[int]:
    return choose_evenly(film.times(), film.end, count)


def _by_scene(film: Film, count: int) -> list[int]:
    times: list[int] = []
    changes: list[float] = []
    before: np.ndarray | None = None
    for time, thumbnail in film.thumbnails():
        now = thumbnail.astype(np.float64)
        changes.append(0.0 if before is None else float(np.abs(now - before).mean() / 255))
        times.append(time)
        before = now
    return choose_scenes(times, max(film.end, times[-1] + 1), changes, count) if times else []


_CHOICES: dict[str, Callable[[Film, int], list[int]]] = {"uniform": _evenly, "scene": _by_scene}


class Stills:
    """Pictures that each last equally long; a time is a picture's number.

    Args:
        pictures: what `open_image` takes; decoded when they are needed.
    """

    def __init__(self, pictures: Sequence[ImageInput]) -> None:
        self._pictures = list(pictures)
        self.end = len(pictures)

    def times(self) -> list[int]:
        """See Film."""
        return list(range(self.end))

    def thumbnails(self) -> Iterator[tuple[int, np.ndarray]]:
        """See Film."""
        for number in range(self.end):
            yield number, _thumbnail(open_image(self._again(number)))

    def at(self, times: Sequence[int]) -> Iterator[Frame]:
        """See Film."""
        for time in times:
            picture = self._again(time)
            yield Frame(open_image(picture), picture.time if isinstance(picture, Frame) else None)

    def _again(self, number: int) -> ImageInput:
        """A picture that can be opened again."""
        picture = self._pictures[number]
        if hasattr(picture, "read"):
            self._pictures[number] = picture = _lasting(cast("IO[bytes]", picture))
        return picture


class Animation:
    """A picture of several frames that Pillow reads, in microseconds; of a still one the only frame.

    Args:
        picture: open, as long as this is used.
        name: for errors.
    """

    def __init__(self, picture: Image.Image, name: str) -> None:
        self._picture, self._name = picture, name
        # An animated PNG may have a picture more, for programs that don't know of animations.
        first = int(bool(picture.info.get("default_image")))
        with self._decoding():
            count = getattr(picture, "n_frames", 1) if picture.format in _ANIMATED else 1
        self._begins: dict[int, int] = {}
        self.end = 0
        for number in range(first, count):
            self._begins[self.end] = number
            duration = self._seek(number).info.get("duration") or 0
            self.end += round(duration * 1000) or _UNTIMED_US

    def times(self) -> list[int]:
        """See Film."""
        return list(self._begins)

    def thumbnails(self) -> Iterator[tuple[int, np.ndarray]]:
        """See Film."""
        for time, number in self._begins.items():
            yield time, _thumbnail(open_image(self._seek(number)))

    def at(self, times: Sequence[int]) -> Iterator[Frame]:
        """See Film."""
        for time in times:
            yield Frame(open_image(self._seek(self._begins[time])), time / 1e6)

    def _seek(self, number: int) -> Image.Image:
        with self._decoding():
            self._picture.seek(number)
            check_size(*self._picture.size, self._name)  # a frame may be larger than those before it
            self._picture.load()
        return self._picture

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            with unlimited():
                yield
        except ImageError:
            raise
        except Exception as exc:  # as in `image._decode`, decoders raise whatever they like on damaged files
            raise ImageError(f"{self._name} can't be decoded ({exc}); it may be truncated or damaged") from exc


def _lasting(file: IO[bytes]) -> IO[bytes]:
    """A file that can be read again: itself, or what comes out of a pipe."""
    if hasattr(file, "seekable") and file.seekable():
        return file
    data = file.read()
    if not isinstance(data, bytes):
        raise ImageError(f"a file object must be binary, this one gives {type(data).__name__}; open it with mode 'rb'")
    return io.BytesIO(data)


def _thumbnail(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX))


def _open(source: FrameSource, opened: ExitStack) -> Film:
    """What a source holds; `opened` closes it."""
    if isinstance(source, str | os.PathLike):
        if not os.fspath(source):  # which would be the folder that one is in
            raise InputError("the name of the video is empty; give a file or a folder of frames")
        path = Path(file_of(os.fspath(source)))
        if path.is_dir():
            return Stills(_pictures_of(path))
        name = f"video {os.fspath(source)}"
        try:
            file = opened.enter_context(path.open("rb"))
        except FileNotFoundError as exc:
            raise ImageError(f"{name} doesn't exist; check the path") from exc
        except (OSError, ValueError) as exc:  # ValueError: a name that no file can have
            raise ImageError(f"{name} can't be read ({exc}); check the path and its permissions") from exc
        return _open_file(file, name, opened)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_file(io.BytesIO(source), f"the video ({len(source)} bytes)", opened)
    if hasattr(source, "read"):
        return _open_file(_lasting(cast("IO[bytes]", source)), "the video file object", opened)
    if isinstance(source, Iterable):
        pictures = list(source)
        if not pictures:
            raise InputError("there are no frames to choose from; give at least one image")
        return Stills(pictures)
    raise InputError(
        "frames come from a video file, its bytes, a binary file object, a folder or a list of images; "
        f"got {type(source).__name__}"
    )


def _open_file(file: IO[bytes], name: str, opened: ExitStack) -> Film:
    try:
        with unlimited():
            picture = Image.open(file)
    except UnidentifiedImageError:
        pass
    except Exception as exc:  # whatever a decoder raises
        raise ImageError(f"{name} can't be decoded ({exc}); it may be truncated or damaged") from exc
    else:
        if picture.format != "MPEG":  # of which Pillow knows the name alone
            return Animation(opened.enter_context(picture), name)
    return opened.enter_context(open_video(file, name, _THUMBNAIL))


def _pictures_of(folder: Path) -> list[Path]:
    """The pictures in a folder, not below it, by name in natural order; hidden ones are left out.

    Raises:
        InputError: there is none.
    """
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise InputError(f"{folder} has no pictures; known endings are {' '.join(sorted(IMAGE_SUFFIXES))}")
    return sorted(found, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders names by the numbers in them: frame2 before frame10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(parts)]
