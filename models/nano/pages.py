"""Pages full of text: the encoder learns its letters from these.

A scene has one sign and a handful of letters, and half of the scenes none. A page has some twenty, in all fonts
and at all angles.
"""

from __future__ import annotations

import numpy as np

from nano.backdrops import Backdrop
from nano.dice import Dice
from nano.lettering import Lettering, centres, dressed, letters_of, outline
from nano.texts import characters, choose_text
from nano.vocabulary import TRAIN_FONTS

TRIES, MOST = 20, 12  # places that are tried, and texts of a page
SMALLEST, LARGEST = 0.1, 0.2  # size of text, as a part of the picture's side
UNKNOWN = -1  # letters of a cell that several texts share: nobody could say in which order they come


def plan_page(dice: Dice, backdrop: Backdrop) -> tuple[Lettering, ...]:
    """Texts that don't touch each other, of the training split."""
    texts: list[Lettering] = []
    for _ in range(TRIES):
        text = _plan_text(dice, backdrop)
        if text and not any(_touch(text, other) for other in texts):
            texts.append(text)
            if len(texts) == MOST:
                break
    return tuple(texts)


def _plan_text(dice: Dice, backdrop: Backdrop) -> Lettering | None:
    """A text somewhere; None if it is too long for its size."""
    text = characters(dice) if dice.chance(0.3) else choose_text(dice, held_out=False, invents=True)
    lettering = dressed(dice, backdrop, text, dice.pick(TRAIN_FONTS), invents=True)
    size = dice.between(SMALLEST, LARGEST)
    wide, high = outline(lettering)
    half_width, half_height = wide * size / 2 + 0.01, high * size / 2 + 0.01
    if max(half_width, half_height) >= 0.5:
        return None
    x, y = dice.between(half_width, 1 - half_width), dice.between(half_height, 1 - half_height)
    return lettering.placed(size, x, y)


def _touch(first: Lettering, second: Lettering) -> bool:
    (width, height), (other_width, other_height) = first.extent, second.extent
    beside = abs(first.x - second.x) > (width + other_width) / 2
    return not beside and abs(first.y - second.y) <= (height + other_height) / 2


def letters_on(texts: tuple[Lettering, ...]) -> np.ndarray:
    """As `lettering.letters_of`, with UNKNOWN for cells that hold characters of several texts, or too many."""
    letters = letters_of(texts)
    owners: dict[tuple[int, int], list[int]] = {}
    for number, text in enumerate(texts):
        for x, y in centres(text):
            owners.setdefault((min(3, max(0, int(y * 4))), min(3, max(0, int(x * 4)))), []).append(number)
    for cell, found in owners.items():
        if len(set(found)) > 1 or len(found) > letters.shape[-1]:
            letters[cell] = UNKNOWN
    return letters
