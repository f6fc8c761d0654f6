"""Where labels go: along a line without touching each other, and around points where there's room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_bench.plots.style import DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    Box = tuple[float, float, float, float]  # left, bottom, right, top; points

LINE = 1.25  # of a text's size, from one line to the next
_NEXT_TO, _BESIDE = 12.0, 6.0  # points: from a label to its point without a line; between two labels
_MARK = 4.0  # points from a mark's middle to its ends
_STEP = 3.0  # points between two that stand for a line
_OUTSIDE, _ON_TEXT, _ON_LEADER, _ON_MARK, _FARTHER = 2000.0, 400.0, 80.0, 8.0, 0.5  # what each is worth avoiding
# Offsets in points and alignments, the most natural one first.
_AROUND = tuple(
    (dx * far, dy * far, ha, va)
    for far in (1.0, 2.0, 3.5, 5.0, 7.0)
    for dx, dy, ha, va in (
        (8, 0, "left", "center"),
        (0, 8, "center", "bottom"),
        (0, -8, "center", "top"),
        (-8, 0, "right", "center"),
        (7, 7, "left", "bottom"),
        (7, -7, "left", "top"),
        (-7, 7, "right", "bottom"),
        (-7, -7, "right", "top"),
    )
)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Points that the longest line takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(size=size, weight=weight)
    lines = text.split("\n")
    return max(float(TextToPath().get_text_width_height_descent(line, font, False)[0]) for line in lines)


def wrap_text(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Lines of at most `width` points, broken at spaces, and inside a word that is longer."""
    words = [part for word in text.split() for part in _chopped(word, width, size, weight)]
    return _joined(words, width, size, weight)


def wrap_label(text: str, width: float, size: float, weight: str = "normal") -> str:
    """A model's name in lines of at most `width` points; what is between commas stays together where it can."""
    *parts, last = text.split(", ")
    lines = _joined([*(f"{part}," for part in parts), last], width, size, weight)
    return "\n".join(line for part in lines for line in wrap_text(part, width, size, weight))


def _joined(pieces: Sequence[str], width: float, size: float, weight: str) -> list[str]:
    lines: list[str] = []
    for piece in pieces:
        longer = f"{lines[-1]} {piece}" if lines else piece
        if lines and text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(piece)
    return lines


def _chopped(word: str, width: float, size: float, weight: str) -> list[str]:
    parts = [""]
    for letter in word:
        if parts[-1] and text_width(parts[-1] + letter, size, weight) > width:
            whole = max(map(parts[-1].rfind, "-/_.")) + 1 or len(parts[-1])
            parts[-1:] = [parts[-1][:whole], parts[-1][whole:]]
        parts[-1] += letter
    return parts


def spread_out(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of intervals, as near as possible to the wanted ones, in the same order, that don't overlap.

    Args:
        wanted: middles.
        sizes: lengths of the intervals.
        low: where the first may begin.
        high: where the last may end; what doesn't fit goes beyond.
    """
    # Those that would overlap become a group around their common middle, which may then touch the one before.
    groups: list[tuple[float, float, list[int]]] = []  # middle, length, members
    for index in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        group = (wanted[index], sizes[index], [index])
        while True:
            middle, length, members = group
            middle = max(min(middle, high - length / 2), low + length / 2)
            group = (middle, length, members)
            if not groups or groups[-1][0] + groups[-1][1] / 2 <= middle - length / 2:
                break
            before, its_length, its_members = groups.pop()
            count = len(its_members), len(members)
            group = (
                (before * count[0] + middle * count[1]) / sum(count),
                its_length + length,
                [*its_members, *members],
            )
        groups.append(group)
    found = [0.0] * len(wanted)
    for middle, length, members in groups:
        begin = middle - length / 2
        for index in members:
            found[index] = begin + sizes[index] / 2
            begin += sizes[index]
    return found


class Placer:
    """Puts labels into an Axes, whose limits and size are final, where they cover least."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._texts: list[Box] = []
        self._marks = np.empty((0, 2))

    def avoid(self, x: Sequence[float], y: Sequence[float]) -> None:
        """Keep off a line through these points, in data coordinates, and off the marks that stand there."""
        corners = self._points(x, y)
        around = np.array([(0, 0), (_MARK, 0), (-_MARK, 0), (0, _MARK), (0, -_MARK)])
        steps = [(corners[:, None] + around).reshape(-1, 2)]
        for begin, end in pairwise(corners):
            count = max(int(np.hypot(*(end - begin)) / _STEP), 1)
            steps.append(begin + (end - begin) * np.arange(1, count + 1)[:, None] / count)
        self._marks = np.concatenate([self._marks, *steps])

    def label(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        places: Sequence[tuple[float, float, str, str]] = _AROUND,
        leader: str | None = None,
        **style: Any,
    ) -> Annotation:
        """Write beside a point.

        Args:
            x: of the point, in data coordinates.
            y: likewise.
            text: a line or several.
            size: points.
            places: to try: offsets in points and alignments, best first.
            leader: colour of a line to the point from a label that isn't next to it.
            style: of the text, as matplotlib takes it.
        """
        (left, bottom), *_ = self._points([x], [y])
        width, height = text_width(text, size), size * LINE * (text.count("\n") + 1)
        boxes = [_box(left + dx, bottom + dy, width, height, ha, va) for dx, dy, ha, va in places]
        costs = [self._cost(box) + _FARTHER * place for place, box in enumerate(boxes)]
        if leader:
            for place, (dx, dy, *_) in enumerate(places):
                costs[place] += self._crossed((left, bottom), (left + dx, bottom + dy))
        best = int(np.argmin(costs))
        self._texts.append(boxes[best])
        dx, dy, ha, va = places[best]
        if leader and np.hypot(dx, dy) > _NEXT_TO:
            side = {"left": 0.0, "center": 0.5, "right": 1.0, "bottom": 0.0, "top": 1.0}
            line = {"arrowstyle": "-", "color": leader, "linewidth": 0.8, "relpos": (side[ha], side[va])}
            style["arrowprops"] = line | {"shrinkA": 0, "shrinkB": 3}
        return self.axes.annotate(
            text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, size=size, annotation_clip=False, **style
        )

    def _cost(self, box: Box) -> float:
        left, bottom, right, top = box
        frame = self.axes.bbox
        scale = 72 / DPI
        edges = tuple(float(edge) * scale for edge in frame.extents)
        beyond = left < edges[0] or bottom < edges[1] or right > edges[2] or top > edges[3]
        texts = sum(
            left < b[2] + _BESIDE and right > b[0] - _BESIDE and bottom < b[3] and top > b[1] for b in self._texts
        )
        x, y = self._marks.T
        marks = int(((x > left - 2) & (x < right + 2) & (y > bottom - 1) & (y < top + 1)).sum())
        return _OUTSIDE * beyond + _ON_TEXT * texts + _ON_MARK * marks

    def _crossed(self, begin: tuple[float, float], end: tuple[float, float]) -> float:
        """What it costs that a leader crosses texts."""
        steps = np.linspace(begin, end, 8)
        inside = [b[0] < x < b[2] and b[1] < y < b[3] for x, y in steps.tolist() for b in self._texts]
        return _ON_LEADER * inside.count(True)

    def _points(self, x: Sequence[float], y: Sequence[float]) -> np.ndarray:
        """(n, 2): where data coordinates are on the figure, in points."""
        shown: np.ndarray = self.axes.transData.transform(np.column_stack([x, y]))
        return shown * 72 / DPI


def _box(x: float, y: float, width: float, height: float, ha: str, va: str) -> Box:
    left = x - width * {"left": 0, "center": 0.5, "right": 1}[ha]
    bottom = y - height * {"bottom": 0, "center": 0.5, "top": 1}[va]
    return left, bottom, left + width, bottom + height
