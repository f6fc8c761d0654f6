"""The seam between the model and whatever runs FastViTHD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fastvlm_mlx.config import DOWNSAMPLING
from fastvlm_mlx.errors import ResolutionError

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


def check_side(pixels: int) -> None:
    """Raise ResolutionError unless an image side can be cut into whole tokens."""
    if pixels < DOWNSAMPLING or pixels % DOWNSAMPLING:
        below = max(pixels // DOWNSAMPLING, 1) * DOWNSAMPLING
        raise ResolutionError(
            f"resolution must be a multiple of {DOWNSAMPLING} pixels, got {pixels}; "
            f"the nearest are {below} and {below + DOWNSAMPLING}"
        )
