"""Multiply-accumulates of an op, by class. With shapes that aren't fixed, a lower bound."""

from __future__ import annotations

from collections.abc import Callable

from fastvlm_convert.ane_report.operation import Op, size

Count = tuple[str, int]


def count_macs(op: Op) -> Count:
    """Class and number of an op's multiply-accumulates; 0 for ops that multiply no matrices."""
    counter = _COUNTERS.get(op.type)
    return counter(op) if counter else ("", 0)


def _conv(op: Op) -> Count:
    weight = op.shape("weight")  # (out, in / groups, *kernel), or (in, out / groups, *kernel) transposed
    # Every output is a sum over the kernel; transposed, every input is spread over it.
    values = op.shape("x") if op.type == "conv_transpose" else op.outputs[0].shape
    if all(side == 1 for side in weight[2:]):
        kind = "1x1 convolution"
    else:
        depthwise = weight[1] == 1 and op.shape("x")[1] != 1
        kind = "depthwise convolution" if depthwise else "other convolution"
    return kind, size(values) * size(weight[1:])


def _linear(op: Op) -> Count:
    return "linear", size(op.outputs[0].shape) * size(op.shape("x")[-1:])


def _matmul(op: Op) -> Count:
    x = op.shape("x")
    summed = x[-2] if len(x) > 1 and any(op.ints("transpose_x")) else x[-1]
    # With a constant it's a layer of weights, whatever the op; of two activations it's attention.
    kind = "linear" if op.is_constant("x") or op.is_constant("y") else "attention"
    return kind, size(op.outputs[0].shape) * size((summed,))


def _attention(op: Op) -> Count:
    """Of (..., L, E), (..., S, E) and (..., S, V): the scores, then the weighted sum."""
    made = op.outputs[0].shape
    keys = size(op.shape("key")[-2:-1])
    return "attention", size(made[:-1]) * keys * size(op.shape("query")[-1:]) + size(made) * keys


def _einsum(op: Op) -> Count:
    """Each letter is a loop."""
    equation = op.read("equation")
    sides: dict[str, int] = {}
    if equation is not None:
        for letters, value in zip(str(equation).split("->")[0].split(","), op.tensors("values"), strict=True):
            sides |= dict(zip(letters.strip(), value.shape, strict=True))
    return "attention", size(tuple(sides.values()))


def _recurrent(op: Op) -> Count:
    """(sequence, batch, input): each step multiplies by all the matrices."""
    weights = (size(op.shape(name)) for name in op.source.inputs if name.startswith("weight_"))
    return "recurrent", size(op.shape("x")[:2]) * sum(weights)


_COUNTERS: dict[str, Callable[[Op], Count]] = {
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn": _recurrent,
}
