"""Multi-scale features: a stage's map brought down to the last one's, by average or by a learnt depthwise convolution.

Source: FastVLM (arXiv 2412.13303), section 3.1.1. No published checkpoint has them, and the released code doesn't.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.vision_config import VisionConfig


class AveragePool(nn.Module):
    """The mean of each square of `ratio` x `ratio` pixels."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self._ratio = ratio

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H / ratio, W / ratio, C)."""
        batch, height, width, dim = x.shape
        squares = x.reshape(batch, height // self._ratio, self._ratio, width // self._ratio, self._ratio, dim)
        return squares.mean(axis=(2, 4))


class DepthwisePool(nn.Module):
    """A weighted sum of each square of `ratio` x `ratio` pixels, with weights and a bias for each channel."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.weight = mx.zeros((dim, ratio, ratio, 1))
        self.bias = mx.zeros((dim,))
        self._ratio = ratio

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) -> (B, H / ratio, W / ratio, C)."""
        return mx.conv2d(x, self.weight, stride=self._ratio, groups=x.shape[-1]) + self.bias


def make_pool(config: VisionConfig, stage: int) -> nn.Module:
    """What pools a stage of `config.multi_scale`."""
    assert config.multi_scale
    ratio = config.pooling_ratio(stage)
    if config.multi_scale.pooling == "depthwise":
        return DepthwisePool(config.embed_dims[stage], ratio)
    return AveragePool(ratio)
