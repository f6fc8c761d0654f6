"""FastViT and multi-scale features as saved Core ML packages, executed by the checker, and their powers of two."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.ane_report import report  # noqa: E402
from fastvlm_convert.cli import main  # noqa: E402
from fastvlm_convert.coreml_vision import (  # noqa: E402
    PackageOptions,
    Size,
    build_network,
    convert_package,
    measure_ranges,
)
from fastvlm_convert.gates import Subject, check_package, describe_checks  # noqa: E402
from fastvlm_convert.ranges import FLOAT16_MAX, Ranges, stream_exponent  # noqa: E402
from fastvlm_mlx.bundle import Bundle  # noqa: E402
from support.fastvit import FIVE, FOUR, Reference, Shape, sample  # noqa: E402
from support.fastvit_checkpoint import config_of, fold, with_scales, write_fastvit  # noqa: E402
from support.mil_programs import quiet  # noqa: E402
from support.seeded import relative_l2  # noqa: E402

SHAPES = {
    "four stages": FOUR,
    "four stages, averages": with_scales(FOUR, "average", 0, 1, 2),
    "four stages, depthwise": with_scales(FOUR, "depthwise", 2, 0),
    "five stages, averages": with_scales(FIVE, "average", 1, 3),
}
NETWORK = 1e-5  # PyTorch in float32 against float64
CHANGELESS = 1e-6  # powers of two change no mantissa; another order of summation might


def seeded(shape: Shape, edit: Callable[[dict[str, torch.Tensor]], None] = lambda _: None):
    """(config, folded weights, reference), after `edit` changed the reference's weights."""
    reference = Reference(shape)
    reference.features(sample(64, 64))
    edit(reference.weights)
    config = config_of(shape)
    return config, fold(reference.named(), config), reference


def run(network, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])[0].numpy()


@pytest.mark.parametrize("form", ["batched", "split", "sdpa"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_network(kind, form):
    config, weights, reference = seeded(SHAPES[kind])
    pixels = sample(128, 192)
    assert relative_l2(run(build_network(config, weights, form), pixels), reference.features(pixels)) <= NETWORK


@pytest.mark.parametrize("kind", ["four stages", "five stages, averages"])
def test_the_gates(kind, tmp_path):
    """Converted, saved, read back and run op by op: the float32 gate and the float16 one, on two pictures.

    Four stages with pooled ones are below: hot, and from the command line.
    """
    config, weights, _ = seeded(SHAPES[kind])
    size = Size(config.downsampling * 3, config.downsampling * 4)
    options = PackageOptions(sizes=(size,))
    ranges = measure_ranges(config, weights, [sample(size.height, size.width, seed) for seed in range(2)])
    with quiet():
        convert_package(config, weights, tmp_path / "x.mlpackage", options, ranges)
    subject = Subject(tmp_path / "x.mlpackage", config, weights, options, ranges)
    checks = check_package(subject)
    assert [check.executor for check in checks] == ["checker, float32", "checker, float16", "checker, float16"]
    assert all(check.passed for check in checks), describe_checks(checks)


def test_ops_that_the_rules_allow(tmp_path):
    """Averages over 2 at a time; no op of a norm where the norm is folded."""
    config, weights, _ = seeded(SHAPES["four stages, averages"])
    with quiet():
        convert_package(config, weights, tmp_path / "x.mlpackage", PackageOptions(sizes=(Size(64, 64),)), Ranges())
        (found,) = report(tmp_path / "x.mlpackage")
    assert found.eligible_share == 1.0
    assert not {"linear", "layer_norm", "batch_norm", "rsqrt"} & set(found.ops)
    assert found.ops["avg_pool"] == 3 + 2 + 1
    assert not [finding for finding in found.findings if finding.blocks]


def test_a_kernel_that_may_not_run_there_is_reported(tmp_path):
    """Of 16 px, where the first of five stages is pooled by convolution."""
    config, weights, _ = seeded(with_scales(FIVE, "depthwise", 0))
    with quiet():
        convert_package(config, weights, tmp_path / "x.mlpackage", PackageOptions(sizes=(Size(64, 64),)), Ranges())
        (found,) = report(tmp_path / "x.mlpackage")
    assert [finding.rule for finding in found.findings if finding.blocks] == ["large kernel"]


@pytest.mark.parametrize("kind", SHAPES)
def test_every_exponent_changes_nothing(kind):
    """Exponents everywhere at once: of streams, embeddings with squeeze-and-excite, hidden layers, the expansion."""
    config, weights, _ = seeded(SHAPES[kind])
    blocks = [f"stages.{s}.blocks.{b}" for s, depth in enumerate(config.layers) for b in range(depth)]
    stages = range(len(config.layers))
    ranges = Ranges(
        streams={s: s + 1 for s in stages} | {5: 2},
        norms=dict.fromkeys(blocks, 3),
        hidden=dict.fromkeys(blocks, 2)
        | {f"stages.{s}.downsample.{layer}": s for s in stages[1:] for layer in ("depthwise", "pointwise")},
    )
    plain, scaled = (run(build_network(config, weights, "batched", r), sample(128, 192)) for r in (None, ranges))
    assert relative_l2(scaled, plain) <= CHANGELESS


def test_each_parameter_takes_the_power_of_its_place():
    """What FastViTHD doesn't have; test_ranges has the rest."""
    config = config_of(with_scales(FOUR, "depthwise", 1))
    embedding = {"stages.3.downsample.depthwise": 4, "stages.3.downsample.pointwise": 6}
    ranges = Ranges(streams={1: 3, 2: 7, 3: 5, 5: 1}, hidden=embedding)
    expected = {
        "stages.3.downsample.depthwise.weight": 7 - 4,
        "stages.3.downsample.reduce.weight": 4,  # its means are held
        "stages.3.downsample.reduce.bias": 0,
        "stages.3.downsample.expand.weight": 0,
        "stages.3.downsample.pointwise.weight": 4 - 6,
        "stages.3.blocks.0.mixer.qkv.weight": 5,  # no LayerNorm before it
        "stages.3.blocks.0.mixer.qkv.bias": 0,
        "stages.3.blocks.0.mixer.proj.weight": -5,
        "stages.1.pool.weight": 3,  # a feature has its own value
        "stages.1.pool.bias": 0,
        "stages.2.downsample.depthwise.weight": 3,
        "expand.depthwise.weight": 5 - 1,  # stage 3 is the last one
    }
    assert {name: stream_exponent(name, ranges, config) for name in expected} == expected


def make_stage_2_hot(weights: dict[str, torch.Tensor]) -> None:
    """Its stream 2,000 times as large, and what reads it as much smaller."""
    entry = [f"network.3.proj.1.{norm}.{part}" for norm in ("rbr_conv.0.bn", "rbr_skip") for part in ("weight", "bias")]
    reading = [f"network.5.proj.0.{branch}.bn.weight" for branch in ("lkb_origin", "small_conv")]
    weights |= {name: weights[name] * 2.0**11 for name in entry} | {name: weights[name] * 2.0**-11 for name in reading}


@pytest.mark.parametrize("pooling", ["average", "depthwise"])
def test_a_hot_stage_is_held_and_its_pooled_map_is_not(pooling, tmp_path):
    """The map is a feature of its own value, which float16 still holds."""
    config, weights, reference = seeded(with_scales(FOUR, pooling, 2), make_stage_2_hot)
    size = Size(128, 128)
    ranges = measure_ranges(config, weights, [sample(128, 128)])
    assert ranges.streams[2] > 0
    assert 1000 < ranges.maxima["stages.2.pool"] < FLOAT16_MAX
    assert ranges.headroom["stages.2.pool"] == pytest.approx(np.log2(FLOAT16_MAX / ranges.maxima["stages.2.pool"]))
    held = run(build_network(config, weights, "batched", ranges), sample(128, 128))
    assert relative_l2(held, reference.features(sample(128, 128))) <= NETWORK
    options = PackageOptions(sizes=(size,))
    with quiet():
        convert_package(config, weights, tmp_path / "x.mlpackage", options, ranges)
    checks = check_package(Subject(tmp_path / "x.mlpackage", config, weights, options, ranges))
    assert all(check.passed for check in checks), describe_checks(checks)


def test_from_the_command_line(checkpoint, tmp_path, capsys):
    """A trained checkpoint in, a bundle with a package that passed its gates out; sizes of 32."""
    source = write_fastvit(checkpoint("tiny"), tmp_path / "source", Reference(SHAPES["four stages, averages"]))
    argv = [str(source), "-o", str(tmp_path / "b"), "--resolutions", "96,128x160", "--verify"]
    assert main(argv) == 0, capsys.readouterr().err
    opened = Bundle.open(tmp_path / "b")
    assert opened.manifest.coreml
    assert {check.function for check in opened.manifest.coreml.checks} == {"r96", "r128x160"}
    assert all(check.passed for check in opened.manifest.coreml.checks)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["vision"]["multi_scale"]["stages"] == [0, 1, 2]
    assert opened.manifest.changes[2].startswith("MCi2 as a Core ML package")
