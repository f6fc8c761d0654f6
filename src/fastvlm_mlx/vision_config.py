"""The vision encoder's shape: FastViTHD, and the FastViT encoders with 32x downsampling that it is compared with.

Source: FastVLM (arXiv 2412.13303), sections 3.1 and 3.2; shapes as in apple/ml-fastvlm 592b4ad,
llava/model/multimodal_encoder/mobileclip/mci.py, and apple/ml-mobileclip, mobileclip/models/mci.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fastvlm_mlx.errors import ConfigError, ResolutionError

DOWNSAMPLING = 64  # FastViTHD's: stem 4x, then four 2x patch embeddings; image pixels per token side
LEAST_DOWNSAMPLING = 32  # FastViT's: three patch embeddings
_STEM = 4
_STAGES = (4, 5)
NORMS, POOLINGS = ("layer", "batch"), ("average", "depthwise")


def check_side(pixels: int, downsampling: int | None = None) -> None:
    """Raise ResolutionError unless an image side can be cut into whole tokens.

    Args:
        pixels: the side.
        downsampling: the model's, image pixels per token side; None where no model is known yet: then a side passes
            that some encoder takes, and the model's own check follows.
    """
    least, step = (downsampling or LEAST_DOWNSAMPLING), downsampling or DOWNSAMPLING
    if pixels < least or pixels % least:
        below = max(pixels // step, 1) * step
        also = "" if downsampling else f" (models with FastViT take multiples of {least}, too)"
        raise ResolutionError(
            f"resolution must be a multiple of {step} pixels, got {pixels}; "
            f"the nearest are {below} and {below + step}{also}"
        )


@dataclass(frozen=True, slots=True)
class MultiScaleConfig:
    """Maps of earlier stages beside the last one's, pooled to its size (the paper's section 3.1.1).

    The features' channels are those of the expanded last stage, then those of `stages` in their order.

    Attributes:
        pooling: "average", or "depthwise": a convolution whose kernel and stride are the ratio of the maps' sides.
        stages: counted from 0, each before the last one.
    """

    pooling: str
    stages: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown pooling, or for no stages or one twice."""
        if self.pooling not in POOLINGS:
            raise ConfigError(f"vision.multi_scale.pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise ConfigError(f"vision.multi_scale.stages must name at least one stage, each once, got {self.stages}")


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The encoder's shape; the defaults are FastViTHD's.

    FastViTHD as published: image_size 1024, layers [2,12,24,4,2], embed_dims [96,192,384,768,1536]. Stages are counted
    from 0.

    Attributes:
        image_size: side that the weights were trained at, pixels.
        layers: blocks of each stage, 4 or 5 of them.
        embed_dims: channels of each stage.
        mlp_ratio: a block's hidden channels, as a multiple of its own.
        head_dim: channels of an attention head.
        family: what the encoder is called; nothing is computed from it.
        attention_from: the first stage that attends; those before mix with a 3x3 convolution.
        norm: before attention: "layer", or "batch", which the converter folds into the matrix after it.
        se_downsamples: of each stage, whether its patch embedding squeezes and excites; none where empty.
        multi_scale: maps of earlier stages that are features too.
    """

    image_size: int
    layers: tuple[int, ...]
    embed_dims: tuple[int, ...]
    mlp_ratio: int = 4
    head_dim: int = 32
    family: str = "fastvithd"
    attention_from: int = 3
    norm: str = "layer"
    se_downsamples: tuple[bool, ...] = ()
    multi_scale: MultiScaleConfig | None = None

    @property
    def downsampling(self) -> int:
        """Image pixels per token side: 32 with four stages, 64 with five."""
        return _STEM << (len(self.layers) - 1)

    @property
    def feature_dim(self) -> int:
        """Channels of the output: the last stage's doubled, and those of the pooled stages."""
        pooled = self.multi_scale.stages if self.multi_scale else ()
        return 2 * self.embed_dims[-1] + sum(self.embed_dims[stage] for stage in pooled)

    def attends(self, stage: int) -> bool:
        """Whether a stage attends over its map, after a positional convolution."""
        return stage >= self.attention_from

    def squeezes(self, stage: int) -> bool:
        """Whether a stage's patch embedding has squeeze-and-excite."""
        return bool(self.se_downsamples) and self.se_downsamples[stage]

    def squeezed_dim(self, stage: int) -> int:
        """Hidden channels of that squeeze-and-excite: a quarter, as a multiple of 8."""
        return max(8, (self.embed_dims[stage] + 16) // 32 * 8)

    def pools(self, stage: int) -> bool:
        """Whether a stage's map is pooled into the features."""
        return self.multi_scale is not None and stage in self.multi_scale.stages

    def pooling_ratio(self, stage: int) -> int:
        """Sides of a stage's map over those of the last one's."""
        return 1 << (len(self.layers) - 1 - stage)

    def __post_init__(self) -> None:
        """Raise ConfigError for a shape that no such encoder can have."""
        stages = len(self.layers)
        if stages not in _STAGES or len(self.embed_dims) != stages or min(*self.layers, *self.embed_dims) < 1:
            raise ConfigError(
                "vision needs 4 or 5 positive layers and as many positive embed_dims, got "
                f"{self.layers} and {self.embed_dims}"
            )
        if any(dim % before for before, dim in pairwise(self.embed_dims)):
            raise ConfigError(f"each of vision.embed_dims must be a multiple of the one before, got {self.embed_dims}")
        if not 0 <= self.attention_from <= stages:
            raise ConfigError(f"vision.attention_from must be a stage from 0 to {stages}, got {self.attention_from}")
        attending = self.embed_dims[self.attention_from :]
        if self.head_dim < 1 or any(dim % self.head_dim for dim in attending):
            raise ConfigError(
                f"vision.embed_dims of the stages that attend must be multiples of head_dim {self.head_dim}, "
                f"got {attending}"
            )
        if self.mlp_ratio < 1:
            raise ConfigError(f"vision.mlp_ratio must be at least 1, got {self.mlp_ratio}")
        if self.image_size < self.downsampling or self.image_size % self.downsampling:
            raise ConfigError(f"vision.image_size must be a multiple of {self.downsampling}, got {self.image_size}")
        self._check_options()

    def _check_options(self) -> None:
        stages = len(self.layers)
        if self.norm not in NORMS:
            raise ConfigError(f"vision.norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.se_downsamples and (len(self.se_downsamples) != stages or self.se_downsamples[0]):
            raise ConfigError(
                f"vision.se_downsamples must have a value for each of the {stages} stages, the first one false, since "
                f"that has no patch embedding; got {self.se_downsamples}"
            )
        if self.multi_scale and not all(0 <= stage < stages - 1 for stage in self.multi_scale.stages):
            raise ConfigError(
                f"vision.multi_scale.stages must be before the last stage, from 0 to {stages - 2}, "
                f"got {self.multi_scale.stages}"
            )
