"""8-bit weights: an int8 for each weight of a matrix, a float16 scale for each block of 32 inputs.

Measured on FastViTHD, this scheme has the least error of the 8-bit ones, on average over pictures (README has the
table). coremltools does the packing; `packed` says what it must leave, so that a package is checked against
values that weren't read from it. Carrying rounding errors on, as fastvlm_convert.rounding does, doesn't pay here:
the errors are so large that what is carried is noise (1.9e-2 instead of 1.6e-2 on the tiny encoder).
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 32  # inputs that share a scale
LEAST_ELEMENTS = 10_000  # smaller matrices would save nothing worth their error
_LEVELS = 127
_PASS = "compression::linear_quantize_weights"


def fits(weights: np.ndarray) -> bool:
    """Whether a parameter is packed: big matrices (O, I) of 1x1 convolutions with whole blocks."""
    return weights.ndim == 2 and weights.size >= LEAST_ELEMENTS and weights.shape[1] % BLOCK == 0


def packed(weights: np.ndarray) -> np.ndarray:
    """What is left of float16 weights (O, I) after coremltools packs them: float32 (O, I)."""
    blocks = weights.astype(np.float16).reshape(len(weights), -1, BLOCK)
    scale = _scale(np.abs(blocks).max(axis=2, keepdims=True))
    levels = np.clip(np.round(blocks / np.where(scale, scale, np.float16(1))), -_LEVELS, _LEVELS)
    left: np.ndarray = (levels.astype(np.float16) * scale).astype(np.float32).reshape(weights.shape)
    return left


def _scale(peak: np.ndarray) -> np.ndarray:
    """A block's scale from its largest magnitude, in float16 as coremltools computes it."""
    scale: np.ndarray = (peak - -peak) / np.float16(2 * _LEVELS)
    return scale


def add_to(pipeline: Any) -> None:
    """Have a coremltools conversion pack the big matrices, as its last pass.

    Compressing a finished model instead would run all passes again, and fuse LayerNorm.
    """
    import coremltools.optimize.coreml as cto

    scheme = cto.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype="int8",
        granularity="per_block",
        block_size=BLOCK,
        weight_threshold=LEAST_ELEMENTS - 1,  # packed from one element more on
    )
    pipeline.append_pass(_PASS)
    pipeline.set_options(_PASS, {"config": cto.OptimizationConfig(global_config=scheme)})
