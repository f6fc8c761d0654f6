"""Execute a program. The half that needs no torch until it's called; the work is in machine.py."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import get_args

import numpy as np

from fastvlm_convert.mil_check.program import Program
from fastvlm_convert.mil_check.results import Execution, Precision
from fastvlm_mlx.errors import BundleError, InputError, MissingDependencyError


def unknown_ops(program: Program) -> tuple[str, ...]:
    """The op types of a program that can't be executed, sorted; () for a program that can."""
    machine = _machine()
    types = {op.type for op in program.operations} - set(machine.HANDLERS)
    types |= {op.type for op in program.constants.values()} - {"const", *machine.EXPANDERS}
    return tuple(sorted(types))


def execute(program: Program, inputs: Mapping[str, np.ndarray], precision: Precision, trace: bool = False) -> Execution:
    """Run a program.

    Args:
        program: from `Package.program`.
        inputs: name -> values; uint8 RGB, (H, W, 3) or (1, H, W, 3), for an image, else as the function says.
        precision: "float32" rounds nothing (a cast to float16 does nothing); "float16" rounds what each op
            makes. Constants have the values that are stored in either.
        trace: keep what each op made, not just the first overflow.

    Returns:
        The outputs in float32, whatever type the package gives them.

    Raises:
        BundleError: ops that the checker doesn't know (all are named), or a program that contradicts itself.
        InputError: an input is missing, unknown, or has another shape or type.
        MissingDependencyError: torch isn't installed.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision is one of {', '.join(get_args(Precision))}, found {precision!r}")
    if unknown := unknown_ops(program):
        raise BundleError(f"function {program.function} has ops unknown to the checker: {', '.join(unknown)}")
    outputs, traces = _machine().run(program, inputs, rounding=precision == "float16")
    first = next((op for op in traces if op.overflowed), None)
    return Execution(outputs, tuple(traces) if trace else (), first)


def _machine() -> ModuleType:
    try:
        from fastvlm_convert.mil_check import machine
    except ImportError as exc:
        raise MissingDependencyError(
            "checking a Core ML package needs PyTorch: pip install 'fastvlm-mlx[convert]'"
        ) from exc
    return machine
