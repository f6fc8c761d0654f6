"""Pictures drawn at the asked size, so that text, edges and noise are as sharp as they come at every size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastvlm_convert.calibration.pictures import Maker

Colour = tuple[int, int, int]

WHITE, BLACK, INK = (255, 255, 255), (0, 0, 0), (24, 24, 32)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CYAN, MAGENTA, YELLOW = (0, 255, 255), (255, 0, 255), (255, 255, 0)
_TEXT = (
    "A picture is cut into patches and every patch becomes a token; the fewer there are, the sooner the first "
    "word of an answer can be read. INVOICE No. 48-2057: 12 bolts at 3.75, 8 hinges at 14.20, total 158.60 EUR. "
    "Departures 06:45 platform 9, 07:15 platform 11, 08:30 cancelled! Who wrote this (and why)? [Chapter 16] "
    "Jackdaws love my big sphinx of quartz; 0123456789 #$%&@ {x} = <y> / 2 + 7 * z, see page 341."
)


def page(height: int, width: int, first_word: int = 0) -> np.ndarray:
    """A page of dark text on white, headings to footnotes, from edge to edge.

    Args:
        height: in pixels.
        width: in pixels.
        first_word: where in the endless text the page begins.

    Returns:
        (H, W, 3) uint8.
    """
    canvas = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(canvas)
    margin = min(height, width) // 32
    top, word = margin, first_word
    for scale, lines in cycle(((2.0, 1), (1.0, 5), (0.7, 4), (1.0, 3), (1.4, 1))):
        font = _font(height, width, scale)
        for _ in range(lines):
            line, word = _line(word, font, width - 2 * margin)
            draw.text((margin, top), line, INK, font)
            top += round(font.size * 1.25)
        top += round(font.size * 0.5)
        if top >= height:
            break
    return np.array(canvas)


def _font(height: int, width: int, scale: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font, never too small to be read (in pixels)."""
    font = ImageFont.load_default(size=max(8, round(min(height, width) / 40 * scale)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _line(first: int, font: ImageFont.FreeTypeFont, width: int) -> tuple[str, int]:
    """As many words of the endless text as fit `width` pixels, at least one, and the number of the next."""
    words = _TEXT.split()
    line, number = words[first % len(words)], first + 1
    while font.getlength(longer := f"{line} {words[number % len(words)]}") <= width:
        line, number = longer, number + 1
    return line, number


def screen(height: int, width: int) -> np.ndarray:
    """A program's window in saturated colours: a title, a menu, bars, a pie, buttons, and small labels.

    Returns:
        (H, W, 3) uint8.
    """
    canvas = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(canvas)
    font, heading = _font(height, width, 1.0), _font(height, width, 1.6)

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        """From shares of the picture, so that it can be of any aspect, to pixels."""
        return left * width, top * height, right * width, bottom * height

    draw.rectangle(box(0, 0, 1, 0.1), BLUE)
    draw.text((0.03 * width, 0.03 * height), "Dashboard", WHITE, heading)
    draw.rectangle(box(0, 0.1, 0.25, 1), BLACK)
    for row, (label, colour) in enumerate(_entries(9)):
        top = 0.12 + 0.1 * row
        draw.ellipse(box(0.025, top, 0.075, top + 0.05), colour)
        draw.text((0.09 * width, (top + 0.01) * height), label, WHITE, font)
    for line in range(6):
        draw.line(box(0.3, 0.15 + 0.09 * line, 0.95, 0.15 + 0.09 * line), BLACK)
        draw.text((0.3 * width, (0.15 + 0.09 * line) * height), str(100 - 20 * line), BLACK, font)
    for i, (value, colour) in enumerate(_bars()):
        draw.rectangle(box(0.36 + 0.073 * i, 0.6 - 0.45 * value, 0.41 + 0.073 * i, 0.6), colour)
    for start, end, colour in ((0, 150, RED), (150, 260, YELLOW), (260, 360, MAGENTA)):
        draw.pieslice(box(0.3, 0.65, 0.6, 0.95), start, end, colour)
    for row, (label, colour) in enumerate(_entries(3)):
        top = 0.66 + 0.1 * row
        draw.rounded_rectangle(box(0.7, top, 0.95, top + 0.075), min(height, width) // 40, colour)
        draw.text((0.74 * width, (top + 0.02) * height), label, BLACK, font)
    return np.array(canvas)


def _entries(count: int) -> Iterator[tuple[str, Colour]]:
    labels = ("Sales", "Stock", "Orders", "Mail 12", "Alerts", "Maps", "Files", "Team", "Log out")
    return islice(zip(labels, cycle((GREEN, YELLOW, CYAN, MAGENTA, RED, WHITE)), strict=False), count)


def _bars() -> Iterator[tuple[float, Colour]]:
    values = (0.35, 0.8, 0.55, 1.0, 0.15, 0.7, 0.9, 0.45)
    return zip(values, cycle((RED, GREEN, BLUE, MAGENTA, CYAN)), strict=False)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """Uniform noise, every channel of every pixel by itself: (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noisy_page(height: int, width: int, seed: int) -> np.ndarray:
    """A page of other text, half covered by noise: (H, W, 3) uint8."""
    text, over = page(height, width, first_word=37), noise(height, width, seed)
    return np.asarray((text.astype(np.uint16) + over) // 2, np.uint8)


def extremes(height: int, width: int, seed: int) -> np.ndarray:
    """Nothing but the ends of the range, beside each other.

    From the top: checkerboards of black and white, from fine to coarse; noise, and checkerboards of
    complementary colours; the eight corners of the colour cube as flat blocks.

    Returns:
        (H, W, 3) uint8; every value is 0 or 255.
    """
    cells: list[list[Maker]] = [
        [_checks(WHITE, BLACK, period) for period in (1, 2, 4, 8, 16, 32)],
        [partial(_black_or_white, seed=seed), _checks(RED, CYAN, 1), _checks(BLUE, YELLOW, 8)],
        [_checks(colour, colour, 1) for colour in (RED, GREEN, BLUE, WHITE)],
        [_checks(colour, colour, 1) for colour in (CYAN, MAGENTA, YELLOW, BLACK)],
    ]
    canvas = np.empty((height, width, 3), np.uint8)
    rows = np.linspace(0, height, len(cells) + 1).astype(int)
    for row, top, bottom in zip(cells, rows, rows[1:], strict=False):
        columns = np.linspace(0, width, len(row) + 1).astype(int)
        for make, left, right in zip(row, columns, columns[1:], strict=False):
            canvas[top:bottom, left:right] = make(bottom - top, right - left)
    return canvas


def _checks(one: Colour, other: Colour, period: int) -> Maker:
    """A checkerboard with fields of `period` pixels; of one colour, a flat block."""

    def make(height: int, width: int) -> np.ndarray:
        y, x = np.indices((height, width)) // period
        return np.where(((x + y) % 2)[..., None], np.array(one), np.array(other))

    return make


def _black_or_white(height: int, width: int, seed: int) -> np.ndarray:
    """Noise of 0 and 255 per channel: it drove the first stages of seeded weights further than checkerboards did."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3)) * 255
