"""Packages and inputs that can't be used: one clear sentence, before anything is computed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from fastvlm_convert.mil_check import execute, open_package, unknown_ops
from fastvlm_mlx.errors import BundleError, InputError
from support.mil_programs import model_file, operations, quiet, read_specification, save_functions, save_program

pytest.importorskip("torch")
with quiet():
    pytest.importorskip("coremltools")
    from coremltools.converters.mil.mil import Builder as mb

WEIGHT = np.random.default_rng(7).normal(size=(8, 3, 3, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return save_functions(tmp_path_factory.mktemp("several"), (8, 16), lambda x: mb.conv(x=x, weight=WEIGHT, name="y"))


def run(path, inputs, precision="float32", function=None):
    return execute(open_package(path).program(function), inputs, precision)


def test_all_unknown_ops_are_named_before_anything_runs(tmp_path):
    def build(x):
        return mb.cumsum(x=mb.sinh(x=mb.relu(x=x)), axis=0), mb.atan(x=x)

    program = open_package(save_program(tmp_path / "odd.mlpackage", build, [(3, 4)])).program()
    assert unknown_ops(program) == ("atan", "cumsum", "sinh")
    with pytest.raises(BundleError, match="atan, cumsum, sinh"):
        execute(program, {}, "float32")


@pytest.fixture
def damaged(several, tmp_path):
    return shutil.copytree(several, tmp_path / "damaged.mlpackage")


def unlink(name):
    return lambda path: next(path.rglob(name)).unlink()


def rewrite(name, change):
    def spoil(path):
        file = next(path.rglob(name))
        file.write_bytes(change(file.read_bytes()))

    return spoil


def neural_network(path):
    specification = read_specification(path)
    specification.neuralNetwork.SetInParent()
    model_file(path).write_bytes(specification.SerializeToString())


def escape(path):
    specification = read_specification(path)
    for op in operations(specification, "r8"):
        if op.attributes["val"].WhichOneof("value") == "blobFileValue":
            op.attributes["val"].blobFileValue.fileName = "@model_path/../../../other.bin"
    model_file(path).write_bytes(specification.SerializeToString())


DAMAGE = {
    "no manifest": (unlink("Manifest.json"), "no Core ML package: its Manifest.json is missing"),
    "no JSON": (rewrite("Manifest.json", lambda _: b"{"), "Manifest.json is unreadable"),
    "another JSON": (rewrite("Manifest.json", lambda _: json.dumps([]).encode()), "Manifest.json is unreadable"),
    "no model": (unlink("model.mlmodel"), "model.mlmodel is missing"),
    "half a model": (rewrite("model.mlmodel", lambda b: b[: len(b) // 2]), "model.mlmodel is damaged"),
    "an empty model": (rewrite("model.mlmodel", lambda _: b""), "holds no ML program but no model at all"),
    "a neural network": (neural_network, "holds no ML program but neuralNetwork"),
    "no weights": (unlink("weight.bin"), "weight.bin is missing"),
    "half the weights": (rewrite("weight.bin", lambda b: b[: len(b) // 2]), "weight.bin is truncated"),
    "a byte too few": (rewrite("weight.bin", lambda b: b[:-40]), "weight.bin is truncated"),
    "no weights at all": (rewrite("weight.bin", lambda b: b"\0" * len(b)), "no weight file"),
    "other weights": (rewrite("weight.bin", lambda b: b[:68] + b"\1" + b[69:]), "doesn't fit its program"),
    "weights elsewhere": (escape, "outside of the package"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_package_is_one_clear_error(damaged, name):
    damage, message = DAMAGE[name]
    damage(damaged)
    with pytest.raises(BundleError, match=message) as error:
        open_package(damaged)
    assert "\n" not in str(error.value)


def test_a_file_and_nothing_are_no_packages(tmp_path):
    (tmp_path / "file").write_bytes(b"model")
    for name in ("file", "nothing"):
        with pytest.raises(BundleError, match="is no Core ML package"):
            open_package(tmp_path / name)


def description(specification, function):
    return next(f for f in specification.description.functions if f.name == function)


CONTRADICTIONS = {
    "another output": (
        lambda f: setattr(f.output[0], "name", "z"),
        r"says of z fp32 \(1, 8, 6, 6\), .* nothing",
    ),
    "another input": (lambda f: setattr(f.input[0], "name", "z"), r"says of z fp32 \(1, 3, 8, 8\)"),
    "no output": (lambda f: f.ClearField("output"), "doesn't describe y"),
    "a shape": (lambda f: f.input[0].type.multiArrayType.shape.__setitem__(3, 9), r"\(1, 3, 8, 9\), .* \(1, 3, 8, 8\)"),
    "a rank": (lambda f: f.output[0].type.multiArrayType.shape.append(1), r"\(1, 8, 6, 6, 1\)"),
    "a type": (lambda f: setattr(f.output[0].type.multiArrayType, "dataType", 65552), r"says of y fp16 .* has fp32"),
    "an image": (
        lambda f: (setattr(f.input[0].type.imageType, "height", 8), setattr(f.input[0].type.imageType, "width", 9)),
        r"says of x  \(1, 3, 8, 9\)",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_description_that_contradicts_the_program_is_refused(damaged, name):
    """Core ML goes by the one, the checker by the other."""
    change, message = CONTRADICTIONS[name]
    specification = read_specification(damaged)
    change(description(specification, "r8"))
    model_file(damaged).write_bytes(specification.SerializeToString())
    with pytest.raises(BundleError, match=f"function r8 .*{message}"):
        open_package(damaged)


def test_a_program_that_contradicts_itself_is_refused(damaged):
    specification = read_specification(damaged)
    made = next(op for op in operations(specification, "r8") if op.type == "conv")
    made.outputs[0].type.tensorType.dimensions[1].constant.size = 9
    description(specification, "r8").output[0].type.multiArrayType.shape[1] = 9
    model_file(damaged).write_bytes(specification.SerializeToString())
    with pytest.raises(BundleError, match=r"conv y makes shape \(1, 8, 6, 6\), and the program says \(1, 9, 6, 6\)"):
        run(damaged, {"x": np.zeros((1, 3, 8, 8), np.float32)}, function="r8")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "takes x; found none"),
        ({"y": np.zeros((1, 3, 16, 16), np.float32)}, "takes x; found y"),
        ({"x": np.zeros((1, 3, 8, 8), np.float32)}, r"shape \(1, 3, 8, 8\), expected \(1, 3, 16, 16\)"),
        ({"x": np.zeros((1, 3, 16, 16), np.int32)}, "is int32, expected fp32"),
    ],
)
def test_wrong_inputs_say_what_is_right(several, inputs, message):
    with pytest.raises(InputError, match=message):
        run(several, inputs)


def test_an_unknown_precision_is_refused(several):
    with pytest.raises(InputError, match="float32, float16"):
        run(several, {}, "bfloat16")
