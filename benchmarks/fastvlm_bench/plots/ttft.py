"""The time to first token over resolution, a line for each model (the axis of the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastvlm_bench.plots.naming import short_names
from fastvlm_bench.plots.placing import LINE, Placer, spread_out, text_width, wrap_label
from fastvlm_bench.plots.series import Series
from fastvlm_bench.plots.sheet import MARGIN, Sheet
from fastvlm_bench.plots.style import DPI, LINES, MARKERS, SMALL, WIDTH, Palette, Unit, time_text, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Time to first token by resolution"
_LOGARITHMIC = 8  # from this ratio of the greatest time to the least on
_LABEL = 2.1  # inches; a longer name is wrapped
_LEFT, _ABOVE, _BELOW = 0.85, 0.45, 0.45  # inches of axis names and numbers
_HEIGHT = 3.7  # of the axes, at least
_NARROW = 1.6  # inches, of axes with a single resolution
_LEADER = 0.3  # inches from the axes to the names
_BAND = 0.18  # opacity


def draw_ttft(series: Sequence[Series], palette: Palette) -> Figure:
    """Medians as lines, least to greatest as bands, names at their ends.

    Args:
        series: at least one.
        palette: colours of the page.
    """
    labels = [
        f"{wrap_label(name, 72 * _LABEL, SMALL)}\n{time_text(one.points[-1].ttft.median)}"
        for name, one in zip(short_names(series), series, strict=True)
    ]
    last = max(one.points[-1].resolution for one in series)
    at_end = [index for index, one in enumerate(series) if one.points[-1].resolution == last]
    heights = [SMALL * LINE * (labels[i].count("\n") + 1) + 3 for i in at_end]
    height = max(_HEIGHT, sum(heights) / 72)
    sheet = Sheet(
        TITLE,
        series,
        palette,
        _ABOVE + height + _BELOW,
        notes=[_note(series)],
    )
    room = max(text_width(labels[i], SMALL) for i in at_end) / 72 + _LEADER + 0.05
    width = WIDTH - _LEFT - MARGIN - room
    if all(len(one.points) == 1 for one in series) and len(at_end) == len(series):
        width = min(width, _NARROW)
    axes = sheet.axes(_LEFT, sheet.top + _ABOVE, width, height, "both")
    unit = unit_of(max(point.ttft.high for one in series for point in one.points))
    _scales(axes, series, unit)
    _resolutions(axes, series, palette)
    placer = Placer(axes)
    for index, one in enumerate(series):
        _line(axes, one, index, unit, palette, placer)
    _names_at_end(axes, series, labels, at_end, heights, unit, palette)
    for index, one in enumerate(series):
        if index not in at_end:
            end = one.points[-1]
            placer.label(end.resolution, end.ttft.median / unit.ms, labels[index], SMALL, color=palette.ink)
    return sheet.figure


def _note(series: Sequence[Series]) -> str:
    shapes = dict.fromkeys("band" if len(one.points) > 1 else "whisker" for one in series)
    return f"{' or '.join(shapes).capitalize()}: least to greatest."


def _line(axes: Axes, one: Series, index: int, unit: Unit, palette: Palette, placer: Placer) -> None:
    colour = palette.series[index % len(palette.series)]
    sides = [point.resolution for point in one.points]
    medians, lows, highs = (
        [getattr(point.ttft, part) / unit.ms for point in one.points] for part in ("median", "low", "high")
    )
    axes.fill_between(sides, lows, highs, color=colour, alpha=_BAND, linewidth=0)
    if len(sides) == 1:
        axes.vlines(sides, lows, highs, color=colour, linewidth=1.2)
        placer.avoid([*sides, *sides], [*lows, *highs])
    for ends in (lows, highs):
        axes.plot(sides, ends, color=colour, linewidth=0.6, clip_on=False)
    axes.plot(
        sides,
        medians,
        color=colour,
        marker=MARKERS[index % len(MARKERS)],
        linestyle=LINES[index // len(palette.series) % len(LINES)],
        markersize=6,
        markeredgecolor=palette.page,
        markeredgewidth=0.8,
        linewidth=1.8,
        label=one.label,
        clip_on=False,
        zorder=3,
    )
    placer.avoid(sides, medians)
    for ends in (lows, highs):
        placer.avoid(sides, ends)


def _scales(axes: Axes, series: Sequence[Series], unit: Unit) -> None:
    """Logarithmic where models or resolutions differ much: the lines of small ones would lie on the axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    least = min(point.ttft.low for one in series for point in one.points) / unit.ms
    greatest = max(point.ttft.high for one in series for point in one.points) / unit.ms
    axes.set_ylabel(f"time to first token ({unit.name})")
    if greatest < _LOGARITHMIC * least:
        axes.set_ylim(0, greatest * 1.08)
        return
    axes.set_yscale("log")
    axes.set_ylim(least / 1.25, greatest * 1.25)
    axes.set_ylabel(f"time to first token ({unit.name}, logarithmic)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if greatest < 1000 * least else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _resolutions(axes: Axes, series: Sequence[Series], palette: Palette) -> None:
    """The measured ones below, their image tokens above; both doubling in steps of equal width."""
    from matplotlib.ticker import NullLocator

    tokens: dict[int, dict[int, None]] = {}
    for one in series:
        for point in one.points:
            tokens.setdefault(point.resolution, {})[point.image_tokens] = None
    sides = sorted(tokens)
    axes.set_xscale("log", base=2)
    axes.set_xlim(sides[0] / 1.06, sides[-1] * 1.06)
    above = axes.secondary_xaxis("top")
    above.patch.set_visible(False)
    counts = ["/".join(map(str, tokens[side])) for side in sides]
    for place, texts in ((axes, list(map(str, sides))), (above, counts)):
        place.set_xticks(sides, _thinned(axes, sides, texts))
        place.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("resolution (px per side)")
    above.set_xlabel("image tokens", color=palette.muted, size=SMALL)
    above.tick_params(length=0, labelsize=SMALL, labelcolor=palette.muted)
    above.spines["top"].set_visible(False)


def _thinned(axes: Axes, sides: Sequence[int], texts: Sequence[str]) -> list[str]:
    """Only those that don't touch one that is already there; the largest first."""
    places = axes.transData.transform([(side, 1.0) for side in sides])[:, 0] * 72 / DPI
    kept: list[str] = [""] * len(sides)
    free = float("inf")
    for index in reversed(range(len(sides))):
        half = text_width(texts[index], SMALL) / 2
        if places[index] + half + 3 <= free:
            kept[index], free = texts[index], places[index] - half
    return kept


def _names_at_end(
    axes: Axes,
    series: Sequence[Series],
    labels: Sequence[str],
    at_end: Sequence[int],
    heights: Sequence[float],
    unit: Unit,
    palette: Palette,
) -> None:
    """In a column right of the axes, each joined to the end of its line."""
    box = axes.bbox
    points = [series[i].points[-1] for i in at_end]
    ends = [axes.transData.transform((p.resolution, p.ttft.median / unit.ms)) * 72 / DPI for p in points]
    middles = spread_out([y for _, y in ends], heights, box.y0 * 72 / DPI, box.y1 * 72 / DPI)
    left = box.x1 * 72 / DPI + 72 * _LEADER
    for place, (x, y), middle in zip(at_end, ends, middles, strict=True):
        axes.annotate(
            labels[place],
            (x + 5, y),
            (left, middle),
            xycoords="figure points",
            textcoords="figure points",
            va="center",
            size=SMALL,
            color=palette.ink,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": palette.series[place % len(palette.series)],
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )
