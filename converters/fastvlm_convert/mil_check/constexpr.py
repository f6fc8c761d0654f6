"""Compressed constants: what each `constexpr_*` op stands for, as coremltools writes them.

Results have the type that the op declares (float16 mostly), whatever the program is executed in: Core ML
expands them to that type before anything is computed.

Each op exists in two forms: up to iOS 17 with bit-packed uint8 data and an explicit shape, from iOS 18 with
small integer types and per-block tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fastvlm_convert.mil_check.arguments import Arguments, from_start
from fastvlm_convert.mil_check.blob import unpack
from fastvlm_mlx.errors import BundleError

Arrays = tuple[np.ndarray, ...]


def affine_dequantize(args: Arguments) -> Arrays:
    """`scale * (quantized_data - zero_point)`, both along one axis or one for all (iOS 16)."""
    data, scale, zero = (args.array(name) for name in ("quantized_data", "scale", "zero_point"))
    shape = [1] * data.ndim
    shape[args.integer("axis")] = -1
    difference = data.astype(np.float32) - zero.astype(np.float32).reshape(shape if zero.ndim else ())
    return ((difference * scale.reshape(shape if scale.ndim else ())).astype(scale.dtype),)


def blockwise_shift_scale(args: Arguments) -> Arrays:
    """`scale * (data - offset)`, with one scale and offset for each block (iOS 18)."""
    offset = args.array("offset") if args.has("offset") else None
    return (_shift_scale(args.array("data"), args.array("scale"), offset),)


def lut_to_dense(args: Arguments) -> Arrays:
    """Indices into a table -> the table's values."""
    lut = args.array("lut")
    if args.has("shape"):  # iOS 16: one table, indices packed as tight as they go
        shape, bits = args.ints("shape"), int(math.log2(lut.size))
        indices = unpack(args.array("indices"), f"uint{bits}", math.prod(shape))
        return (lut.reshape(-1)[indices].reshape(shape),)
    axis = args.integer("vector_axis") if args.has("vector_axis") else None
    return (_look_up(args.array("indices"), lut, axis),)


def sparse_to_dense(args: Arguments) -> Arrays:
    """Values where the mask has a one, zero elsewhere."""
    mask = args.array("mask")
    if args.has("shape"):  # iOS 16: one bit for each element
        shape = args.ints("shape")
        mask = unpack(mask, "uint1", math.prod(shape)).reshape(shape)
    return (_scatter(args.array("nonzero_data"), mask),)


def lut_to_sparse(args: Arguments) -> Arrays:
    """A table's values for the non-zero elements only: (mask, values) (iOS 18)."""
    mask, lut = args.array("indices_mask"), args.array("lut")
    axis = args.integer("vector_axis") if args.has("vector_axis") else None
    dense = _look_up(_scatter(args.array("indices_nonzero_data"), mask), lut, axis)
    if axis is not None:
        mask = np.repeat(mask, lut.shape[-1], axis=axis)
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(args: Arguments) -> Arrays:
    """Scaled and shifted values of the non-zero elements only: (mask, values) (iOS 18)."""
    mask = args.array("data_mask")
    offset = args.array("offset") if args.has("offset") else None
    dense = _shift_scale(_scatter(args.array("nonzero_data"), mask), args.array("scale"), offset)
    return mask, dense[mask != 0]


def cast(args: Arguments) -> Arrays:
    """The same values in another type; MIL knows float16 -> float32 only."""
    dtype = args.text("output_dtype")
    if dtype != "fp32":
        raise BundleError(f"{args.label} casts to {dtype}; constexpr_cast makes fp32 only")
    return (args.array("source_val").astype(np.float32),)


def _per_element(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat one value a block to one an element; the first axes of `blocks` are those of `shape`."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] not in (1, size):  # numpy broadcasts the other two by itself
            blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return blocks


def _shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    # In float32, then rounded once: the same bits as in float16, as the integers have at most 9 bits.
    values: np.ndarray = data.astype(np.float32)
    if offset is not None:
        values -= _per_element(offset.astype(np.float32), data.shape)
    values *= _per_element(scale, data.shape)
    return values.astype(scale.dtype)


def _look_up(indices: np.ndarray, lut: np.ndarray, vector_axis: int | None) -> np.ndarray:
    """Per-block tables.

    Args:
        indices: (d1, ..., dk).
        lut: (b1, ..., bk, entries, V): a table for each block, whose entries are vectors of V values.
        vector_axis: the axis along which the vectors are laid out; None for V = 1.
    """
    rank, size = indices.ndim, lut.shape[-1]
    if size > 1 and vector_axis is None:
        raise BundleError(f"a palette of vectors of {size} values needs a vector_axis")
    # The number of each element's table; the tables themselves aren't repeated.
    tables = np.arange(math.prod(lut.shape[:rank])).reshape(lut.shape[:rank])
    vectors: np.ndarray = lut.reshape(-1, *lut.shape[-2:])[_per_element(tables, indices.shape), indices]
    axis = from_start(vector_axis or 0, rank)
    shape = [n * size if i == axis else n for i, n in enumerate(indices.shape)]
    return np.moveaxis(vectors, -1, axis + 1).reshape(shape)


def _scatter(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask != 0] = values
    return dense


EXPANDERS: dict[str, Callable[[Arguments], Arrays]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
