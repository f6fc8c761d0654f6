"""Shapes whose work is counted by hand."""

from __future__ import annotations

from fastvlm_bench.layers import Storage
from fastvlm_mlx.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig

PUBLISHED = VisionConfig(1024, (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536))
QWEN = DecoderConfig(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)  # Qwen2-0.5B
SMALL = VisionConfig(128, (1, 1, 2, 1, 1), (8, 16, 32, 64, 64), mlp_ratio=3)  # stage 5 keeps its channels
HALF, FULL = Storage("bfloat16"), Storage("float32")


def half_billion() -> ModelConfig:
    """The published model of that size."""
    return ModelConfig("0.5b", QWEN, ProjectorConfig(3072, 896), PUBLISHED, 8192, (0,))


def decoder_config(tied: bool = True) -> DecoderConfig:
    """Two blocks, four heads on two keys and values, no two sizes alike."""
    return DecoderConfig(128, 192, 2, 4, 2, 300, tie_word_embeddings=tied)


def model_config(vision: VisionConfig | None = SMALL, tied: bool = True, newline: bool = False) -> ModelConfig:
    """All of it small."""
    projector = ProjectorConfig(SMALL.feature_dim, 128)
    return ModelConfig("small", decoder_config(tied), projector, vision, 512, (0,), image_newline=newline)
