"""The MIL checker in Core ML's place, so that the whole path runs on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastvlm_convert.mil_check.execution import execute
from fastvlm_convert.mil_check.package import open_package
from fastvlm_convert.quiet import quiet
from fastvlm_mlx.vision.coreml_runtime import Function, Predict, describe


class CheckerRuntime:
    """Implements `fastvlm_mlx.vision.coreml_runtime.Runtime`; counts what it is asked to open."""

    def __init__(self) -> None:
        self.opened: list[tuple[str | None, str]] = []

    def functions(self, package: Path) -> list[Function]:
        """Read by the code that reads them on a Mac."""
        with quiet():
            import coremltools as ct

            open_package(package)  # refuses what is damaged
            return describe(ct.utils.load_spec(str(package)))

    def open(self, package: Path, function: Function, compute_units: str) -> Predict:
        """A function of the package, op by op in float16."""
        self.opened.append((function.name, compute_units))
        with quiet():
            program = open_package(package).program(function.name)

        def predict(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            given = {n: v[None] if v.ndim == 3 else v for n, v in inputs.items()}
            return execute(program, given, "float16").outputs

        return predict
