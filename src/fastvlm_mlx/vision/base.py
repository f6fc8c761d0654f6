"""The seam between the model and whatever runs FastViTHD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np


class Encoder(Protocol):
    """Turns preprocessed images into vision features."""

    @property
    def device(self) -> str:
        """What really runs it, such as "MLX (cpu)"."""

    def encode(self, pixels: np.ndarray) -> mx.array:
        """Encode a batch of images of one size.

        Args:
            pixels: (B, H, W, 3) uint8, RGB; H and W are multiples of 64 pixels.

        Returns:
            (B, N, C) with N = (H / 64) * (W / 64) tokens, row-major over the image. Lazy: evaluate it to
            wait for it.

        Raises:
            ResolutionError: a side isn't a multiple of 64, or the encoder lacks that size.
        """
