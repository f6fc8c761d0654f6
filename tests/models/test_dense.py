"""The fine grid of targets: it agrees with the coarse cells, with the plan and with what is painted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from nano.dense import COLOUR, LETTER, SHAPE, STRIDE, dense_of, spots_of
from nano.dice import Dice
from nano.lettering import Lettering, centres
from nano.planning import Plan, plan_scene
from nano.scenes import ALPHABET, COLOURS, FAMILIES, SHAPES, SPLITS, make_scene
from nano.vocabulary import PAINTS

SEEDS = range(60)
SIDE = 256
COUNT = SIDE // STRIDE
NARROW = "rt"  # their centre may share a position with the neighbour whose box covers its middle


def planned(seed: int, family: str, split: str = "train") -> Plan:
    return plan_scene(Dice(SPLITS.index(split), seed), split == "held-out", family)


@pytest.mark.parametrize("side", [64, 256, 500])
def test_the_grid_has_a_position_for_every_sixteen_pixels(side: int) -> None:
    for family in FAMILIES:
        dense = make_scene(3, side=side, family=family).dense
        assert (dense.shape, dense.dtype) == ((side // 16, side // 16, 3), np.int64)
        assert np.array_equal(dense, make_scene(3, side=side, family=family).dense)
        assert dense.min() >= 0
        assert (dense.max((0, 1)) <= (len(SHAPES), len(COLOURS), len(ALPHABET))).all()


@pytest.mark.parametrize("family", ["shapes", "text"])
def test_what_a_cell_holds_lies_at_one_of_its_positions(family: str) -> None:
    for seed in SEEDS:
        scene = make_scene(seed, "held-out", SIDE, family)
        for row, column in zip(*np.nonzero(scene.cells[..., 0]), strict=True):
            positions = scene.dense[4 * row : 4 * row + 4, 4 * column : 4 * column + 4, :2]
            assert scene.cells[row, column, :2].tolist() in positions.reshape(-1, 2).tolist(), seed
        things = scene.dense[scene.dense[..., LETTER] == 0]
        pairs = {tuple(pair) for pair in things[:, :2].tolist()} - {(0, 0)}
        assert pairs == {tuple(pair) for pair in scene.cells[..., :2].reshape(-1, 2).tolist()} - {(0, 0)}


def test_nearly_every_character_has_a_position_and_none_is_made_up() -> None:
    written = found = 0
    for family in ("text", "chart"):
        for seed in SEEDS:
            plan = planned(seed, family)
            letters = dense_of(plan, SIDE)[..., LETTER]
            here = Counter(ALPHABET[index - 1] for index in letters[letters > 0])
            wanted = Counter("".join(text.text for text in plan.letterings))
            assert set(here) <= set(wanted)
            written, found = written + wanted.total(), found + (wanted & here).total()
    assert found / written > 0.93


def test_a_text_that_is_turned_is_read_along_its_line() -> None:
    for angle in (0.0, 17.0, -20.0):
        text = Lettering("Quartz", "DejaVuSans", 0.25, 0.5, 0.5, angle, (0, 0, 0))
        plan = replace(planned(0, "text"), lettering=text, things=())
        letters = dense_of(plan, SIDE)[..., LETTER]
        for character, (x, y) in zip(text.text, centres(text), strict=True):
            assert letters[int(y * COUNT), int(x * COUNT)] == ALPHABET.index(character) + 1 or character in NARROW
        if angle == 0:
            by_columns = [ALPHABET[index - 1] for index in letters.T[letters.T > 0]]
            assert "".join(dict.fromkeys(by_columns)) == text.text


def test_characters_have_the_colour_of_their_text() -> None:
    seen = set()
    for seed in range(60):
        plan = planned(seed, "text")
        assert plan.lettering is not None
        dense = dense_of(plan, SIDE)
        colours = dense[dense[..., LETTER] > 0][:, COLOUR]
        assert set(colours.tolist()) == {plan.lettering.colour + 1}
        seen.add(plan.lettering.colour)
    assert len(seen) > 5
    labelled = planned(3, "chart")
    assert all(text.colour < 0 for text in labelled.letterings)
    bare = replace(labelled, chart=replace(labelled.chart, bars=()))
    assert not dense_of(bare, SIDE)[..., COLOUR].any()


def test_bars_have_a_colour_and_no_shape_and_are_painted_there() -> None:
    for seed in range(40):
        plan, scene = planned(seed, "chart"), make_scene(seed, side=SIDE, family="chart")
        assert plan.chart is not None
        assert not scene.dense[..., SHAPE].any()
        for bar in plan.chart.bars:
            rows, columns = np.nonzero(scene.dense[..., COLOUR] == bar.colour + 1)
            # A bar of value 1 among many can end below the last middle.
            assert len(rows) or bar.top > 1 - 2 / COUNT
            if len(rows):
                middle = len(rows) // 2
                inside = scene.image[rows[middle] * STRIDE + 8, columns[middle] * STRIDE + 8].astype(int)
                marked = scene.dense[rows[middle], columns[middle], LETTER]
                assert marked or np.abs(inside - PAINTS[COLOURS[bar.colour]]).max() <= 16


def test_circles_are_painted_where_the_grid_has_their_colour() -> None:
    seen = 0
    for seed in range(60):
        scene = make_scene(seed, side=SIDE, family="shapes")
        things = planned(seed, "shapes").things
        # Of the other shapes, a part of the disc isn't painted.
        for row, column in zip(*np.nonzero(scene.dense[..., SHAPE] == SHAPES.index("circle") + 1), strict=True):
            x, y = (column + 0.5) / COUNT, (row + 0.5) / COUNT
            (within,) = [t for t in things if np.hypot(x - t.x, y - t.y) <= t.radius]
            if np.hypot(x - within.x, y - within.y) > within.radius - 0.012:
                continue  # on the outline
            paint = PAINTS[COLOURS[scene.dense[row, column, COLOUR] - 1]]
            pixel = scene.image[row * STRIDE + 8, column * STRIDE + 8].astype(int)
            assert np.abs(pixel - paint).max() <= 24, seed
            seen += 1
    assert seen > 100


def test_spots_spell_the_text_once_in_its_order() -> None:
    for angle in (0.0, 17.0, -20.0):
        text = Lettering("Quartz", "DejaVuSansMono", 0.2, 0.5, 0.5, angle, (0, 0, 0))
        spots = spots_of((text,), SIDE)
        assert spots.shape == (COUNT, COUNT)
        columns = [ALPHABET[index - 1] for index in spots.T[spots.T > 0]]
        assert "".join(columns) == "Quartz"


def test_spots_are_where_the_centres_are_and_those_outside_are_left_out() -> None:
    text = Lettering("Quartz", "DejaVuSansMono", 0.4, 0.9, 0.1, 0.0, (0, 0, 0))
    spots = spots_of((text,), SIDE)
    inside = [(c, x, y) for c, (x, y) in zip(text.text, centres(text), strict=True) if x < 1]
    assert 0 < len(inside) < len(text.text)
    assert (spots > 0).sum() == len(inside)
    for character, x, y in inside:
        assert spots[int(y * COUNT), int(x * COUNT)] == ALPHABET.index(character) + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scene_has_the_spots_of_its_texts(family: str) -> None:
    for seed in range(20):
        plan = planned(seed, family, "held-out")
        assert np.array_equal(make_scene(seed, "held-out", SIDE, family).spots, spots_of(plan.letterings, SIDE))
