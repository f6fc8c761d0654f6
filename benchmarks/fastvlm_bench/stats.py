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
