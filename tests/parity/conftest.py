"""The seeded checkpoints in every layout, our models of them, and what the peers need to be imported."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_bench.workers.torchvision_operators import declare_torchvision_operators
from fastvlm_convert.pipeline import convert
from fastvlm_mlx import FastVLM, load
from support.layouts import to_apple_mlx, to_mlx_vlm, to_transformers
from support.seeded import PROMPTS, GoldenPrompt, golden_prompt


@pytest.fixture(scope="session", autouse=True)
def float32_on_cpu() -> Iterator[None]:
    """Both sides in float32 on the CPU, where they differ by rounding only."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="session", params=["tiny", "tiny-untied"])
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PROMPTS)
def prompt(request: pytest.FixtureRequest, preset: str) -> GoldenPrompt:
    return golden_prompt(preset, request.param)


@pytest.fixture(scope="session")
def layouts(
    preset: str, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same weights in every layout."""
    llava, root = checkpoint(preset), tmp_path_factory.mktemp(preset)
    return {
        "llava": llava,
        # Padded as published: `<image>` then has an id that no golden prompt uses.
        "transformers": to_transformers(llava, root / "transformers", pad_vocabulary=True),
        "mlx-vlm": to_mlx_vlm(llava, root / "mlx-vlm"),
        "apple-mlx": to_apple_mlx(llava, root / "apple-mlx"),
    }


@pytest.fixture(scope="session")
def ours(layouts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FastVLM]:
    """Our model, converted from a layout."""

    @functools.cache
    def model(layout: str) -> FastVLM:
        bundle = convert(layouts[layout], tmp_path_factory.mktemp("bundles") / layout).path
        return load(bundle, dtype="float32", vision_dtype="float32")

    return model


@pytest.fixture(scope="session")
def timm_ready() -> None:
    """Make timm and what imports it importable, and comparable."""
    os.environ["TIMM_FUSED_ATTN"] = "0"  # read when timm is imported: attention as plain matmuls
    declare_torchvision_operators()
