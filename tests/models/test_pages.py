"""Pages and made-up words: much to read for training, nothing of what judges it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from nano.dice import Dice
from nano.lettering import Lettering, centres, draw_lettering
from nano.pages import UNKNOWN, letters_on
from nano.planning import Plan, plan_scene
from nano.scenes import ALPHABET, LETTERS_PER_CELL, PAGE, make_scene
from nano.texts import characters, choose_text, invented_word
from nano.vocabulary import HELD_OUT_FONTS, HELD_OUT_PHOTOGRAPHS, HELD_OUT_WORDS, TRAIN_WORDS, held_out_number


def pages(count: int) -> list[Plan]:
    return [plan_scene(Dice(0, seed), False, PAGE) for seed in range(count)]


def test_a_page_has_many_letters_and_no_questions() -> None:
    for seed in range(20):
        scene = make_scene(seed, family=PAGE)
        assert scene.questions == ()
        assert not scene.cells.any()
    letters = [sum(len(text.text) for text in plan.page) for plan in pages(200)]
    assert np.mean(letters) > 15
    assert Counter("".join(t.text for plan in pages(400) for t in plan.page)).keys() == set(ALPHABET)


def test_texts_of_a_page_are_inside_and_apart() -> None:
    for plan in pages(100):
        for index, text in enumerate(plan.page):
            width, height = text.extent
            assert width / 2 <= min(text.x, 1 - text.x)
            assert height / 2 <= min(text.y, 1 - text.y)
            for other in plan.page[:index]:
                apart_x = abs(text.x - other.x) - (width + other.extent[0]) / 2
                apart_y = abs(text.y - other.y) - (height + other.extent[1]) / 2
                assert max(apart_x, apart_y) > 0


def test_pages_show_nothing_of_what_is_held_out() -> None:
    for plan in pages(300):
        assert plan.backdrop.photograph not in HELD_OUT_PHOTOGRAPHS
        for text in plan.page:
            assert text.font not in HELD_OUT_FONTS
            assert text.text.lower() not in HELD_OUT_WORDS
            assert not (text.text.isdigit() and held_out_number(int(text.text)))
    with pytest.raises(ValueError, match="for training"):
        make_scene(0, "held-out", family=PAGE)


def test_cells_that_texts_share_are_unknown_and_the_others_spell() -> None:
    first = Lettering("AB", "DejaVuSans", 0.1, 0.12, 0.06, 0.0, (0, 0, 0))
    letters = letters_on((first, first.placed(0.1, 0.12, 0.18), first.placed(0.1, 0.62, 0.62)))
    assert (letters[0, 0] == UNKNOWN).all()
    spelled = "".join(ALPHABET[index - 1] for index in letters[2, 2] if index > 0)
    assert spelled == "AB"
    assert (letters == UNKNOWN).sum() == LETTERS_PER_CELL


def test_invented_words_are_new_and_none_is_for_judging() -> None:
    dice = Dice(5)
    words = [invented_word(dice) for _ in range(2000)]
    assert all(3 <= len(word) <= 8 for word in words)
    assert not set(words) & set(HELD_OUT_WORDS)
    assert len(set(words) - set(TRAIN_WORDS)) > 1500
    shown = [characters(dice) for _ in range(2000)]
    assert not {text.lower() for text in shown} & set(HELD_OUT_WORDS)
    assert {len(text) for text in shown} == {2, 3, 4, 5, 6}


def test_judging_uses_real_words_only() -> None:
    dice = Dice(6)
    for held_out, words in ((True, HELD_OUT_WORDS), (False, TRAIN_WORDS)):
        for _ in range(500):
            text = choose_text(dice, held_out, invents=False)
            assert text.lower() in words or (text.isdigit() and held_out_number(int(text)) == held_out)
    for seed in range(300):
        sign = plan_scene(Dice(1, seed), True, "text").lettering
        assert sign is not None
        assert sign.slant == 0.0
        assert sign.text.isdigit() or sign.text.lower() in (*TRAIN_WORDS, *HELD_OUT_WORDS)


def test_slanted_text_leans_to_the_right_and_stays_where_it_is() -> None:
    upright = Lettering("I", "DejaVuSans", 0.5, 0.5, 0.5, 0.0, (0, 0, 0))
    leaning = Lettering("I", "DejaVuSans", 0.5, 0.5, 0.5, 0.0, (0, 0, 0), slant=0.3)
    middles = []
    for text in (upright, leaning):
        picture = Image.new("RGB", (200, 200), "white")
        draw_lettering(picture, text)
        rows, columns = np.nonzero(np.array(picture)[..., 0] < 128)
        top, bottom = columns[rows < 90].mean(), columns[rows > 110].mean()
        middles.append((top, bottom, columns.mean()))
    (top, bottom, middle), (leaning_top, leaning_bottom, leaning_middle) = middles
    assert abs(top - bottom) < 1
    assert leaning_top > top + 5
    assert leaning_bottom < bottom - 5
    assert abs(middle - leaning_middle) < 1.5
    assert centres(upright) == centres(leaning)
