"""Write a seeded LLaVA checkpoint's weights in the other published layouts.

The tests' oracle for the converter: written from what the public files and the peers' own code look like,
never from the converter's rules. Each function takes a folder that `tests/golden/seeded_checkpoint.py` wrote
and makes a new one. The layouts that are timed against ours are `fastvlm_bench.compare.layouts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from fastvlm_bench.compare.layouts import (
    FASTVITHD,
    IMAGE_TOKEN,
    LLAVA_VISION,
    Weights,
    copy_rest,
    mlx_vlm_name,
    read,
    renamed,
    to_mlx_vlm,
    to_transformers,
    transformers_name,
    write,
)

__all__ = [
    "FASTVITHD",
    "IMAGE_TOKEN",
    "mlx_vlm_name",
    "to_apple_mlx",
    "to_bin_shards",
    "to_mlx_vlm",
    "to_sharded",
    "to_transformers",
    "transformers_name",
]

QUANTIZED_GROUP = 64


def to_apple_mlx(src: Path, dst: Path, bits: int | None = None) -> Path:
    """Apple's own MLX exports: decoder and projector in float16, FastViTHD as a Core ML package only.

    With `bits`, every matrix is quantised in groups of 64: embedding, head and projector too. The head is
    there even where the PyTorch checkpoint ties it. The package is a stand-in without a model inside.
    """
    config, weights = read(src)
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config.pop("torch_dtype", None)
    config |= {"image_token_index": IMAGE_TOKEN, "tie_word_embeddings": False, "vision_config": {}}
    if bits:
        config["quantization"] = {"group_size": QUANTIZED_GROUP, "bits": bits}
    out: Weights = {}
    for name, value in renamed(weights, apple_mlx_name).items():
        out |= _quantized(name, value.astype(mx.float16), bits)
    write(src, dst, config, out, "mlx")
    package = dst / "fastvithd.mlpackage"
    data = package / "Data" / "com.apple.CoreML"
    data.mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(b"no model: a stand-in for the tests\n")
    item = {"author": "com.apple.CoreML", "description": "CoreML Model Specification",
            "name": "model.mlmodel", "path": "com.apple.CoreML/model.mlmodel"}  # fmt: skip
    key = "00000000-0000-0000-0000-000000000001"
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {key: item}, "rootModelIdentifier": key}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n")
    return dst


def apple_mlx_name(name: str) -> str | None:
    """A LLaVA name in Apple's MLX exports; None is left out there."""
    if name.startswith(LLAVA_VISION):
        return None
    if name.startswith("model.mm_projector."):
        return "multi_modal_projector.linear_" + name.removeprefix("model.mm_projector.")
    return "language_model." + name


def _quantized(name: str, value: mx.array, bits: int | None) -> Weights:
    if not bits or value.ndim != 2:
        return {name: value}
    stem = name.removesuffix("weight")
    packed, scales, biases = mx.quantize(value, group_size=QUANTIZED_GROUP, bits=bits)
    return {name: packed, f"{stem}scales": scales, f"{stem}biases": biases}


def to_sharded(src: Path, dst: Path, max_bytes: int) -> Path:
    """The LLaVA layout over several safetensors files of at most `max_bytes`, with their index."""
    _, weights = read(src)
    names = _write_shards(
        weights, max_bytes, dst, "model-{:05d}-of-{:05d}.safetensors",
        lambda path, shard: mx.save_safetensors(str(path), shard, {"format": "pt"}),
    )  # fmt: skip
    _write_index(weights, names, dst / "model.safetensors.index.json")
    copy_rest(src, dst)
    return dst


def to_bin_shards(src: Path, dst: Path, max_bytes: int) -> Path:
    """The LLaVA layout as PyTorch `.bin` files of at most `max_bytes`, with their index. Needs torch."""
    import torch

    def tensor(value: mx.array) -> torch.Tensor:
        if value.dtype == mx.bfloat16:  # numpy has none: pass the bits
            return torch.from_numpy(np.array(value.view(mx.uint16))).view(torch.bfloat16)
        return torch.from_numpy(np.array(value))

    _, weights = read(src)
    names = _write_shards(
        weights, max_bytes, dst, "pytorch_model-{:05d}-of-{:05d}.bin",
        lambda path, shard: torch.save({name: tensor(value) for name, value in shard.items()}, path),
    )  # fmt: skip
    _write_index(weights, names, dst / "pytorch_model.bin.index.json")
    copy_rest(src, dst)
    return dst


def _write_shards(
    weights: Weights, max_bytes: int, dst: Path, pattern: str, save: Callable[[Path, Weights], None]
) -> dict[str, str]:
    """Save greedily filled shards; returns tensor name -> file name."""
    dst.mkdir(parents=True)
    shards = list(_fill(weights, max_bytes))
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = pattern.format(number, len(shards))
        save(dst / file, shard)
        names |= dict.fromkeys(shard, file)
    return names


def _fill(weights: Weights, max_bytes: int) -> Iterator[Weights]:
    shard: Weights = {}
    for name, value in weights.items():
        if shard and sum(v.nbytes for v in shard.values()) + value.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = value
    yield shard


def _write_index(weights: Weights, names: dict[str, str], path: Path) -> None:
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")
