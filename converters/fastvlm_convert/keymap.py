"""How each published layout names its tensors, as data: rules from its names to the LLaVA names.

The LLaVA names (those of apple/FastVLM-0.5B) are the converter's own: everything after this module knows
only them. Rules are tried in order; the first that matches wins; a name that none matches is unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from fastvlm_convert.source import Checkpoint
from fastvlm_mlx.errors import CheckpointError

VISION = "model.vision_tower.vision_tower.model."
PROJECTOR = "model.mm_projector."
DROP = ""

DECODER_NAMES = r"(model\.(?:embed_tokens|layers|norm)\..*|lm_head\..*)"


@dataclass(frozen=True, slots=True)
class Rule:
    """One regular expression and what it makes of a name; an empty replacement drops the tensor."""

    pattern: str
    replacement: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A family of checkpoints.

    Attributes:
        rules: from its names to the LLaVA names.
        parts: within the encoder's names that the rules made; each is replaced wherever it is found.
        marks: all of these must match some name for a checkpoint to be of this layout.
        channels_last: convolutions are stored (O, H, W, I) and layer scales (1, 1, C), as MLX has them.
        has_vision: the tensors include the vision encoder.
    """

    name: str
    rules: tuple[Rule, ...]
    marks: tuple[str, ...]
    channels_last: bool = False
    has_vision: bool = True
    parts: tuple[Rule, ...] = ()


_UNUSED = (
    Rule(r".*\.num_batches_tracked", DROP),  # batch norm's step counter
    Rule(r".*\.rotary_emb\.inv_freq", DROP),  # recomputed from rope_theta
)

# timm's names for FastViTHD (`fastvit_mci3`) and FastViT (`fastvit_mci0` to 2, whose four stages are numbered alike);
# `network` numbers its list of stages and embeddings flat.
_TIMM = r"(?:model\.)?vision_tower\.(?:timm_model\.)?"
_TIMM_EMBED = ((1, 1), (2, 3), (3, 5), (4, 8))  # stage, index of its patch embedding in `network`
_TIMM_POSITION = ((3, 6), (4, 9))
_TIMM_BLOCKS = ((0, 0), (1, 2), (2, 4), (3, 7), (4, 10))
_TIMM_RULES = (
    Rule(_TIMM + r"stem\.(\d)\.(.*)", VISION + r"patch_embed.\1.\2"),
    *(
        Rule(
            _TIMM + rf"stages\.{s}\.downsample\.proj\.0\.reparam_conv\.(.*)",
            VISION + rf"network.{i}.proj.0.lkb_reparam.\1",
        )
        for s, i in _TIMM_EMBED
    ),
    *(Rule(_TIMM + rf"stages\.{s}\.downsample\.proj\.(.*)", VISION + rf"network.{i}.proj.\1") for s, i in _TIMM_EMBED),
    *(Rule(_TIMM + rf"stages\.{s}\.pos_emb\.(.*)", VISION + rf"network.{i}.\1") for s, i in _TIMM_POSITION),
    *(
        rule
        for s, i in _TIMM_BLOCKS
        for rule in (
            Rule(_TIMM + rf"stages\.{s}\.blocks\.(\d+)\.mlp\.(.*)", VISION + rf"network.{i}.\1.convffn.\2"),
            Rule(
                _TIMM + rf"stages\.{s}\.blocks\.(\d+)\.(layer_scale(?:_[12])?)\.gamma",
                VISION + rf"network.{i}.\1.\2",
            ),
            Rule(_TIMM + rf"stages\.{s}\.blocks\.(\d+)\.(.*)", VISION + rf"network.{i}.\1.\2"),
        )
    ),
    Rule(_TIMM + r"final_conv\.se\.fc1\.(.*)", VISION + r"conv_exp.se.reduce.\1"),
    Rule(_TIMM + r"final_conv\.se\.fc2\.(.*)", VISION + r"conv_exp.se.expand.\1"),
    Rule(_TIMM + r"final_conv\.(.*)", VISION + r"conv_exp.\1"),
    Rule(_TIMM + r"multi_scale\.(.*)", VISION + r"multi_scale.\1"),
    Rule(_TIMM + r"head\..*", DROP),
)
# How it calls the branches of training.
_TIMM_PARTS = (
    Rule(r"\.conv_kxk\.", ".rbr_conv."),
    Rule(r"\.conv_scale\.", ".rbr_scale."),
    Rule(r"\.identity\.", ".rbr_skip."),
    Rule(r"\.large_conv\.", ".lkb_origin."),
    Rule(r"\.pos_enc\.", ".pe."),
    Rule(r"\.gamma$", ""),
)

LAYOUTS = (
    Layout(
        name="llava",
        marks=(r"model\.vision_tower\.vision_tower\.model\.patch_embed\.0\..*",),
        rules=(
            *_UNUSED,
            Rule(re.escape(VISION) + r"head\.proj", DROP),  # CLIP's head; FastVLM doesn't use it
            Rule(re.escape(VISION) + r"(.*)", VISION + r"\1"),
            Rule(r"model\.mm_projector\.(.*)", PROJECTOR + r"\1"),
            Rule(r"model\.image_newline", "model.image_newline"),
            Rule(DECODER_NAMES, r"\1"),
        ),
    ),
    Layout(
        name="transformers",
        parts=_TIMM_PARTS,
        marks=(
            r"(?:model\.)?multi_modal_projector\.linear_1\..*",
            r"(?:model\.)?vision_tower\.(?:timm_model\.)?stem\..*",
        ),
        rules=(
            *_UNUSED,
            *_TIMM_RULES,
            Rule(r"(?:model\.)?multi_modal_projector\.linear_1\.(.*)", PROJECTOR + r"0.\1"),
            Rule(r"(?:model\.)?multi_modal_projector\.linear_2\.(.*)", PROJECTOR + r"2.\1"),
            Rule(r"(?:model\.)?image_newline", "model.image_newline"),
            Rule(r"(?:language_model\.)?lm_head\.(.*)", r"lm_head.\1"),
            Rule(r"model\.language_model\.(.*)", r"model.\1"),
            Rule(r"language_model\.model\.(.*)", r"model.\1"),
        ),
    ),
    Layout(
        name="mlx-vlm",
        channels_last=True,
        marks=(r"vision_tower\.vision_model\.patch_embed\..*", r"mm_projector\..*"),
        rules=(
            *_UNUSED,
            Rule(r"vision_tower\.vision_model\.head\.proj", DROP),
            Rule(r"vision_tower\.vision_model\.patch_embed\.blocks\.(.*)", VISION + r"patch_embed.\1"),
            Rule(r"vision_tower\.vision_model\.(.*)", VISION + r"\1"),
            Rule(r"mm_projector\.(?:layers\.)?(.*)", PROJECTOR + r"\1"),
            Rule(r"language_model\." + DECODER_NAMES, r"\1"),
        ),
    ),
    Layout(
        name="apple-mlx",
        has_vision=False,  # FastViTHD lies beside them as fastvithd.mlpackage
        marks=(r"multi_modal_projector\.linear_0\..*", r"language_model\.model\..*"),
        rules=(
            *_UNUSED,
            Rule(r"multi_modal_projector\.linear_(\d)\.(.*)", PROJECTOR + r"\1.\2"),
            Rule(r"language_model\." + DECODER_NAMES, r"\1"),
        ),
    ),
)


def detect_layout(names: Mapping[str, object], where: object) -> Layout:
    """The layout that a checkpoint's tensor names follow.

    Raises:
        CheckpointError: none; says what the known ones look for.
    """
    for layout in LAYOUTS:
        if all(any(re.fullmatch(mark, name) for name in names) for mark in layout.marks):
            return layout
    known = "; ".join(f"{layout.name}: {', '.join(layout.marks)}" for layout in LAYOUTS)
    raise CheckpointError(
        f"{where} follows no known FastVLM layout; tensors expected ({known}), "
        f"found such as {', '.join(sorted(names)[:3])}"
    )


@dataclass(frozen=True, slots=True)
class Tensor:
    """A source tensor under its LLaVA name, with its shape in PyTorch's order."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    transform: Callable[[mx.array], mx.array] | None = None


def map_tensors(checkpoint: Checkpoint, layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """Rename all tensors of a checkpoint.

    Returns:
        LLaVA name -> tensor, and the source names that no rule of the layout knows.

    Raises:
        CheckpointError: two source tensors would get the same name.
    """
    mapped: dict[str, Tensor] = {}
    unknown: list[str] = []
    for source, stored in checkpoint.tensors.items():
        name = llava_name(source, layout)
        if name is None:
            unknown.append(source)
        if not name:
            continue
        if name in mapped:
            raise CheckpointError(f"{source} and {mapped[name].source} are both {name}; the checkpoint mixes layouts")
        shape, transform = _torch_order(name, stored.shape, layout)
        mapped[name] = Tensor(name, source, shape, stored.dtype, transform)
    return mapped, unknown


def llava_name(source: str, layout: Layout) -> str | None:
    """A name's LLaVA name by a layout's rules; "" for one to drop, None for one that no rule knows.

    Args:
        source: the name, as the layout has it.
        layout: whose rules count.
    """
    rules, parts = _compiled(layout)
    for pattern, replacement in rules:
        if match := pattern.fullmatch(source):
            name = match.expand(replacement)
            for part, other in parts if name.startswith(VISION) else ():
                name = part.sub(other, name)
            return name
    return None


@cache
def _compiled(layout: Layout) -> tuple[list[tuple[re.Pattern[str], str]], ...]:
    """A layout's rules, and those for parts of a name."""
    return tuple([(re.compile(r.pattern), r.replacement) for r in listed] for listed in (layout.rules, layout.parts))


def _torch_order(
    name: str, shape: tuple[int, ...], layout: Layout
) -> tuple[tuple[int, ...], Callable[[mx.array], mx.array] | None]:
    """Shape in PyTorch's axis order, and how to get the values there."""
    if layout.channels_last and name.startswith(VISION):
        if len(shape) == 4:
            out, high, wide, inputs = shape
            return (out, inputs, high, wide), lambda x: x.transpose(0, 3, 1, 2)
        if len(shape) == 3:
            return shape[::-1], lambda x: x.transpose(2, 1, 0)
    return shape, None
