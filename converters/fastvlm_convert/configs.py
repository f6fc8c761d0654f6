"""Read a source's config.json, in any of the published dialects, into ours."""

from __future__ import annotations

import dataclasses
import math
from ast import literal_eval
from collections.abc import Mapping
from typing import Any

from fastvlm_convert.decoders import LLAVA_FAMILIES, read_decoder, read_stops, text_family
from fastvlm_convert.families import FAMILIES, family_of_timm, family_of_tower, vision_config
from fastvlm_convert.keymap import Layout
from fastvlm_convert.settings import require as _require
from fastvlm_mlx.config import DecoderConfig, ModelConfig, ProjectorConfig, QuantizationConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError

MODEL_TYPES = (*LLAVA_FAMILIES, "fast_vlm")


def check_model_type(raw: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a model that isn't a FastVLM."""
    if raw.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type is {raw.get('model_type')!r}, expected one of {', '.join(MODEL_TYPES)}"
        )


def read_config(
    raw: Mapping[str, Any], layout: Layout, name: str, where: str, generation: Mapping[str, Any]
) -> ModelConfig:
    """Turn a source config into a ModelConfig; `tie_word_embeddings` is only what the source says.

    Raises:
        CheckpointError: an unknown model type, a missing key, or a setting that changes what the model
            computes and that this library doesn't have.
    """
    check_model_type(raw, where)
    try:
        read = _from_transformers if raw["model_type"] == "fast_vlm" else _from_llava
        return read(raw, layout, name, generation)
    except ZeroDivisionError as exc:
        raise CheckpointError(f"{where}: a size is 0; give a checkpoint folder as published") from exc
    except KeyError as exc:
        raise CheckpointError(f"{where} lacks {exc.args[0]!r}; give a checkpoint folder as published") from exc
    except (TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{where}: a value has another type than published ({exc})") from exc
    except CheckpointError:
        raise
    except FastVLMError as exc:
        raise CheckpointError(f"{where}: {exc}") from exc


def _from_llava(raw: Mapping[str, Any], layout: Layout, name: str, generation: Mapping[str, Any]) -> ModelConfig:
    """LLaVA's dialect; mlx-vlm's and Apple's MLX exports add keys to it."""
    _require(raw, "mm_use_im_start_end", (False, None))
    _require(raw, "mm_use_im_patch_token", (False, None))
    _require(raw, "mm_patch_merge_type", ("flat", "spatial", "spatial_unpad", None))
    shown, side = family_of_tower(str(raw["mm_vision_tower"]))
    vision = vision_config(shown, side, raw.get("mm_vision_config") or raw.get("vision_config") or {})
    if raw["mm_hidden_size"] != vision.feature_dim:
        raise CheckpointError(
            f"mm_hidden_size is {raw['mm_hidden_size']}, {FAMILIES[shown].title} of {vision.embed_dims} "
            f"{'with multi-scale features ' if vision.multi_scale else ''}gives {vision.feature_dim}"
        )
    grids = _grids(raw)
    family = LLAVA_FAMILIES[raw["model_type"]]
    decoder = read_decoder(raw, family)
    return ModelConfig(
        name=name,
        decoder=decoder,
        projector=_projector(raw, vision.feature_dim, decoder.hidden_size),
        vision=vision if layout.has_vision else None,
        context_length=_context(raw.get("tokenizer_model_max_length"), decoder),
        eos_token_ids=read_stops(raw, generation, family, decoder.vocab_size),
        aspect=_aspect(raw, grids),
        grid_pinpoints=grids,
        patch_merge_type=raw.get("mm_patch_merge_type") or "flat",
        quantization=_quantization(raw),
        template=family.template,
    )


def _from_transformers(raw: Mapping[str, Any], layout: Layout, name: str, generation: Mapping[str, Any]) -> ModelConfig:
    """Hugging Face transformers' FastVlm: nested configs, the encoder by its timm name."""
    _require(raw, "projector_hidden_act", ("gelu", None))
    text, tower = raw["text_config"], raw["vision_config"]
    shown = family_of_timm(tower.get("architecture"))
    family = text_family(text)
    decoder = read_decoder({"tie_word_embeddings": raw.get("tie_word_embeddings", False)} | dict(text), family)
    shape = vision_config(shown, FAMILIES[shown].side, tower.get("model_args") or {})
    vision = dataclasses.replace(shape, image_size=_side_of(raw.get("image_seq_length"), shape))
    return ModelConfig(
        name=name,
        decoder=decoder,
        projector=ProjectorConfig(vision.feature_dim, decoder.hidden_size),
        vision=vision if layout.has_vision else None,
        context_length=_context(None, decoder),
        eos_token_ids=read_stops(text, generation, family, decoder.vocab_size),
        template=family.template,
    )


def _context(asked: int | None, decoder: DecoderConfig) -> int:
    """Positions of a prompt and its answer: what is asked for, else the published models' limit, as the decoder can."""
    return min(asked or 8192, int(decoder.max_position_embeddings * decoder.rope_factor))


def _aspect(raw: Mapping[str, Any], grids: tuple[tuple[int, int], ...]) -> str:
    """As the official code: what it doesn't know it crops to the centre; see `image_warning`.

    It fails for "anyres" without grids: padding is what comes nearest.
    """
    known = {"pad": "pad", "anyres": "anyres" if grids else "pad"}
    return known.get(str(raw.get("image_aspect_ratio")), "crop")


def image_warning(raw: Mapping[str, Any], where: str) -> str | None:
    """What a user must know of how a config's images are brought to the encoder; None where nothing is odd."""
    asked = raw.get("image_aspect_ratio")
    if asked == "anyres" and not raw.get("image_grid_pinpoints"):
        return f"{where} asks for AnyRes tiles and names no grid: images are padded unless a call names one"
    if asked not in ("pad", "anyres", "square", None):
        return (
            f"{where}: image_aspect_ratio is {asked!r}; images are cropped to their centre, as the official code does "
            "with it; if the model was trained on tiles, ask with aspect='anyres' and a grid"
        )
    return None


def _side_of(tokens: object, shape: VisionConfig) -> int:
    """Image side in pixels for a number of tokens; the published one where the config tells no square."""
    if isinstance(tokens, int) and tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
        return math.isqrt(tokens) * shape.downsampling
    return shape.image_size


def _grids(raw: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """(width, height) in pixels of AnyRes' grids: a list, or as LLaVA's training writes them, its text."""
    listed = raw.get("image_grid_pinpoints") or ()
    try:
        pairs = [(width, height) for width, height in (literal_eval(listed) if isinstance(listed, str) else listed)]
        if any(not isinstance(side, int) for pair in pairs for side in pair):
            raise TypeError("sides are whole numbers")
        return tuple(pairs)
    except (TypeError, ValueError, SyntaxError) as exc:
        raise CheckpointError(
            f"image_grid_pinpoints is {listed!r}; expected pairs of width and height in pixels; correct the config"
        ) from exc


def _projector(raw: Mapping[str, Any], channels: int, hidden: int) -> ProjectorConfig:
    kind = raw.get("mm_projector_type") or "linear"  # what the official code takes where the config has none
    try:
        return ProjectorConfig(channels, hidden, kind)
    except ConfigError as exc:
        raise CheckpointError(f"mm_projector_type: {exc}") from exc


def _quantization(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    stored = raw.get("quantization")
    if not stored:
        return None
    _require(stored, "mode", ("affine", None))
    return QuantizationConfig(bits=stored["bits"], group_size=stored["group_size"])
