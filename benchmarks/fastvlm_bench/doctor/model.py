"""The bundle: where it came from, and whether its files are what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fastvlm_bench.doctor.check import Check, one_line
from fastvlm_bench.doctor.plan import Size, size_text
from fastvlm_mlx.bundle import MANIFEST, PACKAGE, Bundle
from fastvlm_mlx.files import sha256
from fastvlm_mlx.manifest import CheckRecord

Say = Callable[[str], object]

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
    faults = [fault for name in bundle.manifest.files if (fault := _fault(bundle, name))]
    if failed := [f"{c.function}, {c.executor}" for c in _gates(bundle) if not c.passed]:
        faults.append(f"the Core ML package failed gates when it was made ({'; '.join(failed)}); convert again")
    return Check(NAME, _notes(bundle), tuple(faults), data=_data(bundle)), bundle


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
    """The sizes of a bundle's Core ML package as the converter wrote them down; () where it has none."""
    package = bundle.manifest.options.get("package")
    sizes = package.get("sizes") if isinstance(package, dict) and bundle.has(PACKAGE) else None
    return tuple((size["height"], size["width"]) for size in sizes or ())


def package_bits(bundle: Bundle) -> int:
    """Bits of the Core ML package's weights; Apple's own packages, which nothing is recorded of, have 16."""
    package = bundle.manifest.options.get("package")
    return int(package.get("bits", 16)) if isinstance(package, dict) else 16


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
