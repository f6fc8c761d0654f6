"""A model of real shapes with random weights, made in memory: what it says means nothing, its times do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvlm_bench.sizes import SIZES, vision_of
from fastvlm_mlx.config import DecoderConfig, ModelConfig, ProjectorConfig
from fastvlm_mlx.loading import FEATURE_CACHE_BYTES, PREFIX_CACHE_BYTES

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

_CONTEXT = 8192  # positions, of the published models


def model_config(size: str) -> ModelConfig:
    """The shapes of a size of SIZES, which may name another encoder; see `sizes.vision_of`.

    Raises:
        InputError: there is no such shape.
    """
    vision = vision_of(size)
    shape = SIZES[size.partition("+")[0]]
    return ModelConfig(
        name=f"seeded {size}",
        decoder=DecoderConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=shape.positions,
            model_type=shape.family,
            qkv_bias=shape.qkv_bias,
        ),
        projector=ProjectorConfig(input_dim=vision.feature_dim, hidden_dim=shape.hidden),
        vision=vision,
        context_length=min(_CONTEXT, shape.positions),
        eos_token_ids=(),
    )


def build(config: ModelConfig, quantize: int | None = None) -> FastVLM:
    """A model of that shape with the weights that MLX initialises layers with, in the types that `load` chooses.

    Args:
        config: with a vision encoder.
        quantize: bits of the decoder's matrices; packed on a GPU, unpacked on a CPU, as `load` does.
    """
    import mlx.core as mx

    from fastvlm_mlx.cache import PrefixCache
    from fastvlm_mlx.decoder import Decoder, build_network
    from fastvlm_mlx.engine import Engine
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.pictures import Vision
    from fastvlm_mlx.precision import make_ready
    from fastvlm_mlx.projector import MLPProjector
    from fastvlm_mlx.vision.fastvithd import FastViTHD, MLXVisionEncoder

    assert config.vision
    mx.random.seed(0)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    kept = mx.float32 if on_cpu else mx.bfloat16  # the published weights' type, where a CPU isn't slow at it
    encoder = MLXVisionEncoder(FastViTHD(config.vision), kept)
    projector, network = MLPProjector(config.projector), build_network(config.decoder)
    make_ready(projector, network, quantize, kept, unpack=on_cpu)
    vision = Vision(encoder, projector, FEATURE_CACHE_BYTES)
    engine = Engine(Decoder(network, config.decoder), vision, PrefixCache(PREFIX_CACHE_BYTES))
    return FastVLM(config, engine, None, config.vision.image_size, f"seeded, quantize {quantize}")
