"""Sides that the official code's golden features don't have: two implementations, in two frameworks, agree on them."""

from __future__ import annotations

import numpy as np
import pytest

from support.folded import folded_vision
from support.seeded import relative_l2

pytest.importorskip("torch", reason="the convert extra isn't installed")

import torch

from fastvlm_convert.coreml_vision import build_network


@pytest.fixture(scope="module")
def network(checkpoint):
    return build_network(*folded_vision(checkpoint("tiny")))


@pytest.mark.parametrize("size", [(512, 512), (768, 768), (1024, 1024), (1536, 1536), (576, 1024)])
def test_the_encoder_in_mlx_and_in_pytorch(network, model, size):
    """1e-5: float32 in another order, as for the golden features at 256 px."""
    pixels = np.random.default_rng(size[1]).integers(0, 256, (*size, 3), np.uint8)
    with torch.inference_mode():
        right = network(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])[0].numpy()
    found = model("tiny").engine.vision.encoder.encode(pixels[None])[0]
    assert found.shape == right.shape == (size[0] * size[1] // 64**2, 512)
    assert relative_l2(found, right) <= 1e-5
