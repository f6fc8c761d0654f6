"""Answers to questions about charts and signs, found again from where the plan puts bars and texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

pytest.importorskip("matplotlib")

from nano.charts import Bar
from nano.phrases import Question
from nano.planning import Plan
from nano.scenes import FAMILIES, SPLITS
from nano.vocabulary import BACKGROUNDS, COLOURS, NINTHS
from support.plans import planned

BAR = re.compile(rf"\b({'|'.join(COLOURS)}) bar\b")
HIGHEST, LOWEST = r"highest|tallest|greatest", r"lowest|shortest|smallest"
CLEAR = 0.1  # how far from the middle of a ninth a text may be that is asked for its place


@cache
def _scenes(family: str) -> list[tuple[Plan, tuple[Question, ...]]]:
    return [planned(seed, split, family) for split in SPLITS for seed in range(300)]


def asked(family: str, kind: str, words: str) -> Iterator[tuple[Plan, str, str]]:
    """Plan, prompt in small letters and British spelling, and answer of each question with one of the words."""
    for plan, questions in _scenes(family):
        for question in questions:
            prompt = question.prompt.lower().replace("color", "colour")
            if question.kind == kind and re.search(rf"\b(?:{words})\b", prompt):
                yield plan, prompt, question.answer


def bars_of(plan: Plan) -> dict[str, Bar]:
    """Colour -> bar."""
    assert plan.chart is not None
    return {COLOURS[bar.colour]: bar for bar in plan.chart.bars}


def test_the_highest_and_the_lowest_bar_are_those_that_are_drawn_so() -> None:
    found: Counter[str] = Counter()
    for words, choose in ((HIGHEST, min), (LOWEST, max)):  # of the upper ends: pictures count from the top
        for plan, prompt, answer in asked("chart", "chart", words):
            if not BAR.search(prompt):
                bars = bars_of(plan)
                assert answer == choose(bars, key=lambda name: bars[name].top), prompt
                found[words] += 1
    assert min(found[HIGHEST], found[LOWEST]) > 150


def test_a_bar_is_higher_that_ends_further_up() -> None:
    found: Counter[str] = Counter()
    for plan, prompt, answer in asked("chart", "chart", "higher|taller|greater"):
        bars = bars_of(plan)
        first, second = BAR.findall(prompt)
        assert answer == ("yes" if bars[first].top < bars[second].top else "no"), prompt
        found[answer] += 1
    assert min(found["yes"], found["no"]) > 80


def test_values_are_those_of_the_bars() -> None:
    found = 0
    for plan, prompt, answer in asked("chart", "chart", "value|high"):
        names = BAR.findall(prompt)
        if len(names) == 1:
            assert answer == str(bars_of(plan)[names[0]].value), prompt
            found += 1
    assert found > 300


def test_bars_lie_left_and_right_of_each_other_as_they_are_drawn() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for side in ("left", "right"):
        for plan, prompt, answer in asked("chart", "relation", side):
            first, second = (bars_of(plan)[name].left for name in BAR.findall(prompt))
            assert answer == ("yes" if (first < second if side == "left" else first > second) else "no"), prompt
            found[side, answer] += 1
    assert len(found) == 4
    assert min(found.values()) > 40


def test_bars_are_there_and_as_many_as_are_drawn() -> None:
    found: Counter[str] = Counter()
    for plan, prompt, answer in asked("chart", "presence", "bar"):
        (name,) = BAR.findall(prompt)
        assert answer == ("yes" if name in bars_of(plan) else "no"), prompt
        found[answer] += 1
    for plan, prompt, answer in asked("chart", "count", "bars"):
        assert answer == str(len(bars_of(plan))), prompt
        found[answer] += 1
    assert set(found) == {"yes", "no", "2", "3", "4"}
    assert min(found.values()) > 60


def test_no_question_about_a_chart_goes_unchecked() -> None:
    """Each is one of those above, about the background, or a description."""
    known = rf"{HIGHEST}|{LOWEST}|higher|taller|greater|value|how high|left|right|a bar|an? \w+ bar|bars|background"
    for _, questions in _scenes("chart"):
        for question in questions:
            assert question.kind == "describe" or re.search(known, question.prompt.lower()), question


def test_a_texts_place_is_asked_for_near_the_middle_of_a_ninth_only() -> None:
    middles = [((column + 0.5) / 3, (row + 0.5) / 3) for row in range(3) for column in range(3)]
    found: Counter[str] = Counter()
    for plan, prompt, answer in asked("text", "position", "text|word|number"):
        sign = plan.lettering
        assert sign is not None
        apart = [max(abs(sign.x - x), abs(sign.y - y)) for x, y in middles]
        assert min(apart) <= CLEAR, prompt
        assert answer == NINTHS[apart.index(min(apart))], prompt
        assert not re.search("word" if sign.text.isdigit() else "number", prompt)
        found[answer] += 1
    assert set(found) == set(NINTHS)
    assert found.total() > 100


def test_a_background_is_asked_for_where_it_is_the_only_one() -> None:
    """Never beside a plate, which is one, too, nor in front of a photograph."""
    for family in FAMILIES:
        found = 0
        for plan, prompt, answer in asked(family, "colour", "background"):
            assert not plan.backdrop.photograph, prompt
            assert plan.lettering is None or plan.lettering.plate is None, prompt
            assert answer == BACKGROUNDS[plan.backdrop.index]
            found += 1
        assert found > 50, family
    assert sum(plan.lettering is not None and plan.lettering.plate is not None for plan, _ in _scenes("text")) > 50


def test_there_is_text_where_a_sign_is_and_photographs_are_not_asked_about() -> None:
    for family, right in (("shapes", "no"), ("text", "yes")):
        found = 0
        for plan, prompt, answer in asked(family, "presence", "text|word"):
            assert not plan.backdrop.photograph, prompt
            assert answer == right == ("yes" if plan.letterings else "no"), prompt
            found += 1
        assert found > 50, family
