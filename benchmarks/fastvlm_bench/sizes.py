"""The shapes of the published models, and of the paper's other systems, for weights that are random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import InputError
from fastvlm_mlx.vision_config import POOLINGS, MultiScaleConfig, VisionConfig

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
    qkv_bias: bool = True
    positions: int = 32768  # that the decoder was trained for


FASTVITHD = ((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), 1024, 768)
SIZES = {
    "0.5b": Size(*FASTVITHD, 896, 4864, 24, 14, 2, 151936),
    "1.5b": Size(*FASTVITHD, 1536, 8960, 28, 12, 2, 151936),
    "7b": Size(*FASTVITHD, 3584, 18944, 28, 28, 4, 152064, tied=False),
    "vicuna-7b": Size(
        *FASTVITHD, 4096, 11008, 32, 32, 32, 32000, tied=False, family="llama", qkv_bias=False, positions=4096
    ),
    "tiny": Size((1, 2, 2, 1, 1), (16, 32, 64, 128, 256), 256, 64, 128, 256, 2, 4, 2, 1024),
}


def _mci(family: str, layers: tuple[int, ...], embed_dims: tuple[int, ...]) -> VisionConfig:
    """FastViT as MobileCLIP has it."""
    squeezing = (False, False, True, True)
    return VisionConfig(256, layers, embed_dims, 3, family=family, norm="batch", se_downsamples=squeezing)


# What may stand after a size and "+", instead of its encoder; the paper's FastViT is mci2. POOLINGS may, too: its own
# encoder with multi-scale features of all stages.
FASTVIT = {
    "mci0": _mci("mci0", (2, 6, 10, 2), (64, 128, 256, 512)),
    "mci1": _mci("mci1", (4, 12, 20, 4), (64, 128, 256, 512)),
    "mci2": _mci("mci2", (4, 12, 24, 4), (80, 160, 320, 640)),
}


def vision_of(name: str) -> VisionConfig:
    """The encoder of a shape, such as "0.5b", "0.5b+mci2" or "1.5b+depthwise".

    Raises:
        InputError: no such shape; lists those that are.
    """
    size, _, other = name.partition("+")
    if size not in SIZES or (other or "mci2") not in (*FASTVIT, *POOLINGS) or name.endswith("+"):
        raise InputError(
            f"--size must be of {', '.join(SIZES)}, each with another encoder as in 0.5b+mci2 if need be "
            f"(+{', +'.join((*FASTVIT, *POOLINGS))}), got {name!r}"
        )
    if other in FASTVIT:
        return FASTVIT[other]
    own = VisionConfig(SIZES[size].image_size, SIZES[size].layers, SIZES[size].dims)
    earlier = tuple(range(len(own.layers) - 1))
    return replace(own, multi_scale=MultiScaleConfig(other, earlier)) if other else own


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
