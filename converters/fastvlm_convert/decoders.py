"""The families of decoders as checkpoints describe them, one entry each, and how their configs become ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm_convert.settings import require
from fastvlm_mlx.config import DecoderConfig
from fastvlm_mlx.errors import CheckpointError

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of decoders.

    Attributes:
        name: in `fastvlm_mlx.decoder.FAMILIES`.
        template: in `fastvlm_mlx.template.TEMPLATES`: what its models are trained with in the LLaVA code.
        defaults: what its configs may leave out, as its class in transformers has it.
        biases: which of DecoderConfig's biases a config has.
        stops: end an answer besides what the config names, where the vocabulary has them.
    """

    name: str
    template: str
    defaults: Callable[[Raw], dict[str, Any]]
    biases: Callable[[Raw], dict[str, bool]]
    stops: tuple[int, ...] = ()


def _llama_defaults(raw: Raw) -> dict[str, Any]:
    return {
        "eos_token_id": 2,
        "max_position_embeddings": 2048,
        "num_key_value_heads": raw["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    }


def _llama_biases(raw: Raw) -> dict[str, bool]:
    attention = bool(raw.get("attention_bias", False))
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": bool(raw.get("mlp_bias", False))}


QWEN2 = Family(  # and Qwen2.5, whose config names the same type
    "qwen2",
    template="chatml",
    defaults=lambda _: {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
    biases=lambda _: {"qkv_bias": True},
    stops=(151645, 151643),  # <|im_end|>, <|endoftext|>; published configs name only one of them
)
LLAMA = Family("llama", template="vicuna_v1", defaults=_llama_defaults, biases=_llama_biases)
LLAVA_FAMILIES = {  # by LLaVA's model_type; "llava" is what its first version called itself
    "llava_qwen2": QWEN2,
    "llava_llama": LLAMA,
    "llava": LLAMA,
}
TEXT_FAMILIES = {"qwen2": QWEN2, "llama": LLAMA}  # by the model_type of transformers' text_config

# How positions are stretched -> by how much they are divided.
_ROPES: dict[str, Callable[[Raw], float]] = {"default": lambda _: 1.0, "linear": lambda scaling: scaling["factor"]}


def text_family(raw: Raw) -> Family:
    """The family of transformers' text_config.

    Raises:
        CheckpointError: an unknown one.
    """
    name = raw.get("model_type", "qwen2")
    if name not in TEXT_FAMILIES:
        raise CheckpointError(f"text_config.model_type is {name!r}; this version knows {', '.join(TEXT_FAMILIES)}")
    return TEXT_FAMILIES[name]


def read_decoder(raw: Raw, family: Family) -> DecoderConfig:
    """The decoder's part of a source config.

    Args:
        raw: the config, or transformers' text_config.
        family: says what it may leave out.

    Raises:
        CheckpointError: a setting that changes what is computed and that this library doesn't have.
        KeyError: names a key that is missing.
    """
    require(raw, "hidden_act", ("silu", None))
    require(raw, "use_sliding_window", (False, None))
    rope = dict(raw.get("rope_parameters") or {})  # transformers 5 nests it
    scaling = rope | dict(raw.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPES:
        raise CheckpointError(f"rope_scaling is of type {kind!r}; this version knows {', '.join(_ROPES)}")
    given = family.defaults(raw) | rope | {key: value for key, value in raw.items() if value is not None}
    dim, heads = given["hidden_size"], given["num_attention_heads"]
    require(raw, "head_dim", (None, dim // heads))
    return DecoderConfig(
        hidden_size=dim,
        intermediate_size=given["intermediate_size"],
        num_hidden_layers=given["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=given["num_key_value_heads"],
        vocab_size=given["vocab_size"],
        tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
        rms_norm_eps=given["rms_norm_eps"],
        rope_theta=float(given["rope_theta"]),
        max_position_embeddings=given["max_position_embeddings"],
        model_type=family.name,
        rope_factor=float(_ROPES[kind](scaling)),
        **family.biases(raw),
    )


def read_stops(raw: Raw, generation: Raw, family: Family, vocabulary: int) -> tuple[int, ...]:
    """End-of-sequence ids of both configs, or the family's; and those that it has besides."""
    found: list[int] = []
    for value in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        found += value if isinstance(value, Sequence) else [] if value is None else [value]
    if not found and "eos_token_id" in (defaults := family.defaults(raw)):
        found = [defaults["eos_token_id"]]
    return tuple(dict.fromkeys([*found, *(stop for stop in family.stops if stop < vocabulary)]))
