"""Begin a run with a checkpoint's weights instead of random ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvlm_mlx.errors import InputError
from nano.blocks import AttentionBlock, RepMixerBlock
from nano.network import PROJECTOR, VISION, FastViTHD, NanoVLM
from nano.settings import NanoConfig, as_text

CONFIG = "config.json"
FILES = (CONFIG, "model.safetensors", "tokenizer.json")
FIRST_LAYER = f"{PROJECTOR}0.weight"


def read_config(checkpoint: Path, side: int | None = None, depths: tuple[int, ...] | None = None) -> NanoConfig:
    """The sizes of a checkpoint that export.py wrote, or larger ones.

    Args:
        checkpoint: its folder.
        side: of the pictures in pixels, instead of the checkpoint's.
        depths: blocks of the stages, as many as the checkpoint's or more.

    Returns:
        Its sizes otherwise; what the checkpoint doesn't pool, `scales`, is NanoConfig's own.

    Raises:
        InputError: a file is missing or unreadable, it isn't such a checkpoint, or it has more blocks.
    """
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        raise InputError(f"{checkpoint} lacks {', '.join(missing)}; give a folder that train.py exported")
    try:
        data: dict[str, Any] = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
        vision: dict[str, Any] = data["mm_vision_config"]
        scales = vision.get("multi_scale", {}).get("stages")
        pooled: dict[str, Any] = {} if scales is None else {"scales": tuple(scales)}
        own = NanoConfig(
            side=int(data["mm_vision_tower"].rpartition("_")[2]),
            dims=tuple(vision["embed_dims"]),
            depths=tuple(vision["layers"]),
            vocabulary=data["vocab_size"],
            hidden=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=data["num_attention_heads"],
            kv_heads=data["num_key_value_heads"],
            intermediate=data["intermediate_size"],
            rope_theta=data["rope_theta"],
            context=data["max_position_embeddings"],
            **pooled,
        )
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{checkpoint / CONFIG} isn't one that train.py exported ({exc!r})") from exc
    config = replace(own, side=side or own.side, depths=depths or own.depths)
    if any(now < before for before, now in zip(own.depths, config.depths, strict=True)):
        has, asked = as_text(own.depths), as_text(config.depths)
        raise InputError(f"{checkpoint} has stages of {has} blocks, not {asked}; give --depths as many or more")
    return config


def load_weights(model: NanoVLM, checkpoint: Path, pixels: Tensor) -> None:
    """Give a model a checkpoint's weights.

    Maps that the checkpoint doesn't pool get filters of their own whose output is about one in size, and columns of
    zeros in the projector; blocks that a stage hasn't got follow its own and pass on what they get. So the answers
    to pictures of the same size stay what they were until training moves them.

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
    added = _added_blocks(model.vision, read_config(checkpoint).depths)
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


def _added_blocks(vision: FastViTHD, depths: Sequence[int]) -> dict[str, RepMixerBlock | AttentionBlock]:
    """The blocks beyond a checkpoint's depths, by the beginning of their tensors' names."""
    found: dict[str, RepMixerBlock | AttentionBlock] = {}
    stages = [(index, layer) for index, layer in enumerate(vision.network) if isinstance(layer, nn.Sequential)]
    for (index, stage), depth in zip(stages, depths, strict=True):
        for number, block in enumerate(stage):
            assert isinstance(block, RepMixerBlock | AttentionBlock)
            if number >= depth:
                found[f"{VISION}network.{index}.{number}."] = block
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
