"""What several measurements of the same thing come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of some values and their two ends.

    The ends are the least and the greatest value, not quartiles: of five runs, quartiles would hide two.
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest of at least one value; an even count's median is its middle two's mean."""
    if not values:
        raise ValueError("a median needs at least one value")
    return Spread(statistics.median(values), min(values), max(values))


# If two things were equally fast, one of them would be faster in all of 6 rounds once in 32 times.
LEAST_ROUNDS = 6


def verdict(ratios: Sequence[float], this: str, other: str) -> str:
    """Who was faster in every round; nobody where the rounds disagree or are too few.

    Args:
        ratios: the other's time by this one's of the same round; above 1 this one was faster.
        this: its name.
        other: the other's.
    """
    low, high = min(ratios), max(ratios)
    if low <= 1 <= high:
        return "no difference shown"
    if len(ratios) < LEAST_ROUNDS:
        return f"fewer than {LEAST_ROUNDS} rounds show nothing"
    return f"{this if low > 1 else other} faster in every round"


# Of fewer runs, the ends are too near to each other: with 5, one pair in eight of the same case is further apart than
# that (tests/bench/recorded), and with 10 one in a hundred.
LEAST_RUNS = 10


def apart(one: Spread, other: Spread) -> bool:
    """Whether two measurements, made at different times, differ by more than the wider of their spreads.

    Unlike rounds that ran in turn, such measurements aren't pairs: what changed in between (another program, the
    temperature) is in the spread of neither, unless it changes within a measurement, too. Each needs LEAST_RUNS.
    """
    return abs(one.median - other.median) > max(one.high - one.low, other.high - other.low)
