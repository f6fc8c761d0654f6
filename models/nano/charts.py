"""Bar charts whose values can be read: a number over every bar, or an axis whose lines the bars end at."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from nano.backdrops import Backdrop, mixed
from nano.dice import Dice
from nano.lettering import Lettering, draw_lettering
from nano.paint import BLACK, WHITE, brightness, shaded, visible
from nano.vocabulary import COLOURS, HELD_OUT_FONTS, TRAIN_FONTS, Rgb

UPRIGHT = tuple(name for name in TRAIN_FONTS if "Italic" not in name and "Oblique" not in name)
TOP, FLOOR = 0.13, 0.94  # where the highest bar may end and where all begin
STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar; lengths are parts of the picture's side.

    Attributes:
        colour: index into COLOURS.
        value: what the chart says.
        left: its left edge.
        right: its right edge.
        top: its upper end; the lower end is FLOOR.
        rgb: its shade.
    """

    colour: int
    value: int
    left: float
    right: float
    top: float
    rgb: Rgb

    @property
    def name(self) -> str:
        """Its colour."""
        return COLOURS[self.colour]


@dataclass(frozen=True, slots=True)
class Chart:
    """A bar chart.

    Attributes:
        bars: from left to right.
        labels: the numbers in it.
        lines: heights of the axis' lines; none where every bar has its number.
        ink: of axis and labels.
        faint: of the lines across.
    """

    bars: tuple[Bar, ...]
    labels: tuple[Lettering, ...]
    lines: tuple[float, ...]
    ink: Rgb
    faint: Rgb


def _values(dice: Dice, count: int, highest: int, apart: int) -> list[int]:
    """Different values, at least `apart` from each other."""
    while True:
        values = [dice.whole(1, highest) for _ in range(count)]
        ordered = sorted(values)
        if all(b - a >= apart for a, b in pairwise(ordered)):
            return values


def plan_chart(dice: Dice, backdrop: Backdrop, new_font: bool) -> Chart:
    """Two to four bars of different colours and heights.

    Their values are any numbers in both splits: only signs keep some for the held-out one (`held_out_number`).

    Args:
        dice: the scene's.
        backdrop: a plain colour or a gradient.
        new_font: labels in a font of the held-out split.
    """
    count = dice.whole(2, 4)
    colours = dice.shuffled(visible(backdrop))[:count]
    font, size = dice.pick(HELD_OUT_FONTS if new_font else UPRIGHT), dice.between(0.085, 0.115)
    ink = BLACK if min(brightness(end) for end in backdrop.ends) > 115 else WHITE
    axis = dice.chance(0.45)
    levels = dice.whole(max(3, count), 6)
    step = dice.pick(STEPS) if axis else 1
    highest = levels if axis else dice.pick((12, 30, 99))
    values = _values(dice, count, highest, 1 if axis else max(1, highest // 12))
    scale = (FLOOR - TOP) / (highest if axis else max(values))
    begin, pitch = (0.2, 0.76 / count) if axis else (0.05, 0.9 / count)
    part = dice.between(0.55, 0.8)
    bars = tuple(
        Bar(
            colour,
            value * step,
            begin + pitch * (index + (1 - part) / 2),
            begin + pitch * (index + (1 + part) / 2),
            FLOOR - value * scale,
            shaded(dice, colour),
        )
        for index, (colour, value) in enumerate(zip(colours, values, strict=True))
    )
    lines: tuple[float, ...] = ()
    if axis:
        lines = tuple(FLOOR - level * scale for level in range(levels + 1))
        marks = [(str(level * step), 0.1, height) for level, height in enumerate(lines)]
    else:
        marks = [(str(bar.value), (bar.left + bar.right) / 2, bar.top - 0.055) for bar in bars]
    labels = tuple(Lettering(text, font, size, x, y, 0.0, ink) for text, x, y in marks)
    return Chart(bars, labels, lines, ink, mixed(ink, backdrop.start, 0.6))


def draw_chart(picture: Image.Image, chart: Chart) -> None:
    """Paint it onto the picture."""
    side = picture.width
    draw = ImageDraw.Draw(picture)
    thick = max(1, round(side / 128))
    for height in chart.lines:
        draw.line((0.17 * side, height * side, 0.97 * side, height * side), chart.faint, max(1, thick // 2))
    for bar in chart.bars:
        draw.rectangle((bar.left * side, bar.top * side, bar.right * side, FLOOR * side), bar.rgb)
    begin = 0.18 if chart.lines else 0.04
    draw.line((begin * side, FLOOR * side, 0.97 * side, FLOOR * side), chart.ink, thick)
    if chart.lines:
        draw.line((begin * side, (TOP - 0.03) * side, begin * side, FLOOR * side), chart.ink, thick)
    for label in chart.labels:
        draw_lettering(picture, label)
