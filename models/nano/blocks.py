"""The encoder's building blocks, in their inference structure and under the published names.

One convolution with bias stands where the published training code has several branches that it merges at the
end. The residual path that those branches hold comes from the initialisation instead (`near_identity`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
LAYER_SCALE = 0.2


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True
) -> nn.Conv2d:
    """A convolution with "same" padding and Kaiming's initialisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def near_identity(dim: int, kernel: int) -> nn.Conv2d:
    """A depthwise convolution in place of `x + ...`: what it replaces must come through at the start."""
    conv = convolution(dim, dim, kernel, groups=dim)
    nn.init.normal_(conv.weight, std=0.3 / kernel)
    with torch.no_grad():
        conv.weight[:, 0, kernel // 2, kernel // 2] += 1.0
    return conv


class Reparam(nn.Module):
    """One merged convolution, optionally followed by GELU."""

    def __init__(self, conv: nn.Conv2d, active: bool = False) -> None:
        super().__init__()
        self.reparam_conv, self.active = conv, active

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.reparam_conv(x)
        return F.gelu(x) if self.active else x


class LargeKernel(nn.Module):
    """The 7x7 convolution that halves the map, and GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lkb_reparam = convolution(inputs, outputs, 7, stride=2, groups=inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        return F.gelu(self.lkb_reparam(x))


class PatchEmbed(nn.Module):
    """Halve the map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(LargeKernel(inputs, outputs), Reparam(convolution(outputs, outputs, 1), active=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        return self.proj(x)


class NormedConv(nn.Module):
    """7x7 depthwise convolution and batch norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = convolution(dim, dim, 7, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.bn(self.conv(x))


class ConvFFN(nn.Module):
    """The convolution, then an MLP per pixel."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = NormedConv(dim)
        self.fc1, self.fc2 = convolution(dim, hidden, 1), convolution(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


def _layer_scale(dim: int) -> nn.Parameter:
    return nn.Parameter(torch.full((dim, 1, 1), LAYER_SCALE))


class RepMixerBlock(nn.Module):
    """3x3 depthwise convolution in place, then the ConvFFN beside a residual."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layer_scale = _layer_scale(dim)
        self.token_mixer = Reparam(near_identity(dim, 3))
        self.convffn = ConvFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class Attention(nn.Module):
    """Multi-head attention over all pixels."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.proj.weight, std=dim**-0.5)
        nn.init.zeros_(self.proj.bias)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class AttentionBlock(nn.Module):
    """Attention and ConvFFN, each beside a residual."""

    def __init__(self, dim: int, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.token_mixer = Attention(dim, head_dim)
        self.convffn = ConvFFN(dim, hidden)
        self.layer_scale_1, self.layer_scale_2 = _layer_scale(dim), _layer_scale(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = self.token_mixer(self.norm(x.flatten(2).transpose(1, 2)))
        x = x + self.layer_scale_1 * tokens.transpose(1, 2).reshape(x.shape)
        return x + self.layer_scale_2 * self.convffn(x)


class SqueezeExcite(nn.Module):
    """A gate per channel from the map's mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce, self.expand = convolution(dim, dim // 16, 1), convolution(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Expand(nn.Module):
    """Double the channels, squeeze and excite."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reparam_conv = convolution(dim, 2 * dim, 3, groups=dim)
        self.se = SqueezeExcite(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2 C, H, W)."""
        return F.gelu(self.se(self.reparam_conv(x)))
