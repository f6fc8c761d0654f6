"""The Core ML half of a conversion: measure ranges, make the package, run its gates, say what was found."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvlm_convert.calibration import Pictures, built_in, from_folder
from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package, measure_ranges
from fastvlm_convert.gates import Subject, check_package, core_ml, describe_checks
from fastvlm_convert.ranges import FLOAT16_MAX, Ranges
from fastvlm_mlx.bundle import PACKAGE
from fastvlm_mlx.config import VisionConfig, check_side
from fastvlm_mlx.errors import MissingDependencyError, VerificationError
from fastvlm_mlx.manifest import CheckRecord, CoreMLRecord, Manifest

REMEDY = "--force writes it all the same, --no-coreml leaves it out"

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Gates:
    """How strictly a package is checked before it is kept.

    Attributes:
        every_size: run the gates at every size, and Core ML itself on a Mac. Otherwise at `telling_size` only:
            the functions share their weights and the network, so it shows most faults, and soon.
        force: keep a package that fails.
        optional: leave a package that fails out, with a warning, instead of failing the whole conversion.
    """

    every_size: bool = False
    force: bool = False
    optional: bool = False

    def accepts(self, manifest: Manifest) -> bool:
        """Whether the package of an earlier conversion, or the lack of one, would be this one's outcome too."""
        if manifest.coreml is None:  # it was left out, or there are no vision weights to make it of
            return self.optional and not self.force
        return self.force or all(check.passed for check in manifest.coreml.checks)


@dataclass(frozen=True, slots=True)
class Request:
    """A package that is to be made: how, calibrated on what, checked how."""

    options: PackageOptions
    pictures: Pictures
    gates: Gates


def request_package(options: PackageOptions | None, calibration: Path | None, gates: Gates) -> Request | None:
    """What is asked for; None where no package is.

    Raises:
        MissingDependencyError: torch or coremltools isn't installed. InputError: a bad calibration folder.
    """
    if options is None:
        return None
    if missing := missing_dependencies():
        raise MissingDependencyError(
            f"a Core ML package needs {' and '.join(missing)}: pip install 'fastvlm-mlx[convert]', "
            "or leave it out with --no-coreml"
        )
    return Request(options, from_folder(calibration) if calibration else built_in(), gates)


def missing_dependencies() -> list[str]:
    """What a package needs and isn't installed; found without importing anything."""
    return [name for name in ("torch", "coremltools") if importlib.util.find_spec(name) is None]


def add_package(
    folder: Path,
    config: VisionConfig,
    weights: Mapping[str, np.ndarray],
    request: Request,
    say: Say = lambda _: None,
    name: str = PACKAGE,
) -> CoreMLRecord:
    """Write the vision encoder's package into a bundle's folder.

    Args:
        folder: of the bundle that is being written.
        config: the encoder's shape.
        weights: folded weights, by the names of fastvlm_convert.folding.
        request: how the package is made and checked; ranges are measured on its pictures at every size.
        say: called with what is being done.
        name: of the package.

    Raises:
        VerificationError: a gate failed, and a failure isn't to be kept.
    """
    options, gates, ranges = request.options, request.gates, Ranges()
    if options.range_safety:
        ranges = measure_ranges(config, weights, _pixels(request.pictures, options.sizes, say))
        _check_headroom(ranges, gates)
    convert_package(config, weights, folder / name, options, ranges, say)
    subject = Subject(folder / name, config, weights, options, ranges)
    sizes, runtime = (options.sizes, core_ml()) if gates.every_size else ((telling_size(options.sizes),), None)
    checks = check_package(subject, sizes, runtime=runtime, say=say)
    if not gates.force:
        raise_failures(checks, REMEDY)
    return record_of(ranges, request.pictures, checks)


def check_sizes(sizes: Sequence[Size], config: VisionConfig) -> None:
    """Raise ResolutionError unless images of every size can be cut into whole tokens."""
    for size in sizes:
        for side in (size.height, size.width):
            check_side(side, config.downsampling)


def telling_size(sizes: Sequence[Size]) -> Size:
    """The smallest size that shows faults everywhere: below 256 px the last maps don't reach all taps of a 7x7."""
    whole = [size for size in sizes if min(size.height, size.width) >= 256]
    return min(whole, key=_area) if whole else max(sizes, key=_area)


def _area(size: Size) -> int:
    return size.height * size.width


def _check_headroom(ranges: Ranges, gates: Gates) -> None:
    """Raise VerificationError where no power of two helps: what leaves the network is beyond float16."""
    beyond = [name for name, bits in ranges.headroom.items() if bits <= 0]
    if beyond and not gates.force:
        value = ranges.maxima[beyond[0]]
        raise VerificationError(
            f"the Core ML package would overflow float16: {beyond[0]} reaches {value:.3g} on the calibration pictures, "
            f"the limit is {FLOAT16_MAX:.0f}; {REMEDY}"
        )


def _pixels(pictures: Pictures, sizes: Sequence[Size], say: Say) -> Iterator[np.ndarray]:
    for size in sizes:
        say(f"measuring ranges at {size.height} x {size.width} on {pictures.count} pictures ({pictures.name})")
        yield from pictures.at(size)


def raise_failures(checks: Sequence[CheckRecord], remedy: str) -> None:
    """Raise VerificationError if a gate failed, or none was run; says which, and what can be done."""
    if not checks:
        raise VerificationError("nothing of the Core ML package was checked; give it a size and a picture")
    if failed := [check for check in checks if not check.passed]:
        raise VerificationError(
            f"the Core ML package fails {len(failed)} of {len(checks)} gates ({describe_checks(failed[:1])}); {remedy}"
        )


def calibration_record(pictures: Pictures) -> str:
    """The pictures in the manifest's words; another set has others."""
    return f"{pictures.name}, {pictures.count} pictures, {pictures.digest[:16]}"


def record_of(ranges: Ranges, pictures: Pictures, checks: Sequence[CheckRecord]) -> CoreMLRecord:
    """What the manifest keeps of a package."""
    return CoreMLRecord(
        calibration=calibration_record(pictures),
        exponents={
            "streams": {str(stage): exponent for stage, exponent in ranges.streams.items()},
            "norms": dict(ranges.norms),
            "hidden": dict(ranges.hidden),
        },
        headroom={name: round(bits, 2) for name, bits in ranges.headroom.items() if math.isfinite(bits)},
        checks=tuple(checks),
    )


def ranges_of(record: CoreMLRecord) -> Ranges:
    """The exponents that a package was made with."""
    exponents = record.exponents
    streams = {int(stage): exponent for stage, exponent in exponents["streams"].items()}
    return Ranges(streams, exponents["norms"], exponents["hidden"])
