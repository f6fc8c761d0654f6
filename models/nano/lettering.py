"""Rendered text: signs with a word or a number, and the small labels of charts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nano.backdrops import Backdrop
from nano.dice import Dice
from nano.paint import edge, legible, shaded
from nano.texts import choose_text
from nano.vocabulary import (
    ALPHABET,
    COLOURS,
    HELD_OUT_FONTS,
    LETTERS_PER_CELL,
    SHADES,
    TRAIN_FONTS,
    Rgb,
)

MEASURE = 200  # size at which a font's proportions are taken, so that the plan is the same for every side
SMALLEST, LARGEST = 0.11, 0.34  # size of text, as a part of the picture's side
PLATE = 0.22  # how far a plate reaches beyond the text, in sizes of the text
SLANTED, SLANT = 0.5, (-0.08, 0.32)  # of the texts in training, and by how much: fonts differ in it, above all


@dataclass(frozen=True, slots=True)
class Lettering:
    """A line of text; lengths are parts of the picture's side.

    Attributes:
        text: characters of ALPHABET.
        font: name of the file, without ".ttf".
        size: of the font.
        x: of the text's centre.
        y: of the text's centre.
        angle: anticlockwise, in degrees.
        rgb: its shade.
        colour: index into COLOURS; -1 for labels, whose colour nobody asks for.
        plate: shade of the rectangle behind it.
        plate_name: its colour, "" without one.
        rim: shade of the edge around each character.
        slant: how far the text's top is pushed along the line, in heights.
    """

    text: str
    font: str
    size: float
    x: float
    y: float
    angle: float
    rgb: Rgb
    colour: int = -1
    plate: Rgb | None = None
    plate_name: str = ""
    rim: Rgb | None = None
    slant: float = 0.0

    @property
    def is_number(self) -> bool:
        """Whether a number is written, not a word."""
        return self.text.isdigit()

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height of the upright rectangle that it fills, with its plate."""
        wide, high = outline(self)
        return wide * self.size, high * self.size

    def placed(self, size: float, x: float, y: float) -> Lettering:
        """The same text there."""
        return replace(self, size=size, x=x, y=y)

    def turned_to(self, angle: float) -> Lettering:
        """The same text at another angle."""
        return replace(self, angle=angle)

    def saying(self, text: str) -> Lettering:
        """Another text in the same dress."""
        return replace(self, text=text)

    def seen_from(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far points lie from its centre: along the line of text, and across it, downwards."""
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        right, down = x - self.x, y - self.y
        return right * cosine - down * sine, right * sine + down * cosine


def turned(width: float, height: float, angle: float) -> tuple[float, float]:
    """Size of the upright rectangle around one turned by `angle` degrees."""
    sine, cosine = abs(math.sin(math.radians(angle))), math.cos(math.radians(angle))
    return width * cosine + height * sine, width * sine + height * cosine


def outline(lettering: Lettering) -> tuple[float, float]:
    """Width and height of the upright rectangle around it and its plate, in sizes of the font."""
    width, height = proportions(lettering.font, lettering.text)
    margin = 2 * PLATE if lettering.plate else 0.08
    return turned(width + abs(lettering.slant) * height + margin, height + margin, lettering.angle)


@lru_cache(maxsize=2048)
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    # The basic layout is in every build of Pillow; the other one would place characters a little differently.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def proportions(font: str, text: str) -> tuple[float, float]:
    """Width and height of the ink, in sizes of the font."""
    left, top, right, bottom = _font(font, MEASURE).getbbox(text)
    return (right - left) / MEASURE, (bottom - top) / MEASURE


@lru_cache(maxsize=4096)
def reach(font: str, text: str) -> float:
    """How far the pen goes, in sizes of the font."""
    return _font(font, MEASURE).getlength(text) / MEASURE


@cache
def _advance(font: str, character: str) -> float:
    return _font(font, MEASURE).getlength(character)


def centres(lettering: Lettering) -> list[tuple[float, float]]:
    """Where the middle of each character lies: x and y as parts of the picture's side."""
    advances = np.array([_advance(lettering.font, character) for character in lettering.text])
    along = (np.cumsum(advances) - advances / 2 - advances.sum() / 2) / MEASURE * lettering.size
    angle = math.radians(lettering.angle)
    xs, ys = lettering.x + along * math.cos(angle), lettering.y - along * math.sin(angle)
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]


def edges(lettering: Lettering) -> np.ndarray:
    """Where characters begin and the last one ends, along the line from the text's centre, as parts of the side."""
    ends = np.cumsum([0.0, *(_advance(lettering.font, character) for character in lettering.text)])
    return np.asarray((ends - ends[-1] / 2) / MEASURE * lettering.size)


def letters_of(letterings: tuple[Lettering, ...]) -> np.ndarray:
    """Which cell of the 4 x 4 grid holds the centres of which characters.

    Texts come from left to right, then from top to bottom; what a cell has no room for is left out.

    Returns:
        (4, 4, LETTERS_PER_CELL) int64: index into ALPHABET + 1, then zeros.
    """
    letters = np.zeros((4, 4, LETTERS_PER_CELL), np.int64)
    filled = np.zeros((4, 4), np.int64)
    for lettering in sorted(letterings, key=lambda text: (text.x, text.y)):
        for character, (x, y) in zip(lettering.text, centres(lettering), strict=True):
            cell = min(3, max(0, int(y * 4))), min(3, max(0, int(x * 4)))
            if filled[cell] < LETTERS_PER_CELL:
                letters[cell][filled[cell]] = ALPHABET.index(character) + 1
                filled[cell] += 1
    return letters


def inks_of(letterings: tuple[Lettering, ...]) -> np.ndarray:
    """The colour of the characters whose centres lie in each cell of the 4 x 4 grid.

    Returns:
        (4, 4) int64: index into COLOURS + 1; 0 for none; -1 where texts of several colours or of one that nobody
        asks for have theirs.
    """
    inks = np.zeros((4, 4), np.int64)
    for lettering in letterings:
        known = lettering.colour + 1 or -1
        for x, y in centres(lettering):
            cell = min(3, max(0, int(y * 4))), min(3, max(0, int(x * 4)))
            inks[cell] = known if inks[cell] in (0, known) else -1
    return inks


def _ink(dice: Dice, backdrop: Backdrop) -> tuple[int, Rgb | None, str, Rgb | None]:
    """Colour of the text, its plate's shade and name, its rim's shade: plate or rim wherever it needs one."""
    if dice.chance(0.5 if backdrop.photograph else 0.15):
        name = dice.pick([shade for shade in SHADES if shade != backdrop.name])
        plate = SHADES[name][dice.whole(0, 1)]
        return dice.pick(legible((plate,), name)), plate, name, None
    colour = dice.pick(legible(backdrop.ends, backdrop.name))
    return colour, None, "", edge(shaded(dice, colour)) if backdrop.photograph else None


def dressed(dice: Dice, backdrop: Backdrop, text: str, font: str, invents: bool) -> Lettering:
    """A text in legible colours and at some angle, still without a size and a place.

    Args:
        dice: the scene's.
        backdrop: what it stands on.
        text: what it says.
        font: name of the file, without ".ttf".
        invents: SLANTED of the texts lean, as in training.
    """
    colour, plate, plate_name, rim = _ink(dice, backdrop)
    angle = dice.between(-20, 20) if dice.chance(0.7) else 0.0
    slant = dice.between(*SLANT) if invents and dice.chance(SLANTED) else 0.0
    return Lettering(text, font, 0.0, 0.5, 0.5, angle, shaded(dice, colour), colour, plate, plate_name, rim, slant)


def plan_lettering(
    dice: Dice, backdrop: Backdrop, new_text: bool, new_font: bool, leave_room: bool, invents: bool
) -> Lettering:
    """A sign.

    Args:
        dice: the scene's.
        backdrop: what it stands on.
        new_text: a word or number of the held-out split.
        new_font: a font of the held-out split.
        leave_room: keep it low enough for a shape above or below it.
        invents: words may be made up and fonts slanted, as in training.
    """
    text, font = choose_text(dice, new_text, invents), dice.pick(HELD_OUT_FONTS if new_font else TRAIN_FONTS)
    lettering = dressed(dice, backdrop, text, font, invents)
    wide, high = outline(lettering)
    most = min(LARGEST, 0.96 / wide, (0.52 if leave_room else 0.96) / high)
    size = dice.between(min(SMALLEST, most), most)
    # Centres prefer the three rows and columns, or a position could rarely be asked for.
    x, y = (dice.pick((1 / 6, 0.5, 5 / 6)) + dice.between(-0.09, 0.09) for _ in range(2))
    half_width, half_height = wide * size / 2 + 0.02, high * size / 2 + 0.02
    x, y = min(1 - half_width, max(half_width, x)), min(1 - half_height, max(half_height, y))
    return lettering.placed(size, x, y)


def colour_name(lettering: Lettering) -> str:
    """Such as "red"."""
    return COLOURS[lettering.colour]


def draw_lettering(picture: Image.Image, lettering: Lettering) -> None:
    """Write it onto the picture, its ink centred."""
    side = picture.width
    for rgb, mask in _layers(lettering, side):
        if lettering.slant:
            lean = lettering.slant
            mask = mask.transform(
                mask.size, Image.Transform.AFFINE, (1, lean, -lean * mask.height / 2, 0, 1, 0), Image.Resampling.BICUBIC
            )
        if lettering.angle:
            mask = mask.rotate(lettering.angle, Image.Resampling.BICUBIC, expand=True)
        corner = round(lettering.x * side - mask.width / 2), round(lettering.y * side - mask.height / 2)
        picture.paste(rgb, corner, mask)


def _layers(lettering: Lettering, side: int) -> list[tuple[Rgb, Image.Image]]:
    """Plate, rim and text: shades and masks of one size, from the back to the front."""
    font = _font(lettering.font, max(6, round(lettering.size * side)))
    border = max(1, round(0.006 * side)) if lettering.rim else 0
    left, top, right, bottom = font.getbbox(lettering.text, stroke_width=border)
    margin = math.ceil(PLATE * lettering.size * side) if lettering.plate else 1
    lean = math.ceil(abs(lettering.slant) * (bottom - top) / 2)
    size = math.ceil(right - left) + 2 * (margin + lean), math.ceil(bottom - top) + 2 * margin
    start = margin + lean - left, margin - top
    ink = Image.new("L", size)
    ImageDraw.Draw(ink).text(start, lettering.text, 255, font)
    layers = [(lettering.rgb, ink)]
    if lettering.rim:
        around = Image.new("L", size)
        ImageDraw.Draw(around).text(start, lettering.text, 255, font, stroke_width=border)
        layers.insert(0, (lettering.rim, around))
    if lettering.plate:
        layers.insert(0, (lettering.plate, Image.new("L", size, 255)))
    return layers
