"""Colours for a light and a dark page, sizes, and how numbers are written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BODY, SMALL, TITLE = 10.0, 9.0, 13.0  # points; a figure is 8 inches wide, so that 9 points are 12.5 px at 800 px
WIDTH = 8.0  # inches
DPI = 200  # 1600 px
_MOST_MS = 10_000  # from here on in seconds


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours on a page.

    Text is at least 4.5:1 against the page, marks 3:1 (WCAG 2.1, 1.4.3 and 1.4.11); the grid says nothing by itself.
    Stages that can lie side by side differ for everyone: at least 0.12 in OKLab, without red-, green- or
    blue-sensitive cones too.

    Attributes:
        suffix: of the files' names.
        page: GitHub's.
        ink, muted: text; whiskers and roofs are ink, too.
        grid: lines behind the marks.
        stages: by name.
        series: for one model after the other; the markers' shapes differ as well.
    """

    suffix: str
    page: str
    ink: str
    muted: str
    grid: str
    stages: dict[str, str]
    series: tuple[str, ...]


LIGHT = Palette(
    suffix="",
    page="#ffffff",
    ink="#1f2328",
    muted="#59636e",
    grid="#d8dee4",
    stages={
        "preprocess": "#909193",
        "tokenize": "#796b03",
        "vision": "#2e6dd2",
        "projector": "#a72e80",
        "prefill": "#e96e26",
        "first_token": "#15161c",
        "decode": "#07664a",
    },
    series=("#1846a1", "#d14a04", "#048b77", "#d962d1", "#111428", "#5b4a03"),
)
DARK = Palette(
    suffix="-dark",
    page="#0d1117",
    ink="#e6edf3",
    muted="#9198a1",
    grid="#2a313a",
    stages={
        "preprocess": "#727273",
        "tokenize": "#ebe249",
        "vision": "#4385de",
        "projector": "#e69bd0",
        "prefill": "#f07b0b",
        "first_token": "#f4f5f6",
        "decode": "#83e6a8",
    },
    series=("#448fe5", "#fea32e", "#76ddc2", "#d2548a", "#f2f4f6", "#fedc4f"),
)
PALETTES = (LIGHT, DARK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")

_RC = {
    # DejaVu Sans comes with matplotlib, so that a figure is the same everywhere; Verdana is as wide, for a browser.
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": BODY,
    "text.parse_math": False,  # a model's name may have a $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastvlm-bench",  # the same figure gets the same bytes
    "path.simplify": False,
}


@contextmanager
def applied() -> Iterator[None]:
    """Our settings and else matplotlib's own, whatever the user's are; those are back afterwards."""
    from matplotlib import style

    with style.context(_RC, after_reset=True), warnings.catch_warnings():
        # A letter that DejaVu Sans lacks is a box in the PNG; the SVG has it.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, 1 to 21, of two colours such as "#1f2328"."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(fill: str) -> str:
    """Black or white, whichever is easier to read on a colour; one of them always has 4.5:1."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, fill))


def _luminance(colour: str) -> float:
    values = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@dataclass(frozen=True, slots=True)
class Unit:
    """Of an axis: its name, and how many milliseconds it has."""

    name: str
    ms: float


def unit_of(greatest_ms: float) -> Unit:
    """Milliseconds, or seconds where an axis ends above 10 000 ms."""
    return Unit("s", 1e3) if greatest_ms > _MOST_MS else Unit("ms", 1.0)


def number(value: float) -> str:
    """Such as 0.3, 9.9, 12 or 1234: as many digits as a median of a few runs deserves."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def time_text(milliseconds: float) -> str:
    """Such as "2.3 ms", "1297 ms" or "14.1 s"."""
    if milliseconds <= _MOST_MS:
        return f"{number(milliseconds)} ms"
    seconds = milliseconds / 1e3
    return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"


def rate_text(flops: float) -> str:
    """Such as "3.3 GFLOP/s" or "13 TFLOP/s"."""
    return f"{number(flops / 1e12)} TFLOP/s" if flops >= 1e12 else f"{number(flops / 1e9)} GFLOP/s"


def stage_name(stage: str) -> str:
    """As people write it: "first token"."""
    return stage.replace("_", " ")
