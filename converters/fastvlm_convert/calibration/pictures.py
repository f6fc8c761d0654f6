"""A set of pictures, given as arrays of whatever size is asked for, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from fastvlm_mlx.image import open_image

if TYPE_CHECKING:
    from fastvlm_convert.coreml_vision import Size

HERE = Path(__file__).resolve().parent
Maker = Callable[[int, int], np.ndarray]  # height and width in pixels -> (H, W, 3) uint8


@dataclass(frozen=True, slots=True)
class Pictures:
    """A set of pictures.

    Attributes:
        name: "built-in", "verification" or the folder's name.
        digest: hex SHA-256 of what the pictures are, wherever they lie: another set has another.
        makers: what makes each picture at a size, in order.
        skipped: of a folder, a sentence for each file that couldn't be used.
        note: of a folder, that not all of its pictures were taken; "" otherwise.
    """

    name: str
    digest: str
    makers: tuple[Maker, ...] = field(repr=False, compare=False)
    skipped: tuple[str, ...] = ()
    note: str = ""

    @property
    def count(self) -> int:
        """How many pictures there are at each size."""
        return len(self.makers)

    def at(self, size: Size) -> Iterator[np.ndarray]:
        """Make the pictures at a size.

        Args:
            size: height and width in pixels.

        Yields:
            (H, W, 3) uint8, RGB, each an array of its own.

        Raises:
            ImageError: a file of a folder has gone, or can't be decoded any more, since the set was made.
        """
        for make in self.makers:
            yield make(size.height, size.width)


def cover(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The picture's centre, of the asked aspect and size in pixels; nothing is padded or distorted.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    # A copy: arrays that view a Pillow image are read-only, which torch.from_numpy warns of.
    return np.array(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))


def file_picture(path: Path) -> Maker:
    """Maker of a picture from an image file, which is opened when the picture is made."""
    return lambda height, width: cover(open_image(path), height, width)
