"""Core ML packages with a fault in their saved files, of which nothing in our network knows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_convert.calibration import Pictures
from fastvlm_convert.calibration.rendered import noise
from fastvlm_convert.coreml_vision import Size
from fastvlm_convert.gates import Subject
from support.mil_programs import (
    immediate_parameters,
    model_file,
    operations,
    quiet,
    read_specification,
    stored_array,
)

SQUARE, WIDE = Size(128, 128), Size(128, 192)  # maps of stage 5: 2 x 2, and 2 x 3, where rows aren't columns
FLOAT32, FLOAT16 = "checker, float32", "checker, float16"
Fault = Callable[[Any, Path], object]  # changes the specification in place, or the weight file


def spoilt(subject: Subject, fault: Fault, folder: Path) -> Subject:
    """A copy with a fault in its saved files."""
    package = shutil.copytree(subject.package, folder / "wrong.mlpackage")
    with quiet():
        specification = read_specification(package)
        fault(specification, package)
    model_file(package).write_bytes(specification.SerializeToString())
    return replace(subject, package=package)


def noises(count: int) -> Pictures:
    """Pictures of noise."""
    return Pictures("noise", "", tuple(partial(noise, seed=seed) for seed in range(count)))


def failing(records) -> set[str]:
    """What found a fault."""
    return {record.executor for record in records if not record.passed}


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


def without_bias(name: str) -> Fault:
    """A convolution that lost its bias."""

    def fault(specification: Any, _: Path) -> None:
        del convolution(specification, name).inputs["bias"]

    return fault


def convolution(specification: Any, name: str) -> Any:
    """The op that has these weights."""
    ops = operations(specification, WIDE.function)
    return next(
        op for op in ops if op.type == "conv" and op.inputs["weight"].arguments[0].name.startswith(f"p_{name}_weight")
    )


def weights(name: str, change: Callable[[np.memmap], None]) -> Fault:
    """Other values in the weight file."""

    def fault(specification: Any, package: Path) -> None:
        stored = convolution(specification, name).inputs["weight"].arguments[0].name
        array = stored_array(package, stored, WIDE.function)
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


def one_step(array: np.memmap) -> None:
    """The next float16, or the next integer, in place of the first weight."""
    flat = array.reshape(-1)
    flat[0] = np.nextafter(flat[0], np.float16(9)) if flat.dtype == np.float16 else flat[0] - 1
