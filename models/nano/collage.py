"""Photographs that training has never enough of: each is turned and recoloured, and pieces of others lie on it.

Three photographs teach the encoder three photographs. On those that it was never shown it took what is round and
smooth for a shape: it counted 68 % of the held-out ones right, where on plain grounds it was 96 %. So the pieces are
what a drawn shape isn't but looks like from afar: rounded, shaded, sometimes one within another, and never asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from nano.dice import Dice

MOST = 5  # pieces
CORNERS = 48  # of a piece's outline
LARGEST_CROP = 0.6  # of a photograph's shorter side; the smallest show little but a shade
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))  # of red, green and blue
Crop = tuple[float, float, float]
Photograph = Callable[[str, bool], Image.Image]  # its name, and whether it is mirrored


@dataclass(frozen=True, slots=True)
class Look:
    """What becomes of a photograph.

    Attributes:
        quarters: turns of 90 degrees.
        order: which channel each of red, green and blue comes from.
        gains: factors of them.
        inverted: whether dark is light.
    """

    quarters: int = 0
    order: tuple[int, int, int] = (0, 1, 2)
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    inverted: bool = False

    def of(self, picture: Image.Image) -> Image.Image:
        """The photograph, turned and in other colours."""
        if self.quarters:
            picture = picture.transpose(Image.Transpose(Image.Transpose.ROTATE_90 + self.quarters - 1))
        bands = picture.split()
        picture = Image.merge("RGB", [bands[band] for band in self.order])
        levels = [255 - level if self.inverted else level for level in range(256)]
        return picture.point([min(255, round(level * gain)) for gain in self.gains for level in levels])


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a photograph that lies on another; lengths are parts of the picture's side.

    Attributes:
        photograph: its name.
        mirrored: whether it is.
        look: what became of it.
        crop: left, top and size as parts of what is free and of the shorter side.
        x: of its centre.
        y: of its centre.
        width: half of it.
        height: half of it.
        angle: anticlockwise, in degrees.
        waves: how far the outline goes out and in, in parts of its radius, and where, in radians: two, three ... times
            around. Without any it is an ellipse.
        blur: of its edge.
    """

    photograph: str
    mirrored: bool
    look: Look
    crop: Crop
    x: float
    y: float
    width: float
    height: float
    angle: float
    waves: tuple[tuple[float, float], ...]
    blur: float


PLAIN = Look()


def plan_look(dice: Dice) -> Look:
    """Any turn; half of the photographs keep their colours, but for a tint."""
    order = dice.pick(ORDERS) if dice.chance(0.5) else ORDERS[0]
    red, green, blue = (dice.between(0.75, 1.25) for _ in range(3))
    return Look(dice.whole(0, 3), order, (red, green, blue), dice.chance(0.2))


def plan_pieces(dice: Dice, photographs: Sequence[str]) -> tuple[Piece, ...]:
    """None on a third of the photographs, else up to MOST, some with a smaller one in the middle."""
    pieces: list[Piece] = []
    count = dice.whole(1, MOST) if dice.chance(0.67) else 0
    while len(pieces) < count:
        piece = _plan_piece(dice, photographs)
        pieces.append(piece)
        if dice.chance(0.35):
            pieces.append(_plan_inner(dice, photographs, piece))
    return tuple(pieces)


def _plan_piece(dice: Dice, photographs: Sequence[str]) -> Piece:
    wide = dice.between(0.05, 0.3)
    high = wide * (dice.between(0.85, 1.0) if dice.chance(0.4) else dice.between(0.3, 1.0))
    waves: tuple[tuple[float, float], ...] = ()
    if dice.chance(0.5):
        waves = tuple((dice.between(0, 0.3 / time), dice.between(0, 2 * math.pi)) for time in range(2, 6))
    return Piece(
        dice.pick(photographs),
        dice.chance(0.5),
        plan_look(dice),
        (dice.between(0, 1), dice.between(0, 1), LARGEST_CROP * dice.between(0.15, 1.0) ** 2),
        dice.between(0, 1),
        dice.between(0, 1),
        wide,
        high,
        dice.between(0, 180),
        waves,
        dice.pick((0.0, 0.003, 0.01)),
    )


def _plan_inner(dice: Dice, photographs: Sequence[str], outer: Piece) -> Piece:
    """Another in the middle of a piece, as coffee is in a cup."""
    part, inner = dice.between(0.45, 0.9), _plan_piece(dice, photographs)
    return Piece(
        inner.photograph,
        inner.mirrored,
        inner.look,
        inner.crop,
        outer.x,
        outer.y,
        outer.width * part,
        outer.height * part,
        outer.angle,
        outer.waves,
        inner.blur,
    )


def paste(picture: Image.Image, piece: Piece, photograph: Photograph) -> None:
    """Put a piece onto a picture.

    Args:
        picture: drawn on.
        piece: what.
        photograph: gives the photographs.
    """
    side = picture.width
    around = np.arange(CORNERS) * 2 * np.pi / CORNERS
    reach = np.ones(CORNERS)
    for times, (depth, phase) in enumerate(piece.waves, start=2):
        reach += depth * np.sin(times * around + phase)
    along, across = piece.width * side * reach * np.cos(around), piece.height * side * reach * np.sin(around)
    sine, cosine = math.sin(math.radians(piece.angle)), math.cos(math.radians(piece.angle))
    xs, ys = along * cosine + across * sine, across * cosine - along * sine
    margin = math.ceil(3 * piece.blur * side) + 1
    half = math.ceil(max(np.abs(xs).max(), np.abs(ys).max())) + margin
    mask = Image.new("L", (2 * half, 2 * half))
    ImageDraw.Draw(mask).polygon([(float(x) + half, float(y) + half) for x, y in zip(xs, ys, strict=True)], fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(max(0.7, piece.blur * side)))
    source = photograph(piece.photograph, piece.mirrored)
    filling = piece.look.of(cropped(source, piece.crop, 2 * half))
    picture.paste(filling, (round(piece.x * side) - half, round(piece.y * side) - half), mask)


def cropped(picture: Image.Image, crop: Crop, side: int) -> Image.Image:
    """A square part of a photograph.

    Args:
        picture: the photograph.
        crop: left, top and size as parts of what is free and of the shorter side.
        side: of the result, in pixels.
    """
    size = crop[2] * min(picture.size)
    left, top = crop[0] * (picture.width - size), crop[1] * (picture.height - size)
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + size, top + size))
