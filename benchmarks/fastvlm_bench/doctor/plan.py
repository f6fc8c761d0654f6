"""What the doctor is asked to do."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvlm_bench.stats import spread
from fastvlm_mlx.config import check_side
from fastvlm_mlx.errors import InputError

if TYPE_CHECKING:
    import numpy as np

Size = tuple[int, int]  # height and width in pixels
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        sizes: of images; none stands for all that the Core ML package has, or else the model's own.
        runs: measured calls for each size and device.
        seconds: once the measured calls of a size and device have taken this long, no more of them are made.
        limit_s: a step that takes longer is stopped; Core ML's first load for the Neural Engine can take minutes.
        debug: show tracebacks on stderr.
    """

    sizes: tuple[Size, ...] = ()
    runs: int = 10
    seconds: float = 10.0
    limit_s: float = 1200.0
    debug: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for a value out of range."""
        if self.runs < 1:
            raise InputError(f"--runs must be at least 1, got {self.runs}")
        if not 0 < self.limit_s <= _DAY_S:
            raise InputError(f"--limit must be above 0 and at most {_DAY_S} seconds, got {self.limit_s:g}")


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Sizes from "256,1024x576" (a side, or height x width), each once.

    Raises:
        InputError: not of that form. ResolutionError: not multiples of 64.
    """
    sizes = []
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        if not (1 <= len(sides) <= 2 and all(side.isdecimal() for side in sides)):
            raise InputError(
                "--resolutions takes SIDE or HEIGHTxWIDTH in pixels with commas between, such as 256,1024x576; "
                f"got {text!r}"
            )
        for side in sides:
            check_side(int(side))
        sizes.append((int(sides[0]), int(sides[-1])))
    return tuple(dict.fromkeys(sizes))


def size_text(size: Size) -> str:
    """A size as --resolutions takes it."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def area(size: Size) -> int:
    """Pixels of a size."""
    return size[0] * size[1]


def spread_text(times_ms: Sequence[float]) -> str:
    """Median and ends of some milliseconds."""
    found = spread(times_ms)
    return f"{found.median:.1f} ({found.low:.1f}-{found.high:.1f})"


def sample_pixels(size: Size) -> np.ndarray:
    """The picture that every device gets: (H, W, 3) uint8 with the statistics of a photo, the same each time."""
    import numpy as np
    from PIL import Image

    from fastvlm_bench.photo import sample_photo

    with Image.open(io.BytesIO(sample_photo())) as photo:
        return np.asarray(photo.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC))


def time_calls(call: Callable[[], object], runs: int, seconds: float) -> list[float]:
    """Milliseconds of each of `runs` calls; fewer, but one, if they take longer than `seconds` together."""
    times: list[float] = []
    while not times or (len(times) < runs and sum(times) < seconds * 1e3):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times
