"""What the worker of MLX runs: products, FastViTHD, an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_bench.doctor.plan import Size, sample_pixels, time_calls
from fastvlm_mlx.bundle import Bundle

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from fastvlm_mlx.model import FastVLM

_SIDE, _TOKENS, _PROMPT_TOKENS = 256, 16, 24
_QUESTION = "What is in the picture?"


@dataclass(frozen=True, slots=True)
class Encoded:
    """FastViTHD at one size: milliseconds of the first call and of the others, what ran it, in which type."""

    device: str
    dtype: str
    first_ms: float
    times_ms: tuple[float, ...]
    finite: bool


@dataclass(frozen=True, slots=True)
class Answers:
    """A question answered greedily twice, from nothing each time."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    text: str | None
    ttft_ms: float
    decode_tps: float
    device: str
    precision: str


class MlxState:
    """What the worker keeps: the bundle, and the model once it is loaded.

    Args:
        path: the bundle's folder.
    """

    def __init__(self, path: Path) -> None:
        self.bundle = Bundle.open(path)
        self._model: FastVLM | None = None

    @property
    def model(self) -> FastVLM:
        """The model with FastViTHD in MLX, which remembers no earlier question."""
        from fastvlm_mlx.loading import load

        if self._model is None:
            vision = "mlx" if self.bundle.config.vision else "auto"
            self._model = load(self.bundle.path, vision=vision, prefix_cache_bytes=0, feature_cache_bytes=0)
        return self._model


def multiply(_: MlxState) -> dict[str, float]:
    """Relative L2 of MLX's products by kind; see `mlx_checks.MATMUL_GATES`."""
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((_SIDE, _SIDE)).astype(np.float32) for _ in range(2))
    found = {}
    for name, dtype in (("float32", mx.float32), ("bfloat16", mx.bfloat16)):
        a, b = mx.array(left).astype(dtype), mx.array(right).astype(dtype)
        found[name] = _distance(a @ b, a, b)
    packed = mx.quantize(mx.array(right), group_size=64, bits=4)
    product = mx.quantized_matmul(mx.array(left), *packed, transpose=False, group_size=64, bits=4)
    found["4 bits"] = _distance(product, mx.array(left), mx.dequantize(*packed, group_size=64, bits=4))
    return found


def _distance(found: mx.array, left: mx.array, right: mx.array) -> float:
    import mlx.core as mx
    import numpy as np

    made, a, b = (np.array(value.astype(mx.float32), np.float64) for value in (found, left, right))
    return float(np.linalg.norm(made - a @ b) / np.linalg.norm(a @ b))


def encode(state: MlxState, size: Size, runs: int, seconds: float) -> Encoded:
    """Time FastViTHD as `load(vision="mlx")` runs it; arguments as `plan.time_calls`."""
    import mlx.core as mx

    encoder, pixels = state.model.engine.vision.encoder, sample_pixels(size)[None]
    assert encoder
    first = time_calls(lambda: mx.eval(encoder.encode(pixels)), 1, seconds)
    times = time_calls(lambda: mx.eval(encoder.encode(pixels)), runs, seconds)
    features = encoder.encode(pixels)
    dtype = str(features.dtype).rpartition(".")[2]
    return Encoded(encoder.device, dtype, first[0], tuple(times), bool(mx.all(mx.isfinite(features))))


def reference(state: MlxState, size: Size, on_cpu: bool = False) -> np.ndarray:
    """FastViTHD's features in float32.

    Args:
        state: of the worker.
        size: of the picture.
        on_cpu: compute on the CPU, instead of on MLX's default device.

    Returns:
        (N, C) float32.
    """
    import mlx.core as mx
    import numpy as np

    from fastvlm_mlx.loading import load_mlx_encoder

    usual = mx.default_device()
    try:
        if on_cpu:
            mx.set_default_device(mx.Device(mx.cpu))
        features = load_mlx_encoder(state.bundle, mx.float32).encode(sample_pixels(size)[None])
        return np.array(features[0])
    finally:
        mx.set_default_device(usual)


def answer(state: MlxState, side: int) -> Answers:
    """Ask about a picture of a side, or without one where there are no vision weights."""
    from fastvlm_bench.photo import sample_photo
    from fastvlm_bench.runner import precision, prompt_ids

    model, seen = state.model, state.bundle.config.vision is not None
    image, resolution = (sample_photo(), side) if seen else (None, None)
    by_ids = model.tokenizer is None
    prompt: str | list[int] = _QUESTION
    if by_ids:
        ids = prompt_ids(_PROMPT_TOKENS, model.config.decoder.vocab_size)
        prompt = ids if seen else [token for token in ids if token >= 0]
    first, second = (
        model.generate(image, prompt, resolution=resolution, max_tokens=_TOKENS, ignore_eos=by_ids) for _ in range(2)
    )
    return Answers(
        first=first.token_ids,
        second=second.token_ids,
        text=None if by_ids else first.text,
        ttft_ms=second.timings.ttft * 1e3,
        decode_tps=second.generation_tps,
        device=second.device,
        precision=precision(model),
    )
