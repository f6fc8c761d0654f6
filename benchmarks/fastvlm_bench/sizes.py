"""The shapes of the published models, and of the paper's Vicuna-7B, for weights that are random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvlm_mlx.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Size:
    """A model's shape; `tied`: the decoder's head is its embedding."""

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    image_size: int
    clip_dim: int  # of CLIP's head, which is published and unused
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True
    family: str = "qwen2"  # of fastvlm_mlx.decoder.FAMILIES
    positions: int = 32768  # that the decoder was trained for


FASTVITHD = ((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), 1024, 768)
SIZES = {
    "0.5b": Size(*FASTVITHD, 896, 4864, 24, 14, 2, 151936),
    "1.5b": Size(*FASTVITHD, 1536, 8960, 28, 12, 2, 151936),
    "7b": Size(*FASTVITHD, 3584, 18944, 28, 28, 4, 152064, tied=False),
    "vicuna-7b": Size(*FASTVITHD, 4096, 11008, 32, 32, 32, 32000, tied=False, family="llama", positions=4096),
    "tiny": Size((1, 2, 2, 1, 1), (16, 32, 64, 128, 256), 256, 64, 128, 256, 2, 4, 2, 1024),
}


def published_size(config: ModelConfig) -> str | None:
    """The size whose decoder a model has; None for another one's, or another encoder than FastViTHD as published.

    "tiny" is none, since nobody published it. The vocabulary isn't looked at: layouts pad it differently.
    """
    vision = config.vision
    if vision and (vision.family != "fastvithd" or vision.multi_scale):
        return None
    decoder = config.decoder
    shape = decoder.hidden_size, decoder.intermediate_size, decoder.num_hidden_layers, decoder.num_attention_heads
    for name, size in SIZES.items():
        if name != "tiny" and shape == (size.hidden, size.intermediate, size.blocks, size.heads):
            return name
    return None
