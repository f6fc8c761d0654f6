"""Where Core ML really runs a saved package's ops on this Mac; the plan itself is the run time's."""

from __future__ import annotations

from pathlib import Path

from fastvlm_convert.ane_report import read_programs
from fastvlm_convert.quiet import quiet
from fastvlm_mlx.vision.compute_plan import OpenPlan, PlacedOp, Placement, open_plan, place_functions

__all__ = ["OpenPlan", "PlacedOp", "Placement", "open_plan", "read_placement"]


def read_placement(
    package: Path,
    function: str | None = None,
    compute_units: str = "CPU_AND_NE",
    opener: OpenPlan = open_plan,
) -> list[Placement]:
    """Ask Core ML where it will run a package.

    Args:
        package: a .mlpackage with an ML program.
        function: only this one; default all.
        compute_units: what Core ML may use, a name of coremltools' ComputeUnit.
        opener: loads the plan.

    Raises:
        BundleError: not such a package, or without that function.
        EncoderError: there is no plan; see `open_plan`.
    """
    names = [program.function for program in read_programs(package, function)]
    with quiet():
        return place_functions(package, names, compute_units, opener)
