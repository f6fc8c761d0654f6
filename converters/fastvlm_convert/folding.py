"""Fold the vision encoder for inference, tensor by tensor, in float64.

Batch norm goes into the 7x7 convolution before it, or where it stands before attention into qkv; layer scales go into
the last matrix of their branch, LayerNorm's affine into qkv, the branches that a convolution is trained as into one
kernel (fastvlm_convert.branches), and the 1/255 of the preprocessing into the stem (exact: the mean is 0, and padding
is 0 before and after). In real arithmetic nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.branches import (
    BATCH_NORM,
    Parameter,
    batch_norm_affine,
    network_blocks,
    parameters,
    stage_indices,
    stored,
)
from fastvlm_convert.families import FAMILIES
from fastvlm_convert.keymap import VISION
from fastvlm_convert.schema import vision_names
from fastvlm_mlx.config import VisionConfig

Array = np.ndarray
PIXEL_MAX = 255.0


@dataclass(frozen=True, slots=True)
class Folded:
    """One tensor of the run time's encoder: its name, its sources, and how it comes from them.

    `exact` says that the values are the source's own, only laid out anew, so the source's dtype holds them.
    """

    name: str
    sources: tuple[str, ...]
    fold: Callable[[Sequence[Array]], Array]
    exact: bool


def fold_vision(config: VisionConfig, names: Collection[str] = ()) -> list[Folded]:
    """What vision.safetensors holds, in the order of the network.

    Args:
        config: the encoder's shape.
        names: of the checkpoint's tensors (LLaVA's), which say what of it is fused; as in `schema.vision_shapes`.
    """
    there = vision_names(names)
    pairs = {name: parameters(block, there) for name, block in network_blocks(config, there).items()}
    out = [
        *_convolution("stem.conv", pairs["patch_embed.0"], pixel_scale=True),
        *_convolution("stem.depthwise", pairs["patch_embed.1"]),
        *_pointwise("stem.pointwise", pairs["patch_embed.2"]),
    ]
    for stage, embed, position, blocks in stage_indices(config):
        if embed is not None:
            target, source = f"stages.{stage}.downsample", f"network.{embed}.proj"
            out += _convolution(f"{target}.depthwise", pairs[f"{source}.0"])
            if config.squeezes(stage):
                out += _matrix(f"{target}.reduce", f"{source}.0.se.fc1")
                out += _matrix(f"{target}.expand", f"{source}.0.se.fc2")
            out += _pointwise(f"{target}.pointwise", pairs[f"{source}.1"])
        if position is not None:
            out += _convolution(f"stages.{stage}.position", pairs[f"network.{position}"])
        for block in range(config.layers[stage]):
            target, source = f"stages.{stage}.blocks.{block}", f"network.{blocks}.{block}"
            if position is None:
                out += _convolution(f"{target}.mixer", pairs[f"{source}.token_mixer"])
                out += _ffn(f"{target}.ffn", f"{source}.convffn", f"{source}.layer_scale")
            else:
                out += _attention(f"{target}.mixer", source, config.norm)
                out += _ffn(f"{target}.ffn", f"{source}.convffn", f"{source}.layer_scale_2")
        if config.pools(stage) and config.multi_scale and config.multi_scale.pooling == "depthwise":
            out += _convolution(
                f"stages.{stage}.pool", stored(f"multi_scale.{stage}.weight", f"multi_scale.{stage}.bias")
            )
    out += _convolution("expand.depthwise", pairs["conv_exp"])
    out += _matrix("expand.reduce", "conv_exp.se.reduce")
    out += _matrix("expand.expand", "conv_exp.se.expand")
    return [Folded(f.name, tuple(VISION + s for s in f.sources), f.fold, f.exact) for f in out]


def describe_folding(config: VisionConfig, names: Collection[str]) -> str:
    """What `fold_vision` does, in words; arguments as there."""
    there = vision_names(names)
    fused = all(block.is_fused(there) for block in network_blocks(config, there).values())
    folded = ["batch norm", "layer scale", "1/255"]
    if config.norm == "layer":
        folded.insert(2, "LayerNorm affine")
    if not fused:
        folded.insert(0, "branches of training")
    return f"{FAMILIES[config.family].title} folded: {', '.join(folded)}; convolutions channels last"


def channels_last(weight: Array) -> Array:
    """A convolution's (O, I, kh, kw) -> (O, kh, kw, I)."""
    return weight.transpose(0, 2, 3, 1)


def matrix(weight: Array) -> Array:
    """A 1x1 convolution's (O, I, 1, 1) -> (O, I)."""
    return weight.reshape(weight.shape[:2])


def _convolution(target: str, pair: tuple[Parameter, Parameter], pixel_scale: bool = False) -> list[Folded]:
    weight, bias = pair
    factor = PIXEL_MAX if pixel_scale else 1.0

    def scaled(tensors: Sequence[Array]) -> Array:
        return channels_last(weight.make(tensors) / factor)

    return [
        Folded(f"{target}.weight", weight.sources, scaled, exact=weight.exact and not pixel_scale),
        Folded(f"{target}.bias", bias.sources, bias.make, bias.exact),
    ]


def _pointwise(target: str, pair: tuple[Parameter, Parameter]) -> list[Folded]:
    """A 1x1 convolution that may be in branches, as a matrix."""
    weight, bias = pair
    return [
        Folded(f"{target}.weight", weight.sources, lambda t: matrix(weight.make(t)), weight.exact),
        Folded(f"{target}.bias", bias.sources, bias.make, bias.exact),
    ]


def _matrix(target: str, source: str, scale: str | None = None) -> list[Folded]:
    """A 1x1 convolution or linear layer; `scale` is the layer scale of its output channels."""
    if scale is None:
        return _pointwise(target, stored(f"{source}.weight", f"{source}.bias"))
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
        gain, _ = batch_norm_affine(tensors[1:])
        return channels_last(tensors[0] * gain.reshape(-1, 1, 1, 1))

    def bias(tensors: Sequence[Array]) -> Array:
        return batch_norm_affine(tensors)[1]

    return [
        Folded(f"{target}.depthwise.weight", (f"{source}.conv.conv.weight", *norm), weight, exact=False),
        Folded(f"{target}.depthwise.bias", norm, bias, exact=False),
        *_matrix(f"{target}.fc1", f"{source}.fc1"),
        *_matrix(f"{target}.fc2", f"{source}.fc2", scale),
    ]


def _attention(target: str, source: str, norm: str) -> list[Folded]:
    """The qkv matrix with what the norm before it has of its own; proj with the layer scale after it.

    Of a LayerNorm that is the affine, a batch norm goes into the matrix altogether.
    """
    qkv = f"{source}.token_mixer.qkv.weight"
    parts = tuple(f"{source}.norm.{part}" for part in (BATCH_NORM if norm == "batch" else BATCH_NORM[:2]))
    affine: Callable[[Sequence[Array]], Sequence[Array]] = batch_norm_affine if norm == "batch" else tuple

    def weight(tensors: Sequence[Array]) -> Array:
        scaled: Array = tensors[0] * affine(tensors[1:])[0]
        return scaled

    def bias(tensors: Sequence[Array]) -> Array:
        shifted: Array = tensors[0] @ affine(tensors[1:])[1]
        return shifted

    return [
        Folded(f"{target}.qkv.weight", (qkv, *parts), weight, exact=False),
        Folded(f"{target}.qkv.bias", (qkv, *parts), bias, exact=False),
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
