"""A comparison as text for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm_bench.compare.cold import ColdRun
from fastvlm_bench.compare.plan import CHECKED_TOKENS, PICTURE_SIZE, QUESTIONS, Plan
from fastvlm_bench.compare.rivals import LIBRARIES
from fastvlm_bench.compare.rounds import Run
from fastvlm_bench.compare.summary import Line
from fastvlm_bench.machine import Machine, memory_text
from fastvlm_bench.stats import Spread
from fastvlm_mlx import __version__

FORMAT_VERSION = 1
_HEADINGS = ("px", "figure", "side", "median", "min-max", "ratio", "min-max", "says")
_LEFT = (1, 2, 7)  # columns of words


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, where, and what was measured.

    Attributes:
        model: its name.
        dtype: of all weights and activations.
        threads: for each side.
        date: UTC, ISO 8601.
        plan: how often what ran.
        cold: whole processes were run, one for each question.
        machine: where.
        sides: what is known of each: versions, device.
        positions: of a question about a picture, by resolution.
        failures: why a rival has no times.
        runs: the measured ones, in order.
        lines: what they come to.
    """

    model: str
    dtype: str
    threads: int
    date: str
    plan: Plan
    cold: bool
    machine: Machine
    sides: Mapping[str, Mapping[str, Any]]
    positions: Mapping[int, int]
    failures: Mapping[str, str]
    runs: Sequence[Run | ColdRun]
    lines: Sequence[Line]


def to_json(report: Report) -> str:
    """Everything: raw runs, medians, ratios, versions, the machine, and what each side did."""
    data = {
        "format_version": FORMAT_VERSION,
        "tool": f"fastvlm-bench compare {__version__}",
        "questions": QUESTIONS,
        "picture": "synthetic photo, {} x {} px JPEG, another one for each round".format(*PICTURE_SIZE),
        "checked_tokens": CHECKED_TOKENS,
        **asdict(report),
        "sides": {name: {"does": _does(name, report.cold), **facts} for name, facts in report.sides.items()},
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def format_report(report: Report) -> str:
    """The header and a row for each figure of each side."""
    table = format_table([_HEADINGS, *map(_row, report.lines)]) if report.lines else ["no rival was timed"]
    return "\n".join((*_header(report), "", *table))


def _header(report: Report) -> list[str]:
    plan, machine = report.plan, report.machine
    return [
        f"fastvlm-bench compare {__version__}: {report.model}, {report.dtype}, {report.threads} threads for each side",
        f"machine: {machine.cpu}, {machine.cores} cores, {memory_text(machine.memory_bytes)}, {machine.platform}",
        *(_side(name, facts, report.cold) for name, facts in report.sides.items()),
        *(_COLD if report.cold else (*_warm(report.positions), *_memory(report.runs))),
        f"rounds:  {plan.runs}, in which the sides take turns, after one that isn't timed; answers are checked in all",
        "ratio:   the side's time by ours in the same round; above 1 ours was faster",
    ]


_COLD = ("times:   ms from the start of the command to its first token, a new process each time",)


def _warm(positions: Mapping[int, int]) -> tuple[str, ...]:
    lengths = ", ".join(f"{count} positions at {side} px" for side, count in positions.items())
    return (
        f"input:   a new synthetic photo each round, two questions about it; {lengths}",
        "times:   ms from the call to the first token; a token is one of the first answer, after its first",
    )


def _memory(runs: Sequence[Run | ColdRun]) -> tuple[str, ...]:
    """The most that each side's process ever held."""
    most: dict[str, int] = {}
    for run in runs:
        if isinstance(run, Run):
            most[run.side] = max(most.get(run.side, 0), run.peak_rss_bytes)
    return (
        (f"memory:  {', '.join(f'{side} {held / 1e9:.2f} GB' for side, held in most.items())} at most",) if most else ()
    )


def _side(name: str, facts: Mapping[str, Any], cold: bool) -> str:
    numbers = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    device = f"{facts['device']}; " if "device" in facts else ""
    return f"{name}: {numbers}; {device}{_does(name, cold)}"


def _does(name: str, cold: bool) -> str:
    """What a side does when it is asked."""
    library = LIBRARIES[name]
    return " ".join(("python", *(Path(part).name for part in library.command))) if cold else library.does


def _row(line: Line) -> tuple[str, ...]:
    ratio = ("", "") if line.ratio is None else (f"{line.ratio.median:.2f}", _ends(line.ratio, 1, 2))
    times = (f"{line.seconds.median * 1e3:.1f}", _ends(line.seconds, 1e3, 1))
    return str(line.resolution), line.figure, line.side, *times, *ratio, line.verdict


def _ends(values: Spread, unit: float, digits: int) -> str:
    return f"{values.low * unit:.{digits}f}-{values.high * unit:.{digits}f}"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of words to the left, of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in _LEFT else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
