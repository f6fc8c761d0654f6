"""Pages full of text: the encoder learns its letters from these.

A scene has one sign and a handful of letters, and half of the scenes none. A page has lines of words from edge to
edge, in all fonts, some seventy letters, so that as many pictures show ten times as many of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nano.backdrops import Backdrop
from nano.dice import Dice
from nano.lettering import Lettering, centres, dressed, letters_of, reach
from nano.texts import characters, choose_text
from nano.vocabulary import TRAIN_FONTS

SMALLEST, LARGEST = 0.09, 0.2  # size of text, as a part of the picture's side; most is small
LEADING = 1.25  # from line to line, in sizes of the text
WIDTH = 1.3  # of lines, at least, and the height that they fill: turned, they shall reach the corners, too
UNKNOWN = -1  # letters of a cell that several texts share: nobody could say in which order they come
OUTSIDE = -1  # instead of a text's number


@dataclass(frozen=True, slots=True)
class Page:
    """Lines as they are drawn, and their words, each where it is seen."""

    lines: tuple[Lettering, ...] = ()
    words: tuple[Lettering, ...] = ()


NO_PAGE = Page()


def plan_page(dice: Dice, backdrop: Backdrop) -> Page:
    """Lines of words at one angle, a font, size and colour for each line; all of the training split."""
    angle = dice.between(-20, 20) if dice.chance(0.7) else 0.0
    lines: list[Lettering] = []
    down = -WIDTH / 2
    while down < WIDTH / 2:
        size = SMALLEST + (LARGEST - SMALLEST) * dice.between(0, 1) ** 2
        lines.append(_plan_line(dice, backdrop, size, down + size * LEADING / 2, angle))
        down += size * LEADING
    return Page(tuple(lines), tuple(word for line in lines for word in _words(line)))


def _plan_line(dice: Dice, backdrop: Backdrop, size: float, down: float, angle: float) -> Lettering:
    font = dice.pick(TRAIN_FONTS)
    words: list[str] = []
    while reach(font, " ".join(words)) * size < WIDTH:
        words.append(characters(dice) if dice.chance(0.3) else choose_text(dice, held_out=False, invents=True))
    line = dressed(dice, backdrop, " ".join(words), font, invents=True).turned_to(angle)
    return line.placed(size, *_point(angle, dice.between(-0.1, 0.1), down))


def _point(angle: float, along: float, down: float) -> tuple[float, float]:
    """Where a point lies that is so far from the picture's middle, along lines and across them."""
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    return 0.5 + along * cosine + down * sine, 0.5 - along * sine + down * cosine


def _words(line: Lettering) -> list[Lettering]:
    """The words of which some part is inside the picture."""
    found, whole, end = [], reach(line.font, line.text), 0
    for text in line.text.split(" "):
        start, end = (end + 1 if end else 0), (end + 1 if end else 0) + len(text)
        middle = (reach(line.font, line.text[:start]) + reach(line.font, line.text[:end]) - whole) / 2 * line.size
        x, y = _point(line.angle, middle, 0.0)
        word = line.saying(text).placed(line.size, line.x + x - 0.5, line.y + y - 0.5)
        half = reach(line.font, text) * line.size / 2 + line.size
        if abs(word.x - 0.5) < 0.5 + half and abs(word.y - 0.5) < 0.5 + half:
            found.append(word)
    return found


def letters_on(texts: tuple[Lettering, ...]) -> np.ndarray:
    """As `lettering.letters_of`, with UNKNOWN for cells that hold characters of several texts or too many.

    Characters outside the picture make the nearest cell unknown, too: the edge cuts some that reach into it.
    """
    letters = letters_of(texts)
    owners: dict[tuple[int, int], list[int]] = {}
    for number, text in enumerate(texts):
        for x, y in centres(text):
            inside = 0 <= x < 1 and 0 <= y < 1
            cell = min(3, max(0, int(y * 4))), min(3, max(0, int(x * 4)))
            owners.setdefault(cell, []).append(number if inside else OUTSIDE)
    for cell, found in owners.items():
        if len(set(found)) > 1 or len(found) > letters.shape[-1] or OUTSIDE in found:
            letters[cell] = UNKNOWN
    return letters
