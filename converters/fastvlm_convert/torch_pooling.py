"""Multi-scale features in PyTorch, as the Neural Engine takes them: see fastvlm_mlx.vision.pooling.

- An average over 2^n pixels a side is n averages over 2: strides above 2 are reported unsupported for pooling, and four
  values of a stage held within its limit (fastvlm_convert.ranges) can be added up in float16.
- The depthwise convolution has the maps' ratio as kernel and stride. At 16, from the first of five stages, its kernel
  is beyond what is reported to run there; `fastvlm placement` says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_mlx.config import VisionConfig


class AveragePool(nn.Module):
    """The mean of each square of `ratio` x `ratio` pixels, a power of two; the map comes at 2^-held of its value."""

    def __init__(self, ratio: int, held: int) -> None:
        super().__init__()
        self.halvings, self.held = ratio.bit_length() - 1, held

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / ratio, W / ratio)."""
        for _ in range(self.halvings):
            x = F.avg_pool2d(x, 2)
        return x * 2.0**self.held if self.held else x


class DepthwisePool(nn.Module):
    """A weighted sum of each square of `ratio` x `ratio` pixels; its weights undo what the map is held at."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, ratio, ratio), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / ratio, W / ratio)."""
        return F.conv2d(x, self.weight, self.bias, self.ratio, groups=x.shape[1])


def make_pool(config: VisionConfig, stage: int, held: int) -> nn.Module | None:
    """What pools a stage's map into the features; None where nothing does.

    Args:
        config: the encoder's shape.
        stage: counted from 0.
        held: its stream is at 2^-held of its value.
    """
    if not config.pools(stage) or config.multi_scale is None:
        return None
    ratio = config.pooling_ratio(stage)
    if config.multi_scale.pooling == "depthwise":
        return DepthwisePool(config.embed_dims[stage], ratio)
    return AveragePool(ratio, held)
