"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastvlm_bench.front import MEMORY_UNKNOWN, Budget, Choice, Known, Verdict, decoder_name, published_accuracy
from fastvlm_mlx import __version__
from fastvlm_mlx.measurements import Report
from fastvlm_zoo.accuracy import elsewhere

FORMAT_VERSION = 1
_HEADINGS = ("decoder", "bits", "vision", "px", "grid", "TTFT ms", "low-high", "how", "memory MB")
_ORDER_NOTE = (
    "front:      no other choice within the budget is at least as good and no slower; taken for granted is that a "
    "larger decoder, more bits, and larger images up to the trained side answer no worse, all else equal"
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan.

    Attributes:
        budget: what was asked for.
        text_tokens: of the questions, around the image.
        reports: what it was made from.
        verdicts: every choice, fastest first.
        left_out: what could not be planned, and why.
    """

    budget: Budget
    text_tokens: int
    reports: tuple[Report, ...]
    verdicts: tuple[Verdict, ...]
    left_out: tuple[str, ...]

    @property
    def front(self) -> list[Verdict]:
        """The choices that are worth having."""
        return [verdict for verdict in self.verdicts if verdict.reason is None]


def format_plan(plan: Planned, everything: bool = False) -> str:
    """The plan for people.

    Args:
        plan: what was found.
        everything: the choices off the front too, with the reason.
    """
    shown = plan.verdicts if everything else plan.front
    named = {id(v): known for v in shown if (known := published_accuracy(v.choice))}
    benchmarks = list(dict.fromkeys(name for known in named.values() for name in known.entry.scores))
    headings = (*_HEADINGS, *benchmarks, *(["not on the front because"] if everything else []))
    rows = [headings]
    for verdict in shown:
        scores = [_score(named.get(id(verdict)), name) for name in benchmarks]
        rows.append((*_cells(verdict.choice), *scores, *([verdict.reason or ""] if everything else [])))
    return "\n".join((*_header(plan), "", *_table(rows), "", *_notes(plan, list(named.values()))))


def _header(plan: Planned) -> tuple[str, ...]:
    budget, machine = plan.budget, plan.reports[-1].machine
    memory = "" if budget.memory_bytes is None else f", memory within {budget.memory_bytes / 1e6:g} MB"
    dates = sorted(report.date for report in plan.reports)
    versions = ", ".join(dict.fromkeys(f"MLX {report.machine.get('mlx')}" for report in plan.reports))
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"fastvlm-bench plan: TTFT within {budget.ttft_ms:g} ms{memory}; questions of {plan.text_tokens} text tokens",
        f"measured on: {machine.get('cpu')}, {machine.get('cores')} cores, {versions}, {machine.get('device')}; {when}",
        "TTFT: median, and the ends of the measured runs; the slowest one counts against the budget",
    )


def _cells(choice: Choice) -> tuple[str, ...]:
    subject, estimate = choice.subject, choice.estimate
    ttft, peak = estimate.ttft, estimate.peak_bytes
    memory = "-" if peak is None else f"{'' if estimate.measured else '<='}{peak / 1e6:.0f}"
    name = decoder_name(subject)
    return (
        name + (" seeded" if subject.seeded and "seeded" not in name else ""),
        "full" if subject.bits is None else str(subject.bits),
        subject.vision,
        str(choice.resolution),
        str(choice.grid or "-"),
        f"{ttft.median:.1f}",
        f"{ttft.low:.1f}-{ttft.high:.1f}",
        "measured" if estimate.measured else "interpolated",
        memory,
    )


def _score(known: Known | None, benchmark: str) -> str:
    if known is None or benchmark not in known.entry.scores:
        return "-"
    score = f"{'<=' if known.bound else ''}{known.entry.scores[benchmark]:.1f}"
    return score if known.own else f"({score})"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def _notes(plan: Planned, figures: Sequence[Known]) -> list[str]:
    """Where the figures come from, and what they don't say."""
    notes = _sources(figures) if figures else []
    notes.append(_ORDER_NOTE)
    if any(verdict.choice.subject.seeded for verdict in plan.verdicts):
        notes.append("seeded:     random weights of the published shapes, which take as long and answer nothing")
    if unknown := sum(verdict.reason == MEMORY_UNKNOWN for verdict in plan.verdicts):
        notes.append(f"left out:   {unknown} whose memory wasn't measured alone; measure one model at a time")
    return notes + [f"left out:   {text}" for text in plan.left_out]


def _sources(figures: Sequence[Known]) -> list[str]:
    entries = {known.entry.model: known.entry for known in figures}.values()
    notes = [
        f"{entry.model} at {entry.resolution} px, unquantised, in percent: {entry.source}" for entry in entries
    ] + [
        "they are those published weights', another model of the same shape has its own; <= where none is published "
        "for these bits or this resolution: at most that, by what is taken for granted below"
    ]
    if not all(known.own for known in figures):
        notes.append("(in brackets) of the published weights of that shape; the row's own are random")
    notes += [
        f"of another set-up, and so of no row above: {entry.model}, {entry.resolution} px: "
        f"{', '.join(f'{name} {score}' for name, score in entry.scores.items())} ({entry.source})"
        for entry in elsewhere()
    ]
    return [f"{'' if index else 'accuracies:':<12}{note}" for index, note in enumerate(notes)]


def to_json(plan: Planned) -> str:
    """The plan for programs: every choice with its accuracies, their sources, and why it isn't on the front."""
    entries = {k.entry.model: k.entry for v in plan.verdicts if (k := published_accuracy(v.choice))}
    data = {
        "format_version": FORMAT_VERSION,
        "tool": f"fastvlm-bench {__version__}",
        "ttft_ms": plan.budget.ttft_ms,
        "memory_bytes": plan.budget.memory_bytes,
        "text_tokens": plan.text_tokens,
        "machine": plan.reports[-1].machine,
        "reports": [{"file": report.where, "date": report.date} for report in plan.reports],
        "choices": [_choice_data(verdict) for verdict in plan.verdicts],
        "accuracies": [asdict(entry) for entry in entries.values()],
        "left_out": list(plan.left_out),
    }
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"


def _choice_data(verdict: Verdict) -> dict[str, Any]:
    choice = verdict.choice
    subject, known = choice.subject, published_accuracy(choice)
    return {
        "decoder": decoder_name(subject),
        "bits": subject.bits,
        "resolution": choice.resolution,
        "grid": [choice.grid.columns, choice.grid.rows] if choice.grid else None,
        "vision": subject.vision,
        "precision": subject.precision,
        "seeded": subject.seeded,
        "ttft_ms": asdict(choice.estimate.ttft),
        "measured": choice.estimate.measured,
        "peak_bytes": choice.estimate.peak_bytes,
        "accuracy": known
        and {"of": known.entry.model, "own": known.own, "exact": known.exact, "scores": known.entry.scores},
        "front": verdict.reason is None,
        "reason": verdict.reason,
    }
