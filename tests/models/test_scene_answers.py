"""Answers to questions about scenes, found again from the targets that come with each picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from nano.lettering import Lettering, inks_of
from nano.phrases import Question
from nano.scenes import ALPHABET, COLOURS, SHAPES, SPLITS, Scene, make_scene
from nano.vocabulary import NINTHS, PAINTS, TRAIN_FONTS
from support.plans import NOUN, NOUNS, Cell, planned

THIRDS = (0, 1, 1, 2)  # of a row or column of the 4 x 4 cells


def filled(scene: Scene) -> list[Cell]:
    """What the cells hold."""
    return [
        (THIRDS[row], THIRDS[column], SHAPES[scene.cells[row, column, 0] - 1], COLOURS[scene.cells[row, column, 1] - 1])
        for row, column in zip(*np.nonzero(scene.cells[..., 0]), strict=True)
    ]


def meant(prompt: str, cells: list[Cell]) -> list[list[Cell]]:
    """For each thing that a prompt names, the cells that answer to it."""
    found = []
    for colour, noun in NOUN.findall(prompt.lower()):
        shape = NOUNS.get(noun)
        found.append([cell for cell in cells if (not shape or cell[2] == shape) and (not colour or cell[3] == colour)])
    return found


def shape_questions(kind: str) -> Iterator[tuple[Question, list[Cell], list[list[Cell]]]]:
    """Questions of a kind about shapes: with all cells, and those that each noun of the prompt means."""
    for split in SPLITS:
        for seed in range(160):
            scene = _scene(seed, split)
            for question in scene.questions:
                cells = filled(scene)
                if question.kind == kind and (named := meant(question.prompt, cells)):
                    yield question, cells, named


@cache
def _scene(seed: int, split: str) -> Scene:
    return make_scene(seed, split, 32, "shapes")


def test_counts_are_those_of_the_cells() -> None:
    for question, _, (things,) in shape_questions("count"):
        assert question.answer == str(len(things)), question


def test_presence_is_that_of_the_cells() -> None:
    for question, _, (things,) in shape_questions("presence"):
        assert question.answer == ("yes" if things else "no"), question


def test_positions_are_those_of_the_cells() -> None:
    for question, _, (things,) in shape_questions("position"):
        assert [NINTHS[3 * row + column] for row, column, *_ in things] == [question.answer], question


def _placed(prompt: str, cells: list[Cell]) -> list[Cell] | None:
    """Those at the place that a prompt names: "right" is the whole column, "top right" its end."""
    found = re.search(r"(?:at|on|in) the ((?:top |bottom )?(?:left|right)|top|bottom|centre)", prompt.lower())
    if not found:
        return None
    ninth = NINTHS.index(found[1])
    if found[1] in ("top", "bottom"):
        return [cell for cell in cells if cell[0] == ninth // 3]
    if found[1] in ("left", "right"):
        return [cell for cell in cells if cell[1] == ninth % 3]
    return [cell for cell in cells if 3 * cell[0] + cell[1] == ninth]


@pytest.mark.parametrize(("kind", "part"), [("colour", 3), ("kind", 2)])
def test_colours_and_kinds_are_asked_of_one_thing_only(kind: str, part: int) -> None:
    for question, cells, named in shape_questions(kind):
        place = _placed(question.prompt, cells)
        things = min(named, key=len) if place is None else place  # "which shape is the red shape" has two nouns
        assert [cell[part] for cell in things] == [question.answer], question


def test_relations_are_those_of_the_cells() -> None:
    for question, cells, named in shape_questions("relation"):
        prompt = question.prompt.lower()
        upright = not re.search(r"\b(left|right)\b", prompt)
        axis = 0 if upright else 1
        lower = bool(re.search(r"\b(left|above|over|higher)\b", prompt))
        if question.answer in ("yes", "no"):
            (first,), (second,) = named
            assert first[axis] != second[axis]
            assert (question.answer == "yes") == ((first[axis] < second[axis]) == lower), question
        else:
            (base,) = named[-1]
            beyond = [cell for cell in cells if (cell[axis] < base[axis] if lower else cell[axis] > base[axis])]
            assert [f"{cell[3]} {cell[2]}" for cell in beyond] == [question.answer], question


def test_shapes_are_painted_where_the_cells_say_and_stay_apart() -> None:
    for seed in range(100):
        plan, _ = planned(seed, "held-out", "shapes")
        scene = make_scene(seed, "held-out", 128, "shapes")
        assert len(filled(scene)) == len(plan.things)
        for thing in plan.things:
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
            for other in plan.things:
                if other is not thing:
                    apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
                    assert apart > thing.radius + other.radius
            if SHAPES[thing.shape] != "ring":
                pixel = scene.image[int(thing.y * 128), int(thing.x * 128)].astype(int)
                assert np.abs(pixel - PAINTS[COLOURS[thing.colour]]).max() <= 16


def test_letters_are_those_of_the_answer() -> None:
    for split in SPLITS:
        for seed in range(120):
            plan, questions = planned(seed, split, "text")
            letters = make_scene(seed, split, 32, "text").letters
            answer = next(question.answer for question in questions if question.kind == "reading")
            written = "".join(ALPHABET[index - 1] for index in letters[letters > 0])
            assert sorted(written) == sorted(answer)
            if plan.lettering is not None and plan.lettering.angle == 0:
                assert written == answer


def test_inks_are_the_colours_that_are_asked_for_where_the_characters_are() -> None:
    asked = 0
    for seed in range(200):
        scene = make_scene(seed, "train", 32, "text")
        found = set(scene.inks[scene.inks != 0].tolist())
        assert np.array_equal(scene.inks != 0, (scene.letters != 0).any(-1)), seed
        answers = {q.answer for q in scene.questions if q.kind == "colour" and not NOUN.search(q.prompt.lower())}
        for answer in answers & set(COLOURS) if len(found) == 1 and len(answers) == 1 else ():
            background = any("background" in q.prompt for q in scene.questions if q.answer == answer)
            if not background:
                asked += 1
                assert COLOURS[found.pop() - 1] == answer, seed
    assert asked > 20


def test_ninths_are_those_of_the_cells() -> None:
    seen = set()
    for seed in range(80):
        cells = _scene(seed, "train").cells
        for row, column in zip(*np.nonzero(cells[..., 0]), strict=True):
            assert cells[row, column, 2] == 3 * THIRDS[row] + THIRDS[column] + 1
            seen.add(int(cells[row, column, 2]))
        assert not cells[cells[..., 0] == 0].any()
    assert seen == set(range(1, 10))


def test_cells_of_labels_and_of_two_colours_have_no_ink_to_learn() -> None:
    line = Lettering("on", next(iter(TRAIN_FONTS)), 0.1, 0.5, 0.1, 0.0, (0, 0, 0), colour=2)
    assert set(inks_of((line,)).ravel().tolist()) == {0, 3}
    both = inks_of((line, replace(line, colour=4)))
    assert set(both.ravel().tolist()) == {0, -1}
    apart = inks_of((line, replace(line, colour=4, y=0.9)))
    assert set(apart[0].tolist()) == {0, 3}
    assert set(apart[3].tolist()) == {0, 5}
    assert set(inks_of((replace(line, colour=-1),)).ravel().tolist()) == {0, -1}


def test_what_lies_beyond_is_asked_for_where_no_other_thing_seems_to() -> None:
    """One thing only in a row or column beyond, and none of those beside the thing clearly further that way."""
    asked = 0
    for split, seed in ((split, seed) for split in SPLITS for seed in range(500)):
        plan, questions = planned(seed, split, "shapes")
        cells = [(thing.row, thing.column, *thing.name.split()[::-1]) for thing in plan.things]
        for question in questions:
            prompt = question.prompt.lower()
            if question.kind != "relation" or question.answer in ("yes", "no"):
                continue
            (base,) = meant(prompt, cells)[-1]
            start = plan.things[cells.index(base)]
            sign = -1 if re.search(r"\b(left|above)\b", prompt) else 1
            sideways = bool(re.search(r"\b(left|right)\b", prompt))
            others = [thing for thing in plan.things if thing is not start]
            ahead = [(t.name, sign * (t.x - start.x if sideways else t.y - start.y)) for t in others]
            assert [name for name, far in ahead if far > 0.05] == [question.answer], question
            asked += 1
    assert asked > 150
