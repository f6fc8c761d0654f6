"""Read tensors from a package's weight file, Core ML's blob storage, version 2.

A header of 64 bytes, then per tensor 64 bytes of metadata and the data, all little endian:

    header    uint32 count, uint32 version, 56 bytes reserved
    metadata  uint32 sentinel, uint32 data type, uint64 size in bytes, uint64 offset of the data,
              uint64 padding in bits, 32 bytes reserved

Source: apple/coremltools mlmodel/src/MILBlob/Blob/StorageFormat.hpp and BlobDataType.hpp.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from fastvlm_mlx.errors import BundleError

HEADER = METADATA = 64
VERSION = 2
SENTINEL = 0xDEADBEEF

# MIL's name -> (bits per value, numpy's type of an unpacked value, blob storage's number of the type).
# Types without a number (bool, int64, ...) are never in the weight file.
TYPES: dict[str, tuple[int, type[np.generic], int | None]] = {
    "fp16": (16, np.float16, 1), "fp32": (32, np.float32, 2), "fp64": (64, np.float64, None),
    "uint1": (1, np.uint8, 9), "uint2": (2, np.uint8, 10), "uint3": (3, np.uint8, 12),
    "uint4": (4, np.uint8, 11), "uint6": (6, np.uint8, 13), "uint8": (8, np.uint8, 3),
    "uint16": (16, np.uint16, 7), "uint32": (32, np.uint32, 15), "uint64": (64, np.uint64, None),
    "int4": (4, np.int8, 8), "int8": (8, np.int8, 4), "int16": (16, np.int16, 6),
    "int32": (32, np.int32, 14), "int64": (64, np.int64, None), "bool": (8, np.bool_, None),
}  # fmt: skip


def packed_bytes(dtype: str, count: int) -> int:
    """Bytes that `count` values take; those smaller than a byte are packed."""
    return math.ceil(count * TYPES[dtype][0] / 8)


def unpack(data: np.ndarray, dtype: str, count: int) -> np.ndarray:
    """Raw bytes -> `count` values, one an element.

    Args:
        data: uint8, as stored.
        dtype: MIL's name of the values' type.
        count: how many values; the last byte may hold unused bits.

    Returns:
        (count,) of numpy's type for `dtype`; uint8 or int8 where numpy has none as small.
    """
    bits, numpy_type, _ = TYPES[dtype]
    if bits >= 8:
        return data.view(np.dtype(numpy_type).newbyteorder("<"))[:count]
    # The least significant bit comes first; a value may go on in the next byte (3 and 6 bits).
    ones = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    values = np.packbits(ones, axis=1, bitorder="little")[:, 0]
    if np.issubdtype(numpy_type, np.signedinteger):
        sign = np.uint8(1 << (bits - 1))
        return (values ^ sign).astype(np.int8) - np.int8(sign)
    return values


def check_blob(path: Path, offset: int, dtype: str, count: int) -> int:
    """Look whether a tensor's metadata and data are all there.

    Args:
        path: the weight file.
        offset: where the metadata begin, from the program.
        dtype: MIL's name of the type, from the program.
        count: number of values, from the program's shape.

    Returns:
        Where the data begin.

    Raises:
        BundleError: the file is missing, truncated, or holds something else there.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER)
            file.seek(offset)
            metadata = file.read(METADATA)
    except OSError as exc:
        raise BundleError(f"{path} is missing or unreadable ({exc}); copy the whole package again") from exc
    if len(header) < HEADER or len(metadata) < METADATA:
        raise BundleError(f"{path} is truncated: {size} bytes, and a tensor should begin at {offset}")
    version = struct.unpack_from("<II", header)[1]
    sentinel, number, nbytes, start = struct.unpack_from("<IIQQ", metadata)
    if version != VERSION or sentinel != SENTINEL:
        raise BundleError(f"{path} is damaged or no weight file: found no tensor at {offset}")
    expected = TYPES[dtype][2] if dtype in TYPES else None
    if number != expected or nbytes < packed_bytes(dtype, count):
        raise BundleError(
            f"{path} doesn't fit its program: expected {count} values of {dtype} at {offset}, "
            f"found {nbytes} bytes of type {number}"
        )
    if start + nbytes > size:
        raise BundleError(f"{path} is truncated: {size} bytes, and a tensor ends at {start + nbytes}")
    return int(start)


def read_blob(path: Path, offset: int, dtype: str, count: int) -> np.ndarray:
    """Read one tensor, flat; arguments and errors as for `check_blob`."""
    start = check_blob(path, offset, dtype, count)
    # Not a memory map: that would keep the file open as long as an array lives.
    data = np.fromfile(path, np.uint8, packed_bytes(dtype, count), offset=start)
    return unpack(data, dtype, count)
