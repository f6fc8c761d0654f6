"""Backgrounds: plain colours of varied shades, gradients of one colour, and crops of photographs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from nano.collage import PLAIN, Crop, Look, Piece, cropped, paste, plan_look, plan_pieces
from nano.dice import Dice
from nano.vocabulary import BACKGROUNDS, HELD_OUT_PHOTOGRAPHS, PHOTOGRAPH, SHADES, TRAIN_PHOTOGRAPHS, Rgb

FOLDER = Path(__file__).resolve().parents[2] / "converters" / "fastvlm_convert" / "calibration"
WORKING_SIDE = 384  # photographs are kept with this shorter side: crops of half of it are still sharp enough


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A background.

    Attributes:
        index: of its name in BACKGROUNDS.
        start: its colour, or where its gradient begins.
        end: where its gradient ends; `start` for a plain one.
        angle: of the gradient, in radians.
        photograph: name of the photograph, "" for none.
        crop: left, top and size as parts of what is free and of the shorter side.
        mirrored: whether the photograph is.
        light: factor of the photograph's brightness.
        look: what became of the photograph.
        pieces: parts of photographs that lie on it.
    """

    index: int
    start: Rgb = (0, 0, 0)
    end: Rgb = (0, 0, 0)
    angle: float = 0.0
    photograph: str = ""
    crop: Crop = (0.0, 0.0, 1.0)
    mirrored: bool = False
    light: float = 1.0
    look: Look = PLAIN
    pieces: tuple[Piece, ...] = ()

    @property
    def name(self) -> str:
        """A colour, or "photograph"."""
        return BACKGROUNDS[self.index]

    @property
    def ends(self) -> tuple[Rgb, ...]:
        """The colours to stand out from; none for a photograph, where things get an outline instead."""
        return () if self.photograph else (self.start, self.end)


def mixed(first: Rgb, second: Rgb, part: float) -> Rgb:
    """The colour that lies `part` of the way from the first to the second."""
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return red, green, blue


def plan_backdrop(dice: Dice, photographs: float, held_out: bool, varied: bool) -> Backdrop:
    """Choose a background.

    Args:
        dice: the scene's.
        photographs: the probability of a photograph.
        held_out: take the photographs of the held-out split instead of those for training.
        varied: change the photograph and put pieces of others on it; for training.
    """
    if dice.chance(photographs):
        backdrop = Backdrop(
            BACKGROUNDS.index(PHOTOGRAPH),
            photograph=dice.pick(HELD_OUT_PHOTOGRAPHS if held_out else TRAIN_PHOTOGRAPHS),
            crop=(dice.between(0, 1), dice.between(0, 1), dice.between(0.45, 1.0)),
            mirrored=dice.chance(0.5),
            light=dice.between(0.65, 1.1),
        )
        if not varied:
            return backdrop
        return replace(backdrop, look=plan_look(dice), pieces=plan_pieces(dice, TRAIN_PHOTOGRAPHS))
    index = dice.whole(0, len(SHADES) - 1)
    first, second = SHADES[BACKGROUNDS[index]]
    start = mixed(first, second, dice.between(0, 1))
    end = mixed(first, second, dice.between(0, 1)) if dice.chance(0.4) else start
    return Backdrop(index, start, end, dice.between(0, 2 * np.pi))


@cache
def _photograph(name: str, mirrored: bool) -> Image.Image:
    with Image.open(FOLDER / f"{name}.jpg") as file:
        picture = file.convert("RGB")
    scale = WORKING_SIDE / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


@cache
def _ramp(side: int) -> tuple[np.ndarray, np.ndarray]:
    line = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    return line[None, :, None], line[:, None, None]


def draw_backdrop(backdrop: Backdrop, side: int) -> Image.Image:
    """Paint it.

    Args:
        backdrop: the background.
        side: of the picture, in pixels.

    Returns:
        A picture of its own, to draw on.
    """
    if backdrop.photograph:
        crop = cropped(_photograph(backdrop.photograph, backdrop.mirrored), backdrop.crop, side)
        picture = crop.point([min(255, round(value * backdrop.light)) for value in range(256)] * 3)
        if backdrop.look != PLAIN:
            picture = backdrop.look.of(picture)
        for piece in backdrop.pieces:
            paste(picture, piece, _photograph)
        return picture
    if backdrop.start == backdrop.end:
        return Image.new("RGB", (side, side), backdrop.start)
    across, down = _ramp(side)
    part = 0.5 + (across * np.cos(backdrop.angle) + down * np.sin(backdrop.angle)) / np.sqrt(2)
    start, end = np.array(backdrop.start, np.float32), np.array(backdrop.end, np.float32)
    return Image.fromarray((start + part.astype(np.float32) * (end - start) + np.float32(0.5)).astype(np.uint8))
