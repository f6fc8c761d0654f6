"""FastVLM in PyTorch for training: FastViTHD, the projector and a Qwen2 decoder under the published names.

The encoder is trained in its inference structure: one convolution with bias where the published training code
has several branches that it merges at the end. The residual path that those branches hold comes from the
initialisation instead (`_near_identity`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_FROM = 3  # stages 4 and 5 attend; the others mix with a 3x3 convolution
NORM_EPS = 1e-5
LAYER_SCALE = 0.2
VISION = "model.vision_tower.vision_tower.model."
PROJECTOR = "model.mm_projector."


@dataclass(frozen=True, slots=True)
class NanoConfig:
    """Sizes of the whole model; `side` is that of the pictures in pixels."""

    side: int = 256
    dims: tuple[int, ...] = (16, 32, 64, 128, 256)
    depths: tuple[int, ...] = (1, 2, 3, 2, 1)
    mlp_ratio: int = 4
    head_dim: int = 32
    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    rope_theta: float = 1e4
    context: int = 2048

    @property
    def feature_dim(self) -> int:
        """Channels of the encoder's output."""
        return 2 * self.dims[-1]

    def to_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint."""
        return asdict(self)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution with "same" padding and Kaiming's initialisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _near_identity(dim: int, kernel: int) -> nn.Conv2d:
    """A depthwise convolution in place of `x + ...`: what it replaces must come through at the start."""
    conv = _conv(dim, dim, kernel, groups=dim)
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
        self.lkb_reparam = _conv(inputs, outputs, 7, stride=2, groups=inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
        return F.gelu(self.lkb_reparam(x))


class PatchEmbed(nn.Module):
    """Halve the map, double the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(LargeKernel(inputs, outputs), Reparam(_conv(outputs, outputs, 1), active=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2 C, H / 2, W / 2)."""
        return self.proj(x)


class NormedConv(nn.Module):
    """7x7 depthwise convolution and batch norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = _conv(dim, dim, 7, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.bn(self.conv(x))


class ConvFFN(nn.Module):
    """The convolution, then an MLP per pixel."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = NormedConv(dim)
        self.fc1, self.fc2 = _conv(dim, hidden, 1), _conv(hidden, dim, 1)

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
        self.token_mixer = Reparam(_near_identity(dim, 3))
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
        self.reduce, self.expand = _conv(dim, dim // 16, 1), _conv(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Expand(nn.Module):
    """Double the channels, squeeze and excite."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reparam_conv = _conv(dim, 2 * dim, 3, groups=dim)
        self.se = SqueezeExcite(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2 C, H, W)."""
        return F.gelu(self.se(self.reparam_conv(x)))


class FastViTHD(nn.Module):
    """(B, 3, S, S) float pixels in [0, 1] -> (B, N, C), N = (S / 64)^2, row-major."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        dims = config.dims
        self.patch_embed = nn.Sequential(
            Reparam(_conv(3, dims[0], 3, stride=2), active=True),
            Reparam(_conv(dims[0], dims[0], 3, stride=2, groups=dims[0]), active=True),
            Reparam(_conv(dims[0], dims[0], 1), active=True),
        )
        network: list[nn.Module] = []
        for stage, (dim, depth) in enumerate(zip(dims, config.depths, strict=True)):
            hidden = config.mlp_ratio * dim
            if stage:
                network.append(PatchEmbed(dims[stage - 1], dim))
            if stage >= ATTENTION_FROM:
                network.append(Reparam(_near_identity(dim, 7)))
                blocks = [AttentionBlock(dim, hidden, config.head_dim) for _ in range(depth)]
            else:
                blocks = [RepMixerBlock(dim, hidden) for _ in range(depth)]
            network.append(nn.Sequential(*blocks))
        self.network = nn.Sequential(*network)
        self.conv_exp = Expand(dims[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Run all stages."""
        # oneDNN's depthwise and 1x1 convolutions are faster with channels last.
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv_exp(self.network(self.patch_embed(x))).flatten(2).transpose(1, 2)


def build_decoder(config: NanoConfig) -> nn.Module:
    """A small Qwen2ForCausalLM, initialised by transformers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # a second to import; --help doesn't wait for it

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    ).float()


class NanoVLM(nn.Module):
    """The whole model; `published_state` names its tensors as LLaVA's checkpoints do."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = FastViTHD(config)
        self.projector = nn.Sequential(
            nn.Linear(config.feature_dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden)
        )
        self.decoder = build_decoder(config)
        # Image tokens start at the scale of the embedded text, which the decoder's first norm would hide but
        # its residual stream wouldn't.
        nn.init.normal_(self.projector[2].weight, std=0.02 / math.sqrt(config.hidden) * 4)
        nn.init.zeros_(self.projector[2].bias)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, C) features."""
        return self.vision(pixels.float() / 255.0)

    def published_state(self) -> dict[str, Tensor]:
        """Tensors under the LLaVA names; the tied head is left out."""
        out = {VISION + name: tensor for name, tensor in self.vision.state_dict().items()}
        out |= {PROJECTOR + name: tensor for name, tensor in self.projector.state_dict().items()}
        return out | {n: t for n, t in self.decoder.state_dict().items() if n != "lm_head.weight"}
