"""The page around a figure's axes: title, heading, legend, footnotes; everything in inches from its top left corner."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvlm_bench.plots.naming import footnote, heading
from fastvlm_bench.plots.placing import LINE, text_width, wrap_text
from fastvlm_bench.plots.series import Series
from fastvlm_bench.plots.style import BODY, DPI, SMALL, TITLE, WIDTH, Palette

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN = 0.2
_HANDLE, _INSIDE, _NEXT = 1.5, 0.8, 1.2  # lengths of a legend's handle and gaps, in its text's size
_ASCENT = 0.95  # of a header, from its top to the first line's baseline, in its text's size
_GAP = 0.12  # between blocks
_WHOLE = 0.125  # inches: a whole number of pixels in both files


@dataclass(frozen=True, slots=True)
class Entry:
    """A legend's: what it looks like, and its name."""

    handle: Artist
    name: str


class Sheet:
    """A figure with its texts, and room for axes.

    Args:
        title: what is shown.
        series: the heading and the last footnote say which, where, when and how often.
        palette: colours of the page.
        body: inches of the room for axes.
        legend: rows of entries; one that is too long is broken.
        notes: footnotes before the last.

    Attributes:
        figure: to which axes are added.
        palette: as given.
        height: of the figure, inches.
        top: where the room for axes begins, inches from the figure's upper edge.
    """

    def __init__(
        self,
        title: str,
        series: Sequence[Series],
        palette: Palette,
        body: float,
        legend: Sequence[Sequence[Entry]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        width = 72 * (WIDTH - 2 * MARGIN)
        said = [line for part in heading(series) for line in wrap_text(part, width, SMALL)]
        small = [line for note in (*notes, footnote(series)) for line in wrap_text(note, width, SMALL)]
        rows = [row for entries in legend for row in _rows(entries, width)]
        line = SMALL * LINE / 72
        self.top = MARGIN + TITLE * LINE / 72 + 0.04 + line * len(said) + _GAP
        legend_top = self.top
        self.top += (line * 1.2 * len(rows) + _GAP) if rows else 0.0
        height = self.top + body + _GAP + line * len(small) + MARGIN
        self.height = math.ceil(height / _WHOLE) * _WHOLE
        self.palette, self.figure = palette, Figure(figsize=(WIDTH, self.height), dpi=DPI, facecolor=palette.page)
        FigureCanvasAgg(self.figure)
        self.text(MARGIN, MARGIN, title, TITLE, weight="bold")
        self.text(MARGIN, MARGIN + TITLE * LINE / 72 + 0.04, "\n".join(said), SMALL, color=palette.muted)
        self.text(MARGIN, self.top + body + _GAP, "\n".join(small), SMALL, color=palette.muted)
        for number, row in enumerate(rows):
            self._legend(row, legend_top + line * 1.2 * number)

    def text(self, left: float, top: float, text: str, size: float = BODY, **style: Any) -> None:
        """Write; `left` and `top` are the text's upper left corner."""
        usual: dict[str, Any] = {"color": self.palette.ink, "va": "top", "linespacing": LINE}
        self.figure.text(left / WIDTH, 1 - top / self.height, text, size=size, **(usual | style))

    def header(self, top: float, name: str, more: str = "") -> None:
        """A panel's: the model's name, in as many lines as it has, and after it what else fits there."""
        lines = name.split("\n")
        baselines = [top + BODY * (_ASCENT + LINE * place) / 72 for place in range(len(lines))]
        for line, baseline in zip(lines, baselines, strict=True):
            self.text(MARGIN, baseline, line, weight="bold", va="baseline")
        left = MARGIN + text_width(lines[-1], BODY, "bold") / 72 + _GAP
        if more and left + text_width(more, SMALL) / 72 <= WIDTH - MARGIN:
            self.text(left, baselines[-1], more, SMALL, color=self.palette.muted, va="baseline")

    def axes(self, left: float, top: float, width: float, height: float, grid: str) -> Axes:
        """Axes at that place.

        Args:
            left: inches, without the ticks' labels.
            top: likewise.
            width: likewise.
            height: likewise.
            grid: "x", "y" or "both": at whose ticks lines are drawn.
        """
        palette = self.palette
        place = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        axes = self.figure.add_axes(place, facecolor="none")
        axes.set_axisbelow(True)
        axes.grid(axis=grid, color=palette.grid, linewidth=0.6)  # type: ignore[arg-type]
        axes.tick_params(length=0, labelsize=SMALL, labelcolor=palette.muted)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(palette.muted)
        axes.xaxis.label.set(color=palette.muted, size=SMALL)
        axes.yaxis.label.set(color=palette.muted, size=SMALL)
        return axes

    def _legend(self, row: Sequence[Entry], top: float) -> None:
        # matplotlib's legend would give all columns the width of the longest.
        left = MARGIN
        for entry in row:
            box = self.figure.legend(
                [entry.handle],
                [entry.name],
                loc="upper left",
                bbox_to_anchor=(left / WIDTH, 1 - top / self.height),
                borderpad=0,
                borderaxespad=0,
                handlelength=_HANDLE,
                frameon=False,
                fontsize=SMALL,
                labelcolor=self.palette.ink,
            )
            box.set_gid(f"legend {entry.name}")
            left += _entry_width(entry) / 72


def render(figure: Figure, title: str) -> dict[str, bytes]:
    """The files' contents by extension; without a date or a version, so that the same figure is the same bytes."""
    made = {}
    for kind, metadata in (
        ("png", {"Software": None, "Title": title}),
        ("svg", {"Date": None, "Creator": None, "Title": title}),
    ):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        made[kind] = file.getvalue()
    return made


def _entry_width(entry: Entry) -> float:
    return text_width(entry.name, SMALL) + SMALL * (_HANDLE + _INSIDE + _NEXT)


def _rows(legend: Sequence[Entry], width: float) -> list[list[Entry]]:
    rows: list[list[Entry]] = []
    used = 0.0
    for entry in legend:
        needed = _entry_width(entry)
        if not rows or used + needed > width + _NEXT * SMALL:
            rows.append([])
            used = 0.0
        rows[-1].append(entry)
        used += needed
    return rows
