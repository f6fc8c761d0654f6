"""Scenes for the small model: the same by seed, apart by split, varied and balanced."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from nano.phrases import PHRASES, Question, template_of
from nano.planning import Plan
from nano.scenes import (
    ALPHABET,
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    KINDS,
    LETTERS_PER_CELL,
    SHAPES,
    SPLITS,
    Scene,
    main,
    make_scene,
)
from nano.vocabulary import (
    HELD_OUT_FONTS,
    HELD_OUT_PAIRS,
    HELD_OUT_PHOTOGRAPHS,
    HELD_OUT_WORDS,
    TRAIN_FONTS,
    TRAIN_WORDS,
)
from support.plans import NOUN, NOUNS, planned

ROOT = Path(__file__).resolve().parents[2]


@cache
def plans(split: str, count: int = 1000) -> list[tuple[Plan, tuple[Question, ...]]]:
    return [planned(seed, split) for seed in range(count)]


def same(first: Scene, second: Scene) -> bool:
    arrays = ("image", "cells", "letters", "dense", "spots")
    return first.questions == second.questions and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_scene_and_another_gives_another(family: str) -> None:
    scene = make_scene(7, "train", family=family)
    assert same(scene, make_scene(7, "train", family=family))
    assert not np.array_equal(scene.image, make_scene(8, "train", family=family).image)
    assert not np.array_equal(scene.image, make_scene(7, "held-out", family=family).image)


@pytest.mark.parametrize("side", [64, 256, 500])
def test_arrays_have_their_shapes_and_the_content_does_not_depend_on_the_side(side: int) -> None:
    for seed in range(12):
        scene, reference = make_scene(seed, side=side), make_scene(seed, side=128)
        assert (scene.image.shape, scene.image.dtype) == ((side, side, 3), np.uint8)
        assert (scene.cells.shape, scene.cells.dtype) == ((4, 4, 3), np.int64)
        assert (scene.letters.shape, scene.letters.dtype) == ((4, 4, LETTERS_PER_CELL), np.int64)
        assert 0 <= scene.background < len(BACKGROUNDS)
        assert scene.questions == reference.questions
        assert np.array_equal(scene.cells, reference.cells)
        assert np.array_equal(scene.letters, reference.letters)
        assert (scene.inks.shape, scene.inks.dtype) == ((4, 4), np.int64)
        assert np.array_equal(scene.inks, reference.inks)


def test_unknown_splits_families_and_sizes_are_refused() -> None:
    for arguments in ({"split": "test"}, {"family": "maps"}, {"side": 8}, {"seed": -1}):
        with pytest.raises(ValueError):
            make_scene(**{"seed": 0, **arguments})  # type: ignore[arg-type]


def test_training_shows_nothing_of_what_is_held_out() -> None:
    for plan, questions in plans("train"):
        assert not plan.novelties
        assert plan.backdrop.photograph not in HELD_OUT_PHOTOGRAPHS
        assert not any(text.font in HELD_OUT_FONTS for text in plan.letterings)
        for colour, noun in NOUN.findall(" ".join(question.prompt.lower() for question in questions)):
            # not even asked for: "no" would be the only answer ever learnt about such a pair
            if colour and noun in NOUNS:
                assert (SHAPES.index(NOUNS[noun]), COLOURS.index(colour)) not in HELD_OUT_PAIRS


def test_most_held_out_scenes_show_something_new_and_every_sort_of_it() -> None:
    news = Counter(frozenset(plan.novelties) for plan, _ in plans("held-out"))
    share = 1 - news[frozenset()] / news.total()
    assert 0.6 < share < 0.9
    assert {name for found in news for name in found} == {"pair", "photograph", "font", "word"}


def test_the_lexicon_and_what_is_held_out_of_it() -> None:
    words = (*TRAIN_WORDS, *HELD_OUT_WORDS)
    assert len(set(words)) == len(words) >= 300
    assert all(3 <= len(word) <= 7 and word.islower() and set(word) <= set(ALPHABET) for word in words)
    assert not any(set(word) <= set("cosuvwxz") for word in words), "its case can't be seen"
    assert 0.12 < len(HELD_OUT_WORDS) / len(words) < 0.18
    assert len(HELD_OUT_FONTS) >= 2
    assert not set(HELD_OUT_FONTS) & set(TRAIN_FONTS)
    assert 0.08 <= len(HELD_OUT_PAIRS) / (len(SHAPES) * len(COLOURS)) <= 0.12


def test_every_scene_has_four_to_eight_questions_of_several_kinds_in_many_words() -> None:
    for split in SPLITS:
        for _, questions in plans(split):
            assert 4 <= len(questions) <= 8
            assert len({question.kind for question in questions}) >= 3
            assert {question.kind for question in questions} <= set(KINDS)
            assert len({question.prompt for question in questions}) == len(questions)
    assert all(len(set(phrases)) >= 4 for phrases in PHRASES.values())


def test_signs_stay_inside_the_picture_and_off_the_shape_beside_them() -> None:
    for split in SPLITS:
        for plan, _ in plans(split):
            if plan.lettering is None:
                continue
            sign, (width, height) = plan.lettering, plan.lettering.extent
            assert sign.size >= 0.1
            assert width / 2 <= min(sign.x, 1 - sign.x)
            assert height / 2 <= min(sign.y, 1 - sign.y)
            for thing in plan.things:
                apart = abs(thing.x - sign.x) - width / 2, abs(thing.y - sign.y) - height / 2
                assert max(apart) > thing.radius


def test_charts_are_asked_about_as_they_stand() -> None:
    for plan, questions in plans("held-out"):
        if plan.chart is None:
            continue
        bars = plan.chart.bars
        assert len({bar.value for bar in bars}) == len({bar.colour for bar in bars}) == len(bars)
        assert sorted(bars, key=lambda bar: bar.value) == sorted(bars, key=lambda bar: -bar.top)
        values = {bar.name: str(bar.value) for bar in bars}
        for question in questions:
            if question.kind == "chart" and question.answer.isdigit():
                assert values[re.findall(rf"({'|'.join(COLOURS)}) bar", question.prompt)[0]] == question.answer
            elif question.kind == "count":
                assert question.answer == str(len(bars))


def test_a_description_names_everything_in_reading_order() -> None:
    for plan, questions in plans("train"):
        for question in questions:
            if question.kind != "describe":
                continue
            names = [thing.name for thing in sorted(plan.things, key=lambda thing: (thing.row, thing.column))]
            places = [question.answer.lower().find(name) for name in names]
            assert min(places, default=0) >= 0
            assert plan.backdrop.name in question.answer
            assert question.answer[0].isupper()
            assert question.answer.endswith(".")
            if plan.lettering is not None:
                assert f'"{plan.lettering.text}"' in question.answer


def test_answers_cannot_be_guessed_from_the_question() -> None:
    """The most frequent answer in training to each prompt, its colours and shapes aside, given to held-out ones."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in plans("train"):
        for question in questions:
            seen[template_of(question.prompt)][question.answer] += 1
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for _, questions in plans("held-out"):
        for question in questions:
            guesses = seen[template_of(question.prompt)].most_common(1)
            asked[question.kind] += 1
            right[question.kind] += bool(guesses) and guesses[0][0] == question.answer
    limits = {"presence": 0.57, "relation": 0.57, "count": 0.4, "chart": 0.25, "reading": 0.02, "describe": 0.02}
    for kind in KINDS:
        assert right[kind] / asked[kind] <= limits.get(kind, 0.2), kind


def test_the_command_writes_pictures_and_questions(tmp_path: Path) -> None:
    target = tmp_path / "scenes"
    target.mkdir()
    (target / "old.png").touch()
    command = [sys.executable, str(ROOT / "models" / "nano" / "scenes.py"), str(target)]
    options = ["--split", "held-out", "--count", "3", "--seed", "5", "--side", "64"]
    subprocess.run([*command, *options], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert sorted(path.name for path in target.iterdir()) == ["0000.png", "0001.png", "0002.png", "questions.jsonl"]
    lines = [json.loads(line) for line in (target / "questions.jsonl").read_text("utf-8").splitlines()]
    for index in range(3):
        scene = make_scene(5 + index, "held-out", 64)
        with Image.open(target / f"{index:04}.png") as picture:
            assert np.array_equal(np.array(picture), scene.image)
        found = [line for line in lines if line["image"] == f"{index:04}.png"]
        assert [(line["kind"], line["prompt"], line["answer"]) for line in found] == [
            (question.kind, question.prompt, question.answer) for question in scene.questions
        ]


def test_the_command_refuses_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "scenes"), "--split", "test"])
    assert not list(tmp_path.iterdir())


def test_training_asks_more_of_what_takes_long() -> None:
    """Relations, counts and descriptions instead of colours and places; the held-out split keeps its shares."""
    asked = {
        split: Counter(q.kind for seed in range(300) for q in make_scene(seed, split=split, side=32).questions)
        for split in ("train", "held-out")
    }
    often = {kind: asked["train"][kind] / asked["held-out"][kind] for kind in asked["train"]}
    assert min(often["relation"], often["describe"], often["count"]) > 1.2
    assert max(often["colour"], often["kind"], often["presence"], often["position"]) < 0.8


def test_only_the_held_out_split_asks_with_neither_capital_nor_mark() -> None:
    bare = {
        split: sum(
            q.prompt[0].islower() and q.prompt[-1] not in ".?" for _, questions in plans(split) for q in questions
        )
        for split in SPLITS
    }
    assert bare["train"] == 0
    assert bare["held-out"] > 200
