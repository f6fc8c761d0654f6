"""FastViTHD in another runtime's folder: a checkpoint's own tensors, or a bundle's folded ones unfolded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from fastvlm_convert.export_source import FOLDED
from fastvlm_convert.inverse import own_name, own_order, own_shape
from fastvlm_convert.keymap import VISION, Layout, Tensor
from fastvlm_convert.mlx_weights import Output, TensorSpec
from fastvlm_convert.schema import vision_shapes
from fastvlm_convert.source import DTYPES, Checkpoint
from fastvlm_convert.unfolding import Unfolded, unfold_vision
from fastvlm_mlx.config import VisionConfig

CLIP_HEAD = VISION + "head.proj"  # in published checkpoints, and unused
CLIP_CHANNELS = 768


def plan_tower(
    layout: Layout, tensors: Mapping[str, Tensor], config: VisionConfig, dtype: mx.Dtype | None
) -> list[Output]:
    """What model.safetensors holds of FastViTHD.

    Args:
        layout: its names and orders.
        tensors: LLaVA name -> source tensor; of a bundle, FOLDED + the bundle's name.
        config: the encoder's shape.
        dtype: what all of it is cast to; None keeps each tensor's own, with float32 for float16 and what is computed.
    """
    names = vision_shapes(config)
    if is_folded(tensors):
        some, outputs = f"{FOLDED}stem.conv.bias", [_unfolded(u, tensors, layout, names, dtype)
                                                    for u in unfold_vision(config)]  # fmt: skip
    else:
        some, outputs = next(iter(names)), [_copied(name, tensors[name], layout, dtype) for name in names]
    if CLIP_HEAD in tensors:
        return [*outputs, _copied(CLIP_HEAD, tensors[CLIP_HEAD], layout, dtype)]
    # mlx-vlm wants one, and doesn't use it; made when `some` is at hand.
    kept, shape = dtype or mx.bfloat16, (config.feature_dim, CLIP_CHANNELS)
    spec = TensorSpec(str(own_name(CLIP_HEAD, layout)), shape, kept)
    return [*outputs, Output((spec,), (some,), lambda _: (mx.zeros(shape, kept),))]


def is_folded(names: Mapping[str, object]) -> bool:
    """Whether FastViTHD's tensors are a bundle's."""
    return any(name.startswith(FOLDED) for name in names)


def clip_head(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """CLIP's head where the source has one, which reading drops."""
    for source, stored in checkpoint.tensors.items():
        if source.endswith(".head.proj") and len(stored.shape) == 2:
            return {CLIP_HEAD: Tensor(CLIP_HEAD, source, stored.shape, stored.dtype)}
    return {}


def _kept(tensor: Tensor) -> mx.Dtype:
    """Stored in float16 the tower would run in float16, and overflow with the published weights."""
    stored = DTYPES[tensor.dtype]
    return mx.float32 if stored == mx.float16 else stored


def _copied(name: str, tensor: Tensor, layout: Layout, dtype: mx.Dtype | None) -> Output:
    """One of FastViTHD's tensors in a layout's order."""
    order, kept = own_order(name, len(tensor.shape), layout), dtype or _kept(tensor)
    spec = TensorSpec(str(own_name(name, layout)), own_shape(name, tensor.shape, layout), kept)

    def make(sources: Sequence[mx.array]) -> tuple[mx.array]:
        return (order(sources[0].astype(kept)),)

    return Output((spec,), (name,), make)


def _unfolded(
    part: Unfolded,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: mx.Dtype | None,
) -> Output:
    """Tensors that a bundle has folded, in a layout's order."""
    sources = tuple(FOLDED + name for name in part.sources)
    kept = [dtype or (_kept(tensors[sources[0]]) if exact else mx.float32) for exact in part.exact]
    orders = [own_order(name, len(shapes[name]), layout) for name in part.names]
    specs = tuple(
        TensorSpec(str(own_name(name, layout)), own_shape(name, shapes[name], layout), kind)
        for name, kind in zip(part.names, kept, strict=True)
    )

    def make(values: Sequence[mx.array]) -> list[mx.array]:
        made = part.make([np.array(value.astype(mx.float32)).astype(np.float64) for value in values])
        arrays = (mx.array(np.ascontiguousarray(value, np.float32)) for value in made)
        return [order(array.astype(kind)) for array, kind, order in zip(arrays, kept, orders, strict=True)]

    return Output(specs, sources, make)
