"""A case for each MIL op: how it's built, and what it means, written out in numpy.

Source of the definitions: coremltools 9.0, converters/mil/mil/ops/defs. Import after coremltools is known to be there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.mil_programs import quiet, windows

with quiet():
    from coremltools.converters.mil.mil import Builder as mb

RANDOM = np.random.default_rng(3)


def constant(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """An op with its parameters.

    Attributes:
        op: MIL's name.
        build: makes it of inputs called x, y and z.
        right: what it should make of them, in float64: an array, or a list for several outputs.
        shapes: of the inputs.
        positive: inputs in (0.5, 2) instead of normal ones.
        unused: the parameters that have no effect here by MIL's own definition.
    """

    op: str
    build: Callable[..., Any]
    right: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    positive: bool = False
    unused: tuple[str, ...] = ()

    def inputs(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(5)
        make = (lambda s: random.uniform(0.5, 2, s)) if self.positive else (lambda s: random.normal(size=s) * 1.5)
        return {name: make(shape).astype(np.float32) for name, shape in zip("xyz", self.shapes, strict=False)}


def unary(op: str, right: Callable[[np.ndarray], np.ndarray], positive: bool = False, **parameters: Any) -> Case:
    return Case(op, lambda x: getattr(mb, op)(x=x, **parameters), right, ((2, 3, 4),), positive)


def binary(op: str, right: Callable[[np.ndarray, np.ndarray], np.ndarray], positive: bool = False) -> Case:
    return Case(op, lambda x, y: getattr(mb, op)(x=x, y=y), right, ((2, 3, 4), (3, 1)), positive)


def of_x(op: str, x_shape: tuple[int, ...], right: Callable[[np.ndarray], Any], unused: tuple[str, ...] = (),
         **parameters: Any) -> Case:  # fmt: skip
    """An op of `x`; `right` gets what numpy needs from its closure."""
    return Case(op, lambda x: getattr(mb, op)(x=x, **parameters), right, (x_shape,), unused=unused)


erf = np.vectorize(math.erf)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


ELEMENTWISE = {
    "abs": unary("abs", np.abs),
    "erf": unary("erf", erf),
    "exp": unary("exp", np.exp),
    "relu": unary("relu", lambda x: np.maximum(x, 0)),
    "sigmoid": unary("sigmoid", sigmoid),
    "silu": unary("silu", lambda x: x * sigmoid(x)),
    "square": unary("square", np.square),
    "sqrt": unary("sqrt", np.sqrt, positive=True),
    "tanh": unary("tanh", np.tanh),
    "identity": unary("identity", lambda x: x),
    "log": unary("log", lambda x: np.log(x + 0.25), positive=True, epsilon=np.float32(0.25)),
    "inverse": unary("inverse", lambda x: 1 / (x + 0.25), positive=True, epsilon=np.float32(0.25)),
    "rsqrt": unary("rsqrt", lambda x: 1 / np.sqrt(x + 0.25), positive=True, epsilon=np.float32(0.25)),
    "rsqrt default": unary("rsqrt", lambda x: 1 / np.sqrt(x), positive=True),
    "leaky_relu": unary("leaky_relu", lambda x: np.where(x < 0, 0.2 * x, x), alpha=np.float32(0.2)),
    "clip": unary("clip", lambda x: np.clip(x, -0.5, 0.75), alpha=np.float32(-0.5), beta=np.float32(0.75)),
    "gelu": unary("gelu", lambda x: x * (1 + erf(x / np.sqrt(2))) / 2, mode="EXACT"),
    "gelu tanh": unary("gelu", lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
                       mode="TANH_APPROXIMATION"),
    "gelu sigmoid": unary("gelu", lambda x: x * sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
    "cast to integers": Case("cast", lambda x: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"),
                             np.trunc, ((36,),)),
    "cast to flags": Case("cast", lambda x: mb.cast(x=mb.cast(x=mb.relu(x=x), dtype="bool"), dtype="fp32"),
                          lambda x: x > 0, ((36,),)),
    "softmax": unary("softmax", lambda x: softmax(x, 1), axis=1),
    "softmax default": unary("softmax", lambda x: softmax(x, -1)),
    "add": binary("add", np.add),
    "sub": binary("sub", np.subtract),
    "mul": binary("mul", np.multiply),
    "real_div": binary("real_div", np.divide, positive=True),
    "pow": binary("pow", np.power, positive=True),
    "maximum": binary("maximum", np.maximum),
    "minimum": binary("minimum", np.minimum),
    "reduce_mean": unary("reduce_mean", lambda x: x.mean((0, 2)), axes=[0, -1]),
    "reduce_mean all": unary("reduce_mean", np.mean),
    "reduce_sum": unary("reduce_sum", lambda x: x.sum(1, keepdims=True), axes=[1], keep_dims=True),
    "reduce_max": unary("reduce_max", lambda x: x.max((1, 2), keepdims=True), axes=[-1, 1], keep_dims=True),
    "reduce_min": unary("reduce_min", lambda x: x.min(0), axes=[0]),
    "reduce_sum_square": unary("reduce_sum_square", lambda x: (x**2).sum(2), axes=[2]),
    "reduce_l2_norm": unary("reduce_l2_norm", lambda x: np.sqrt((x**2).sum(2)), axes=[2]),
}  # fmt: skip

SHAPES = {
    "reshape": of_x("reshape", (2, 3, 4), lambda x: x.reshape(4, 6), shape=[4, -1]),
    "reshape zeros": of_x("reshape", (2, 12), lambda x: x.reshape(1, 1, 2, 12), shape=[1, 0, -1, 0]),
    "transpose": of_x("transpose", (2, 3, 4), lambda x: x.transpose(2, 0, 1), perm=[-1, 0, 1]),
    "squeeze": of_x("squeeze", (1, 3, 1, 4), lambda x: x[0], axes=[0]),
    "squeeze all": of_x("squeeze", (1, 3, 1, 4), np.squeeze),
    "expand_dims": of_x("expand_dims", (3, 4), lambda x: x[None, :, :, None], axes=[-1, 0]),
    "pad": of_x("pad", (2, 3, 4), lambda x: np.pad(x, [(0, 0), (0, 1), (2, 3)], constant_values=0.5),
                pad=[0, 1, 2, 3], mode="constant", constant_val=np.float32(0.5)),
    "pad reflect": of_x("pad", (1, 2, 4, 4), lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2), (3, 0)], "reflect"),
                        unused=("constant_val",), pad=[0, 0, 0, 0, 1, 2, 3, 0], mode="reflect"),
    "pad replicate": of_x("pad", (1, 2, 4, 4), lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2), (3, 0)], "edge"),
                          unused=("constant_val",), pad=[1, 2, 3, 0], mode="replicate"),
    "tile": of_x("tile", (2, 3), lambda x: np.tile(x, (2, 3)), reps=[2, 3]),
    "slice_by_size": of_x("slice_by_size", (4, 6), lambda x: x[1:3, 2:], begin=[1, 2], size=[2, -1]),
    "slice_by_index": of_x("slice_by_index", (4, 6, 5), lambda x: x[1:-1, ::-2, 3], unused=("begin", "end"),
                           begin=[1, 2, 3], end=[-1, 4, 0], stride=[1, -2, 1], begin_mask=[False, True, False],
                           end_mask=[False, True, False], squeeze_mask=[False, False, True]),
    "slice_by_index plain": of_x("slice_by_index", (4, 6), lambda x: x[1:3, 0:5:2],
                                   begin=[1, 0], end=[3, 5], stride=[1, 2]),
    "split even": of_x("split", (2, 6), lambda x: np.split(x, 3, 1), num_splits=3, axis=1),
    "split uneven": of_x("split", (2, 6), lambda x: np.split(x, [1, 3], -1), split_sizes=[1, 2, 3], axis=-1),
    "stack": Case("stack", lambda x, y: mb.stack(values=(x, y), axis=-1),
                  lambda x, y: np.stack([x, y], -1), ((3, 4),) * 2),
    "concat": Case("concat", lambda x, y: mb.concat(values=(x, y), axis=-2),
                   lambda x, y: np.concatenate([x, y]), ((3, 4), (2, 4))),
    "concat interleaved": Case("concat", lambda x, y: mb.concat(values=(x, y), axis=1, interleave=True),
                               lambda x, y: np.stack([x, y], 2).reshape(3, 8), ((3, 4),) * 2),
}  # fmt: skip


def convolution(shape: tuple[int, ...], kernel: tuple[int, ...], stride: list[int], pads: list[int],
                dilation: list[int] | None = None, groups: int = 1, **parameters: Any) -> Case:  # fmt: skip
    """`pads` is what numpy pads by; `parameters` say the same in MIL's words."""
    weight, bias = constant(6, shape[1] // groups, *kernel), constant(6)
    dilation = dilation or [1] * len(stride)

    def right(x: np.ndarray) -> np.ndarray:
        found = windows(x, kernel, stride, pads, dilation)
        parts = np.split(found, groups, 1)
        axes = tuple(range(-len(kernel), 0))
        made = [
            np.tensordot(part, w, ((1, *(axis % part.ndim for axis in axes)), (1, *axes)))
            for part, w in zip(parts, np.split(weight, groups), strict=True)
        ]
        return np.moveaxis(np.concatenate(made, -1), -1, 1) + bias.reshape(-1, *[1] * len(kernel))

    def build(x: Any) -> Any:
        return mb.conv(x=x, weight=weight, bias=bias, strides=stride, dilations=dilation, groups=groups, **parameters)

    unused = () if parameters["pad_type"] == "custom" else ("pad",)
    return Case("conv", build, right, (shape,), unused=unused)


def pooling(
    op: str,
    kernel: list[int],
    stride: list[int],
    right: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...] = (1, 2, 7, 8),
    unused: tuple[str, ...] = (),
    **parameters: Any,
) -> Case:
    unused += () if parameters["pad_type"] == "custom" else ("pad",)
    return of_x(op, shape, right, unused, kernel_sizes=kernel, strides=stride, **parameters)


def mean_of(kernel: list[int], stride: list[int], pads: list[int], inside: bool = False) -> Callable[[np.ndarray], Any]:
    def right(x: np.ndarray) -> np.ndarray:
        axes = tuple(range(-len(kernel), 0))
        mean = windows(x, kernel, stride, pads).mean(axes)
        return mean / windows(np.ones_like(x), kernel, stride, pads).mean(axes) if inside else mean

    return right


def max_of(kernel: list[int], stride: list[int], pads: list[int]) -> Callable[[np.ndarray], Any]:
    return lambda x: windows(x, kernel, stride, pads, fill=-np.inf).max(tuple(range(-len(kernel), 0)))


WINDOWS = {
    "conv valid": convolution((1, 4, 7, 8), (3, 3), [1, 1], [0] * 4, pad_type="valid"),
    "conv custom": convolution((2, 4, 7, 8), (3, 5), [2, 1], [1, 1, 2, 2], pad_type="custom", pad=[1, 1, 2, 2]),
    "conv uneven": convolution((1, 4, 7, 8), (3, 3), [2, 2], [0, 1, 2, 0], pad_type="custom", pad=[0, 1, 2, 0]),
    "conv same": convolution((1, 4, 7, 8), (3, 3), [2, 2], [1, 1, 0, 1], pad_type="same"),
    "conv same, even kernel": convolution((1, 4, 7, 8), (2, 4), [1, 1], [0, 1, 1, 2], pad_type="same"),
    "conv same_lower": convolution((1, 4, 7, 8), (2, 4), [1, 1], [1, 0, 2, 1], pad_type="same_lower"),
    "conv dilated": convolution((1, 4, 9, 9), (2, 3), [1, 1], [1, 2, 2, 2], [3, 2], pad_type="same"),
    "conv grouped": convolution((1, 4, 7, 8), (3, 3), [1, 1], [0] * 4, groups=2, pad_type="valid"),
    "conv depthwise": convolution((1, 6, 8, 8), (7, 7), [2, 2], [3] * 4, groups=6, pad_type="custom", pad=[3] * 4),
    "conv 1-D": convolution((1, 4, 9), (3,), [2], [1, 1], pad_type="custom", pad=[1, 1]),
    "conv 3-D": convolution((1, 4, 4, 5, 6), (2, 3, 3), [1, 2, 1], [0] * 6, pad_type="valid"),
    "conv without bias": of_x("conv", (1, 4, 4, 4),
                              lambda x: windows(x, [3, 3], [1, 1], [0] * 4).sum((1, 4, 5))[:, None], ("pad",),
                              weight=np.ones((1, 4, 3, 3), np.float32)),
    "avg_pool": pooling("avg_pool", [2, 3], [2, 1], mean_of([2, 3], [2, 1], [0] * 4), pad_type="valid",
                        unused=("exclude_padding_from_average", "ceil_mode")),
    # The window that hangs over the end is averaged over what it covers.
    "avg_pool ceil": pooling("avg_pool", [2, 2], [2, 2], mean_of([2, 2], [2, 2], [0, 1, 0, 0], inside=True),
                             pad_type="valid", ceil_mode=True, unused=("exclude_padding_from_average",)),
    "avg_pool padded": pooling("avg_pool", [3, 3], [2, 2], mean_of([3, 3], [2, 2], [1] * 4), pad_type="custom",
                               pad=[1] * 4, unused=("ceil_mode",)),
    "avg_pool inside": pooling("avg_pool", [3, 3], [2, 2], mean_of([3, 3], [2, 2], [1] * 4, inside=True),
                               pad_type="custom", pad=[1] * 4, exclude_padding_from_average=True,
                               unused=("ceil_mode",)),
    "avg_pool same": pooling("avg_pool", [3, 2], [2, 1], mean_of([3, 2], [2, 1], [1, 1, 0, 1], inside=True),
                             pad_type="same", exclude_padding_from_average=True),
    "max_pool": pooling("max_pool", [3, 3], [2, 2], max_of([3, 3], [2, 2], [1] * 4), pad_type="custom", pad=[1] * 4,
                        unused=("ceil_mode",)),
    "max_pool same": pooling("max_pool", [3, 2], [2, 1], max_of([3, 2], [2, 1], [1, 1, 1, 0]), pad_type="same_lower"),
    "max_pool 1-D": pooling("max_pool", [3], [1], max_of([3], [1], [0, 0]), (1, 2, 9), pad_type="valid",
                            unused=("ceil_mode",)),
}  # fmt: skip

WEIGHT, BIAS = constant(5, 4), constant(5)
MEAN, VARIANCE, GAMMA, BETA = constant(4), np.abs(constant(4)) + 0.5, constant(4), constant(4)


def per_channel(values: np.ndarray) -> np.ndarray:
    return values.reshape(1, -1, 1, 1)


def normalised(x: np.ndarray, axes: int | tuple[int, ...], epsilon: float = 1e-5) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | float = 0.0) -> np.ndarray:
    return softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + mask, -1) @ v


def attention(**parameters: Any) -> Callable[..., Any]:
    return lambda x, y, z: mb.scaled_dot_product_attention(query=x, key=y, value=z, **parameters)


FLAGS = np.array([[True, False, True], [False, True, True]])
QKV = ((1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 3, 5))
PRODUCTS = {
    "linear": of_x("linear", (2, 3, 4), lambda x: x @ WEIGHT.T + BIAS, weight=WEIGHT, bias=BIAS),
    "linear without bias": of_x("linear", (3, 4), lambda x: x @ WEIGHT.T, weight=WEIGHT),
    "matmul": Case("matmul", lambda x, y: mb.matmul(x=x, y=y), np.matmul, ((2, 3, 4, 4), (3, 4, 4))),
    "matmul x^T": Case("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_x=True),
                       lambda x, y: x.swapaxes(-1, -2) @ y, ((2, 4, 4), (2, 4, 4))),
    "matmul y^T": Case("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_y=True),
                       lambda x, y: x @ y.swapaxes(-1, -2), ((2, 4, 4), (2, 4, 4))),
    "einsum of 3 axes": Case("einsum", lambda x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"),
                             lambda x, y: np.einsum("chw,whr->chr", x, y), ((2, 3, 4), (4, 3, 5))),
    "einsum of 4 axes": Case("einsum", lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
                             lambda x, y: np.einsum("nchw,nwhu->nchu", x, y), ((2, 3, 4, 5), (2, 5, 4, 6))),
    "batch_norm": of_x("batch_norm", (1, 4, 3, 3),
                       lambda x: (x - per_channel(MEAN)) / np.sqrt(per_channel(VARIANCE) + 0.01)
                       * per_channel(GAMMA) + per_channel(BETA),
                       mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=np.float32(0.01)),
    "instance_norm": of_x("instance_norm", (2, 4, 3, 3),
                          lambda x: normalised(x, (2, 3), 0.01) * per_channel(GAMMA) + per_channel(BETA),
                          gamma=GAMMA, beta=BETA, epsilon=np.float32(0.01)),
    "layer_norm": of_x("layer_norm", (2, 3, 4), lambda x: normalised(x, -1, 0.01) * GAMMA + BETA, axes=[-1],
                       gamma=GAMMA, beta=BETA, epsilon=np.float32(0.01)),
    "layer_norm over channels": of_x("layer_norm", (2, 4, 3),
                                     lambda x: normalised(x, 1, 0.01) * GAMMA[:, None] + BETA[:, None],
                                     axes=[1], gamma=GAMMA, beta=BETA, epsilon=np.float32(0.01)),
    "layer_norm over all": of_x("layer_norm", (2, 4, 3), lambda x: normalised(x, (0, 1, 2)), axes=[0, 1, 2]),
    "attention": Case("scaled_dot_product_attention", attention(), attend, QKV),
    "attention, added mask": Case("scaled_dot_product_attention", attention(attn_mask=FLAGS.astype(np.float32)),
                                  lambda q, k, v: attend(q, k, v, FLAGS), QKV),
    "attention, flags": Case("scaled_dot_product_attention", attention(attn_mask=FLAGS),
                             lambda q, k, v: attend(q, k, v, np.where(FLAGS, 0, -np.inf)), QKV),
}  # fmt: skip
CASES = ELEMENTWISE | SHAPES | WINDOWS | PRODUCTS
