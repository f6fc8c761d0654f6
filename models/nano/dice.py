"""The random choices of one scene: a thin layer over numpy's generator, whose `choice` is slow for single draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Draws that depend on the key alone."""

    def __init__(self, *key: int) -> None:
        """Seed it.

        Args:
            key: non-negative numbers; another key, another sequence of draws.
        """
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return bool(self._generator.random() < probability)

    def between(self, low: float, high: float) -> float:
        """A number of [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def whole(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return int(self._generator.integers(low, high + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of them, all equally likely."""
        return items[int(self._generator.integers(len(items)))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of them, as likely as its weight says."""
        left = self.between(0.0, sum(weights))
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of them, in a random order."""
        return [items[index] for index in self._generator.permutation(len(items))]
