"""Where a Core ML package may run: static rules over its program, off a Mac.

A heuristic: Apple publishes no list of what the Neural Engine takes. Each rule says where it comes from; on a Mac
the compute plan (`plan_report`) says what Core ML really chose.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import BundleError

_FLOAT16, _FLOAT32 = 10, 11  # MILSpec.DataType
_DTYPES = {_FLOAT16: "fp16", _FLOAT32: "fp32"}
_MAX_RANK, _MAX_DIM, _MAX_POOL, _MAX_KERNEL, _BYTES = 5, 16384, 13, 13, 16 << 20

GUIDE = "Apple, Deploying Transformers on the Apple Neural Engine"
NOTES = "hollance/neural-engine, is-model-using-ane and unsupported-layers"
ELIGIBLE = frozenset(
    [
        "add",
        "avg_pool",
        "batch_norm",
        "cast",
        "clip",
        "concat",
        "conv",
        "conv_transpose",
        "expand_dims",
        "gelu",
        "instance_norm",
        "l2_norm",
        "layer_norm",
        "linear",
        "matmul",
        "max_pool",
        "maximum",
        "minimum",
        "mul",
        "pad",
        "pow",
        "real_div",
        "reduce_max",
        "reduce_mean",
        "reduce_sum",
        "relu",
        "reshape",
        "rsqrt",
        "scaled_dot_product_attention",
        "sigmoid",
        "silu",
        "slice_by_index",
        "slice_by_size",
        "softmax",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "sub",
        "tanh",
        "tile",
        "transpose",
        "upsample_bilinear",
        "upsample_nearest_neighbor",
    ]
)
_CPU_ONLY = frozenset(
    [
        "gather",
        "gather_nd",
        "scatter",
        "topk",
        "where",
        "lstm",
        "gru",
        "rnn",
        "cond",
        "while_loop",
        "non_zero",
        "argsort",
    ]
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that an op, an input or an output breaks."""

    rule: str
    where: str
    detail: str
    source: str
    blocks: bool  # whether the op is expected off the Neural Engine for it, or only slower


@dataclass(frozen=True, slots=True)
class Report:
    """What the rules say of one function.

    Attributes:
        function: its name.
        ops: op type -> how often.
        macs: multiply-accumulates by class of op.
        eligible_share: share of the MACs in ops that no blocking rule catches, 0 to 1.
        findings: every rule broken.
    """

    function: str
    ops: dict[str, int]
    macs: dict[str, int]
    eligible_share: float
    findings: tuple[Finding, ...]

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self) | {"heuristic": True}, indent=2) + "\n"

    def to_text(self) -> str:
        """The report for people."""
        total = sum(self.macs.values())
        lines = [
            f"{self.function}: {self.eligible_share:.1%} of {total / 1e9:.1f} GMAC expected on the Neural Engine "
            "(a heuristic: static rules, nothing was run)"
        ]
        lines += [f"  {name}: {value / 1e9:.2f} GMAC" for name, value in sorted(self.macs.items(), key=lambda m: -m[1])]
        lines += [f"  {f.rule}: {f.where}: {f.detail} [{f.source}]" for f in self.findings] or ["  no finding"]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Type:
    dtype: int
    shape: tuple[int | None, ...]

    @property
    def size(self) -> int:
        return math.prod(d or 0 for d in self.shape)


def report(package: Path, function: str | None = None) -> list[Report]:
    """Apply the rules to a saved package.

    Args:
        package: a .mlpackage with an ML program.
        function: only this one; default all.

    Raises:
        BundleError: not such a package, or without that function.
    """
    import coremltools as ct

    try:
        spec = ct.utils.load_spec(str(package))
        functions = dict(spec.mlProgram.functions)
    except Exception as exc:  # coremltools raises bare Exception on anything it can't read
        raise BundleError(f"{package} is no readable Core ML package: {exc}") from exc
    if function is not None and function not in functions:
        raise BundleError(f"{package} has no function {function}; it has {', '.join(sorted(functions))}")
    names = [function] if function else sorted(functions)
    return [_report_function(name, functions[name]) for name in names]


def _report_function(name: str, function: Any) -> Report:
    block = function.block_specializations[function.opset]
    types = {value.name: _type_of(value.type) for value in function.inputs}
    for op in block.operations:
        types |= {value.name: _type_of(value.type) for value in op.outputs}
    ops = [op for op in block.operations if op.type != "const" and not op.type.startswith("constexpr")]
    macs: Counter[str] = Counter()
    eligible = 0
    findings: list[Finding] = []
    for op in ops:
        found = list(_check(op, types))
        findings += found
        kind, count = _macs(op, types)
        if count:
            macs[kind] += count
            eligible += 0 if any(f.blocks for f in found) else count
    findings += [f for value in block.outputs for f in _check_edge(value, types[value])]
    total = sum(macs.values())
    kinds = dict(Counter(op.type for op in ops))
    return Report(name, kinds, dict(macs), eligible / total if total else 1.0, tuple(findings))


def _type_of(value: Any) -> _Type:
    tensor = value.tensorType
    dims = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return _Type(tensor.dataType, dims)


def _argument(op: Any, name: str) -> str:
    return str(op.inputs[name].arguments[0].name) if name in op.inputs else ""


def _macs(op: Any, types: dict[str, _Type]) -> tuple[str, int]:
    """Class and count of an op's multiply-accumulates."""
    out = types[op.outputs[0].name]
    if op.type == "conv":
        weight = types[_argument(op, "weight")].shape
        inside = math.prod(d or 0 for d in weight[1:])
        channels = types[_argument(op, "x")].shape[1]
        if all(d == 1 for d in weight[2:]):
            kind = "1x1 convolution"
        else:
            kind = "depthwise convolution" if weight[1] == 1 and channels != 1 else "other convolution"
        return kind, out.size * inside
    if op.type in ("matmul", "linear"):
        x = types[_argument(op, "x")]
        y = types[_argument(op, "weight" if op.type == "linear" else "y")]
        # Of (..., m, k) and (..., k, n), either transposed, and of (m, n): k^2 = |x| |y| / |out| per batch.
        batch = math.prod(d or 0 for d in out.shape[:-2]) if op.type == "matmul" else 1
        k = math.isqrt((x.size // batch) * (y.size // batch) // max(out.size // batch, 1))
        return "attention" if op.type == "matmul" else "linear", out.size * k
    if op.type == "scaled_dot_product_attention":
        query, key = types[_argument(op, "query")], types[_argument(op, "key")]
        return "attention", 2 * query.size * (key.shape[-2] or 0)
    return "", 0


def _check(op: Any, types: dict[str, _Type]) -> Iterator[Finding]:
    out = types[op.outputs[0].name]
    name = op.outputs[0].name

    def finding(rule: str, detail: str, source: str, blocks: bool = True) -> Finding:
        return Finding(rule, name, detail, source, blocks)

    if op.type in _CPU_ONLY:
        yield finding("cpu-only op", op.type, NOTES)
    elif op.type not in ELIGIBLE:
        yield finding("op not on the eligible list", op.type, NOTES)
    if out.dtype == _FLOAT32:
        yield finding("fp32", f"{op.type} computes in fp32; the Neural Engine is fp16 only", GUIDE)
    if None in out.shape:
        yield finding("dynamic shape", f"{op.type} {out.shape}", "coremltools 1909, 2370, 2730")
    if len(out.shape) > _MAX_RANK:
        yield finding("rank above 5", f"{op.type} has rank {len(out.shape)}", NOTES)
    if any((d or 0) > _MAX_DIM for d in out.shape):
        yield finding("dimension above 16384", f"{op.type} {out.shape}", NOTES)
    if op.type == "linear":
        yield finding("linear", "a 1x1 convolution keeps the Neural Engine's layout", GUIDE, blocks=False)
    if op.type == "layer_norm":
        yield finding("layer_norm", "reported to fail to compile at 1024 and 1536 channels on M1 and M2", GUIDE)
    kernel = types[_argument(op, "weight")].shape[2:] if op.type == "conv" else ()
    if any((side or 0) > _MAX_KERNEL for side in kernel):
        yield finding("large kernel", f"kernel {kernel}", NOTES)
    if op.type in ("avg_pool", "max_pool") and _pool_side(op) > _MAX_POOL:
        yield finding("pooling kernel above 13", f"kernel side {_pool_side(op)}", NOTES)
    if out.size * 2 > _BYTES:
        yield finding("large activation", f"{op.type} {out.size * 2 / 2**20:.0f} MiB", GUIDE, blocks=False)


def _pool_side(op: Any) -> int:
    values = op.inputs["kernel_sizes"].arguments[0].value.immediateValue.tensor.ints.values
    return max(values, default=0)


def _check_edge(name: str, kind: _Type) -> Iterator[Finding]:
    """Rules for what goes in and out: the last axis is padded to 64 bytes."""
    width = (kind.shape[-1] or 0) * (2 if kind.dtype == _FLOAT16 else 4)
    if width % 64:
        yield Finding(
            "unaligned last axis",
            name,
            f"{width} bytes a row; 64-byte multiples are not padded",
            GUIDE,
            False,
        )
    if kind.dtype == _FLOAT32:
        yield Finding("fp32 output", name, "converted from fp16 at the end", GUIDE, False)
