"""Folded FastViTHD as tensors of a checkpoint again: what a network that computes norms and scales makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm_convert import unfolding
from fastvlm_convert.folding import fold_vision
from fastvlm_convert.keymap import VISION
from fastvlm_convert.schema import vision_shapes
from fastvlm_convert.unfolding import split_bias, unfold_vision
from support.folded import folded_vision

Array = np.ndarray
DIM, HEADS, TOKENS = 48, 3, 10
# What is made differs from the folded weights, which are float32, by their rounding.
ROUNDING = 1e-6
RNG = np.random.default_rng(7)


def unfolded(weights: dict[str, Array], config: object) -> dict[str, Array]:
    """Everything that `unfold_vision` makes, as float32 holds it."""
    out: dict[str, Array] = {}
    for part in unfold_vision(config):
        made = part.make([weights[name].astype(np.float64) for name in part.sources])
        out |= {n: v.astype(np.float32) for n, v in zip(part.names, made, strict=True)}
    return out


def test_all_tensors_and_folded_again(checkpoint):
    config, weights = folded_vision(checkpoint("tiny"))
    made = unfolded(weights, config)
    assert {name: value.shape for name, value in made.items()} == vision_shapes(config)
    computed = ("stem.conv.weight", "qkv.bias", "proj.bias")
    for folded in fold_vision(config):
        again = folded.fold([made[name].astype(np.float64) for name in folded.sources]).astype(np.float32)
        if folded.name.endswith(computed):
            assert np.linalg.norm(again - weights[folded.name]) <= ROUNDING * np.linalg.norm(weights[folded.name])
        else:
            assert np.array_equal(again, weights[folded.name]), folded.name


def test_norms_and_scales_change_nothing(checkpoint):
    """By hand, in float32 as a runtime computes them: the epsilon of a batch norm is not seen beside the variance."""
    config, weights = folded_vision(checkpoint("tiny"))
    made = unfolded(weights, config)
    norm = VISION + "network.0.0.convffn.conv.bn."
    values = RNG.normal(size=(5, config.embed_dims[0])).astype(np.float32)
    gain, mean, variance = (made[norm + part] for part in ("weight", "running_mean", "running_var"))
    found = (values - mean) / np.sqrt(variance + np.float32(1e-5)) * gain
    assert np.array_equal(found, values)
    assert np.array_equal(made[norm + "bias"], weights["stages.0.blocks.0.ffn.depthwise.bias"])
    scales = [value for name, value in made.items() if ".layer_scale" in name]
    assert len(scales) == sum(config.layers) + sum(n for i, n in enumerate(config.layers) if config.attends(i))
    assert all((scale == 1).all() for scale in scales)
    stem = made[VISION + "patch_embed.0.reparam_conv.weight"].transpose(0, 2, 3, 1)
    assert np.allclose(stem, weights["stem.conv.weight"] * 255, rtol=ROUNDING, atol=0)


def attention(x: Array, qkv: Array, bias: Array, proj: Array, proj_bias: Array) -> Array:
    """(TOKENS, DIM) -> the same, in float64."""
    q, k, v = (x @ qkv.T + bias).reshape(TOKENS, 3, HEADS, DIM // HEADS).transpose(1, 2, 0, 3)
    scores = q @ k.transpose(0, 2, 1) * (DIM // HEADS) ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return mixed.transpose(1, 0, 2).reshape(TOKENS, DIM) @ proj.T + proj_bias


def parts(bias: Array | None = None) -> tuple[Array, Array, Array, Array]:
    """qkv with columns of very different sizes, its bias, proj and proj's bias."""
    gains = 10.0 ** RNG.uniform(-3, 1, DIM)
    qkv, shift = RNG.normal(size=(3 * DIM, DIM)), RNG.normal(size=DIM)
    given = qkv @ shift if bias is None else bias
    return qkv * gains, given, RNG.normal(size=(DIM, DIM)) / 7, RNG.normal(size=DIM)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_same_attention_without_a_bias(rounded):
    """Of a bias that came from a shift, and of one that bfloat16 has rounded, which no shift alone gives."""
    qkv, bias, proj, proj_bias = parts()
    if rounded:
        bias = bias * (1 + RNG.uniform(-(2.0**-9), 2.0**-9, bias.shape))
    gain, shift, matrix, moved = split_bias(qkv, bias, proj, proj_bias)
    assert np.array_equal(matrix * gain, qkv)
    assert set(np.frexp(gain)[0]) == {0.5}
    x = RNG.normal(size=(TOKENS, DIM))
    right = attention(x, qkv, bias, proj, proj_bias)
    found = attention(x * gain + shift, matrix, np.zeros(3 * DIM), proj, moved)
    assert np.linalg.norm(found - right) <= ROUNDING * np.linalg.norm(right)
    assert np.allclose(moved, proj_bias, atol=1e-5) != rounded  # only a rounded bias has something left


def test_no_bias_no_shift():
    qkv, _, proj, proj_bias = parts()
    _, shift, _, moved = split_bias(qkv, np.zeros(3 * DIM), proj, proj_bias)
    assert not shift.any()
    assert np.array_equal(moved, proj_bias)


def test_a_bias_that_no_shift_gives(checkpoint):
    qkv, bias, proj, proj_bias = parts()
    qkv[0] = 0
    with pytest.raises(ValueError, match="of q's bias is left"):
        split_bias(qkv, bias, proj, proj_bias)
    config, weights = folded_vision(checkpoint("tiny"))
    weights["stages.3.blocks.0.mixer.qkv.weight"][0] = 0
    weights["stages.3.blocks.0.mixer.qkv.bias"][0] = 1
    with pytest.raises(unfolding.CheckpointError, match=r"stages.3.blocks.0.mixer.qkv.bias can't be written"):
        unfolded(weights, config)
