"""An op's arguments as its handler asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fastvlm_convert.mil_check.program import Argument, Operation
from fastvlm_mlx.errors import BundleError

Values = Mapping[str, torch.Tensor]
ReadConstant = Callable[[Argument], np.ndarray]
Result = torch.Tensor | tuple[torch.Tensor, ...]
Handler = Callable[["Arguments"], Result]


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a handler may ask of an op. A default is MIL's own, for a parameter that the file leaves out.

    Attributes:
        op: the op.
        values: what earlier ops made: float32, int32 or bool.
        read: reads a constant by its name or in place.
        asked: the parameters that the handler has looked at.
    """

    op: Operation
    values: Values
    read: ReadConstant
    asked: set[str] = field(default_factory=set)

    def check_all_asked(self) -> None:
        """Raise BundleError for a parameter that the handler doesn't know: it may change the result."""
        if unknown := sorted(set(self.op.inputs) - self.asked):
            raise BundleError(f"{self.label} has parameters unknown to the checker: {', '.join(unknown)}")

    @property
    def label(self) -> str:
        """The op in an error message."""
        return f"{self.op.type} {self.op.outputs[0].name}" if self.op.outputs else self.op.type

    def has(self, name: str) -> bool:
        """Whether the parameter is there."""
        self.asked.add(name)
        return name in self.op.inputs

    def tensors(self, name: str) -> tuple[torch.Tensor, ...]:
        """All arguments of a parameter, floats as float32."""
        return tuple(self._tensor(argument) for argument in self._given(name))

    def tensor(self, name: str) -> torch.Tensor:
        """The one argument of a parameter."""
        return self.tensors(name)[0]

    def optional(self, name: str) -> torch.Tensor | None:
        """The argument, or None where the op doesn't have it."""
        return self.tensor(name) if self.has(name) else None

    def array(self, name: str) -> np.ndarray:
        """A constant just as stored."""
        argument = self._given(name)[0]
        if isinstance(argument, str) and argument in self.values:
            return np.asarray(self.values[argument].numpy())
        return self.read(argument)

    def ints(self, name: str, default: list[int] | None = None) -> list[int]:
        """A list of integers or flags; one value counts as a list."""
        if default is not None and not self.has(name):
            return default
        return [int(value) for value in self.array(name).reshape(-1)]

    def integer(self, name: str, default: int | None = None) -> int:
        """One integer."""
        return int(default if default is not None and not self.has(name) else self.array(name).item())

    def number(self, name: str, default: float | None = None) -> float:
        """One real number."""
        return float(default if default is not None and not self.has(name) else self.array(name).item())

    def flag(self, name: str, default: bool | None = None) -> bool:
        """One truth value."""
        return bool(default if default is not None and not self.has(name) else self.array(name).item())

    def text(self, name: str, default: str | None = None) -> str:
        """One string."""
        return str(default if default is not None and not self.has(name) else self.array(name).item())

    def _given(self, name: str) -> tuple[Argument, ...]:
        if not self.has(name) or not self.op.inputs[name]:
            raise BundleError(f"{self.label} lacks its parameter {name}")
        return self.op.inputs[name]

    def _tensor(self, argument: Argument) -> torch.Tensor:
        if isinstance(argument, str) and argument in self.values:
            return self.values[argument]
        return as_tensor(self.read(argument))


def from_start(index: int, size: int) -> int:
    """An axis or a position, counted from the end if it's negative, as one from the start.

    Raises:
        IndexError: it's out of range; Python's `%` would wrap it around instead.
    """
    if not -size <= index < size:
        raise IndexError(f"{index} is out of range for {size}")
    return index + size if index < 0 else index


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Values as the executor keeps them: floats as float32, integers as int32, flags as bool."""
    if array.dtype.kind == "f":
        return torch.from_numpy(np.array(array, np.float32))
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.array(array, np.int32))
    if array.dtype.kind == "b":
        return torch.from_numpy(np.array(array, np.bool_))
    raise BundleError(f"expected numbers, found {array.dtype}")
