"""A benchmark's results: as JSON and CSV for programs; `fastvlm_bench.tables` writes them for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastvlm_bench.machine import Machine
from fastvlm_bench.peaks import Peaks
from fastvlm_bench.runner import Plan, Run, Summary, summarise
from fastvlm_bench.stats import Spread
from fastvlm_bench.subjects import Subject
from fastvlm_mlx import __version__
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.measurements import parse_report

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True)
class StageLimit:
    """What a stage has to do, and how near to the machine's limit it came.

    Attributes:
        flops: floating-point operations.
        bytes: that must be moved at least.
        bound: "compute" or "memory": which of them takes longer at the machine's peak.
        limit_ms: how long.
        share: limit by the measured median; 1 is all that the machine can do.
    """

    flops: int
    bytes: int
    bound: str
    limit_ms: float
    share: float


@dataclass(frozen=True, slots=True)
class Report:
    """What ran, where, and what was measured.

    Attributes:
        subjects: the models.
        image: what the pictures were.
        date: UTC, ISO 8601.
        plan: how often what ran.
        machine: where.
        peaks: what the machine reached; None where that wasn't measured.
        runs: every pair of questions, in order.
        rooflines: stage -> limit, for (subject, resolution).
    """

    subjects: tuple[Subject, ...]
    image: str
    date: str
    plan: Plan
    machine: Machine
    peaks: Peaks | None
    runs: tuple[Run, ...]
    rooflines: dict[tuple[int, int], dict[str, StageLimit]]

    @property
    def summary(self) -> tuple[Summary, ...]:
        """Medians and ends, by model and resolution."""
        return summarise(self.runs)


def to_data(report: Report) -> dict[str, Any]:
    """Everything as plain data: raw runs, medians, limits and the machine."""
    parts = {f.name: getattr(report, f.name) for f in fields(report) if f.name not in ("rooflines", "runs")}
    plain = {name: asdict(part) if hasattr(part, "__dataclass_fields__") else part for name, part in parts.items()}
    summary = []
    for case in report.summary:
        limits = report.rooflines.get((case.subject, case.resolution))
        roofline = {stage: asdict(limit) for stage, limit in limits.items()} if limits else None
        summary.append(asdict(case) | {"roofline": roofline})
    return {
        "format_version": FORMAT_VERSION,
        "tool": f"fastvlm-bench {__version__}",
        **plain,
        "subjects": [asdict(subject) | {"label": subject.label} for subject in report.subjects],
        "runs": [asdict(run) for run in report.runs],
        "summary": summary,
    }


def to_json(report: Report) -> str:
    """`to_data` as text."""
    return json.dumps(to_data(report), indent=2, ensure_ascii=False) + "\n"


def to_csv(report: Report) -> str:
    """A line for each run, warm-up included, with the model's label."""
    columns = ["label", *(f.name for f in fields(Run))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in report.runs:
        writer.writerow({"label": report.subjects[run.subject].label, **asdict(run)})
    return text.getvalue()


def read_report(file: Path) -> dict[str, Any]:
    """The data of a report that `fastvlm-bench --json` wrote.

    Raises:
        InputError: no such report, no JSON, another format.
    """
    if not file.is_file():
        raise InputError(f"{file} isn't a file; make it with: fastvlm-bench --json {file}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise InputError(f"{file} isn't JSON ({exc}); make it anew with: fastvlm-bench --json {file}") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION or "summary" not in data:
        raise InputError(
            f"{file} must be a report of format_version {FORMAT_VERSION}, it has {version}; "
            f"make it anew with: fastvlm-bench --json {file}"
        )
    return dict(data)


def read_baseline(file: Path, plan: Plan, image: str) -> dict[str, Any]:
    """The data of an earlier report that asked the same questions.

    Args:
        file: that `fastvlm-bench --json` wrote.
        plan: of the new report.
        image: its description of the picture.

    Raises:
        InputError: no such report, or one of other questions.
    """
    data = read_report(file)
    parse_report(data, str(file))  # says what is wrong with it
    asked = data["plan"]["prompt_tokens"], data["image"]  # tiles and native shapes are told by the image's description
    if asked != (plan.prompt_tokens, image):
        raise InputError(
            f"{file} was measured with --prompt-tokens {asked[0]} about {asked[1]}, now it is {plan.prompt_tokens} "
            f"about {image}; measure both alike"
        )
    return data


def baseline_spreads(data: Mapping[str, Any], figure: str) -> dict[tuple[str, int], Spread]:
    """A figure of a read report, by the model's label and resolution."""
    return {key: Spread(**case["figures"][figure]) for key, case in _cases(data)}


def baseline_runs(data: Mapping[str, Any]) -> dict[tuple[str, int], int]:
    """How many runs the medians of a read report are of, by the model's label and resolution."""
    return {key: case["runs"] for key, case in _cases(data)}


def _cases(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    labels = [subject["label"] for subject in data["subjects"]]
    for case in data["summary"]:
        yield (labels[case["subject"]], case["resolution"]), case
