"""Stand-ins for what only a Mac has; the doctor's worker imports them in its own process."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastvlm_mlx.bundle import PACKAGE, Bundle
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.coreml_runtime import Function
from support.fake_plan import CPU, NE, op, plan


def add_package(folder: Path, target: Path, sizes=((64, 64), (64, 128)), **options) -> Path:
    """A copy of a bundle with something in the package's place, which only the runtimes below can run."""
    shutil.copytree(folder, target)
    (target / PACKAGE).mkdir()
    (target / PACKAGE / "sizes.json").write_text(json.dumps(sizes))
    manifest = json.loads((target / "manifest.json").read_text())
    listed = [{"height": height, "width": width} for height, width in sizes]
    manifest["options"] |= {"package": {"sizes": listed, "bits": 16}, **options}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


class MLXRuntime:
    """Runs a package's functions as FastViTHD in MLX, rounded to float16 at the end."""

    def functions(self, package):
        sizes = json.loads((package / "sizes.json").read_text())
        return [Function(f"r{h}x{w}", "image", True, h, w, "features") for h, w in sizes]

    def open(self, package, function, compute_units):
        import mlx.core as mx

        from fastvlm_mlx.loading import load_mlx_encoder

        encoder = load_mlx_encoder(Bundle.open(package.parent), mx.float32)

        def predict(inputs):
            (pixels,) = inputs.values()
            assert pixels.shape == (function.height, function.width, 3)
            return {"features": np.array(encoder.encode(pixels[None])).astype(np.float16)}

        return predict


class SickRuntime(MLXRuntime):
    """Slow, crashing, failing and wrong, each on another compute unit."""

    def open(self, package, function, compute_units):
        predict = super().open(package, function, compute_units)
        if compute_units == "CPU_AND_GPU":
            raise EncoderError("Core ML can't load it: no such luck")
        if compute_units == "ALL":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()

        def change(inputs):
            made = predict(inputs)["features"]
            if compute_units == "CPU_ONLY":
                return {"features": made * np.float16(1.03125)}
            time.sleep(1.0)
            return {"features": made}

        return change


@contextmanager
def open_fake_plan(package, compute_units):
    """A plan for the functions of `add_package`: all on the Neural Engine, and three quarters of the cost there."""
    assert compute_units == "CPU_AND_NE"
    mixed = [op("y", "ios18.conv", NE, 0.3), op("s", "ios18.softmax", CPU, 0.1)]
    yield plan(r64x64=[op("y", "ios18.conv", NE, 0.5)], r64x128=mixed)


@contextmanager
def open_deadly_plan(package, compute_units):
    """What coremltools 2757 does."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()
    yield


def no_reason():
    """Why there are no plans here: there are."""


def too_old():
    """Why there are no plans on another Mac."""
    return "no plans here"


class Told:
    """A worker that says what it was told to."""

    def __init__(self, **answers):
        self._answers = answers

    def do(self, function, *args, **kwargs):
        found = self._answers[function.__name__]
        return found(*args, **kwargs) if callable(found) else found


class Chores:
    """The state of a worker that does the following."""

    def __init__(self):
        self.calls = 0


def count(state):
    state.calls += 1
    return os.getpid(), state.calls


def sleep(state):
    time.sleep(600)


def die(state):
    os._exit(7)


def fail(state, text, *, twice):
    raise ValueError(text * twice)


def shout(state):
    print("not in the report")
