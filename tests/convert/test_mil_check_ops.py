"""Each MIL op through a saved package, against its definition written out in numpy (float64)."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from fastvlm_convert.mil_check import compare, execute, open_package
from fastvlm_mlx.errors import BundleError
from support.mil_programs import immediate_parameters, model_file, operations, quiet, read_specification, save_program

pytest.importorskip("torch")
with quiet():
    pytest.importorskip("coremltools")
    from support.mil_cases import CASES

SUMMATION = 1e-6  # float32 against float64: the order and width of the sums is all that differs


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Name of a case -> its package, saved once."""
    folder, made = tmp_path_factory.mktemp("ops"), {}

    def get(name: str):
        if name not in made:
            path = folder / f"{len(made)}.mlpackage"
            made[name] = save_program(path, CASES[name].build, CASES[name].shapes)
        return made[name]

    return get


def test_every_op_has_a_case():
    from fastvlm_convert.mil_check.machine import HANDLERS

    assert {case.op for case in CASES.values()} == set(HANDLERS)


@pytest.mark.parametrize("name", CASES)
def test_an_op_means_what_mil_says(package, name):
    case, inputs = CASES[name], CASES[name].inputs()
    program = open_package(package(name)).program()
    assert case.op in {op.type for op in program.operations}
    right = case.right(*(x.astype(np.float64) for x in inputs.values()))
    expected = right if isinstance(right, list) else [right]
    found = execute(program, inputs, "float32").outputs
    for output, value in zip(program.outputs, expected, strict=True):
        assert compare(found[output.name], np.asarray(value)).relative_l2 < SUMMATION


OTHER = {"EXACT": "TANH_APPROXIMATION", "TANH_APPROXIMATION": "EXACT", "SIGMOID_APPROXIMATION": "EXACT",
         "same": "same_lower", "same_lower": "same", "custom": "valid", "valid": "same", "constant": "reflect",
         "reflect": "replicate", "replicate": "reflect", "int32": "bool", "bool": "int32", "fp32": "int32"}  # fmt: skip


def spoil(tensor: Any) -> None:
    """Write something else in place of a constant's first value."""
    kind = tensor.WhichOneof("value")
    values = getattr(tensor, kind).values
    if kind == "strings":
        values[0] = OTHER.get(values[0], "x" + values[0])
    elif kind == "bools":
        values[0] = not values[0]
    else:
        values[0] += 1


@pytest.mark.parametrize("name", CASES)
def test_no_parameter_is_ignored(package, name, tmp_path):
    """Each parameter changed in the file changes the result, or can't be executed at all."""
    case, path = CASES[name], package(name)
    program, inputs = open_package(path).program(), case.inputs()
    right = list(execute(program, inputs, "float32").outputs.values())
    whole = model_file(path).read_bytes()
    try:
        for number, (op, parameter, _) in enumerate(immediate_parameters(read_specification(path))):
            if op != case.op or parameter in case.unused:
                continue
            specification = read_specification(path)
            spoil(list(immediate_parameters(specification))[number][2])
            model_file(path).write_bytes(specification.SerializeToString())
            try:
                found = execute(open_package(path).program(), inputs, "float32").outputs.values()
            except BundleError:
                continue
            finally:
                model_file(path).write_bytes(whole)
            assert any(not np.array_equal(a, b) for a, b in zip(found, right, strict=True)), parameter
    finally:
        model_file(path).write_bytes(whole)


# Cases that spell out MIL's defaults, as coremltools does, and the parameters that another writer may leave out
DEFAULTS = {
    "avg_pool": ["pad", "ceil_mode", "exclude_padding_from_average"],
    "concat": ["interleave"],
    "conv without bias": ["strides", "pad_type", "pad", "dilations", "groups"],
    "gelu": ["mode"],
    "layer_norm over all": ["axes", "epsilon"],
    "matmul": ["transpose_x", "transpose_y"],
    "pad reflect": ["constant_val"],
    "reduce_mean all": ["keep_dims"],
    "rsqrt default": ["epsilon"],
    "softmax default": ["axis"],
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_missing_parameter_has_its_default(package, name, tmp_path):
    path = shutil.copytree(package(name), tmp_path / "bare.mlpackage")
    specification = read_specification(path)
    found = next(op for op in operations(specification) if op.type == CASES[name].op)
    for parameter in DEFAULTS[name]:
        del found.inputs[parameter]
    model_file(path).write_bytes(specification.SerializeToString())
    both = [execute(open_package(p).program(), CASES[name].inputs(), "float32").outputs for p in (package(name), path)]
    assert all(np.array_equal(both[0][output], both[1][output]) for output in both[0])


@pytest.mark.parametrize("op", sorted({case.op for case in CASES.values()}))
def test_an_unknown_parameter_is_refused(package, op):
    """A parameter from a later version of MIL would be ignored otherwise."""
    path = package(next(name for name, case in CASES.items() if case.op == op))
    whole, specification = model_file(path).read_bytes(), read_specification(path)
    first = next(found for found in operations(specification) if found.type == op)
    first.inputs["from_the_future"].CopyFrom(next(iter(first.inputs.values())))
    model_file(path).write_bytes(specification.SerializeToString())
    try:
        inputs = next(case for case in CASES.values() if case.op == op).inputs()
        with pytest.raises(BundleError, match="from_the_future"):
            execute(open_package(path).program(), inputs, "float32")
    finally:
        model_file(path).write_bytes(whole)
