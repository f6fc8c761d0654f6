"""A benchmark's report for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastvlm_bench.machine import memory_text
from fastvlm_bench.report import Report, baseline_runs, baseline_spreads
from fastvlm_bench.runner import Run, Summary
from fastvlm_bench.stats import LEAST_RUNS, apart, spread, verdict
from fastvlm_bench.subjects import Subject
from fastvlm_mlx import __version__

TIMES = ("preprocess", "vision", "projector", "prefill", "first_token", "ttft")
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
    "2nd TTFT",
    "decode tok/s",
    "peak GiB",
)
LEAST_SHARE = 0.97  # of TTFT that its stages must make up together


def format_report(report: Report, baseline: Mapping[str, Any] | None = None) -> str:
    """The header, one row of medians per model and resolution, what limits them, and whether the stages add up.

    Args:
        report: what was measured.
        baseline: the data of an earlier report, for a comparison.
    """
    blocks = ["\n".join(_header(report))]
    for number, subject in enumerate(report.subjects):
        cases = [case for case in report.summary if case.subject == number]
        rows = [_HEADINGS, *(_row(case) for case in cases)]
        several = [_title(subject)] if len(report.subjects) > 1 else []
        blocks.append("\n".join((*several, *table(rows))))
        blocks += _limits(report, number, cases)
    if len(report.subjects) > 1:
        blocks.append("\n".join(_compared(report)))
    if baseline is not None:
        blocks.append("\n".join(_since(report, baseline)))
    return "\n\n".join((*blocks, _check(report.runs)))


def _header(report: Report) -> Iterable[str]:
    plan, machine = report.plan, report.machine
    blas = "" if machine.openblas is None else f", {_openblas(machine.openblas)}"
    memory = memory_text(machine.memory_bytes)
    yield f"fastvlm-bench {__version__}: " + "; ".join(_title(subject) for subject in report.subjects)
    yield f"ran on:  {' | '.join(dict.fromkeys(run.device for run in report.runs))}"
    yield f"machine: {machine.cpu}, {machine.cores} cores, {memory}, {machine.platform}"
    yield f"MLX:     {machine.mlx}, {machine.device}{blas}"
    yield f"input:   {report.image}; {plan.prompt_tokens} text tokens, whose values don't change the times"
    yield (
        f"times:   ms, median of {plan.runs} after {plan.warmup} for warm-up, min-max is TTFT's; "
        f"{plan.max_tokens} tokens generated"
    )
    for subject in report.subjects:
        if subject.load.warm_ms:
            cold = f"{subject.load.cold_ms:.0f} in a new process, " if subject.load.cold_ms is not None else ""
            yield f"load:    ms, {cold}{spread(subject.load.warm_ms).median:.0f} again ({subject.label})"
    if any(subject.seeded for subject in report.subjects):
        yield "seeded:  random weights of these shapes, made in memory; they answer nonsense in the usual time"


def _title(subject: Subject) -> str:
    return f"{subject.label}, decoder {subject.precision}"


def _openblas(config: str) -> str:
    """OpenBLAS's name and version out of "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ..."."""
    return " ".join(config.split()[:2]) if config else "without OpenBLAS, which is slow"


def _row(case: Summary) -> tuple[str, ...]:
    figures = case.figures
    ttft, speed = figures["ttft_ms"], figures["decode_tps"].median
    return (
        str(case.resolution),
        str(case.image_tokens),
        *(f"{figures[f'{name}_ms'].median:.1f}" for name in TIMES),
        f"{ttft.low:.1f}-{ttft.high:.1f}",
        f"{figures['second_ttft_ms'].median:.1f}",
        f"{speed:.1f}" if speed else "-",  # a single token has no speed
        f"{case.peak_bytes / 2**30:.2f}",
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in rows]


def _limits(report: Report, number: int, cases: Sequence[Summary]) -> Iterable[str]:
    """How much of what the machine can do each stage reached."""
    found = {case.resolution: report.rooflines.get((number, case.resolution), {}) for case in cases}
    stages = list(dict.fromkeys(stage for limits in found.values() for stage in limits))
    if not report.peaks or not stages:
        return
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in report.peaks.matmul_flops.items())
    rows = [["resolution", *stages]]
    for resolution, limits in found.items():
        cells = [f"{100 * limits[s].share:.0f} % ({limits[s].bound})" if s in limits else "-" for s in stages]
        rows.append([str(resolution), *cells])
    said = (
        f"share of this machine's limit (matmul GFLOP/s: {rates}; memory {report.peaks.bandwidth / 1e9:.0f} GB/s), "
        "and what sets it"
    )
    yield "\n".join((said, *table(rows)))


def _compared(report: Report) -> Iterable[str]:
    """Each later model beside the first: ratios of the same round."""
    base, *others = report.subjects
    yield f"TTFT by that of {base.label}, of the same round"
    rounds = {(run.subject, run.resolution, run.round): run.ttft_ms for run in report.runs if not run.warmup}
    for number, other in enumerate(others, 1):
        for resolution in report.plan.resolutions:
            pairs = [
                (value, rounds[number, resolution, index])
                for (subject, side, index), value in rounds.items()
                if (subject, side) == (0, resolution)
            ]
            ratios = [theirs / ours for ours, theirs in pairs]
            found = spread(ratios)
            said = verdict(ratios, base.label, other.label)
            yield f"  {resolution}: {other.label} {found.median:.2f} ({found.low:.2f}-{found.high:.2f}), {said}"


def _since(report: Report, baseline: Mapping[str, Any]) -> Iterable[str]:
    """Beside an earlier report."""
    before, runs = baseline_spreads(baseline, "ttft_ms"), baseline_runs(baseline)
    yield f"TTFT beside that of {baseline['date']}"
    there, here = (f"{m['cpu']}, {m['device']}" for m in (baseline["machine"], asdict(report.machine)))
    if there != here:
        yield f"  measured on another machine: {there}"
    identities = {subject["label"]: subject["identity"] for subject in baseline["subjects"]}
    for subject in report.subjects:
        if identities.get(subject.label, subject.identity) != subject.identity:
            yield f"  {subject.label} had other weights or another encoder then"
    for case in report.summary:
        label = report.subjects[case.subject].label
        old, new = before.get((label, case.resolution)), case.figures["ttft_ms"]
        if old is None:
            yield f"  {case.resolution}: {label} wasn't measured then"
            continue
        said = "no difference shown"
        if apart(old, new):
            said = "faster" if new.median < old.median else "slower"
            fewest = min(case.runs, runs[label, case.resolution])
            said = said if fewest >= LEAST_RUNS else f"fewer than {LEAST_RUNS} runs show nothing"
        yield f"  {case.resolution}: {label} {old.median:.1f} -> {new.median:.1f} ms, {said}"


def _check(runs: Sequence[Run]) -> str:
    """The sum of the parts against the whole, for the run where they fit worst."""
    measured = [run for run in runs if not run.warmup]
    stages = min(run.stages_ms / run.ttft_ms for run in measured)
    whole = min((run.ttft_ms + run.decode_ms) / run.wall_ms for run in measured)
    doubt = "" if stages >= LEAST_SHARE else f"; the rest, more than {100 * (1 - LEAST_SHARE):.0f} %, is in no stage"
    return (
        f"in every run the stages make up at least {_percent(stages)} of TTFT, "
        f"and TTFT and decode {_percent(whole)} of the whole call{doubt}"
    )


def _percent(share: float) -> str:
    """Rounded down, since it stands after "at least"."""
    return f"{math.floor(share * 1000) / 10:.1f} %"
