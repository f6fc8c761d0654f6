"""FastViTHD in PyTorch, its powers of two, and its rounding to float16."""

from __future__ import annotations

import numpy as np
import pytest

from support.folded import folded_vision
from support.seeded import PRESETS, SIZES, golden, relative_l2

torch = pytest.importorskip("torch", reason="the convert extra isn't installed")

from fastvlm_convert.coreml_vision import build_network, measure_ranges  # noqa: E402
from fastvlm_convert.ranges import FLOAT16_MAX, STREAM_LIMIT, Meter, Ranges, stream_exponent  # noqa: E402
from fastvlm_convert.rounding import round_float16  # noqa: E402
from fastvlm_convert.torch_layers import shifted_gelu  # noqa: E402
from fastvlm_mlx.config import VisionConfig  # noqa: E402

TINY = VisionConfig(256, (1, 2, 2, 1, 1), (16, 32, 64, 128, 256))


def run(network, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])[0].numpy()


@pytest.mark.parametrize("form", ["batched", "split", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_features(checkpoint, preset, form):
    """The same gate as the MLX encoder's: float32, another order of summation."""
    network, data = build_network(*folded_vision(checkpoint(preset)), form), golden(preset)
    for size in SIZES:
        assert relative_l2(run(network, data[f"pixels_{size}"]), data[f"features_{size}"]) <= 1e-5


@pytest.mark.parametrize("form", ["batched", "split", "sdpa"])
def test_powers_of_two_change_nothing_in_float32(checkpoint, form):
    config, weights = folded_vision(checkpoint("tiny-hot"))
    pixels = golden("tiny-hot")["pixels_256x256"]
    ranges = measure_ranges(config, weights, [pixels])
    assert ranges.streams[4] >= 10  # this checkpoint's stage 5 reaches far beyond float16
    assert ranges.hidden
    plain, scaled = (run(build_network(config, weights, form, r), pixels) for r in (None, ranges))
    assert relative_l2(scaled, plain) <= 1e-6


def test_every_exponent_changes_nothing(checkpoint):
    """Exponents in all stages at once, of streams, norms and hidden layers, whether needed or not."""
    config, weights = folded_vision(checkpoint("tiny"))
    pixels = golden("tiny")["pixels_256x384"]
    blocks = [f"stages.{s}.blocks.{b}" for s, depth in enumerate(config.layers) for b in range(depth)]
    ranges = Ranges(
        streams={s: s + 1 for s in range(6)},
        norms=dict.fromkeys(blocks, 3),
        hidden=dict.fromkeys(blocks, 2)
        | {f"stages.{s}.downsample.{layer}": s for s in range(1, 5) for layer in ("depthwise", "pointwise")},
    )
    plain, scaled = (run(build_network(config, weights, "batched", r), pixels) for r in (None, ranges))
    assert relative_l2(scaled, plain) <= 1e-6


def test_measured_maxima_and_headroom(checkpoint):
    config, weights = folded_vision(checkpoint("tiny-hot"))
    ranges = measure_ranges(config, weights, [golden("tiny-hot")["pixels_256x256"]])
    stream = ranges.maxima["stages.4.stream"]
    assert stream > FLOAT16_MAX
    assert stream * 2.0 ** -ranges.streams[4] <= STREAM_LIMIT
    assert stream * 2.0 ** -(ranges.streams[4] - 1) > STREAM_LIMIT or ranges.streams[4] == 0
    assert all(bits > 0 for bits in ranges.headroom.values())
    tame = measure_ranges(*folded_vision(checkpoint("tiny")), [golden("tiny")["pixels_256x256"]])
    assert (tame.streams, tame.norms, tame.hidden) == ({}, {}, {})


def test_exponents_of_measured_maxima():
    """By hand: 3 bits free for what isn't squared, 2 for a sum of squares over channels, headroom after scaling."""
    meter = Meter()
    meter("stages.4.stream", torch.full((1, 2, 1, 1), 3 * STREAM_LIMIT))  # 2 bits over
    meter("stages.4.blocks.0.ffn.fc1", torch.full((1, 1, 1, 1), -STREAM_LIMIT * 16))
    # 16 channels of 512 sum up to 2^22: 2^8 over the limit of 2^14, of which the stream's 2^2 takes 2^4; the norm 2^2
    meter("stages.4.blocks.0.norm.difference", torch.full((1, 16, 2, 2), 512.0))
    meter("stages.4.blocks.1.norm.difference", torch.full((1, 16, 2, 2), 64.0))
    meter("stages.3.downsample.pointwise", torch.full((1, 1, 1, 1), STREAM_LIMIT * 2))
    meter("features", torch.full((1, 1, 1, 1), FLOAT16_MAX * 2))
    ranges = meter.choose()
    assert ranges.streams == {4: 2}
    assert ranges.norms == {"stages.4.blocks.0": 3}  # the limit is 16376, a little under 2^14
    assert ranges.hidden == {"stages.4.blocks.0": 4, "stages.3.downsample.pointwise": 1}
    bits = ranges.headroom
    assert bits["stages.4.stream"] == pytest.approx(5 - np.log2(3))
    assert bits["stages.4.blocks.0.ffn.fc1"] == pytest.approx(3)
    assert bits["stages.3.downsample.pointwise"] == pytest.approx(3)
    assert bits["stages.4.blocks.0.norm.difference"] == pytest.approx(np.log2(FLOAT16_MAX / 128))
    assert bits["features"] == pytest.approx(-1)


def test_a_patch_embedding_beyond_float16_is_held(checkpoint):
    """Both of its layers, each before its GELU; seeded weights of the full size need it."""
    config, weights = folded_vision(checkpoint("tiny"))
    for layer, factor in (("depthwise", 2.0**17), ("pointwise", 2.0**3)):
        for part in ("weight", "bias"):
            weights[f"stages.3.downsample.{layer}.{part}"] *= np.float32(factor)
    pixels = golden("tiny")["pixels_256x256"]
    ranges = measure_ranges(config, weights, [pixels])
    held = {name: bits for name, bits in ranges.hidden.items() if "downsample" in name}
    assert held.keys() >= {"stages.3.downsample.depthwise", "stages.3.downsample.pointwise"}
    assert min(bits for name, bits in ranges.headroom.items() if "downsample" in name) > 2
    assert Ranges(maxima=ranges.maxima).headroom["stages.3.downsample.pointwise"] < 0
    plain, scaled = (run(build_network(config, weights, "batched", r), pixels) for r in (None, ranges))
    assert relative_l2(scaled, plain) <= 1e-6


def test_each_parameter_takes_the_power_of_its_place():
    embedding = {"stages.1.downsample.depthwise": 4, "stages.1.downsample.pointwise": 6}
    ranges = Ranges(streams={0: 7, 1: 3, 4: 5, 5: 1}, hidden={"stages.4.blocks.0": 2} | embedding)
    expected = {
        "stem.pointwise.weight": 0,
        "stages.0.blocks.0.mixer.weight": -7,  # enters the stream
        "stages.1.downsample.depthwise.weight": 7 - 4,  # reads the stream before, held as its own layer is
        "stages.1.downsample.depthwise.bias": -4,
        "stages.1.downsample.pointwise.weight": 4 - 6,
        "stages.1.downsample.pointwise.bias": -6,
        "stages.1.blocks.0.mixer.weight": 6 - 3,  # enters the stream, from a held layer
        "stages.1.blocks.1.mixer.weight": 0,  # within it
        "stages.1.blocks.1.mixer.bias": -3,
        "stages.1.blocks.0.ffn.depthwise.bias": -3,
        "stages.1.blocks.0.ffn.fc1.weight": 3,
        "stages.1.blocks.0.ffn.fc1.bias": 0,
        "stages.1.blocks.0.ffn.fc2.weight": -3,
        "stages.2.downsample.depthwise.weight": 3,  # reads it
        "stages.4.position.weight": -5,
        "stages.4.blocks.0.mixer.qkv.weight": 0,  # after LayerNorm
        "stages.4.blocks.0.mixer.proj.bias": -5,
        "stages.4.blocks.0.ffn.fc1.weight": 5 - 2,
        "stages.4.blocks.0.ffn.fc2.weight": 2 - 5,
        "expand.depthwise.weight": 5 - 1,  # reads the stream of the last stage
        "expand.depthwise.bias": -1,
        "expand.reduce.weight": 1,
        "expand.reduce.bias": 0,
        "expand.expand.weight": 0,
    }
    assert {name: stream_exponent(name, ranges, TINY) for name in expected} == expected


@pytest.mark.parametrize("shift", [1, 4, 8])
def test_shifted_gelu(shift):
    """Equal to GELU of the unshifted values, and finite in float16 where those aren't."""
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([-1e5, 1e5, 2.0**shift * 6e4])]).double()
    found = shifted_gelu(x * 2.0**-shift, shift)
    right = torch.nn.functional.gelu(x) * 2.0**-shift
    assert float((found - right).abs().max()) <= 1e-12 * float(right.abs().max())
    half = shifted_gelu((x * 2.0**-shift).half().float(), shift)
    assert torch.isfinite(half).all()


def test_rounding_errors_cancel():
    rng = np.random.default_rng(0)
    matrix, kernels = rng.normal(size=(16, 200)).astype(np.float32), rng.normal(size=(8, 7, 7, 3)).astype(np.float32)
    for weights, axes in ((matrix, (1,)), (kernels, (1, 2))):
        rounded = round_float16(weights)
        assert rounded.shape == weights.shape
        np.testing.assert_array_equal(rounded, rounded.astype(np.float16).astype(np.float32))
        assert np.abs(rounded - weights).max() <= 2 * np.abs(weights.astype(np.float16) - weights).max()
        carried = np.abs((rounded - weights.astype(np.float64)).sum(axis=axes))
        nearest = np.abs((weights.astype(np.float16) - weights.astype(np.float64)).sum(axis=axes))
        assert carried.mean() < 0.05 * nearest.mean()


def test_exact_values_stay():
    weights = np.array([[1.0, 0.5, -3.25], [2.0, 0.125, 1024.0]], np.float32)
    np.testing.assert_array_equal(round_float16(weights), weights)
