"""The vision encoders that the converter knows: one entry for each, found by the name that a config gives it.

Sources: apple/ml-fastvlm 592b4ad, llava/model/multimodal_encoder/mobileclip (mci.py, configs/mobileclip_l.json);
apple/ml-mobileclip, mobileclip/models/mci.py and mobileclip/configs (MobileCLIP-S0, -S1, -S2 have MCi0, MCi1, MCi2);
timm 1.0.31, timm/models/fastvit.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvlm_mlx.config import VisionConfig, from_dict
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.vision_config import MultiScaleConfig


@dataclass(frozen=True, slots=True)
class Family:
    """A vision encoder.

    Attributes:
        title: what people call it.
        tower: how `mm_vision_tower` of LLaVA's configs begins; the side of its images follows.
        timm: its name in timm, and so in transformers' configs.
        side: of the images that it was published for, pixels.
        stem_scales: training gives the stem's 3x3 convolutions a 1x1 branch beside them.
        layers, embed_dims, mlp_ratio, norm, se_downsamples: as in VisionConfig.
    """

    title: str
    tower: str
    timm: str
    side: int
    stem_scales: bool
    layers: tuple[int, ...]
    embed_dims: tuple[int, ...]
    mlp_ratio: int
    norm: str
    se_downsamples: tuple[bool, ...]


def _mci(number: int, layers: tuple[int, ...], embed_dims: tuple[int, ...]) -> Family:
    """FastViT as in MobileCLIP-S`number`."""
    squeezing = (False, False, True, True)
    tower, timm = f"mobileclip_s{number}", f"fastvit_mci{number}"
    return Family(f"MCi{number}", tower, timm, 256, True, layers, embed_dims, 3, "batch", squeezing)


FAMILIES = {
    "fastvithd": Family(
        title="FastViTHD",
        tower="mobileclip_l",
        timm="fastvit_mci3",
        side=1024,
        stem_scales=False,
        layers=(2, 12, 24, 4, 2),
        embed_dims=(96, 192, 384, 768, 1536),
        mlp_ratio=4,
        norm="layer",
        se_downsamples=(),
    ),
    "mci0": _mci(0, (2, 6, 10, 2), (64, 128, 256, 512)),
    "mci1": _mci(1, (4, 12, 20, 4), (64, 128, 256, 512)),
    "mci2": _mci(2, (4, 12, 24, 4), (80, 160, 320, 640)),
}

# What a config may say of its own encoder; an extension of the published configs, whose encoders go by their names.
_OWN = ("layers", "embed_dims", "mlp_ratio", "se_downsamples")


def family_of_tower(tower: str) -> tuple[str, int]:
    """Family and image side in pixels of an `mm_vision_tower`, such as "mobileclip_s2_1024".

    Raises:
        CheckpointError: no known one; lists those.
    """
    parts = tower.split("_")
    name = next((name for name, known in FAMILIES.items() if known.tower == "_".join(parts[:2])), None)
    if name is None or len(parts) < 3 or not parts[-1].isdecimal():
        known = ", ".join(f"{family.tower}_SIDE ({family.title})" for family in FAMILIES.values())
        raise CheckpointError(f"mm_vision_tower is {tower!r}; this version knows {known}, SIDE being pixels")
    return name, int(parts[-1])


def family_of_timm(architecture: object) -> str:
    """Family of a model of timm's. Raises CheckpointError: no known one; lists those."""
    for name, family in FAMILIES.items():
        if family.timm == architecture:
            return name
    known = ", ".join(family.timm for family in FAMILIES.values())
    raise CheckpointError(f"vision_config.architecture is {architecture!r}; this version knows {known}")


def vision_config(name: str, side: int, own: Mapping[str, Any]) -> VisionConfig:
    """A family's shape.

    Args:
        name: of FAMILIES.
        side: of the images, pixels.
        own: what the checkpoint's config says of its encoder: `layers`, `embed_dims`, `mlp_ratio` and `se_downsamples`
            instead of the family's, and `multi_scale` (see `fastvlm_mlx.vision_config.MultiScaleConfig`).
            Other keys, of which mlx-vlm's configs have many, are left alone.

    Raises:
        ConfigError: a shape that no such encoder has.
    """
    family = FAMILIES[name]
    given = {key: own.get(key, getattr(family, key)) for key in _OWN}
    scales = own.get("multi_scale")
    return VisionConfig(
        image_size=side,
        layers=tuple(given["layers"]),
        embed_dims=tuple(given["embed_dims"]),
        mlp_ratio=given["mlp_ratio"],
        family=name,
        norm=family.norm,
        se_downsamples=tuple(given["se_downsamples"]),
        multi_scale=from_dict(MultiScaleConfig, scales, "multi_scale") if scales is not None else None,
    )
