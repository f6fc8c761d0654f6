"""Any image input -> uint8 RGB pixels of the size that the vision encoder takes.

The default, `pad`, is bit for bit what the official predict.py feeds its encoder (black square, centred with
floor, PIL's bicubic on 8-bit values), computed without building the full square.
Source: apple/ml-fastvlm 592b4ad, llava/mm_utils.py:152-180; transformers 4.48.3, CLIPImageProcessor.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastvlm_mlx.config import DOWNSAMPLING, check_side
from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.types import ASPECTS, Frame
from fastvlm_mlx.vision_config import LEAST_DOWNSAMPLING

if TYPE_CHECKING:
    from fastvlm_mlx.types import ImageInput, ImageInputs

MAX_PIXELS = 500_000_000  # the official code's limit; Pillow's own refuses 200-megapixel phones
MAX_SIDE = 65_536  # pixels; pictures of one row and a million columns have no use and cost gigabytes
LARGER_BY = 1.02  # a side that aspect "native" takes for whole positions, to what is left of it
_BAND_ROWS = 512  # rows of the padded square that exist at a time
_OPENING = threading.Lock()
_BICUBIC = Image.Resampling.BICUBIC


def preprocess(
    image: ImageInput, resolution: int = 1024, aspect: str = "pad", downsampling: int | None = None
) -> np.ndarray:
    """Load an image and bring it to the encoder's size.

    Args:
        image: path, bytes, binary file object, PIL image, (H, W, 3) uint8 RGB array, or Frame. EXIF orientation is
            applied, transparency composited on white, 16-bit gray scaled to 8, the first frame of an
            animation taken.
        resolution: side of the result in pixels, a multiple of 64, or of 32 for FastViT; for "native" its longer side.
        aspect: "pad" to a black square (the official predict.py, bit for bit), "crop" the centre after
            resizing the shortest edge (the published model card, Apple's app), "stretch", or "native": the
            picture's own shape, as far as whole positions have it (no published model was trained for it).
        downsampling: pixels per side of a position, the model's: 64, FastViT's 32; "native" makes multiples of it.
            Default 64, or 32 where `resolution` is a multiple of that alone.

    Returns:
        (S, S, 3) uint8, RGB, row-major; for "native" (H, W, 3), see `native_size`.

    Raises:
        ImageError: missing, unreadable, no image, above 65,536 px a side or 500 megapixels.
        ResolutionError: a multiple of neither, or not of `downsampling`.
        InputError: unknown aspect, or "anyres", which makes several squares; see `vision.anyres.cut`.
    """
    check_view(resolution, aspect, downsampling)
    if aspect == "anyres":
        raise InputError("one square is made here, and aspect 'anyres' makes tiles; use vision.anyres.cut, or a model")
    position = downsampling or (LEAST_DOWNSAMPLING if resolution % DOWNSAMPLING else DOWNSAMPLING)
    return fit(open_image(image), resolution, aspect, position)


def fit(picture: Image.Image, resolution: int, aspect: str, downsampling: int = DOWNSAMPLING) -> np.ndarray:
    """Bring an upright RGB picture to the encoder's size.

    Args:
        picture: what `open_image` gives.
        resolution: as `preprocess`, checked already.
        aspect: likewise.
        downsampling: pixels per side of a position, which "native" makes whole.
    """
    if aspect == "native":
        return np.asarray(_native(picture, native_size(picture.size, resolution, downsampling)))
    return np.asarray({"pad": _pad, "crop": _crop, "stretch": _stretch}[aspect](picture, resolution))


def native_size(size: tuple[int, int], longest: int, downsampling: int = DOWNSAMPLING) -> tuple[int, int]:
    """The size that aspect "native" gives a picture.

    Its longer side is `longest`, so that it is seen as large as in a padded square; the other one is what the picture's
    shape asks for, up to the next whole position. Down to the one before where that makes it at most 2 % smaller: a
    row of positions for a few lines is dear. So none of the positions is all black.

    Args:
        size: (width, height) of the picture in pixels.
        longest: in pixels, a multiple of `downsampling`.
        downsampling: pixels per side of a position.

    Returns:
        (width, height) in pixels.
    """
    across, down = (_whole(longest * side / max(size), downsampling) for side in size)
    return across, down


def _whole(pixels: float, downsampling: int) -> int:
    """A side in whole positions."""
    below = int(pixels // downsampling) * downsampling
    return below if below * LARGER_BY >= pixels else below + downsampling


def check_view(resolution: int, aspect: str, downsampling: int | None = None) -> None:
    """Raise ResolutionError or InputError unless images can be brought to this size in this way; see `check_side`."""
    check_side(resolution, downsampling)
    if aspect not in ASPECTS:
        raise InputError(f"aspect must be one of {', '.join(ASPECTS)}, got {aspect!r}")


def image_list(images: ImageInputs) -> list[ImageInput]:
    """None, one image or several, as a list. A list or tuple is several; everything else is one."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(cast("Sequence[ImageInput]", images))
    return [cast("ImageInput", images)]


def open_image(image: ImageInput) -> Image.Image:
    """Decode any accepted input to an upright 8-bit RGB picture; errors as `preprocess`."""
    if isinstance(image, Frame):
        image = image.image
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _decode(image, "the image")
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(image), name_of(image))
    if isinstance(image, str | os.PathLike):
        return _decode(file_of(os.fspath(image)), name_of(image))
    if hasattr(image, "read"):
        return _decode(image, "the image file object")
    raise ImageError(
        "an image is a path, bytes, a binary file object, a PIL image or an (H, W, 3) uint8 array; "
        f"got {type(image).__name__}"
    )


def open_bytes(data: bytes, name: str) -> Image.Image:
    """Decode what was read from a file; `name` is for errors, which are those of `preprocess`."""
    return _decode(io.BytesIO(data), name)


def name_of(image: ImageInput) -> str:
    """What errors call it."""
    if isinstance(image, str | os.PathLike):
        return f"image {os.fspath(image)}"
    return f"the image ({len(image)} bytes)" if isinstance(image, bytes | bytearray | memoryview) else "the image"


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ImageError(f"an image array must be (H, W, 3) uint8 RGB, got {array.shape} {array.dtype}")
    check_size(array.shape[1], array.shape[0], "the image array")
    return Image.fromarray(np.ascontiguousarray(array))


def file_of(name: str) -> str:
    """The path that a name stands for. Raises ImageError: it is an address."""
    if "://" in name:
        raise ImageError(f"{name} is an address; download the image first and give the file")
    return os.path.expanduser(name)  # noqa: PTH111 (Path.expanduser raises for an unknown ~user)


@contextmanager
def unlimited() -> Iterator[None]:
    """Without Pillow's limit on pixels: `check_size` has another."""
    with _OPENING:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


def _decode(source: str | IO[bytes] | Image.Image, name: str) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        with unlimited():
            opened = Image.open(source)
        with opened as picture:
            return _to_rgb(picture, name)
    except FileNotFoundError as exc:
        raise ImageError(f"{name} doesn't exist; check the path") from exc
    except IsADirectoryError as exc:
        raise ImageError(f"{name} is a folder; give a file") from exc
    except UnidentifiedImageError as exc:
        raise ImageError(f"{name} is empty or no image that Pillow reads") from exc
    except (ImageError, MemoryError):
        raise
    except Exception as exc:  # on damaged files, Pillow's decoders raise OSError, SyntaxError, RuntimeError and others
        raise ImageError(f"{name} can't be decoded ({exc}); it may be truncated or damaged") from exc


def check_size(width: int, height: int, name: str) -> None:
    """Raise ImageError for a picture beyond our limits; `name` is what it is called."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is too large, {width} x {height} px; the limit is {MAX_SIDE} px a side and "
            f"{MAX_PIXELS // 10**6} megapixels; scale it down"
        )


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Upright, opaque, 8-bit RGB."""
    check_size(*picture.size, name)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        return _from_deep_gray(picture, name)
    if picture.mode == "F":
        raise ImageError(f"{name} holds floating-point gray without a defined range; convert it to 8 or 16 bits")
    if picture.has_transparency_data:
        # Compositing shows what a viewer shows; dropping alpha would bring up the colours hidden under it.
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _from_deep_gray(picture: Image.Image, name: str) -> Image.Image:
    """16-bit gray, scaled: Pillow's own conversion clips at 255 and leaves a white picture."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name} holds 32-bit gray without a defined range; convert it to 8 or 16 bits")
    gray = (values.astype(np.uint32) + 128) // 257  # round(v * 255 / 65535)
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _stretch(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), _BICUBIC)


def _native(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """As large as it fits into its size without another shape, centred on black: less than half a position a side."""
    width, height = size
    scale = min(width / picture.width, height / picture.height)
    fitted = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    resized = picture.resize(fitted, _BICUBIC)
    if fitted == (width, height):
        return resized
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return canvas


def _crop(picture: Image.Image, side: int) -> Image.Image:
    """Shortest edge to `side`, then the centre."""
    width, height = picture.size
    long = int(side * max(width, height) / min(width, height))
    resized = (side, long) if width <= height else (long, side)
    if long > MAX_SIDE:
        # A strip that thin: resample only what the crop keeps. Its window is rounded to float32, so values
        # may differ by one from resizing the whole strip, which would take gigabytes.
        first = (long - side) // 2
        start, stop = (place * max(width, height) / long for place in (first, first + side))
        box = (0, start, width, stop) if width <= height else (start, 0, stop, height)
        return picture.resize((side, side), _BICUBIC, box=box)
    left, top = (resized[0] - side) // 2, (resized[1] - side) // 2
    return picture.resize(resized, _BICUBIC).crop((left, top, left + side, top + side))


def _pad(picture: Image.Image, side: int) -> Image.Image:
    """Centre on a black square, resize to `side`.

    Pillow resizes rows first, rounds to 8 bits, then resizes columns. Doing the two passes here, with the
    rows in bands, gives the same bits, and a 1,000 x 20,000 px screenshot doesn't become a square of 1.2 GB.
    """
    width, height = picture.size
    square = max(width, height)
    if square == min(width, height) or square <= side:
        canvas = Image.new("RGB", (square, square))
        canvas.paste(picture, ((square - width) // 2, (square - height) // 2))
        return canvas.resize((side, side), _BICUBIC)
    left, top = (square - width) // 2, (square - height) // 2
    rows = Image.new("RGB", (side, square))
    for start in range(0, height, _BAND_ROWS):
        stop = min(start + _BAND_ROWS, height)
        band = Image.new("RGB", (square, stop - start))
        band.paste(picture.crop((0, start, width, stop)), (left, 0))
        rows.paste(band.resize((side, stop - start), _BICUBIC), (0, top + start))
    return rows.resize((side, side), _BICUBIC)
