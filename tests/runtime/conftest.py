"""Fixtures of the run time's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastvlm_mlx import FastVLM


@pytest.fixture
def tiny(model: Callable[[str], FastVLM]) -> FastVLM:
    """The smallest model, which knows of nothing before."""
    fresh = model("tiny")
    fresh.clear_cache()
    return fresh


@pytest.fixture
def tiled(model: Callable[[str], FastVLM]) -> FastVLM:
    """The smallest model that cuts pictures into tiles, which knows of nothing before."""
    fresh = model("tiny-newline")
    fresh.clear_cache()
    return fresh
