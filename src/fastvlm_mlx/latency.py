"""The time to first token of questions that weren't measured, from those that were."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from fastvlm_mlx.config import DOWNSAMPLING
from fastvlm_mlx.measurements import Point, Report, Subject, Times

QUESTION_TOKENS = 24  # the chat template and a short question; what `fastvlm-bench` asks if not told otherwise


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a question takes.

    Attributes:
        ttft: milliseconds.
        measured: exactly this was measured; else its stages lie between measured ones.
        peak_bytes: most memory that MLX held; of an estimate that of the next larger measured size, so at most
            that; None if unknown.
    """

    ttft: Times
    measured: bool
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Grid:
    """AnyRes tiles, beside which the encoder sees the whole picture once more.

    Attributes:
        columns, rows: of the grid.
        line_breaks: each row of positions ends with one more ("spatial_unpad").
    """

    columns: int
    rows: int
    line_breaks: bool = False

    def __str__(self) -> str:
        return f"{self.columns}x{self.rows}"

    @property
    def pictures(self) -> int:
        """How many the encoder sees."""
        return self.columns * self.rows + 1

    def tokens(self, side: int, downsampling: int = DOWNSAMPLING) -> int:
        """Positions, at most: where tiles are padding, "spatial_unpad" leaves it out.

        Args:
            side: of a tile in pixels.
            downsampling: pixels per side of a position.
        """
        n = side // downsampling
        return n * n + self.rows * n * (self.columns * n + self.line_breaks)


class Latency:
    """What is known of one subject.

    Between measured sizes the stages are interpolated one by one: vision and the rest over the number of image
    tokens, prefill over the prompt's positions. Their cost grows faster than that, attention's at least, so that the
    straight line rather lies above the truth; a stage that was measured shorter for a larger size counts as long as
    for the smaller one.
    Outside of what was measured nothing is said.

    Args:
        points: of `fastvlm-bench`; a later one replaces an earlier one of the same question, whose memory stays known
            where the later one doesn't say.
        downsampling: pixels per side of a position.
    """

    def __init__(self, points: Iterable[Point], downsampling: int = DOWNSAMPLING) -> None:
        self._downsampling = downsampling
        # A square picture's; of tiles only the model's own grid would tell what they are.
        plain = [p for p in points if p.image_tokens == (p.resolution // downsampling) ** 2]
        self._points: dict[tuple[int, int], Point] = {}
        for p in plain:
            before = self._points.get((p.resolution, p.text_tokens))
            known = before.peak_bytes if before and p.peak_bytes is None else p.peak_bytes
            self._points[p.resolution, p.text_tokens] = replace(p, peak_bytes=known)
        self._vision = {p.image_tokens: p.vision for p in plain}
        self._prefill = {p.positions: p.prefill for p in plain}
        self._rest = {p.image_tokens: p.ttft - p.vision - p.prefill for p in plain}

    @property
    def resolutions(self) -> list[int]:
        """The measured sides in pixels, ascending."""
        return sorted({resolution for resolution, _ in self._points})

    @property
    def most_positions(self) -> int:
        """Of the longest measured prompt; 0 if there is none."""
        return max(self._prefill, default=0)

    def estimate(self, resolution: int, text_tokens: int = QUESTION_TOKENS) -> Estimate | None:
        """A question about one picture.

        Args:
            resolution: side in pixels, a multiple of the downsampling.
            text_tokens: positions around the image.

        Returns:
            As measured, or interpolated; None outside of what was measured.
        """
        if point := self._points.get((resolution, text_tokens)):
            return Estimate(point.ttft, True, point.peak_bytes)
        tokens = (resolution // self._downsampling) ** 2
        ttft = self._sum(tokens, 1, tokens + text_tokens)
        return Estimate(ttft, False, self._peak_bytes(tokens, tokens + text_tokens)) if ttft else None

    def estimate_grid(self, side: int, grid: Grid, text_tokens: int = QUESTION_TOKENS) -> Estimate | None:
        """A question about one picture in tiles: each is preprocessed, encoded and projected, all are prefilled.

        Args:
            side: of a tile in pixels.
            grid: the tiles.
            text_tokens: positions around the image.

        Returns:
            Interpolated; None outside of what was measured.
        """
        tokens = (side // self._downsampling) ** 2
        ttft = self._sum(tokens, grid.pictures, grid.tokens(side, self._downsampling) + text_tokens)
        return Estimate(ttft, False, None) if ttft else None

    def _sum(self, tokens: int, pictures: int, positions: int) -> Times | None:
        vision, rest, prefill = _at(self._vision, tokens), _at(self._rest, tokens), _at(self._prefill, positions)
        if vision is None or rest is None or prefill is None:
            return None
        total = (vision + rest) * pictures + prefill
        # What is left of a whole has no spread of its own, so the sum's ends may cross its median.
        return Times(total.median, min(total.low, total.median), max(total.high, total.median))

    def _peak_bytes(self, tokens: int, positions: int) -> int | None:
        larger = [p for p in self._points.values() if p.image_tokens >= tokens and p.positions >= positions]
        nearest = min(larger, key=lambda p: (p.image_tokens, p.positions), default=None)
        return nearest.peak_bytes if nearest else None


def _at(nodes: Mapping[int, Times], place: int) -> Times | None:
    """On the straight line between the neighbours of a place; None outside of them all."""
    places = sorted(nodes)
    if not places or not places[0] <= place <= places[-1]:
        return None
    rising = list(accumulate((nodes[p] for p in places), Times.at_least))
    right = bisect_left(places, place)
    if places[right] == place:
        return rising[right]
    share = (place - places[right - 1]) / (places[right] - places[right - 1])
    return rising[right - 1] * (1 - share) + rising[right] * share


def latencies(reports: Iterable[Report]) -> dict[Subject, Latency]:
    """What several reports of one machine know of each subject.

    Args:
        reports: oldest first: what is measured again counts instead.
    """
    points: dict[Subject, list[Point]] = {}
    for report in reports:
        for subject, found in zip(report.subjects, report.points, strict=True):
            points.setdefault(subject, []).extend(found)
    return {subject: Latency(found, subject.downsampling) for subject, found in points.items()}
