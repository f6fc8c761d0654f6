"""What the training minimises, how fast, and from where."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from nano import scenes
from nano.network import NanoVLM
from nano.objectives import TARGETS, head_counts, head_loss
from nano.schedule import LAST_RATE, rate_factor
from nano.settings import NanoConfig
from nano.targets import stack


def test_heads_learn_from_cells_that_hold_something():
    made = [scenes.make_scene(seed, side=128) for seed in range(4)]
    batch = stack(made)
    right = {
        "background": torch.nn.functional.one_hot(batch["background"], len(scenes.BACKGROUNDS)) * 50.0,
        "shape": torch.nn.functional.one_hot(batch["cells"][..., 0], len(scenes.SHAPES) + 1) * 50.0,
        "colour": torch.nn.functional.one_hot(batch["cells"][..., 1], len(scenes.COLOURS) + 1) * 50.0,
        "ninth": torch.nn.functional.one_hot(batch["cells"][..., 2], 10) * 50.0,
        "ink": torch.nn.functional.one_hot(batch["inks"].clamp(min=0), len(scenes.COLOURS) + 1) * 50.0,
        "letters": torch.nn.functional.one_hot(batch["letters"], len(scenes.ALPHABET) + 1) * 50.0,
    }
    assert set(right) == set(TARGETS)
    assert head_loss(right, batch) < 1e-6
    counts = head_counts(right, batch)
    assert all(hits == every for hits, every in counts.values())
    assert counts["shape"][1] == int((batch["cells"][..., 0] > 0).sum())


def test_the_rate_rises_then_falls():
    rates = [rate_factor(step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] < 0.02
    assert rates[-1] == pytest.approx(LAST_RATE, abs=1e-4)
    assert rate_factor(0, 1) == 1.0


def test_the_decoders_matrices_keep_sizes():
    torch.manual_seed(0)
    config = NanoConfig(layers=2)
    network = NanoVLM(config)
    for block in network.decoder.model.layers:
        query, down = block.self_attn.q_proj.weight.detach(), block.mlp.down_proj.weight.detach()
        assert float(query.std()) == pytest.approx(query.shape[1] ** -0.5, rel=0.1)
        assert float(down.std()) == pytest.approx((down.shape[1] * 2 * config.layers) ** -0.5, rel=0.1)
        assert float(block.input_layernorm.weight.detach().min()) == 1.0
