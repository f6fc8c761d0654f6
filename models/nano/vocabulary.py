"""What scenes are made of, and which part of it is seen in the held-out split only."""

from __future__ import annotations

from nano.lexicon import HELD_OUT_WORDS, TRAIN_WORDS

Rgb = tuple[int, int, int]

KINDS: tuple[str, ...] = ("colour", "kind", "count", "presence", "position", "relation", "reading", "chart", "describe")
SPLITS: tuple[str, ...] = ("train", "held-out")
FAMILIES: tuple[str, ...] = ("shapes", "text", "chart")
SHAPED, SIGN = FAMILIES[:2]
PAGE = "page"  # full of text; for training, and without questions

PAINTS: dict[str, Rgb] = {
    "red": (222, 36, 36),
    "orange": (246, 138, 22),
    "yellow": (244, 220, 40),
    "green": (36, 158, 60),
    "blue": (36, 84, 222),
    "purple": (132, 48, 176),
    "pink": (250, 132, 190),
    "brown": (122, 72, 34),
    "black": (22, 22, 24),
    "white": (250, 250, 250),
}
COLOURS: tuple[str, ...] = tuple(PAINTS)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")

# Each shade lies between two ends that bear the same name beyond doubt; a gradient runs from one to the other.
SHADES: dict[str, tuple[Rgb, Rgb]] = {
    "white": ((255, 255, 255), (242, 242, 238)),
    "grey": ((200, 200, 202), (112, 112, 114)),
    "black": ((40, 40, 42), (0, 0, 0)),
    "red": ((216, 70, 64), (166, 26, 30)),
    "orange": ((255, 190, 120), (240, 142, 44)),
    "yellow": ((255, 248, 176), (238, 216, 64)),
    "green": ((176, 232, 180), (56, 146, 78)),
    "blue": ((172, 204, 250), (54, 92, 196)),
    "purple": ((210, 184, 238), (118, 64, 158)),
    "pink": ((255, 214, 230), (246, 158, 196)),
    "brown": ((170, 126, 86), (108, 72, 42)),
}
PHOTOGRAPH = "photograph"
BACKGROUNDS: tuple[str, ...] = (*SHADES, PHOTOGRAPH)

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
LETTERS_PER_CELL = 6
NINTHS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

# Every shape and eight of the ten colours lose one partner, so neither is strange in the held-out split.
HELD_OUT_PAIRS = frozenset((shape, (3 * shape + 1) % len(COLOURS)) for shape in range(len(SHAPES)))
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmr10",
    "cmb10",
    "cmtt10",
)
HELD_OUT_FONTS = ("cmss10", "STIXGeneralBolIta", "DejaVuSansMono-Oblique")
TRAIN_PHOTOGRAPHS = ("astronaut", "chelsea", "rocket")
HELD_OUT_PHOTOGRAPHS = ("coffee",)

__all__ = [
    "ALPHABET",
    "BACKGROUNDS",
    "COLOURS",
    "FAMILIES",
    "HELD_OUT_FONTS",
    "HELD_OUT_PAIRS",
    "HELD_OUT_PHOTOGRAPHS",
    "HELD_OUT_WORDS",
    "KINDS",
    "LETTERS_PER_CELL",
    "NINTHS",
    "PAGE",
    "PAINTS",
    "PHOTOGRAPH",
    "SHAPED",
    "SIGN",
    "SHADES",
    "SHAPES",
    "SPLITS",
    "TRAIN_FONTS",
    "TRAIN_PHOTOGRAPHS",
    "TRAIN_WORDS",
    "Rgb",
    "held_out_number",
]


def held_out_number(number: int) -> bool:
    """Whether signs show this number in the held-out split only: one in seven; training's charts may show it, too."""
    return number % 7 == 3
