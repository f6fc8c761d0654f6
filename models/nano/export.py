"""Write the published LLaVA layout: what fastvlm-convert reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nano.network import NanoVLM
from nano.settings import NanoConfig

# Weights of this size keep three bits more in float16 than in bfloat16, and none comes near its range.
DTYPE = torch.float16


def export(model: NanoVLM, tokenizer: Path, out: Path, dtype: torch.dtype = DTYPE) -> None:
    """Write config.json, generation_config.json, model.safetensors and tokenizer.json.

    Args:
        model: on any device; only read.
        tokenizer: tokenizer.json; its special tokens are ids 0 (<|endoftext|>), 1 and 2 (<|im_end|>).
        out: folder, made if need be.
        dtype: of the stored weights.

    Raises:
        ValueError: a weight isn't finite, or not in this dtype.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.published_state().items():
        tensor = tensor.detach().cpu()
        kept = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not torch.isfinite(kept).all():
            raise ValueError(f"{name} has values that {dtype} doesn't hold; store another dtype or train again")
        tensors[name] = kept.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write(out / "config.json", published_config(model.config, str(dtype).removeprefix("torch.")))
    _write(out / "generation_config.json", {"do_sample": False, "eos_token_id": [2, 0]})
    shutil.copyfile(tokenizer, out / "tokenizer.json")


def published_config(config: NanoConfig, dtype: str) -> dict[str, object]:
    """LLaVA's config.json; `mm_vision_config`, an extension of it, tells the sizes."""
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.context,
        "max_window_layers": config.layers,
        "mm_hidden_size": config.feature_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_config": _vision(config),
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{config.side}",
        "model_type": "llava_qwen2",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": config.rope_theta,
        "sliding_window": config.context,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": config.context,
        "tokenizer_padding_side": "right",
        "torch_dtype": dtype,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": config.vocabulary,
    }


def _vision(config: NanoConfig) -> dict[str, object]:
    sizes: dict[str, object] = {"layers": list(config.depths), "embed_dims": list(config.dims)}
    if config.scales:
        sizes["multi_scale"] = {"pooling": "depthwise", "stages": list(config.scales)}
    return sizes


def _write(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
