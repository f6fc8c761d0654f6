"""Which choices of decoder, bits, resolution and grid are worth having within a budget.

Accuracy is known where somebody published it. For the rest only an order is taken for granted: a model answers no
worse with a larger decoder, with more bits, or with larger images up to the side that it was trained at, all else
equal. A choice is on the front unless another one within the budget is at least as good by that order and no slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastvlm_mlx.latency import Estimate, Grid, Latency
from fastvlm_mlx.measurements import Subject
from fastvlm_zoo.accuracy import Accuracy, published

MEMORY_UNKNOWN = "its memory wasn't measured alone"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a choice may take.

    Attributes:
        ttft_ms: the slowest measured time to first token; the median alone would be missed by half of the questions.
        memory_bytes: the most that MLX held; None for any.
    """

    ttft_ms: float
    memory_bytes: int | None = None

    def reason_against(self, estimate: Estimate) -> str | None:
        """Why something isn't within the budget; None if it is."""
        if estimate.ttft.high > self.ttft_ms:
            return "over the TTFT budget"
        if self.memory_bytes is None:
            return None
        if estimate.peak_bytes is None:
            return MEMORY_UNKNOWN
        return "over the memory budget" if estimate.peak_bytes > self.memory_bytes else None


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a model.

    Attributes:
        subject: decoder, bits, and what runs the encoder.
        resolution: side in pixels of the picture, or of a tile.
        grid: AnyRes tiles, None for one picture.
        estimate: what it takes.
    """

    subject: Subject
    resolution: int
    grid: Grid | None
    estimate: Estimate

    def __str__(self) -> str:
        bits = "unquantised" if self.subject.bits is None else f"{self.subject.bits} bits"
        grid = f" in {self.grid} tiles" if self.grid else ""
        return f"{decoder_name(self.subject)}, {bits}, {self.subject.vision}, {self.resolution} px{grid}"


@dataclass(frozen=True, slots=True)
class Known:
    """What is published about a choice.

    Attributes:
        entry: the figures.
        bound: they are the most that can be expected: those of more bits or a larger image.
        own: of the choice's weights; else it has random ones of the published shape.
    """

    entry: Accuracy
    bound: bool
    own: bool

    @property
    def exact(self) -> bool:
        """Whether the figures are this choice's."""
        return self.own and not self.bound


@dataclass(frozen=True, slots=True)
class Verdict:
    """A choice, and why it isn't on the front; None if it is."""

    choice: Choice
    reason: str | None


def decoder_name(subject: Subject) -> str:
    """How a table names it: its size if that is a published one."""
    return subject.size.upper() if subject.size else subject.name


def candidates(subject: Subject, latency: Latency, text_tokens: int, budget: Budget) -> list[Choice]:
    """The measured sizes, the largest one between them that is within the budget, and the model's own grids.

    Only MLX takes sizes between the measured ones; a Core ML package has its own, which are those that were measured.

    Args:
        subject: what was measured.
        latency: what is known of it.
        text_tokens: of the question, around the image.
        budget: decides which size between the measured ones.
    """
    sides = latency.resolutions
    trained = trained_side(subject) or (sides[-1] if sides else 0)
    found = [
        Choice(subject, side, None, estimate) for side in sides if (estimate := latency.estimate(side, text_tokens))
    ]
    if subject.vision == "mlx" and sides:
        between = [
            Choice(subject, side, None, estimate)
            for side in range(sides[0], min(sides[-1], trained) + 1, subject.downsampling)
            if (estimate := latency.estimate(side, text_tokens)) and budget.reason_against(estimate) is None
        ]
        found += [choice for choice in between[-1:] if choice not in found]
    grids = ((grid, latency.estimate_grid(trained, grid, text_tokens)) for grid in grids_of(subject))
    return found + [Choice(subject, trained, grid, estimate) for grid, estimate in grids if estimate]


def grids_of(subject: Subject) -> list[Grid]:
    """The tiles that its config has; the published models have none."""
    side = trained_side(subject)
    if not side:
        return []
    breaks = subject.patch_merge_type == "spatial_unpad"
    return [Grid(width // side, height // side, breaks) for width, height in subject.grid_pinpoints]


def trained_side(subject: Subject) -> int | None:
    """Side in pixels that it was trained at; None if unknown."""
    entry = _published().get(subject.size or "")
    return subject.image_size or (entry.resolution if entry else None)


def published_accuracy(choice: Choice) -> Known | None:
    """What is published about a choice; None where nothing is that bounds it."""
    entry = _published().get(choice.subject.size or "")
    if entry is None or choice.grid or choice.resolution > entry.resolution:
        return None
    bound = choice.resolution != entry.resolution or choice.subject.bits is not None
    return Known(entry, bound, own=not choice.subject.seeded)


def judge(choices: Sequence[Choice], budget: Budget) -> list[Verdict]:
    """Say of each choice whether it is on the front; fastest first."""
    ordered = sorted(choices, key=lambda choice: choice.estimate.ttft.median)
    against = [budget.reason_against(choice.estimate) for choice in ordered]
    fitting = [choice for choice, reason in zip(ordered, against, strict=True) if reason is None]
    return [
        Verdict(choice, reason or _reason_off(choice, fitting)) for choice, reason in zip(ordered, against, strict=True)
    ]


def _reason_off(choice: Choice, fitting: Sequence[Choice]) -> str | None:
    better = (other for other in fitting if other is not choice and _dominates(other, choice, fitting))
    # The best of them, so that the reason doesn't name one that is off the front itself.
    best = min(better, key=lambda o: sum(_dominates(p, o, fitting) for p in fitting if p is not o), default=None)
    return f"no better and no faster than {best}" if best else None


def _dominates(first: Choice, second: Choice, fitting: Sequence[Choice]) -> bool:
    """At least as good and no slower; of two that are so both ways, the first of the list."""

    def no_worse(one: Choice, other: Choice) -> bool:
        return at_least_as_good(one, other) and one.estimate.ttft.median <= other.estimate.ttft.median

    if not no_worse(first, second):
        return False
    return not no_worse(second, first) or fitting.index(first) < fitting.index(second)


def at_least_as_good(first: Choice, second: Choice) -> bool:
    """Whether the order that is taken for granted puts the first choice's accuracy at the second's or above."""
    return (
        _decoder_no_smaller(first.subject, second.subject)
        and _bits(first) >= _bits(second)
        and first.grid == second.grid
        and _picture_no_smaller(first, second)
    )


def _decoder_no_smaller(first: Subject, second: Subject) -> bool:
    sizes = list(_published())
    if first.size in sizes and second.size in sizes:
        return sizes.index(first.size) >= sizes.index(second.size)
    return (first.size, first.name) == (second.size, second.name)


def _bits(choice: Choice) -> float:
    return math.inf if choice.subject.bits is None else choice.subject.bits


def _picture_no_smaller(first: Choice, second: Choice) -> bool:
    if first.resolution == second.resolution:
        return True
    trained = trained_side(first.subject)
    return trained is not None and second.resolution < first.resolution <= trained


def _published() -> Mapping[str, Accuracy]:
    """By size, smallest first."""
    return {entry.size: entry for entry in published() if entry.size}
