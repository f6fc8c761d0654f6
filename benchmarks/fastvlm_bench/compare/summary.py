"""What the runs of a comparison come to: times, ratios of runs of the same round, and what they support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastvlm_bench.compare.cold import ColdRun
from fastvlm_bench.compare.rivals import OURS
from fastvlm_bench.compare.rounds import Run
from fastvlm_bench.stats import Spread, spread, verdict

# What is compared -> seconds of a run; None where the side wasn't asked.
FIGURES: dict[str, Callable[[Run], float | None]] = {
    "first question": lambda run: run.ttft_s if run.kind == "picture" else None,
    "second question": lambda run: run.second_ttft_s,
    "token": lambda run: run.decode_s / run.decode_tokens if run.kind == "picture" else None,
    "token, text alone": lambda run: run.decode_s / run.decode_tokens if run.kind == "text" else None,
}


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of one side at one resolution.

    Attributes:
        resolution: side of the picture in pixels.
        figure: one of FIGURES.
        side: OURS or a rival.
        seconds: of all rounds.
        ratio: the side's seconds by ours of the same round, over all rounds; None for ours.
        verdict: what the ratios say, in words; "" for ours.
    """

    resolution: int
    figure: str
    side: str
    seconds: Spread
    ratio: Spread | None
    verdict: str


def summarise(runs: Sequence[Run]) -> list[Line]:
    """A line for each resolution, figure and side, ours before the rivals."""
    found = []
    for resolution in dict.fromkeys(run.resolution for run in runs):
        for figure, seconds in FIGURES.items():
            here = [
                (run, value) for run in runs if run.resolution == resolution and (value := seconds(run)) is not None
            ]
            found += _lines(resolution, figure, here)
    return found


def summarise_cold(runs: Sequence[ColdRun]) -> list[Line]:
    """The same of whole processes."""
    found = []
    for resolution in dict.fromkeys(run.resolution for run in runs):
        found += _lines(resolution, "process", [(run, run.seconds) for run in runs if run.resolution == resolution])
    return found


def _lines(resolution: int, figure: str, values: Sequence[tuple[Run | ColdRun, float]]) -> list[Line]:
    by_side: dict[str, dict[int, float]] = {OURS: {}}
    for run, value in values:
        by_side.setdefault(run.side, {})[run.round] = value
    ours = by_side.pop(OURS)
    if not by_side:
        return []
    lines = [Line(resolution, figure, OURS, spread(list(ours.values())), None, "")]
    for side, seconds in by_side.items():
        ratios = [seconds[index] / ours[index] for index in seconds]
        ratio = spread(ratios)
        lines.append(Line(resolution, figure, side, spread(list(seconds.values())), ratio, verdict(ratios, OURS, side)))
    return lines
