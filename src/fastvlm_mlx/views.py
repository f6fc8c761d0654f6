"""How images are brought to the encoder: the size and the shape of a call, checked against the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_mlx.config import DOWNSAMPLING, ModelConfig
from fastvlm_mlx.errors import ConfigError, ContextLengthError, InputError
from fastvlm_mlx.image import check_view, fit
from fastvlm_mlx.vision.anyres import MERGES, NO_NEWLINE, Layout, choose_grid, cut, parse_grid

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class View:
    """The size and the shape that images get; `view_of` makes and checks one.

    Attributes:
        side: of the square that the encoder sees, in pixels: the picture, or for "anyres" each tile. For "native" the
            longer side of the picture.
        aspect: of `types.ASPECTS`.
        grids: for "anyres", (columns, rows) of each grid that a picture may be cut into, at least one.
        merge: for "anyres", how the tiles' positions stand in a prompt; see `vision.anyres.Layout`.
        context: positions of a prompt at most; an image that takes as many is refused before it is cut. 0: any.
        downsampling: pixels per side of a position.
    """

    side: int
    aspect: str = "pad"
    grids: tuple[tuple[int, int], ...] = ()
    merge: str = "flat"
    context: int = 0
    downsampling: int = DOWNSAMPLING

    @property
    def tokens(self) -> int | None:
        """Positions of any picture; None where they depend on its shape."""
        return None if self.aspect in ("anyres", "native") else (self.side // self.downsampling) ** 2

    def layout(self, size: tuple[int, int]) -> Layout | None:
        """How a picture is cut into tiles; None where it isn't.

        Args:
            size: (width, height) of the picture in pixels.

        Raises:
            ContextLengthError: it would fill the context.
        """
        if self.aspect != "anyres":
            return None
        width, height = choose_grid(size, [(columns * self.side, rows * self.side) for columns, rows in self.grids])
        layout = Layout(width // self.side, height // self.side, self.side, self.merge, size, self.downsampling)
        if self.context and layout.tokens >= self.context:  # before the tiles fill the memory
            raise ContextLengthError(
                f"the image has {layout.tokens} positions in {layout.columns}x{layout.rows} tiles of {self.side} px, "
                f"the model's context is {self.context}; choose a smaller grid or lower the resolution"
            )
        return layout

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """What the encoder gets of an upright RGB picture.

        Returns:
            (side, side, 3) uint8; for "native" (H, W, 3), the longer one `side`; for "anyres" (T, side, side, 3).
        """
        layout = self.layout(picture.size)
        return cut(picture, layout) if layout else fit(picture, self.side, self.aspect, self.downsampling)


def view_of(config: ModelConfig, side: int, aspect: str | None = None, grid: str | None = None) -> View:
    """A checked view.

    Args:
        config: the model's: its own aspect, grids and merge type.
        side: in pixels, a multiple of the model's downsampling.
        aspect: default the model's.
        grid: "COLUMNSxROWS" for "anyres"; default of the model's grids the one that suits the picture best.

    Raises:
        ResolutionError: not such a multiple. InputError: unknown aspect, a grid that isn't one or that the model
            doesn't have, none at all. ConfigError: the config's grids aren't of whole tiles, or "spatial_unpad"
            without the weights of its line break.
    """
    chosen, downsampling = config.aspect if aspect is None else aspect, config.downsampling
    check_view(side, chosen, downsampling)
    side = int(side)  # NumPy's numbers are no JSON, and would be another view in digests
    if chosen != "anyres":
        if grid is not None:
            cure = "leave one of them out" if aspect else "give aspect 'anyres', too"
            raise InputError(f"a grid is for aspect 'anyres', and aspect is {chosen!r}; {cure}")
        return View(side, chosen, downsampling=downsampling)
    _check_merge(config)
    known = grids_of(config)
    if grid is None:
        if not known:
            raise InputError("this model has no grids of its own; say which one to cut images into, such as grid='2x2'")
        return View(side, chosen, known, config.patch_merge_type, config.context_length, downsampling)
    columns, rows = parse_grid(grid)
    if known and (columns, rows) not in known:
        raise InputError(f"the model's grids are {_names(known)}, not {grid}; choose one of them, or leave grid out")
    return View(side, chosen, ((columns, rows),), config.patch_merge_type, config.context_length, downsampling)


def grids_of(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of the grids that a model was trained for; most have none.

    Raises:
        ConfigError: they aren't of whole tiles.
    """
    side = config.image_size
    for width, height in config.grid_pinpoints:
        if min(width, height) < side or width % side or height % side:
            raise ConfigError(
                f"grid_pinpoints has {width} x {height} px, no grid of whole tiles of the model's {side} px; "
                "correct the config and convert the model again"
            )
    return tuple((width // side, height // side) for width, height in config.grid_pinpoints)


def _check_merge(config: ModelConfig) -> None:
    if config.patch_merge_type not in MERGES:
        raise ConfigError(f"patch_merge_type is {config.patch_merge_type!r}; this version knows {', '.join(MERGES)}")
    if config.patch_merge_type == "spatial_unpad" and not config.image_newline:
        raise ConfigError(NO_NEWLINE)


def _names(grids: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{columns}x{rows}" for columns, rows in grids)
