"""Ops that move values and compute none.

Source of the meaning of each op and of its defaults: coremltools 9.0, converters/mil/mil/ops/defs.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from fastvlm_convert.mil_check.arguments import Arguments, Handler, from_start
from fastvlm_mlx.errors import BundleError


def concat(args: Arguments) -> torch.Tensor:
    """Along an existing axis, one after the other or, with `interleave`, element by element in turn."""
    values, axis = args.tensors("values"), args.integer("axis")
    if not args.flag("interleave", False):
        return torch.cat(values, axis)
    axis = from_start(axis, values[0].ndim)
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def expand_dims(args: Arguments) -> torch.Tensor:
    """New axes of size 1; `axes` count in the result."""
    x, axes = args.tensor("x"), args.ints("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(from_start(axis, rank) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def pad(args: Arguments) -> torch.Tensor:
    """`pad` has (before, after) for each of the last axes, the first of them first."""
    x, amounts, mode = args.tensor("x"), args.ints("pad"), args.text("mode", "constant")
    fill = args.number("constant_val", 0.0)
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    last_first = [amount for pair in reversed(pairs) for amount in pair]  # torch's order
    if mode == "constant":
        return functional.pad(x, last_first, value=fill)
    if mode in ("reflect", "replicate"):
        while len(last_first) > 2 and last_first[-2:] == [0, 0]:  # torch wants no pair for batch and channels
            del last_first[-2:]
        return functional.pad(x, last_first, mode=mode)
    raise BundleError(f"{args.label} has the unknown mode {mode!r}")


def reshape(args: Arguments) -> torch.Tensor:
    """-1 stands for what remains, 0 for the size of the axis as far from the end (iOS 17), 1 beyond."""
    x, shape = args.tensor("x"), args.ints("shape")
    for i, size in enumerate(shape):
        if size == 0:
            axis = x.ndim - (len(shape) - i)
            shape[i] = x.shape[axis] if axis >= 0 else 1
    return x.reshape(shape)


def slice_by_index(args: Arguments) -> torch.Tensor:
    """Numpy's slices; a begin or end whose mask is set is left open, a squeezed axis takes one index."""
    x = args.tensor("x")
    none = [0] * x.ndim
    begin, end, stride = args.ints("begin"), args.ints("end"), args.ints("stride", [1] * x.ndim)
    open_begin, open_end = args.ints("begin_mask", none), args.ints("end_mask", none)
    squeeze = args.ints("squeeze_mask", none)
    for axis in range(x.ndim):
        size = x.shape[axis]
        first = None if open_begin[axis] else begin[axis]
        if squeeze[axis]:
            x = x.narrow(axis, from_start(first or 0, size), 1)
            continue
        indices = range(size)[slice(first, None if open_end[axis] else end[axis], stride[axis])]
        x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
    for axis in reversed([axis for axis, flag in enumerate(squeeze) if flag]):
        x = x.squeeze(axis)
    return x


def slice_by_size(args: Arguments) -> torch.Tensor:
    """`size` elements from `begin`; -1 for all that remain."""
    x = args.tensor("x")
    for axis, (begin, size) in enumerate(zip(args.ints("begin"), args.ints("size"), strict=True)):
        begin = from_start(begin, x.shape[axis])
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def split(args: Arguments) -> tuple[torch.Tensor, ...]:
    """Into pieces of given or equal sizes."""
    x, axis = args.tensor("x"), args.integer("axis")
    count = args.integer("num_splits") if args.has("num_splits") else None
    if args.has("split_sizes"):
        return tuple(torch.split(x, args.ints("split_sizes"), axis))
    if count is None or x.shape[axis] % count:
        raise BundleError(f"{args.label} can't split {x.shape[axis]} into {count} equal parts")
    return tuple(torch.split(x, x.shape[axis] // count, axis))


def squeeze(args: Arguments) -> torch.Tensor:
    """Without the axes, all of size 1 by default; one of another size stays."""
    x = args.tensor("x")
    axes = args.ints("axes", list(range(x.ndim)))
    return x.squeeze(tuple(axes))


def stack(args: Arguments) -> torch.Tensor:
    """Along a new axis."""
    return torch.stack(args.tensors("values"), args.integer("axis"))


def tile(args: Arguments) -> torch.Tensor:
    """Repeated as a whole along each axis."""
    return args.tensor("x").repeat(args.ints("reps"))


def transpose(args: Arguments) -> torch.Tensor:
    """Axes in another order."""
    return args.tensor("x").permute(args.ints("perm"))


HANDLERS: dict[str, Handler] = {
    "concat": concat,
    "expand_dims": expand_dims,
    "pad": pad,
    "reshape": reshape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
