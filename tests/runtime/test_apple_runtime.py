"""`AppleRuntime` with a coremltools that only notes what it is asked: what it does around Core ML's own work."""

from __future__ import annotations

import platform
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal  # here: its own imports fail where sys.platform is another one

from fastvlm_mlx import loading
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import BundleError, EncoderError
from fastvlm_mlx.vision import coreml_runtime
from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder, FallbackEncoder
from fastvlm_mlx.vision.coreml_runtime import AppleRuntime, Function

IMAGE = Function("r64", "image", True, 64, 64, "features")
ARRAY = Function(None, "images", False, 64, 64, "features")


class FakeTools(types.ModuleType):
    """coremltools, as far as the run time calls it."""

    __version__ = "9.0"

    def __init__(self) -> None:
        super().__init__("coremltools")
        self.compiled: list[str] = []
        self.loaded: list[tuple[str, str, str | None]] = []
        self.given: list[dict[str, object]] = []
        self.fault: Exception | None = None
        self.ComputeUnit = types.SimpleNamespace(CPU_AND_NE="CPU_AND_NE", CPU_ONLY="CPU_ONLY")
        self.models = types.SimpleNamespace(
            utils=types.SimpleNamespace(compile_model=self.compile_model), CompiledMLModel=self.load
        )
        self.utils = types.SimpleNamespace()

    def compile_model(self, package: str, target: str) -> None:
        self.compiled.append(package)
        if self.fault:
            raise self.fault
        Path(target).mkdir()
        (Path(target) / "model").write_text("compiled")

    def load(self, compiled: str, units: str, function_name: str | None) -> FakeTools:
        self.loaded.append((compiled, units, function_name))
        if not (Path(compiled) / "model").exists():
            raise RuntimeError("no model in it")
        return self

    def predict(self, inputs: dict[str, object]) -> dict[str, np.ndarray]:
        self.given.append(inputs)
        if self.fault:
            raise self.fault
        return {"features": np.ones((1, 1, 8), np.float32)}


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A Mac of macOS 15 with coremltools and an empty cache."""
    fake = FakeTools()
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(coreml_runtime, "_os_build", lambda: "24F74")
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    return fake


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "vision.mlpackage"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    return folder


def test_compiled_once_for_all_functions_and_starts(tools, package):
    for name in ("r64", "r128"):
        AppleRuntime().open(package, Function(name, "image", True, 64, 64, "features"), "CPU_AND_NE")
    assert len(tools.compiled) == 1
    compiled = {path for path, *_ in tools.loaded}
    assert len(compiled) == 1
    assert [(units, function) for _, units, function in tools.loaded] == [("CPU_AND_NE", "r64"), ("CPU_AND_NE", "r128")]


def test_compiled_before_it_is_opened(tools, package):
    runtime = AppleRuntime()
    assert runtime.compile(package)
    assert not runtime.compile(package)
    assert not AppleRuntime().compile(package)
    assert (len(tools.compiled), tools.loaded) == (1, [])
    runtime.open(package, IMAGE, "CPU_ONLY")
    assert (len(tools.compiled), len(tools.loaded)) == (1, 1)


def test_a_package_that_can_not_be_compiled(tools, package):
    tools.fault = RuntimeError("no such op")
    with pytest.raises(EncoderError, match=r"can't compile .*vision\.mlpackage: no such op; use vision='mlx'"):
        AppleRuntime().compile(package)


@pytest.mark.parametrize("changed", ["package", "system", "coremltools"])
def test_compiled_again_for_what_it_depends_on(tools, package, monkeypatch, changed):
    AppleRuntime().open(package, IMAGE, "CPU_ONLY")
    if changed == "package":
        (package / "weights").write_bytes(b"other weights")
    elif changed == "system":
        monkeypatch.setattr(coreml_runtime, "_os_build", lambda: "24G84")
    else:
        tools.__version__ = "9.1"
    AppleRuntime().open(package, IMAGE, "CPU_ONLY")
    assert len(tools.compiled) == 2
    assert len({path for path, *_ in tools.loaded}) == 2


def test_half_of_a_compiled_model_is_made_again(tools, package):
    runtime = AppleRuntime()
    runtime.open(package, IMAGE, "CPU_ONLY")
    (Path(tools.loaded[0][0]) / "model").unlink()
    AppleRuntime().open(package, IMAGE, "CPU_ONLY")
    assert len(tools.compiled) == 2


def test_a_failed_compile_leaves_nothing_and_is_not_tried_for_every_image(tools, package, tmp_path):
    tools.fault = RuntimeError("ANECCompile() FAILED")
    runtime = AppleRuntime()
    runtime.functions = lambda _: [IMAGE]
    encoder = CoreMLVisionEncoder(package, runtime)
    pixels = np.zeros((1, 64, 64, 3), np.uint8)

    class Mlx:
        device = "MLX"

        def encode(self, pixels):
            return pixels

    fallback = FallbackEncoder(encoder, Mlx)
    with pytest.warns(UserWarning, match=r"vision encoder runs in MLX: Core ML can't load .*ANECCompile\(\) FAILED"):
        fallback.encode(pixels)
    fallback.encode(pixels)
    assert len(tools.compiled) == 1
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]
    with pytest.raises(EncoderError, match="ANECCompile"):
        encoder.encode(pixels)


def test_images_go_in_as_pictures_and_arrays_as_they_are(tools, package):
    from PIL import Image

    pixels = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    runtime = AppleRuntime()
    runtime.open(package, IMAGE, "CPU_ONLY")({"image": pixels})
    picture = tools.given[-1]["image"]
    assert isinstance(picture, Image.Image)
    assert np.array_equal(np.asarray(picture), pixels)
    runtime.functions = lambda _: [ARRAY]
    encoder = CoreMLVisionEncoder(package, runtime)
    for _ in range(2):
        encoder.encode(pixels[None])
    first, second = (given["images"] for given in tools.given[-2:])
    assert_array_equal(first, pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
    assert first is second  # kept, since Core ML may read it after `predict` has returned


def test_a_prediction_that_fails(tools, package):
    predict = AppleRuntime().open(package, IMAGE, "CPU_ONLY")
    tools.fault = RuntimeError("out of memory")
    with pytest.raises(EncoderError, match=r"Core ML can't run .*: out of memory; use vision='mlx'"):
        predict({"image": np.zeros((64, 64, 3), np.uint8)})


def test_a_slow_load_is_explained(tools, package, monkeypatch, capsys):
    import time

    monkeypatch.setattr(coreml_runtime, "_SLOW_SECONDS", 0.01)
    tools.models.CompiledMLModel = lambda *_, **__: time.sleep(0.2)
    AppleRuntime().open(package, IMAGE, "CPU_AND_NE")
    assert "preparing the vision encoder for CPU_AND_NE: the first time can take minutes" in capsys.readouterr().err
    monkeypatch.setattr(coreml_runtime, "_SLOW_SECONDS", 5)
    AppleRuntime().open(package, IMAGE, "CPU_AND_NE")
    assert capsys.readouterr().err == ""


def test_systems_that_are_too_old(tools, package, monkeypatch):
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.6", ("", "", ""), "arm64"))
    with pytest.raises(EncoderError, match=r"needs macOS 14 or newer, this is 13\.6"):
        AppleRuntime()
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.7", ("", "", ""), "arm64"))
    tools.utils.load_spec = lambda _: types.SimpleNamespace(specificationVersion=9)
    with pytest.raises(EncoderError, match=r"needs macOS 15 or newer, this is 14\.7"):
        AppleRuntime().functions(package)
    tools.utils.load_spec = lambda _: (_ for _ in ()).throw(Exception("no protobuf"))
    with pytest.raises(BundleError, match="is no readable Core ML package: no protobuf"):
        AppleRuntime().functions(package)


def test_without_coremltools(tools, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(EncoderError, match="pip install coremltools"):
        AppleRuntime()


def test_the_command_warmup(bundle, monkeypatch, capsys):
    seen = []

    def warm_up(opened, sizes, units):
        seen.append((opened.path, list(sizes), units))
        yield 256, 256, 61.5, 0.0124

    monkeypatch.setattr(loading, "warm_up", warm_up)
    argv = ["warmup", "--model", str(bundle("tiny")), "--resolution", "256", "--compute-units", "ALL"]
    assert main(argv) == 0
    assert seen == [(bundle("tiny"), [(256, 256)], "ALL")]
    assert capsys.readouterr().out == "256 x 256: compiled and loaded in 61.5 s, first image 12 ms\n"
