"""Runs of models/nano's training at sizes that mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nano import scenes
from nano.settings import NanoConfig, Settings
from nano.trainer import Trainer
from nano.world import World

SIDE = 128
CONFIG = NanoConfig(
    side=SIDE,
    dims=(8, 24, 48, 96, 96),
    depths=(1, 1, 1, 1, 1),
    hidden=64,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=96,
)
SETTINGS = Settings(
    stage_steps=(3, 2, 3, 1, 2, 1), batch=2, workers=0, evaluate_every=2, evaluated=4, vocabulary_scenes=12
)


def make_trainer(folder: Path, settings: Settings = SETTINGS, world: World = scenes) -> Trainer:
    return Trainer(folder, CONFIG, settings, world, lambda _: None)


def stop_after(trainer: Trainer, steps: int) -> Callable[[], bool]:
    return lambda: len(trainer.losses) >= steps
