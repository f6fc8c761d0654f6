"""An op with what its arguments are: the types of its inputs, and the values of its constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.mil_check.program import Argument, Operation, Program, StoredValue, ValueInfo
from fastvlm_mlx.errors import BundleError

Shape = tuple[int, ...]


def size(shape: Sequence[int]) -> int:
    """Number of values; a dimension that isn't fixed counts as one, so that the size is a lower bound."""
    return math.prod(max(side, 1) for side in shape)


@dataclass(frozen=True, slots=True)
class Op:
    """An op of a program.

    Attributes:
        source: the op as it's stored.
        types: name -> type of every value of the program.
        constants: name -> the op that makes the constant.
    """

    source: Operation
    types: Mapping[str, ValueInfo]
    constants: Mapping[str, Operation]

    @property
    def type(self) -> str:
        """MIL's name of the op."""
        return self.source.type

    @property
    def name(self) -> str:
        """Its first output's name, by which Core ML's tools call an op."""
        return self.outputs[0].name if self.outputs else ""

    @property
    def outputs(self) -> tuple[ValueInfo, ...]:
        """All that it makes."""
        return self.source.outputs

    def tensors(self, parameter: str) -> tuple[ValueInfo, ...]:
        """Types of a parameter's arguments, () where it isn't given."""
        return tuple(self._type_of(argument) for argument in self.source.inputs.get(parameter, ()))

    def shape(self, parameter: str) -> Shape:
        """Shape of a parameter's only argument.

        Raises:
            BundleError: it isn't given.
        """
        if not (found := self.tensors(parameter)):
            raise BundleError(f"the package's {self.type} {self.name} lacks its parameter {parameter}")
        return found[0].shape

    def activations(self) -> list[ValueInfo]:
        """The inputs that aren't constants."""
        names = (name for name in self.source.names() if name not in self.constants)
        return [self._type_of(name) for name in names]

    def is_constant(self, parameter: str) -> bool:
        """Whether a parameter's only argument is known before the program runs."""
        argument = self.source.inputs[parameter][0]
        return isinstance(argument, StoredValue) or argument in self.constants

    def read(self, parameter: str) -> np.ndarray | None:
        """A constant's values, written at the op or by name; None where it isn't given, computed or compressed."""
        for argument in self.source.inputs.get(parameter, ()):
            if isinstance(argument, StoredValue):
                return argument.read()
            made_by = self.constants.get(argument)
            if made_by is not None and made_by.type == "const":
                value = made_by.inputs["val"][0]
                return value.read() if isinstance(value, StoredValue) else None
        return None

    def ints(self, parameter: str) -> list[int]:
        """A constant's integers or flags, [] where they can't be read."""
        values = self.read(parameter)
        return [] if values is None else [int(value) for value in values.reshape(-1)]

    def _type_of(self, argument: Argument) -> ValueInfo:
        if isinstance(argument, StoredValue):
            return ValueInfo("", argument.dtype, argument.shape)
        if argument not in self.types:
            raise BundleError(f"the package's {self.type} {self.name} takes {argument}, which nothing makes")
        return self.types[argument]


def operations(program: Program) -> list[Op]:
    """The ops of a program that do something, in its order."""
    types = {value.name: value for value in program.inputs}
    types |= {out.name: out for op in (*program.constants.values(), *program.operations) for out in op.outputs}
    return [Op(source, types, program.constants) for source in program.operations]
