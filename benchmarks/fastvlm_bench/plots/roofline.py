"""What the stages reach of the machine's limits: the roofline of Williams, Waterman and Patterson (CACM 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_bench.plots.naming import short_names
from fastvlm_bench.plots.placing import LINE, Placer, text_width, wrap_label
from fastvlm_bench.plots.series import ROOFLINE_STAGES, Point, Series
from fastvlm_bench.plots.sheet import MARGIN, Entry, Sheet
from fastvlm_bench.plots.style import BODY, DPI, SMALL, WIDTH, Palette, number, rate_text, stage_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastvlm_bench.peaks import Peaks

TITLE = "What each stage reaches of the machine's limits"
_LEFT, _BELOW = 0.7, 0.45  # inches of axis names and numbers
_HEIGHT = 3.1  # of a panel
_TERA = 1e12  # FLOP/s; from here on the axis is in TFLOP/s
_CLOSE = 12.0  # points; ceilings nearer than that share a label
_NEAR = 45.0  # points; a stage whose resolutions lie within has one label
_LABELLED = ("vision", "prefill", "decode", "projector")  # what takes longest has the best places
_MARKERS = {"vision": "o", "projector": "D", "prefill": "s", "decode": "^"}
_WIDEST = 0.6  # of the axes, of a ceilings' label


def draw_roofline(series: Sequence[Series], palette: Palette) -> Figure:
    """A panel for each model that has a roofline: the machine's roofs, and a mark for each stage and resolution.

    Args:
        series: at least one `drawable`.
        palette: colours of the page.
    """
    pairs = [(name, one) for name, one in zip(short_names(series), series, strict=True) if drawable(one)]
    names = [wrap_label(name, 72 * (WIDTH - 2 * MARGIN), BODY, "bold") for name, _ in pairs]
    headers = [BODY * LINE / 72 * (name.count("\n") + 1) + 0.04 for name in names]
    stages = [s for s in ROOFLINE_STAGES if any(s in p.reached for _, one in pairs for p in one.points)]
    body = sum(headers) + (_HEIGHT + _BELOW) * len(pairs)
    sheet = Sheet(TITLE, series, palette, body, [_legend(stages, palette)], _notes(series))
    top = sheet.top
    frame = _Frame.around([one for _, one in pairs])
    for name, header, (_, one) in zip(names, headers, pairs, strict=True):
        sheet.header(top, name, f"decoder {one.precision}")
        axes = sheet.axes(_LEFT, top + header + 0.04, WIDTH - _LEFT - MARGIN, _HEIGHT - 0.04, "both")
        _panel(axes, one, frame, palette)
        top += header + _HEIGHT + _BELOW
    return sheet.figure


def drawable(one: Series) -> bool:
    """Whether the report says what the machine can do, and what this model had to do."""
    return one.peaks is not None and any(point.reached for point in one.points)


def _notes(series: Sequence[Series]) -> list[str]:
    notes = [
        "A mark for each resolution, larger for more pixels; decode is one token. Percent: of the limit, which is what "
        "MLX itself reached on the machine."
    ]
    if any("vision" not in point.reached for one in series for point in one.points if drawable(one)):
        notes.append("Vision that Core ML ran isn't shown: these are the limits of MLX's device.")
    if missing := [name for name, one in zip(short_names(series), series, strict=True) if not drawable(one)]:
        notes.append(f"Without limits, and so not shown: {'; '.join(missing)}.")
    if any(reached.share > 1 for one in series for point in one.points for reached in point.reached.values()):
        notes.append("Above a roof: what fits into a cache, or does better than MLX's matmul.")
    return notes


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all panels have in common, so that they can be compared: limits, unit of the rates, size of the marks."""

    intensities: tuple[float, float]
    rates: tuple[float, float]
    unit: str
    scale: float
    sides: tuple[int, ...]

    @classmethod
    def around(cls, series: Sequence[Series]) -> _Frame:
        reached = [r for one in series for point in one.points for r in point.reached.values()]
        roofs = [(r, one.peaks.bandwidth) for one in series if one.peaks for r in one.peaks.matmul_flops.values()]
        intensities = [r.intensity for r in reached] + [rate / bandwidth for rate, bandwidth in roofs]
        rates = [r.flops for r in reached] + [rate for rate, _ in roofs]
        unit, scale = ("TFLOP/s", 1e12) if max(rates) >= _TERA else ("GFLOP/s", 1e9)
        sides = sorted({point.resolution for one in series for point in one.points})
        return cls(
            (min(intensities) / 2, max(intensities) * 3),
            (min(rates) / 2.5 / scale, max(rates) * 3 / scale),
            unit,
            scale,
            tuple(sides),
        )

    def size(self, point: Point) -> float:
        """A mark's area in square points."""
        steps = len(self.sides) - 1
        return (4 + 4 * (self.sides.index(point.resolution) / steps if steps else 1)) ** 2


def _panel(axes: Axes, one: Series, frame: _Frame, palette: Palette) -> None:
    assert one.peaks is not None  # `drawable`
    scale = frame.scale
    axes.set(xscale="log", yscale="log", xlim=frame.intensities, ylim=frame.rates)
    axes.set_xlabel("operational intensity (FLOP/byte)")
    axes.set_ylabel(f"performance ({frame.unit})")
    _ticks(axes)
    placer = Placer(axes)
    _roofs(axes, one.peaks, scale, palette, placer)
    for stage in ROOFLINE_STAGES:
        points = [point for point in one.points if stage in point.reached]
        x, y = ([getattr(p.reached[stage], part) for p in points] for part in ("intensity", "flops"))
        y = [value / scale for value in y]
        axes.plot(x, y, color=palette.stages[stage], linewidth=1.2, zorder=3)
        axes.scatter(
            x,
            y,
            list(map(frame.size, points)),
            palette.stages[stage],
            marker=_MARKERS[stage],
            edgecolors=palette.page,
            linewidths=0.6,
            label=stage,
            zorder=4,
        )
        if points:
            placer.avoid(x, y)
    _label_ceilings(axes, one.peaks, scale, palette, placer)
    for stage in _LABELLED:
        _label_stage(stage, [p for p in one.points if stage in p.reached], scale, palette, placer)


def _ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator())
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _roofs(axes: Axes, peaks: Peaks, scale: float, palette: Palette, placer: Placer) -> None:
    """The slope that memory allows, up to the highest ceiling; the ceilings from where they meet it."""
    (left, right), low = axes.get_xlim(), axes.get_ylim()[0]
    ridge = max(peaks.matmul_flops.values()) / peaks.bandwidth
    slope = peaks.bandwidth / scale  # per FLOP/byte
    axes.plot([left, ridge], [left * slope, ridge * slope], color=palette.ink, linewidth=1.4, label="memory")
    placer.avoid([left, ridge], [left * slope, ridge * slope])
    for name, rate in peaks.matmul_flops.items():
        line = [rate / peaks.bandwidth, right], [rate / scale] * 2
        axes.plot(*line, color=palette.muted, linewidth=1.0, label=name, zorder=1.5)
        placer.avoid(*line)
    begin = max(left, low / slope)
    middle = float(np.sqrt(begin * ridge))
    (x0, y0), (x1, y1) = axes.transData.transform([(begin, begin * slope), (ridge, ridge * slope)])
    text = f"memory {number(peaks.bandwidth / 1e9)} GB/s"
    angle = float(np.arctan2(y1 - y0, x1 - x0))
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    ends = np.outer([-0.5, 0.5], along) * text_width(text, SMALL) + across * (6 + SMALL / 2)
    covered = axes.transData.transform((middle, middle * slope)) + ends * DPI / 72
    placer.avoid(*axes.transData.inverted().transform(covered).T)
    axes.annotate(
        text,
        (middle, middle * slope),
        tuple(6 * across),
        textcoords="offset points",
        rotation=float(np.degrees(angle)),
        rotation_mode="anchor",
        ha="center",
        va="bottom",
        size=SMALL,
        color=palette.muted,
    )


def _label_ceilings(axes: Axes, peaks: Peaks, scale: float, palette: Palette, placer: Placer) -> None:
    """Beside each ceiling, at its right end where there's room; beside several that are too near for a label each."""
    names = sorted(peaks.matmul_flops, key=lambda name: peaks.matmul_flops[name])
    begins = [(peaks.matmul_flops[name] / peaks.bandwidth, peaks.matmul_flops[name] / scale) for name in names]
    places_of = axes.transData.transform(begins) * 72 / DPI
    left_of, heights = dict(zip(names, places_of[:, 0], strict=True)), dict(zip(names, places_of[:, 1], strict=True))
    right, width = axes.bbox.x1 * 72 / DPI, axes.bbox.width * 72 / DPI
    groups: list[list[str]] = []
    for name in names:
        if groups and heights[name] - heights[groups[-1][-1]] < _CLOSE:
            groups[-1].append(name)
        else:
            groups.append([name])
    for group in groups:
        said = [f"{name}: {rate_text(peaks.matmul_flops[name])}" for name in reversed(group)]
        text = wrap_label(", ".join(said), width * _WIDEST, SMALL)
        low, high = (float(heights[name]) for name in (group[0], group[-1]))
        free = max(right - left_of[group[-1]] - text_width(text, SMALL), 0.0)
        along = [-2 - free * step / 12 for step in range(13)]
        places = [(dx, 2.0, "right", "bottom") for dx in along]
        places += [(dx, low - high - 2.0, "right", "top") for dx in along]
        top = peaks.matmul_flops[group[-1]] / scale
        placer.label(axes.get_xlim()[1], top, text, SMALL, places, color=palette.muted)


def _label_stage(stage: str, points: Sequence[Point], scale: float, palette: Palette, placer: Placer) -> None:
    """The first and the last resolution with their shares; one label where they lie together."""
    if not points:
        return
    first, last = points[0], points[-1]
    ends = [(p.reached[stage].intensity, p.reached[stage].flops / scale, p.reached[stage].share) for p in (first, last)]
    shown = placer.axes.transData.transform([end[:2] for end in ends]) * 72 / DPI
    name = stage_name(stage)
    if len(points) == 1 or np.hypot(*(shown[1] - shown[0])) < _NEAR:
        shares = [point.reached[stage].share for point in points]
        ends, texts = ends[1:], [f"{name} {_percents(min(shares), max(shares))}"]
    else:
        texts = [_percents(ends[0][2]), f"{name} {_percents(ends[1][2])}"]
    for (x, y, _), text in zip(ends, texts, strict=True):
        placer.label(x, y, text, SMALL, leader=palette.stages[stage], color=palette.ink)


def _percents(low: float, high: float | None = None) -> str:
    ends = dict.fromkeys(f"{100 * share:.0f}" for share in (low, low if high is None else high))
    return f"{'-'.join(ends)} %"


def _legend(stages: Sequence[str], palette: Palette) -> list[Entry]:
    from matplotlib.lines import Line2D

    return [
        Entry(Line2D([], [], color=palette.stages[stage], marker=_MARKERS[stage], linewidth=1.2), stage_name(stage))
        for stage in stages
    ]
