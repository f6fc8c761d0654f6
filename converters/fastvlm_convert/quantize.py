"""Affine quantisation of matrices, block of rows by block of rows."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from fastvlm_mlx.bundle import QUANTIZED_BITS, QUANTIZED_GROUPS
from fastvlm_mlx.errors import InputError

ROWS_BYTES = 64 << 20  # a float32 block of this size; an embedding of a gigabyte never lies there twice


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bits per weight, and how many weights of a row share a scale and a bias."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        """Raise InputError for widths that MLX's kernels don't have."""
        if self.bits not in QUANTIZED_BITS:
            raise InputError(f"--q-bits must be one of {_listed(QUANTIZED_BITS)}, got {self.bits}")
        if self.group_size not in QUANTIZED_GROUPS:
            raise InputError(f"--q-group-size must be one of {_listed(QUANTIZED_GROUPS)}, got {self.group_size}")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor can be quantised: a matrix whose rows divide into groups."""
        return len(shape) == 2 and shape[1] % self.group_size == 0

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the packed weight (uint32) and of scales and biases, for an (out, in) matrix."""
        rows, columns = shape
        return (rows, columns * self.bits // 32), (rows, columns // self.group_size)


def quantize(weight: mx.array, width: Quantization) -> tuple[mx.array, mx.array, mx.array]:
    """Quantise an (out, in) matrix along its rows; the scales have its dtype.

    Returns:
        Packed weight (uint32), scales and biases, evaluated.
    """
    step = max(1, ROWS_BYTES // (4 * weight.shape[1]))
    parts: list[tuple[mx.array, ...]] = []
    for start in range(0, weight.shape[0], step):
        part = mx.quantize(weight[start : start + step], group_size=width.group_size, bits=width.bits)
        mx.eval(part)
        parts.append(tuple(part))
    packed, scales, biases = (mx.concatenate(list(column)) for column in zip(*parts, strict=True))
    mx.eval(packed, scales, biases)
    return packed, scales, biases


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
