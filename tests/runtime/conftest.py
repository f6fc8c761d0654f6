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
