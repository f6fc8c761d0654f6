"""The bundle: where it came from, and whether its files are what they were."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TypeVar

from fastvlm_bench.doctor.check import Check, one_line
from fastvlm_bench.doctor.plan import Size, size_text
from fastvlm_mlx.bundle import MANIFEST, PACKAGE, Bundle
from fastvlm_mlx.config import check_side
from fastvlm_mlx.errors import ResolutionError
from fastvlm_mlx.files import sha256
from fastvlm_mlx.manifest import CheckRecord

Say = Callable[[str], object]
Part = TypeVar("Part")

NAME = "model"


def check_model(path: Path, say: Say = lambda _: None) -> tuple[Check, Bundle | None]:
    """Open a bundle and hash all of its files, also those that were found good before.

    Args:
        path: the bundle's folder.
        say: called with what is being done.

    Returns:
        The check, and the bundle if it can be opened.
    """
    say("hashing the model's files")
    try:
        bundle = Bundle.open(path)
    except Exception as exc:  # whatever is wrong with it, the machine is checked all the same
        return Check(NAME, (str(path),), (one_line(exc),), data={"path": str(path)}), None
    faults: list[str] = []

    def part(make: Callable[[Bundle], Part], instead: Part) -> Part:
        try:
            return make(bundle)
        except Exception as exc:  # whatever an odd manifest makes of it, the rest is worth having
            faults.append(one_line(exc))
            return instead

    for find in (_file_faults, _record_faults, _gate_faults):
        faults += part(find, [])
    plain: tuple[str, ...] = (str(path),)
    least: dict[str, object] = {"path": str(path)}
    notes, data = part(_notes, plain), part(_data, least)
    return Check(NAME, notes, tuple(dict.fromkeys(faults)), data=data), bundle


def _file_faults(bundle: Bundle) -> list[str]:
    return [fault for name in bundle.manifest.files if (fault := _fault(bundle, name))]


def _gate_faults(bundle: Bundle) -> list[str]:
    failed = [f"{check.function}, {check.executor}" for check in _gates(bundle) if not check.passed]
    return [f"the Core ML package failed gates when it was made ({'; '.join(failed)}); convert again"] if failed else []


def _record_faults(bundle: Bundle) -> list[str]:
    """What the manifest says of the package and nobody can read."""
    package, name = bundle.manifest.options.get("package"), f"{bundle.path / MANIFEST}: options.package"
    if package is None:
        return []  # it was only copied, or there is none
    if not isinstance(package, dict):
        return [f"{name} must be an object, got {json.dumps(package)}; convert again"]
    found = []
    if (sizes := package.get("sizes")) is not None and _sizes(sizes, bundle.config.downsampling) is None:
        found.append(
            f'{name}.sizes must be a list such as [{{"height": 256, "width": 256}}], multiples of '
            f"{bundle.config.downsampling}, got {json.dumps(sizes)}; convert again"
        )
    if "bits" in package and _bits(package["bits"]) is None:
        found.append(f"{name}.bits must be a number above 0, got {json.dumps(package['bits'])}; convert again")
    return found


def _fault(bundle: Bundle, name: str) -> str | None:
    """What is wrong with a file, if anything is."""
    path, right = bundle.path / name, bundle.manifest.files[name].sha256
    try:
        found = sha256(path)
    except OSError as exc:
        return f"{path} can't be read: {exc.strerror}"
    if found == right:
        return None
    return (
        f"{path} is damaged: its SHA-256 is {found[:12]}..., the manifest says {right[:12]}...; "
        "convert or download the model again"
    )


def recorded_sizes(bundle: Bundle) -> tuple[Size, ...]:
    """The sizes of a bundle's Core ML package as the converter wrote them down; () where none can be read."""
    package = bundle.manifest.options.get("package")
    if not isinstance(package, dict) or not bundle.has(PACKAGE):
        return ()
    return _sizes(package.get("sizes"), bundle.config.downsampling) or ()


def _sizes(recorded: object, downsampling: int) -> tuple[Size, ...] | None:
    """A manifest's list of sizes; None if it is none."""
    try:
        sizes = tuple((size["height"], size["width"]) for size in recorded)  # type: ignore[attr-defined]
        for side in chain.from_iterable(sizes):
            check_side(operator.index(side), downsampling)
    except (TypeError, KeyError, ResolutionError):
        return None
    return sizes


def package_bits(bundle: Bundle) -> int:
    """Bits of the Core ML package's weights; Apple's own packages, which nothing is recorded of, have 16."""
    package = bundle.manifest.options.get("package")
    return (_bits(package.get("bits")) if isinstance(package, dict) else None) or 16


def _bits(recorded: object) -> int | None:
    """A manifest's number of bits; None if it is none."""
    return recorded if type(recorded) is int and recorded > 0 else None


def rounded_vision(bundle: Bundle) -> bool:
    """Whether the converter rounded the bundle's MLX vision weights, which then are no reference."""
    options = bundle.manifest.options
    return bool(options.get("vision_dtype") or options.get("quantize_vision"))


def _gates(bundle: Bundle) -> tuple[CheckRecord, ...]:
    return bundle.manifest.coreml.checks if bundle.manifest.coreml else ()


def _notes(bundle: Bundle) -> tuple[str, ...]:
    config, manifest = bundle.config, bundle.manifest
    size = sum(record.bytes for record in manifest.files.values())
    width = config.quantization
    stored = (
        f"{width.bits} bits in groups of {width.group_size}"
        if width
        else manifest.options.get("dtype") or "as published"
    )
    revision = f", revision {manifest.source.revision}" if manifest.source.revision else ""
    return (
        f"{config.name}, {bundle.path}; made by {manifest.tool} from {manifest.source.id} "
        f"({manifest.source.layout}){revision}",
        f"manifest {sha256(bundle.path / MANIFEST)[:16]}; {len(manifest.files)} files, {size / 1e6:.1f} MB, all hashed",
        f"decoder: {stored}; FastViTHD in MLX: {_vision(bundle)}; Core ML package: {_package(bundle)}",
    )


def _vision(bundle: Bundle) -> str:
    if bundle.config.vision is None:
        return "none"
    return "rounded by the converter" if rounded_vision(bundle) else "as published"


def _package(bundle: Bundle) -> str:
    if not bundle.has(PACKAGE):
        return "none"
    sizes = ", ".join(map(size_text, recorded_sizes(bundle))) or "unknown sizes"
    checks = _gates(bundle)
    passed = sum(check.passed for check in checks)
    return f"{sizes} px, {package_bits(bundle)}-bit weights, {passed} of {len(checks)} gates passed when it was made"


def _data(bundle: Bundle) -> dict[str, object]:
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "model": bundle.config.name,
        "manifest_sha256": sha256(bundle.path / MANIFEST),
        "tool": manifest.tool,
        "source": {name: getattr(manifest.source, name) for name in ("id", "layout", "revision")},
        "options": manifest.options,
        "quantization": asdict(bundle.config.quantization) if bundle.config.quantization else None,
        "has_package": bundle.has(PACKAGE),
        "package_sizes": [list(size) for size in recorded_sizes(bundle)],
        "gates": [asdict(check) for check in _gates(bundle)],
    }
