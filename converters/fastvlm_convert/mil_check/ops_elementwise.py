"""Ops that compute each element by itself, and reductions.

Source of the meaning of each op and of its defaults: coremltools 9.0, converters/mil/mil/ops/defs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from fastvlm_convert.mil_check.arguments import Arguments, Handler
from fastvlm_mlx.errors import BundleError

# The types that `cast` knows. All floats are kept as float32: execution.py does the rounding, if any.
CASTS = {
    "fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool, "int32": torch.int32,
    "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8,
}  # fmt: skip


def unary(compute: Callable[[torch.Tensor], torch.Tensor]) -> Handler:
    """An op of `x` alone."""
    return lambda args: compute(args.tensor("x"))


def binary(compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Handler:
    """An op of `x` and `y`, broadcast as numpy does."""
    return lambda args: compute(args.tensor("x"), args.tensor("y"))


def with_epsilon(compute: Callable[[torch.Tensor], torch.Tensor], default: float) -> Handler:
    """An op of `x + epsilon`."""
    return lambda args: compute(args.tensor("x") + args.number("epsilon", default))


def cast(args: Arguments) -> torch.Tensor:
    """Another type; towards zero for integers."""
    dtype = args.text("dtype")
    if dtype not in CASTS:
        raise BundleError(f"{args.label} casts to {dtype}; known are {', '.join(CASTS)}")
    value = args.tensor("x").to(CASTS[dtype])
    return value if value.dtype in (torch.float32, torch.bool) else value.to(torch.int32)


def clip(args: Arguments) -> torch.Tensor:
    """Limited to [alpha, beta]."""
    return args.tensor("x").clamp(args.number("alpha"), args.number("beta"))


def gelu(args: Arguments) -> torch.Tensor:
    """The three forms that MIL knows."""
    x, mode = args.tensor("x"), args.text("mode", "EXACT")
    if mode == "EXACT":
        return functional.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return functional.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise BundleError(f"{args.label} has the unknown mode {mode!r}")


def leaky_relu(args: Arguments) -> torch.Tensor:
    """`alpha * x` below zero."""
    return functional.leaky_relu(args.tensor("x"), args.number("alpha", 0.01))


def softmax(args: Arguments) -> torch.Tensor:
    """Along one axis."""
    return torch.softmax(args.tensor("x"), args.integer("axis", -1))


def reduction(compute: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Handler:
    """An op along `axes`, all by default; `keep_dims` leaves them there with size 1."""

    def handler(args: Arguments) -> torch.Tensor:
        x = args.tensor("x")
        axes = args.ints("axes", list(range(x.ndim)))
        return compute(x, axes, args.flag("keep_dims", False))

    return handler


HANDLERS: dict[str, Handler] = {
    "abs": unary(torch.abs),
    "add": binary(torch.add),
    "cast": cast,
    "clip": clip,
    "erf": unary(torch.erf),
    "exp": unary(torch.exp),
    "gelu": gelu,
    "identity": unary(lambda x: x),
    "inverse": with_epsilon(torch.reciprocal, 1e-4),
    "leaky_relu": leaky_relu,
    "log": with_epsilon(torch.log, 1e-45),
    "maximum": binary(torch.maximum),
    "minimum": binary(torch.minimum),
    "mul": binary(torch.mul),
    "pow": binary(torch.pow),
    "real_div": binary(torch.div),
    "reduce_l2_norm": reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "reduce_max": reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_mean": reduction(lambda x, axes, keep: x.mean(axes, keep)),
    "reduce_min": reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_sum": reduction(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_sum_square": reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
    "relu": unary(torch.relu),
    "rsqrt": with_epsilon(torch.rsqrt, 1e-12),
    "sigmoid": unary(torch.sigmoid),
    "silu": unary(functional.silu),
    "softmax": softmax,
    "sqrt": unary(torch.sqrt),
    "square": unary(torch.square),
    "sub": binary(torch.sub),
    "tanh": unary(torch.tanh),
}
