"""A benchmark as text for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fastvlm_bench.machine import Machine
from fastvlm_bench.runner import Plan, Run, Summary, summarise
from fastvlm_mlx import __version__

FORMAT_VERSION = 1
_HEADINGS = (
    "resolution",
    "image tokens",
    "preprocess",
    "vision",
    "projector",
    "prefill",
    "first token",
    "TTFT",
    "min-max",
    "decode tok/s",
)


@dataclass(frozen=True, slots=True)
class Report:
    """What ran, where, and what was measured.

    Attributes:
        model: its name.
        precision: of the decoder's weights.
        image: what the pictures were.
        date: UTC, ISO 8601.
        plan: how often what ran.
        machine: where.
        runs: every call, in order.
    """

    model: str
    precision: str
    image: str
    date: str
    plan: Plan
    machine: Machine
    runs: tuple[Run, ...]


def to_json(report: Report) -> str:
    """Everything: raw runs, medians and the machine."""
    data = {
        "format_version": FORMAT_VERSION,
        "tool": f"fastvlm-bench {__version__}",
        **asdict(report),
        "summary": [asdict(summary) for summary in summarise(report.runs)],
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def format_report(report: Report) -> str:
    """The header, one row of medians per resolution, and whether the stages add up."""
    rows = [_HEADINGS, *(_row(summary) for summary in summarise(report.runs))]
    return "\n".join((*_header(report), "", *_table(rows), "", _check(report.runs)))


def _header(report: Report) -> tuple[str, ...]:
    plan, machine = report.plan, report.machine
    blas = "" if machine.openblas is None else f", {_openblas(machine.openblas)}"
    memory = f"{machine.memory_bytes / 2**30:.1f} GiB"
    devices = " | ".join(dict.fromkeys(run.device for run in report.runs))
    return (
        f"fastvlm-bench {__version__}: {report.model}, decoder {report.precision}",
        f"ran on:  {devices}",
        f"machine: {machine.cpu}, {machine.cores} cores, {memory}, {machine.platform}",
        f"MLX:     {machine.mlx}, {machine.device}{blas}",
        f"input:   {report.image}; {plan.prompt_tokens} text tokens, whose values don't change the times",
        f"times:   ms, median of {plan.runs} after {plan.warmup} for warm-up, min-max is TTFT's; "
        f"{plan.max_tokens} tokens generated",
    )


def _openblas(config: str) -> str:
    """OpenBLAS's name and version out of "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ..."."""
    return " ".join(config.split()[:2]) if config else "without OpenBLAS, which is slow"


def _row(summary: Summary) -> tuple[str, ...]:
    figures = summary.figures
    names = ("preprocess_ms", "vision_ms", "projector_ms", "prefill_ms", "first_token_ms", "ttft_ms")
    ttft, speed = figures["ttft_ms"], figures["decode_tps"].median
    return (
        str(summary.resolution),
        str(summary.image_tokens),
        *(f"{figures[name].median:.1f}" for name in names),
        f"{ttft.low:.1f}-{ttft.high:.1f}",
        f"{speed:.1f}" if speed else "-",  # a single token has no speed
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in rows]


def _check(runs: Sequence[Run]) -> str:
    """The sum of the parts against the whole, for the run where they fit worst."""
    measured = [run for run in runs if not run.warmup]
    stages = min(run.stages_ms / run.ttft_ms for run in measured)
    whole = min((run.ttft_ms + run.decode_ms) / run.wall_ms for run in measured)
    return (
        f"in every run the stages make up at least {_percent(stages)} of TTFT, "
        f"and TTFT and decode {_percent(whole)} of the whole call"
    )


def _percent(share: float) -> str:
    """Rounded down, since it stands after "at least"."""
    return f"{math.floor(share * 1000) / 10:.1f} %"
