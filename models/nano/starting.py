"""Begin a run with a checkpoint's weights instead of random ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvlm_mlx.errors import InputError
from nano.blocks import AttentionBlock, RepMixerBlock
from nano.network import PROJECTOR, VISION, FastViTHD, NanoVLM
from nano.settings import NanoConfig, as_text

FILES = ("config.json", "model.safetensors", "tokenizer.json")
FIRST_LAYER = f"{PROJECTOR}0.weight"


def read_config(checkpoint: Path, wanted: NanoConfig) -> NanoConfig:
    """The sizes of a checkpoint that export.py wrote, deepened.

    Args:
        checkpoint: its folder.
        wanted: whose side is taken, as the checkpoint's pictures may have been others, and whose depths, if the
            checkpoint's stages have no more blocks.

    Returns:
        Its sizes otherwise; what the checkpoint doesn't pool, `scales`, is `wanted`'s.

    Raises:
        InputError: a file is missing or unreadable, it isn't such a checkpoint, or it has more blocks than wanted.
    """
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        raise InputError(f"{checkpoint} lacks {', '.join(missing)}; give a folder that train.py exported")
    try:
        data: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        vision: dict[str, Any] = data["mm_vision_config"]
        scales = vision.get("multi_scale", {}).get("stages", wanted.scales)
        depths = tuple(vision["layers"])
        config = NanoConfig(
            side=wanted.side,
            dims=tuple(vision["embed_dims"]),
            depths=wanted.depths,
            scales=tuple(scales),
            vocabulary=data["vocab_size"],
            hidden=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=data["num_attention_heads"],
            kv_heads=data["num_key_value_heads"],
            intermediate=data["intermediate_size"],
            rope_theta=data["rope_theta"],
            context=data["max_position_embeddings"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{checkpoint / 'config.json'} isn't one that train.py exported ({exc!r})") from exc
    if len(depths) != len(config.depths) or any(own > now for own, now in zip(depths, config.depths, strict=True)):
        found, asked = as_text(depths), as_text(config.depths)
        raise InputError(f"{checkpoint} has stages of {found} blocks, not {asked}; give --depths as many or more")
    return config


def load_weights(model: NanoVLM, checkpoint: Path, pixels: Tensor) -> None:
    """Give a model a checkpoint's weights.

    Maps that the checkpoint doesn't pool get filters of their own whose output is about one in size, and columns of
    zeros in the projector; blocks that a stage hasn't got follow its own and pass on what they get. So the answers
    stay what they were until training moves them.

    Args:
        model: of the sizes of `read_config`.
        checkpoint: its folder.
        pixels: (B, 3, S, S) uint8, some pictures, by which those filters and the new blocks' batch norms are scaled.

    Raises:
        InputError: a tensor is missing or has another shape.
    """
    stored = {name: tensor.float() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    pools = f"{VISION}multi_scale."
    grafted = not any(name.startswith(pools) for name in stored) and bool(model.config.scales)
    own = model.published_state()
    added = _added_blocks(model.vision, stored)
    for prefix, block in added.items():
        _pass_on(block)
        stored |= {name: tensor for name, tensor in own.items() if name.startswith(prefix)}
    if grafted:
        stored |= {name: tensor for name, tensor in own.items() if name.startswith(pools)}
        known = stored[FIRST_LAYER]
        zeros = torch.zeros(len(known), own[FIRST_LAYER].shape[1] - known.shape[1])
        stored[FIRST_LAYER] = torch.cat([known, zeros], dim=1)
    wrong = sorted(own.keys() ^ stored.keys()) or sorted(n for n in own if own[n].shape != stored[n].shape)
    if wrong:
        raise InputError(f"{checkpoint} has other tensors than this model: {', '.join(wrong[:5])}; export it again")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    _measure_norms(model, added.values(), pixels)
    if grafted:
        _scale_pools(model, pixels)


def _added_blocks(vision: FastViTHD, stored: Mapping[str, Tensor]) -> dict[str, RepMixerBlock | AttentionBlock]:
    """The blocks that a checkpoint hasn't got, by the beginning of their tensors' names.

    Only those of stages of which it has something: of a checkpoint that lacks more, the tensors are named.
    """
    found: dict[str, RepMixerBlock | AttentionBlock] = {}
    for index, stage in enumerate(vision.network):
        known = f"{VISION}network.{index}."
        if isinstance(stage, nn.Sequential) and any(name.startswith(known) for name in stored):
            for number, block in enumerate(stage):
                prefix = f"{known}{number}."
                assert isinstance(block, RepMixerBlock | AttentionBlock)
                if not any(name.startswith(prefix) for name in stored):
                    found[prefix] = block
    return found


@torch.no_grad()
def _pass_on(block: RepMixerBlock | AttentionBlock) -> None:
    """Make a block give what it gets; the gradient of its last layers is not zero, so it doesn't stay so."""
    last = [block.convffn.fc2.weight]
    if isinstance(block, AttentionBlock):
        last.append(block.token_mixer.proj.weight)
    else:
        nn.init.dirac_(block.token_mixer.reparam_conv.weight, groups=len(block.layer_scale))
    for weight in last:
        weight.zero_()


@torch.no_grad()
def _measure_norms(model: NanoVLM, blocks: Iterable[nn.Module], pixels: Tensor) -> None:
    """Give the blocks' batch norms the statistics of some pictures: the later stages train with what norms have."""
    norms = [module for block in blocks for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    model.eval()
    usual = norms[0].momentum
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all
    for part in pixels.to(next(model.parameters()).device).split(16):
        model.encode(part)
    for norm in norms:
        norm.eval()
        norm.momentum = usual


@torch.no_grad()
def _scale_pools(model: NanoVLM, pixels: Tensor) -> None:
    """Bring what each pooling filter says of some pictures to mean 0 and deviation 1."""
    model.eval()
    pools = list(model.vision.multi_scale.values())
    first = model.config.feature_dim - sum(pool.out_channels for pool in pools if isinstance(pool, nn.Conv2d))
    pixels = pixels.to(next(model.parameters()).device)
    features = torch.cat([model.encode(part) for part in pixels.split(16)]).flatten(0, 1)[:, first:]
    for pool in pools:
        assert isinstance(pool, nn.Conv2d)
        assert pool.bias is not None
        said, features = features.split([pool.out_channels, features.shape[1] - pool.out_channels], dim=1)
        deviation = said.std(0).clamp(min=1e-4)
        pool.weight.div_(deviation[:, None, None, None])
        pool.bias.copy_((pool.bias - said.mean(0)) / deviation)
