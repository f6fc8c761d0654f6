"""Fold FastViTHD for inference, tensor by tensor, in float64.

Batch norm goes into the 7x7 convolution before it, layer scales into the last matrix of their branch,
LayerNorm's affine into qkv, and the 1/255 of the preprocessing into the stem (exact: the mean is 0, and
padding is 0 before and after). In real arithmetic nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.keymap import VISION
from fastvlm_convert.schema import BATCH_NORM, stage_indices
from fastvlm_mlx.config import VisionConfig

Array = np.ndarray
BATCH_NORM_EPS = 1e-5
PIXEL_MAX = 255.0


@dataclass(frozen=True, slots=True)
class Folded:
    """One tensor of the run time's FastViTHD: its name, its sources, and how it comes from them.

    `exact` says that the values are the source's own, only laid out anew, so the source's dtype holds them.
    """

    name: str
    sources: tuple[str, ...]
    fold: Callable[[Sequence[Array]], Array]
    exact: bool


def fold_vision(config: VisionConfig) -> list[Folded]:
    """What vision.safetensors holds, in the order of the network."""
    out = [
        *_convolution("stem.conv", "patch_embed.0.reparam_conv", pixel_scale=True),
        *_convolution("stem.depthwise", "patch_embed.1.reparam_conv"),
        *_matrix("stem.pointwise", "patch_embed.2.reparam_conv"),
    ]
    for stage, embed, position, blocks in stage_indices(config):
        if embed is not None:
            out += _convolution(f"stages.{stage}.downsample.depthwise", f"network.{embed}.proj.0.lkb_reparam")
            out += _matrix(f"stages.{stage}.downsample.pointwise", f"network.{embed}.proj.1.reparam_conv")
        if position is not None:
            out += _convolution(f"stages.{stage}.position", f"network.{position}.reparam_conv")
        for block in range(config.layers[stage]):
            target, source = f"stages.{stage}.blocks.{block}", f"network.{blocks}.{block}"
            if position is None:
                out += _convolution(f"{target}.mixer", f"{source}.token_mixer.reparam_conv")
                out += _ffn(f"{target}.ffn", f"{source}.convffn", f"{source}.layer_scale")
            else:
                out += _attention(f"{target}.mixer", source)
                out += _ffn(f"{target}.ffn", f"{source}.convffn", f"{source}.layer_scale_2")
    out += _convolution("expand.depthwise", "conv_exp.reparam_conv")
    out += _matrix("expand.reduce", "conv_exp.se.reduce")
    out += _matrix("expand.expand", "conv_exp.se.expand")
    return [Folded(f.name, tuple(VISION + s for s in f.sources), f.fold, f.exact) for f in out]


def channels_last(weight: Array) -> Array:
    """A convolution's (O, I, kh, kw) -> (O, kh, kw, I)."""
    return weight.transpose(0, 2, 3, 1)


def matrix(weight: Array) -> Array:
    """A 1x1 convolution's (O, I, 1, 1) -> (O, I)."""
    return weight.reshape(weight.shape[:2])


def _same(tensors: Sequence[Array]) -> Array:
    return tensors[0]


def _convolution(target: str, source: str, pixel_scale: bool = False) -> list[Folded]:
    def weight(tensors: Sequence[Array]) -> Array:
        return channels_last(tensors[0] / PIXEL_MAX if pixel_scale else tensors[0])

    return [
        Folded(f"{target}.weight", (f"{source}.weight",), weight, exact=not pixel_scale),
        Folded(f"{target}.bias", (f"{source}.bias",), _same, exact=True),
    ]


def _matrix(target: str, source: str, scale: str | None = None) -> list[Folded]:
    """A 1x1 convolution or linear layer; `scale` is the layer scale of its output channels."""
    if scale is None:
        return [
            Folded(f"{target}.weight", (f"{source}.weight",), lambda t: matrix(t[0]), exact=True),
            Folded(f"{target}.bias", (f"{source}.bias",), _same, exact=True),
        ]
    return [
        Folded(
            f"{target}.weight",
            (f"{source}.weight", scale),
            lambda t: matrix(t[0]) * t[1].reshape(-1, 1),
            exact=False,
        ),
        Folded(f"{target}.bias", (f"{source}.bias", scale), lambda t: t[0] * t[1].reshape(-1), exact=False),
    ]


def _ffn(target: str, source: str, scale: str) -> list[Folded]:
    """7x7 convolution with its batch norm, fc1, and fc2 with the layer scale."""
    norm = tuple(f"{source}.conv.bn.{part}" for part in BATCH_NORM)

    def weight(tensors: Sequence[Array]) -> Array:
        kernel, gamma, _, _, variance = tensors
        return channels_last(kernel * _gain(gamma, variance).reshape(-1, 1, 1, 1))

    def bias(tensors: Sequence[Array]) -> Array:
        gamma, beta, mean, variance = tensors
        shifted: Array = beta - mean * _gain(gamma, variance)
        return shifted

    return [
        Folded(f"{target}.depthwise.weight", (f"{source}.conv.conv.weight", *norm), weight, exact=False),
        Folded(f"{target}.depthwise.bias", norm, bias, exact=False),
        *_matrix(f"{target}.fc1", f"{source}.fc1"),
        *_matrix(f"{target}.fc2", f"{source}.fc2", scale),
    ]


def _gain(gamma: Array, variance: Array) -> Array:
    gain: Array = gamma / np.sqrt(variance + BATCH_NORM_EPS)
    return gain


def _attention(target: str, source: str) -> list[Folded]:
    """The qkv matrix with LayerNorm's affine before it; proj with the layer scale after it."""
    qkv, norm = f"{source}.token_mixer.qkv.weight", f"{source}.norm"
    return [
        Folded(f"{target}.qkv.weight", (qkv, f"{norm}.weight"), lambda t: t[0] * t[1], exact=False),
        Folded(f"{target}.qkv.bias", (qkv, f"{norm}.bias"), lambda t: t[0] @ t[1], exact=False),
        *_matrix(f"{target}.proj", f"{source}.token_mixer.proj", f"{source}.layer_scale_1"),
    ]


def fold_attention_scale(weights: dict[str, Array], head_dim: int, scale_q: bool) -> dict[str, Array]:
    """Fold what the Neural Engine's attention need not compute.

    The bias of k cancels in the softmax; that of v passes through it (the weights sum to 1) into proj's bias;
    1 / sqrt(head_dim) goes into q, unless the attention op scales by itself.

    Args:
        weights: folded weights, float32 or float64; a changed copy is returned.
        head_dim: channels per head.
        scale_q: fold the scale into q.
    """
    out = dict(weights)
    for name in [n for n in weights if n.endswith(".mixer.qkv.weight")]:
        block = name.removesuffix("qkv.weight")
        weight, bias = (out[f"{block}qkv.{part}"].astype(np.float64) for part in ("weight", "bias"))
        dim = weight.shape[1]
        out[f"{block}proj.bias"] = out[f"{block}proj.bias"] + out[f"{block}proj.weight"] @ bias[2 * dim :]
        bias = np.concatenate([bias[:dim], np.zeros(2 * dim)])
        if scale_q:
            weight[:dim] *= head_dim**-0.5
            bias = bias * head_dim**-0.5
        out[f"{block}qkv.weight"], out[f"{block}qkv.bias"] = weight, bias
    return out
