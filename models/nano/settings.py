"""What makes a run of the training: the model's sizes and the settings.

Without torch, so that train.py tells its defaults and what is wrong with an option at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

from fastvlm_mlx.errors import InputError

_LEAST = {
    "seed": 0,
    "batch": 1,
    "workers": 0,
    "questions": 1,
    "evaluate_every": 1,
    "evaluated": 1,
    "vocabulary_scenes": 1,
}


STAGE_COUNT = 6  # see nano.schedule
SIDE = 320  # of the model's pictures, pixels


@dataclass(frozen=True, slots=True)
class NanoConfig:
    """Sizes of the whole model; `side` is that of its pictures in pixels.

    A picture's letters are what asks for most of it: with 256 px, 16 tokens and three blocks in the third stage, of
    signs with letters of 32 px 17 % were read, of those of 72 px and more 65 %.

    `scales` are the stages, counted from 0, whose maps are features beside the last one's (the paper's section 3.1.1).
    Before the last stage one filter a channel has to bring four positions through, and letters got lost there: trained
    anew behind the same first three stages for 170 steps of 32 pictures, a linear head on the features told 26 % of
    the letters on held-out signs and their places without these maps, and 59 % with them.

    Raises:
        InputError: the encoder can't have that `side` or these `dims` or `depths`.
    """

    side: int = SIDE
    dims: tuple[int, ...] = (16, 48, 96, 192, 192)
    depths: tuple[int, ...] = (1, 2, 5, 2, 1)
    mlp_ratio: int = 4
    head_dim: int = 32
    scales: tuple[int, ...] = (2, 3)
    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    rope_theta: float = 1e4
    context: int = 2048

    def __post_init__(self) -> None:
        if self.side < 64 or self.side % 64:
            raise InputError(
                f"side needs a multiple of 64 from 64 on, not {self.side}; the encoder halves it six times"
            )
        dims = self.dims
        if len(dims) != 5 or min(dims) < 1 or any(b % a for a, b in pairwise(dims)) or dims[3] % self.head_dim:
            raise InputError(
                "dims needs five positive numbers, each a multiple of the one before, from the fourth on "
                f"of {self.head_dim}, too; got {as_text(dims)}"
            )
        if len(self.depths) != 5 or min(self.depths) < 1:
            raise InputError(f"depths needs five positive numbers; got {as_text(self.depths)}")

    @property
    def feature_dim(self) -> int:
        """Channels of the encoder's output."""
        return 2 * self.dims[-1] + sum(self.dims[stage] for stage in self.scales)

    def to_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        seed: of the weights and of the pictures; two runs with other seeds see other training scenes.
        stage_steps: of each of the schedule's stages; 0 leaves one out.
        rate: factor of all learning rates; below 1 to train on what is nearly done.
        batch: pictures of a step.
        workers: processes that make pictures; 0 makes them in this one.
        questions: of a picture in a step, at most.
        evaluated: held-out pictures of an evaluation, the same for every seed.
        vocabulary_scenes: whose phrases make the tokenizer.

    Raises:
        InputError: a number is too small or too large, there is none for a stage, or no stage has steps.
    """

    seed: int = 0
    stage_steps: tuple[int, ...] = (13000, 6000, 6000, 350, 4000, 2000)
    rate: float = 1.0
    batch: int = 16
    device: str = "cpu"
    workers: int = 1
    questions: int = 8
    evaluate_every: int = 250
    evaluated: int = 192
    vocabulary_scenes: int = 3000

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} needs a number from {least} on, not {getattr(self, name)}")
        if not any(self.stage_steps):
            raise InputError("stage_steps needs a stage with steps; with zeros alone nothing is trained")
        if not 0 < self.rate <= 10:
            raise InputError(f"rate needs a number above 0, at most 10, not {self.rate}")
        if len(self.stage_steps) != STAGE_COUNT or min(self.stage_steps) < 0:
            found = as_text(self.stage_steps)
            raise InputError(f"stage_steps needs six numbers from 0 on, such as 3000,1000,8000,350,4000,0; got {found}")


def as_text(value: object) -> str:
    """A value as one writes it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
