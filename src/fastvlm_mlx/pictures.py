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
from fastvlm_mlx.image import file_of, fit, name_of, open_bytes, preprocess
from fastvlm_mlx.types import ImageFeatures

if TYPE_CHECKING:
    from fastvlm_mlx.projector import MLPProjector
    from fastvlm_mlx.timing import Clock
    from fastvlm_mlx.types import ImageInput
    from fastvlm_mlx.vision.base import Encoder

_LARGEST_FILE = 256 << 20  # bytes that are read to tell a file by its content; of larger ones Pillow reads a part
_KNOWN_SOURCES = 4096  # files whose pixels' digest is remembered; 64 bytes each


@dataclass(slots=True)
class Picture:
    """An image of a prompt.

    Attributes:
        digest: DIGEST_BYTES that stand for the preprocessed pixels, size included.
        size: (height, width) of the preprocessed image in pixels.
        make_pixels: makes them, where they weren't needed for the digest.
        begun: waits for its features, once the encoder has begun.
    """

    digest: bytes
    size: tuple[int, int]
    make_pixels: Callable[[], np.ndarray] = field(repr=False)
    begun: Callable[[], mx.array] | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """Positions that it takes in a prompt."""
        return (self.size[0] // DOWNSAMPLING) * (self.size[1] // DOWNSAMPLING)


def picture_of(pixels: np.ndarray) -> Picture:
    """A picture of preprocessed (H, W, 3) uint8 pixels."""
    return Picture(_digest(pixels.tobytes(), pixels.shape), (pixels.shape[0], pixels.shape[1]), lambda: pixels)


def _digest(data: bytes, *more: object) -> bytes:
    return blake2b(
        data, digest_size=DIGEST_BYTES, person=blake2b(repr(more).encode(), digest_size=16).digest()
    ).digest()


class FeatureCache:
    """Features of pictures, at most so many bytes, the least recently used dropped first.

    Args:
        max_bytes: of features and embeddings; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[bytes, ImageFeatures] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(_nbytes(features) for features in self._kept.values())

    def get(self, digest: bytes) -> ImageFeatures | None:
        """A picture's features, if they are kept."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def put(self, digest: bytes, features: ImageFeatures) -> None:
        """Keep a picture's features."""
        self._kept[digest] = features
        self._kept.move_to_end(digest)
        size = self.nbytes
        while size > self.max_bytes:
            size -= _nbytes(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def _nbytes(features: ImageFeatures) -> int:
    return features.features.nbytes + features.embeddings.nbytes


class Vision:
    """Everything from an image input to what the decoder sees of it.

    Args:
        encoder: runs FastViTHD; None for a bundle without vision weights.
        projector: features to embeddings.
        cache_bytes: of features that are kept for later; 0 keeps none.
    """

    def __init__(self, encoder: Encoder | None, projector: MLPProjector, cache_bytes: int) -> None:
        self.encoder, self.projector = encoder, projector
        self.cache = FeatureCache(cache_bytes)
        self._lock = threading.Lock()  # `open` may be called from threads that read ahead
        # Digest and size of a picture by its file, side and aspect.
        self._sources: OrderedDict[bytes, tuple[bytes, tuple[int, int]]] = OrderedDict()

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

    def open(self, image: ImageInput, side: int, aspect: str) -> Picture:
        """Identify an image; decodes and resizes it unless the same file was seen before.

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
            return picture_of(preprocess(image, side, aspect))
        name, source = name_of(image), _digest(data, side, aspect)
        with self._lock:
            known = self._sources.get(source)
            if known:
                self._sources.move_to_end(source)
        if known:
            return Picture(*known, lambda: fit(open_bytes(data, name), side, aspect))
        found = picture_of(fit(open_bytes(data, name), side, aspect))
        with self._lock:
            self._sources[source] = found.digest, found.size
            if len(self._sources) > _KNOWN_SOURCES:
                self._sources.popitem(last=False)
        return found

    def begin(self, picture: Picture) -> None:
        """Start to encode a picture whose features aren't known; `features` waits for them."""
        if picture.begun is None and self.cache.get(picture.digest) is None:
            assert self.encoder
            picture.begun = self.encoder.begin(picture.make_pixels()[None])

    def features(self, picture: Picture, clock: Clock) -> ImageFeatures:
        """A picture's features and embeddings, evaluated; each stage's time is added to the clock."""
        kept = self.cache.get(picture.digest)
        if kept:
            return kept
        if picture.begun is None:
            pixels = picture.make_pixels()
            clock.preprocess += clock.watch.lap()
            assert self.encoder
            picture.begun = self.encoder.begin(pixels[None])
        features, picture.begun = picture.begun(), None
        mx.eval(features)
        clock.vision += clock.watch.lap()
        embeddings = self.projector(features)
        mx.eval(embeddings)
        clock.projector += clock.watch.lap()
        found = ImageFeatures(features[0], embeddings[0], picture.size)
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
