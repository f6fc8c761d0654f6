"""Encoders as they are trained, against a reference in float64: names, fusing, folding, and the MLX network.

The reference (tests/support/fastvit.py) runs every branch, batch norm and layer scale by itself.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")

from fastvlm_convert.branches import network_blocks
from fastvlm_convert.schema import vision_names
from fastvlm_mlx.errors import WeightsError
from support.fastvit import FIVE, FOUR, PREFIX, Reference, sample
from support.fastvit_checkpoint import config_of, encoder_of, fold, with_scales
from support.seeded import relative_l2

# Float32 against float64: 6e-7 to 2.5e-6 measured. One lost branch of one block is 0.3 and more.
TOLERANCE = 1e-5
SHAPES = {"four stages": FOUR, "five stages": FIVE}
FORMS = {
    "branches": lambda _: False,
    "fused": lambda _: True,
    "mixed": lambda name: len(name) % 2 == 0 or name.endswith("proj.1"),
}
SIZES = {"four stages": ((128, 128), (96, 160)), "five stages": ((256, 256), (128, 192))}


@cache
def made(kind: str, form: str) -> Reference:
    """The network, its weights drawn."""
    reference = Reference(SHAPES[kind], FORMS[form])
    reference.features(sample(64, 64))
    return reference


@pytest.fixture(scope="module", params=SHAPES)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("form", FORMS)
def test_features_as_trained(kind, form):
    """Squares and rectangles, which tell rows from columns."""
    reference, config = made(kind, form), config_of(SHAPES[kind])
    right = {size: reference.features(sample(*size)) for size in SIZES[kind]}
    encoder = encoder_of(fold(reference.named(), config), config)
    for size, features in right.items():
        found = encoder.encode(sample(*size)[None])[0]
        assert found.shape == features.shape == (size[0] * size[1] // config.downsampling**2, config.feature_dim)
        assert relative_l2(found, features) <= TOLERANCE


def test_the_forms_are_what_they_say(kind):
    """The mixed one has blocks of every sort in either form."""
    counts = {}
    for form in FORMS:
        names = vision_names(made(kind, form).named())
        blocks = network_blocks(config_of(SHAPES[kind]), names)
        counts[form] = {fused: [n for n, b in blocks.items() if b.is_fused(names) == fused] for fused in (True, False)}
    assert not counts["branches"][True]
    assert not counts["fused"][False]
    for sort in ("patch_embed", "token_mixer", "proj.0"):
        assert any(sort in name for name in counts["mixed"][True] + counts["mixed"][False])
    assert len(counts["mixed"][True]) > 2
    assert len(counts["mixed"][False]) > 2


@pytest.mark.parametrize(
    "branch",
    [
        "patch_embed.0.rbr_scale",
        "patch_embed.2.rbr_skip",
        "network.1.proj.0.small_conv",
        "network.2.0.token_mixer.norm",
    ],
)
def test_each_branch_counts(branch):
    """The measure sees what is lost with one branch: its batch norm is made to give 0."""
    reference, config = Reference(FOUR), config_of(FOUR)
    right = reference.features(sample(128, 128))
    tensors = reference.named()
    norms = [n for n in tensors if n.startswith(PREFIX + branch) and n.endswith(("bias", "running_mean", "weight"))]
    assert norms
    lost = tensors | {name: np.zeros_like(tensors[name]) for name in norms}
    found = encoder_of(fold(lost, config), config).encode(sample(128, 128)[None])[0]
    assert relative_l2(found, right) > 0.1


def test_several_equal_branches():
    """MobileOne may train any number of them; two halves of a kernel are the kernel."""
    reference, config = Reference(FOUR), config_of(FOUR)
    right = reference.features(sample(128, 128))
    tensors = reference.named()
    first = f"{PREFIX}network.0.0.token_mixer.mixer.rbr_conv.0."
    second = {n.replace("rbr_conv.0", "rbr_conv.1"): v for n, v in tensors.items() if n.startswith(first)}
    halves = {f"{first}bn.weight": tensors[f"{first}bn.weight"] / 2, f"{first}bn.bias": tensors[f"{first}bn.bias"] / 2}
    both = tensors | second | halves | {n.replace("rbr_conv.0", "rbr_conv.1"): v for n, v in halves.items()}
    found = encoder_of(fold(both, config), config).encode(sample(128, 128)[None])[0]
    assert relative_l2(found, right) <= TOLERANCE


@pytest.mark.parametrize("pooling", ["average", "depthwise"])
@pytest.mark.parametrize(
    "kind_stages", [("four stages", (0, 2)), ("five stages", (3, 1, 0)), ("five stages", (0, 1, 2, 3))]
)
def test_multi_scale_features(pooling, kind_stages):
    """Pooled maps after the expanded last one, in the order of the config, which needn't be theirs."""
    name, stages = kind_stages
    shape = with_scales(SHAPES[name], pooling, *stages)
    reference, config = Reference(shape), config_of(shape)
    size = SIZES[name][1]
    right = reference.features(sample(*size))
    found = np.array(encoder_of(fold(reference.named(), config), config).encode(sample(*size)[None])[0])
    assert found.shape[1] == config.feature_dim == 2 * shape.dims[-1] + sum(shape.dims[stage] for stage in stages)
    ends = np.cumsum([2 * shape.dims[-1], *(shape.dims[stage] for stage in stages)])
    for begin, end in zip([0, *ends], ends, strict=False):  # each by itself: the largest would hide the others
        assert relative_l2(found[:, begin:end], right[:, begin:end]) <= TOLERANCE


def refused(tensors: dict[str, np.ndarray], config) -> str:
    with pytest.raises(WeightsError) as caught:
        fold(tensors, config)
    return str(caught.value)


@pytest.fixture(scope="module")
def trained() -> dict[str, np.ndarray]:
    reference = Reference(FOUR)
    reference.features(sample(64, 64))
    return reference.named()


@pytest.mark.parametrize(
    "lost",
    [
        ["patch_embed.0.rbr_scale.conv.weight"],
        ["patch_embed.2.rbr_skip.running_var"],
        ["network.1.proj.0.small_conv.bn.bias", "network.1.proj.0.small_conv.conv.weight"],
        ["network.0.0.token_mixer.norm.rbr_skip.weight"],
        ["network.0.0.token_mixer.layer_scale"],
        ["network.6.pe.bias"],
        ["network.3.proj.0.se.fc2.weight"],
        ["network.7.0.norm.running_mean"],
    ],
)
def test_missing_branches_are_named(trained, lost):
    left = {name: value for name, value in trained.items() if name.removeprefix(PREFIX) not in lost}
    found = refused(left, config_of(FOUR))
    assert f"missing ({len(lost)})" in found
    assert all(PREFIX + name in found for name in lost)
    assert "unexpected" not in found


def test_a_gap_between_equal_branches_is_named(trained):
    name = f"{PREFIX}conv_exp.rbr_conv.2.conv.weight"
    found = refused(trained | {name: trained[name.replace("conv.2", "conv.0")]}, config_of(FOUR))
    assert f"{PREFIX}conv_exp.rbr_conv.1.conv.weight" in found
    assert f"{PREFIX}conv_exp.rbr_conv.2.bn.weight" in found


def test_a_convolution_in_both_forms_is_refused(trained):
    name = f"{PREFIX}conv_exp.reparam_conv."
    both = trained | {f"{name}weight": np.zeros((256, 1, 3, 3), np.float32), f"{name}bias": np.zeros(256, np.float32)}
    assert f"unexpected (10): {PREFIX}conv_exp.rbr_conv.0.bn.bias" in refused(both, config_of(FOUR))


def test_a_branch_of_another_shape_is_named(trained):
    name = f"{PREFIX}network.1.proj.0.small_conv.conv.weight"
    found = refused(trained | {name: np.zeros((32, 1, 5, 5), np.float32)}, config_of(FOUR))
    assert f"wrong shape (1): {name} (32, 1, 5, 5) instead of (32, 1, 3, 3)" in found


def test_the_stem_of_fastvithd_has_no_scale_branch():
    """It is trained without; a checkpoint that has one is another encoder's."""
    reference = Reference(dataclasses.replace(FIVE, stem_scales=True))
    reference.features(sample(64, 64))
    found = refused(reference.named(), config_of(FIVE))
    assert f"unexpected (10): {PREFIX}patch_embed.0.rbr_scale.bn.bias" in found


def test_weights_of_the_pooling_that_are_missing_are_named():
    reference = Reference(with_scales(FOUR, "average", 1, 2))
    reference.features(sample(64, 64))
    found = refused(reference.named(), config_of(with_scales(FOUR, "depthwise", 1, 2)))
    assert "missing (4)" in found
    assert all(f"{PREFIX}multi_scale.{stage}.{part}" in found for stage in (1, 2) for part in ("weight", "bias"))
