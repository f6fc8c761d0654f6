"""load(): the one place where a bundle's parts are put together."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from fastvlm_mlx import hub
from fastvlm_mlx.accelerate import prepare_cpu
from fastvlm_mlx.budget import apply_budget, check_budget
from fastvlm_mlx.bundle import (
    DECODER,
    MANIFEST,
    PACKAGE,
    QUANTIZED_BITS,
    TOKENIZER,
    VISION,
    Bundle,
    assign,
    read_tensors,
)
from fastvlm_mlx.config import check_side
from fastvlm_mlx.errors import BundleError, EncoderError, InputError
from fastvlm_mlx.files import sha256

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.projector import MLPProjector
    from fastvlm_mlx.vision.base import Encoder
    from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder
    from fastvlm_mlx.vision.coreml_runtime import Runtime

PREFIX_CACHE_BYTES, FEATURE_CACHE_BYTES = 512 << 20, 128 << 20


def load(
    model: str | PathLike[str] | None = None,
    *,
    vision: str = "auto",
    resolution: int | None = None,
    quantize: int | None = None,
    dtype: str | None = None,
    vision_dtype: str | None = None,
    compute_units: str = "CPU_AND_NE",
    revision: str | None = None,
    local_files_only: bool = False,
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    feature_cache_bytes: int = FEATURE_CACHE_BYTES,
    warm: bool = False,
    ttft_budget: float | None = None,
) -> FastVLM:
    """Load a model.

    Args:
        model: a bundle's folder, a name of `fastvlm models`, "org/name" on the Hugging Face hub, or None for
            the default that comes with the package and needs no network.
        vision: "coreml" for the bundle's Core ML package, "mlx", or "auto": Core ML where the bundle has a
            package and this machine runs it, else MLX, on a Mac with a warning.
        compute_units: where Core ML may run: "CPU_AND_NE" (leaves the GPU to MLX), "ALL", "CPU_AND_GPU" or
            "CPU_ONLY".
        resolution: side in pixels of the images that the encoder gets, a multiple of 64 (FastViT: 32); default what
            the model was trained at. Each call may choose another.
        quantize: 2, 3, 4, 5, 6 or 8: quantise the decoder to that many bits after loading.
        dtype: "float32", "bfloat16" or "float16" for decoder and projector; default as stored on a GPU and
            float32 on a CPU, whose other matmuls are many times slower. On a CPU quantised matrices are
            unpacked too, for the same reason: their values stay the quantised ones.
        vision_dtype: "float32" or "bfloat16" for the vision encoder (float16 would overflow); default bfloat16 on
            a GPU, float32 on a CPU.
        revision: commit or branch on the hub.
        local_files_only: never go to the network.
        prefix_cache_bytes: most memory for what was computed of earlier prompts and answers; 0 keeps none.
        feature_cache_bytes: most memory for the features of earlier images; 0 keeps none.
        warm: answer a question about a black image now, so that the first of yours waits for nothing to be loaded.
        ttft_budget: seconds to the first token of a short question about one image, instead of `resolution`: the
            largest one within it, as measured by `fastvlm-bench`, by an earlier load or else now, which is logged
            by "fastvlm_mlx" and kept; of a photo of 4:3 in the model's own aspect. See `budget.apply_budget`.

    Raises:
        BundleError, ConfigError, WeightsError: the bundle can't be used. HubError: the hub can't.
        InputError, ResolutionError: an argument is out of range. EncoderError: `vision` can't run here.
    """
    _check(vision, quantize, resolution, prefix_cache_bytes, feature_cache_bytes)
    if ttft_budget is not None:
        check_budget(ttft_budget, resolution)
    prepare_cpu()
    bundle = Bundle.open(hub.resolve(model, revision=revision, local_files_only=local_files_only))
    caches = prefix_cache_bytes, feature_cache_bytes
    loaded = assemble(bundle, vision, resolution, quantize, dtype, vision_dtype, compute_units, cache_bytes=caches)
    if ttft_budget is not None:
        apply_budget(loaded, ttft_budget)
    if warm:
        loaded.warm_up()
    return loaded


def _check(
    vision: str, quantize: int | None, resolution: int | None, prefix_cache_bytes: int, feature_cache_bytes: int
) -> None:
    """Raise InputError or ResolutionError for arguments out of range, before anything is downloaded."""
    if vision not in ("auto", "coreml", "mlx"):
        raise InputError(f"vision must be auto, coreml or mlx, got {vision!r}")
    if quantize is not None and quantize not in QUANTIZED_BITS:
        raise InputError(f"quantize must be one of {', '.join(map(str, QUANTIZED_BITS))} or None, got {quantize!r}")
    if resolution is not None:
        check_side(resolution)
    for name, size in (("prefix_cache_bytes", prefix_cache_bytes), ("feature_cache_bytes", feature_cache_bytes)):
        if size < 0:
            raise InputError(f"{name} must be 0 (off) or more, got {size}")


def assemble(
    bundle: Bundle,
    vision: str = "auto",
    resolution: int | None = None,
    quantize: int | None = None,
    dtype: str | None = None,
    vision_dtype: str | None = None,
    compute_units: str = "CPU_AND_NE",
    unpack: bool | None = None,
    runtime: Runtime | None = None,
    cache_bytes: tuple[int, int] = (PREFIX_CACHE_BYTES, FEATURE_CACHE_BYTES),
) -> FastVLM:
    """Build the model of an open bundle; arguments as `load`.

    `unpack` says whether quantised matrices become plain ones; by default they do on a CPU. `runtime` runs Core
    ML packages; by default Core ML itself does. `cache_bytes` are for prefixes and for features.
    """
    import mlx.core as mx

    from fastvlm_mlx.cache import PrefixCache
    from fastvlm_mlx.decoder import Decoder
    from fastvlm_mlx.engine import Engine
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.pictures import Vision
    from fastvlm_mlx.tokenizer import Tokenizer

    config = bundle.config
    side = resolution if resolution is not None else config.image_size
    check_side(side, config.downsampling)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    vision_kept = _dtype(vision_dtype) or (mx.float32 if on_cpu else mx.bfloat16)
    encoder = _load_encoder(bundle, vision, vision_kept, compute_units, runtime)
    kept = _dtype(dtype) or (mx.float32 if on_cpu else None)
    projector, network = _load_language(bundle, quantize, kept, on_cpu if unpack is None else unpack)
    tokenizer = None
    if bundle.has(TOKENIZER):
        tokenizer = Tokenizer(bundle.path / TOKENIZER, config.prefix_after_special)
    decoder = Decoder(network, config.decoder, tokenizer.size if tokenizer else None)
    prefix_bytes, feature_bytes = cache_bytes
    engine = Engine(decoder, Vision(encoder, projector, feature_bytes), PrefixCache(prefix_bytes))
    weights = f"{sha256(bundle.path / MANIFEST)}, quantize {quantize}, dtype {kept}, vision_dtype {vision_kept}"
    return FastVLM(config, engine, tokenizer, side, weights)


def warm_up(
    bundle: Bundle,
    sizes: Sequence[tuple[int, int]] = (),
    compute_units: str = "CPU_AND_NE",
    runtime: Runtime | None = None,
) -> Iterator[tuple[int, int, float, float]]:
    """Compile a bundle's Core ML functions for this machine, which the first image would wait for otherwise.

    Args:
        bundle: an open bundle.
        sizes: (height, width) in pixels; default all that the package has.
        compute_units: as `load`.
        runtime: runs Core ML packages; by default Core ML itself does.

    Yields:
        Height, width, seconds to compile and load, and seconds of the first prediction.

    Raises:
        EncoderError: Core ML can't run here, or failed. ResolutionError: the package lacks one of `sizes`.
        BundleError: no package, or a damaged one.
    """
    encoder = _open_package(bundle, True, compute_units, runtime)
    assert encoder
    for height, width in sizes or encoder.sizes:
        yield height, width, *encoder.warm_up((height, width))


def _dtype(name: str | None) -> mx.Dtype | None:
    import mlx.core as mx

    known = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    if name is not None and name not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name] if name else None


def _load_encoder(
    bundle: Bundle, vision: str, dtype: mx.Dtype, compute_units: str, runtime: Runtime | None
) -> Encoder | None:
    """The encoder that was asked for, or None where the bundle has none and none was asked for by name."""
    from fastvlm_mlx.vision.coreml import FallbackEncoder

    package = None if vision == "mlx" else _open_package(bundle, vision == "coreml", compute_units, runtime)
    if vision == "coreml" or (package and bundle.config.vision is None):
        return package
    if package:
        return FallbackEncoder(package, lambda: load_mlx_encoder(bundle, dtype))
    if bundle.config.vision is None and vision == "auto":
        return None  # text works; an image then raises, saying why
    return load_mlx_encoder(bundle, dtype)


def _open_package(
    bundle: Bundle, required: bool, compute_units: str, runtime: Runtime | None
) -> CoreMLVisionEncoder | None:
    """The bundle's Core ML package, or None where it has none or it can't run here; a required one raises."""
    from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder
    from fastvlm_mlx.vision.coreml_runtime import AppleRuntime

    # Elsewhere than on a Mac nobody expects Core ML: there is nothing to warn of.
    if not required and not (bundle.has(PACKAGE) and (runtime or sys.platform == "darwin")):
        return None
    try:
        package, downsampling = bundle.path / PACKAGE, bundle.config.downsampling
        return CoreMLVisionEncoder(package, runtime or AppleRuntime(), compute_units, downsampling)
    except (BundleError, EncoderError) as exc:
        if required:
            raise
        if bundle.config.vision is not None:
            warnings.warn(f"the vision encoder runs in MLX: {exc}", stacklevel=4)
        return None


def load_mlx_encoder(bundle: Bundle, dtype: mx.Dtype) -> Encoder:
    """The vision encoder in MLX, on MLX's default device.

    Args:
        bundle: an open bundle.
        dtype: float32 or bfloat16, of weights and activations.

    Raises:
        EncoderError: the bundle has no vision weights for MLX. BundleError, WeightsError: they can't be read.
    """
    from fastvlm_mlx.vision.fastvithd import FastViTHD, MLXVisionEncoder

    if bundle.config.vision is None:
        raise EncoderError(f"{bundle.path} has no vision weights for MLX; convert the PyTorch checkpoint")
    network = FastViTHD(bundle.config.vision)
    path = bundle.path / VISION
    assign({"": network}, read_tensors(path), str(path))
    return MLXVisionEncoder(network, dtype)


def _load_language(
    bundle: Bundle, quantize: int | None, dtype: mx.Dtype | None, unpack: bool
) -> tuple[MLPProjector, nn.Module]:
    """Projector and decoder, which share a file."""
    from fastvlm_mlx.decoder import build_network
    from fastvlm_mlx.precision import make_ready
    from fastvlm_mlx.projector import MLPProjector

    config = bundle.config
    projector, network = MLPProjector(config.projector, config.image_newline), build_network(config.decoder)
    path = bundle.path / DECODER
    assign({"projector.": projector, "": network}, read_tensors(path), str(path))
    if quantize and config.quantization:
        raise InputError(
            f"{bundle.path} is quantised already ({config.quantization.bits} bits); load it with quantize=None"
        )
    make_ready(projector, network, quantize, dtype, unpack)
    return projector, network
