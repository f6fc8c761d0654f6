"""AnyRes: one picture as a grid of tiles, beside the whole of it in the size of one tile.

Source: apple/ml-fastvlm 592b4ad, llava/mm_utils.py (select_best_resolution, resize_and_pad_image, divide_to_patches,
process_anyres_image) and llava/model/llava_arch.py (unpad_image, prepare_inputs_labels_for_multimodal); tests compare
with what that code computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastvlm_mlx.config import DOWNSAMPLING
from fastvlm_mlx.errors import ConfigError, InputError

if TYPE_CHECKING:
    import mlx.core as mx

MERGES = ("flat", "spatial", "spatial_unpad")
NO_NEWLINE = (
    "tiles are merged by 'spatial_unpad', and the weights have no image_newline to end their lines with; convert a "
    "checkpoint that has it, or use another aspect, such as 'pad'"
)
_BICUBIC = Image.Resampling.BICUBIC
_GRID = re.compile(r"([1-9][0-9]{0,2})x([1-9][0-9]{0,2})")


def parse_grid(text: str) -> tuple[int, int]:
    """Columns and rows of a grid that is written like "2x2" or "3x1".

    Raises:
        InputError: it isn't written like that.
    """
    found = _GRID.fullmatch(text) if isinstance(text, str) else None
    if not found:
        raise InputError(f'grid must be COLUMNSxROWS, each from 1 to 999, such as "2x2"; got {text!r}')
    return int(found[1]), int(found[2])


def choose_grid(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that keeps most of a picture's pixels, and of those that keep as many the one with the least padding.

    Args:
        size: (width, height) of the picture in pixels.
        sizes: (width, height) in pixels of the grids, at least one; of equals the first is taken.
    """
    width, height = size

    def worth(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[0] / width, target[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - target[0] * target[1]

    return max(sizes, key=worth)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a picture is cut into tiles, and how their positions stand in a prompt.

    The first tile is the whole picture, stretched; then come those of the grid, row by row.

    Attributes:
        columns: tiles beside each other.
        rows: tiles below each other.
        side: of a tile in pixels, a multiple of `downsampling`.
        merge: "flat": tile after tile; "spatial": the whole picture, then the grid line by line; "spatial_unpad":
            likewise, without the lines or columns that are padding, and with a learnt line break after each line.
        size: (width, height) of the picture in pixels.
        downsampling: pixels per side of a position.
    """

    columns: int
    rows: int
    side: int
    merge: str
    size: tuple[int, int]
    downsampling: int = DOWNSAMPLING

    @property
    def tiles(self) -> int:
        """How many the encoder sees."""
        return self.columns * self.rows + 1

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the grid."""
        return self.rows * self.side, self.columns * self.side

    @property
    def tokens(self) -> int:
        """Positions that it takes in a prompt."""
        n = self.side // self.downsampling
        lines, columns = self.kept()
        return n * n + len(lines) * (len(columns) + (self.merge == "spatial_unpad"))

    def kept(self) -> tuple[range, range]:
        """Which lines and columns of the grid's positions stand in the prompt."""
        lines, columns = (pixels // self.downsampling for pixels in self.pixels)
        if self.merge != "spatial_unpad":
            return range(lines), range(columns)
        width, height = self.size
        if width / height > columns / lines:
            pad = (lines - int(height * (columns / width))) // 2
            return range(pad, lines - pad), range(columns)
        pad = (columns - int(width * (lines / height))) // 2
        return range(lines), range(pad, columns - pad)


def cut(picture: Image.Image, layout: Layout) -> np.ndarray:
    """Cut an upright RGB picture into tiles, after fitting it into the grid, centred on black.

    Args:
        picture: of `layout.size`.
        layout: says how.

    Returns:
        (layout.tiles, side, side, 3) uint8, the whole picture first.
    """
    side, (height, width) = layout.side, layout.pixels
    across, down = width / picture.width, height / picture.height
    if across < down:
        fitted = width, min(math.ceil(picture.height * across), height)
    else:
        fitted = min(math.ceil(picture.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize(fitted, _BICUBIC), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    grid = np.asarray(canvas).reshape(layout.rows, side, layout.columns, side, 3)
    whole = np.asarray(picture.resize((side, side), _BICUBIC))
    return np.concatenate([whole[None], grid.swapaxes(1, 2).reshape(-1, side, side, 3)])


def merge(tiles: mx.array, layout: Layout, newline: mx.array | None = None) -> mx.array:
    """Positions of all tiles, in the order in which they stand in a prompt.

    A single tile is all of its positions, and for "spatial_unpad" one line break; no view of ours makes one, as beside
    any grid there is the whole picture.

    Args:
        tiles: (T, N, D) embeddings, the whole picture first, row-major over each tile.
        layout: of these tiles.
        newline: (D,), the line break of "spatial_unpad".

    Returns:
        (P, D); P is `layout.tokens` for more than one tile.

    Raises:
        ConfigError: "spatial_unpad" without a line break, as of a draft or a saved chat's other model.
    """
    import mlx.core as mx

    width = tiles.shape[-1]
    line_break = None
    if layout.merge == "spatial_unpad":
        if newline is None:
            raise ConfigError(NO_NEWLINE)
        line_break = newline.astype(tiles.dtype)
    if len(tiles) == 1:
        return tiles[0] if line_break is None else mx.concatenate([tiles[0], line_break[None]])
    if layout.merge == "flat":
        return tiles.reshape(-1, width)
    n = layout.side // layout.downsampling
    grid = tiles[1:].reshape(layout.rows, layout.columns, n, n, width).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(layout.rows * n, layout.columns * n, width)
    if line_break is not None:
        lines, columns = layout.kept()
        grid = grid[lines.start : lines.stop, columns.start : columns.stop]
        ends = mx.broadcast_to(line_break, (len(lines), 1, width))
        grid = mx.concatenate([grid, ends], axis=1)
    return mx.concatenate([tiles[0], grid.reshape(-1, width)])
