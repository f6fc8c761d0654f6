"""The static rules of a package's placement, each against its harmless neighbour."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.ane_report import report
from support.ane_programs import MAP, conv, mb, rewrite, save, zeros
from support.mil_programs import operations, save_program


def ramp(size):
    return np.arange(size).astype(np.float16)


def kernels(x):
    return conv(x, (29, 13), "fits"), conv(x, (1, 14), "wide"), conv(x, (30, 1), "high")


def strides(x):
    return [conv(x, (1, 1), f"s{s}", strides=[1, s]) for s in (1, 2, 3, 4, 5, 7, 8)]


def dilations(x):
    return [conv(x, (3, 1), f"d{d}", dilations=[d, 1]) for d in (1, 2, 8, 9)]


def transposed(x):
    names = {"small": (1, 13), "wide": (1, 14)}
    return [mb.conv_transpose(x=x, weight=zeros(4, 4, *kernel), name=name) for name, kernel in names.items()]


def conv_3d(x):
    return conv(x, (1, 1, 1), "deep")


def pool(x, name, sides, **options):
    return mb.max_pool(x=x, kernel_sizes=sides, pad_type="valid", name=name, **options)


def pools(x):
    average = mb.avg_pool(x=x, kernel_sizes=[14, 1], pad_type="valid", name="average")
    fine = pool(x, "fine", [13, 13]), pool(x, "strided", [2, 2], strides=[2, 2])
    return *fine, average, pool(x, "wide", [1, 14]), pool(x, "jump", [3, 3], strides=[1, 3])


def transposes(x):
    perms = {"kept": [0, 2, 1, 3], "kept_negative": [0, 2, 1, -1], "moved": [0, 1, 3, 2], "negative": [0, 1, -1, -2]}
    return [mb.transpose(x=x, perm=perm, name=name) for name, perm in perms.items()]


def norms(x, small):
    plain = mb.layer_norm(x=x, axes=[-1], name="plain")
    neutral = mb.layer_norm(x=x, axes=[-1], gamma=zeros(1024) + 1, beta=zeros(1024), name="neutral")
    scaled = mb.layer_norm(x=x, axes=[-1], gamma=ramp(1024), beta=zeros(1024), name="scaled")
    shifted = mb.layer_norm(x=x, axes=[-1], gamma=zeros(1024) + 1, beta=ramp(1024), name="shifted")
    return plain, neutral, scaled, shifted, mb.layer_norm(x=small, axes=[-1], gamma=ramp(1023), name="small")


def layers(x, y):
    linear = mb.linear(x=x, weight=zeros(64, 64), name="linear")
    matmul = mb.matmul(x=x, y=zeros(64, 64), name="matmul")
    return linear, matmul, mb.matmul(x=zeros(64, 64), y=x, name="left"), mb.matmul(x=x, y=y, name="activations")


def sides(x):
    return mb.tile(x=x, reps=[1, 512], name="fits"), mb.relu(x=mb.tile(x=x, reps=[1, 513], name="long"), name="taken")


def sizes(x):
    return mb.tile(x=x, reps=[1, 512, 1], name="fits"), mb.tile(x=x, reps=[1, 513, 1], name="large")


def types(x):
    half = mb.relu(x=mb.cast(x=x, dtype="fp16", name="entrance"), name="half")
    compared = mb.cast(x=mb.greater(x=x, y=np.float32(0), name="compared"), dtype="fp16", name="of_flags")
    return mb.cast(x=half, dtype="fp32", name="exit"), mb.relu(x=x, name="float"), compared


def integers(x):
    whole = mb.cast(x=x, dtype="int32", name="to")
    return mb.cast(x=whole, dtype="fp16", name="back"), mb.cast(
        x=mb.add(x=whole, y=1, name="sum"), dtype="fp16", name="back2"
    )


def kinds(x):
    indices = np.array([0, 1], np.int32)
    picked = mb.gather(x=x, indices=indices, axis=0, name="gather")
    best, _ = mb.topk(x=x, k=2, axis=1, output_indices_dtype="uint16", name="topk")
    return mb.relu(x=x, name="relu"), picked, best, mb.cumsum(x=x, axis=0, name="cumsum")


def branches(x):
    flag = mb.squeeze(x=mb.greater(x=mb.reduce_max(x=x, axes=[0, 1], keep_dims=True), y=np.float16(0)), name="flag")
    return mb.cond(pred=flag, _true_fn=lambda: mb.relu(x=x), _false_fn=lambda: mb.tanh(x=x), name="branch")


CASES = [
    (kernels, [MAP], {("large kernel", "wide", True), ("large kernel", "high", True)}),
    (strides, [MAP], {("stride outside 1, 2, 3, 4, 8", name, False) for name in ("s5", "s7")}),
    (dilations, [MAP], {("dilation", "d2", False), ("dilation", "d8", False), ("dilation", "d9", True)}),
    (transposed, [MAP], {("large kernel", "wide", True)}),
    (conv_3d, [(1, 4, 8, 8, 32)], {("3-d convolution", "deep", True)}),
    (
        pools,
        [MAP],
        {
            ("pooling kernel above 13", "average", True),
            ("pooling kernel above 13", "wide", True),
            ("pooling stride above 2", "jump", True),
        },
    ),
    (transposes, [MAP], {("last-axis transpose", "moved", False), ("last-axis transpose", "negative", False)}),
    (
        norms,
        [(2, 1024), (2, 1023)],
        {("layer_norm with affine", n, n != "small") for n in ("scaled", "shifted", "small")},
    ),
    (layers, [(64, 64), (64, 64)], {("linear", name, False) for name in ("linear", "matmul", "left")}),
    (sides, [(1, 32)], {("dimension above 16384", name, True) for name in ("long", "taken")}),
    (sizes, [(1, 1, 16384)], {("large activation", "large", False)}),
    (integers, [(2, 32)], {("int32", name, True) for name in ("to", "sum")}),
    (
        kinds,
        [(4, 32)],
        {("cpu-only op", n, True) for n in ("gather", "topk_0")} | {("op not on the eligible list", "cumsum", True)},
    ),
]


def of_ops(found):
    return {(f.rule, f.where, f.blocks) for f in found.findings if f.op not in ("input", "output")}


def of_edges(found):
    return {(f.rule, f.op) for f in found.findings if f.op in ("input", "output")}


@pytest.mark.parametrize(("build", "shapes", "broken"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_each_rule_finds_its_op_and_no_other(tmp_path, build, shapes, broken):
    (found,) = report(save(tmp_path, build, shapes))
    assert of_ops(found) == broken
    assert all(f.detail and f.source for f in found.findings)


def test_float32_is_found_and_a_cast_at_the_entrance_is_not(tmp_path):
    (found,) = report(save(tmp_path, types, [(2, 32)], half=False))
    broken = {where for rule, where, blocks in of_ops(found) if (rule, blocks) == ("fp32", True)}
    assert broken == {"exit", "float", "compared"}
    assert of_edges(found) == {("fp32 input or output", "input"), ("fp32 input or output", "output")}


def test_control_flow_is_not_looked_into(tmp_path):
    (found,) = report(save(tmp_path, branches, [(2, 32)]))
    finding = next(f for f in found.findings if f.rule == "cpu-only op")
    assert (finding.op, finding.blocks) == ("cond", True)
    assert "isn't looked into" in finding.detail


@pytest.mark.parametrize(
    ("shape", "half", "rules"),
    [
        ((4, 32), True, set()),
        ((4, 31), True, {"unaligned last axis"}),
        ((4, 16), True, {"unaligned last axis"}),
        ((4, 1), True, {"singleton last axis"}),
        ((4, 32), False, {"fp32 input or output"}),
        ((4, 16), False, {"fp32 input or output", "unaligned last axis"}),
    ],
)
def test_inputs_and_outputs(tmp_path, shape, half, rules):
    def build(x):
        return mb.relu(x=x)

    (found,) = report(save(tmp_path, build, [shape], half))
    assert of_edges(found) == {(rule, kind) for rule in rules for kind in ("input", "output")}
    assert not any(f.blocks for f in found.findings if f.op in ("input", "output"))


def test_an_image_is_made_by_core_ml(tmp_path):
    def as_image(specification):
        image = specification.description.input[0].type.imageType
        image.width, image.height, image.colorSpace = 8, 8, image.ColorSpace.Value("RGB")

    def build(x):
        return mb.cast(x=x, dtype="fp16")

    package = save(tmp_path, build, [(1, 3, 8, 8)], half=False)
    assert ("fp32 input or output", "input") in of_edges(report(package)[0])
    assert of_edges(report(rewrite(package, as_image))[0]) == {("unaligned last axis", "output")}


def test_rank(tmp_path):
    """Written into the file: coremltools itself saves no tensor of rank 6."""

    def build(x):
        return mb.tanh(x=mb.relu(x=mb.reshape(x=x, shape=[1, 1, 2, 2, 32], name="five"), name="six"), name="taken")

    def one_more(specification):
        tensor = next(op for op in operations(specification) if op.type == "relu").outputs[0].type.tensorType
        tensor.dimensions.add().constant.size = 1
        tensor.rank = 6

    package = save(tmp_path, build, [(1, 4, 32)])
    assert not of_ops(report(package)[0])
    assert of_ops(report(rewrite(package, one_more))[0]) == {("rank above 5", n, True) for n in ("six", "taken")}


def test_every_output_of_an_op_counts(tmp_path):
    def build(x):
        first, second = mb.split(x=x, split_sizes=[1, 3], axis=0)
        return mb.relu(x=first, name="fixed"), mb.relu(x=second, name="taken")

    def second_dynamic(specification):
        split = next(op for op in operations(specification) if op.type == "split")
        split.outputs[1].type.tensorType.dimensions[0].unknown.variadic = False
        build.split = split.outputs[0].name

    package = save(tmp_path, build, [(4, 32)])
    assert not of_ops(report(package)[0])
    found = of_ops(report(rewrite(package, second_dynamic))[0])
    assert found == {("dynamic shape", name, True) for name in (build.split, "taken")}


def test_constants_written_at_the_op(tmp_path):
    def inline(specification):
        ops = operations(specification)
        constants = {op.outputs[0].name: op.attributes["val"] for op in ops if op.type == "const"}
        for argument in (a for op in ops for a in op.inputs.values()):
            for binding in argument.arguments:
                if binding.name in constants:
                    binding.value.CopyFrom(constants[binding.name])

    for build, shapes, broken in (CASES[5], CASES[7], CASES[8]):
        (found,) = report(rewrite(save(tmp_path, build, shapes), inline))
        assert of_ops(found) == broken


def test_compressed_constants(tmp_path):
    """Their values aren't unpacked: an affine of them is taken for one."""

    def build(x):
        options = {"scale": np.float16(1), "zero_point": np.int8(0), "axis": 0}
        gamma = mb.constexpr_affine_dequantize(quantized_data=np.ones(1024, np.int8), **options)
        matrix = mb.constexpr_affine_dequantize(quantized_data=np.ones((64, 1024), np.int8), **options)
        return mb.linear(x=mb.layer_norm(x=x, axes=[-1], gamma=gamma, name="norm"), weight=matrix, name="linear")

    (found,) = report(save_program(tmp_path / "c.mlpackage", build, [(2, 1024)], target="iOS17", half=True))
    assert of_ops(found) == {("layer_norm with affine", "norm", True), ("linear", "linear", False)}
    assert (found.ops, found.macs) == ({"layer_norm": 1, "linear": 1}, {"linear": 2 * 64 * 1024})
