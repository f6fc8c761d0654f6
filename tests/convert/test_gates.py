"""The gates of a Core ML package: what is right passes, and of each thing that can be wrong, which of them says so.

A wrong package is a right one whose files were changed: nothing in our network knows of the fault.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.folded import folded_vision

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package
from fastvlm_convert.gates import (
    Subject,
    check_package,
    describe_checks,
)
from fastvlm_convert.ranges import Ranges
from support.mil_programs import (
    immediate_parameters,
    model_file,
    operations,
    read_specification,
    stored_array,
)

SQUARE, WIDE = Size(128, 128), Size(128, 192)  # maps of stage 5: 2 x 2, and 2 x 3, where rows aren't columns
EXACT, HALF = "checker, float32", "checker, float16"
Fault = Callable[[Any, Path], object]  # changes the specification in place, or the weight file


@pytest.fixture(scope="module")
def subject(checkpoint, tmp_path_factory):
    """(preset, bits, sizes) -> a package as the converter makes it, without range safety; made once."""
    made = {}

    def get(preset: str = "tiny", bits: int = 16, sizes: tuple[Size, ...] = (SQUARE, WIDE)) -> Subject:
        key = (preset, bits, sizes)
        if key not in made:
            config, weights = folded_vision(checkpoint(preset))
            options = PackageOptions(sizes=sizes, bits=bits, range_safety=False)
            target = tmp_path_factory.mktemp("packages") / f"{preset}.mlpackage"
            convert_package(config, weights, target, options, Ranges())
            made[key] = Subject(target, config, weights, options, Ranges())
        return made[key]

    return get


def spoilt(subject: Subject, fault: Fault, folder: Path) -> Subject:
    """A copy with a fault in its saved files."""
    package = shutil.copytree(subject.package, folder / "wrong.mlpackage")
    specification = read_specification(package)
    fault(specification, package)
    model_file(package).write_bytes(specification.SerializeToString())
    return replace(subject, package=package)


def describe(records) -> str:
    """Failures of an assertion with what was measured."""
    return "\n" + describe_checks(records)


# ---- what can be wrong -------------------------------------------------------------------------------------------


def parameter(op: str, name: str, value: Any, which: slice = slice(None)) -> Fault:
    """Another value for a parameter of the ops of a type, or of some of them."""

    def fault(specification: Any, _: Path) -> None:
        there = [t for o, p, t in immediate_parameters(specification, WIDE.function) if (o, p) == (op, name)]
        assert there[which]
        for tensor in there[which]:
            kind = tensor.WhichOneof("value")
            if kind == "bytes":
                tensor.bytes.values = np.float16(value).tobytes()
            else:
                values = getattr(tensor, kind).values
                del values[:]
                values.extend(np.atleast_1d(value).tolist())

    return fault


def colour_space(specification: Any, _: Path) -> None:
    """Core ML would hand blue over where the network expects red."""
    for function in specification.description.functions:
        image = function.input[0].type.imageType
        image.colorSpace = image.ColorSpace.Value("BGR")


def without_means(which: slice = slice(None)) -> Fault:
    """LayerNorms that take what they should subtract the mean from for the difference."""

    def fault(specification: Any, _: Path) -> None:
        ops = operations(specification, WIDE.function)
        differences = [op for op in ops if op.type == "sub"]
        assert differences[which]
        for difference in differences[which]:
            whole, centred = difference.inputs["x"].arguments[0].name, difference.outputs[0].name
            for op in ops:
                for argument in op.inputs.values():
                    for binding in argument.arguments:
                        if binding.name == centred:
                            binding.name = whole

    return fault


def by_columns(specification: Any, _: Path) -> None:
    """Tokens column by column: the map is transposed before it is laid out."""
    ops = operations(specification, WIDE.function)
    made = {op.outputs[0].name: op for op in ops}
    last = ops[-1]
    flatten = made[last.inputs["x"].arguments[0].name]
    turned, whole = type(last)(), flatten.inputs["x"].arguments[0]
    turned.CopyFrom(last)
    turned.outputs[0].name = "turned"
    turned.outputs[0].type.CopyFrom(made[whole.name].outputs[0].type)
    height, width = (dimension.constant for dimension in turned.outputs[0].type.tensorType.dimensions[2:])
    height.size, width.size = width.size, height.size
    order = turned.inputs["perm"].arguments[0]
    order.value.CopyFrom(made[order.name].attributes["val"])
    order.value.type.tensorType.dimensions[0].constant.size = 4
    order.value.immediateValue.tensor.ints.values[:] = [0, 1, 3, 2]
    turned.inputs["x"].arguments[0].name, whole.name = whole.name, "turned"
    ops.insert(list(ops).index(flatten), turned)


def without_bias(specification: Any, _: Path) -> None:
    """A convolution that lost its bias."""
    del convolution(specification, "stages_4_blocks_0_ffn_fc2").inputs["bias"]


def stride(specification: Any, package: Path) -> None:
    """The first convolution at every pixel: nothing after it fits."""
    parameter("conv", "strides", [1, 1], slice(1))(specification, package)


def convolution(specification: Any, name: str) -> Any:
    """The op that has these weights."""
    ops = operations(specification, WIDE.function)
    return next(
        op for op in ops if op.type == "conv" and op.inputs["weight"].arguments[0].name.startswith(f"p_{name}_weight")
    )


def weights(name: str, change: Callable[[np.memmap], None]) -> Fault:
    """Other values in the weight file."""

    def fault(specification: Any, package: Path) -> None:
        array = stored_array(
            package, convolution(specification, name).inputs["weight"].arguments[0].name, WIDE.function
        )
        change(array)
        array.flush()

    return fault


def swap_channels(array: np.memmap) -> None:
    array[:] = array[:, ::-1].copy()


def flip(count: int, start: int = 0) -> Callable[[np.memmap], None]:
    """The sign of some weights that follow on each other."""

    def change(array: np.memmap) -> None:
        flat = array.reshape(-1)
        flat[start : start + count] *= -1

    return change


def flip_least(array: np.memmap) -> None:
    """The sign of the block of 32 with the smallest weights."""
    blocks = array.reshape(-1, 32)
    blocks[np.abs(blocks.astype(np.float32)).sum(axis=1).argmin()] *= -1


def one_step(array: np.memmap) -> None:
    """The neighbouring float16 for one weight."""
    flat = array.reshape(-1)
    flat[0] = np.nextafter(flat[0], np.float16(9))


FIRST, LAST = slice(1), slice(-1, None)
BOTH, EXACT_ONLY, NEITHER = {EXACT, HALF}, {EXACT}, set()
# The fault, and which gates catch it. Measured: relative L2 in float32; in float16 on each picture.
CONTROLS: dict[str, tuple[Fault, set[str]]] = {
    "nothing": (lambda *_: None, NEITHER),
    "blue and red swapped in the image": (colour_space, BOTH),
    "blue and red swapped in the stem": (weights("stem_conv", swap_channels), BOTH),
    "softmax over the wrong axis": (parameter("softmax", "axis", -2, FIRST), BOTH),
    "softmax over the wrong axis, stage 5": (parameter("softmax", "axis", -2, LAST), BOTH),
    "all softmaxes over the wrong axis": (parameter("softmax", "axis", -2), BOTH),
    "softmax over the heads": (parameter("softmax", "axis", 1, FIRST), BOTH),
    "a LayerNorm without its mean": (without_means(FIRST), BOTH),
    "no LayerNorm with its mean": (without_means(), BOTH),
    "a tanh GELU, first": (parameter("gelu", "mode", "TANH_APPROXIMATION", FIRST), EXACT_ONLY),
    "a tanh GELU, last": (parameter("gelu", "mode", "TANH_APPROXIMATION", LAST), EXACT_ONLY),
    "tanh GELUs": (parameter("gelu", "mode", "TANH_APPROXIMATION"), EXACT_ONLY),
    "sigmoid GELUs": (parameter("gelu", "mode", "SIGMOID_APPROXIMATION"), BOTH),
    "an epsilon": (parameter("add", "y", 1e-3, FIRST), BOTH),
    "an epsilon LAST": (parameter("add", "y", 1e-3, LAST), BOTH),
    "attention transposed": (parameter("matmul", "transpose_y", False, slice(1, 2)), BOTH),
    "padding as TensorFlow": (parameter("conv", "pad", [0, 1, 0, 1], FIRST), BOTH),
    "a bias dropped": (without_bias, BOTH),
    "tokens by columns": (by_columns, BOTH),
    "a block flipped": (weights("stages_3_blocks_0_ffn_fc1", flip(32)), BOTH),
    "a block flipped in the largest": (weights("stages_4_blocks_0_ffn_fc2", flip(32)), EXACT_ONLY),
    "the smallest block flipped": (weights("stages_4_blocks_0_ffn_fc1", flip_least), EXACT_ONLY),
    "one weight flipped": (weights("stages_4_blocks_0_ffn_fc2", flip(1)), EXACT_ONLY),
    "a step, early": (weights("stages_0_blocks_0_ffn_depthwise", one_step), EXACT_ONLY),
    "a step": (weights("stages_4_blocks_0_ffn_fc2", one_step), NEITHER),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_which_gate_catches_a_wrong_package(subject, tmp_path, name):
    fault, catching = CONTROLS[name]
    records = check_package(spoilt(subject(), fault, tmp_path), [WIDE])
    assert [record.executor for record in records] == [EXACT, HALF, HALF]
    print("MEAS", name, *(f"{r.relative_l2:.1e}" for r in records))
    assert {record.executor for record in records if not record.passed} == catching, describe(records)
