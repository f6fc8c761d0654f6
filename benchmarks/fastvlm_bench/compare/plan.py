"""What the sides of a comparison are asked: the same pictures, questions and texts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_bench.compare.rivals import Kind
from fastvlm_mlx.config import DOWNSAMPLING, check_side
from fastvlm_mlx.errors import InputError

QUESTIONS = ("What is in this picture?", "Which colours do you see in it?")
# Square, so that padding it and cropping it are the same; larger than any resolution of the published models.
PICTURE_SIZE = (1280, 1280)
CHECKED_TOKENS = 16  # of the first answer, that must be the same everywhere; as many as the second one has


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run; checked before anything is loaded.

    Attributes:
        resolutions: image sides in pixels, multiples of 64, each once.
        runs: measured rounds.
        max_tokens: tokens of the first answer; the second has at most CHECKED_TOKENS.
    """

    resolutions: tuple[int, ...] = (256, 512, 1024)
    runs: int = 7
    max_tokens: int = 32

    def __post_init__(self) -> None:
        """Raise ResolutionError or InputError for a value out of range."""
        for side in self.resolutions:
            check_side(side, DOWNSAMPLING)  # FastViTHD's: what all of them run
        if len(set(self.resolutions)) != len(self.resolutions):
            raise InputError(f"--resolution must name each resolution once, got {','.join(map(str, self.resolutions))}")
        for name, least in (("runs", 1), ("max_tokens", 2)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} must be at least {least}, got {getattr(self, name)}")


class Requests:
    """Makes the requests of each round; a round's picture and text are new to everybody.

    Args:
        plan: what to run.
        folder: for the pictures.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder

    def make(self, kind: Kind, index: int, resolution: int, positions: int) -> dict[str, Any]:
        """A request for `workers.serve`.

        Args:
            kind: about a picture, or a text alone.
            index: the round; -1 for the check before them.
            resolution: side in pixels.
            positions: length of a text.
        """
        first = self._plan.max_tokens
        if kind == "text":
            # Below 256, which every vocabulary has; equal beginnings could be kept from an earlier text.
            draw = random.Random(f"{index} {resolution}")
            return {"ids": draw.choices(range(256), k=positions), "tokens": [first]}
        return {
            "image": str(self.picture(index, resolution)),
            "questions": QUESTIONS,
            "tokens": [first, min(first, CHECKED_TOKENS)],
            "resolution": resolution,
        }

    def picture(self, index: int, resolution: int) -> Path:
        """The round's picture at a resolution."""
        path = self._folder / f"{resolution}-{index}.jpg"
        if not path.exists():
            from fastvlm_bench.photo import sample_photo

            path.write_bytes(sample_photo(resolution * 1000 + index + 1, PICTURE_SIZE))
        return path
