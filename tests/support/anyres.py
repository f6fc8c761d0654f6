"""AnyRes' reference data, and models that merge tiles in one way or another."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np

from fastvlm_mlx import FastVLM
from fastvlm_mlx.types import IMAGE_TOKEN_ID
from support.seeded import GOLDEN

SIDE = 256  # of a tile of tiny-newline, pixels
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # columns, rows; as in its config
NAMES = ("any_wide", "any_tall", "any_square")
# Positions by merge type, counted by hand: 16 of each tile; where padding goes and lines end, as the official code's.
POSITIONS = {
    "any_wide": {"flat": 64, "spatial": 64, "spatial_unpad": 52},
    "any_tall": {"flat": 64, "spatial": 64, "spatial_unpad": 66},
    "any_square": {"flat": 80, "spatial": 80, "spatial_unpad": 88},
}
PROMPT = [11, 12, IMAGE_TOKEN_ID, 13]
SHORT = {"max_tokens": 4, "ignore_eos": True}


def bytes_of(name: str) -> bytes:
    """One of NAMES as a file."""
    return reference()[f"{name}.png"].tobytes()


@cache
def reference() -> dict[str, np.ndarray]:
    """What the official code makes of pictures; don't change it."""
    with np.load(GOLDEN / "preprocess.npz") as arrays:
        return dict(arrays)


def with_merge(model: FastVLM, kind: str) -> FastVLM:
    """The same model with another merge type."""
    config = dataclasses.replace(model.config, patch_merge_type=kind)
    return FastVLM(config, model.engine, model.tokenizer, model.resolution, model.identity)
