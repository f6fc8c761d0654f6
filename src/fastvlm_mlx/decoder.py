"""mlx-lm's Qwen2 and LLaMA under our config, taken apart where a prompt with images needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import DecoderConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.mlx_lm_parts import KVCache, QuantizedKVCache, RotatingKVCache, llama, qwen2

LayerCache: TypeAlias = KVCache | QuantizedKVCache | RotatingKVCache  # keys and values of one block


class _Backbone(Protocol):
    embed_tokens: nn.Embedding
    layers: Sequence[nn.Module]

    def __call__(
        self, inputs: mx.array, cache: object = None, input_embeddings: mx.array | None = None
    ) -> mx.array: ...


class Decoder:
    """A causal language model that reads embeddings or ids.

    Args:
        network: mlx-lm's model, weights loaded.
        config: its shape.
        vocab_limit: ids from here on are never generated: rows that pad the embedding beyond the tokenizer.
    """

    def __init__(self, network: nn.Module, config: DecoderConfig, vocab_limit: int | None = None) -> None:
        self.network, self.config = network, config
        self.vocab_limit = min(vocab_limit or config.vocab_size, config.vocab_size)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks; mlx-lm counts them to size its caches."""
        return self._backbone.layers

    @property
    def _backbone(self) -> _Backbone:
        return cast(_Backbone, self.network.model)

    def new_cache(self) -> list[KVCache]:
        """An empty key/value cache, one entry per block."""
        return [KVCache() for _ in range(self.config.num_hidden_layers)]

    def embed(self, ids: Sequence[int]) -> mx.array:
        """(T,) ids -> (T, hidden) embeddings."""
        rows: mx.array = self._backbone.embed_tokens(mx.array(list(ids), dtype=mx.int32))
        return rows

    def hidden(self, embeddings: mx.array, cache: Sequence[LayerCache]) -> mx.array:
        """One pass over (B, T, hidden) embeddings; appends T rows to the cache. Returns (B, T, hidden)."""
        # mlx-lm reads only the embeddings when they are given; the ids are there for its signature.
        ids = mx.zeros(embeddings.shape[:2], dtype=mx.int32)
        return self._backbone(ids, cache, embeddings)

    def head(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> (..., vocab_limit) logits."""
        logits: mx.array
        if self.config.tie_word_embeddings:
            logits = self._backbone.embed_tokens.as_linear(hidden)
        else:
            logits = cast(nn.Linear, self.network.lm_head)(hidden)
        return logits[..., : self.vocab_limit]

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        """(B, T) ids -> (B, T, vocab_limit) logits; the call that mlx-lm's generate_step makes."""
        return self.head(self._backbone(inputs, cache))


@dataclass(frozen=True, slots=True)
class Family:
    """Decoders that one of mlx-lm's modules computes.

    Attributes:
        build: makes the module of a config.
        biases: what it can have of (`qkv_bias`, `output_bias`, `mlp_bias`).
    """

    build: Callable[[DecoderConfig], nn.Module]
    biases: tuple[tuple[bool, bool, bool], ...]


def _sizes(config: DecoderConfig) -> dict[str, Any]:
    """The arguments that both of mlx-lm's modules have."""
    names = (
        "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "rms_norm_eps",
        "vocab_size", "num_key_value_heads", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
    )  # fmt: skip
    scaling = {"type": "linear", "factor": config.rope_factor} if config.rope_factor != 1 else None
    return {name: getattr(config, name) for name in names} | {"rope_scaling": scaling}


def _qwen2(config: DecoderConfig) -> nn.Module:
    return qwen2.Model(qwen2.ModelArgs(**_sizes(config)))


def _llama(config: DecoderConfig) -> nn.Module:
    return llama.Model(
        llama.ModelArgs(**_sizes(config), attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias),
    )


FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(_qwen2, ((True, False, False),)),  # Qwen2 and Qwen2.5
    "llama": Family(_llama, tuple((qkv, qkv, mlp) for qkv in (False, True) for mlp in (False, True))),  # Vicuna
}


def build_network(config: DecoderConfig) -> nn.Module:
    """mlx-lm's model of a family, with weights still to be loaded (MLX makes none of them before).

    Raises:
        ConfigError: an unknown family, or biases that its module doesn't have.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(f"decoder.model_type is {config.model_type!r}; this version knows {', '.join(FAMILIES)}")
    family, biases = FAMILIES[config.model_type], (config.qkv_bias, config.output_bias, config.mlp_bias)
    if biases not in family.biases:
        raise ConfigError(
            f"decoder.qkv_bias, output_bias and mlp_bias are {biases}; {config.model_type} has one of "
            f"{', '.join(map(str, family.biases))}"
        )
    return family.build(config)
