"""How much memory models need, counted from their shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastvlm_bench.layers import Storage, count_parameters, decoder_layers
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import InputError

if TYPE_CHECKING:
    from fastvlm_bench.runner import Plan
    from fastvlm_bench.subjects import Choice

# Measured with the published shapes on a CPU, float32: weights take a twelfth more than counted (depthwise kernels as
# tiles; more in a small model), and an image 2.05 KB for each pixel: 131 MiB at 256 px, 2053 MiB at 1024.
_WEIGHTS = 1.15
_VALUES_PER_PIXEL = 6  # times the channels of the first stage
_WHILE_QUANTISING = 2  # times the largest matrix: itself, and unpacked again on a CPU


def check_memory(configs: Sequence[ModelConfig], wanted: Sequence[Choice], plan: Plan, available: int) -> None:
    """Raise InputError if models don't fit together.

    Args:
        configs: the models' shapes.
        wanted: how each is loaded.
        plan: what they will be asked.
        available: bytes; 0 if unknown, which checks nothing.
    """
    weights = sum(_WEIGHTS * weights_bytes(config, choice) for config, choice in zip(configs, wanted, strict=True))
    # They are asked, and loaded, one after the other.
    more = [
        max(_working_bytes(config, choice, plan), _loading_bytes(config, choice))
        for config, choice in zip(configs, wanted, strict=True)
    ]
    needed = weights + max(more)
    if available and needed > available:
        parts = f"{len(configs)} models" if len(configs) > 1 else configs[0].name
        verb = "need" if len(configs) > 1 else "needs"
        raise InputError(
            f"{parts} {verb} about {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB can be used; "
            "choose fewer --q-bits, a smaller --size or --resolution, or measure one model at a time"
        )


def weights_bytes(config: ModelConfig, choice: Choice) -> int:
    """Bytes of a model's weights in the types that `load` keeps them in, counted from its shapes."""
    plain, decoder = _storages(config, choice)
    counts = count_parameters(config)
    # Where the embedding isn't the head, which is counted with the layers, it is a matrix of its own.
    rows = config.decoder.vocab_size * (0 if config.decoder.tie_word_embeddings else 1)
    layers = sum(layer.weight_bytes(decoder) for layer in decoder_layers(config.decoder, 1, 0, rows))
    return plain.value_bytes(counts.get("vision", 0) + counts["projector"]) + layers


def _storages(config: ModelConfig, choice: Choice) -> tuple[Storage, Storage]:
    """How plain weights are kept, and the decoder's matrices."""
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    plain = Storage("float32" if on_cpu else "bfloat16")
    stored = config.quantization
    bits = choice.bits or (stored.bits if stored else None)
    return plain, plain if on_cpu or not bits else Storage(plain.dtype, bits, stored.group_size if stored else 64)


def _working_bytes(config: ModelConfig, choice: Choice, plan: Plan) -> float:
    """Of a question: the encoder's maps, or the keys and values."""
    from fastvlm_mlx.vision.fastvithd import BATCH_PIXELS

    plain, _ = _storages(config, choice)
    side = max(plan.resolutions, default=config.vision.image_size if config.vision else 0)
    channels = config.vision.embed_dims[0] if config.vision else 0
    decoder = config.decoder
    head = decoder.hidden_size // decoder.num_attention_heads
    positions = plan.prompt_tokens + (side // config.downsampling) ** 2 + plan.max_tokens
    kept = positions * decoder.num_hidden_layers * 2 * head * decoder.num_key_value_heads
    pixels = max(side * side, BATCH_PIXELS if plan.aspect == "anyres" else 0)  # of tiles several are encoded at once
    return plain.value_bytes(int(pixels * channels * _VALUES_PER_PIXEL) + 2 * kept)  # the cache keeps rows, too


def _loading_bytes(config: ModelConfig, choice: Choice) -> float:
    """While the decoder is quantised, matrix by matrix."""
    if not choice.bits:
        return 0
    plain, _ = _storages(config, choice)
    decoder = config.decoder
    return _WHILE_QUANTISING * plain.value_bytes(decoder.vocab_size * decoder.hidden_size)
