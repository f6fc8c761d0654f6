"""Pictures of two to one: the middle half of scenes of which everything lies in it.

For judging what a model makes of pictures that aren't square, padded or in their own shape; nothing is trained on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from fastvlm_mlx.errors import InputError
from nano.dice import Dice
from nano.phrases import Question
from nano.planning import Plan, plan_scene
from nano.scenes import make_scene
from nano.vocabulary import SPLITS

TOP, BOTTOM = 0.25, 0.75  # of the square scene, what is kept of its height
_MARGIN = 0.01
_PLACE = re.compile(r"\b(top|bottom|upper|lower|left|right|middle|cent(er|re)|corner)\b", re.IGNORECASE)


def wide_scenes(split: str, count: int, seed: int = 0, width: int = 512) -> Iterator[tuple[np.ndarray, list[Question]]]:
    """Make wide pictures with those of their questions whose answers the cut leaves as they are.

    Args:
        split: one of SPLITS.
        count: how many pictures.
        seed: of the first scene that is tried; charts fill a picture and are never taken.
        width: of the pictures in pixels, a multiple of 4; they are half as high.

    Yields:
        (width / 2, width, 3) uint8, RGB, and one question or more.

    Raises:
        InputError: a quarter of the width isn't a whole number.
    """
    if width % 4:
        raise InputError(f"wide pictures are cut at quarters and need a side that is a multiple of 4, not {width}")
    made = 0
    while made < count:
        plan = plan_scene(Dice(SPLITS.index(split), seed), split == "held-out")
        if _fits(plan):
            scene = make_scene(seed, split, width)
            questions = [question for question in scene.questions if _stays(question, plan)]
            if questions:
                yield scene.image[round(TOP * width) : round(BOTTOM * width)], questions
                made += 1
        seed += 1


def _fits(plan: Plan) -> bool:
    """Whether all that is in a picture lies in its middle half."""
    if plan.chart:
        return False
    reaches = [(thing.y, thing.radius) for thing in plan.things]
    if plan.lettering:
        reaches.append((plan.lettering.y, plan.lettering.extent[1] / 2))
    return all(y - reach > TOP + _MARGIN and y + reach < BOTTOM - _MARGIN for y, reach in reaches)


def _stays(question: Question, plan: Plan) -> bool:
    """Whether the answer is the same for the cut picture: not where it is about ninths of the whole."""
    if question.kind == "describe":  # names things by the rows of ninths
        return len(plan.things) < 2
    return question.kind == "relation" or not _PLACE.search(f"{question.prompt} {question.answer}")
