"""The loop that runs a program with torch, and the half of the checker that can't do without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastvlm_convert.mil_check import ops_elementwise, ops_network, ops_shape
from fastvlm_convert.mil_check.arguments import Arguments, Handler, as_tensor
from fastvlm_convert.mil_check.constexpr import EXPANDERS
from fastvlm_convert.mil_check.program import DYNAMIC, Argument, Operation, Program, StoredValue, ValueInfo
from fastvlm_convert.mil_check.results import OpTrace
from fastvlm_mlx.errors import BundleError, InputError

HANDLERS: dict[str, Handler] = {**ops_elementwise.HANDLERS, **ops_network.HANDLERS, **ops_shape.HANDLERS}

# How the types that aren't integers are kept while the program runs
KINDS = {"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool}
# The least value that float16 rounds to infinity: half a step above its largest, 65504.
FLOAT16_OVERFLOW = 65520.0


@dataclass(frozen=True, slots=True)
class Constants:
    """Reads constants each time one is asked for: hardly any is used twice, and all together are large."""

    operations: Mapping[str, Operation]

    def read(self, argument: Argument) -> np.ndarray:
        """A constant's values, of the type that the program gives it.

        Raises:
            BundleError: there is no such constant, or it's damaged.
        """
        if isinstance(argument, StoredValue):
            return argument.read()
        if argument not in self.operations:
            raise BundleError(f"the program uses {argument}, which isn't made before or isn't constant")
        op = self.operations[argument]
        args = Arguments(op, {}, self.read)
        arrays = (args.array("val"),) if op.type == "const" else EXPANDERS[op.type](args)
        args.check_all_asked()
        for info, array in zip(op.outputs, arrays, strict=True):
            _check_shape(info, array.shape, op)
        return arrays[[info.name for info in op.outputs].index(argument)]


def run(
    program: Program, inputs: Mapping[str, np.ndarray], rounding: bool
) -> tuple[dict[str, np.ndarray], list[OpTrace]]:
    """Run a program whose ops are all known; see `execution.execute`."""
    constants, last_used = Constants(program.constants), _last_used(program)
    traces: list[OpTrace] = []
    with torch.inference_mode():
        values = _take_inputs(program, inputs, rounding)
        for index, op in enumerate(program.operations):
            for info, made in zip(op.outputs, _compute(op, values, constants), strict=True):
                traces.append(_trace(info, op, made))
                values[info.name] = made.half().float() if rounding and made.is_floating_point() else made
            for name in last_used[index]:
                values.pop(name, None)
        outputs = {
            info.name: np.array(
                (values[info.name] if info.name in values else as_tensor(constants.read(info.name))).numpy(),
                np.float32,
            )
            for info in program.outputs
        }
    return outputs, traces


def _compute(op: Operation, values: dict[str, torch.Tensor], constants: Constants) -> tuple[torch.Tensor, ...]:
    """What one op makes, of the shapes that the program declares."""
    args = Arguments(op, values, constants.read)
    try:
        made = HANDLERS[op.type](args)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as exc:
        raise BundleError(f"{args.label} can't be computed as the package has it: {exc}") from exc
    args.check_all_asked()
    results = made if isinstance(made, tuple) else (made,)
    if len(results) != len(op.outputs):
        raise BundleError(f"{args.label} makes {len(results)} values, not {len(op.outputs)} as the program says")
    for info, result in zip(op.outputs, results, strict=True):
        _check_shape(info, tuple(result.shape), op)
        if KINDS.get(info.dtype, torch.int32) != result.dtype:
            raise BundleError(f"{op.type} {info.name} makes {result.dtype}, and the program says {info.dtype}")
    return results


def _check_shape(info: ValueInfo, shape: tuple[int, ...], op: Operation) -> None:
    fits = len(info.shape) == len(shape) and all(
        declared in (DYNAMIC, size) for declared, size in zip(info.shape, shape, strict=True)
    )
    if not fits:
        raise BundleError(f"{op.type} {info.name} makes shape {shape}, and the program says {info.shape}")


def _trace(info: ValueInfo, op: Operation, made: torch.Tensor) -> OpTrace:
    shape = tuple(made.shape)
    if not made.is_floating_point() or not made.numel():
        largest = float(made.long().abs().max()) if made.numel() else 0.0
        return OpTrace(info.name, op.type, shape, largest, False)
    low, high = torch.aminmax(made)  # NaN if any element is
    largest = max(-float(low), float(high)) if low == low else float("nan")
    return OpTrace(info.name, op.type, shape, largest, not largest < FLOAT16_OVERFLOW)


def _last_used(program: Program) -> dict[int, list[str]]:
    """Number of an op -> the values that nothing needs after it."""
    last: dict[str, int] = {}
    for index, op in enumerate(program.operations):
        last |= dict.fromkeys((info.name for info in op.outputs), index)
        last |= dict.fromkeys(op.names(), index)
    keep = {info.name for info in program.outputs}
    result: dict[int, list[str]] = defaultdict(list)
    for name, index in last.items():
        if name not in keep and name not in program.constants:
            result[index].append(name)
    return result


def _take_inputs(program: Program, inputs: Mapping[str, np.ndarray], rounding: bool) -> dict[str, torch.Tensor]:
    """Check the inputs and give them the form that Core ML gives them."""
    names = [info.name for info in program.inputs]
    if set(inputs) != set(names):
        raise InputError(f"function {program.function} takes {', '.join(names)}; found {', '.join(inputs) or 'none'}")
    values = {}
    for info in program.inputs:
        array = inputs[info.name]
        if info.name in program.images:
            array = _image(info, program.images[info.name].color, array)
        fits = array.ndim == len(info.shape) and all(
            declared in (DYNAMIC, size) for declared, size in zip(info.shape, array.shape, strict=True)
        )
        if not fits:
            raise InputError(f"input {info.name} has shape {array.shape}, expected {info.shape}")
        value = as_tensor(array)
        if value.is_floating_point() != info.dtype.startswith("fp"):
            raise InputError(f"input {info.name} is {array.dtype}, expected {info.dtype}")
        values[info.name] = value.half().float() if rounding and info.dtype == "fp16" else value
    return values


def _image(info: ValueInfo, color: str, array: np.ndarray) -> np.ndarray:
    """uint8 RGB, (H, W, 3) or (1, H, W, 3) -> (1, C, H, W) float32 in [0, 255], channels as the program's.

    An ML program has no preprocessing besides: ImageType's scale and bias are ops in it.
    """
    picture = array[None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or picture.ndim != 4 or picture.shape[-1] != 3:
        raise InputError(
            f"input {info.name} is an image: expected uint8 (H, W, 3) or (1, H, W, 3), "
            f"found {array.dtype} {array.shape}"
        )
    if color not in ("RGB", "BGR"):
        raise InputError(f"input {info.name} takes {color} images; the checker knows RGB and BGR")
    channels = picture if color == "RGB" else picture[..., ::-1]
    return channels.transpose(0, 3, 1, 2).astype(np.float32)
