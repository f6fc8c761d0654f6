"""Coloured shapes, each clearly inside one ninth of the picture, so that "top left" is beyond doubt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from nano.backdrops import Backdrop
from nano.dice import Dice
from nano.paint import edge, shaded, visible
from nano.vocabulary import COLOURS, HELD_OUT_PAIRS, NINTHS, SHAPES, Rgb

FINER = 4  # shapes are drawn this much larger, then reduced
LARGEST = 0.14  # radius; with the smallest shift it still ends inside its ninth


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in the picture; lengths are parts of its side.

    Attributes:
        shape: index into SHAPES.
        colour: index into COLOURS.
        ninth: index into NINTHS.
        x: of its centre.
        y: of its centre.
        radius: half the side of the square that it fits in.
        turn: clockwise, in radians.
        rgb: its shade.
        outlined: whether it has a thin black or white edge.
    """

    shape: int
    colour: int
    ninth: int
    x: float
    y: float
    radius: float
    turn: float
    rgb: Rgb
    outlined: bool

    @property
    def row(self) -> int:
        """0 top, 1 middle, 2 bottom."""
        return self.ninth // 3

    @property
    def column(self) -> int:
        """0 left, 1 middle, 2 right."""
        return self.ninth % 3

    @property
    def pair(self) -> tuple[int, int]:
        """Shape and colour."""
        return self.shape, self.colour

    @property
    def name(self) -> str:
        """Such as "red circle"."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


def _shift(dice: Dice, third: int, most: float) -> float:
    """Centre on one axis. The middle third avoids 0.5, the border of two of the 4 x 4 cells."""
    shift = dice.between(0.015, most) * dice.pick((-1, 1)) if third == 1 else dice.between(-most, most)
    return (third + 0.5) / 3 + shift


def place(dice: Dice, pair: tuple[int, int], ninth: int, backdrop: Backdrop, radius: float) -> Thing:
    """Put a shape into a ninth.

    Args:
        dice: the scene's.
        pair: shape and colour.
        ninth: index into NINTHS.
        backdrop: what it lies on; on a photograph every shape is outlined.
        radius: at most LARGEST.
    """
    most = min(0.08, 0.165 - radius)  # 0.08: left and right thirds never reach the middle cells
    steady = SHAPES[pair[0]] in ("square", "diamond")  # which differ by how they are turned
    turn = dice.between(-0.14, 0.14) if steady else dice.between(-0.3, 0.3)
    outlined = bool(backdrop.photograph) or dice.chance(0.12)
    x, y = _shift(dice, ninth % 3, most), _shift(dice, ninth // 3, most)
    return Thing(*pair, ninth, x, y, radius, turn, shaded(dice, pair[1]), outlined)


def _pairs(dice: Dice, count: int, colours: list[int], allowed: frozenset[tuple[int, int]]) -> list[tuple[int, int]]:
    """Shapes and colours. Often several share one of the two, or counting would always give one."""
    alike = dice.pick(("", "", "shape", "shape", "colour"))
    repeated = dice.whole(2, max(2, count)) if alike else 0
    shape, colour = dice.whole(0, len(SHAPES) - 1), dice.pick(colours)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        pair = (dice.whole(0, len(SHAPES) - 1), dice.pick(colours))
        if len(pairs) < repeated:
            pair = (shape, pair[1]) if alike == "shape" else (pair[0], colour)
        if pair in allowed:
            pairs.append(pair)
    return dice.shuffled(pairs)


ALL_PAIRS = frozenset((shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS)))
TRAIN_PAIRS = ALL_PAIRS - HELD_OUT_PAIRS


def plan_things(dice: Dice, backdrop: Backdrop, held_out: bool) -> tuple[Thing, ...]:
    """One to five shapes.

    Args:
        dice: the scene's.
        backdrop: what they lie on.
        held_out: at least one has a shape and colour that never go together in training; otherwise none has.
    """
    colours = visible(backdrop)
    pairs = _pairs(dice, dice.whole(1, 5), colours, ALL_PAIRS if held_out else TRAIN_PAIRS)
    if held_out and not HELD_OUT_PAIRS.intersection(pairs):
        pairs[0] = dice.pick(sorted(pair for pair in HELD_OUT_PAIRS if pair[1] in colours))
    ninths = dice.shuffled(range(len(NINTHS)))
    return tuple(
        place(dice, pair, ninth, backdrop, dice.between(0.062, LARGEST))
        for pair, ninth in zip(pairs, ninths, strict=False)
    )


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners inside the circle of radius 1, y downwards."""
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if shape == "triangle":
        return [(0.0, -0.98), (0.94, 0.76), (-0.94, 0.76)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)]
    if shape == "star":
        angles = [(math.pi * step / 5, 1.0 if step % 2 == 0 else 0.42) for step in range(10)]
        return [(math.sin(angle) * radius, -math.cos(angle) * radius) for angle, radius in angles]
    if shape == "cross":
        a, b = 0.3, 0.95
        arm = [(-a, -a), (-a, -b), (a, -b)]  # one of four, each a quarter turn further
        arms = [arm]
        for _ in range(3):
            arms.append([(-y, x) for x, y in arms[-1]])
        return [corner for arm in arms for corner in arm]
    if shape == "heart":
        curve = [2 * math.pi * step / 40 for step in range(40)]
        ripple = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in curve]
        return [(math.sin(t) ** 3 * 0.98, -(height + 2.5) / 16) for t, height in zip(curve, ripple, strict=True)]
    return []


POLYGONS = {shape: np.array(_polygon(shape), dtype=np.float64).reshape(-1, 2) for shape in SHAPES}


def _mask(thing: Thing, x: float, y: float, radius: float, size: int) -> Image.Image:
    """Its form as a (size, size) mask; centre and radius in pixels of the mask."""
    mask = Image.new("L", (size * FINER, size * FINER))
    draw = ImageDraw.Draw(mask)
    x, y, radius = x * FINER, y * FINER, radius * FINER
    points = POLYGONS[SHAPES[thing.shape]]
    if len(points):
        sine, cosine = math.sin(thing.turn), math.cos(thing.turn)
        turned = points @ np.array([[cosine, sine], [-sine, cosine]]) * radius + (x, y)
        draw.polygon([(float(a), float(b)) for a, b in turned], fill=255)
    else:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask.reduce(FINER)


def _form(thing: Thing, x: float, y: float, radius: float, hole: float, size: int) -> Image.Image:
    """Its mask; a ring is a disc without its hole, whose radius is given too."""
    mask = _mask(thing, x, y, radius, size)
    if SHAPES[thing.shape] == "ring":
        mask.paste(0, (0, 0), _mask(thing, x, y, hole, size))
    return mask


def draw_thing(picture: Image.Image, thing: Thing) -> None:
    """Paint it onto the picture."""
    side = picture.width
    x, y, radius = thing.x * side, thing.y * side, thing.radius * side
    border = 0.008 * side if thing.outlined else 0.0
    left, top, size = math.floor(x - radius) - 2, math.floor(y - radius) - 2, math.ceil(2 * radius) + 5
    hole = 0.52 * radius
    x, y = x - left, y - top
    if border:
        picture.paste(edge(thing.rgb), (left, top), _form(thing, x, y, radius, hole - border, size))
    picture.paste(thing.rgb, (left, top), _form(thing, x, y, radius - border, hole, size))


def cells_of(things: tuple[Thing, ...]) -> np.ndarray:
    """Which cell of the 4 x 4 grid holds the centre of what.

    Returns:
        (4, 4, 3) int64: row, column; shape + 1, colour + 1 and ninth + 1, or zeros.
    """
    cells = np.zeros((4, 4, 3), np.int64)
    for thing in things:
        cells[int(thing.y * 4), int(thing.x * 4)] = thing.shape + 1, thing.colour + 1, thing.ninth + 1
    return cells
