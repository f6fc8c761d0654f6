"""The linear heads on the maps inside the encoder."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch
from torch.nn.functional import one_hot

from nano import scenes
from nano.network import FastViTHD
from nano.objectives import DENSE_TARGETS, dense_counts, dense_loss, dense_targets
from nano.settings import NanoConfig
from nano.targets import Batch, stack
from nano.trainer import make_heads

SIDE = 128
CONFIG = NanoConfig(side=SIDE, dims=(8, 16, 32, 64, 128), depths=(1, 1, 1, 1, 1))
CLASSES = [len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, len(scenes.ALPHABET) + 1]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return stack([scenes.make_scene(seed, side=SIDE) for seed in range(8)])


def test_right_answers_cost_nothing_and_only_full_positions_count(batch: Batch) -> None:
    targets = zip(dense_targets(batch), [*CLASSES, *CLASSES[:2]], strict=True)
    right = [one_hot(target, classes) * 50.0 for target, classes in targets]
    assert dense_loss(right, batch) < 1e-6
    counts = dense_counts(right, batch)
    assert list(counts) == list(DENSE_TARGETS)
    for index, (hits, every) in enumerate(counts.values()):
        assert hits == every == int((batch["dense"][..., index] > 0).sum()) > 0


def test_the_loss_reaches_the_stages_below_the_maps_and_no_others(batch: Batch) -> None:
    vision, heads = FastViTHD(CONFIG), make_heads(CONFIG, scenes)
    features, maps = vision.with_maps(batch["pixels"].float() / 255)
    assert [tuple(x.shape) for x in maps] == [(8, 32, SIDE // 16, SIDE // 16), (8, 64, SIDE // 32, SIDE // 32)]
    assert features.shape == (8, (SIDE // 64) ** 2, CONFIG.feature_dim)
    dense_loss(heads.dense(maps), batch).backward()
    reached = {name for name, p in vision.named_parameters() if p.grad is not None}
    last = {name for name, _ in vision.named_parameters() if name.startswith(("network.8", "network.9", "network.10"))}
    last |= {name for name, _ in vision.named_parameters() if name.startswith("conv_exp")}
    assert reached == {name for name, _ in vision.named_parameters()} - last


def test_the_coarser_grid_takes_shape_and_colour_from_one_position() -> None:
    fine = torch.zeros(1, 4, 4, 3, dtype=torch.long)
    fine[0, 0, 0, :2] = torch.tensor([2, 1])
    fine[0, 1, 1, :2] = torch.tensor([1, 9])
    fine[0, 2, 3, 1] = 4  # a bar
    shape, colour = dense_targets({"dense": fine})[3:]
    assert shape.tolist() == [[[2, 0], [0, 0]]]
    assert colour.tolist() == [[[1, 0], [0, 4]]]
