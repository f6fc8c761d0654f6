"""FastViTHD in PyTorch as the Neural Engine wants it: channels first, 1x1 convolutions, no LayerNorm op.

Holds the folded weights of fastvlm_convert.folding, so it computes what fastvlm_mlx.vision.fastvithd computes;
`ranges` scales what would overflow float16 (fastvlm_convert.ranges). Each form that looks odd has its rule:

- 1x1 convolutions instead of matrices, data (B, C, H, W): the Neural Engine's own layout.
- LayerNorm spelled out (mean, difference, square, mean, rsqrt): a fused `layer_norm` over 1,024 or 1,536 channels
  is reported to fail to compile on M1 and M2, and squares overflow float16 from 256 on; the difference is
  scaled by a power of two first.
- The global average of squeeze-and-excite by `mean`: pooling kernels above 13 are reported unsupported.
- The output (B, N, C), so that its last axis is aligned and MLX can take it as it is.

Source of the rules: Apple, "Deploying Transformers on the Apple Neural Engine"; coremltools issues 1893, 2370.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_convert.coreml_vision import Attention
from fastvlm_convert.folding import PIXEL_MAX
from fastvlm_convert.ranges import EXPANSION, NormScale, Ranges
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.vision.fastvithd import ATTENTION_FROM, NORM_EPS

GELU_BEND = 16.0  # GELU is ReLU beyond it, in float32 too

Probe = Callable[[str, Tensor], None]


def _no_probe(_: str, __: Tensor) -> None:
    """Measure nothing."""


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


class ConvFFN(nn.Module):
    """7x7 depthwise convolution, then an MLP per pixel."""

    def __init__(self, dim: int, hidden: int, shift: int, name: str, probe: Probe) -> None:
        super().__init__()
        self.shift = shift
        self.depthwise = Conv(dim, dim, 7, groups=dim)
        self.fc1, self.fc2 = Conv(dim, hidden, 1), Conv(hidden, dim, 1)
        self.name, self.probe = name, probe

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.depthwise(x)
        self.probe(f"{self.name}.depthwise", x)
        x = self.fc1(x)
        self.probe(f"{self.name}.fc1", x)
        return self.fc2(shifted_gelu(x, self.shift))


class RepMixerBlock(nn.Module):
    """3x3 depthwise convolution in place, then the ConvFFN beside a residual."""

    def __init__(self, dim: int, hidden: int, ranges: Ranges, name: str, probe: Probe) -> None:
        super().__init__()
        self.mixer = Conv(dim, dim, 3, groups=dim)
        self.ffn = ConvFFN(dim, hidden, ranges.hidden.get(name, 0), f"{name}.ffn", probe)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.mixer(x)
        return x + self.ffn(x)


class ChannelNorm(nn.Module):
    """LayerNorm over channels without affine; the difference is scaled before it is squared."""

    def __init__(self, scale: NormScale, name: str, probe: Probe) -> None:
        super().__init__()
        self.difference_scale, self.eps = scale.difference, NORM_EPS * scale.eps
        self.name, self.probe = name, probe

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x - x.mean(dim=1, keepdim=True)
        self.probe(f"{self.name}.difference", x)
        if self.difference_scale != 1:
            x = x * self.difference_scale
        return x * torch.rsqrt((x * x).mean(dim=1, keepdim=True) + self.eps)


class SelfAttention(nn.Module):
    """Attention over all pixels; `form` says how the heads are laid out, the result is the same."""

    def __init__(self, dim: int, head_dim: int, form: Attention) -> None:
        super().__init__()
        self.qkv, self.proj = Conv(dim, 3 * dim, 1), Conv(dim, dim, 1)
        self.heads, self.head_dim, self.form = dim // head_dim, head_dim, form

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, dim, height, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=1)
        if self.form == "split":
            parts = zip(*(t.flatten(2).split(self.head_dim, dim=1) for t in (q, k, v)), strict=True)
            y = torch.cat([self._head(*part) for part in parts], dim=1)
        else:
            q, k, v = (t.reshape(batch, self.heads, self.head_dim, height * width) for t in (q, k, v))
            y = self._head(q, k, v) if self.form == "batched" else self._sdpa(q, k, v)
        return self.proj(y.reshape(batch, dim, height, width))

    def _head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(..., d, N) each -> (..., d, N); q comes scaled."""
        weights = torch.softmax(q.transpose(-1, -2) @ k, dim=-1)
        return v @ weights.transpose(-1, -2)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The op of iOS 18, which scales by 1 / sqrt(d) itself: q comes unscaled."""
        q, k, v = (t.transpose(-1, -2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


class AttentionBlock(nn.Module):
    """Attention and ConvFFN, each beside a residual."""

    def __init__(
        self, dim: int, hidden: int, head_dim: int, form: Attention, ranges: Ranges, name: str, probe: Probe
    ) -> None:
        super().__init__()
        self.norm = ChannelNorm(ranges.norm(name), f"{name}.norm", probe)
        self.mixer = SelfAttention(dim, head_dim, form)
        self.ffn = ConvFFN(dim, hidden, ranges.hidden.get(name, 0), f"{name}.ffn", probe)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.mixer(self.norm(x))
        return x + self.ffn(x)


class PatchEmbed(nn.Module):
    """Halve the map; the published models double the channels."""

    def __init__(self, before: int, dim: int, ranges: Ranges, name: str, probe: Probe) -> None:
        super().__init__()
        self.name, self.probe = name, probe
        self.shifts = [ranges.hidden.get(f"{name}.{layer}", 0) for layer in ("depthwise", "pointwise")]
        self.depthwise = Conv(before, dim, 7, stride=2, groups=before)
        self.pointwise = Conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        x = self.depthwise(x)
        self.probe(f"{self.name}.depthwise", x)
        x = self.pointwise(shifted_gelu(x, self.shifts[0]))
        self.probe(f"{self.name}.pointwise", x)
        return shifted_gelu(x, self.shifts[1])


class Stem(nn.Module):
    """Pixels 0-255 to a map of a quarter of the side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv(3, dim, 3, stride=2)
        self.depthwise = Conv(dim, dim, 3, stride=2, groups=dim)
        self.pointwise = Conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 4, W / 4)."""
        return F.gelu(self.pointwise(F.gelu(self.depthwise(F.gelu(self.conv(x))))))


class Stage(nn.Module):
    """Patch embedding (not in stage 1), positional convolution (stages 4 and 5), blocks."""

    def __init__(self, config: VisionConfig, index: int, form: Attention, ranges: Ranges, probe: Probe) -> None:
        super().__init__()
        dim, hidden = config.embed_dims[index], config.embed_dims[index] * config.mlp_ratio
        self.name, self.probe = f"stages.{index}", probe
        before = config.embed_dims[index - 1]
        self.downsample = PatchEmbed(before, dim, ranges, f"{self.name}.downsample", probe) if index else None
        self.position = Conv(dim, dim, 7, groups=dim) if index >= ATTENTION_FROM else None
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, hidden, config.head_dim, form, ranges, name, probe)
            if index >= ATTENTION_FROM
            else RepMixerBlock(dim, hidden, ranges, name, probe)
            for name in (f"stages.{index}.blocks.{i}" for i in range(config.layers[index]))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the stage's map."""
        x = self.downsample(x) if self.downsample else x
        if self.position:
            x = self.position(x)
            self.probe(f"{self.name}.stream", x)
        for block in self.blocks:
            x = block(x)
            self.probe(f"{self.name}.stream", x)
        return x


class Expand(nn.Module):
    """Double the channels, squeeze and excite."""

    def __init__(self, dim: int, held: int, probe: Probe) -> None:
        super().__init__()
        self.held = held  # the map is at 2^-held of its value until it is gated
        self.depthwise = Conv(dim, 2 * dim, 3, groups=dim)
        self.reduce, self.expand = Conv(2 * dim, 2 * dim // 16, 1), Conv(2 * dim // 16, 2 * dim, 1)
        self.probe = probe

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2 C, H, W)."""
        x = self.depthwise(x)
        self.probe("expand", x)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean(dim=(2, 3), keepdim=True)))))
        x = x * gate
        x = shifted_gelu(x, self.held)
        x = x * 2.0**self.held if self.held else x
        self.probe("features", x)
        return x


class FastViTHD(nn.Module):
    """(B, 3, H, W) pixels 0-255 -> (B, N, C) features, N = (H / 64) * (W / 64), row-major."""

    def __init__(
        self,
        config: VisionConfig,
        form: Attention = "batched",
        ranges: Ranges | None = None,
        probe: Probe = _no_probe,
    ) -> None:
        super().__init__()
        ranges = ranges or Ranges()
        self.stem = Stem(config.embed_dims[0])
        self.stages = nn.ModuleList(Stage(config, i, form, ranges, probe) for i in range(5))
        self.expand = Expand(config.embed_dims[-1], ranges.streams.get(EXPANSION, 0), probe)

    def forward(self, x: Tensor) -> Tensor:
        """Run all stages."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.expand(x).flatten(2).transpose(1, 2)

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Fill in folded weights, by the names and in the layouts of fastvlm_convert.folding; strict."""
        state = {}
        for name, parameter in self.state_dict().items():
            value = torch.from_numpy(np.ascontiguousarray(weights[name], np.float32))
            if value.ndim == 4:  # (O, kh, kw, I) -> (O, I, kh, kw)
                value = value.permute(0, 3, 1, 2)
            state[name] = value.reshape(parameter.shape)
        if extra := sorted(set(weights) - set(state)):
            raise ValueError(f"weights that the network doesn't have: {', '.join(extra)}")
        self.load_state_dict(state)


class FromUnitPixels(nn.Module):
    """A network for pixels 0-255, given pixels in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> what the network makes of them."""
        return self.network(x * PIXEL_MAX)
