"""The seam to Core ML: what a package holds, and how one of its functions is run.

Everything that needs coremltools or macOS is in `AppleRuntime`; tests put another runtime in its place.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastvlm_mlx.errors import BundleError, EncoderError
from fastvlm_mlx.files import cache_dir, sha256

if TYPE_CHECKING:
    import numpy as np

Predict = Callable[[Mapping[str, "np.ndarray"]], Mapping[str, "np.ndarray"]]

ONLY_FUNCTION = "main"  # the name of a package's function where there is one
COMPUTE_UNITS = ("CPU_AND_NE", "ALL", "CPU_AND_GPU", "CPU_ONLY")
_SLOW_SECONDS = 2.0  # a load that takes longer gets a word of explanation
_LEAST_MACOS = 14  # of a package with a single function
_FIRST_SPECIFICATION = 8 - _LEAST_MACOS  # macOS 14 reads version 8 of the format, 15 reads 9


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a package.

    Attributes:
        name: None for a package with a single function, which Core ML runs by default.
        input: name of its input.
        is_image: the input is an image, uint8 RGB; otherwise float32 (1, 3, H, W) in [0, 1], as Apple exports.
        height: of the input, in pixels.
        width: of the input, in pixels.
        output: name of its output, (1, N, C).
    """

    name: str | None
    input: str
    is_image: bool
    height: int
    width: int
    output: str


class Runtime(Protocol):
    """What runs Core ML packages."""

    def functions(self, package: Path) -> list[Function]:
        """What a package holds. Raises BundleError: it can't be read."""

    def open(self, package: Path, function: Function, compute_units: str) -> Predict:
        """Make a function ready to run. Raises EncoderError: it can't be."""


class AppleRuntime:
    """Core ML through coremltools, on macOS.

    coremltools compiles a package into a temporary folder at every start; here it is compiled once into the
    cache, by the package's hash, the build of macOS and the version of coremltools. The Neural Engine's own
    compilation, which can take minutes, is then kept by macOS.
    """

    def __init__(self) -> None:
        """Import coremltools.

        Raises:
            EncoderError: no macOS, too old a one, or coremltools isn't installed.
        """
        if sys.platform != "darwin":
            raise EncoderError(f"Core ML runs on macOS only, this is {platform.system()}; vision='mlx' runs here")
        self._macos: int = int(platform.mac_ver()[0].split(".")[0])
        self._require_macos(_LEAST_MACOS)
        try:
            import coremltools
        except ImportError as exc:
            raise EncoderError("Core ML needs coremltools: pip install coremltools, or use vision='mlx'") from exc
        self._ct: Any = coremltools
        self._caches: dict[Path, Path] = {}  # package -> its compiled form, so that it is hashed once

    def _require_macos(self, release: int) -> None:
        if self._macos < release:
            raise EncoderError(
                f"the Core ML package needs macOS {release} or newer, this is {platform.mac_ver()[0]}; vision='mlx' "
                "runs here"
            )

    def functions(self, package: Path) -> list[Function]:
        """Read a package's description; see `Runtime.functions`."""
        try:
            spec = self._ct.utils.load_spec(str(package))
        except Exception as exc:  # coremltools raises bare Exception on anything it can't read
            raise BundleError(f"{package} is no readable Core ML package: {exc}; convert the model again") from exc
        self._require_macos(int(spec.specificationVersion) - _FIRST_SPECIFICATION)
        return describe(spec)

    def compile(self, package: Path) -> bool:
        """Compile a package into the cache, which `open` does otherwise.

        Returns:
            Whether that had to be done; False if it was there.

        Raises:
            EncoderError: Core ML can't.
        """
        try:
            known = self._cache(package).exists()
            self._compiled(package)
        except Exception as exc:  # as above
            raise EncoderError(f"Core ML can't compile {package}: {exc}; use vision='mlx'") from exc
        return not known

    def open(self, package: Path, function: Function, compute_units: str) -> Predict:
        """Compile if needed, load for these compute units; see `Runtime.open`."""
        units = getattr(self._ct.ComputeUnit, compute_units)
        try:
            with _explain_if_slow(f"preparing the vision encoder for {compute_units}: the first time can take minutes"):
                model = self._load(package, units, function.name)
        except Exception as exc:  # as above; Core ML's own errors arrive as RuntimeError
            raise EncoderError(f"Core ML can't load {package}: {exc}; use vision='mlx'") from exc

        def predict(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            from PIL import Image

            given = {n: Image.fromarray(v) if function.is_image else v for n, v in inputs.items()}
            try:
                outputs: Mapping[str, np.ndarray] = model.predict(given)
            except RuntimeError as exc:  # Core ML's own errors, such as a Neural Engine that is out of memory
                raise EncoderError(f"Core ML can't run {package}: {exc}; use vision='mlx'") from exc
            return outputs

        return predict

    def _load(self, package: Path, units: Any, function: str | None) -> Any:
        """Load the compiled form; one that can't be loaded, such as half of one, is made again once."""
        load, known = self._ct.models.CompiledMLModel, self._cache(package).exists()
        try:
            return load(str(self._compiled(package)), units, function_name=function)
        except Exception:  # whatever a broken file makes of it: a second failure is raised
            if not known:
                raise
            shutil.rmtree(self._cache(package), ignore_errors=True)
            return load(str(self._compiled(package)), units, function_name=function)

    def _compiled(self, package: Path) -> Path:
        target = self._cache(package)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                self._ct.models.utils.compile_model(str(package), str(made))
                try:
                    made.rename(target)
                except OSError:
                    if not target.exists():  # otherwise another process was quicker
                        raise
        return target

    def _cache(self, package: Path) -> Path:
        if package not in self._caches:
            key = f"{package_hash(package)}:{_os_build()}:{self._ct.__version__}"
            name = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.mlmodelc"
            self._caches[package] = cache_dir() / "coreml" / name
        return self._caches[package]


def _os_build() -> str:
    """The build of macOS, such as 24G84: it changes with updates that leave the release's number alone."""
    done = subprocess.run(["/usr/bin/sw_vers", "-buildVersion"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or platform.version()


def describe(spec: Any) -> list[Function]:
    """The functions of a Core ML model description (protobuf `Model`)."""
    several = list(spec.description.functions)
    if not several:
        return [_function(None, spec.description.input[0], spec.description.output[0])]
    return [_function(f.name, f.input[0], f.output[0]) for f in several]


def _function(name: str | None, given: Any, made: Any) -> Function:
    is_image = given.type.WhichOneof("Type") == "imageType"
    if is_image:
        height, width = given.type.imageType.height, given.type.imageType.width
    else:
        shape = list(given.type.multiArrayType.shape)
        if len(shape) != 4 or shape[:2] != [1, 3]:
            raise BundleError(f"the package's input {given.name} is {shape}, expected an image or (1, 3, H, W)")
        height, width = shape[2:]
    return Function(name, given.name, is_image, int(height), int(width), made.name)


def package_hash(package: Path) -> str:
    """One hash of all files of a package and their names."""
    digest = hashlib.sha256()
    for file in sorted(f for f in package.rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(package).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def _explain_if_slow(message: str) -> Iterator[None]:
    """Say on stderr what is going on, once it takes long."""
    timer = threading.Timer(_SLOW_SECONDS, lambda: print(f"fastvlm: {message}", file=sys.stderr))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
