"""FastViT in PyTorch as it is trained, with branches, batch norms and layer scales, in float64.

Written from the published architecture, by the published names, and apart from the converter: what a converted encoder
computes is compared with it. Its random weights are drawn when they are first asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PREFIX = "model.vision_tower.vision_tower.model."
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """What is built. `squeezes`: stages whose embedding squeezes and excites; `pooled`: of multi-scale features."""

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    mlp: int
    norm: str
    squeezes: tuple[int, ...] = ()
    stem_scales: bool = True
    pooling: str = ""
    pooled: tuple[int, ...] = ()

    @property
    def channels(self) -> int:
        return 2 * self.dims[-1] + sum(self.dims[stage] for stage in self.pooled)


FOUR = Shape((1, 2, 2, 2), (16, 32, 64, 128), 3, "batch", squeezes=(2, 3))  # as MCi0, MCi1 and MCi2
FIVE = Shape((1, 1, 2, 1, 1), (16, 32, 64, 128, 256), 4, "layer", stem_scales=False)  # as FastViTHD


@dataclass
class Reference:
    """A network.

    Attributes:
        shape: of it.
        fuses: which convolutions, by name, are held as one kernel instead of branches.
        seed: of the weights. What is fused holds the kernel of the same branches.
        weights: name below PREFIX -> value, once `features` has been asked for.
    """

    shape: Shape
    fuses: Callable[[str], bool] = lambda _: False
    seed: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    _hidden: bool = False

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (N, C) float64, row-major."""
        with torch.inference_mode():
            x = torch.from_numpy(pixels.astype(np.float64) / 255).permute(2, 0, 1)[None]
            return self._network(x)[0].flatten(1).T.numpy()

    def named(self) -> dict[str, np.ndarray]:
        """The weights under their full names, float32 (which holds them exactly unless they are fused)."""
        return {PREFIX + n: v.numpy() if v.dtype == torch.int64 else v.float().numpy() for n, v in self.weights.items()}

    def _network(self, x: Tensor) -> Tensor:
        dims, last = self.shape.dims, len(self.shape.dims) - 1
        scale = self.shape.stem_scales
        x = F.gelu(self._mobile_one("patch_embed.0", x, dims[0], 3, stride=2, scale=scale))
        x = F.gelu(self._mobile_one("patch_embed.1", x, dims[0], 3, stride=2, depthwise=True, scale=scale))
        x = F.gelu(self._mobile_one("patch_embed.2", x, dims[0], 1))
        index, pooled = 0, {}
        for stage, (depth, dim) in enumerate(zip(self.shape.layers, dims, strict=True)):
            if stage:
                x = self._embedding(f"network.{index}.proj", x, dim, stage in self.shape.squeezes)
                index += 1
            if stage >= 3:
                x = self._position(f"network.{index}", x)
                index += 1
            for block in range(depth):
                x = (self._attention if stage >= 3 else self._mixing)(f"network.{index}.{block}", x)
            index += 1
            if stage in self.shape.pooled:
                pooled[stage] = self._pool(stage, x, 2 ** (last - stage))
        x = self._mobile_one("conv_exp", x, 2 * dims[-1], 3, depthwise=True)
        x = F.gelu(self._squeeze("conv_exp.se", x, 2 * dims[-1] // 16, ("reduce", "expand")))
        self._get("head.proj", (2 * dims[-1], 8))  # CLIP's, unused
        return torch.cat([x, *(pooled[stage] for stage in self.shape.pooled)], dim=1)

    def _embedding(self, name: str, x: Tensor, dim: int, squeezes: bool) -> Tensor:
        before = x.shape[1]

        def branches(x: Tensor) -> Tensor:
            large = self._normed(f"{name}.0.lkb_origin", x, dim, 7, 2, before)
            return large + self._normed(f"{name}.0.small_conv", x, dim, 3, 2, before)

        x = self._linear(f"{name}.0", "lkb_reparam", branches, x, dim, 7, 2, before)
        if squeezes:
            hidden = max(8, int(dim * 0.25 + 4) // 8 * 8)  # timm's rounding to multiples of 8
            x = self._squeeze(f"{name}.0.se", x, hidden, ("fc1", "fc2"))
        return F.gelu(self._mobile_one(f"{name}.1", F.gelu(x), dim, 1))

    def _position(self, name: str, x: Tensor) -> Tensor:
        def branches(x: Tensor) -> Tensor:
            return x + self._convolve(f"{name}.pe", x, x.shape[1], 7, 1, x.shape[1], bias=True)

        return self._linear(name, "reparam_conv", branches, x, x.shape[1], 7, 1, x.shape[1])

    def _mixing(self, name: str, x: Tensor) -> Tensor:
        mixer, dim = f"{name}.token_mixer", x.shape[1]

        def branches(x: Tensor) -> Tensor:
            mixed = self._mobile_one(f"{mixer}.mixer", x, dim, 3, depthwise=True, fusable=False)
            return x + self._scale(f"{mixer}.layer_scale", dim) * (mixed - self._bn(f"{mixer}.norm.rbr_skip", x))

        x = self._linear(mixer, "reparam_conv", branches, x, dim, 3, 1, dim)
        return x + self._scale(f"{name}.layer_scale", dim) * self._ffn(f"{name}.convffn", x)

    def _attention(self, name: str, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        if self.shape.norm == "batch":
            y = self._bn(f"{name}.norm", x)
        else:
            affine = (self._get(f"{name}.norm.{part}", (dim,)) for part in ("weight", "bias"))
            y = F.layer_norm(x.movedim(1, -1), (dim,), *affine, eps=1e-5).movedim(-1, 1)
        flat = y.flatten(2).transpose(1, 2)
        qkv = flat @ self._get(f"{name}.token_mixer.qkv.weight", (3 * dim, dim)).T
        q, k, v = (part.unflatten(-1, (dim // 32, 32)).transpose(1, 2) for part in qkv.split(dim, dim=-1))
        y = (torch.softmax(q @ k.transpose(-1, -2) / 32**0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
        weight = self._get(f"{name}.token_mixer.proj.weight", (dim, dim))
        bias = self._get(f"{name}.token_mixer.proj.bias", (dim,))
        y = (y @ weight.T + bias).transpose(1, 2).reshape(batch, dim, height, width)
        x = x + self._scale(f"{name}.layer_scale_1", dim) * y
        return x + self._scale(f"{name}.layer_scale_2", dim) * self._ffn(f"{name}.convffn", x)

    def _ffn(self, name: str, x: Tensor) -> Tensor:
        dim = x.shape[1]
        x = self._normed(f"{name}.conv", x, dim, 7, 1, dim)
        x = F.gelu(self._convolve(f"{name}.fc1", x, self.shape.mlp * dim, 1, bias=True))
        return self._convolve(f"{name}.fc2", x, dim, 1, bias=True)

    def _squeeze(self, name: str, x: Tensor, hidden: int, parts: Sequence[str]) -> Tensor:
        first, second = (f"{name}.{part}" for part in parts)
        gate = F.relu(self._convolve(first, x.mean(dim=(2, 3), keepdim=True), hidden, 1, bias=True))
        return x * torch.sigmoid(self._convolve(second, gate, x.shape[1], 1, bias=True))

    def _pool(self, stage: int, x: Tensor, ratio: int) -> Tensor:
        """Square by square, with no convolution or pooling of torch's."""
        squares = x.unflatten(3, (-1, ratio)).unflatten(2, (-1, ratio))  # (B, C, h, r, w, r)
        if self.shape.pooling == "average":
            return squares.mean(dim=(3, 5))
        weight = self._get(f"multi_scale.{stage}.weight", (x.shape[1], 1, ratio, ratio))[:, 0]
        bias = self._get(f"multi_scale.{stage}.bias", (x.shape[1],))
        return torch.einsum("bchrws,crs->bchw", squares, weight) + bias[:, None, None]

    def _mobile_one(
        self,
        name: str,
        x: Tensor,
        outputs: int,
        kernel: int,
        stride: int = 1,
        depthwise: bool = False,
        scale: bool = True,
        fusable: bool = True,
    ) -> Tensor:
        groups = x.shape[1] if depthwise else 1

        def branches(x: Tensor) -> Tensor:
            total = self._normed(f"{name}.rbr_conv.0", x, outputs, kernel, stride, groups)
            if kernel > 1 and scale:
                total = total + self._normed(f"{name}.rbr_scale", x, outputs, 1, stride, groups)
            if outputs == x.shape[1] and stride == 1:
                total = total + self._bn(f"{name}.rbr_skip", x)
            return total

        if not fusable:
            return branches(x)
        return self._linear(name, "reparam_conv", branches, x, outputs, kernel, stride, groups)

    def _linear(
        self, name: str, fused: str, branches: Function, x: Tensor, outputs: int, kernel: int, stride: int, groups: int
    ) -> Tensor:
        """The branches, or the one convolution that they are, as its answers to single pixels tell."""
        if not self.fuses(name):
            return branches(x)
        place = f"{name}.{fused}"
        if f"{place}.weight" not in self.weights:
            with self._not_kept():
                found = impulse_response(branches, x.shape[1], outputs, kernel, stride, groups)
            self.weights[f"{place}.weight"], self.weights[f"{place}.bias"] = found
        return self._convolve(place, x, outputs, kernel, stride, groups, bias=True)

    def _normed(self, name: str, x: Tensor, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> Tensor:
        return self._bn(f"{name}.bn", self._convolve(f"{name}.conv", x, outputs, kernel, stride, groups))

    def _convolve(
        self, name: str, x: Tensor, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> Tensor:
        weight = self._get(f"{name}.weight", (outputs, x.shape[1] // groups, kernel, kernel))
        shift = self._get(f"{name}.bias", (outputs,)) if bias else None
        return F.conv2d(x, weight, shift, stride, kernel // 2, groups=groups)

    def _bn(self, name: str, x: Tensor) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        if not self._hidden:
            self.weights[f"{name}.num_batches_tracked"] = torch.tensor(1000)
        return F.batch_norm(x, *(self._get(f"{name}.{part}", (x.shape[1],)) for part in parts), eps=1e-5)

    def _scale(self, name: str, dim: int) -> Tensor:
        return self._get(name, (dim, 1, 1))

    @contextmanager
    def _not_kept(self):
        self._hidden, before = True, self._hidden
        yield
        self._hidden = before

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name in self.weights:
            return self.weights[name]
        value = torch.from_numpy(draw(f"{self.seed}:{name}", shape).astype(np.float64))
        if not self._hidden:
            self.weights[name] = value
        return value


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 values that suit a tensor of this name; every statistic differs from what it is initialised to."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if "layer_scale" in leaf:
        return rng.uniform(0.1, 0.4, shape).astype(np.float32)
    if leaf in ("bias", "running_mean"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.standard_normal(shape) * (1.2 / np.sqrt(prod(shape[1:])))).astype(np.float32)


def impulse_response(
    function: Function, inputs: int, outputs: int, kernel: int, stride: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Kernel (outputs, inputs / groups, k, k) and bias of a linear function of a map, found by showing it pixels."""
    reach, width = kernel // 2, inputs // groups
    centre = -(-reach // stride) * stride  # under an output that sees the whole kernel
    side = centre + reach + 1
    places = [(channel, y, x) for channel in range(width) for y in range(kernel) for x in range(kernel)]
    pictures = torch.zeros(len(places) + 1, inputs, side, side, dtype=torch.float64)  # the last one stays black
    for picture, (channel, y, x) in zip(pictures, places, strict=False):
        picture[channel::width, centre - reach + y, centre - reach + x] = 1
    seen = function(pictures)[:, :, centre // stride, centre // stride]
    weight = (seen[:-1] - seen[-1]).T.reshape(outputs, width, kernel, kernel)
    return weight, seen[-1]


def sample(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 of soft patches of colour with grain."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (height // 16, width // 16, 3)).repeat(16, 0).repeat(16, 1)
    return np.clip(patches + rng.normal(0, 20, patches.shape), 0, 255).astype(np.uint8)
