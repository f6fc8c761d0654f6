"""How far each stage is from what the machine can do.

A stage takes at least as long as its operations at the peak rate, and as its bytes at the peak bandwidth; the longer
of the two is its limit (Williams, Waterman, Patterson, "Roofline", CACM 2009). Work is counted from the config
(`fastvlm_bench.layers` says what counts), peaks are measured (`fastvlm_bench.peaks`).

A share above 100 % says that the peak wasn't reached when it was measured (another program ran, the clock was lower,
a convolution does better than MLX's matmul), or that maps between layers, or a whole small model, stayed in a cache
that is faster than memory. Nothing is clamped. The peaks are those of MLX's device: they say nothing about a stage
that Core ML runs on the Neural Engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fastvlm_bench.layers import Layer, Storage, decoder_layers, projector_layers, vision_layers
from fastvlm_bench.peaks import Peaks
from fastvlm_mlx.config import ModelConfig, check_side
from fastvlm_mlx.errors import InputError


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage has to do at least.

    Attributes:
        flops: floating-point operations, two for each multiply-accumulate.
        bytes: weights read once, activations in and out of each layer.
        storage: how its matrices lie; decides which rate applies.
    """

    flops: int
    bytes: int
    storage: Storage


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time for some work on a machine.

    Attributes:
        seconds: the time.
        bound: what takes that long: "compute" or "memory".
    """

    seconds: float
    bound: Literal["compute", "memory"]

    def share(self, measured: float) -> float:
        """How much of the machine was used: 1 is all of it; above 1, see this module's text.

        Args:
            measured: seconds, above 0.
        """
        return self.seconds / measured


def limit(work: Work, peaks: Peaks) -> Limit:
    """The least time for a stage's work.

    Raises:
        InputError: the peaks lack the rate of the stage's dtype.
    """
    compute, memory = work.flops / peaks.rate(work.storage), work.bytes / peaks.bandwidth
    return Limit(compute, "compute") if compute >= memory else Limit(memory, "memory")


def stage_work(
    config: ModelConfig,
    side: int | tuple[int, int],
    text_tokens: int,
    *,
    vision: Storage,
    decoder: Storage,
    projector: Storage | None = None,
    context: int | None = None,
) -> dict[str, Work]:
    """Work of each stage of one answer about one image.

    Args:
        config: the model's shape.
        side: of the image in pixels, or (height, width); multiples of the model's downsampling.
        text_tokens: of the prompt, without the image's.
        vision: how the vision encoder is kept and computed; `Storage.of(module)` tells it of a loaded one.
        decoder: likewise, the decoder.
        projector: likewise; default plain, in the decoder's dtype.
        context: positions before the token that `decode` counts; default the prompt's. The work grows evenly with
            it: that of the mean context is the mean work of several tokens.

    Returns:
        "vision" (absent where the config has no shape for it), "projector", "prefill" (of all positions, none known
        before; the head on the last one) and "decode" (of one token).

    Raises:
        ResolutionError: a side that isn't such a multiple. InputError: a negative count.
    """
    height, width = (side, side) if isinstance(side, int) else side
    for pixels in (height, width):
        check_side(pixels, config.downsampling)
    tokens = height // config.downsampling * (width // config.downsampling)
    prompt = tokens + text_tokens
    known = prompt if context is None else context
    if text_tokens < 0 or known < 0:
        raise InputError(f"text_tokens and context must be 0 or more, got {text_tokens} and {context}")
    found = {"vision": _work(vision_layers(config.vision, height, width), vision)} if config.vision else {}
    plain = projector or Storage(decoder.dtype)
    return found | {
        "projector": _work(projector_layers(config.projector, tokens), plain),
        "prefill": _work(decoder_layers(config.decoder, prompt, 0, text_tokens), decoder),
        "decode": _work(decoder_layers(config.decoder, 1, known, 1), decoder),
    }


def _work(layers: Iterable[Layer], storage: Storage) -> Work:
    counted = tuple(layers)
    moved = sum(layer.moved_bytes(storage) for layer in counted)
    return Work(2 * sum(layer.macs for layer in counted), moved, storage)
