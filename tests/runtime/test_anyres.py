"""Pictures in tiles, against what the official code computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastvlm_mlx import FastVLM
from fastvlm_mlx.image import open_image
from fastvlm_mlx.prefill import embed
from fastvlm_mlx.types import IMAGE_TOKEN_ID
from fastvlm_mlx.views import View
from fastvlm_mlx.vision.anyres import MERGES, Layout, choose_grid, cut
from support.anyres import GRIDS, NAMES, SIDE, reference, with_merge
from support.seeded import relative_l2

PROMPT = [11, 12, IMAGE_TOKEN_ID, 13]


@pytest.fixture
def tiled(model: Callable[[str], FastVLM]) -> FastVLM:
    fresh = model("tiny-newline")
    fresh.clear_cache()
    return fresh


@pytest.mark.parametrize("name", NAMES)
def test_grids_and_tiles_bit_for_bit(name):
    right = reference()
    picture = open_image(right[f"{name}.png"].tobytes())
    best = tuple(right[f"{name}.best"].tolist())
    assert choose_grid(picture.size, [(c * SIDE, r * SIDE) for c, r in GRIDS]) == best
    layout = View(SIDE, "anyres", GRIDS).layout(picture.size)
    assert layout == Layout(best[0] // SIDE, best[1] // SIDE, SIDE, "flat", picture.size)
    found = cut(picture, layout)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, right[f"{name}.tiles"])


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("name", NAMES)
def test_merged_embeddings(tiled, name, kind):
    right, model = reference(), with_merge(tiled, kind)
    encoded = model.encode_image(right[f"{name}.png"].tobytes(), aspect="anyres")
    spans = model.expand(PROMPT, [len(encoded.embeddings)])
    found = np.array(embed(model.decoder, spans, [encoded.embeddings])[0], np.float64)
    assert found.shape == right[f"{name}.{kind}"].shape
    # The reference is stored in float16, which rounds by up to 4.9e-4 of a value.
    np.testing.assert_allclose(found, right[f"{name}.{kind}"], rtol=6e-4, atol=1e-4)
    assert relative_l2(found, right[f"{name}.{kind}"]) <= 1e-3
