"""FastViTHD in MLX, channels last, for any multiple of 64 pixels; and FastViT, for any of 32.

FastViTHD has five stages and 64x downsampling, FastViT (MobileCLIP's MCi0, MCi1, MCi2) four and 32x, squeeze-and-excite
in its last patch embeddings, and batch norm where FastViTHD has LayerNorm.

The weights are folded by the converter (fastvlm_convert.folding): batch norm into the 7x7 convolutions,
layer scales into the last matrix of each branch, the norm's affine into qkv, 1/255 into the stem. What is
left here is convolutions, matrices, GELU and softmax; 1x1 convolutions are matrices.

Source: FastVLM (arXiv 2412.13303), section 3.2; block order and shapes as in apple/ml-fastvlm 592b4ad,
llava/model/multimodal_encoder/mobileclip/mci.py, and apple/ml-mobileclip, mobileclip/models/mci.py.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fastvlm_mlx.config import VisionConfig, check_side
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.vision.depthwise import DepthwiseConv
from fastvlm_mlx.vision.gelu import gelu
from fastvlm_mlx.vision.pooling import make_pool

NORM_EPS = 1e-5
BATCH_PIXELS = 4 << 20  # four tiles of 1024 px: memory grows with what is encoded at once, not with the grid


class ConvFFN(nn.Module):
    """7x7 depthwise convolution, then an MLP per pixel; the residual is added outside."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim, dim, 7)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.fc2(gelu(self.fc1(self.depthwise(x))))


class RepMixerBlock(nn.Module):
    """Token mixing by a 3x3 depthwise convolution (identity branch folded in), then the ConvFFN."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mixer = DepthwiseConv(dim, dim, 3)
        self.ffn = ConvFFN(dim, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = self.mixer(x)
        return x + self.ffn(x)


class Attention(nn.Module):
    """Multi-head self-attention over all pixels of the map, heads of `head_dim` channels."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self._head_dim = head_dim

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H, W, C)."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x.reshape(batch, height * width, dim))
        qkv = qkv.reshape(batch, height * width, 3, -1, self._head_dim).transpose(2, 0, 3, 1, 4)
        y = mx.fast.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], scale=self._head_dim**-0.5)
        return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, height, width, dim))


class AttentionBlock(nn.Module):
    """Attention over LayerNorm's output (its affine folded into qkv), then the ConvFFN.

    Without `normalizes` there is no LayerNorm: a batch norm is in qkv altogether.
    """

    def __init__(self, dim: int, hidden: int, head_dim: int, normalizes: bool = True) -> None:
        super().__init__()
        self._normalizes = normalizes
        self.mixer = Attention(dim, head_dim)
        self.ffn = ConvFFN(dim, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.mixer(mx.fast.layer_norm(x, None, None, NORM_EPS) if self._normalizes else x)
        return x + self.ffn(x)


def excite(x: mx.array, reduce: nn.Linear, expand: nn.Linear) -> mx.array:
    """Scale each channel of (B, H, W, C) by a gate that its means over the map decide."""
    return x * mx.sigmoid(expand(nn.relu(reduce(x.mean(axis=(1, 2), keepdims=True)))))


class PatchEmbed(nn.Module):
    """Halve the map; the published models double the channels. Some squeeze to `squeezed` channels and excite."""

    def __init__(self, before: int, dim: int, squeezed: int | None = None) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(before, dim, 7, stride=2)
        if squeezed:
            self.reduce, self.expand = nn.Linear(dim, squeezed), nn.Linear(squeezed, dim)
        self.pointwise = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H / 2, W / 2, C')."""
        x = self.depthwise(x)
        if "reduce" in self:
            x = excite(x, self.reduce, self.expand)
        return gelu(self.pointwise(gelu(x)))


class Stem(nn.Module):
    """Pixels 0-255 to a map of a quarter of the side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dim, 3, stride=2, padding=1)
        self.depthwise = DepthwiseConv(dim, dim, 3, stride=2)
        self.pointwise = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, 3) -> (B, H / 4, W / 4, C)."""
        return gelu(self.pointwise(gelu(self.depthwise(gelu(self.conv(x))))))


class Stage(nn.Module):
    """Patch embedding (not in the first stage), positional convolution (in those that attend), blocks.

    `pool` isn't one of its steps: it brings the stage's map to the last one's size, where it is a feature too.
    """

    def __init__(self, config: VisionConfig, index: int) -> None:
        super().__init__()
        dim, hidden = config.embed_dims[index], config.embed_dims[index] * config.mlp_ratio
        attends = config.attends(index)
        if index:
            squeezed = config.squeezed_dim(index) if config.squeezes(index) else None
            self.downsample = PatchEmbed(config.embed_dims[index - 1], dim, squeezed)
        if attends:
            self.position = DepthwiseConv(dim, dim, 7)
        self.blocks: list[nn.Module] = [
            AttentionBlock(dim, hidden, config.head_dim, config.norm == "layer")
            if attends
            else RepMixerBlock(dim, hidden)
            for _ in range(config.layers[index])
        ]
        if config.pools(index):
            self.pool = make_pool(config, index)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H / 2, W / 2, C'), or the same shape in the first stage."""
        for step in [self.get("downsample"), self.get("position"), *self.blocks]:
            x = step(x) if step is not None else x
        return x


class Expand(nn.Module):
    """Double the channels with a 3x3 depthwise convolution, then squeeze-and-excite."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(dim, 2 * dim, 3)
        self.reduce = nn.Linear(2 * dim, 2 * dim // 16)
        self.expand = nn.Linear(2 * dim // 16, 2 * dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H, W, 2 C)."""
        return gelu(excite(self.depthwise(x), self.reduce, self.expand))


class FastViTHD(nn.Module):
    """The encoder's graph: (B, H, W, 3) pixels 0-255 -> (B, H / D, W / D, C), D being `config.downsampling`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.stem = Stem(config.embed_dims[0])
        self.stages = [Stage(config, i) for i in range(len(config.layers))]
        self.expand = Expand(config.embed_dims[-1])
        self.downsampling = config.downsampling
        self._pooled = config.multi_scale.stages if config.multi_scale else ()

    def __call__(self, x: mx.array) -> mx.array:
        """Run all stages; pooled maps come after the expanded last one, on the channels."""
        x = self.stem(x)
        pooled = {}
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self._pooled:
                pooled[index] = stage.pool(x)
        x = self.expand(x)
        return mx.concatenate([x, *(pooled[index] for index in self._pooled)], axis=-1) if pooled else x


class MLXVisionEncoder:
    """The encoder on MLX's default device; implements `fastvlm_mlx.vision.base.Encoder`.

    A batch of more than BATCH_PIXELS is encoded in parts, which bounds the memory.

    Args:
        network: with its folded weights loaded.
        dtype: of weights and activations: float32, or bfloat16. Not float16: the published weights reach
            6e4 in stage 5 and overflow there.
    """

    def __init__(self, network: FastViTHD, dtype: mx.Dtype) -> None:
        if dtype not in (mx.float32, mx.bfloat16):
            raise InputError(f"vision dtype must be float32 or bfloat16 (FastViTHD overflows float16), got {dtype}")
        network.set_dtype(dtype)
        self.network, self._dtype = network, dtype
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        if on_cpu:
            for module in network.modules():
                if isinstance(module, DepthwiseConv):
                    module.use_tiles()
        mx.eval(network.parameters())  # read the weights now, not within the first image's time

    @property
    def device(self) -> str:
        """MLX and the device it computes on."""
        return f"MLX ({mx.default_device().type.name})"

    @property
    def runs_beside(self) -> bool:
        """No: it shares the device with the decoder."""
        return False

    def begin(self, pixels: np.ndarray) -> Callable[[], mx.array]:
        """See `Encoder.begin`; MLX computes nothing before it is asked for."""
        return lambda: self.encode(pixels)

    def encode(self, pixels: np.ndarray) -> mx.array:
        """(B, H, W, 3) uint8 -> (B, N, C); see `Encoder.encode`."""
        for side in pixels.shape[1:3]:
            check_side(side, self.network.downsampling)
        at_once = max(BATCH_PIXELS // (pixels.shape[1] * pixels.shape[2]), 1)
        parts = [self._encode(pixels[first : first + at_once]) for first in range(0, len(pixels), at_once)]
        if len(parts) == 1:
            return parts[0]
        for part in parts:
            mx.eval(part)  # one after another: only their features are there at the same time
        return mx.concatenate(parts)

    def _encode(self, pixels: np.ndarray) -> mx.array:
        x = self.network(mx.array(pixels).astype(self._dtype))  # 0-255 is exact in bfloat16; 1/255 is in the stem
        return x.reshape(x.shape[0], -1, x.shape[-1])
