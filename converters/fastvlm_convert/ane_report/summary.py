"""All rules over a package, function by function."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm_convert.ane_report.macs import count_macs
from fastvlm_convert.ane_report.operation import operations
from fastvlm_convert.ane_report.rules import Finding, check_edge, check_op
from fastvlm_convert.mil_check import Program, open_package
from fastvlm_mlx.errors import BundleError

_NAMED = 3  # ops that the text names for a rule; JSON has them all


@dataclass(frozen=True, slots=True)
class Report:
    """What the rules say of one function.

    Attributes:
        function: its name.
        ops: op type -> how often.
        macs: multiply-accumulates by class of op.
        eligible_share: share of the MACs in ops that no blocking rule catches, 0 to 1.
        findings: every rule broken.
    """

    function: str
    ops: dict[str, int]
    macs: dict[str, int]
    eligible_share: float
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"heuristic": True, **asdict(self)}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_text(self) -> str:
        """The report for people."""
        total = sum(self.macs.values())
        lines = [
            f"{self.function}: {self.eligible_share:.1%} of {_giga(total)} expected on the Neural Engine "
            "(a heuristic: static rules, nothing was run)"
        ]
        lines += [f"  {name}: {_giga(value)}" for name, value in sorted(self.macs.items(), key=lambda m: -m[1])]
        groups: dict[tuple[str, bool], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.rule, finding.blocks), []).append(finding)
        lines += [_line(group) for group in groups.values()] or ["  no finding"]
        return "\n".join(lines)


def report(package: Path, function: str | None = None) -> list[Report]:
    """Apply the rules to a saved package.

    Args:
        package: a .mlpackage with an ML program.
        function: only this one; default all.

    Raises:
        BundleError: not such a package, damaged, or without that function.
        MissingDependencyError: coremltools isn't installed.
    """
    return [_report(program) for program in read_programs(package, function)]


def read_programs(package: Path, function: str | None = None) -> list[Program]:
    """The functions of a saved package, sorted by name; see `report`."""
    if not (package / "Manifest.json").is_file():
        raise BundleError(
            f"{package} is no readable Core ML package: it has no Manifest.json; give an .mlpackage folder"
        )
    programs = open_package(package).programs
    if function is not None and function not in programs:
        raise BundleError(f"{package} has no function {function}; it has {', '.join(sorted(programs))}")
    return [programs[name] for name in ([function] if function else sorted(programs))]


def _report(program: Program) -> Report:
    macs: Counter[str] = Counter()
    eligible = 0
    findings: list[Finding] = []
    for value in program.inputs:
        if value.name not in program.images:
            findings += check_edge(value, "input")
    ops = operations(program)
    for op in ops:
        found = check_op(op)
        findings += found
        kind, count = count_macs(op)
        if count:
            macs[kind] += count
            eligible += 0 if any(f.blocks for f in found) else count
    for value in program.outputs:
        findings += check_edge(value, "output")
    total = sum(macs.values())
    kinds = dict(Counter(op.type for op in ops))
    return Report(program.function, kinds, dict(macs), eligible / total if total else 1.0, tuple(findings))


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.3g} GMAC"


def _line(group: list[Finding]) -> str:
    """The findings of a rule, the first few by name."""
    first = group[0]
    names = ", ".join(f"{f.op} {f.where}" for f in group[:_NAMED]) + (", ..." if len(group) > _NAMED else "")
    effect = "off the Neural Engine" if first.blocks else "slower"
    return f"  {first.rule}, {effect} ({len(group)}): {names}: {first.detail} [{first.source}]"
