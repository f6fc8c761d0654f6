"""The gates of a Core ML package: run it, compare it with the PyTorch network, say whether it is right.

Two gates, since each misses what the other finds. In float32 the saved program must be the network with the same
stored weights, but for the order of summation: a wrong op, axis or weight shows, however small its effect. With
every op's output rounded to float16 it must stay near the float32 network on the original weights: what rounding,
ranges and compression cost, and any overflow. The checker doesn't model how the Neural Engine adds up inside an
op, nor its tables for GELU; on a Mac, Core ML itself is a third gate, on each of its compute units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvlm_convert.calibration import Pictures, verification
from fastvlm_convert.coreml_vision import PackageOptions, Size, build_network
from fastvlm_convert.folding import PIXEL_MAX
from fastvlm_convert.mil_check import Execution, Package, compare, execute, open_package
from fastvlm_convert.quiet import quiet
from fastvlm_convert.ranges import Ranges
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import BundleError, EncoderError, ResolutionError
from fastvlm_mlx.manifest import CheckRecord
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS, ONLY_FUNCTION, AppleRuntime, Runtime

# Float32 against float32 with the same weights: 0 to 2e-6 measured, from the order of summation.
EXACT_GATE = 1e-5
# Each op rounded to float16, against float32: 1.6e-3 to 2.6e-3 measured. int8 weights: 1.8e-2.
HALF_GATES = {16: 5e-3, 8: 3e-2}
# Core ML itself: not measured yet; below what bfloat16 makes of this network (2.3e-2) and a wrong axis (3.8e-2).
CORE_ML_GATES = {16: 2e-2, 8: 4e-2}

STORED, ORIGINAL = "PyTorch, float32, the stored weights", "PyTorch, float32, the original weights"


@dataclass(frozen=True, slots=True)
class Subject:
    """A saved package and what it was made from.

    Attributes:
        package: the .mlpackage.
        config: FastViTHD's shape.
        weights: the original folded weights, by the names of fastvlm_convert.folding.
        options: how the package was made.
        ranges: the exponents that it was made with.
    """

    package: Path
    config: VisionConfig
    weights: Mapping[str, np.ndarray]
    options: PackageOptions
    ranges: Ranges


def check_package(
    subject: Subject,
    sizes: Sequence[Size] | None = None,
    pictures: Pictures | None = None,
    runtime: Runtime | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[CheckRecord, ...]:
    """Run every gate.

    Args:
        subject: what to check.
        sizes: of these functions; default all of the package.
        pictures: to run it on; default two that no calibration uses.
        runtime: Core ML, as `core_ml` finds it, to run on each of its compute units; None leaves it out.
        say: called with what is being done.

    Raises:
        BundleError: the package can't be read or executed. ResolutionError: it lacks one of `sizes`.
    """
    with quiet():
        package = open_package(subject.package)
    programs = _programs(package)
    for size in sizes or ():
        if size not in programs:
            there = ", ".join(found.function for found in programs)
            raise ResolutionError(f"{subject.package} has no function {size.function}; it has {there}")
    gates = _Gates(subject, package, _able(runtime, subject.package, say))
    records: list[CheckRecord] = []
    for size in sizes or programs:
        for index, pixels in enumerate((pictures or verification()).at(size)):
            say(f"checking {size.function} on picture {index + 1}")
            records += gates.check(size, programs[size], pixels, f"{index + 1}", exact=index == 0)
    return tuple(records)


def _programs(package: Package) -> dict[Size, str]:
    """Image size -> function. Raises BundleError unless each is named for its size, as the run time expects."""
    programs = {}
    for name, function in package.functions.items():
        size = Size(*function.inputs[0].shape[-2:])
        if name not in (size.function, ONLY_FUNCTION):
            raise BundleError(
                f"{package.path} has a function {name} for {size.height} x {size.width} px; convert again"
            )
        programs[size] = name
    return programs


def core_ml() -> Runtime | None:
    """Core ML itself on a Mac that can run it, None elsewhere."""
    try:
        return AppleRuntime()
    except EncoderError:
        return None


def _able(runtime: Runtime | None, package: Path, say: Callable[[str], object]) -> Runtime | None:
    """The runtime, unless this system is too old for the package, which then is for others."""
    try:
        if runtime:
            runtime.functions(package)
    except EncoderError as exc:
        say(f"leaving Core ML out: {exc}")
        return None
    return runtime


class _Gates:
    """The two reference networks, and the comparisons with them."""

    def __init__(self, subject: Subject, package: Package, runtime: Runtime | None) -> None:
        attention = subject.options.attention
        self._subject, self._package, self._runtime = subject, package, runtime
        self._original = build_network(subject.config, subject.weights)
        self._stored = build_network(
            subject.config,
            subject.weights,
            attention,
            subject.ranges,
            rounded=True,
            bits=subject.options.bits,
        )

    def check(self, size: Size, program: str, pixels: np.ndarray, picture: str, exact: bool) -> Iterator[CheckRecord]:
        """The gates of one function on one picture; `exact` asks for the float32 one too."""
        bits = self._subject.options.bits
        if exact:
            found = self._execute(program, pixels, "float32")
            right = _run(self._stored, pixels)
            yield _record(size, "checker, float32", STORED, picture, found, right, EXACT_GATE)
        right = _run(self._original, pixels)
        found = self._execute(program, pixels, "float16")
        yield _record(size, "checker, float16", ORIGINAL, picture, found, right, HALF_GATES[bits])
        for units in COMPUTE_UNITS if self._runtime else ():
            yield self._core_ml(size, units, pixels, picture, right)

    def _given(self, pixels: np.ndarray) -> np.ndarray:
        """What the package takes for a picture."""
        return unit_pixels(pixels) if self._subject.options.interface == "tensor" else pixels

    def _execute(self, program: str, pixels: np.ndarray, precision: str) -> Execution:
        function = self._package.functions[program]
        inputs = {function.inputs[0].name: self._given(pixels)}
        return execute(self._package.program(program), inputs, precision)  # type: ignore[arg-type]

    def _core_ml(self, size: Size, units: str, pixels: np.ndarray, picture: str, right: np.ndarray) -> CheckRecord:
        assert self._runtime
        executor, gate = f"Core ML, {units}", CORE_ML_GATES[self._subject.options.bits]
        functions = {(f.height, f.width): f for f in self._runtime.functions(self._subject.package)}
        function = functions[size.height, size.width]
        try:
            made = self._runtime.open(self._subject.package, function, units)({function.input: self._given(pixels)})
        except EncoderError as exc:
            return CheckRecord(size.function, executor, ORIGINAL, picture, None, None, gate, None, False, str(exc))
        outputs = {name: np.asarray(value, np.float32) for name, value in made.items() if name == function.output}
        return _record(size, executor, ORIGINAL, picture, Execution(outputs, (), None), right, gate)


def unit_pixels(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [0, 1], what a package with Apple's interface takes."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / np.float32(PIXEL_MAX)


def _run(network: Callable[..., object], pixels: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return np.asarray(network(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]))


def _record(
    size: Size, executor: str, reference: str, picture: str, found: Execution, right: np.ndarray, gate: float
) -> CheckRecord:
    made = next(iter(found.outputs.values()), np.empty(0))
    if made.shape != right.shape:
        error = f"made shape {made.shape}, expected {right.shape}"
        return CheckRecord(size.function, executor, reference, picture, None, None, gate, None, False, error)
    difference = compare(made, right)
    finite = bool(np.isfinite(difference.relative_l2))
    overflow = found.first_overflow
    return CheckRecord(
        function=size.function,
        executor=executor,
        reference=reference,
        picture=picture,
        relative_l2=difference.relative_l2 if finite else None,
        max_abs=difference.max_abs if finite else None,
        gate=gate,
        first_overflow=f"{overflow.type} {overflow.name}" if overflow else None,
        passed=finite and difference.relative_l2 <= gate and overflow is None,
    )


def describe_checks(records: Sequence[CheckRecord]) -> str:
    """A line for each gate, for people."""
    return "\n".join(_line(record) for record in records)


def _line(record: CheckRecord) -> str:
    measured = "not finite" if record.relative_l2 is None else f"{record.relative_l2:.1e}"
    if record.error:
        measured = record.error
    overflow = f", first overflow at {record.first_overflow}" if record.first_overflow else ""
    verdict = "passed" if record.passed else "FAILED"
    return (
        f"{verdict}  {record.function}, {record.executor}, picture {record.picture}: relative L2 {measured} "
        f"(at most {record.gate:.0e}){overflow}"
    )
