"""Images on their way to the decoder: hashed when they come in, encoded when their features are needed, once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from fastvlm_mlx.cache import DIGEST_BYTES
from fastvlm_mlx.config import DOWNSAMPLING
from fastvlm_mlx.errors import EncoderError, ImageError
from fastvlm_mlx.image import file_of, name_of, open_bytes, open_image
from fastvlm_mlx.types import ImageFeatures
from fastvlm_mlx.vision.anyres import merge

if TYPE_CHECKING:
    from PIL import Image

    from fastvlm_mlx.projector import MLPProjector
    from fastvlm_mlx.timing import Clock
    from fastvlm_mlx.types import ImageInput
    from fastvlm_mlx.views import View
    from fastvlm_mlx.vision.anyres import Layout
    from fastvlm_mlx.vision.base import Encoder

_LARGEST_FILE = 256 << 20  # bytes that are read to tell a file by its content; of larger ones Pillow reads a part
_KNOWN_SOURCES = 4096  # files whose pixels' digest is remembered; 64 bytes each


@dataclass(slots=True)
class Picture:
    """An image of a prompt.

    Attributes:
        digest: DIGEST_BYTES that stand for the preprocessed pixels, size and layout included.
        size: (height, width) in pixels of the preprocessed image, or of the grid that it was cut into.
        make_pixels: makes them, where they weren't needed for the digest: (H, W, 3) uint8, or (T, S, S, 3) of tiles.
        layout: how it was cut into tiles, None where it wasn't.
        downsampling: pixels per side of a position.
        begun: waits for its features, once the encoder has begun.
    """

    digest: bytes
    size: tuple[int, int]
    make_pixels: Callable[[], np.ndarray] = field(repr=False)
    layout: Layout | None = None
    downsampling: int = DOWNSAMPLING
    begun: Callable[[], mx.array] | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """Positions that it takes in a prompt."""
        if self.layout:
            return self.layout.tokens
        return (self.size[0] // self.downsampling) * (self.size[1] // self.downsampling)

    @property
    def needs_newline(self) -> bool:
        """Whether only a projector with AnyRes' line break can embed it."""
        return self.layout is not None and self.layout.merge == "spatial_unpad"

    def batch(self) -> np.ndarray:
        """(B, H, W, 3) uint8 for the encoder: one image, or all tiles."""
        pixels = self.make_pixels()
        return pixels if self.layout else pixels[None]


def picture_of(pixels: np.ndarray, layout: Layout | None = None, downsampling: int = DOWNSAMPLING) -> Picture:
    """A picture of preprocessed pixels.

    Args:
        pixels: (H, W, 3) uint8, or (T, S, S, 3) of tiles.
        layout: of the tiles.
        downsampling: pixels per side of a position, where there is no layout to say it.
    """
    if layout:  # in the digest as well: the same tiles give other positions where they are merged in another way
        return Picture(_digest(pixels.tobytes(), pixels.shape, layout), layout.pixels, lambda: pixels, layout)
    size = pixels.shape[0], pixels.shape[1]
    return Picture(_digest(pixels.tobytes(), pixels.shape), size, lambda: pixels, downsampling=downsampling)


def picture_as(picture: Image.Image, view: View) -> Picture:
    """An upright RGB picture in the size and the shape of a view."""
    return picture_of(view.pixels(picture), view.layout(picture.size), view.downsampling)


def _digest(data: bytes, *more: object) -> bytes:
    return blake2b(
        data, digest_size=DIGEST_BYTES, person=blake2b(repr(more).encode(), digest_size=16).digest()
    ).digest()


class FeatureCache:
    """Features of pictures, at most so many bytes, the least recently used dropped first.

    Args:
        max_bytes: of features and embeddings; 0 keeps nothing.

    Attributes:
        clock: how often something was asked for or kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.clock = 0
        self._kept: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self._used: dict[bytes, int] = {}  # by the clock, what is kept

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(_nbytes(features) for features in self._kept.values())

    def get(self, digest: bytes) -> ImageFeatures | None:
        """A picture's features, if they are kept."""
        if digest in self._kept:
            self._mark(digest)
        return self._kept.get(digest)

    def used_since(self, digest: bytes, clock: int) -> bool:
        """Whether somebody asked for a picture's features after a moment of `clock`."""
        return self._used.get(digest, 0) > clock

    def put(self, digest: bytes, features: ImageFeatures) -> None:
        """Keep a picture's features."""
        self._kept[digest] = features
        self._mark(digest)
        size = self.nbytes
        while size > self.max_bytes:
            oldest = next(iter(self._kept))
            size -= _nbytes(self._kept[oldest])
            self.drop(oldest)

    def drop(self, digest: bytes) -> None:
        """Forget a picture's features, if they are kept."""
        self._kept.pop(digest, None)
        self._used.pop(digest, None)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._used.clear()

    def _mark(self, digest: bytes) -> None:
        self.clock += 1
        self._used[digest] = self.clock
        self._kept.move_to_end(digest)


def _nbytes(features: ImageFeatures) -> int:
    return features.features.nbytes + features.embeddings.nbytes


class Vision:
    """Everything from an image input to what the decoder sees of it.

    Args:
        encoder: the vision encoder; None for a bundle without vision weights.
        projector: features to embeddings.
        cache_bytes: of features that are kept for later; 0 keeps none.

    Attributes:
        intended: what `device` was at first: the encoder that was asked for, before one stood in for it.
    """

    def __init__(self, encoder: Encoder | None, projector: MLPProjector, cache_bytes: int) -> None:
        self.encoder, self.projector = encoder, projector
        self.intended = self.device
        self.cache = FeatureCache(cache_bytes)
        self._lock = threading.Lock()  # `open` may be called from threads that read ahead
        # Digest, size and layout of a picture by its file and view.
        self._sources: OrderedDict[bytes, tuple[bytes, tuple[int, int], Layout | None]] = OrderedDict()

    @property
    def device(self) -> str:
        """What runs the encoder."""
        return self.encoder.device if self.encoder else "none"

    def forget(self) -> None:
        """Forget the features of earlier images, and which files they came from."""
        self.cache.clear()
        with self._lock:
            self._sources.clear()

    @property
    def runs_beside(self) -> bool:
        """Whether it encodes on other hardware than MLX's, so that both can work at once."""
        return bool(self.encoder and self.encoder.runs_beside)

    def open(self, image: ImageInput, view: View) -> Picture:
        """Identify an image; decodes and resizes it unless the same file was seen before.

        Args:
            image: as in `image.preprocess`.
            view: of `views.view_of`.

        Raises:
            ImageError: as `image.preprocess`. EncoderError: the bundle has no vision weights.
        """
        if self.encoder is None:
            raise EncoderError(
                "this bundle has no vision weights for MLX (Apple's MLX exports hold them only as a Core ML "
                "package); convert the PyTorch checkpoint to ask about images"
            )
        data = _bytes_of(image) if self.cache.max_bytes else None
        if data is None:
            return picture_as(open_image(image), view)
        name, source = name_of(image), _digest(data, view)
        with self._lock:
            known = self._sources.get(source)
            if known:
                self._sources.move_to_end(source)
        if known:
            digest, size, layout = known
            return Picture(
                digest, size, lambda: view.pixels(open_bytes(data, name)), layout, downsampling=view.downsampling
            )
        found = picture_as(open_bytes(data, name), view)
        with self._lock:
            self._sources[source] = found.digest, found.size, found.layout
            if len(self._sources) > _KNOWN_SOURCES:
                self._sources.popitem(last=False)
        return found

    def begin(self, picture: Picture) -> None:
        """Start to encode a picture whose features aren't known; `features` waits for them."""
        if picture.begun is None and self.cache.get(picture.digest) is None:
            assert self.encoder
            picture.begun = self.encoder.begin(picture.batch())

    def features(self, picture: Picture, clock: Clock) -> ImageFeatures:
        """A picture's features and embeddings, evaluated; each stage's time is added to the clock."""
        kept = self.cache.get(picture.digest)
        if kept:
            return kept
        if picture.begun is None:
            pixels = picture.batch()
            clock.preprocess += clock.watch.lap()
            assert self.encoder
            picture.begun = self.encoder.begin(pixels)
        features, picture.begun = picture.begun(), None
        mx.eval(features)
        clock.vision += clock.watch.lap()
        embeddings, layout = self.projector(features), picture.layout
        embeddings = merge(embeddings, layout, self.projector.newline) if layout else embeddings[0]
        mx.eval(embeddings)
        clock.projector += clock.watch.lap()
        found = ImageFeatures(features if layout else features[0], embeddings, picture.size)
        self.cache.put(picture.digest, found)
        return found


def _bytes_of(image: ImageInput) -> bytes | None:
    """What a file holds, or bytes; None for what has to be decoded to be known, and for what can't be read."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        try:
            path = Path(file_of(os.fspath(image)))
            small = path.is_file() and path.stat().st_size <= _LARGEST_FILE
            return path.read_bytes() if small else None
        except (OSError, ImageError):
            return None  # opening it will say why
    return None
