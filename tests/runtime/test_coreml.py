"""Core ML's path through the run time, with the MIL checker as its executor."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import BundleError, EncoderError, InputError, ResolutionError
from fastvlm_mlx.loading import assemble
from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder, FallbackEncoder
from support.folded import folded_vision
from support.seeded import golden, golden_prompt, relative_l2

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package
from fastvlm_convert.mil_check.runtime import CheckerRuntime
from fastvlm_convert.ranges import Ranges
from support.mil_programs import quiet


@pytest.fixture(scope="module")
def with_package(bundle, checkpoint, tmp_path_factory):
    """The tiny bundle with its Core ML package for 128 and 256 px beside the MLX weights."""
    folder = shutil.copytree(bundle("tiny"), tmp_path_factory.mktemp("coreml") / "tiny")
    with quiet():
        sizes = (Size(128, 128), Size(256, 256))
        config, weights = folded_vision(checkpoint("tiny"))
        convert_package(config, weights, folder / "vision.mlpackage", PackageOptions(sizes=sizes), Ranges())
    return Bundle.open(folder)


@pytest.mark.parametrize("kind", ["one image", "two images"])
def test_same_ids_as_mlx(with_package, kind):
    runtime = CheckerRuntime()
    model = assemble(with_package, vision="coreml", runtime=runtime)
    prompt = golden_prompt("tiny", kind)
    answer = model.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == prompt.greedy_ids
    assert answer.device.startswith("vision: Core ML (CPU and Neural Engine)")
    assert runtime.opened == [("r256", "CPU_AND_NE")]  # once, for both images


def test_features_and_compute_units(with_package):
    data, runtime = golden("tiny"), CheckerRuntime()
    model = assemble(with_package, vision="coreml", compute_units="CPU_ONLY", runtime=runtime)
    found = model.encode_image(data["pixels_128x128"], resolution=128).features
    assert relative_l2(found, data["features_128x128"]) <= 5e-3  # every op rounded to float16
    assert runtime.opened == [("r128", "CPU_ONLY")]
    assert "Core ML (CPU)" in model.device


def test_a_size_that_the_package_lacks(with_package):
    strict = assemble(with_package, vision="coreml", runtime=CheckerRuntime())
    pixels = golden("tiny")["pixels_256x256"]
    with pytest.raises(ResolutionError, match="takes images of 128 x 128, 256 x 256 px, not 192 x 192"):
        strict.encode_image(pixels, resolution=192)
    relaxed = assemble(with_package, vision="auto", runtime=CheckerRuntime())
    with pytest.warns(UserWarning, match="the vision encoder runs in MLX: the Core ML package takes images of"):
        found = relaxed.encode_image(pixels, resolution=192).features
    assert found.shape == (9, 512)
    assert "vision: MLX" in relaxed.device
    relaxed.encode_image(pixels)
    assert "vision: Core ML" in relaxed.device


def test_a_runtime_that_fails(with_package):
    class Broken(CheckerRuntime):
        def open(self, package, function, compute_units):
            raise EncoderError("Core ML can't load it")

    pixels = golden("tiny")["pixels_256x256"]
    with pytest.raises(EncoderError, match="can't load it"):
        assemble(with_package, vision="coreml", runtime=Broken()).encode_image(pixels)
    model = assemble(with_package, vision="auto", runtime=Broken())
    with pytest.warns(UserWarning, match="can't load it"):
        found = model.encode_image(pixels).features
    assert relative_l2(found, golden("tiny")["features_256x256"]) <= 1e-5


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs there")
def test_without_macos(with_package, bundle):
    with pytest.raises(EncoderError, match="Core ML runs on macOS only"):
        load(with_package.path, vision="coreml")
    with pytest.warns(UserWarning, match="the vision encoder runs in MLX: Core ML runs on macOS only"):
        model = load(with_package.path)
    assert "vision: MLX" in model.device


def test_bad_packages(with_package, bundle, tmp_path):
    with pytest.raises(BundleError, match=r"vision.mlpackage doesn't exist"):
        assemble(Bundle.open(bundle("tiny")), vision="coreml", runtime=CheckerRuntime())
    with pytest.raises(InputError, match="compute_units must be one of CPU_AND_NE, ALL"):
        CoreMLVisionEncoder(with_package.path / "vision.mlpackage", CheckerRuntime(), "NPU")
    copy = shutil.copytree(with_package.path, tmp_path / "copy")
    next(copy.rglob("weight.bin")).unlink()
    with pytest.raises(BundleError):
        assemble(Bundle.open(copy), vision="coreml", runtime=CheckerRuntime())


def test_a_package_of_apples_export(with_package, tmp_path):
    """`images` float32 (1, 3, S, S) in [0, 1] in, one unnamed function."""
    import torch

    from fastvlm_convert.coreml_vision import build_network

    network = build_network(*folded_vision_of_apple())
    path = tmp_path / "fastvithd.mlpackage"
    with quiet():
        import coremltools as ct

        exported = torch.export.export(network, (torch.zeros(1, 3, 256, 256),)).run_decompositions({})
        ct.convert(
            exported,
            inputs=[ct.TensorType(name="images", shape=(1, 3, 256, 256))],
            outputs=[ct.TensorType(name="image_features")],
            compute_precision=ct.precision.FLOAT32,
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
        ).save(str(path))
    encoder = FallbackEncoder(CoreMLVisionEncoder(path, CheckerRuntime()), lambda: pytest.fail("no fallback"))
    data = golden("tiny")
    found = encoder.encode(data["pixels_256x256"][None])
    assert found.shape == (1, 16, 512)
    assert relative_l2(found[0], data["features_256x256"]) <= 5e-3  # every op rounded to float16


def folded_vision_of_apple():
    """The tiny encoder as Apple exports it: pixels in [0, 1], so 1/255 is not in the stem."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from support.seeded import write_checkpoint

    with TemporaryDirectory() as folder:
        config, weights = folded_vision(write_checkpoint("tiny", Path(folder)))
    return config, weights | {"stem.conv.weight": weights["stem.conv.weight"] * np.float32(255)}


def test_rows_are_known_again_after_mlx_stood_in(with_package, tmp_path):
    """A size that Core ML lacks is encoded in MLX: the file is of the encoder that was asked for, as a new model is."""
    model = assemble(with_package, vision="auto", runtime=CheckerRuntime())
    photo = golden("tiny")["pixels_256x256"]
    with pytest.warns(UserWarning, match="the vision encoder runs in MLX"):
        answer = model.generate(photo, [1, -200, 2], resolution=192, max_tokens=1, ignore_eos=True)
    assert answer.device.startswith("vision: MLX")
    assert model.save_prefix(tmp_path / "rows") >= 11
    again = assemble(with_package, vision="auto", runtime=CheckerRuntime())
    assert again.load_prefix(tmp_path / "rows") >= 11
    mlx = assemble(with_package, vision="mlx")
    with pytest.raises(InputError, match=r"vision by Core ML .* this is .* vision by MLX"):
        mlx.load_prefix(tmp_path / "rows")
