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
        assert (scene.dense[..., 2] > 0).sum() > 60
    shown = Counter("".join(word.text for plan in pages(200) for word in plan.page.words))
    assert shown.keys() == set(ALPHABET)


def test_words_lie_where_their_line_has_them() -> None:
    for plan in pages(30):
        for line in plan.page.lines:
            spots = dict(zip(range(len(line.text)), centres(line), strict=True))
            for word in plan.page.words:
                if word.font != line.font or word.size != line.size or word.text not in line.text.split():
                    continue
                start = f" {line.text} ".index(f" {word.text} ")
                x, y = centres(word)[0]
                # kerning moves what is far from the line's middle a little
                assert abs(spots[start][0] - x) < 0.03
                assert abs(spots[start][1] - y) < 0.03


def test_pages_show_nothing_of_what_is_held_out() -> None:
    for plan in pages(300):
        assert plan.backdrop.photograph not in HELD_OUT_PHOTOGRAPHS
        for text in plan.page.words:
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
    assert (letters_on((first.placed(0.1, 0.99, 0.5),))[2, 3] == UNKNOWN).all(), "the edge cuts it"


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
