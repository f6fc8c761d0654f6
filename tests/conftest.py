"""Fixtures shared by all tests: seeded checkpoints and the bundles made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm_mlx.accelerate import prepare_cpu

# Tiny shapes gain nothing from threads, and threads that wait for each other on a busy machine take many times
# as long. Before anything loads OpenMP; what is set already stands.
os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_cpu()  # before anything here imports MLX

import mlx.core as mx  # noqa: E402

from fastvlm_convert.pipeline import convert  # noqa: E402
from fastvlm_mlx import FastVLM, load  # noqa: E402
from fastvlm_mlx.cache import PrefixCache  # noqa: E402
from fastvlm_mlx.engine import Engine  # noqa: E402
from fastvlm_mlx.pictures import Vision  # noqa: E402
from support.seeded import SPEAKING, write_checkpoint  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """The golden data are float32 on a CPU; only the run of the tests for Macs uses the GPU."""
    if not config.option.markexpr.startswith("apple"):
        mx.set_default_device(mx.cpu)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone."""
    before = os.environ.get("FASTVLM_CACHE")
    os.environ["FASTVLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FASTVLM_CACHE"]
    else:
        os.environ["FASTVLM_CACHE"] = before


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Preset -> folder of its seeded checkpoint, written once; don't change it."""
    made: dict[str, Path] = {}

    def get(preset: str) -> Path:
        if preset not in made:
            made[preset] = write_checkpoint(preset, tmp_path_factory.mktemp("checkpoints") / preset)
        return made[preset]

    return get


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """Preset -> folder of its converted bundle, made once; don't change it."""
    made: dict[str, Path] = {}

    def get(preset: str) -> Path:
        if preset not in made:
            target = tmp_path_factory.mktemp("bundles") / preset
            made[preset] = convert(checkpoint(preset), target).path
        return made[preset]

    return get


@pytest.fixture(scope="session")
def model(bundle: Callable[[str], Path]) -> Callable[[str], FastVLM]:
    """Preset -> loaded model."""
    made: dict[str, FastVLM] = {}

    def get(preset: str) -> FastVLM:
        if preset not in made:
            made[preset] = load(bundle(preset))
        return made[preset]

    return get


@pytest.fixture
def speaking_model(model: Callable[[str], FastVLM]) -> FastVLM:
    """Random weights and a tokenizer: what it says stays the same when the embedded default is trained again."""
    return model(SPEAKING)


@pytest.fixture(scope="session")
def default_model() -> FastVLM:
    """What commands use where no model is named."""
    return load(vision="mlx")


@pytest.fixture(scope="session")
def forgetful() -> Callable[[FastVLM], FastVLM]:
    """A model with the same weights that keeps nothing: what everything else is compared with."""
    made: dict[int, FastVLM] = {}

    def get(model: FastVLM) -> FastVLM:
        if id(model) not in made:
            engine = model.engine
            bare = Engine(engine.decoder, Vision(engine.vision.encoder, engine.vision.projector, 0), PrefixCache(0))
            made[id(model)] = FastVLM(model.config, bare, model.tokenizer, model.resolution, model.identity)
        return made[id(model)]

    return get
