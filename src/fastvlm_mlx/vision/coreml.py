"""The vision encoder as a Core ML package: on the Neural Engine, beside MLX on the GPU."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from fastvlm_mlx.config import DOWNSAMPLING, check_side
from fastvlm_mlx.errors import BundleError, EncoderError, InputError, ResolutionError
from fastvlm_mlx.vision.base import Encoder
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS, Function, Predict, Runtime

_DEVICES = {
    "CPU_AND_NE": "CPU and Neural Engine",
    "ALL": "CPU, GPU and Neural Engine",
    "CPU_AND_GPU": "CPU and GPU",
    "CPU_ONLY": "CPU",
}


class CoreMLVisionEncoder:
    """Runs a package's functions, one per image size; implements `fastvlm_mlx.vision.base.Encoder`.

    Takes packages of fastvlm-convert (image in, functions `r256`, `r576x1024`, ...) and those that Apple published
    (`images` float32 (1, 3, 1024, 1024) in [0, 1] in, a single function).

    Args:
        package: the .mlpackage.
        runtime: runs it.
        compute_units: where Core ML may run it; the default leaves the GPU to MLX.
        downsampling: of the encoder, image pixels per token side; the default is FastViTHD's.

    Raises:
        BundleError: the package can't be read. InputError: unknown compute units.
    """

    def __init__(
        self, package: Path, runtime: Runtime, compute_units: str = "CPU_AND_NE", downsampling: int = DOWNSAMPLING
    ) -> None:
        if compute_units not in COMPUTE_UNITS:
            raise InputError(f"compute_units must be one of {', '.join(COMPUTE_UNITS)}, got {compute_units!r}")
        if not package.exists():
            raise BundleError(f"{package} doesn't exist; convert the model with its Core ML package")
        self._package, self._runtime, self._units = package, runtime, compute_units
        self.downsampling = downsampling
        self._functions = {(f.height, f.width): f for f in runtime.functions(package)}
        self._open: dict[tuple[int, int], Predict] = {}
        self._failed: dict[tuple[int, int], str] = {}  # compiling again for every image could take minutes each
        # Core ML may read an input after `predict` has returned (coremltools 2827): arrays are kept and filled anew.
        self._arrays: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()  # a Core ML model runs one prediction at a time
        self._thread: ThreadPoolExecutor | None = None  # predictions wait there, so that MLX's thread goes on

    @property
    def device(self) -> str:
        """Core ML and the units it was given."""
        return f"Core ML ({_DEVICES[self._units]})"

    @property
    def runs_beside(self) -> bool:
        """Whether it leaves the GPU to MLX."""
        return "GPU" not in self._units and self._units != "ALL"

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of the images that the package takes."""
        return sorted(self._functions)

    def prepare(self, size: tuple[int, int]) -> Function:
        """Compile and load the function of a size, which the first image would do otherwise.

        Raises:
            ResolutionError: the package has no such function; names those it has. EncoderError: Core ML failed.
        """
        for side in size:
            check_side(side, self.downsampling)
        if size not in self._functions:
            there = ", ".join(f"{h} x {w}" for h, w in self.sizes)
            raise ResolutionError(
                f"the Core ML package takes images of {there} px, not {size[0]} x {size[1]}; choose one of them, "
                "use vision='mlx', or convert again with --resolutions"
            )
        function = self._functions[size]
        if size in self._failed:
            raise EncoderError(self._failed[size])
        if size not in self._open:
            try:
                self._open[size] = self._runtime.open(self._package, function, self._units)
            except EncoderError as exc:
                self._failed[size] = str(exc)
                raise
        return function

    def warm_up(self, size: tuple[int, int]) -> tuple[float, float]:
        """Make a size ready and run it once on a black image; errors as `prepare`.

        Returns:
            Seconds to compile and load it, and seconds of the first prediction.
        """
        begin = time.perf_counter()
        with self._lock:
            self.prepare(size)
        loaded = time.perf_counter()
        self.encode(np.zeros((1, *size, 3), np.uint8))
        return loaded - begin, time.perf_counter() - loaded

    def begin(self, pixels: np.ndarray) -> Callable[[], mx.array]:
        """Predict in a thread of its own; see `Encoder.begin`. Only the caller's thread touches MLX."""
        self._thread = self._thread or ThreadPoolExecutor(1, "fastvlm-coreml")
        features = self._thread.submit(self._encode, pixels)
        return lambda: mx.array(features.result())

    def encode(self, pixels: np.ndarray) -> mx.array:
        """(B, H, W, 3) uint8 -> (B, N, C) float16, one image after another; see `Encoder.encode`."""
        return mx.array(self._encode(pixels))

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        size = (pixels.shape[1], pixels.shape[2])
        with self._lock:
            function = self.prepare(size)
            return np.stack([self._predict(function, size, image) for image in pixels])

    def _predict(self, function: Function, size: tuple[int, int], image: np.ndarray) -> np.ndarray:
        given = image
        if not function.is_image:
            given = self._arrays.setdefault(size, np.empty((1, 3, *size), np.float32))
            np.divide(image.transpose(2, 0, 1)[None], np.float32(255), out=given)
        features = np.asarray(self._open[size]({function.input: given})[function.output])
        return features.astype(np.float16).reshape(-1, features.shape[-1])


class FallbackEncoder:
    """Core ML where it runs, MLX where it doesn't, with a warning the first time.

    Args:
        first: tried for every image.
        make_second: makes the other encoder, once it is needed, so that its weights aren't read in vain.
    """

    def __init__(self, first: CoreMLVisionEncoder, make_second: Callable[[], Encoder]) -> None:
        self._first, self._make_second = first, make_second
        self._second: Encoder | None = None
        self._last: Encoder = first

    @property
    def device(self) -> str:
        """What ran last."""
        return self._last.device

    @property
    def runs_beside(self) -> bool:
        """Whether what ran last leaves MLX's device alone."""
        return self._last.runs_beside

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of the images that Core ML takes."""
        return self._first.sizes

    def begin(self, pixels: np.ndarray) -> Callable[[], mx.array]:
        """See `Encoder.begin`."""
        begun = self._first.begin(pixels)
        return lambda: self._finish(begun, pixels)

    def encode(self, pixels: np.ndarray) -> mx.array:
        """(B, H, W, 3) uint8 -> (B, N, C); see `Encoder.encode`."""
        return self._finish(lambda: self._first.encode(pixels), pixels)

    def _finish(self, begun: Callable[[], mx.array], pixels: np.ndarray) -> mx.array:
        try:
            features = begun()
        except (EncoderError, ResolutionError) as exc:
            for side in pixels.shape[1:3]:
                check_side(side, self._first.downsampling)
            if self._second is None:
                warnings.warn(f"the vision encoder runs in MLX: {exc}", stacklevel=3)
                self._second = self._make_second()
            self._last = self._second
            return self._second.encode(pixels)
        self._last = self._first
        return features
