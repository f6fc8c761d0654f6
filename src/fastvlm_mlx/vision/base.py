"""The seam between the model and whatever runs the vision encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx
    import numpy as np


class Encoder(Protocol):
    """Turns preprocessed images into vision features."""

    @property
    def device(self) -> str:
        """What really runs it, such as "MLX (cpu)"."""

    @property
    def runs_beside(self) -> bool:
        """Whether it leaves MLX's device alone, so that a decoder can run there in the meantime."""

    def begin(self, pixels: np.ndarray) -> Callable[[], mx.array]:
        """Start to encode, without waiting; the result is `encode`'s, once it is called for. Errors come then."""

    def encode(self, pixels: np.ndarray) -> mx.array:
        """Encode a batch of images of one size.

        Args:
            pixels: (B, H, W, 3) uint8, RGB; H and W are multiples of 64 pixels (FastViT: 32).

        Returns:
            (B, N, C) with N = (H / 64) * (W / 64) tokens (FastViT: by 32), row-major over the image. Lazy: evaluate it
            to wait for it; a large batch may be evaluated already, part by part.

        Raises:
            ResolutionError: a side isn't such a multiple, or the encoder lacks that size.
        """
