"""What an execution gives back, and how far it is from what's right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastvlm_mlx.errors import InputError

Precision = Literal["float32", "float16"]


@dataclass(frozen=True, slots=True)
class OpTrace:
    """What one op made.

    Attributes:
        name: its first output's name; an op with several outputs has a trace for each.
        type: MIL's name of the op.
        shape: of the output.
        max_abs: largest absolute value, before it's rounded to float16.
        overflowed: whether float16 would hold an infinity or a NaN in its place; False for integers.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    max_abs: float
    overflowed: bool


@dataclass(frozen=True, slots=True)
class Execution:
    """What came out.

    Attributes:
        outputs: name -> float32 values.
        trace: each op in order, if asked for.
        first_overflow: the first op that leaves float16's range, in either precision.
    """

    outputs: dict[str, np.ndarray]
    trace: tuple[OpTrace, ...]
    first_overflow: OpTrace | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two tensors are apart.

    Attributes:
        relative_l2: norm of the difference over the norm of the right one; infinite where a value isn't finite.
        max_abs: largest absolute difference.
    """

    relative_l2: float
    max_abs: float


def compare(found: np.ndarray, right: np.ndarray) -> Comparison:
    """Compare an output with the right one.

    Raises:
        InputError: their shapes differ.
    """
    if found.shape != right.shape:
        raise InputError(f"can't compare shape {found.shape} with {right.shape}")
    difference = found.astype(np.float64) - right.astype(np.float64)
    if not np.isfinite(difference).all():
        return Comparison(float("inf"), float("inf"))
    error, norm = float(np.linalg.norm(difference)), float(np.linalg.norm(right.astype(np.float64)))
    relative = error / norm if norm else (float("inf") if error else 0.0)
    return Comparison(relative, float(np.abs(difference).max(initial=0.0)))
