"""Small MIL programs, saved as packages with coremltools, and changed where a test wants them wrong."""

from __future__ import annotations

import gc
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def quiet() -> Iterator[None]:
    """For coremltools' own work: without its and torch's warnings, which would be errors in the tests."""
    gc.freeze()  # a conversion ends in gc.collect(), which looks through all of torch otherwise: 0.15 s each
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()


def save_program(
    path: Path,
    build: Callable[..., Any],
    shapes: Sequence[tuple[int, ...]],
    target: str = "iOS18",
    half: bool = False,
    passes: Callable[[Any], object] = lambda _: None,
) -> Path:
    """Save a program just as it's built: no pass folds or fuses anything, but for those asked for.

    Args:
        path: of the package to write.
        build: takes the inputs, named as its parameters, and returns one output or several.
        shapes: of the inputs.
        target: the first system that should run it; decides on the form of some ops.
        half: compute in float16.
        passes: adds to the pipeline, which is empty otherwise.
    """
    with quiet():
        import coremltools as ct
        from coremltools.converters.mil.mil import Builder, types

        dtype = types.fp16 if half else types.fp32
        specs = [Builder.TensorSpec(shape=shape, dtype=dtype) for shape in shapes]
        program = Builder.program(input_specs=specs, opset_version=ct.target[target])(build)
        pipeline = ct.PassPipeline.EMPTY
        passes(pipeline)
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target[target],
            compute_precision=ct.precision.FLOAT32,  # as built: no cast is added
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def save_functions(folder: Path, sides: Sequence[int], build: Callable[..., Any]) -> Path:
    """Save a program for pictures of several sizes, as functions r8, r16, ... of one package; the last is default."""
    package = folder / "functions.mlpackage"
    with quiet():
        import coremltools as ct

        description = ct.utils.MultiFunctionDescriptor()
        for side in sides:
            path = save_program(folder / f"{side}.mlpackage", build, [(1, 3, side, side)])
            description.add_function(str(path), "main", f"r{side}")
        description.default_function_name = f"r{sides[-1]}"
        ct.utils.save_multifunction(description, str(package))
    return package


def save_torch(path: Path, module: Any, example: Any, **options: Any) -> Path:
    """Convert a torch module as a converter does, with all of coremltools' passes."""
    with quiet():
        import coremltools as ct
        import torch

        exported = torch.export.export(module.eval(), (example,)).run_decompositions({})
        ct.convert(exported, convert_to="mlprogram", skip_model_load=True, **options).save(str(path))
    return path


def model_file(package: Path) -> Path:
    """The protobuf in a package."""
    return package / "Data" / "com.apple.CoreML" / "model.mlmodel"


def weight_file(package: Path) -> Path:
    """The weights in a package."""
    return model_file(package).parent / "weights" / "weight.bin"


def read_specification(package: Path) -> Any:
    """The protobuf, parsed."""
    from coremltools.proto import Model_pb2

    specification = Model_pb2.Model()
    specification.ParseFromString(model_file(package).read_bytes())
    return specification


def operations(specification: Any, function: str = "main") -> Any:
    """The ops of a function in the protobuf, to change in place."""
    found = specification.mlProgram.functions[function]
    return found.block_specializations[found.opset].operations


def fix_value(ops: Any, index: int, parameter: str, value: np.ndarray) -> None:
    """Give an op a float16 constant, written in the program, in place of what it takes from another op."""
    user = ops[index]
    binding = user.inputs[parameter].arguments[0]
    made = next(out for op in ops for out in op.outputs if out.name == binding.name)
    constant = type(user)()
    constant.type = "const"
    constant.outputs.add(name=f"{binding.name}_fixed", type=made.type)
    stored = constant.attributes["val"]
    stored.type.CopyFrom(made.type)
    stored.immediateValue.tensor.bytes.values = value.astype("<f2").tobytes()
    name = constant.attributes["name"]
    name.immediateValue.tensor.strings.values.append(f"{binding.name}_fixed")
    binding.name = f"{binding.name}_fixed"
    ops.insert(index, constant)


def immediate_parameters(specification: Any, function: str = "main") -> Iterator[tuple[str, str, Any]]:
    """(op type, parameter, tensor) of each constant that is written in the program itself."""
    ops = operations(specification, function)
    constants = {op.outputs[0].name: op.attributes["val"] for op in ops if op.type == "const"}
    for op in ops:
        for parameter, argument in op.inputs.items():
            for binding in argument.arguments:
                value = constants.get(binding.name)
                if value is not None and value.WhichOneof("value") == "immediateValue":
                    yield op.type, parameter, value.immediateValue.tensor


def stored_array(package: Path, name: str, function: str = "main") -> np.memmap:
    """A constant in the weight file, to change in place: a float16 weight, or the integers of a packed one.

    Functions share what they have in common: a change shows in each.
    """
    op = next(op for op in operations(read_specification(package), function) if op.outputs[0].name == name)
    value = op.attributes["val"] if op.type == "const" else op.inputs["data"].arguments[0].value
    shape = tuple(int(dimension.constant.size) for dimension in value.type.tensorType.dimensions)
    start = struct.unpack_from("<Q", weight_file(package).read_bytes(), value.blobFileValue.offset + 16)[0]
    dtype = np.float16 if op.type == "const" else np.int8
    return np.memmap(weight_file(package), dtype, "r+", start, shape)


def windows(x: np.ndarray, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int],
            dilation: Sequence[int] | None = None, fill: float = 0.0) -> np.ndarray:  # fmt: skip
    """All windows of a padded tensor: (B, C, *out, *kernel)."""
    rank = len(kernel)
    dilation = dilation or [1] * rank
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[::2], pads[1::2], strict=True)], constant_values=fill)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    found = np.lib.stride_tricks.sliding_window_view(x, extent, axis=tuple(range(2, 2 + rank)))
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in [*stride, *dilation]))
    return found[steps]
