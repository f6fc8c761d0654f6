"""Where Core ML really runs a package's ops on this Mac: its compute plan, on macOS 14.4 or newer."""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastvlm_mlx.errors import EncoderError, MissingDependencyError

_LEAST_MACOS = (14, 4)
_NAMED = 10  # ops that the text names; JSON has them all
NEURAL_ENGINE, UNKNOWN = "Neural Engine", "unknown"
# By the name of their class: the classes themselves can be made on a Mac alone.
_DEVICES = {
    "MLNeuralEngineComputeDevice": NEURAL_ENGINE,
    "MLGPUComputeDevice": "GPU",
    "MLCPUComputeDevice": "CPU",
}


@dataclass(frozen=True, slots=True)
class PlacedOp:
    """An op and its device.

    Attributes:
        type: MIL's name of the op, without its opset.
        name: of its first output.
        device: "Neural Engine", "GPU", "CPU", or "unknown" where Core ML doesn't say.
        cost: share of the function's estimated cost, 0 to 1.
    """

    type: str
    name: str
    device: str
    cost: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Core ML's plan for one function.

    Attributes:
        function: its name.
        compute_units: what Core ML was allowed to use.
        cost_share: device -> share of the estimated cost, 0 to 1.
        ops: device -> number of ops.
        elsewhere: the ops that aren't on the Neural Engine, the dearest first.
    """

    function: str
    compute_units: str
    cost_share: dict[str, float]
    ops: dict[str, int]
    elsewhere: tuple[PlacedOp, ...]

    def to_dict(self) -> dict[str, Any]:
        """The placement as plain data."""
        return {"heuristic": False, **asdict(self)}

    def to_json(self) -> str:
        """The placement as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_text(self) -> str:
        """The placement for people."""
        share = self.cost_share.get(NEURAL_ENGINE, 0.0)
        lines = [
            f"{self.function}: {share:.1%} of the estimated cost on the Neural Engine "
            f"(Core ML's plan for {self.compute_units})"
        ]
        lines += [f"  {device}: {self.cost_share[device]:.1%}, {count} ops" for device, count in self.ops.items()]
        lines += [f"  {op.device}: {op.type} {op.name}: {op.cost:.2%}" for op in self.elsewhere[:_NAMED]]
        if (rest := len(self.elsewhere) - _NAMED) > 0:
            lines.append(f"  and {rest} more")
        return "\n".join(lines)


OpenPlan = Callable[[Path, str], AbstractContextManager[Any]]


@contextmanager
def open_plan(package: Path, compute_units: str) -> Iterator[Any]:
    """Compile a package and load its plan, coremltools' MLComputePlan.

    Raises:
        EncoderError: not on macOS 14.4 or newer, or Core ML can't compile or plan it.
        MissingDependencyError: coremltools isn't installed.
    """
    if reason := why_no_plan():
        raise EncoderError(reason)
    try:
        import coremltools as ct
        from coremltools.models.compute_plan import MLComputePlan
    except ImportError as exc:
        raise MissingDependencyError("the compute plan needs coremltools: pip install 'fastvlm-mlx[convert]'") from exc
    # Kept until the plan has been read: nothing says that it doesn't look into the folder later.
    with TemporaryDirectory(prefix="fastvlm-plan-") as folder:
        try:
            compiled = ct.models.utils.compile_model(str(package), str(Path(folder) / "package.mlmodelc"))
            plan = MLComputePlan.load_from_path(path=compiled, compute_units=getattr(ct.ComputeUnit, compute_units))
        except Exception as exc:  # coremltools raises bare Exception, Core ML's own errors arrive as RuntimeError
            raise EncoderError(f"Core ML can't plan {package}: {exc}") from exc
        yield plan


def place_functions(
    package: Path,
    functions: Sequence[str],
    compute_units: str = "CPU_AND_NE",
    opener: OpenPlan = open_plan,
) -> list[Placement]:
    """Ask Core ML where it will run functions of a package.

    Args:
        package: a .mlpackage with an ML program.
        functions: their names; `coreml_runtime.ONLY_FUNCTION` where the package has a single one.
        compute_units: what Core ML may use, a name of coremltools' ComputeUnit.
        opener: loads the plan.

    Returns:
        A placement for each function, in the order of `functions`.

    Raises:
        EncoderError: there is no plan, or it lacks a function; see `open_plan`.
        MissingDependencyError: coremltools isn't installed.
    """
    with opener(package, compute_units) as plan:
        program = plan.model_structure.program
        found = {} if program is None else program.functions
        if missing := [name for name in functions if name not in found]:
            raise EncoderError(f"Core ML's plan of {package} lacks function {', '.join(missing)}")
        return [_placement(plan, name, found[name].block.operations, compute_units) for name in functions]


def _placement(plan: Any, function: str, operations: list[Any], units: str) -> Placement:
    placed = [op for source in operations if (op := _place(plan, source))]
    if placed and all(op.device == UNKNOWN for op in placed):
        raise EncoderError(f"Core ML's plan has no device for any op of function {function}")
    total = sum(op.cost for op in placed) or 1.0
    placed = [replace(op, cost=op.cost / total) for op in placed]
    counts = dict(Counter(op.device for op in placed).most_common())
    shares = {device: sum(op.cost for op in placed if op.device == device) for device in counts}
    elsewhere = sorted((op for op in placed if op.device != NEURAL_ENGINE), key=lambda op: -op.cost)
    return Placement(function, units, shares, counts, tuple(elsewhere))


def _place(plan: Any, operation: Any) -> PlacedOp | None:
    """One op; None for a constant, which runs nowhere."""
    kind = str(operation.operator_name).rpartition(".")[2]  # "ios17.conv"
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    if usage is None and (kind == "const" or kind.startswith("constexpr_")):
        return None
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    device = UNKNOWN if usage is None else type(usage.preferred_compute_device).__name__
    name = operation.outputs[0].name if operation.outputs else ""
    return PlacedOp(kind, name, _DEVICES.get(device, device), 0.0 if cost is None else float(cost.weight))


def why_no_plan() -> str | None:
    """Why this system has no compute plans; None where it has."""
    needed = f"Core ML's compute plan needs macOS {'.'.join(map(str, _LEAST_MACOS))} or newer"
    if sys.platform != "darwin":
        return f"{needed}, this is {platform.system()}"
    release = tuple(int(part) for part in platform.mac_ver()[0].split(".")[:2])
    return f"{needed}, this is macOS {platform.mac_ver()[0]}" if release < _LEAST_MACOS else None
