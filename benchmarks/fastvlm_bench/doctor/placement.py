"""Where Core ML's plan puts the ops of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fastvlm_bench.doctor.check import Check, Table
from fastvlm_bench.doctor.coreml_side import CoreMLState, place
from fastvlm_bench.doctor.worker import Worker
from fastvlm_mlx.vision.compute_plan import NEURAL_ENGINE, UNKNOWN, Placement

NAME = "placement"
WOULD = "which share of the work Core ML's compute plan gives the Neural Engine"
_UNITS = "CPU_AND_NE"  # what `load` asks for
_DEVICES = (NEURAL_ENGINE, "GPU", "CPU", UNKNOWN)
_NAMED = 3  # ops in a cell; JSON has them all
# Of a network that is worth its while: Core ML may rightly leave a small one to the CPU. Nothing was measured yet.
_LEAST_SHARE, _LARGE_BYTES = 0.5, 50_000_000


def check_placement(
    worker: Worker[CoreMLState], functions: Sequence[str], package_bytes: int, say: Callable[[str], object]
) -> Check:
    """Read the plan.

    Args:
        worker: reads it.
        functions: names of the package's functions.
        package_bytes: of the package; a large one is expected on the Neural Engine.
        say: called with what is being done.
    """
    say("Core ML's compute plan")
    return judge_placement(worker.do(place, functions, _UNITS), package_bytes)


def judge_placement(found: Sequence[Placement], package_bytes: int) -> Check:
    """Whether enough of each function is on the Neural Engine; arguments as `check_placement`."""
    failures = [
        f"{one.function}: {share_of(one):.0%} of the work on the Neural Engine, expected {_LEAST_SHARE:.0%} or more"
        for one in found
        if package_bytes >= _LARGE_BYTES and share_of(one) < _LEAST_SHARE
    ]
    headings = ("function", *(f"{device}: cost (ops)" for device in _DEVICES), "costliest elsewhere")
    return Check(
        NAME,
        (f"for {_UNITS}, which `load` asks for",),
        tuple(failures),
        table=Table(headings, tuple(_row(one) for one in found)),
        data={"placement": [one.to_dict() for one in found]},
    )


def share_of(found: Placement) -> float:
    """The Neural Engine's share of the cost, 0 to 1, or of the ops where Core ML estimates no cost."""
    if any(found.cost_share.values()):
        return found.cost_share.get(NEURAL_ENGINE, 0.0)
    return found.ops.get(NEURAL_ENGINE, 0) / max(sum(found.ops.values()), 1)


def _row(found: Placement) -> tuple[str, ...]:
    cells = [f"{found.cost_share.get(d, 0.0):.1%} ({found.ops[d]})" if d in found.ops else "-" for d in _DEVICES]
    named = ", ".join(f"{op.type} {op.name} {op.cost:.1%}" for op in found.elsewhere[:_NAMED])
    return (found.function, *cells, named or "-")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
