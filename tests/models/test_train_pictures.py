"""Which pictures a training sees: who asks for which split and which seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from nano import scenes
from nano.schedule import STAGES, Stage
from nano.settings import NanoConfig, Settings
from nano.targets import Batch
from nano.trainer import Trainer
from nano.vocabulary import PAGE, SHAPED, SIGN
from support.nano_run import CONFIG, SETTINGS

SIDE = 192  # four fifths of which are 128, to the nearest that the encoder can have
TOKENIZER, START, CURVE = "tokenizer", "start", "curve"
NAMES = [stage.name for stage in STAGES]


class Watched(Trainer):
    """A training whose pictures are noted, by what they are for."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.asked: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.sides: dict[str, list[int]] = defaultdict(list)
        self.families: dict[str, list[str | None]] = defaultdict(list)
        self.purpose = ""
        world: Any = SimpleNamespace(**{name: getattr(scenes, name) for name in scenes.__all__})
        world.make_scene = self.make_scene
        super().__init__(folder, replace(CONFIG, side=SIDE), settings, world, lambda _: None)

    def make_scene(self, seed: int, split: str = "train", side: int = 0, family: str | None = None) -> scenes.Scene:
        self.asked[self.purpose].append((split, seed))
        self.sides[self.purpose].append(side)
        self.families[self.purpose].append(family)
        return scenes.make_scene(seed, split, side, family)

    @contextmanager
    def pictures_for(self, purpose: str) -> Iterator[None]:
        before, self.purpose = self.purpose, purpose
        yield
        self.purpose = before

    def _new_tokenizer(self, config: NanoConfig) -> NanoConfig:
        with self.pictures_for(TOKENIZER):
            return super()._new_tokenizer(config)

    def _run_stage(self, stop: Any) -> None:
        with self.pictures_for(STAGES[self.stage].name):
            super()._run_stage(stop)

    def _start_projector(self, before: Stage) -> None:
        with self.pictures_for(START):
            super()._start_projector(before)

    def evaluate(self, stage: Stage) -> dict[str, float]:
        with self.pictures_for(CURVE):
            return super().evaluate(stage)

    def _batches(self, stage: Stage, steps: int) -> Iterator[Batch]:
        assert self.purpose == stage.name
        return super()._batches(stage, steps)

    def seeds(self, purpose: str) -> set[int]:
        return {seed for _, seed in self.asked[purpose]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Watched]:
    """With seeds 0 and 1."""
    out = []
    for seed in range(2):
        out.append(Watched(tmp_path_factory.mktemp("watched") / "run", replace(SETTINGS, seed=seed)))
        out[-1].run()
    return out


def test_training_sees_the_training_split_alone(runs: list[Watched]) -> None:
    for run in runs:
        assert set(run.asked) == {TOKENIZER, START, CURVE, *NAMES}
        for purpose in (TOKENIZER, START, *NAMES):
            assert {split for split, _ in run.asked[purpose]} == {"train"}, purpose


def test_the_curve_is_of_the_first_held_out_scenes_alone(runs: list[Watched]) -> None:
    """The card's table leaves out the first thousand."""
    assert Settings().evaluated == 192
    for run in runs:
        assert set(run.asked[CURVE]) == {("held-out", seed) for seed in range(SETTINGS.evaluated)}


def test_the_first_three_stages_see_smaller_pictures(runs: list[Watched]) -> None:
    for run in runs:
        sides = {name: set(run.sides[name]) for name in NAMES}
        assert sides == dict(zip(NAMES, ({128}, {128}, {128}, {SIDE}, {SIDE}, {SIDE}), strict=True))
        assert set(run.sides[START]) == {128}
        before = SETTINGS.evaluated  # each size is made once, then kept
        assert run.sides[CURVE] == [128] * before + [SIDE] * before


def test_pages_teach_the_encoder_and_signs_and_shapes_the_last_stages(runs: list[Watched]) -> None:
    for run in runs:  # of two pictures, what is nearest to such a share is one
        seen = {name: run.families[name][: SETTINGS.batch] for name in NAMES}
        drawn = [PAGE, None], [None, None], [PAGE, None], [SIGN, None], [SIGN, None], [SHAPED, None]
        assert seen == dict(zip(NAMES, drawn, strict=True))


def test_a_run_that_is_resumed_where_the_pictures_grow_is_the_same(runs: list[Watched], tmp_path: Path) -> None:
    small = sum(SETTINGS.stage_steps[:3])
    for steps in (small - 1, 1, 100):  # before the last step with small pictures, after it, to the end
        part = Watched(tmp_path / "run", replace(SETTINGS, seed=0))
        part.run(lambda part=part, steps=steps: len(part.losses) >= steps)
    assert part.finished
    for (name, tensor), other in zip(part.model.state_dict().items(), runs[0].model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_no_picture_is_in_two_stages(runs: list[Watched]) -> None:
    for run in runs:
        for name, steps in zip(NAMES, SETTINGS.stage_steps, strict=True):
            assert len(run.asked[name]) == len(run.seeds(name)) == steps * SETTINGS.batch
        for one, other in combinations((TOKENIZER, *NAMES), 2):
            assert not run.seeds(one) & run.seeds(other)


def test_another_seed_is_of_other_pictures(runs: list[Watched]) -> None:
    seen = [{seed for purpose in (TOKENIZER, START, *NAMES) for seed in run.seeds(purpose)} for run in runs]
    for one, other in combinations(seen, 2):
        assert not one & other
    for run, seeds in zip(runs, seen, strict=True):  # a stage of any length stays within its run's range
        assert {seed // 2**40 for seed in seeds} == {run.settings.seed}
        assert len({seed // 2**36 for name in NAMES for seed in run.seeds(name)}) == len(NAMES)


def test_seed_0_is_of_the_pictures_that_it_always_was(runs: list[Watched]) -> None:
    assert runs[0].seeds(TOKENIZER) == set(range(SETTINGS.vocabulary_scenes))
    for number, (name, steps) in enumerate(zip(NAMES, SETTINGS.stage_steps, strict=True), 1):
        assert runs[0].seeds(name) == set(range(number * 2**36, number * 2**36 + steps * SETTINGS.batch))
