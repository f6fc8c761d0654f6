"""What the parts of torch_fastvithd are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_BEND = 16.0  # GELU is ReLU beyond it, in float32 too


class Conv(nn.Module):
    """A convolution with bias and "same" padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False)
        self.stride, self.groups, self.padding = stride, groups, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


def shifted_gelu(x: Tensor, shift: int) -> Tensor:
    """GELU(x 2^shift) 2^-shift, without leaving float16 where x 2^shift would.

    GELU is ReLU and a small difference, which is 0 to the last bit beyond GELU_BEND: only what lies within is
    scaled up. Large values are rounded once, as by a plain GELU.
    """
    if not shift:
        return F.gelu(x)
    bend = GELU_BEND * 2.0**-shift
    within = x.clamp(-bend, bend) * 2.0**shift
    return F.relu(x) + (F.gelu(within) - F.relu(within)) * 2.0**-shift


def excite(x: Tensor, reduce: Conv, expand: Conv) -> Tensor:
    """Scale each channel of (B, C, H, W) by a gate that its means over the map decide."""
    return x * torch.sigmoid(expand(F.relu(reduce(x.mean(dim=(2, 3), keepdim=True)))))
