"""The model's layers, counted: multiply-accumulates, weights, and the activations that come in and go out.

Everything follows from the config; no weights and no MLX. What is counted:

- Multiply-accumulates of matrices, convolutions (padding counts as pixels) and attention's two products, the
  causal one's pairs only. Biases, norms, softmax, GELU, rotations and sums count as nothing, as is usual.
- Each layer reads its input and writes its output once. What works value by value or row by row (bias, norm, GELU,
  gates, the sum with a residual) rides along with the layer beside it; a residual is one more input. Matrices that
  read the same input (q, k and v; gate and up) are one layer, and so is attention: its scores stay inside. A library
  that fuses less than this moves more.
- Each weight is read once, in the type that it is kept in; of the embedding, the rows of the prompt's text.

The counts are the network's, not those of one way to compute it: a depthwise convolution as a matrix of tiles
(`fastvlm_mlx.vision.depthwise`) multiplies twice as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from fastvlm_mlx.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from fastvlm_mlx.errors import InputError

if TYPE_CHECKING:
    import mlx.nn as nn

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SQUEEZE = 16  # squeeze-and-excite: hidden channels are a 16th

Size = tuple[int, int]  # rows, columns of a map
Kind = Literal["matrix", "attention", "depthwise", "convolution", "pointwise"]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a part of the model lies in memory and is computed.

    Attributes:
        dtype: of activations and plain weights: float32, float16 or bfloat16.
        bits: of quantised matrices; None where they are plain.
        group_size: values that share a scale and a bias, which have the dtype above.
    """

    dtype: str
    bits: int | None = None
    group_size: int = 64

    def __post_init__(self) -> None:
        """Raise InputError for a type that no part is kept in."""
        if self.dtype not in VALUE_BYTES:
            raise InputError(f"dtype must be one of {', '.join(VALUE_BYTES)}, got {self.dtype!r}")

    @property
    def name(self) -> str:
        """Such as "bfloat16" or "4 bits, bfloat16"."""
        return f"{self.bits} bits, {self.dtype}" if self.bits else self.dtype

    def value_bytes(self, count: int) -> int:
        """Bytes of so many activations or plain weights."""
        return count * VALUE_BYTES[self.dtype]

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix with its scales and biases; plain where the groups don't divide a row."""
        if not self.bits or columns % self.group_size:
            return self.value_bytes(rows * columns)
        return rows * columns * self.bits // 8 + self.value_bytes(2 * rows * (columns // self.group_size))

    @classmethod
    def of(cls, module: nn.Module) -> Storage:
        """What a loaded MLX module is kept in: of several types or widths, that of most values; float32 without any."""
        types: dict[str, int] = {}
        widths: dict[tuple[int | None, int], int] = {}
        for layer in module.modules():
            arrays = {name: value for name, value in layer.items() if hasattr(value, "dtype")}
            for array in arrays.values():
                dtype = str(array.dtype).rpartition(".")[2]
                if dtype in VALUE_BYTES:
                    types[dtype] = types.get(dtype, 0) + array.size
            if "scales" in arrays:
                width = layer.bits, layer.group_size
                widths[width] = widths.get(width, 0) + arrays["scales"].size * layer.group_size
        bits, group_size = max(widths, key=lambda width: widths[width], default=(None, 64))
        return cls(max(types, key=lambda dtype: types[dtype], default="float32"), bits, group_size)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, counted in values.

    Attributes:
        name: the module's path in the network, or of what isn't a module of its own, one below it.
        kind: what computes it.
        macs: multiply-accumulates.
        read: activations that come in.
        written: activations that go out.
        matrix: (rows, columns) of its matrices together, which quantisation packs; rows are the outputs.
        plain: all other weights: convolution kernels, biases, norms.
    """

    name: str
    kind: Kind
    macs: int
    read: int
    written: int
    matrix: Size = (0, 0)
    plain: int = 0

    @property
    def parameters(self) -> int:
        """Weights."""
        return prod(self.matrix) + self.plain

    def weight_bytes(self, storage: Storage) -> int:
        """Bytes of its weights."""
        return storage.matrix_bytes(*self.matrix) + storage.value_bytes(self.plain)

    def moved_bytes(self, storage: Storage) -> int:
        """Bytes of its weights, its input and its output."""
        return self.weight_bytes(storage) + storage.value_bytes(self.read + self.written)


def _linear(name: str, positions: int, columns: int, rows: int, plain: int | None = None, also: int = 0) -> Layer:
    """A matrix applied at each position; `plain` weights beside it (default its bias), `also` read per position."""
    return Layer(
        name,
        "matrix",
        macs=positions * columns * rows,
        read=positions * (columns + also),
        written=positions * rows,
        matrix=(rows, columns),
        plain=rows if plain is None else plain,
    )


def _depthwise(name: str, size: Size, before: int, dim: int, kernel: int, stride: int = 1) -> Layer:
    """A depthwise convolution of a map of `before` channels to `dim`, with bias."""
    pixels = prod(size)
    out = pixels // stride**2 * dim
    weights = dim * kernel**2
    return Layer(name, "depthwise", out * kernel**2, read=pixels * before, written=out, plain=weights + dim)


def vision_layers(config: VisionConfig, height: int, width: int) -> Iterator[Layer]:
    """The vision encoder's layers for one image.

    Args:
        config: its shape.
        height: of the image in pixels, a multiple of the downsampling.
        width: likewise.

    Yields:
        The layers in order, each named as in `fastvlm_mlx.vision.fastvithd`.
    """
    first, last = config.embed_dims[0], config.embed_dims[-1]
    half, quarter = (height // 2, width // 2), (height // 4, width // 4)
    out = prod(half) * first
    yield Layer("stem.conv", "convolution", out * 27, height * width * 3, out, plain=first * 27 + first)
    yield _depthwise("stem.depthwise", half, first, first, 3, stride=2)
    yield _linear("stem.pointwise", prod(quarter), first, first)
    for index in range(len(config.layers)):
        yield from _stage(config, index, (quarter[0] >> index, quarter[1] >> index))
    size, dim = (height // config.downsampling, width // config.downsampling), 2 * last
    yield _depthwise("expand.depthwise", size, last, dim, 3)  # takes the mean along
    yield from _excite("expand", prod(size), dim, dim // _SQUEEZE)


def _excite(name: str, pixels: int, dim: int, squeezed: int) -> Iterator[Layer]:
    """Squeeze-and-excite: the mean rides along with the layer before, the gate is a pass over the map."""
    yield _linear(f"{name}.reduce", 1, dim, squeezed)
    yield _linear(f"{name}.expand", 1, squeezed, dim)
    yield Layer(f"{name}.gate", "pointwise", 0, read=(pixels + 1) * dim, written=pixels * dim)


def _stage(config: VisionConfig, index: int, size: Size) -> Iterator[Layer]:
    """One stage, whose map has `size`; its patch embedding reads one of twice the sides."""
    name, dim, pixels = f"stages.{index}", config.embed_dims[index], prod(size)
    hidden, attends = dim * config.mlp_ratio, config.attends(index)
    if index:
        larger = (2 * size[0], 2 * size[1])
        yield _depthwise(f"{name}.downsample.depthwise", larger, config.embed_dims[index - 1], dim, 7, stride=2)
        if config.squeezes(index):
            yield from _excite(f"{name}.downsample", pixels, dim, config.squeezed_dim(index))
        yield _linear(f"{name}.downsample.pointwise", pixels, dim, dim)
    if attends:
        yield _depthwise(f"{name}.position", size, dim, dim, 7)
    for number in range(config.layers[index]):
        block = f"{name}.blocks.{number}"
        if attends:
            yield _linear(f"{block}.mixer.qkv", pixels, dim, 3 * dim)
            yield _attention(f"{block}.mixer.attention", dim, dim, pixels, pixels, pixels * pixels)
            yield _linear(f"{block}.mixer.proj", pixels, dim, dim, also=dim)
        else:
            yield _depthwise(f"{block}.mixer", size, dim, dim, 3)
        yield _depthwise(f"{block}.ffn.depthwise", size, dim, dim, 7)
        yield _linear(f"{block}.ffn.fc1", pixels, dim, hidden)
        yield _linear(f"{block}.ffn.fc2", pixels, hidden, dim, also=dim)
    if config.pools(index):
        yield _pool(config, index, pixels)


def _pool(config: VisionConfig, index: int, pixels: int) -> Layer:
    """A stage's map brought down to the last one's, for multi-scale features."""
    assert config.multi_scale
    dim, square = config.embed_dims[index], config.pooling_ratio(index) ** 2
    averages = config.multi_scale.pooling == "average"
    return Layer(
        f"stages.{index}.pool",
        "pointwise" if averages else "depthwise",
        0 if averages else pixels * dim,
        read=pixels * dim,
        written=pixels // square * dim,
        plain=0 if averages else dim * (square + 1),
    )


def _attention(name: str, dim: int, kv_dim: int, queries: int, keys: int, pairs: int) -> Layer:
    """Scores and their product with the values, over `pairs` of query and key; `dim` channels of all heads."""
    return Layer(name, "attention", 2 * pairs * dim, read=queries * dim + 2 * keys * kv_dim, written=queries * dim)


def projector_layers(config: ProjectorConfig, tokens: int) -> Iterator[Layer]:
    """The projector's matrices over so many image tokens."""
    for number in range(config.depth):
        inputs = config.hidden_dim if number else config.input_dim
        yield _linear(f"linear_{number + 1}", tokens, inputs, config.hidden_dim)


def decoder_layers(config: DecoderConfig, positions: int, known: int, text_tokens: int) -> Iterator[Layer]:
    """One pass over the decoder; the head sees the last position only.

    Args:
        config: its shape.
        positions: that the pass computes.
        known: positions before those, whose keys and values are in the cache; all later ones attend to them.
        text_tokens: how many of `positions` are gathered from the embedding; the others' rows are the projector's.

    Yields:
        The layers in order. Keys and values go to the cache as the output of `qkv`, and attention reads them
        with those of the known positions.
    """
    dim, inner = config.hidden_size, config.intermediate_size
    kv_dim = dim // config.num_attention_heads * config.num_key_value_heads
    pairs = positions * known + positions * (positions + 1) // 2
    rows = (text_tokens, dim)
    yield Layer("embed_tokens", "pointwise", 0, read=0, written=prod(rows), matrix=rows)
    for index in range(config.num_hidden_layers):
        block = f"layers.{index}"
        qkv = dim + 2 * kv_dim
        yield _linear(f"{block}.self_attn.qkv", positions, dim, qkv, plain=config.qkv_bias * qkv + dim)
        yield _attention(f"{block}.self_attn.attention", dim, kv_dim, positions, known + positions, pairs)
        yield _linear(f"{block}.self_attn.o_proj", positions, dim, dim, plain=config.output_bias * dim, also=dim)
        yield Layer(
            f"{block}.mlp.gate_up",
            "matrix",
            macs=positions * dim * 2 * inner,
            read=positions * dim,
            written=positions * inner,  # the product of the two
            matrix=(2 * inner, dim),
            plain=config.mlp_bias * 2 * inner + dim,
        )
        yield _linear(f"{block}.mlp.down_proj", positions, inner, dim, plain=config.mlp_bias * dim, also=dim)
    yield _linear("lm_head", 1, dim, config.vocab_size, plain=dim)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Weights of "vision" (absent where the config has none for MLX), "projector" and "decoder".

    A tied embedding counts once. Batch norms and scales are folded, see `fastvlm_mlx.vision.fastvithd`.
    """
    layers = {
        "projector": projector_layers(config.projector, 1),
        "decoder": decoder_layers(config.decoder, 1, 0, 0),
    }
    if config.vision:
        layers = {"vision": vision_layers(config.vision, config.downsampling, config.downsampling), **layers}
    counts = {part: sum(layer.parameters for layer in found) for part, found in layers.items()}
    if config.image_newline:
        counts["projector"] += config.projector.hidden_dim
    if not config.decoder.tie_word_embeddings:
        counts["decoder"] += config.decoder.vocab_size * config.decoder.hidden_size
    return counts
