"""The encoder's folded weights as numpy arrays, from a checkpoint or a bundle: what the Core ML half starts from."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from fastvlm_convert.folding import fold_vision
from fastvlm_convert.keymap import Tensor
from fastvlm_convert.mlx_weights import read_tensor
from fastvlm_convert.source import Checkpoint
from fastvlm_mlx.bundle import VISION, Bundle, assign, read_tensors
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import BundleError
from fastvlm_mlx.vision.fastvithd import FastViTHD


def from_checkpoint(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], config: VisionConfig
) -> dict[str, np.ndarray]:
    """Fold a checkpoint's vision tensors: name -> float32, by the names and layouts of fastvlm_convert.folding."""

    def read(name: str) -> np.ndarray:
        return np.array(read_tensor(checkpoint, tensors[name]).astype(mx.float32)).astype(np.float64)

    return {f.name: f.fold([read(s) for s in f.sources]).astype(np.float32) for f in fold_vision(config, tensors)}


def from_bundle(bundle: Bundle) -> dict[str, np.ndarray]:
    """The folded weights that a bundle's MLX encoder runs, unrounded.

    Raises:
        BundleError: the bundle has none, or rounded ones.
    """
    options, path = bundle.manifest.options, bundle.path / VISION
    if bundle.config.vision is None:
        raise BundleError(f"{bundle.path} has no vision weights")
    if options.get("vision_dtype") or options.get("quantize_vision"):
        raise BundleError(f"{path} holds rounded weights, which are no reference; give the source with --checkpoint")
    tensors = read_tensors(path)
    assign({"": FastViTHD(bundle.config.vision)}, tensors, str(path))  # refuses what doesn't fit
    return {name: np.array(value.astype(mx.float32)) for name, value in tensors.items()}
