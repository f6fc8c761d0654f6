"""Core ML's times, on each of its compute units. What runs there may crash or hang, so a worker runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True)
class Measured:
    """A function on some compute units.

    Attributes:
        load_s: seconds to load it, and to compile it where that wasn't done before.
        again_s: seconds to load it again.
        first_ms: the first prediction.
        times_ms: those after it.
        features: (N, C) float16 of `plan.sample_pixels`.
    """

    load_s: float
    again_s: float
    first_ms: float
    times_ms: tuple[float, ...]
    features: np.ndarray


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


def measure(state: CoreMLState, size: Size, units: str, runs: int, seconds: float) -> Measured:
    """Load a function, predict, load it again, all as the library does; arguments as `plan.time_calls`."""
    import time

    import numpy as np

    from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder

    encoder = CoreMLVisionEncoder(state.package, state.runtime, units)
    load_s, first_s = encoder.warm_up(size)
    pixels = sample_pixels(size)[None]
    times = time_calls(lambda: encoder.encode(pixels), runs, seconds)
    features = np.array(encoder.encode(pixels)[0])
    encoder = CoreMLVisionEncoder(state.package, state.runtime, units)  # lets go of what was loaded
    start = time.perf_counter()
    encoder.prepare(size)
    return Measured(load_s, time.perf_counter() - start, first_s * 1e3, tuple(times), features)


def place(state: CoreMLState, functions: Sequence[str], units: str) -> list[Placement]:
    """Core ML's plan; see `place_functions`."""
    return place_functions(state.package, functions, units, state.apple.open_plan)


def core_ml_worker(package: Path, apple: Apple, plan: Plan) -> Worker[CoreMLState]:
    """The worker of a package."""
    return Worker(partial(CoreMLState, package, apple), plan.limit_s, plan.debug)


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


def compiled_packages() -> set[Path]:
    """The compiled packages that the library keeps."""
    return set((cache_dir() / "coreml").glob("*.mlmodelc"))


def check_core_ml(rows: Sequence[Row], notes: Sequence[str] = ()) -> Check:
    """Judge what was measured: everything runs, and the Neural Engine isn't slower than the CPU.

    Args:
        rows: of `measure_all`.
        notes: what else is to be said.
    """
    failures = [*_errors(rows), *_slow(rows)]
    cells = [_cells(row) for row in rows]
    table = Table(("px", "units", "load s", "again s", "first ms", "median ms (min-max)", "runs"), tuple(cells))
    return Check(NAME, tuple(notes), tuple(failures), table=table, data={"core_ml": [_data(row) for row in rows]})


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
    times = (f"{found.load_s:.2f}", f"{found.again_s:.2f}", f"{found.first_ms:.1f}", spread_text(found.times_ms))
    return (*heading, *times, str(len(found.times_ms)))


def _data(row: Row) -> Mapping[str, object]:
    data: dict[str, object] = {"size": list(row.size), "compute_units": row.units, "error": row.error}
    if row.measured:
        names = ("load_s", "again_s", "first_ms", "times_ms")
        data |= {name: getattr(row.measured, name) for name in names}
    return data
