"""What lies at each position of a fine grid: targets for the maps inside the encoder, not only for its output.

A position's pitch is 16 px. The grid comes from the plan, not from the pixels, so no
random number is drawn for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nano.charts import FLOOR, Chart
from nano.lettering import Lettering, centres, edges, proportions
from nano.planning import Plan
from nano.shapes import Thing
from nano.vocabulary import ALPHABET

STRIDE = 16  # pixels from one position to the next
SHAPE, COLOUR, LETTER = range(3)  # the last axis
Middles = tuple[np.ndarray, np.ndarray]  # x (1, n) and y (n, 1) of the positions' middles, parts of the side


def dense_of(plan: Plan, side: int) -> np.ndarray:
    """What lies at each position.

    A position belongs to a shape if its middle is within the shape's disc, the hole of a ring included: outlines
    as thin as a star's tips would miss most middles.

    Args:
        plan: the scene's.
        side: of the picture, in pixels.

    Returns:
        (side // 16, side // 16, 3) int64: row, column; shape, colour (of a shape, a bar or a text) and letter, + 1
        each; 0 for none.
    """
    count = side // STRIDE
    dense = np.zeros((count, count, 3), np.int64)
    middles = (np.arange(count) + 0.5) / count
    at = middles[None, :], middles[:, None]
    if plan.chart:
        _add_bars(dense, at, plan.chart)
    for thing in plan.things:
        _add_thing(dense, at, thing)
    for lettering in plan.letterings:
        _add_lettering(dense, at, lettering)
    return dense


def spots_of(letterings: Sequence[Lettering], side: int) -> np.ndarray:
    """Which character has its centre at each position: once each, so a line of them can be read off.

    Returns:
        (side // 16, side // 16) int64: index into ALPHABET + 1, of several the last; 0 for none.
    """
    count = side // STRIDE
    spots = np.zeros((count, count), np.int64)
    for lettering in letterings:
        for character, (x, y) in zip(lettering.text, centres(lettering), strict=True):
            row, column = math.floor(y * count), math.floor(x * count)
            if 0 <= row < count and 0 <= column < count:
                spots[row, column] = ALPHABET.index(character) + 1
    return spots


def _add_bars(dense: np.ndarray, at: Middles, chart: Chart) -> None:
    x, y = at
    for bar in chart.bars:
        inside = (x >= bar.left) & (x <= bar.right) & (y >= bar.top) & (y <= FLOOR)
        dense[inside, COLOUR] = bar.colour + 1


def _add_thing(dense: np.ndarray, at: Middles, thing: Thing) -> None:
    x, y = at
    inside = (x - thing.x) ** 2 + (y - thing.y) ** 2 <= thing.radius**2
    dense[inside, SHAPE] = thing.shape + 1
    dense[inside, COLOUR] = thing.colour + 1


def _add_lettering(dense: np.ndarray, at: Middles, lettering: Lettering) -> None:
    """Characters whose boxes cover a middle; where none does, one whose own centre is at the position."""
    along, across = lettering.seen_from(*at)
    indices = np.array([ALPHABET.index(character) + 1 for character in lettering.text])
    ends = edges(lettering)
    _, height = proportions(lettering.font, lettering.text)
    covered = (along >= ends[0]) & (along < ends[-1]) & (np.abs(across) <= height * lettering.size / 2)
    dense[covered, LETTER] = indices[np.searchsorted(ends, along[covered], side="right") - 1]
    if lettering.colour >= 0:  # thin strokes: from the cells' inks alone the encoder didn't learn their colour
        dense[covered, COLOUR] = lettering.colour + 1
    _add_narrow(dense, lettering, indices)


def _add_narrow(dense: np.ndarray, lettering: Lettering, indices: np.ndarray) -> None:
    """Small characters fall between the middles; of several at one position the nearest to its middle stays."""
    count = len(dense)
    nearest: dict[tuple[int, int], tuple[float, int]] = {}
    for index, (x, y) in zip(indices, centres(lettering), strict=True):
        row, column = int(y * count), int(x * count)
        if 0 <= row < count and 0 <= column < count and not dense[row, column, LETTER]:
            away = (x * count - column - 0.5) ** 2 + (y * count - row - 0.5) ** 2
            nearest[row, column] = min(nearest.get((row, column), (away, int(index))), (away, int(index)))
    for place, (_, index) in nearest.items():
        dense[*place, LETTER] = index
        if lettering.colour >= 0:
            dense[*place, COLOUR] = lettering.colour + 1
