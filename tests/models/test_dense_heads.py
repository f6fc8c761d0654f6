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
from nano.world import make_heads

SIDE = 128
CONFIG = NanoConfig(side=SIDE, dims=(8, 16, 32, 64, 128), depths=(1, 1, 1, 1, 1))
CLASSES = [len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, len(scenes.ALPHABET) + 1]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return stack([scenes.make_scene(seed, side=SIDE) for seed in range(8)])


def test_right_answers_cost_nothing_and_only_full_positions_count(batch: Batch) -> None:
    targets = zip(dense_targets(batch), [*CLASSES, *CLASSES[:2], CLASSES[2], CLASSES[2]], strict=True)
    right = [one_hot(target, classes) * 50.0 for target, classes in targets]
    assert dense_loss(right, batch) < 1e-6
    counts = dense_counts(right, batch)
    assert list(counts) == list(DENSE_TARGETS)
    grids = [*batch["dense"].unbind(-1), batch["spots"], batch["spots"]]
    for (hits, every), grid in zip(counts.values(), grids, strict=True):
        assert hits == every == int((grid > 0).sum()) > 0


@pytest.mark.parametrize("index", range(len(DENSE_TARGETS)))
def test_each_count_is_that_of_its_own_head(batch: Batch, index: int) -> None:
    targets = zip(dense_targets(batch), [*CLASSES, *CLASSES[:2], CLASSES[2], CLASSES[2]], strict=True)
    logits = [one_hot(target, classes) * 50.0 for target, classes in targets]
    head = (0, 1, 2, 5, 6)[index]
    logits[head] = -logits[head]
    wrong = [name for name, (hits, every) in dense_counts(logits, batch).items() if hits < every]
    assert wrong == [DENSE_TARGETS[index]]
    assert dense_loss(logits, batch) > 1


def test_the_loss_reaches_the_stages_below_the_maps_and_no_others(batch: Batch) -> None:
    vision, heads = FastViTHD(CONFIG), make_heads(CONFIG, scenes)
    features, maps = vision.with_maps(batch["pixels"].float() / 255)
    assert [tuple(x.shape) for x in maps] == [(8, 32, SIDE // 16, SIDE // 16), (8, 64, SIDE // 32, SIDE // 32)]
    assert features.shape == (8, (SIDE // 64) ** 2, CONFIG.feature_dim)
    *inside, features_spots = heads.dense(maps, features)
    names = {name for name, _ in vision.named_parameters()}
    last = {name for name in names if name.startswith(("network.8", "network.9", "network.10", "conv_exp"))}
    torch.stack([logits.square().sum() for logits in inside]).sum().backward(retain_graph=True)
    reached = {name for name, p in vision.named_parameters() if p.grad is not None}
    assert reached == names - last - {name for name in names if name.startswith("multi_scale")}
    dense_loss([*inside, features_spots], batch).backward()
    assert all(p.grad is not None for p in vision.parameters())


def test_a_coarse_position_speaks_of_the_finer_ones_within_it(batch: Batch) -> None:
    """Heads of which only one class at one of the finer places is likely, wherever they look."""
    heads, letters = make_heads(CONFIG, scenes), CLASSES[2]
    features, maps = FastViTHD(CONFIG).with_maps(batch["pixels"].float() / 255)
    with torch.no_grad():
        for head, ratio in zip(heads.spots, (2, 4), strict=True):
            head.weight.zero_()
            head.bias.zero_()
            head.bias[(1 * ratio + 0) * letters + 7] = 50.0  # second row, first column
        for logits, ratio in zip(heads.dense(maps, features)[-2:], (2, 4), strict=True):
            rows, columns = torch.nonzero(logits[0].argmax(-1) == 7, as_tuple=True)
            assert logits.shape == (8, SIDE // 16, SIDE // 16, letters)
            assert set(rows.tolist()) == set(range(1, SIDE // 16, ratio))
            assert set(columns.tolist()) == set(range(0, SIDE // 16, ratio))


def test_the_coarser_grid_takes_shape_and_colour_from_one_position() -> None:
    fine = torch.zeros(1, 4, 4, 3, dtype=torch.long)
    fine[0, 0, 0, :2] = torch.tensor([2, 1])
    fine[0, 1, 1, :2] = torch.tensor([1, 9])
    fine[0, 2, 3, 1] = 4  # a bar
    shape, colour = dense_targets({"dense": fine, "spots": fine[..., 2]})[3:5]
    assert shape.tolist() == [[[2, 0], [0, 0]]]
    assert colour.tolist() == [[[1, 0], [0, 4]]]
