"""Powers of two that keep the vision encoder within float16, exact in real arithmetic.

The published weights drive stage 5 beyond float16's 65,504. A stage's residual stream can be held smaller: its
entry convolution, the last matrix of every branch and every bias on the stream are scaled by 2^-e, and the
matrices that read the stream by 2^e; LayerNorm doesn't see the scale once its epsilon is scaled by 2^-2e (where that is
below float16's least, coremltools stores the least, 6e-8: it only keeps a flat map from dividing by 0). A
LayerNorm's squares are kept in range by scaling the difference by 2^-k and epsilon by 2^-2k more. The hidden
layer of a block, before its GELU, is held at 2^-m where it needs it (torch_fastvithd.shifted_gelu). Powers of two
change no mantissa, so float32 computes the same bits, but for subnormals. Where FastViT has a batch norm instead of
LayerNorm, it is in the qkv matrix, which then reads the stream as the others do. Pooled maps, being features, have
their own scale: the pooling undoes that of their stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastvlm_mlx.config import VisionConfig

FLOAT16_MAX = 65504.0
# Other pictures than those measured may go higher: 3 bits are left free.
STREAM_LIMIT = FLOAT16_MAX / 8
# The sum of squares over all channels stays in range too, should the hardware add up in float16.
SQUARES_LIMIT = FLOAT16_MAX / 4
_HIDDEN = ".ffn.fc1"
_EMBEDDING = (".downsample.depthwise", ".downsample.pointwise")
_ON_STREAM = (".stream", ".ffn.depthwise", "expand")  # measured values that are held at the stream's scale
EXPANSION = 5  # counted as a stage, after five even where there are four: its map has a scale of its own up to its GELU


@dataclass(frozen=True, slots=True)
class NormScale:
    """Factors of one LayerNorm: of the difference, and of epsilon."""

    difference: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True, slots=True)
class Ranges:
    """Exponents, and the maxima that they were chosen from.

    Attributes:
        streams: stage index -> e; its residual stream is held at 2^-e of its value. The expansion is stage 5.
        norms: block name -> k; its LayerNorm's difference is scaled by 2^-k besides.
        hidden: block name -> m; its hidden layer is held at 2^-m of its value. Likewise the two layers of a patch
            embedding, by their own names.
        maxima: what was measured -> largest magnitude, before any scaling.
    """

    streams: Mapping[int, int] = field(default_factory=dict)
    norms: Mapping[str, int] = field(default_factory=dict)
    hidden: Mapping[str, int] = field(default_factory=dict)
    maxima: Mapping[str, float] = field(default_factory=dict)

    def norm(self, block: str) -> NormScale:
        """Factors of a block's LayerNorm, such as of "stages.4.blocks.0"."""
        stream, own = self.streams.get(stage_of(block), 0), self.norms.get(block, 0)
        return NormScale(2.0**-own, 2.0 ** (-2 * (stream + own)))

    @property
    def headroom(self) -> dict[str, float]:
        """Bits between each measured maximum, as it is after scaling, and float16's limit; negative overflows."""
        return {
            name: math.log2(FLOAT16_MAX / (value * 2.0 ** -self._exponent(name))) if value else math.inf
            for name, value in self.maxima.items()
        }

    def _exponent(self, name: str) -> int:
        if name.endswith(_HIDDEN):
            return self.hidden.get(name.removesuffix(_HIDDEN), 0)
        if name.endswith(_EMBEDDING):
            return self.hidden.get(name, 0)
        on_stream = name.endswith((*_ON_STREAM, ".difference"))
        return self.streams.get(stage_of(name), 0) if on_stream else 0


def stage_of(name: str) -> int:
    """The stage that a module's name belongs to, from 0; -1 for the stem, EXPANSION for the expansion."""
    if name.startswith("expand"):
        return EXPANSION
    match = re.match(r"stages\.(\d+)", name)
    return int(match[1]) if match else -1


class Meter:
    """Collects maxima while a network runs on calibration images: the `probe` of torch_fastvithd."""

    def __init__(self) -> None:
        self.maxima: dict[str, float] = {}
        self._squares: dict[str, float] = {}  # LayerNorm -> largest sum of squares over channels

    def __call__(self, name: str, value: object) -> None:
        """Note the largest magnitude of a tensor (B, C, H, W)."""
        tensor = np.asarray(value)
        self.maxima[name] = max(self.maxima.get(name, 0.0), float(np.abs(tensor).max()))
        if name.endswith(".difference"):
            sums = np.square(tensor, dtype=np.float64).sum(axis=1)
            self._squares[name] = max(self._squares.get(name, 0.0), float(sums.max()))

    def choose(self) -> Ranges:
        """The smallest exponents that bring everything under its limit."""
        streams: dict[int, int] = {}
        for name, value in self.maxima.items():
            if name.endswith(_ON_STREAM) and (exponent := _bits_over(value, STREAM_LIMIT)):
                streams[stage_of(name)] = max(exponent, streams.get(stage_of(name), 0))
        norms = {}
        for name, value in self._squares.items():
            block = name.removesuffix(".norm.difference")
            stream = streams.get(stage_of(block), 0)
            if exponent := _bits_over(math.sqrt(value) * 2.0**-stream, math.sqrt(SQUARES_LIMIT)):
                norms[block] = exponent
        hidden = {
            name.removesuffix(_HIDDEN): exponent
            for name, value in self.maxima.items()
            if name.endswith((_HIDDEN, *_EMBEDDING)) and (exponent := _bits_over(value, STREAM_LIMIT))
        }
        return Ranges(streams, norms, hidden, dict(self.maxima))


def _bits_over(value: float, limit: float) -> int:
    return max(0, math.ceil(math.log2(value / limit))) if value > limit else 0


def apply_ranges(weights: Mapping[str, np.ndarray], ranges: Ranges, config: VisionConfig) -> dict[str, np.ndarray]:
    """Fold the stream exponents into folded weights (names of fastvlm_convert.folding)."""
    factors = {name: np.float32(2.0 ** stream_exponent(name, ranges, config)) for name in weights}
    return {name: value * factors[name] for name, value in weights.items()}


def stream_exponent(name: str, ranges: Ranges, config: VisionConfig) -> int:
    """The power of two that a weight or bias takes.

    Biases are scaled as what they are added to. What enters the stream is scaled down, what reads it up, a
    convolution within it (a RepMixer after the first, the 7x7 before fc1) keeps its weight.
    """
    stage = stage_of(name)
    last = len(config.layers) - 1
    own, before = (ranges.streams.get(i, 0) for i in (stage, last if stage == EXPANSION else stage - 1))
    layers = [ranges.hidden.get(f"stages.{stage}{layer}", 0) for layer in _EMBEDDING]
    if embedding := re.search(r"(\.downsample\.(?:depthwise|pointwise))\.(weight|bias)$", name):
        index = _EMBEDDING.index(embedding[1])
        return ((before, *layers)[index] if embedding[2] == "weight" else 0) - layers[index]
    if name.endswith(".downsample.reduce.weight"):
        return layers[0]
    if stage == EXPANSION:
        powers = {"depthwise.weight": before - own, "depthwise.bias": -own, "reduce.weight": own}
        return powers.get(name.removeprefix("expand."), 0)
    if block := re.match(r"(.*)\.ffn\.(fc1|fc2)\.(weight|bias)$", name):
        held = ranges.hidden.get(block[1], 0)
        if block[2] == "fc1":
            return own - held if block[3] == "weight" else -held
        return held - own if block[3] == "weight" else -own
    if name.endswith(".mixer.qkv.weight"):
        return own if config.norm == "batch" else 0
    if name.endswith(".pool.weight"):
        return own
    if re.search(r"\.position\.weight$", name) or re.search(r"\.blocks\.0\.mixer\.weight$", name):
        return layers[1] - own  # the first to write to the stream, from the embedding's last layer
    enters = re.search(r"\.mixer\.proj\.weight$", name)
    on_stream = re.search(r"\.(position|mixer|mixer\.proj|ffn\.depthwise)\.bias$", name)
    return -own if enters or on_stream else 0
