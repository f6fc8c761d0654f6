"""FastViTHD's parts, and the seam around it."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import ConfigError, InputError, ResolutionError
from fastvlm_mlx.vision.depthwise import DepthwiseConv
from fastvlm_mlx.vision.fastvithd import FastViTHD, MLXVisionEncoder
from fastvlm_mlx.vision.gelu import gelu
from support.seeded import golden, relative_l2


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (7, 1), (7, 2)])
@pytest.mark.parametrize("size", [(8, 8), (2, 2), (16, 24), (6, 10)])
def test_tiled_convolution_is_the_convolution(size, kernel, stride, multiplier):
    """Maps that are a multiple of the tile, smaller than one, and ragged."""
    channels = 6
    mx.random.seed(1)
    conv = DepthwiseConv(channels, multiplier * channels, kernel, stride)
    conv.weight = mx.random.normal(conv.weight.shape)
    conv.bias = mx.random.normal(conv.bias.shape)
    x = mx.random.normal((2, *size, channels))
    right = conv(x)
    conv.use_tiles()
    found = conv(x)
    assert found.shape == right.shape == (2, size[0] // stride, size[1] // stride, multiplier * channels)
    assert relative_l2(found, np.array(right)) <= 1e-6  # float32, another order of summation


def test_gelu_is_exact():
    """Against the C library's erf: float32's own rounding (6e-8), and no drift where it is flat."""
    x = np.linspace(-30, 30, 200_001).astype(np.float32)
    right = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)])
    found = np.array(gelu(mx.array(x)))
    assert relative_l2(found, right) <= 1e-7
    assert np.abs(found - right).max() <= 4e-6  # at |x| = 30, where float32's steps are 2e-6
    tanh = np.array(nn.gelu_approx(mx.array(x)))
    assert np.abs(tanh - right).max() > 1e-4  # the measure tells the approximation from it
    half = mx.array(x).astype(mx.bfloat16)
    assert mx.array_equal(gelu(half), nn.gelu(half))


def test_plain_convolutions_give_the_same_features(model, bundle):
    """What a GPU runs (mx.conv2d), on this machine's CPU."""
    from fastvlm_mlx.bundle import Bundle, assign, read_tensors

    opened = Bundle.open(bundle("tiny"))
    network = FastViTHD(opened.config.vision)
    assign({"": network}, read_tensors(opened.path / "vision.safetensors"), "vision")
    network.set_dtype(mx.float32)
    data = golden("tiny")
    found = network(mx.array(data["pixels_256x384"][None]).astype(mx.float32)).reshape(24, -1)
    assert relative_l2(found, data["features_256x384"]) <= 1e-5


def test_a_batch_is_its_images(model):
    data = golden("tiny")
    encoder = model("tiny").engine.vision.encoder
    pixels = np.stack([data["pixels_256x256"], data["pixels_second"]])
    batch = encoder.encode(pixels)
    assert batch.shape == (2, 16, 512)
    for row, image in zip(batch, pixels, strict=True):
        assert relative_l2(row, np.array(encoder.encode(image[None])[0])) <= 1e-6


@pytest.mark.parametrize("shape", [(1, 1000, 1000, 3), (1, 256, 100, 3), (1, 32, 64, 3)])
def test_sides_must_be_whole_tokens(model, shape):
    with pytest.raises(ResolutionError, match="multiple of 64"):
        model("tiny").engine.vision.encoder.encode(np.zeros(shape, np.uint8))


def test_float16_is_refused(bundle):
    from fastvlm_mlx import load

    with pytest.raises(InputError, match="overflows float16"):
        load(bundle("tiny"), vision_dtype="float16")


def test_device_says_what_runs(model):
    assert (
        model("tiny").device
        == f"vision: MLX ({mx.default_device().type.name}), decoder: MLX ({mx.default_device().type.name})"
    )
    assert isinstance(model("tiny").engine.vision.encoder, MLXVisionEncoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 2, 3)}, "5 positive layers"),
        ({"embed_dims": (16, 32, 64, 128, 250)}, "multiple of the one before"),
        ({"embed_dims": (1, 2, 4, 8, 16)}, "multiples of head_dim"),
        ({"image_size": 100}, "multiple of 64"),
    ],
)
def test_impossible_shapes(change, message):
    shape = {"image_size": 256, "layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 64, 128, 256)}
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**(shape | change))
