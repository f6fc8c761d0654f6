"""LoRA adapters as PEFT saves them, and the oracle: the same merged by hand.

Factors are multiples of 1/8 and scales powers of two, so that B A is exact in float32 whatever the order of
summation, and the merged tensors can be compared byte for byte.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

PREFIX = "base_model.model."
LAYER = "model.layers.0.self_attn.q_proj"
VISION = "model.vision_tower.vision_tower.model."


def factors(name: str, weight: tuple[int, ...], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A (rank, in, ...) and B (out, rank, ...) for a weight of (out, in, ...), seeded by the name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    a = rng.integers(-4, 5, (rank, *weight[1:])) / 8
    b = rng.integers(-4, 5, (weight[0], rank, *(1 for _ in weight[2:]))) / 8
    return a.astype(np.float32), b.astype(np.float32)


def write_adapter(
    folder: Path, tensors: Mapping[str, np.ndarray], base: Path | str | None = None, **config: object
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors with tensors under these names."""
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base) if base else None,
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none", "target_modules": ["q_proj"],
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": None, "init_lora_weights": True, "inference_mode": True, "megatron_core": "megatron.core",
    } | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {n: mx.array(v) for n, v in tensors.items()})
    return folder


def write_trained(adapter: Path, base: Path, **changes: object) -> Path:
    """Write the config.json that LLaVA's training leaves beside an adapter: the base's with the run's own settings."""
    config = json.loads((base / "config.json").read_text()) | changes
    (adapter / "config.json").write_text(json.dumps(config))
    return adapter


def write_rest(adapter: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write non_lora_trainables.bin with tensors of the model that was trained, in float32. Needs torch."""
    import torch

    state = {f"{PREFIX}{name}": torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()}
    torch.save(state, adapter / "non_lora_trainables.bin")
    return adapter


def pair(module: str, a: np.ndarray, b: np.ndarray, suffix: str = "") -> dict[str, np.ndarray]:
    """The two factors of a module under PEFT's names; `suffix` is an adapter's name in older files."""
    return {f"{PREFIX}{module}.lora_A{suffix}.weight": a, f"{PREFIX}{module}.lora_B{suffix}.weight": b}


def merged_by_hand(base: Path, target: Path, added: Mapping[str, np.ndarray]) -> Path:
    """A copy of a LLaVA checkpoint with something added to its tensors in float32, in their own types."""
    shutil.copytree(base, target)
    weights = mx.load(str(base / "model.safetensors"))
    for name, delta in added.items():
        plain = np.array(weights[name].astype(mx.float32))
        weights[name] = mx.array(plain + delta.reshape(plain.shape)).astype(weights[name].dtype)
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    return target


def shape_of(base: Path, name: str) -> tuple[int, ...]:
    """Shape of a checkpoint's tensor."""
    return tuple(mx.load(str(base / "model.safetensors"))[name].shape)


def deltas(base, modules, rank=4, scale=2.0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The adapter's tensors, and what numpy adds: (scale * B A) by weight."""
    tensors, added = {}, {}
    for module in modules:
        a, b = factors(module, shape_of(base, f"{module}.weight"), rank)
        tensors |= pair(module, a, b)
        added[f"{module}.weight"] = scale * (b.reshape(len(b), -1) @ a.reshape(rank, -1))
    return tensors, added


def refused(adapter: Path, tmp_path: Path, capsys: Any, *flags: str) -> str:
    """The one line that the command says of an adapter that it doesn't convert."""
    from fastvlm_convert.cli import main

    assert main([str(adapter), "-o", str(tmp_path / "out"), "--no-coreml", *flags]) == 2
    assert not (tmp_path / "out").exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err
