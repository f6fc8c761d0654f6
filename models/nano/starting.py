"""Begin a run with a checkpoint's weights instead of random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvlm_mlx.errors import InputError
from nano.network import PROJECTOR, VISION, NanoVLM
from nano.settings import NanoConfig

FILES = ("config.json", "model.safetensors", "tokenizer.json")
FIRST_LAYER = f"{PROJECTOR}0.weight"


def read_config(checkpoint: Path, side: int) -> NanoConfig:
    """The sizes of a checkpoint that export.py wrote.

    Args:
        checkpoint: its folder.
        side: of the pictures to train on, in pixels; the checkpoint's may have been others.

    Returns:
        Its sizes; what the checkpoint doesn't pool, `scales`, is NanoConfig's own.

    Raises:
        InputError: a file is missing or unreadable, or it isn't such a checkpoint.
    """
    missing = [name for name in FILES if not (checkpoint / name).is_file()]
    if missing:
        raise InputError(f"{checkpoint} lacks {', '.join(missing)}; give a folder that train.py exported")
    try:
        data: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        vision: dict[str, Any] = data["mm_vision_config"]
        scales = vision.get("multi_scale", {}).get("stages")
        config = NanoConfig(
            side=side,
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
            **({} if scales is None else {"scales": tuple(scales)}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{checkpoint / 'config.json'} isn't one that train.py exported ({exc!r})") from exc
    return config


def load_weights(model: NanoVLM, checkpoint: Path, pixels: Tensor) -> None:
    """Give a model a checkpoint's weights.

    Maps that the checkpoint doesn't pool get filters of their own whose output is about one in size, and columns of
    zeros in the projector: the answers stay what they were until training moves them.

    Args:
        model: of the sizes of `read_config`.
        checkpoint: its folder.
        pixels: (B, 3, S, S) uint8, some pictures, by which those filters are scaled.

    Raises:
        InputError: a tensor is missing or has another shape.
    """
    stored = {name: tensor.float() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    pools = f"{VISION}multi_scale."
    grafted = not any(name.startswith(pools) for name in stored) and bool(model.config.scales)
    own = model.published_state()
    if grafted:
        stored |= {name: tensor for name, tensor in own.items() if name.startswith(pools)}
        known = stored[FIRST_LAYER]
        added = torch.zeros(len(known), own[FIRST_LAYER].shape[1] - known.shape[1])
        stored[FIRST_LAYER] = torch.cat([known, added], dim=1)
    wrong = sorted(own.keys() ^ stored.keys()) or sorted(n for n in own if own[n].shape != stored[n].shape)
    if wrong:
        raise InputError(f"{checkpoint} has other tensors than this model: {', '.join(wrong[:5])}; export it again")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    if grafted:
        _scale_pools(model, pixels)


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
