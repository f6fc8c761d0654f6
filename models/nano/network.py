"""FastVLM in PyTorch for training: FastViTHD, the projector and a Qwen2 decoder under the published names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nano.blocks import AttentionBlock, Expand, PatchEmbed, Reparam, RepMixerBlock, convolution, near_identity
from nano.settings import NanoConfig

ATTENTION_FROM = 3  # stages 4 and 5 attend; the others mix with a 3x3 convolution
MAPPED = (2, 3)  # stages 3 and 4, whose outputs training looks at; strides 16 and 32
VISION = "model.vision_tower.vision_tower.model."
PROJECTOR = "model.mm_projector."


class FastViTHD(nn.Module):
    """(B, 3, S, S) float pixels in [0, 1] -> (B, N, C), N = (S / 64)^2, row-major."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        dims = config.dims
        self.patch_embed = nn.Sequential(
            Reparam(convolution(3, dims[0], 3, stride=2), active=True),
            Reparam(convolution(dims[0], dims[0], 3, stride=2, groups=dims[0]), active=True),
            Reparam(convolution(dims[0], dims[0], 1), active=True),
        )
        network: list[nn.Module] = []
        ends: list[int] = []  # which of `network` end a stage
        for stage, (dim, depth) in enumerate(zip(dims, config.depths, strict=True)):
            hidden = config.mlp_ratio * dim
            if stage:
                network.append(PatchEmbed(dims[stage - 1], dim))
            blocks: list[nn.Module] = []
            if stage >= ATTENTION_FROM:
                network.append(Reparam(near_identity(dim, 7)))
                blocks += [AttentionBlock(dim, hidden, config.head_dim) for _ in range(depth)]
            else:
                blocks += [RepMixerBlock(dim, hidden) for _ in range(depth)]
            network.append(nn.Sequential(*blocks))
            ends.append(len(network) - 1)
        self.network = nn.Sequential(*network)
        self.conv_exp = Expand(dims[-1])
        self.multi_scale = nn.ModuleDict({str(stage): _pool(dims, stage) for stage in config.scales})
        self._split = ends[ATTENTION_FROM - 1] + 1
        self._ends = {end: stage for stage, end in enumerate(ends)}

    def forward(self, x: Tensor) -> Tensor:
        """Run all stages."""
        return self.with_maps(x)[0]

    def with_maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and the maps (B, C, H, W) at the end of the stages of MAPPED."""
        # oneDNN's depthwise and 1x1 convolutions are faster with channels last.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        outputs = []
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index in self._ends:
                outputs.append(x)
        pooled = [pool(outputs[int(stage)]) for stage, pool in self.multi_scale.items()]
        features = torch.cat([self.conv_exp(x), *pooled], dim=1)
        return features.flatten(2).transpose(1, 2), [outputs[stage] for stage in MAPPED]

    @property
    def early(self) -> nn.ModuleList:
        """What is before the stages that attend: most of the work, and what sees letters."""
        return nn.ModuleList([self.patch_embed, *list(self.network)[: self._split]])

    @property
    def late(self) -> nn.ModuleList:
        """The stages that attend, and all that makes features of the maps."""
        return nn.ModuleList([*list(self.network)[self._split :], self.conv_exp, self.multi_scale])


def _pool(dims: Sequence[int], stage: int) -> nn.Conv2d:
    """Bring a stage's map to the last one's size: one filter a channel."""
    ratio = 1 << (len(dims) - 1 - stage)
    return nn.Conv2d(dims[stage], dims[stage], ratio, ratio, groups=dims[stage])


def build_decoder(config: NanoConfig) -> Any:  # a module that doesn't say what is in it
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
            attn_implementation="sdpa",  # type: ignore[call-arg]  # one of its base class's
        )
    ).float()


def _widen(decoder: Any) -> None:
    """Draw the blocks' matrices anew so that each keeps its input's size, and all blocks together the residual's.

    transformers' 0.02 is meant for a thousand channels. With 192 it took as long again to leave the start: after 100
    steps on frozen features 15 % of the answers were exact instead of 18, after 200 28 instead of 32.
    """
    blocks = list(decoder.model.layers)
    for block in blocks:
        for name, weight in block.named_parameters():
            if weight.ndim == 2:
                onto_residual = name.startswith(("self_attn.o_proj", "mlp.down_proj"))
                depth = 2 * len(blocks) if onto_residual else 1
                nn.init.normal_(weight, std=(weight.shape[1] * depth) ** -0.5)


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
        # Five times what transformers gives it: the decoder then learns to look in half the steps. With 1.0 it
        # doesn't, as the head is the same matrix.
        nn.init.normal_(self.decoder.model.embed_tokens.weight, std=0.1)
        _widen(self.decoder)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, C) features."""
        return self.encode_with_maps(pixels)[0]

    def encode_with_maps(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, S, S) uint8 -> features, and the maps (B, C, H, W) inside the encoder."""
        return self.vision.with_maps(pixels.float() / 255.0)

    def published_state(self) -> dict[str, Tensor]:
        """Tensors under the LLaVA names; the tied head is left out."""
        out = {VISION + name: tensor for name, tensor in self.vision.state_dict().items()}
        out |= {PROJECTOR + name: tensor for name, tensor in self.projector.state_dict().items()}
        return out | {n: t for n, t in self.decoder.state_dict().items() if n != "lm_head.weight"}
