"""The time to first token by stage: a bar for each resolution, of each model (the paper's Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastvlm_bench.plots.naming import short_names
from fastvlm_bench.plots.placing import LINE, text_width, wrap_label
from fastvlm_bench.plots.series import Point, Series
from fastvlm_bench.plots.sheet import MARGIN, Entry, Sheet
from fastvlm_bench.plots.style import BODY, SMALL, WIDTH, Palette, Unit, ink_on, number, stage_name, time_text, unit_of
from fastvlm_bench.runner import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Where the time to first token goes"
_ROW, _BAR = 0.42, 0.54  # inches from bar to bar; of that, the bar
_BELOW = 0.4  # of a row, from the bar's middle to where ends and the second question are
_TICKS, _AXIS = 0.22, 0.42  # inches below a panel with numbers; with the axis' name as well
_APART = 20  # times; where models differ by more, each gets a scale of its own
_SPACE = 6  # points before and between the numbers
_VISIBLE = 0.004  # of an axis; what is shorter isn't in the legend


def draw_breakdown(series: Sequence[Series], palette: Palette) -> Figure:
    """Stacked bars of the stages' medians; TTFT's own median and ends, and the second question, below each.

    Args:
        series: at least one.
        palette: colours of the page.
    """
    names = [wrap_label(name, 72 * (WIDTH - 2 * MARGIN), BODY, "bold") for name in short_names(series)]
    greatest = [max(map(_greatest, one.points)) for one in series]
    own = max(greatest) > _APART * min(greatest)
    scales = greatest if own else [max(greatest)] * len(series)
    shown = _shown(series, scales)
    headers = [BODY * LINE / 72 * (name.count("\n") + 1) + 0.04 for name in names]
    bodies = [_ROW * len(one.points) for one in series]
    below = [_AXIS if own or one is series[-1] else 0.14 for one in series]
    notes = ["Each model has a scale of its own."] if own else []
    legend = _legend(shown, palette)
    sheet = Sheet(TITLE, series, palette, sum(headers) + sum(bodies) + sum(below), legend, notes)
    left = MARGIN + max(text_width(_tick(p), SMALL) for one in series for p in one.points) / 72 + 0.1
    width = WIDTH - left - MARGIN
    # One scale for all: as far as the model needs that needs most.
    ends = [_end(one.points, width, scale) for one, scale in zip(series, scales, strict=True)]
    top = sheet.top
    for place, one in enumerate(series):
        sheet.header(top, names[place], f"decoder {one.precision}")
        axes = sheet.axes(left, top + headers[place], width, bodies[place], "x")
        unit = unit_of(scales[place])
        axes.set_xlim(0, (ends[place] if own else max(ends)) / unit.ms)
        _bars(axes, one.points, shown, unit, palette)
        if below[place] == _AXIS:
            axes.set_xlabel(f"time to first token ({unit.name})")
        else:
            axes.tick_params(labelbottom=False)
        top += headers[place] + bodies[place] + below[place]
    return sheet.figure


def _shown(series: Sequence[Series], scales: Sequence[float]) -> list[str]:
    """The stages, tokenising only where it can be seen."""
    most = max(
        point.stages["tokenize"] / scale for one, scale in zip(series, scales, strict=True) for point in one.points
    )
    return [stage for stage in STAGES if stage != "tokenize" or most >= _VISIBLE]


def _greatest(point: Point) -> float:
    return max(point.ttft.high, sum(point.stages.values()), point.second_ms)


def _tick(point: Point) -> str:
    return f"{point.resolution} px"


def _said(point: Point) -> tuple[str, str]:
    return time_text(point.ttft.median), f"\u25b2 {time_text(point.second_ms)}"


def _end(points: Sequence[Point], width: float, scale: float) -> float:
    """Where an axis must end, in ms, so that what stands beside each bar fits."""
    ends = [scale]
    for point in points:
        total, second = _said(point)
        room = (text_width(total, BODY, "bold") + text_width(second, SMALL) + 2 * _SPACE + 3) / 72
        ends += [_greatest(point) * 1.02, sum(point.stages.values()) * width / (width - room)]
    return max(ends)


def _bars(axes: Axes, points: Sequence[Point], shown: Sequence[str], unit: Unit, palette: Palette) -> None:
    rows = range(len(points))
    axes.set_ylim(len(points) - 0.35, -0.35)
    axes.set_yticks(rows, [_tick(point) for point in points], color=palette.ink)
    axes.yaxis.grid(visible=False)
    inches = axes.get_position().width * WIDTH
    per_point = axes.get_xlim()[1] / (72 * inches)  # axis units
    starts = [0.0] * len(points)
    for stage in shown:
        fill = palette.stages[stage]
        lengths = [point.stages[stage] / unit.ms for point in points]
        axes.barh(rows, lengths, _BAR, starts, color=fill, label=stage_name(stage), zorder=2)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            text = number(length)
            if length > per_point * (text_width(text, SMALL) + 5):
                axes.text(
                    start + length / 2, row, text, size=SMALL, ha="center", va="center_baseline", color=ink_on(fill)
                )
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    _ends(axes, points, unit, palette, per_point)


def _ends(axes: Axes, points: Sequence[Point], unit: Unit, palette: Palette, per_point: float) -> None:
    """Below each bar TTFT's ends and the second question; after it the numbers."""
    below = [row + _BELOW for row in range(len(points))]
    medians, lows, highs = (
        [getattr(point.ttft, part) / unit.ms for point in points] for part in ("median", "low", "high")
    )
    axes.errorbar(
        medians,
        below,
        xerr=[
            [m - low for m, low in zip(medians, lows, strict=True)],
            [high - m for m, high in zip(medians, highs, strict=True)],
        ],
        fmt="o",
        color=palette.ink,
        markersize=2.5,
        capsize=2,
        linewidth=1,
        label="min-max",
    )
    seconds = [point.second_ms / unit.ms for point in points]
    axes.plot(seconds, below, "^", color=palette.ink, markersize=4.5, label="second question", clip_on=False)
    for row, point in enumerate(points):
        total, second = _said(point)
        end = sum(point.stages.values()) / unit.ms + _SPACE * per_point
        axes.text(end, row, total, size=BODY, weight="bold", va="center_baseline", color=palette.ink)
        end += per_point * (text_width(total, BODY, "bold") + _SPACE)
        axes.text(end, row, second, size=SMALL, va="center_baseline", color=palette.muted)


def _legend(shown: Sequence[str], palette: Palette) -> list[list[Entry]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = [Entry(Patch(color=palette.stages[stage]), stage_name(stage)) for stage in shown]
    whisker = Line2D([], [], color=palette.ink, linewidth=1, marker="o", markersize=2.5)
    second = Line2D([], [], color=palette.ink, linestyle="none", marker="^", markersize=4.5)
    return [entries, [Entry(whisker, "TTFT: least, median, greatest"), Entry(second, "of the second question")]]
