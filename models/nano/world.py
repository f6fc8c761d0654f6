"""What the training asks of the pictures' module, and the heads for its classes."""

from __future__ import annotations

from typing import Protocol

from nano.objectives import Heads
from nano.settings import NanoConfig
from nano.targets import SceneMaker


class World(Protocol):
    """What pictures are made of; the module nano.scenes."""

    KINDS: tuple[str, ...]
    COLOURS: tuple[str, ...]
    SHAPES: tuple[str, ...]
    BACKGROUNDS: tuple[str, ...]
    ALPHABET: str
    LETTERS_PER_CELL: int
    make_scene: SceneMaker


def make_heads(config: NanoConfig, world: World) -> Heads:
    """The linear heads for a world's classes; 0 is "none" of shapes, colours and letters."""
    return Heads(
        config.feature_dim,
        (config.dims[2], config.dims[3]),
        len(world.BACKGROUNDS),
        len(world.SHAPES) + 1,
        len(world.COLOURS) + 1,
        len(world.ALPHABET) + 1,
        world.LETTERS_PER_CELL,
    )
