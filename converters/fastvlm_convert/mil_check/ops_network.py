"""Ops that mix values: convolutions, products, pooling, normalisation, attention.

Source of the meaning of each op and of its defaults: coremltools 9.0, converters/mil/mil/ops/defs.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from fastvlm_convert.mil_check.arguments import Arguments, Handler, from_start
from fastvlm_mlx.errors import BundleError

CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}  # by rank
AVERAGES = {3: functional.avg_pool1d, 4: functional.avg_pool2d, 5: functional.avg_pool3d}
MAXIMA = {3: functional.max_pool1d, 4: functional.max_pool2d, 5: functional.max_pool3d}

Pads = list[tuple[int, int]]  # before and after, for each spatial axis


def padding(args: Arguments, sizes: list[int], kernel: list[int], stride: list[int]) -> Pads:
    """What `pad_type` and `pad` say.

    Args:
        args: of a convolution or a pooling.
        sizes: of the input's spatial axes.
        kernel: extent of the kernel on each axis, dilation included.
        stride: on each axis.
    """
    pad_type, pad = args.text("pad_type", "valid"), args.ints("pad", [0] * (2 * len(sizes)))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":  # `pad` counts for this type only
        return list(zip(pad[::2], pad[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise BundleError(f"{args.label} has the unknown pad_type {pad_type!r}")
    pads = []
    for size, extent, step in zip(sizes, kernel, stride, strict=True):
        total = max(0, step * math.ceil(size / step) - size + extent - step)
        less, more = total // 2, total - total // 2
        # The odd one is at the end for `same` (TensorFlow's SAME becomes it), at the start for `same_lower`.
        pads.append((less, more) if pad_type == "same" else (more, less))
    return pads


def pad_by_hand(x: torch.Tensor, pads: Pads, value: float = 0.0) -> torch.Tensor:
    """Pad the spatial axes; torch wants the last axis first."""
    return functional.pad(x, [amount for pair in reversed(pads) for amount in pair], value=value)


def conv(args: Arguments) -> torch.Tensor:
    """Convolution in 1, 2 or 3 dimensions."""
    x, weight, bias = args.tensor("x"), args.tensor("weight"), args.optional("bias")
    ones = [1] * (x.ndim - 2)
    stride, dilation = args.ints("strides", ones), args.ints("dilations", ones)
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    pads = padding(args, list(x.shape[2:]), extent, stride)
    if any(before != after for before, after in pads):
        x, pads = pad_by_hand(x, pads), [(0, 0)] * len(pads)
    even = [before for before, _ in pads]
    groups = args.integer("groups", 1)
    return CONVOLUTIONS[x.ndim](x, weight, bias, stride, even, dilation, groups)


def avg_pool(args: Arguments) -> torch.Tensor:
    """Mean of each window; padding counts as zeros unless `exclude_padding_from_average`."""
    x, kernel, stride, pads, ceil = _pooling(args)
    exclude, pool = args.flag("exclude_padding_from_average", False), AVERAGES[x.ndim]
    if _torch_can_pad(kernel, pads):
        even = [before for before, _ in pads]
        return pool(x, kernel, stride, even, ceil_mode=ceil, count_include_pad=not exclude)
    mean = pool(pad_by_hand(x, pads), kernel, stride, ceil_mode=ceil)
    if exclude:
        mean = mean / pool(pad_by_hand(torch.ones_like(x), pads), kernel, stride, ceil_mode=ceil)
    return mean


def max_pool(args: Arguments) -> torch.Tensor:
    """Largest of each window; padding never counts."""
    x, kernel, stride, pads, ceil = _pooling(args)
    if _torch_can_pad(kernel, pads):
        even = [before for before, _ in pads]
        return MAXIMA[x.ndim](x, kernel, stride, even, ceil_mode=ceil)
    return MAXIMA[x.ndim](pad_by_hand(x, pads, -math.inf), kernel, stride, ceil_mode=ceil)


def _pooling(args: Arguments) -> tuple[torch.Tensor, list[int], list[int], Pads, bool]:
    x, kernel = args.tensor("x"), args.ints("kernel_sizes")
    stride = args.ints("strides", [1] * (x.ndim - 2))
    pads = padding(args, list(x.shape[2:]), kernel, stride)
    ceil = args.flag("ceil_mode", False)
    if ceil and not _torch_can_pad(kernel, pads):
        raise BundleError(f"{args.label} has ceil_mode with padding {pads}, which MIL doesn't allow")
    return x, kernel, stride, pads, ceil


def _torch_can_pad(kernel: list[int], pads: Pads) -> bool:
    return all(before == after and before <= size // 2 for size, (before, after) in zip(kernel, pads, strict=True))


def linear(args: Arguments) -> torch.Tensor:
    """`x @ weight.T + bias`."""
    return functional.linear(args.tensor("x"), args.tensor("weight"), args.optional("bias"))


def matmul(args: Arguments) -> torch.Tensor:
    """Product over the last two axes, either of them swapped first; the axes before are broadcast."""
    x, y = args.tensor("x"), args.tensor("y")
    swap_x, swap_y = args.flag("transpose_x", False), args.flag("transpose_y", False)
    if swap_x and x.ndim > 1:
        x = x.transpose(-1, -2)
    if swap_y and y.ndim > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


def einsum(args: Arguments) -> torch.Tensor:
    """As the equation says."""
    return torch.einsum(args.text("equation"), *args.tensors("values"))


def batch_norm(args: Arguments) -> torch.Tensor:
    """With stored mean and variance, per channel (axis 1)."""
    return functional.batch_norm(
        args.tensor("x"),
        args.tensor("mean"),
        args.tensor("variance"),
        args.optional("gamma"),
        args.optional("beta"),
        eps=args.number("epsilon", 1e-5),
    )


def instance_norm(args: Arguments) -> torch.Tensor:
    """Over the spatial axes of each picture and channel."""
    gamma, beta = args.optional("gamma"), args.optional("beta")
    return functional.instance_norm(args.tensor("x"), weight=gamma, bias=beta, eps=args.number("epsilon", 1e-5))


def layer_norm(args: Arguments) -> torch.Tensor:
    """Over `axes`, all by default; gamma and beta have those axes only."""
    x, gamma, beta = args.tensor("x"), args.optional("gamma"), args.optional("beta")
    axes = sorted(from_start(axis, x.ndim) for axis in args.ints("axes", list(range(x.ndim))))
    epsilon = args.number("epsilon", 1e-5)
    shape = [size for axis, size in enumerate(x.shape) if axis in axes]
    if axes == list(range(x.ndim - len(axes), x.ndim)):
        return functional.layer_norm(x, shape, gamma, beta, epsilon)
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + epsilon)
    broadcast = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    y = y * gamma.reshape(broadcast) if gamma is not None else y
    return y + beta.reshape(broadcast) if beta is not None else y


def attention(args: Arguments) -> torch.Tensor:
    """softmax(q k^T / sqrt(width) + mask) v; a mask of flags lets through where it's true (iOS 18)."""
    query, key, value = (args.tensor(name) for name in ("query", "key", "value"))
    return functional.scaled_dot_product_attention(query, key, value, args.optional("attn_mask"))


HANDLERS: dict[str, Handler] = {
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "conv": conv,
    "einsum": einsum,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "max_pool": max_pool,
    "scaled_dot_product_attention": attention,
}
