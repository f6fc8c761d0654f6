"""The synthetic photo that models are asked about."""

from __future__ import annotations

import io

PHOTO_SIZE = (1280, 960)  # width, height: a camera's 4:3, larger than any resolution of the published models


def sample_photo(seed: int = 0, size: tuple[int, int] = PHOTO_SIZE) -> bytes:
    """A JPEG file with the statistics of a photo, the same each time for a seed and a (width, height).

    Noise whose amplitude falls with 1 / frequency, as in natural images: a flat picture would decode and
    resize faster than a real one. A file and not an array, so that decoding counts, as it does for a user.
    """
    import numpy as np
    from PIL import Image

    width, height = size
    noise = np.random.default_rng(seed).standard_normal((height, width, 3))
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    distance[0, 0] = np.inf  # no mean
    waves = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) / distance[..., None], (height, width), axes=(0, 1))
    pixels = (127.5 + 50 * waves / waves.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
