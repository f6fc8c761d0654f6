"""All checks in turn: what fails, or can't be checked, hides nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_bench.doctor import coreml_side, mlx_checks, parity, placement
from fastvlm_bench.doctor.check import Check, guarded, one_line, skipped
from fastvlm_bench.doctor.coreml_side import Apple, CoreMLState, Row
from fastvlm_bench.doctor.mac import elsewhere, thermal_pressure
from fastvlm_bench.doctor.machine import check_machine, check_macos, check_versions
from fastvlm_bench.doctor.mlx_side import MlxState, reference
from fastvlm_bench.doctor.model import NAME as MODEL
from fastvlm_bench.doctor.model import check_model, package_bits, recorded_sizes, rounded_vision
from fastvlm_bench.doctor.plan import Plan, Size, size_text
from fastvlm_bench.doctor.worker import Worker, WorkError
from fastvlm_mlx.bundle import PACKAGE, Bundle
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.coreml_runtime import ONLY_FUNCTION

if TYPE_CHECKING:
    import numpy as np

    from fastvlm_mlx.vision.coreml_runtime import Function

Say = Callable[[str], object]

_CORE_ML_CHECKS = (
    (coreml_side.NAME, coreml_side.WOULD),
    (parity.NAME, parity.WOULD),
    (placement.NAME, placement.WOULD),
)
_MODEL_CHECKS = (
    (mlx_checks.ENCODER, "FastViTHD's times in MLX"),
    (mlx_checks.ANSWER, "that the model answers"),
    *_CORE_ML_CHECKS,
)


@dataclass(frozen=True, slots=True)
class Package:
    """The bundle's Core ML package, or why it can't be run.

    Attributes:
        functions: by size.
        reason: why this machine or this bundle has nothing to run; None where it has.
        failure: what is wrong with the package.
    """

    functions: dict[Size, Function]
    reason: str | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is diagnosed.

    Attributes:
        bundle: the model.
        package: its Core ML package.
        sizes: of the pictures, at least one.
        plan: how much is measured.
        apple: what only a Mac has.
        say: called with what is being done.
    """

    bundle: Bundle
    package: Package
    sizes: tuple[Size, ...]
    plan: Plan
    apple: Apple
    say: Say


def diagnose(
    path: Path | None, plan: Plan, problem: str | None = None, apple: Apple | None = None, say: Say = lambda _: None
) -> list[Check]:
    """Make every check.

    Args:
        path: the bundle's folder; None where it couldn't be had.
        plan: how much is measured.
        problem: why it couldn't be had.
        apple: what only a Mac has; default Core ML itself.
        say: called with what is being done.
    """
    say("the machine")
    apple = apple or Apple()
    checks = [
        guarded("machine", check_machine, plan.debug),
        guarded("versions", check_versions, plan.debug),
        guarded("macOS", check_macos, plan.debug),
    ]
    bundle = None
    if path is None:
        checks.append(Check(MODEL, failures=(problem or "there is no model",)))
    else:
        found, bundle = check_model(path, say)
        checks.append(found)
    if bundle is None:
        return checks + [skipped(name, "the model can't be opened", would) for name, would in _MODEL_CHECKS]
    package = _open(bundle, apple)
    sizes = plan.sizes or tuple(sorted(package.functions)) or recorded_sizes(bundle) or (_own_size(bundle),)
    subject = Subject(bundle, package, sizes, plan, apple, say)
    with Worker(partial(MlxState, bundle.path), plan.limit_s, plan.debug) as worker:
        return [*checks, *_check_mlx(worker, subject), *_check_apple(worker, subject)]


def _own_size(bundle: Bundle) -> Size:
    side = bundle.config.vision.image_size if bundle.config.vision else 1024
    return side, side


def _open(bundle: Bundle, apple: Apple) -> Package:
    """What the package holds, if this machine can read it."""
    try:
        runtime = apple.make_runtime()
    except EncoderError as exc:
        return Package({}, elsewhere() or str(exc))
    except Exception as exc:  # whatever an import of a broken coremltools makes of it
        return Package({}, failure=one_line(exc))
    if not bundle.has(PACKAGE):
        return Package({}, f"the bundle has no {PACKAGE}; {_next_step()}")
    try:
        return Package({(f.height, f.width): f for f in runtime.functions(bundle.path / PACKAGE)})
    except EncoderError as exc:  # this macOS is too old for it
        return Package({}, str(exc))
    except Exception as exc:  # whatever a broken package makes of it
        return Package({}, failure=one_line(exc))


def _next_step() -> str:
    """How to come by a package."""
    from fastvlm_mlx.hub import list_models

    try:
        there = [model.name for model in list_models() if model.path and (model.path / PACKAGE).is_dir()]
    except Exception:  # a cache that can't be read; this is only advice
        there = []
    if there:
        return f"on this machine {', '.join(there)} has one: `fastvlm-bench doctor --model {there[0]}`"
    return "`fastvlm-convert CHECKPOINT -o OUT` writes one, `fastvlm-bench doctor --model OUT` then checks it"


def _check_mlx(worker: Worker[MlxState], subject: Subject) -> list[Check]:
    sizes, plan, say = subject.sizes, subject.plan, subject.say
    encoder = partial(mlx_checks.check_encoder, worker, subject.bundle, sizes, plan, say)
    return [
        guarded(mlx_checks.PRODUCTS, partial(mlx_checks.check_products, worker, say), plan.debug),
        guarded(mlx_checks.ENCODER, encoder, plan.debug),
        guarded(mlx_checks.ANSWER, partial(mlx_checks.check_answer, worker, sizes, say), plan.debug),
    ]


def _check_apple(worker: Worker[MlxState], subject: Subject) -> list[Check]:
    """Core ML's times, its features beside MLX's, its plan."""
    package, plan = subject.package, subject.plan
    if package.failure:
        rest = [skipped(name, "the package can't be read", would) for name, would in _CORE_ML_CHECKS[1:]]
        return [Check(coreml_side.NAME, failures=(package.failure,)), *rest]
    there = [size for size in subject.sizes if size in package.functions]
    lacking = [size_text(size) for size in subject.sizes if size not in package.functions]
    listed = ", ".join(map(size_text, sorted(package.functions)))
    if reason := package.reason or (None if there else f"the package takes images of {listed} px only"):
        return [skipped(name, reason, would) for name, would in _CORE_ML_CHECKS]
    with coreml_side.core_ml_worker(subject.bundle.path / PACKAGE, subject.apple, plan) as core_ml:
        compiled = coreml_side.compile_first(core_ml, subject.say)
        rows = coreml_side.measure_all(core_ml, there, plan, subject.say)
        notes = [f"the package takes images of {listed} px, not {', '.join(lacking)}"] if lacking else []
        notes += [f"thermal pressure afterwards: {pressure}"] if (pressure := thermal_pressure()) else []
        return [
            guarded(coreml_side.NAME, partial(coreml_side.check_core_ml, rows, notes, compiled), plan.debug),
            guarded(parity.NAME, partial(_compare, worker, subject, rows), plan.debug),
            guarded(placement.NAME, partial(_place, core_ml, subject, there), plan.debug),
        ]


def _compare(worker: Worker[MlxState], subject: Subject, rows: Sequence[Row]) -> Check:
    bundle = subject.bundle
    if bundle.config.vision is None:
        return skipped(parity.NAME, "the bundle has no vision weights for MLX to compare with", parity.WOULD)
    references: dict[Size, np.ndarray] = {}
    errors = []
    for size in dict.fromkeys(row.size for row in rows if row.measured):
        place = f"MLX in float32 at {size_text(size)} px"
        subject.say(place)
        try:
            references[size] = worker.do(reference, size)
        except WorkError as exc:
            errors.append(f"{place}: {exc}")
    rounded = "the converter rounded the weights for MLX, which are no reference" if rounded_vision(bundle) else None
    return parity.check_parity(rows, references, package_bits(bundle), rounded, errors)


def _place(worker: Worker[CoreMLState], subject: Subject, sizes: Sequence[Size]) -> Check:
    if reason := subject.apple.why_no_plan():
        return skipped(placement.NAME, reason, placement.WOULD)
    names = [subject.package.functions[size].name or ONLY_FUNCTION for size in sizes]
    size_bytes = placement.folder_bytes(subject.bundle.path / PACKAGE)
    return placement.check_placement(worker, names, size_bytes, subject.say)
