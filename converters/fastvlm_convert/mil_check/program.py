"""One function of a package as plain data: its ops and constants, just as they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_convert.mil_check.blob import TYPES, check_blob, packed_bytes, read_blob, unpack
from fastvlm_mlx.errors import BundleError

# The names of the protobuf's data types that differ from ours by more than case
_SHORT = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64"}
_MODEL_PATH = "@model_path/"  # the folder of the specification, in the name of a weight file
DYNAMIC = -1


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """A value's name, type and shape.

    Attributes:
        dtype: MIL's name: "fp16", "fp32", "int32", "bool", "string", ...
        shape: -1 where the size isn't fixed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A constant in the program or in the weight file; nothing of it has been read.

    Attributes:
        dtype: MIL's name of the type.
        shape: its shape, () for a scalar.
        source: the protobuf's Value.
        folder: the folder of the specification, where the weight files' names start.
    """

    dtype: str
    shape: tuple[int, ...]
    source: Any
    folder: Path

    @property
    def in_file(self) -> bool:
        """Whether it is in a weight file."""
        return bool(self.source.WhichOneof("value") == "blobFileValue")

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def check(self) -> None:
        """Raise BundleError if it's in a weight file and not all there."""
        if self.in_file:
            check_blob(self._file(), self.source.blobFileValue.offset, self.dtype, self.count)

    def read(self) -> np.ndarray:
        """Read it.

        Returns:
            `shape`, of the type as stored; strings as numpy's str; packed types one value an element.

        Raises:
            BundleError: it isn't whole, or no tensor.
        """
        if self.in_file:
            flat = read_blob(self._file(), self.source.blobFileValue.offset, self.dtype, self.count)
        else:
            flat = self._immediate()
        if flat.size != self.count:
            raise BundleError(f"a constant of shape {self.shape} holds {flat.size} values")
        return flat.reshape(self.shape)

    def _immediate(self) -> np.ndarray:
        tensor = self.source.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind is None or (self.dtype not in TYPES and self.dtype != "string"):
            raise BundleError(f"a constant of type {self.dtype} isn't readable here, only tensors are")
        values = getattr(tensor, kind).values
        if kind == "bytes":
            data = np.frombuffer(values, np.uint8)
            if data.size < packed_bytes(self.dtype, self.count):
                raise BundleError(f"a constant of shape {self.shape} and {self.dtype} has {data.size} bytes")
            return unpack(data, self.dtype, self.count)
        return np.array(values, np.str_ if self.dtype == "string" else TYPES[self.dtype][1])

    def _file(self) -> Path:
        name = str(self.source.blobFileValue.fileName).removeprefix(_MODEL_PATH)
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"the program's weights are at {name}, outside of the package")
        return path


Argument = str | StoredValue  # the name of a value, or a constant written at the op itself


@dataclass(frozen=True, slots=True)
class Operation:
    """One op.

    Attributes:
        type: MIL's name, such as "conv".
        inputs: parameter -> arguments; several only where the parameter takes a list (concat).
        outputs: what it makes; several for split.
    """

    type: str
    inputs: dict[str, tuple[Argument, ...]]
    outputs: tuple[ValueInfo, ...]

    @property
    def is_constant(self) -> bool:
        """Whether its value is known before the program runs."""
        return self.type == "const" or self.type.startswith("constexpr_")

    def names(self) -> Iterator[str]:
        """The names of the values that it takes."""
        for arguments in self.inputs.values():
            yield from (argument for argument in arguments if isinstance(argument, str))


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How Core ML hands an image to a program.

    Attributes:
        color: "RGB", "BGR" or "GRAYSCALE": the order of the program's channels.
    """

    color: str


@dataclass(frozen=True, slots=True)
class Program:
    """One function.

    Attributes:
        function: its name.
        opset: "CoreML8" for iOS 18 and macOS 15, one less for each year before.
        inputs: what it takes.
        images: layout of those inputs that are images.
        outputs: what it returns.
        constants: value's name -> the `const` or `constexpr_*` op that makes it.
        operations: all other ops, in the order of the file, which is an order of execution.
    """

    function: str
    opset: str
    inputs: tuple[ValueInfo, ...]
    images: dict[str, ImageLayout]
    outputs: tuple[ValueInfo, ...]
    constants: dict[str, Operation]
    operations: tuple[Operation, ...]


def value_info(name: str, value_type: Any) -> ValueInfo:
    """Type and shape of a value, from the protobuf's NamedValueType or Value."""
    if value_type.WhichOneof("type") != "tensorType":
        return ValueInfo(name, str(value_type.WhichOneof("type")).removesuffix("Type"), ())
    tensor = value_type.tensorType
    number = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number.get(tensor.dataType)
    label = number.name if number else str(tensor.dataType)
    shape = tuple(
        int(d.constant.size) if d.WhichOneof("dimension") == "constant" else DYNAMIC for d in tensor.dimensions
    )
    return ValueInfo(name, _SHORT.get(label, label.lower()), shape)


def stored_value(source: Any, folder: Path) -> StoredValue:
    """A constant from the protobuf's Value."""
    info = value_info("", source.type)
    return StoredValue(info.dtype, info.shape, source, folder)


def read_program(name: str, function: Any, images: dict[str, ImageLayout], folder: Path) -> Program:
    """Turn the protobuf's Function into plain data.

    Args:
        name: the function's name.
        function: the protobuf's Function.
        images: layout of its image inputs.
        folder: the folder of the specification.

    Raises:
        BundleError: the function has no body, or its outputs aren't made by its ops.
    """
    block = function.block_specializations.get(function.opset)
    if block is None:
        raise BundleError(f"the package's function {name} has no program for its opset {function.opset!r}")
    operations = [_operation(source, folder) for source in block.operations]
    made = {info.name: info for op in operations for info in op.outputs}
    inputs = tuple(value_info(i.name, i.type) for i in function.inputs)
    made |= {info.name: info for info in inputs}
    if missing := [output for output in block.outputs if output not in made]:
        raise BundleError(f"the package's function {name} never makes its outputs {', '.join(missing)}")
    return Program(
        function=name,
        opset=function.opset,
        inputs=inputs,
        images=images,
        outputs=tuple(made[output] for output in block.outputs),
        constants={info.name: op for op in operations if op.is_constant for info in op.outputs},
        operations=tuple(op for op in operations if not op.is_constant),
    )


def _operation(source: Any, folder: Path) -> Operation:
    inputs: dict[str, tuple[Argument, ...]] = {}
    # `const` and, up to iOS 17, `constexpr_*` have their values as attributes; other ops only their name.
    for parameter, value in source.attributes.items():
        if parameter != "name":
            inputs[parameter] = (stored_value(value, folder),)
    for parameter, argument in source.inputs.items():
        inputs[parameter] = tuple(
            binding.name if binding.WhichOneof("binding") == "name" else stored_value(binding.value, folder)
            for binding in argument.arguments
        )
    return Operation(source.type, inputs, tuple(value_info(o.name, o.type) for o in source.outputs))
