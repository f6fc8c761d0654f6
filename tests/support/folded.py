"""Folded FastViTHD weights of a seeded checkpoint, as the Core ML half of the converter takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastvlm_convert.configs import read_config
from fastvlm_convert.keymap import detect_layout, map_tensors
from fastvlm_convert.source import Checkpoint
from fastvlm_convert.vision_weights import from_checkpoint
from fastvlm_mlx.config import VisionConfig


def folded_vision(path: Path) -> tuple[VisionConfig, dict[str, np.ndarray]]:
    """Config, and name -> float32 weight, by the names of fastvlm_convert.folding."""
    checkpoint = Checkpoint(path)
    layout = detect_layout(checkpoint.tensors, path)
    config = read_config(checkpoint.config, layout, path.name, str(path), {}).vision
    assert config
    tensors, _ = map_tensors(checkpoint, layout)
    return config, from_checkpoint(checkpoint, tensors, config)
