"""The JSON files of the other runtimes' folders: config.json in LLaVA's dialect, and how images are prepared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_convert.exports import PUBLISHED_VISION, Form
from fastvlm_mlx.config import DOWNSAMPLING, VisionConfig

if TYPE_CHECKING:
    from fastvlm_convert.export_plan import ExportPlan

# What a LLaVA config says that isn't true of the output any more, or is said anew below.
_NOT_KEPT = (
    "_name_or_path", "auto_map", "dtype", "image_token_index", "mm_vision_config", "quantization",
    "quantization_config", "rope_parameters", "rope_scaling", "torch_dtype", "vision_config",
)  # fmt: skip
_FIXED = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "hidden_act": "silu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "model_type": "llava_qwen2",
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
}
_ASPECTS = {"pad": "pad", "crop": None}  # as LLaVA's config says it: anything that it doesn't know is cropped


def make_config(plan: ExportPlan) -> dict[str, Any]:
    """config.json of an export; what a LLaVA source says besides is kept."""
    form, config, source = plan.form, plan.config, plan.checkpoint.config
    decoder, packaged = config.decoder, plan.form.package
    kept = source if source.get("model_type") == _FIXED["model_type"] else {}
    made = {key: value for key, value in kept.items() if key not in _NOT_KEPT} | _FIXED
    made |= {
        "eos_token_id": kept.get("eos_token_id") or list(config.eos_token_ids),
        "hidden_size": decoder.hidden_size,
        "image_aspect_ratio": _ASPECTS.get(config.aspect, "pad"),  # the runtimes know no tiles
        "image_grid_pinpoints": None,
        "image_token_index": plan.image_token,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_position_embeddings,
        "mm_hidden_size": config.projector.input_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": config.projector.kind,
        "mm_vision_tower": f"mobileclip_l_{plan.side}",
        "num_attention_heads": decoder.num_attention_heads,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_key_value_heads": decoder.num_key_value_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tie_word_embeddings and not form.own_head,
        "tokenizer_model_max_length": config.context_length,
        "vision_config": {} if packaged or config.vision is None else _vision(config.vision, plan.clip_channels),
        "vocab_size": decoder.vocab_size,
    }
    if decoder.rope_factor != 1:  # older and newer readers look for the type under different names
        made["rope_scaling"] = {"factor": decoder.rope_factor, "rope_type": "linear", "type": "linear"}
    if packaged and (shape := _unpublished_shape(config.vision, kept)):
        made["mm_vision_config"] = shape
    if width := config.quantization:
        made["quantization"] = {"group_size": width.group_size, "bits": width.bits}
    if width and not packaged:  # mlx-vlm writes it under both names
        made["quantization_config"] = made["quantization"]
    return dict(sorted(made.items()))


def _unpublished_shape(vision: VisionConfig | None, source: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """FastViTHD's shape where no reader would guess it."""
    if vision is None:
        return source.get("mm_vision_config")
    shape = vision.layers, vision.embed_dims
    return None if shape == PUBLISHED_VISION else dict(zip(("layers", "embed_dims"), shape, strict=True))


def _vision(vision: VisionConfig, clip_channels: int) -> dict[str, Any]:
    """FastViTHD's shape as mlx-vlm's published files spell it out."""
    return {
        "cls_ratio": 2.0,
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * 5,
        "embed_dims": vision.embed_dims,
        "hidden_size": 1024,
        "image_size": vision.image_size,
        "intermediate_size": 3072,
        "layer_scale_init_value": 1e-05,
        "layers": vision.layers,
        "mlp_ratios": [vision.mlp_ratio] * 5,
        "num_classes": 1000,
        "patch_size": DOWNSAMPLING,
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "projection_dim": clip_channels,
        "repmixer_kernel_size": 3,
        "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
    }


def write_processors(form: Form, folder: Path, side: int) -> None:
    """Write preprocessor_config.json and processor_config.json: pixels / 255, no mean, no deviation."""
    processor, images = form.processor
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": side, "width": side},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_processor_type": images,
            "image_std": [1.0, 1.0, 1.0],
            "processor_class": processor,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": side},
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 0,
            "patch_size": DOWNSAMPLING,
            "processor_class": processor,
        },
    )


def write_json(path: Path, data: object) -> None:
    """Write a JSON file as the published ones are laid out."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
