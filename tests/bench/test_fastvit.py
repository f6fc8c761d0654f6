"""Encoders with four stages, or multi-scale features: layers by hand and by modules, and where sides are checked."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from fastvlm_bench.cli import main
from fastvlm_bench.doctor.model import recorded_sizes
from fastvlm_bench.front import Budget, candidates
from fastvlm_bench.layers import count_parameters, vision_layers
from fastvlm_bench.memory import _VALUES_PER_PIXEL, _working_bytes
from fastvlm_bench.roofline import stage_work
from fastvlm_bench.runner import Plan
from fastvlm_bench.seeded_model import model_config as seeded_config
from fastvlm_bench.sizes import published_size
from fastvlm_bench.subjects import Choice, _check_length
from fastvlm_convert.families import vision_config
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import InputError, ResolutionError
from fastvlm_mlx.latency import latencies
from fastvlm_mlx.measurements import parse_report
from fastvlm_mlx.vision.fastvithd import FastViTHD
from fastvlm_mlx.vision_config import MultiScaleConfig
from support.reports import point, report, subject
from support.shapes import HALF, half_billion, model_config

FOUR = VisionConfig(
    64, (1, 1, 1, 1), (8, 16, 32, 64), 3, family="mci2", norm="batch", se_downsamples=(False, False, True, True)
)
SCALES = dataclasses.replace(FOUR, multi_scale=MultiScaleConfig("depthwise", (2, 0)))
AVERAGES = dataclasses.replace(FOUR, multi_scale=MultiScaleConfig("average", (0, 1, 2)))


def of(vision: VisionConfig):
    config = model_config(vision=vision)
    return dataclasses.replace(config, projector=dataclasses.replace(config.projector, input_dim=vision.feature_dim))


def counted(vision: VisionConfig, height: int, width: int):
    return {n.name: (n.macs, n.parameters, n.read, n.written) for n in vision_layers(vision, height, width)}


def test_what_four_stages_have_of_their_own():
    """64 x 96 px: maps of 16x24, 8x12, 4x6 and 2x3; multiply-accumulates, weights, values read, values written."""
    found = counted(SCALES, 64, 96)
    assert found["stages.2.downsample.reduce"] == (32 * 8, 32 * 8 + 8, 32, 8)
    assert found["stages.2.downsample.expand"] == (8 * 32, 8 * 32 + 32, 8, 32)
    assert found["stages.2.downsample.gate"] == (0, 0, (24 + 1) * 32, 24 * 32)
    assert found["stages.3.downsample.reduce"] == (64 * 16, 64 * 16 + 16, 64, 16)
    assert found["stages.3.blocks.0.mixer.attention"] == (2 * 6 * 6 * 64, 0, 3 * 6 * 64, 6 * 64)
    assert found["stages.0.pool"] == (384 * 8, 8 * 64 + 8, 384 * 8, 6 * 8)
    assert found["stages.2.pool"] == (24 * 32, 32 * 4 + 32, 24 * 32, 6 * 32)
    assert found["expand.depthwise"] == (6 * 128 * 9, 128 * 10, 6 * 64, 6 * 128)
    assert not {"stages.1.pool", "stages.1.downsample.reduce", "stages.4.position"} & set(found)
    assert counted(AVERAGES, 64, 96)["stages.0.pool"] == (0, 0, 384 * 8, 6 * 8)


@pytest.mark.parametrize("vision", [FOUR, SCALES, AVERAGES], ids=["plain", "depthwise", "average"])
def test_weights_are_those_of_the_modules(vision):
    modules = dict(FastViTHD(vision).named_modules())
    for layer in vision_layers(vision, 32, 32):
        own = size(modules[layer.name]) if layer.name in modules else 0
        assert layer.parameters == own, layer.name
    assert count_parameters(of(vision))["vision"] == size(FastViTHD(vision))


def size(module) -> int:
    return sum(array.size for _, array in tree_flatten(module.parameters()))


def test_the_features_are_what_the_projector_takes():
    features = FastViTHD(SCALES)(mx.zeros((1, 64, 96, 3)))
    assert features.shape == (1, 2, 3, SCALES.feature_dim)
    assert SCALES.feature_dim == 128 + 32 + 8


def test_work_counts_positions_of_32_pixels():
    """2 x 3 positions and 4 of text."""
    config = of(FOUR)
    work = stage_work(config, (64, 96), 4, vision=HALF, decoder=HALF)
    assert work["projector"].flops == 2 * 6 * (128 * 128 + 128 * 128)
    other = stage_work(dataclasses.replace(config, vision=None), (64, 64), 9, vision=HALF, decoder=HALF)
    assert work["prefill"].flops == other["prefill"].flops, "10 positions either way"
    with pytest.raises(ResolutionError, match="multiple of 32 pixels, got 80"):
        stage_work(config, 80, 4, vision=HALF, decoder=HALF)
    with pytest.raises(ResolutionError, match="multiple of 64 pixels, got 96"):
        stage_work(half_billion(), 96, 4, vision=HALF, decoder=HALF)


def test_questions_must_fit_each_model():
    config = of(FOUR)  # a context of 512
    _check_length(config, Plan((640,), prompt_tokens=24, max_tokens=32))  # 400 + 56 positions
    with pytest.raises(InputError, match="484 of an image at 704 px"):
        _check_length(config, Plan((704,), prompt_tokens=24, max_tokens=32))
    _check_length(config, Plan((96,)))
    with pytest.raises(ResolutionError, match="multiple of 64 pixels, got 96"):
        _check_length(model_config(), Plan((64, 96)))


def test_memory_counts_the_positions():
    """1024 px make 1,024 positions of 32 px, 256 of 64: rows of keys and values, which are kept twice, in float32."""
    choice, plan = Choice(None, None, None, "mlx", "ALL"), Plan((1024,))
    four, five = (_working_bytes(config, choice, plan) for config in (of(FOUR), model_config()))
    assert four - five == 4 * 2 * (1024 - 256) * 2 * 2 * 32 * 2


def test_memory_counts_the_tiles_that_are_encoded_at_once():
    choice = Choice(None, None, None, "mlx", "ALL")
    square, tiles = (_working_bytes(of(FOUR), choice, Plan((512,), aspect=aspect)) for aspect in (None, "anyres"))
    assert tiles - square == int(4 * 2**20 * 8 * _VALUES_PER_PIXEL) * 4 - int(512 * 512 * 8 * _VALUES_PER_PIXEL) * 4


def test_a_published_size_has_the_published_encoder():
    config = half_billion()
    assert published_size(config) == "0.5b"
    for vision in (dataclasses.replace(config.vision, family="mci2"),
                   dataclasses.replace(config.vision, multi_scale=MultiScaleConfig("average", (0,)))):  # fmt: skip
        assert published_size(dataclasses.replace(config, vision=vision)) is None


def test_sides_between_measured_ones_are_of_32():
    points = [point(0, 64, 10, 10), point(0, 256, 100, 100)]
    for entry, tokens in zip(points, (4, 64), strict=True):
        entry |= {"image_tokens": tokens, "prompt_tokens": tokens + 24}
    owner = subject(size=None, image_size=256, downsampling=32)
    ((one, latency),) = latencies([parse_report(report([owner], points), "here")]).items()
    # 224 px has 49 positions: 10 + 90 * 45 / 60 each.
    offered = [choice.resolution for choice in candidates(one, latency, 24, Budget(155.1))]
    assert offered == [64, 256, 224]


def test_sizes_of_a_package_of_32():
    manifest = SimpleNamespace(options={"package": {"sizes": [{"height": 96, "width": 160}]}})
    bundle = SimpleNamespace(manifest=manifest, config=of(FOUR), has=lambda _: True)
    assert recorded_sizes(bundle) == ((96, 160),)
    bundle.config = model_config()
    assert recorded_sizes(bundle) == ()


@pytest.mark.parametrize("name", ["mci0", "mci1", "mci2"])
def test_seeded_fastvit_is_the_converters(name):
    config = seeded_config(f"0.5b+{name}")
    assert config.vision == vision_config(name, 256, {})
    assert config.projector.input_dim == config.vision.feature_dim
    assert config.decoder == seeded_config("0.5b").decoder
    assert published_size(config) is None


def test_fastvit_is_as_large_as_the_paper_says():
    head = 2 * 640 * 512  # of CLIP, published and unused
    assert (count_parameters(seeded_config("0.5b+mci2"))["vision"] + head) / 1e6 == pytest.approx(35.7, abs=0.05)


def test_seeded_multi_scale_features():
    config = seeded_config("1.5b+depthwise")
    assert config.vision.multi_scale == MultiScaleConfig("depthwise", (0, 1, 2, 3))
    assert config.projector.input_dim == 3072 + 96 + 192 + 384 + 768
    assert seeded_config("tiny+average").vision.multi_scale.pooling == "average"


@pytest.mark.parametrize("size", ["tiny+", "tiny+mci3", "+mci2", "tiny+mci2+average"])
def test_no_such_encoder(size):
    with pytest.raises(InputError, match=r"--size must be of .* as in 0.5b\+mci2"):
        Choice(size=size)


def test_it_is_timed_from_the_command_line(capsys):
    assert main(["--size", "tiny,tiny+mci0,tiny+depthwise", "--resolution", "64", "--runs", "2"]) == 0
    out = capsys.readouterr().out
    assert all(f"seeded {name}" in out for name in ("tiny", "tiny+mci0", "tiny+depthwise"))
