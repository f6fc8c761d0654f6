"""Which colours can be told apart on which background."""

from __future__ import annotations

from nano.backdrops import Backdrop
from nano.dice import Dice
from nano.vocabulary import COLOURS, PAINTS, Rgb

BLACK: Rgb = (12, 12, 14)
WHITE: Rgb = (255, 255, 255)


def brightness(colour: Rgb) -> float:
    """Luma, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def distance(first: Rgb, second: Rgb) -> float:
    """Euclidean distance in RGB."""
    return float(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5)


def shaded(dice: Dice, colour: int) -> Rgb:
    """A shade of that colour, close enough to the paint to bear its name."""
    red, green, blue = (min(255, max(0, value + dice.whole(-12, 12))) for value in PAINTS[COLOURS[colour]])
    return red, green, blue


def visible(backdrop: Backdrop) -> list[int]:
    """Colours a shape can have there: not the background's name, and clearly another colour to the eye."""
    return [
        index
        for index, name in enumerate(COLOURS)
        if name != backdrop.name and all(distance(PAINTS[name], end) >= 95 for end in backdrop.ends)
    ]


def legible(ends: tuple[Rgb, ...], name: str = "") -> list[int]:
    """Colours in which text can be read on the colours `ends`, the background called `name` being another."""
    return [
        index
        for index, (colour, paint) in enumerate(PAINTS.items())
        if colour != name
        and all(distance(paint, end) >= 120 and abs(brightness(paint) - brightness(end)) >= 60 for end in ends)
    ]


def edge(colour: Rgb) -> Rgb:
    """Black or white, whichever stands out more from the colour."""
    return WHITE if brightness(colour) < 120 else BLACK
