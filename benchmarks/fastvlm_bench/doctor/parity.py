"""Core ML's features beside MLX's in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastvlm_bench.doctor.check import Check, Table
from fastvlm_bench.doctor.plan import Size, size_text

if TYPE_CHECKING:
    import numpy as np

    from fastvlm_bench.doctor.coreml_side import Row

NAME = "parity"
WOULD = "Core ML's features beside MLX's in float32 at each resolution, on each of its compute units"
# The gates of fastvlm-convert for a package whose ops are rounded to float16: 1.6e-3 to 2.6e-3 measured with 16-bit
# weights, 1.8e-2 with 8-bit ones. How the Neural Engine adds up inside an op isn't in them.
HALF_GATE = 5e-3
GATES = {16: HALF_GATE, 8: 3e-2}


def relative_l2(found: np.ndarray, right: np.ndarray) -> float | None:
    """|found - right| / |right|; None where it isn't finite."""
    import numpy as np

    made, expected = found.astype(np.float64), right.astype(np.float64)
    distance = float(np.linalg.norm(made - expected) / np.linalg.norm(expected))
    return distance if np.isfinite(distance) else None


def check_parity(
    rows: Sequence[Row],
    references: Mapping[Size, np.ndarray],
    bits: int,
    no_gate: str | None = None,
    errors: Sequence[str] = (),
) -> Check:
    """Judge what Core ML made.

    Args:
        rows: what ran, and what it made.
        references: size -> MLX's features, (N, C) float32.
        bits: of the package's weights.
        no_gate: why the distances can't be judged; they are shown all the same.
        errors: why MLX's features are missing at some size.
    """
    gate = GATES[bits]
    distances: dict[tuple[Size, str], float | None] = {}
    failures = list(errors)
    for row in rows:
        right = references.get(row.size)
        if row.measured is None or right is None:
            continue
        where = f"{size_text(row.size)} px, {row.units}"
        if row.measured.features.shape != right.shape:
            failures.append(f"{where}: made shape {row.measured.features.shape}, expected {right.shape}")
            continue
        distances[row.size, row.units] = distance = relative_l2(row.measured.features, right)
        if distance is None:
            failures.append(f"{where}: the features aren't finite")
        elif distance > gate and not no_gate:
            failures.append(f"{where}: relative L2 {distance:.1e}, at most {gate:.0e}")
    data = [{"size": list(s), "compute_units": u, "relative_l2": value} for (s, u), value in distances.items()]
    reason = no_gate or (None if distances or failures else "nothing ran that could be compared")
    notes = () if no_gate else (f"relative L2, at most {gate:.0e} for {bits}-bit weights",)
    return Check(
        NAME,
        notes,
        tuple(failures),
        reason,
        _table(distances) if distances else None,
        {"gate": gate, "parity": data},
    )


def _table(distances: Mapping[tuple[Size, str], float | None]) -> Table:
    sizes = list(dict.fromkeys(size for size, _ in distances))
    columns = list(dict.fromkeys(units for _, units in distances))
    rows = [(size_text(size), *(_cell(distances, size, units) for units in columns)) for size in sizes]
    return Table(("px", *columns), tuple(rows))


def _cell(distances: Mapping[tuple[Size, str], float | None], size: Size, units: str) -> str:
    if (size, units) not in distances:
        return ""
    distance = distances[size, units]
    return "not finite" if distance is None else f"{distance:.1e}"
