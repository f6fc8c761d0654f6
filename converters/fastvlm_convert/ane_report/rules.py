"""The rules: what keeps an op off the Neural Engine or slows it there, and where that is said.

The sources are Apple's article, and what others measured or read off the compiler. They differ in places and by
generation of the engine; where they do, the rule takes the stricter one or doesn't block, and its comment says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastvlm_convert.ane_report.operation import Op, size
from fastvlm_convert.mil_check.program import DYNAMIC, ValueInfo

APPLE = "Apple, Deploying Transformers on the Apple Neural Engine (2022)"
LIMITS = "sbryngelson/ane-guide, chapter 17 and appendix A"
LAYERS = "hollance/neural-engine, unsupported-layers"
POOLS = "hollance/neural-engine, issue 2"

MAX_RANK, MAX_SIDE = 5, 16384
MAX_KERNEL_WIDTH, MAX_KERNEL_HEIGHT, MAX_DILATION = 13, 29, 8
STRIDES = (1, 2, 3, 4, 8)
MAX_POOL, MAX_POOL_STRIDE = 13, 2
AFFINE_FAILS_FROM = 1024
ROW_BYTES, MAX_BYTES = 64, 16 << 20
# As the Neural Engine holds them: it has no fp32.
_BYTES = {"fp16": 2, "fp32": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1}

_ELIGIBLE = """
    abs add avg_pool batch_norm cast clip concat conv conv_transpose depth_to_space einsum elu erf exp expand_dims gelu
    identity instance_norm inverse l2_norm l2_pool layer_norm leaky_relu linear log matmul max_pool maximum minimum mul
    pad pixel_shuffle pixel_unshuffle pow prelu real_div reduce_max reduce_mean reduce_min reduce_sum reduce_sum_square
    relu relu6 reshape rsqrt scaled_dot_product_attention sigmoid sigmoid_hard silu slice_by_index slice_by_size softmax
    softplus softsign space_to_depth split sqrt square squeeze stack sub tanh tile transpose upsample_bilinear
    upsample_nearest_neighbor
"""
# The gathers run on newer engines in some shapes, and so does topk, but a compute plan on an M3 had both on the CPU.
_CPU_ONLY = """
    argsort band_part cond gather gather_along_axis gather_nd gru list_gather list_length list_read list_scatter
    list_write lstm make_list non_maximum_suppression non_zero one_hot random_bernoulli random_categorical random_normal
    random_uniform range_1d reverse_sequence rnn scatter scatter_along_axis scatter_nd shape sliding_windows topk
    while_loop
"""
ELIGIBLE, CPU_ONLY = frozenset(_ELIGIBLE.split()), frozenset(_CPU_ONLY.split())
_CONTROL_FLOW = ("cond", "while_loop")
_POOLS = ("avg_pool", "max_pool", "l2_pool")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        name: what it is about.
        source: who says so.
        blocks: whether an op that breaks it is expected off the Neural Engine, or only slower.
    """

    name: str
    source: str
    blocks: bool = True


CPU_OP = Rule("cpu-only op", f"{LAYERS}; {LIMITS}; roboflow/rf-detr, pull request 1495")
UNLISTED_OP = Rule("op not on the eligible list", LIMITS)
FP32 = Rule("fp32", f"hollance/neural-engine, 16-bit; {LIMITS}")
INTEGERS = Rule("int32", LIMITS)
DYNAMIC_SHAPE = Rule("dynamic shape", "apple/coremltools, issues 1909, 2370 and 2730")
RANK = Rule("rank above 5", LIMITS)
SIDE = Rule("dimension above 16384", LIMITS)
KERNEL = Rule("large kernel", LIMITS)
CONV_3D = Rule("3-d convolution", "sbryngelson/ane-guide, chapter 4")
STRIDE = Rule("stride outside 1, 2, 3, 4, 8", LIMITS, blocks=False)  # compiles, as a chain of smaller strides
DILATION = Rule("dilation", f"{LAYERS}, says never; {LIMITS}, up to 8")
POOL = Rule("pooling kernel above 13", POOLS)
POOL_STRIDE = Rule("pooling stride above 2", POOLS)
LINEAR = Rule("linear", APPLE, blocks=False)
LAST_AXIS = Rule("last-axis transpose", APPLE, blocks=False)
AFFINE = Rule("layer_norm with affine", "sbryngelson/ANEForge, issues 149 and 162")
ACTIVATION = Rule("large activation", f"{APPLE}; the threshold is this report's", blocks=False)
ROW = Rule("unaligned last axis", APPLE, blocks=False)
SINGLETON = Rule("singleton last axis", APPLE, blocks=False)
FP32_EDGE = Rule("fp32 input or output", LIMITS, blocks=False)


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that an op, an input or an output breaks.

    Attributes:
        rule: its name.
        op: MIL's name of the op; "input" or "output" for what goes into or out of the function.
        where: name of the value, or of the op's first output.
        detail: what was found.
        source: who says so.
        blocks: whether the op is expected off the Neural Engine for it, or only slower.
    """

    rule: str
    op: str
    where: str
    detail: str
    source: str
    blocks: bool


def check_op(op: Op) -> list[Finding]:
    """The rules that an op breaks."""
    return [
        Finding(rule.name, op.type, op.name, detail, rule.source, blocks)
        for check in _CHECKS
        for rule, detail, blocks in check(op)
    ]


def check_edge(value: ValueInfo, kind: str) -> list[Finding]:
    """The rules that a function's input or output breaks.

    Args:
        value: its type. An image is none of them: Core ML makes the tensor itself.
        kind: "input" or "output".
    """
    found: list[tuple[Rule, str]] = []
    if value.dtype == "fp32":
        found.append((FP32_EDGE, "converted off the Neural Engine"))
    side = value.shape[-1] if value.shape else 1
    row = side * _BYTES.get(value.dtype, 4)
    if side == 1:
        found.append((SINGLETON, f"{value.shape}: each value is padded to {ROW_BYTES} bytes"))
    elif side != DYNAMIC and row % ROW_BYTES:
        found.append((ROW, f"{value.shape}: rows of {row} bytes are padded to multiples of {ROW_BYTES}"))
    return [Finding(rule.name, kind, value.name, detail, rule.source, rule.blocks) for rule, detail in found]


_Broken = Iterator[tuple[Rule, str, bool]]  # a rule, what was found, and whether it blocks


def _kind(op: Op) -> _Broken:
    if op.type in CPU_ONLY:
        inside = "; what it runs isn't looked into" if op.type in _CONTROL_FLOW else ""
        yield CPU_OP, op.type + inside, CPU_OP.blocks
    elif op.type not in ELIGIBLE:
        yield UNLISTED_OP, op.type, UNLISTED_OP.blocks


def _types(op: Op) -> _Broken:
    # A cast at the entrance takes fp32 and makes fp16: that is said once, of the input.
    taken = [] if op.type == "cast" else op.activations()
    types = {value.dtype for value in (*taken, *op.outputs)}
    if "fp32" in types:
        yield FP32, "takes or makes fp32; the Neural Engine has fp16 alone", FP32.blocks
    if wide := sorted(types & {"int32", "int64", "uint32", "uint64"}):
        yield INTEGERS, f"takes or makes {', '.join(wide)}", INTEGERS.blocks


def _shapes(op: Op) -> _Broken:
    shapes = [value.shape for value in (*op.activations(), *op.outputs)]
    for rule, broken in (
        (DYNAMIC_SHAPE, [s for s in shapes if DYNAMIC in s]),
        (RANK, [s for s in shapes if len(s) > MAX_RANK]),
        (SIDE, [s for s in shapes if max(s, default=0) > MAX_SIDE]),
    ):
        if broken:
            yield rule, str(broken[0]), rule.blocks
    largest = max((size(v.shape) * _BYTES.get(v.dtype, 4) for v in op.outputs), default=0)
    if largest > MAX_BYTES:
        yield ACTIVATION, f"makes {largest / 2**20:.1f} MiB", ACTIVATION.blocks


def _convolutions(op: Op) -> _Broken:
    if op.type not in ("conv", "conv_transpose"):
        return
    kernel = op.shape("weight")[2:]
    if len(kernel) == 3:
        yield CONV_3D, f"kernel {kernel}", CONV_3D.blocks
    # The narrower limit is of the last axis, in fp16, on the M1.
    if kernel[-1] > MAX_KERNEL_WIDTH or max(kernel) > MAX_KERNEL_HEIGHT:
        yield KERNEL, f"kernel {kernel}", KERNEL.blocks
    if any(step not in STRIDES for step in op.ints("strides")):
        yield STRIDE, f"strides {op.ints('strides')}", STRIDE.blocks
    if (dilation := max(op.ints("dilations"), default=1)) > 1:
        yield DILATION, f"dilations {op.ints('dilations')}", dilation > MAX_DILATION


def _pooling(op: Op) -> _Broken:
    if op.type not in _POOLS:
        return
    for rule, parameter, limit in ((POOL, "kernel_sizes", MAX_POOL), (POOL_STRIDE, "strides", MAX_POOL_STRIDE)):
        if max(op.ints(parameter), default=0) > limit:
            yield rule, f"{parameter} {op.ints(parameter)}", rule.blocks


def _layout(op: Op) -> _Broken:
    if op.type == "linear" or (op.type == "matmul" and (op.is_constant("x") or op.is_constant("y"))):
        yield LINEAR, "a 1x1 convolution keeps the Neural Engine's layout", LINEAR.blocks
    if op.type == "transpose":
        rank, perm = len(op.outputs[0].shape), op.ints("perm")
        if perm and perm[-1] not in (-1, rank - 1):
            yield LAST_AXIS, f"perm {perm}: copies the tensor", LAST_AXIS.blocks


def _layer_norm(op: Op) -> _Broken:
    if op.type != "layer_norm":
        return
    for parameter, neutral in (("gamma", 1), ("beta", 0)):
        if not op.tensors(parameter):
            continue
        values = op.read(parameter)
        if values is None or (values != neutral).any():
            channels = size(op.shape(parameter))
            yield AFFINE, f"{channels} channels; fails to compile on M1 and M2 from 1024", channels >= AFFINE_FAILS_FROM
            return  # once an op


_CHECKS: tuple[Callable[[Op], _Broken], ...] = (
    _kind,
    _types,
    _shapes,
    _convolutions,
    _pooling,
    _layout,
    _layer_norm,
)
