"""Core ML's times, on each of its compute units. What runs there may crash or hang, so a worker runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fastvlm_bench.doctor.check import Check, Table, one_line
from fastvlm_bench.doctor.plan import Plan, Size, sample_pixels, size_text, spread_text, time_calls
from fastvlm_bench.doctor.worker import Worker
from fastvlm_bench.stats import spread
from fastvlm_mlx.files import cache_dir
from fastvlm_mlx.vision.compute_plan import OpenPlan, Placement, open_plan, place_functions, why_no_plan
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS, AppleRuntime, Runtime

if TYPE_CHECKING:
    import numpy as np

NAME = "Core ML"
WOULD = f"times of compiling, loading and predicting at each resolution on {', '.join(COMPUTE_UNITS)}"
# The Neural Engine is there to be faster than the CPU beside it. Tiny models take a millisecond or so on either.
_SLOWER, _SLOWER_MS = 1.5, 5.0


@dataclass(frozen=True, slots=True)
class Apple:
    """What only a Mac has; tests put stand-ins in its place, which a worker must be able to import.

    Attributes:
        make_runtime: makes what runs packages; raises EncoderError where nothing can.
        open_plan: loads a compute plan.
        why_no_plan: why there are no compute plans here, None where there are.
    """

    make_runtime: Callable[[], Runtime] = AppleRuntime
    open_plan: OpenPlan = open_plan
    why_no_plan: Callable[[], str | None] = why_no_plan


@runtime_checkable
class Compiler(Protocol):
    """A runtime that can compile a package before it opens it, as `AppleRuntime` does."""

    def compile(self, package: Path) -> bool:
        """Compile if needed; whether it was. Raises EncoderError."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """How the package was compiled, once for all of its functions and compute units.

    Attributes:
        seconds: that it took, its hash included; None if it was done before, or if the runtime does it only as it
            opens a function, which `Measured.compiled` then tells.
        error: what went wrong.
    """

    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A function on some compute units.

    Attributes:
        load_s: seconds to load it.
        again_s: seconds to load it again.
        first_ms: the first prediction.
        times_ms: those after it.
        features: (N, C) float16 of `plan.sample_pixels`.
        compiled: the package was compiled while it was loaded; `load_s` has that in it.
    """

    load_s: float
    again_s: float
    first_ms: float
    times_ms: tuple[float, ...]
    features: np.ndarray
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A size on some compute units: what was measured, or why nothing was."""

    size: Size
    units: str
    measured: Measured | None
    error: str | None = None


class CoreMLState:
    """What the worker keeps.

    Args:
        package: the .mlpackage.
        apple: what runs it.
    """

    def __init__(self, package: Path, apple: Apple) -> None:
        self.package, self.apple, self.runtime = package, apple, apple.make_runtime()


def compile_package(state: CoreMLState) -> float | None:
    """Seconds to compile the package; None if it was compiled before, or can't be apart from loading."""
    import time

    if not isinstance(state.runtime, Compiler):
        return None
    start = time.perf_counter()
    made = state.runtime.compile(state.package)
    return time.perf_counter() - start if made else None


def measure(state: CoreMLState, size: Size, units: str, runs: int, seconds: float) -> Measured:
    """Load a function, predict, load it again, all as the library does; arguments as `plan.time_calls`."""
    import time

    import numpy as np

    from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder

    encoder = CoreMLVisionEncoder(state.package, state.runtime, units)
    before = compiled_packages()
    load_s, first_s = encoder.warm_up(size)
    compiled = bool(compiled_packages() - before)
    pixels = sample_pixels(size)[None]
    times = time_calls(lambda: encoder.encode(pixels), runs, seconds)
    features = np.array(encoder.encode(pixels)[0])
    encoder = CoreMLVisionEncoder(state.package, state.runtime, units)  # lets go of what was loaded
    start = time.perf_counter()
    encoder.prepare(size)
    again_s = time.perf_counter() - start
    return Measured(load_s, again_s, first_s * 1e3, tuple(times), features, compiled)


def place(state: CoreMLState, functions: Sequence[str], units: str) -> list[Placement]:
    """Core ML's plan; see `place_functions`."""
    return place_functions(state.package, functions, units, state.apple.open_plan)


def core_ml_worker(package: Path, apple: Apple, plan: Plan) -> Worker[CoreMLState]:
    """The worker of a package."""
    return Worker(partial(CoreMLState, package, apple), plan.limit_s, plan.debug)


def compile_first(worker: Worker[CoreMLState], say: Callable[[str], object] = lambda _: None) -> Compiled:
    """Compile the package before anything is loaded, so that the two are timed apart.

    Args:
        worker: runs it.
        say: called with what is being done.
    """
    say(f"{NAME}: compiling")
    try:
        return Compiled(worker.do(compile_package))
    except Exception as exc:  # whatever it is, the other checks are worth having
        return Compiled(error=one_line(exc))


def measure_all(
    worker: Worker[CoreMLState], sizes: Sequence[Size], plan: Plan, say: Callable[[str], object] = lambda _: None
) -> list[Row]:
    """Every size on every compute unit; what fails is a row with its error.

    Args:
        worker: runs it.
        sizes: of the package's functions.
        plan: how much is measured.
        say: called with what is being done.
    """
    rows = []
    for size in sizes:
        for units in COMPUTE_UNITS:
            say(f"{NAME}: {size_text(size)} px on {units}")
            try:
                rows.append(Row(size, units, worker.do(measure, size, units, plan.runs, plan.seconds)))
            except Exception as exc:  # whatever it is, the other rows and checks are worth having
                rows.append(Row(size, units, None, one_line(exc)))
    return rows


def compiled_packages() -> set[tuple[Path, int]]:
    """The compiled packages that the library keeps, with their inodes: a damaged one is replaced under its name."""
    return {(path, path.stat().st_ino) for path in (cache_dir() / "coreml").glob("*.mlmodelc")}


def check_core_ml(rows: Sequence[Row], notes: Sequence[str] = (), compiled: Compiled | None = None) -> Check:
    """Judge what was measured: everything runs, and the Neural Engine isn't slower than the CPU.

    Args:
        rows: of `measure_all`.
        notes: what else is to be said.
        compiled: of `compile_first`.
    """
    compiled = compiled or Compiled()
    failures = [f"compiling: {compiled.error}"] if compiled.error else []
    failures += [*_errors(rows), *_slow(rows)]
    cells = [_cells(row) for row in rows]
    table = Table(("px", "units", "load s", "again s", "first ms", "median ms (min-max)", "runs"), tuple(cells))
    data = {"compile_s": compiled.seconds, "core_ml": [_data(row) for row in rows]}
    return Check(NAME, (_compiled(rows, compiled), *notes), tuple(failures), table=table, data=data)


def _compiled(rows: Sequence[Row], compiled: Compiled) -> str:
    if compiled.seconds is not None:
        when = f"compiled in this run, which took {compiled.seconds:.2f} s and is in no row"
    elif any(row.measured and row.measured.compiled for row in rows):
        when = "compiled in this run, in the time of the row that says so"
    elif compiled.error or not any(row.measured for row in rows):
        when = "not compiled"
    else:
        when = "compiled for this Mac before"
    return f"the package was {when}; what macOS compiles for the Neural Engine is in the first load, and kept by macOS"


def _errors(rows: Sequence[Row]) -> list[str]:
    """Each error once, with the places where it was met."""
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.error:
            places.setdefault(row.error, []).append(f"{size_text(row.size)} px on {row.units}")
    return [f"{', '.join(where)}: {error}" for error, where in places.items()]


def _slow(rows: Sequence[Row]) -> list[str]:
    medians = {(row.size, row.units): spread(row.measured.times_ms).median for row in rows if row.measured}
    found = []
    for size in dict.fromkeys(row.size for row in rows):
        engine, processor = medians.get((size, "CPU_AND_NE")), medians.get((size, "CPU_ONLY"))
        if engine is None or processor is None:
            continue
        if engine > _SLOWER * processor and engine - processor > _SLOWER_MS:
            found.append(
                f"{size_text(size)} px: CPU_AND_NE takes {engine:.1f} ms where CPU_ONLY takes {processor:.1f}: "
                "the Neural Engine doesn't help"
            )
    return found


def _cells(row: Row) -> tuple[str, ...]:
    heading = (size_text(row.size), row.units)
    if row.measured is None:
        return (*heading, "failed", "", "", "", "")
    found = row.measured
    load = f"{found.load_s:.2f}" + (", compiled in this run" if found.compiled else "")
    times = (load, f"{found.again_s:.2f}", f"{found.first_ms:.1f}", spread_text(found.times_ms))
    return (*heading, *times, str(len(found.times_ms)))


def _data(row: Row) -> Mapping[str, object]:
    data: dict[str, object] = {"size": list(row.size), "compute_units": row.units, "error": row.error}
    if row.measured:
        names = ("load_s", "again_s", "first_ms", "times_ms", "compiled")
        data |= {name: getattr(row.measured, name) for name in names}
    return data
