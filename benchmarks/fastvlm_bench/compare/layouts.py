"""Write a LLaVA checkpoint's weights in the layouts that the rivals load.

Written from what the public files and the rivals' own code look like, never from the converter's rules: the
tests use these functions as the converter's oracle. Each takes a checkpoint's folder and makes a new one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

FASTVITHD = {"layers": [2, 12, 24, 4, 2], "embed_dims": [96, 192, 384, 768, 1536]}
LLAVA_VISION = "model.vision_tower.vision_tower.model."
TIMM = "model.vision_tower.timm_model."
IMAGE_TOKEN = 151646  # `<image>` in the vocabulary of the exports that have it there
VOCABULARY_PADDING = 64  # transformers' files round the embedding's rows up

# Apple's `network` numbers its stages (n), patch embeddings (p) and position embeddings (c) flat:
#   n0 p1 n2 p3 n4 p5 c6 n7 p8 c9 n10
STAGE_OF_INDEX = {0: 0, 1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3, 8: 4, 9: 4, 10: 4}
# What config.json says of the decoder.
DECODER_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_window_layers", "use_sliding_window",
    "hidden_act", "max_position_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip

Weights = dict[str, mx.array]


def to_transformers(
    src: Path, dst: Path, *, pad_vocabulary: bool = False, image_token: int | None = None, tokens: int | None = None
) -> Path:
    """What transformers' FastVlmForConditionalGeneration loads (model_type fast_vlm), as the KamilaMila repositories.

    `pad_vocabulary` appends rows of zeros to embedding and head, so that `<image>` gets an id beyond the real
    ones, as published. Without it the last id stands for images in the tiny vocabularies. `image_token` is
    another id for images; `tokens` as in `read`.
    """
    config, weights = read(src, tokens)
    rows = vocabulary = config["vocab_size"]
    if pad_vocabulary:
        rows = (vocabulary // VOCABULARY_PADDING + 1) * VOCABULARY_PADDING
        weights = {n: _pad_rows(w, rows) if n.endswith(("embed_tokens.weight", "lm_head.weight")) else w
                   for n, w in weights.items()}  # fmt: skip
    image = min(IMAGE_TOKEN, vocabulary if pad_vocabulary else vocabulary - 1) if image_token is None else image_token
    write(src, dst, _transformers_config(config, rows, image), renamed(weights, transformers_name), "pt")
    return dst


def transformers_name(name: str) -> str | None:
    """A LLaVA name in transformers; None is left out there."""
    if name.startswith(LLAVA_VISION):
        timm = _timm_name(name.removeprefix(LLAVA_VISION))
        return None if timm is None else TIMM + timm
    if name.startswith("model.mm_projector."):
        layer, leaf = name.removeprefix("model.mm_projector.").split(".")
        return f"model.multi_modal_projector.linear_{int(layer) // 2 + 1}.{leaf}"
    if name == "lm_head.weight":
        return name
    return "model.language_model." + name.removeprefix("model.")


def _timm_name(name: str) -> str | None:
    """A tensor of Apple's FastViTHD in timm's `fastvit_mci3`."""
    part, _, rest = name.partition(".")
    if part == "head":
        return None  # CLIP's head: FastVLM doesn't use it, and timm's model is built without one
    if part == "patch_embed":
        return f"stem.{rest}"
    if part == "conv_exp":
        return "final_conv." + rest.replace("se.reduce", "se.fc1").replace("se.expand", "se.fc2")
    number, _, rest = rest.partition(".")
    stage = f"stages.{STAGE_OF_INDEX[int(number)]}"
    if rest.startswith("proj."):
        return f"{stage}.downsample.{rest.replace('lkb_reparam', 'reparam_conv')}"
    if rest.startswith("reparam_conv."):
        return f"{stage}.pos_emb.{rest}"
    rest = rest.replace("convffn.", "mlp.")
    return f"{stage}.blocks.{rest}" + (".gamma" if "layer_scale" in rest else "")


def _transformers_config(config: dict[str, Any], rows: int, image_token: int) -> dict[str, Any]:
    model_args: dict[str, Any] = {"inference_mode": True}
    side = int(config["mm_vision_tower"].rsplit("_", 1)[-1])
    if shape := config.get("mm_vision_config"):  # the published files leave timm's defaults unsaid
        model_args |= {"layers": shape["layers"], "embed_dims": shape["embed_dims"]}
    return {
        "architectures": ["FastVlmForConditionalGeneration"],
        "image_seq_length": (side // 64) ** 2,  # says the side of the image: timm's model takes none
        "image_token_index": image_token,
        "model_type": "fast_vlm",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {k: config[k] for k in DECODER_KEYS} | {"model_type": "qwen2", "vocab_size": rows},
        "torch_dtype": "bfloat16",
        "vision_config": {
            "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
            "hidden_size": config["mm_hidden_size"], "initializer_range": 0.02, "model_args": model_args,
            "model_type": "timm_wrapper",
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }  # fmt: skip


def to_mlx_vlm(src: Path, dst: Path, dtype: mx.Dtype | None = None, tokens: int | None = None) -> Path:
    """mlx-vlm's fastvlm, as mlx-community/FastVLM-0.5B-bf16: channels last, no head where it is tied."""
    config, weights = read(src, tokens)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    shape = config.pop("mm_vision_config", FASTVITHD)
    # CLIP's head, which nobody uses: mlx-vlm wants one also where the checkpoint has none.
    clip = weights.setdefault(LLAVA_VISION + "head.proj", mx.zeros((2 * shape["embed_dims"][-1], 64)))
    config["vision_config"] = {
        "cls_ratio": 2.0, "down_patch_size": 7, "down_stride": 2, "downsamples": [True] * 5,
        "embed_dims": shape["embed_dims"], "hidden_size": 1024,
        "image_size": int(config["mm_vision_tower"].rsplit("_", 1)[-1]), "intermediate_size": 3072,
        "layer_scale_init_value": 1e-05, "layers": shape["layers"], "mlp_ratios": [4] * 5,
        "num_classes": 1000, "patch_size": 64, "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "projection_dim": clip.shape[1], "repmixer_kernel_size": 3,
        "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
    }  # fmt: skip
    moved = {name: _channels_last(name, value) for name, value in weights.items()}
    write(src, dst, config, cast(renamed(moved, mlx_vlm_name), dtype), "mlx")
    return dst


def mlx_vlm_name(name: str) -> str | None:
    """A LLaVA name in mlx-vlm; None is left out there."""
    if name.endswith("num_batches_tracked"):
        return None
    if name.startswith(LLAVA_VISION):
        rest = re.sub(r"^patch_embed\.", "patch_embed.blocks.", name.removeprefix(LLAVA_VISION))
        return "vision_tower.vision_model." + rest
    if name.startswith("model.mm_projector."):
        return name.removeprefix("model.")
    return "language_model." + name


def _channels_last(name: str, value: mx.array) -> mx.array:
    if name.startswith(LLAVA_VISION) and value.ndim == 4:
        return mx.contiguous(value.transpose(0, 2, 3, 1))
    if "layer_scale" in name:
        return value.reshape(1, 1, -1)
    return value


def to_mlx_lm(src: Path, dst: Path, dtype: mx.Dtype | None = None, tokens: int | None = None) -> Path:
    """mlx-lm's qwen2: the decoder alone."""
    config, weights = read(src, tokens)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    config = {k: config[k] for k in DECODER_KEYS} | {"model_type": "qwen2", "vocab_size": config["vocab_size"]}
    write(src, dst, config, cast(renamed(weights, mlx_lm_name), dtype), "mlx")
    return dst


def mlx_lm_name(name: str) -> str | None:
    """A LLaVA name in mlx-lm; None is left out there."""
    return None if name.startswith((LLAVA_VISION, "model.mm_projector.")) or "newline" in name else name


def read(src: Path, tokens: int | None = None) -> tuple[dict[str, Any], Weights]:
    """Config and tensors.

    The config says of the head what the tensors say, as not every published one does. With `tokens`, the rows
    of embedding and head from there on are zeros: the tokenizer has no such ids, our library never generates
    them, and random rows there could win.
    """
    weights: Weights = {}
    for file in sorted(src.glob("*.safetensors")):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    config = json.loads((src / "config.json").read_text(encoding="utf-8"))
    head, embedding = weights.get("lm_head.weight"), weights["model.embed_tokens.weight"]
    config["tie_word_embeddings"] = head is None or bool(mx.array_equal(head, embedding))
    if tokens is not None and tokens < config["vocab_size"]:
        for name in {"lm_head.weight", "model.embed_tokens.weight"} & weights.keys():
            weights[name] = _pad_rows(weights[name][:tokens], config["vocab_size"])
    return config, dict(sorted(weights.items()))


def renamed(weights: Weights, rename: Callable[[str], str | None]) -> Weights:
    """The tensors under their new names, without those that have none."""
    return {new: value for name, value in weights.items() if (new := rename(name)) is not None}


def cast(weights: Weights, dtype: mx.Dtype | None) -> Weights:
    """Floating-point tensors in another type; None leaves them."""
    if dtype is None:
        return weights
    return {n: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for n, w in weights.items()}


def write(src: Path, dst: Path, config: dict[str, Any], weights: Weights, form: str) -> None:
    """A new folder with these weights and this config, and the source's other files."""
    dst.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(dst / "model.safetensors"), weights, {"format": form})
    copy_rest(src, dst)
    (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_rest(src: Path, dst: Path) -> None:
    """Config, tokenizer and licence files: all that isn't weights."""
    for file in src.iterdir():
        if file.is_file() and not file.name.startswith(("model.safetensors", "model-", "pytorch_model")):
            shutil.copyfile(file, dst / file.name)


def _pad_rows(value: mx.array, rows: int) -> mx.array:
    return mx.concatenate([value, mx.zeros((rows - value.shape[0], value.shape[1]), value.dtype)])
