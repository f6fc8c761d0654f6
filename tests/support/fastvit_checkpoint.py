"""Checkpoints with an encoder of tests/support/fastvit.py, in LLaVA's layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_convert.families import vision_config
from fastvlm_convert.keymap import LAYOUTS, Layout, Tensor, map_tensors
from fastvlm_convert.mlx_weights import check_tensors
from fastvlm_convert.schema import decoder_shapes, projector_shapes
from fastvlm_convert.source import DTYPES, StoredTensor
from fastvlm_convert.vision_weights import from_checkpoint
from fastvlm_mlx.bundle import assign
from fastvlm_mlx.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from fastvlm_mlx.vision.fastvithd import FastViTHD, MLXVisionEncoder
from support.fastvit import PREFIX, Reference, Shape, sample

TOWERS = {4: ("mci2", "mobileclip_s2_128"), 5: ("fastvithd", "mobileclip_l_256")}  # by number of stages
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class InMemory:
    """Tensors that the converter takes for a checkpoint's."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._values = {name: mx.array(value) for name, value in tensors.items()}
        self.tensors = {n: StoredTensor(Path("memory"), n, v.shape, NAMES[v.dtype]) for n, v in self._values.items()}

    def read(self, name: str) -> mx.array:
        return self._values[name]


def own_of(shape: Shape) -> dict[str, Any]:
    """What a config says of such an encoder."""
    own: dict[str, Any] = {"layers": shape.layers, "embed_dims": shape.dims}
    if shape.pooled:
        own["multi_scale"] = {"pooling": shape.pooling, "stages": list(shape.pooled)}
    return own


def config_of(shape: Shape, side: int = 128) -> VisionConfig:
    """The run time's config of such an encoder."""
    stages = len(shape.layers)
    return vision_config(TOWERS[stages][0], side if stages == 4 else 2 * side, own_of(shape))


def fold(tensors: dict[str, np.ndarray], config: VisionConfig, layout: str = "llava") -> dict[str, np.ndarray]:
    """The folded weights of a checkpoint's vision tensors, after the converter's own check of them."""
    checkpoint = InMemory(tensors)
    known: dict[str, Layout] = {layout.name: layout for layout in LAYOUTS}
    mapped, unknown = map_tensors(checkpoint, known[layout])  # type: ignore[arg-type]
    vision = {name: tensor for name, tensor in mapped.items() if name.startswith(PREFIX)}
    model = _model(config)
    check_tensors(vision | _language(model), unknown, model, "the checkpoint")
    return from_checkpoint(checkpoint, mapped, config)  # type: ignore[arg-type]


def _model(config: VisionConfig) -> ModelConfig:
    decoder = DecoderConfig(8, 8, 1, 1, 1, 8, tie_word_embeddings=True)
    return ModelConfig("test", decoder, ProjectorConfig(4, 8), config, 64, ())


def _language(model: ModelConfig) -> dict[str, Tensor]:
    """Stand-ins for all that isn't vision."""
    shapes = decoder_shapes(model.decoder) | projector_shapes(model.projector, newline=False)
    return {name: Tensor(name, name, shape, "F32") for name, shape in shapes.items()}


def encoder_of(weights: dict[str, np.ndarray], config: VisionConfig) -> MLXVisionEncoder:
    """The MLX encoder with folded weights, in float32."""
    network = FastViTHD(config)
    assign({"": network}, {name: mx.array(value) for name, value in weights.items()}, "weights")
    return MLXVisionEncoder(network, mx.float32)


def write_fastvit(llava: Path, out: Path, reference: Reference, **changes: Any) -> Path:
    """A LLaVA checkpoint with another encoder.

    Args:
        llava: a seeded checkpoint, whose decoder it gets.
        out: its folder.
        reference: the encoder.
        changes: of its config.json.
    """
    shape = reference.shape
    if not reference.weights:
        reference.features(sample(128, 128))
    weights = mx.load(str(llava / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
    hidden = kept["model.mm_projector.0.weight"].shape[0]
    mx.random.seed(5)
    kept["model.mm_projector.0.weight"] = mx.random.normal((hidden, shape.channels)) * shape.channels**-0.5
    out.mkdir(parents=True)
    tensors = kept | {name: mx.array(value) for name, value in reference.named().items()}
    mx.save_safetensors(str(out / "model.safetensors"), tensors, {"format": "pt"})
    config = json.loads((llava / "config.json").read_text())
    tower = {"mm_vision_tower": TOWERS[len(shape.layers)][1], "mm_vision_config": own_of(shape)}
    config |= tower | {"mm_hidden_size": shape.channels} | changes
    (out / "config.json").write_text(json.dumps(config))
    (out / "generation_config.json").write_bytes((llava / "generation_config.json").read_bytes())
    return out


def with_scales(shape: Shape, pooling: str, *stages: int) -> Shape:
    """The shape with multi-scale features."""
    return dataclasses.replace(shape, pooling=pooling, pooled=stages)
