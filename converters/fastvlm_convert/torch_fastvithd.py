"""The vision encoder in PyTorch as the Neural Engine wants it: channels first, 1x1 convolutions, no LayerNorm op.

Holds the folded weights of fastvlm_convert.folding, so it computes what fastvlm_mlx.vision.fastvithd computes;
`ranges` scales what would overflow float16 (fastvlm_convert.ranges). Each form that looks odd has its rule:

- 1x1 convolutions instead of matrices, data (B, C, H, W): the Neural Engine's own layout.
- LayerNorm spelled out (mean, difference, square, mean, rsqrt): a fused `layer_norm` over 1,024 or 1,536 channels
  is reported to fail to compile on M1 and M2, and squares overflow float16 from 256 on; the difference is
  scaled by a power of two first.
- The global averages of squeeze-and-excite by `mean`: pooling kernels above 13 are reported unsupported.
- The output (B, N, C), so that its last axis is aligned and MLX can take it as it is.

Source of the rules: Apple, "Deploying Transformers on the Apple Neural Engine"; coremltools issues 1893, 2370.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_convert.coreml_vision import Attention
from fastvlm_convert.folding import PIXEL_MAX
from fastvlm_convert.ranges import EXPANSION, NormScale, Ranges
from fastvlm_convert.torch_layers import Conv, excite, shifted_gelu
from fastvlm_convert.torch_pooling import make_pool
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.vision.fastvithd import NORM_EPS

Probe = Callable[[str, Tensor], None]


def _no_probe(_: str, __: Tensor) -> None:
    """Measure nothing."""


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
    """Attention and ConvFFN, each beside a residual. A batch norm is in the attention's first matrix."""

    def __init__(
        self, config: VisionConfig, dim: int, form: Attention, ranges: Ranges, name: str, probe: Probe
    ) -> None:
        super().__init__()
        normalizes = config.norm == "layer"
        self.norm = ChannelNorm(ranges.norm(name), f"{name}.norm", probe) if normalizes else nn.Identity()
        self.mixer = SelfAttention(dim, config.head_dim, form)
        self.ffn = ConvFFN(dim, config.mlp_ratio * dim, ranges.hidden.get(name, 0), f"{name}.ffn", probe)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.mixer(self.norm(x))
        return x + self.ffn(x)


class PatchEmbed(nn.Module):
    """Halve the map; the published models double the channels. Some squeeze and excite the map as it is held."""

    def __init__(self, config: VisionConfig, index: int, ranges: Ranges, name: str, probe: Probe) -> None:
        super().__init__()
        before, dim = config.embed_dims[index - 1], config.embed_dims[index]
        self.name, self.probe = name, probe
        self.shifts = [ranges.hidden.get(f"{name}.{layer}", 0) for layer in ("depthwise", "pointwise")]
        self.depthwise = Conv(before, dim, 7, stride=2, groups=before)
        self.squeezes = config.squeezes(index)
        if self.squeezes:
            squeezed = config.squeezed_dim(index)
            self.reduce, self.expand = Conv(dim, squeezed, 1), Conv(squeezed, dim, 1)
        self.pointwise = Conv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        x = self.depthwise(x)
        self.probe(f"{self.name}.depthwise", x)
        x = excite(x, self.reduce, self.expand) if self.squeezes else x
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
    """Patch embedding (not in the first stage), positional convolution (in those that attend), blocks.

    `pool` isn't one of its steps; see fastvlm_mlx.vision.fastvithd.
    """

    def __init__(self, config: VisionConfig, index: int, form: Attention, ranges: Ranges, probe: Probe) -> None:
        super().__init__()
        dim, hidden = config.embed_dims[index], config.embed_dims[index] * config.mlp_ratio
        attends = config.attends(index)
        self.name, self.probe = f"stages.{index}", probe
        self.downsample = PatchEmbed(config, index, ranges, f"{self.name}.downsample", probe) if index else None
        self.position = Conv(dim, dim, 7, groups=dim) if attends else None
        self.pool = make_pool(config, index, ranges.streams.get(index, 0))
        self.blocks = nn.ModuleList(
            AttentionBlock(config, dim, form, ranges, name, probe)
            if attends
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
        x = shifted_gelu(excite(x, self.reduce, self.expand), self.held)
        x = x * 2.0**self.held if self.held else x
        self.probe("features", x)
        return x


class FastViTHD(nn.Module):
    """(B, 3, H, W) pixels 0-255 -> (B, N, C) features, row-major; N = (H / D) * (W / D), D = `config.downsampling`."""

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
        self.stages = nn.ModuleList(Stage(config, i, form, ranges, probe) for i in range(len(config.layers)))
        self.expand = Expand(config.embed_dims[-1], ranges.streams.get(EXPANSION, 0), probe)
        self.pooled = config.multi_scale.stages if config.multi_scale else ()
        self.probe = probe

    def forward(self, x: Tensor) -> Tensor:
        """Run all stages; pooled maps come after the expanded last one, on the channels."""
        x = self.stem(x)
        pooled = {}
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.pooled:
                pooled[index] = cast(nn.Module, stage.pool)(x)
                self.probe(f"stages.{index}.pool", pooled[index])
        x = self.expand(x)
        if pooled:
            x = torch.cat([x, *(pooled[index] for index in self.pooled)], dim=1)
        return x.flatten(2).transpose(1, 2)

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
