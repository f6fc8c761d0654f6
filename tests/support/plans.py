"""Scenes without their pictures, and the things that questions name."""

from __future__ import annotations

import re

from nano.dice import Dice
from nano.phrases import Question, plural
from nano.planning import Plan, plan_scene
from nano.questions import ask_all
from nano.scenes import COLOURS, SHAPES, SPLITS

NOUNS = {**{shape: shape for shape in SHAPES}, **{plural(shape): shape for shape in SHAPES}}
NOUN = re.compile(rf"(?:\b({'|'.join(COLOURS)}) )?\b({'|'.join(NOUNS)}|shapes?)\b")
Cell = tuple[int, int, str, str]  # row and column as thirds, shape, colour


def planned(seed: int, split: str, family: str | None = None) -> tuple[Plan, tuple[Question, ...]]:
    """A scene as `make_scene` plans it, and what is asked about it."""
    dice = Dice(SPLITS.index(split), seed)
    plan = plan_scene(dice, split == "held-out", family)
    return plan, ask_all(plan, dice, split == "held-out")
