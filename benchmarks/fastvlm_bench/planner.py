"""`fastvlm-bench plan`: which decoder, bits and resolution fit a time to first token, from what was measured."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvlm_bench.front import (
    MEMORY_UNKNOWN,
    Budget,
    Choice,
    candidates,
    decoder_name,
    grids_of,
    judge,
    trained_side,
)
from fastvlm_bench.plan_report import Planned, format_plan, to_json
from fastvlm_mlx import __version__
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import FastVLMError, InputError
from fastvlm_mlx.files import write_text
from fastvlm_mlx.latency import Latency, latencies
from fastvlm_mlx.measurement_cache import saved_measurements
from fastvlm_mlx.measurements import Report, Subject, read_report

_MS = {"ms": 1.0, "s": 1e3}
_BYTES = {"MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}
_SAME_MACHINE = ("cpu", "cores", "memory_bytes", "device")


class NoChoiceError(FastVLMError):
    """Nothing that was measured is within the budget."""

    exit_code = 1


def parse_time(text: str) -> float:
    """Milliseconds from "200ms" or "0.2s"; InputError for anything else, a bare number too."""
    return _parse("--ttft", text, _MS, "200ms or 0.2s")


def parse_memory(text: str) -> int:
    """Bytes from "8GB", "7.5GiB", "512MB" or "512MiB"; InputError for anything else."""
    return int(_parse("--memory", text, _BYTES, "8GB, 8GiB or 512MB"))


def _parse(option: str, text: str, units: Mapping[str, float], examples: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", text, re.ASCII)
    factor = {unit.lower(): value for unit, value in units.items()}.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise InputError(f"{option} takes a number with its unit, such as {examples}; got {text!r}")
    value = float(found[1]) * factor
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{option} must be above 0, such as {examples}; got {text!r}")
    return value


def _check_squares(report: Report) -> None:
    """Raise InputError for times of tiles or of images in their own shape: they say nothing about a square."""
    pairs = zip(report.subjects, report.points, strict=True)
    points = ((subject, point) for subject, points in pairs for point in points)
    if any(point.image_tokens != (point.resolution // subject.downsampling) ** 2 for subject, point in points):
        raise InputError(
            f"{report.where} was measured of tiles or of an image's own shape, plans need whole squares; measure "
            "without --aspect"
        )


def make_plan(reports: Sequence[Report], budget: Budget, text_tokens: int | None = None) -> Planned:
    """Choose.

    Args:
        reports: of one machine, oldest first.
        budget: what a choice may take.
        text_tokens: of a question, around the image; None for what was measured most.

    Raises:
        InputError: they hold no measurement.
    """
    known = latencies(reports)
    counts = Counter(point.text_tokens for report in reports for points in report.points for point in points)
    if not counts:
        raise InputError(f"{reports[0].where} holds no measured resolution; measure again with `fastvlm-bench --json`")
    tokens = text_tokens or max(counts, key=lambda count: (counts[count], -count))
    choices: list[Choice] = []
    left_out: list[str] = []
    for subject, latency in known.items():
        found = candidates(subject, latency, tokens, budget)
        choices += found
        left_out += _left_out(subject, latency, tokens, found)
    return Planned(budget, tokens, tuple(reports), tuple(judge(choices, budget)), tuple(left_out))


def _check_machines(reports: Sequence[Report]) -> None:
    first = reports[0]
    for other in reports[1:]:
        for name in _SAME_MACHINE:
            here, there = first.machine.get(name), other.machine.get(name)
            if here != there:
                raise InputError(
                    f"{first.where} and {other.where} are of different machines ({name} {here!r} and {there!r}); "
                    "plan for one at a time"
                )


def _left_out(subject: Subject, latency: Latency, tokens: int, found: Sequence[Choice]) -> list[str]:
    name = f"{decoder_name(subject)} ({subject.precision}, {subject.vision})"
    if not found:
        return [f"{name}: nothing was measured about questions of {tokens} text tokens, nor on both sides of that"]
    offered, side = {choice.grid for choice in found}, trained_side(subject) or 0
    return [
        f"{name} in {grid} tiles: takes {grid.tokens(side) + tokens} positions at {side} px, measured are up to "
        f"{latency.most_positions}; measure longer questions with --prompt-tokens"
        for grid in grids_of(subject)
        if grid not in offered
    ]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench plan",
        description="Name the choices of decoder, bits and resolution within a time to first token, with the "
        "published accuracies, from what fastvlm-bench measured on this machine or from saved reports.",
    )
    parser.add_argument("--ttft", required=True, metavar="TIME", help="time to first token, such as 200ms or 0.2s")
    parser.add_argument("--memory", metavar="SIZE", help="most memory of MLX, such as 8GB, 8GiB or 512MB")
    parser.add_argument(
        "--from",
        dest="reports",
        action="append",
        default=[],
        metavar="FILE",
        help="a report of `fastvlm-bench --json`, of another machine for instance; may be repeated",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="text tokens around the image (default: what was measured most)"
    )
    parser.add_argument("--all", action="store_true", help="show what isn't on the front too, and why")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every choice there")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(build_parser(), _plan, argv)


def _plan(args: argparse.Namespace) -> None:
    budget = Budget(parse_time(args.ttft), None if args.memory is None else parse_memory(args.memory))
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        raise InputError(f"--prompt-tokens must be at least 1, got {args.prompt_tokens}")
    if args.json and args.json.is_dir():
        raise InputError(f"--json {args.json} is a folder; name a file")
    plan = make_plan(_reports(args.reports), budget, args.prompt_tokens)
    if args.json:
        write_text(args.json, to_json(plan))
    if plan.front or args.all:
        print(format_plan(plan, args.all))
    if not plan.verdicts:
        raise InputError(
            f"nothing was measured about questions of {plan.text_tokens} text tokens; choose another --prompt-tokens"
        )
    if not plan.front:
        raise NoChoiceError(_nothing(plan))


def _reports(names: Sequence[str]) -> list[Report]:
    if names:
        reports = sorted(map(read_report, names), key=lambda report: report.date)
        for report in reports:
            _check_squares(report)
        _check_machines(reports)
        return reports
    if found := saved_measurements():
        return found
    raise InputError(
        f"nothing was measured on this machine with fastvlm-mlx {__version__} and this MLX yet; run `fastvlm-bench "
        "--resolution 256,512,1024` first, or name a saved report with --from FILE"
    )


def _nothing(plan: Planned) -> str:
    unknown = sum(verdict.reason == MEMORY_UNKNOWN for verdict in plan.verdicts)
    if unknown:
        return (
            f"no choice is known to be within the budget: {unknown} would be in time, but their memory wasn't measured "
            "alone; measure one model at a time, or leave --memory out"
        )
    least = min((verdict.choice for verdict in plan.verdicts), key=lambda choice: choice.estimate.ttft.high)
    return (
        f"no choice is within the budget: the least TTFT is {least.estimate.ttft.high:.1f} ms at worst ({least}); "
        f"raise --ttft{' or --memory' if plan.budget.memory_bytes else ''}, or measure a smaller model or fewer bits"
    )
