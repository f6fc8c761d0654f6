"""Which frames stand for a video: spread evenly over it, or the first ones of its scenes. Whole numbers throughout."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

CUT = 0.1  # of the range of values: a cut between shots changes a picture more, moving things and cameras less


def choose_evenly(times: Sequence[int], end: int, count: int) -> list[int]:
    """The frames that are seen at the centres of equal parts.

    Args:
        times: when each frame begins, ascending, in any unit; at least one.
        end: when the last one ends, after all of `times`.
        count: how many parts, >= 1.

    Returns:
        Their times, ascending: all where there are no more than `count`. Each comes once: where frames don't last
        equally long, one that is seen at two centres makes it one less.
    """
    if len(times) <= count:
        return list(times)
    length = end - times[0]
    return _seen_at(times, [times[0] + (2 * part + 1) * length // (2 * count) for part in range(count)])


def choose_scenes(times: Sequence[int], end: int, changes: Sequence[float], count: int) -> list[int]:
    """The first frame, and those after the strongest cuts; of equal ones the earliest.

    Where there are fewer scenes than `count`, one more frame goes to the scene with the most time to each of its
    frames, again and again; a scene's frames are those that are seen where its equal parts begin.

    Args:
        times: as in `choose_evenly`.
        end: likewise.
        changes: of each frame from the one before it, in [0, 1]; the first one's doesn't count.
        count: how many frames, >= 1.

    Returns:
        Their times, as of `choose_evenly`.
    """
    if len(times) <= count:
        return list(times)
    cuts = [number for number in range(1, len(times)) if changes[number] >= CUT]
    strongest = sorted(cuts, key=lambda number: -changes[number])[: count - 1]
    marks = [*times, end]
    moments: list[int] = []
    scenes = list(
        pairwise([*sorted([0, *strongest]), len(times)])
    )  # numbers of the first frame, and of the next scene's
    shares = _shares([(marks[after] - marks[first], after - first) for first, after in scenes], count)
    for (first, after), share in zip(scenes, shares, strict=True):
        moments += [marks[first] + part * (marks[after] - marks[first]) // share for part in range(share)]
    return _seen_at(times, moments)


def _shares(scenes: Sequence[tuple[int, int]], count: int) -> list[int]:
    """How many frames each scene gets, one at least.

    Args:
        scenes: length and number of frames of each.
        count: of all together; no more than there are frames.
    """
    shares = [1] * len(scenes)
    while sum(shares) < count:
        open_ones = [number for number, (_, size) in enumerate(scenes) if shares[number] < size]
        shares[max(open_ones, key=lambda number: Fraction(scenes[number][0], shares[number]))] += 1
    return shares


def _seen_at(times: Sequence[int], moments: Sequence[int]) -> list[int]:
    """The times of the frames that are seen then, each once."""
    return sorted({times[bisect_right(times, moment) - 1] for moment in moments})
