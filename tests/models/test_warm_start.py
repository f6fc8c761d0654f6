"""The projector's start: what the heads read comes through, however small its channels are."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from nano.warm_start import EMBEDDED, start_projector


def test_small_channels_come_through():
    """Three classes in channels a thousand times smaller than the two that say nothing."""
    torch.manual_seed(0)
    kinds = torch.randint(0, 3, (600,))
    told = nn.functional.one_hot(kinds, 3) * 0.05 + 0.001 * torch.randn(600, 3)
    features = torch.cat([30 * torch.randn(600, 2) + 10, told, 0.001 * torch.randn(600, 3)], dim=1)
    heads = torch.cat([torch.zeros(3, 2), 100 * torch.eye(3), torch.zeros(3, 3)], dim=1)
    projector = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 6))

    def right() -> float:
        """How often the nearest mean of a class is the right one."""
        found = projector(features).detach()
        means = torch.stack([found[kinds == kind].mean(0) for kind in range(3)])
        return float((torch.cdist(found, means).argmin(1) == kinds).float().mean())

    assert right() < 0.6
    start_projector(projector, heads, features)
    assert right() > 0.98
    embedded = projector(features).detach()
    assert float(embedded.std()) == pytest.approx(EMBEDDED, rel=0.1)
    assert float(embedded.mean(0).abs().max()) < 0.01
