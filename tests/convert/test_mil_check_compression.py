"""Compressed weights: expanded from the file to the very bits that coremltools expands them to."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from fastvlm_convert.mil_check import compare, execute, open_package
from fastvlm_convert.mil_check.blob import packed_bytes, unpack
from support.mil_programs import operations, quiet, read_specification, save_program, weight_file

pytest.importorskip("torch")
with quiet():
    ct = pytest.importorskip("coremltools")
    import coremltools.optimize.coreml as optimize
    from coremltools.converters.mil.frontend.milproto.load import load as milproto_load
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

RANDOM = np.random.default_rng(11)
WEIGHT = (RANDOM.normal(size=(48, 64, 3, 3)) / 24).astype(np.float16)
MATRIX = (RANDOM.normal(size=(40, 768)) / 28).astype(np.float16)
SHAPE = (1, 64, 6, 6)


def network(x):
    x = mb.conv(x=x, weight=WEIGHT, pad_type="valid")
    return mb.linear(x=mb.reshape(x=x, shape=[1, 768]), weight=MATRIX)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """System -> the network, uncompressed."""
    folder = tmp_path_factory.mktemp("plain")
    return {t: save_program(folder / f"{t}.mlpackage", network, [SHAPE], t, half=True) for t in ("iOS16", "iOS18")}


def linear(**options):
    config = optimize.OpLinearQuantizerConfig(weight_threshold=100, **options)
    return partial(optimize.linear_quantize_weights, config=optimize.OptimizationConfig(global_config=config))


def palette(**options):
    config = optimize.OpPalettizerConfig(mode="uniform", weight_threshold=100, **options)
    return partial(optimize.palettize_weights, config=optimize.OptimizationConfig(global_config=config))


def prune(**options):
    config = optimize.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=100, **options)
    return partial(optimize.prune_weights, config=optimize.OptimizationConfig(global_config=config))


AFFINE, LUT, SPARSE, BLOCKS = (
    f"constexpr_{name}" for name in ("affine_dequantize", "lut_to_dense", "sparse_to_dense", "blockwise_shift_scale")
)
# System, steps, the ops that they leave in the file, and the largest error of the output that such weights may cause
SCHEMES = {
    "int8 per channel, iOS 16": ("iOS16", [linear(mode="linear_symmetric")], {AFFINE}, 0.02),
    "uint8 with zero points, iOS 16": ("iOS16", [linear(mode="linear", dtype="uint8")], {AFFINE}, 0.02),
    "8-bit palette, iOS 16": ("iOS16", [palette(nbits=8)], {LUT}, 0.03),
    "6-bit palette, iOS 16": ("iOS16", [palette(nbits=6)], {LUT}, 0.1),
    "4-bit palette, iOS 16": ("iOS16", [palette(nbits=4)], {LUT}, 0.3),
    "1-bit palette, iOS 16": ("iOS16", [palette(nbits=1)], {LUT}, 30),
    "pruned, iOS 16": ("iOS16", [prune()], {SPARSE}, 0.9),
    "int8 per channel": ("iOS18", [linear(mode="linear_symmetric")], {BLOCKS}, 0.02),
    "int8 per block": ("iOS18", [linear(granularity="per_block", block_size=32)], {BLOCKS}, 0.02),
    "uint8 per block with offsets": (
        "iOS18", [linear(mode="linear", dtype="uint8", granularity="per_block", block_size=32)], {BLOCKS}, 0.02),
    "int4 per block": ("iOS18", [linear(dtype="int4", granularity="per_block", block_size=16)], {BLOCKS}, 0.2),
    "uint4 per tensor": ("iOS18", [linear(mode="linear", dtype="uint4", granularity="per_tensor")], {BLOCKS}, 0.4),
    "8-bit palette": ("iOS18", [palette(nbits=8)], {LUT}, 0.03),
    "6-bit palette": ("iOS18", [palette(nbits=6)], {LUT}, 0.1),
    "3-bit palette": ("iOS18", [palette(nbits=3)], {LUT}, 0.7),
    "4-bit palettes for groups": (
        "iOS18", [palette(nbits=4, granularity="per_grouped_channel", group_size=8)], {LUT}, 0.3),
    "pruned": ("iOS18", [prune()], {SPARSE}, 0.9),
    "a quantised palette": (
        "iOS18", [palette(nbits=4), partial(linear(dtype="int8", granularity="per_tensor"), joint_compression=True)],
        {LUT, BLOCKS}, 0.3),
    "pruned and quantised": (
        "iOS18", [prune(), partial(linear(dtype="int8"), joint_compression=True)],
        {SPARSE, "constexpr_sparse_blockwise_shift_scale"}, 0.9),
    "pruned with a palette": (
        "iOS18", [prune(), partial(palette(nbits=4), joint_compression=True)],
        {SPARSE, "constexpr_lut_to_sparse"}, 0.9),
}  # fmt: skip


def output(path):
    """What a package makes of the same random input."""
    inputs = {"x": np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)}
    (found,) = execute(open_package(path).program(), inputs, "float32").outputs.values()
    return found


def theirs(path):
    """Name -> value of each compressed constant, as coremltools reads and expands it."""
    with quiet():
        specification = read_specification(path)
        program = milproto_load(specification, specification.specificationVersion, str(weight_file(path).parent))
    found = {}
    for op in program.functions["main"].operations:
        if op.op_type.startswith("constexpr_"):
            lut = getattr(op, "lut", None)
            if lut is not None and lut.name in found:  # a compressed palette, which coremltools fails to expand first
                made = op.decompress(op.indices.val, found[lut.name], None)
            else:
                made = op.materialized_val_inference()
            found |= zip([v.name for v in op.outputs], made if isinstance(made, tuple) else (made,), strict=True)
    return found


def check_expanded(path):
    """Each compressed constant has the bits and the type that coremltools gives it."""
    from fastvlm_convert.mil_check.machine import Constants

    program, right = open_package(path).program(), theirs(path)
    compressed = {name for name, op in program.constants.items() if op.type.startswith("constexpr_")}
    assert compressed == set(right)
    for name in compressed:
        found = Constants(program.constants).read(name)
        assert found.dtype == right[name].dtype.base
        assert np.array_equal(found, right[name]), name
    return {program.constants[name].type for name in compressed}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_of_coremltools(plain, tmp_path, name):
    target, steps, ops, tolerance = SCHEMES[name]
    path = tmp_path / "compressed.mlpackage"
    with quiet():
        model = ct.models.MLModel(str(plain[target]), skip_model_load=True)
        for step in steps:
            model = step(model)
        model.save(str(path))
    assert check_expanded(path) == ops
    assert 0 < compare(output(path), output(plain[target])).relative_l2 < tolerance
    if name != "a quantised palette":  # coremltools fails to expand it
        with quiet():
            optimize.decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
        assert np.array_equal(output(path), output(tmp_path / "dense.mlpackage"))


def small(values, bits):
    """Values as coremltools keeps those of less than a byte."""
    return np.asarray(values).astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}")))


INDICES = RANDOM.integers(0, 4, (8, 6))
VECTORS = RANDOM.normal(size=(4, 1, 4, 2)).astype(np.float16)  # for each 2 rows a palette of 4 pairs
MASK = RANDOM.integers(0, 2, (8, 6))


def by_builder(op, **values):
    return lambda x: mb.matmul(x=x, y=getattr(mb, op)(**values))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_small_integers_are_stored_packed(tmp_path, bits):
    """In the weight file, and for few of them in the program."""
    for shape in ((8, 5), (3, 1)):
        indices = RANDOM.integers(0, 2**bits, shape)
        lut = RANDOM.normal(size=(1, 1, 2**bits, 1)).astype(np.float16)
        build = by_builder("constexpr_lut_to_dense", indices=small(indices, bits), lut=lut)
        path = save_program(tmp_path / f"{len(indices)}.mlpackage", build, [(2, shape[0])], half=True)
        assert check_expanded(path) == {LUT}
        (name,) = theirs(path)
        assert np.array_equal(theirs(path)[name], lut.reshape(-1)[indices])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_palettes_of_vectors(tmp_path, axis):
    lut = VECTORS if axis == 1 else VECTORS[:1]
    build = by_builder("constexpr_lut_to_dense", indices=small(INDICES, 2), lut=lut, vector_axis=np.int32(axis))
    path = save_program(tmp_path / "vectors.mlpackage", build, [(2, 16 if axis == 0 else 8)], half=True)
    assert check_expanded(path) == {LUT}


def test_a_palette_of_vectors_for_few_values(tmp_path):
    def build(x):
        mask, values = mb.constexpr_lut_to_sparse(
            indices_mask=small(MASK, 1), indices_nonzero_data=small(INDICES[MASK != 0], 2), lut=VECTORS[:1],
            vector_axis=np.int32(0))  # fmt: skip
        return mb.matmul(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask))

    path = save_program(tmp_path / "sparse.mlpackage", build, [(2, 16)], half=True)
    assert check_expanded(path) == {SPARSE, "constexpr_lut_to_sparse"}


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_a_stored_float16_may_stand_for_a_float32(tmp_path, target):
    source = RANDOM.normal(size=(8, 6)).astype(np.float16)
    path = save_program(
        tmp_path / "cast.mlpackage",
        by_builder("constexpr_cast", source_val=source, output_dtype="fp32"),
        [(2, 8)],
        target,
    )
    assert check_expanded(path) == {"constexpr_cast"}


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_every_stored_constant_is_what_coremltools_reads(tmp_path, target):
    """All types that coremltools writes, long enough for the weight file and short enough for the program."""
    kept = [np.float16, np.float32, np.int32, np.bool_] + ([np.int16, np.uint16] if target == "iOS18" else [])

    def build(x):
        values = [mb.const(val=RANDOM.integers(0, 99, n).astype(t)) for t in kept for n in (3, 40)]
        return [mb.identity(x=x), *(mb.identity(x=value) for value in values)]

    path = save_program(tmp_path / "types.mlpackage", build, [(2,)], target)
    specification, program = read_specification(path), open_package(path).program()
    with quiet():
        loaded = milproto_load(specification, specification.specificationVersion, str(weight_file(path).parent))
    right = {op.outputs[0].name: op.val.val for op in loaded.functions["main"].operations if op.op_type == "const"}
    assert set(right) == set(program.constants)
    assert any(value.in_file for op in program.constants.values() for value in op.inputs["val"])
    for name, op in program.constants.items():
        found = op.inputs["val"][0].read()
        assert np.array_equal(found, right[name])
        assert found.dtype.kind == "U" or found.dtype == right[name].dtype


def test_negative_small_integers():
    values = np.arange(-8, 8)
    data = (values[::2] & 15 | (values[1::2] & 15) << 4).astype(np.uint8)
    assert packed_bytes("int4", 16) == 8
    assert np.array_equal(unpack(data, "int4", 16), values)


def test_a_flipped_bit_in_a_block_shows(plain, tmp_path):
    model = ct.models.MLModel(str(plain["iOS18"]), skip_model_load=True)
    path = tmp_path / "flipped.mlpackage"
    with quiet():
        linear(granularity="per_block", block_size=32)(model).save(str(path))
    right = output(path)
    blob = next(
        op.inputs["data"].arguments[0].value.blobFileValue
        for op in operations(read_specification(path))
        if op.type == BLOCKS
    )
    data = bytearray(weight_file(path).read_bytes())
    data[blob.offset + 64 + 5] ^= 0x40
    weight_file(path).write_bytes(data)
    assert compare(output(path), right).relative_l2 > 1e-4
