"""A converted model on disk: config, manifest with hashes, weights that are loaded strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import BundleError, WeightsError
from fastvlm_mlx.files import cache_dir, sha256, write_text
from fastvlm_mlx.manifest import FileRecord, Manifest

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

CONFIG, MANIFEST = "config.json", "manifest.json"
DECODER, VISION = "decoder.safetensors", "vision.safetensors"
PACKAGE, TOKENIZER = "vision.mlpackage", "tokenizer.json"

QUANTIZED_BITS, QUANTIZED_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what MLX's affine kernels take


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder, config and manifest."""

    path: Path
    config: ModelConfig
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, progress: Callable[[int], object] | None = None) -> Bundle:
        """Open a bundle and check that every file is what the manifest says.

        Sizes are compared each time. Contents are hashed when the file is new or has changed since it was
        last found good (size and modification time are remembered in the cache folder), so that a gigabyte
        isn't hashed at every start.

        Raises:
            BundleError: no bundle, a newer format, or a damaged file.
            ConfigError: config.json has unknown, missing or impossible values.
        """
        config = ModelConfig.from_file(path / CONFIG)
        manifest = Manifest.from_file(path / MANIFEST)
        needed = [CONFIG, DECODER, *([VISION] if config.vision else [])]
        needed += [TOKENIZER] if (path / TOKENIZER).exists() else []
        if unlisted := [name for name in needed if name not in manifest.files]:
            raise BundleError(f"{path / MANIFEST} doesn't list {', '.join(unlisted)}; convert the model again")
        verify_files(path, manifest.files, progress)
        return cls(path, config, manifest)

    def has(self, name: str) -> bool:
        """Whether the bundle holds this file or folder."""
        return (self.path / name).exists()


def verify_files(
    folder: Path, records: Mapping[str, FileRecord], progress: Callable[[int], object] | None = None
) -> None:
    """Compare the files of a folder with their records; see `Bundle.open`.

    Raises:
        BundleError: names the first file that is missing, has another size or another content.
    """
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    stamp_file = cache_dir() / "verified" / f"{key}.json"
    known = _read_stamps(stamp_file)
    stamps: dict[str, list[object]] = {}
    for name, record in records.items():
        path = folder / name
        again = "convert or download the model again"
        try:
            stat = path.stat()
        except OSError as exc:
            raise BundleError(f"{path} is missing from the bundle; {again}") from exc
        if stat.st_size != record.bytes:
            raise BundleError(f"{path} has {stat.st_size} bytes, the manifest says {record.bytes}; {again}")
        stamps[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino, record.sha256]
        if known.get(name) != stamps[name]:
            found = sha256(path, progress)
            if found != record.sha256:
                raise BundleError(
                    f"{path} is damaged: its SHA-256 is {found[:12]}..., "
                    f"the manifest says {record.sha256[:12]}...; {again}"
                )
    if stamps != known:
        try:
            write_text(stamp_file, json.dumps(stamps))
        except OSError:
            return  # an unwritable cache only costs the next start its hashing


def _read_stamps(path: Path) -> dict[str, list[object]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Open a safetensors file lazily: bytes are read when a tensor is first used.

    Raises:
        BundleError: missing, truncated or no safetensors.
    """
    import mlx.core as mx

    try:
        tensors = mx.load(str(path))
    except (RuntimeError, ValueError, OSError) as exc:
        raise BundleError(f"can't read {path}: {exc}; convert or download the model again") from exc
    if not isinstance(tensors, dict):
        raise BundleError(f"{path} is no safetensors file; convert or download the model again")
    return tensors


def assign(modules: Mapping[str, nn.Module], tensors: Mapping[str, mx.array], where: str) -> None:
    """Load tensors into modules strictly.

    Args:
        modules: prefix (with its dot, or "" for the rest) -> module.
        tensors: full names -> arrays. A module with `.scales` beside its `.weight` becomes a quantised one;
            bits and group size follow from the shapes.
        where: for the message.

    Raises:
        WeightsError: lists every missing, unexpected and wrongly shaped tensor at once.
    """
    faults: dict[str, list[str]] = {"missing": [], "unexpected": [], "wrong shape": []}
    taken: set[str] = set()
    for prefix in sorted(modules, key=len, reverse=True):
        module = modules[prefix]
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and n not in taken}
        taken |= {prefix + n for n in own}
        _quantize_like(module, own)
        expected = parameter_shapes(module)
        faults["missing"] += [prefix + n for n in expected if n not in own]
        faults["unexpected"] += [prefix + n for n in own if n not in expected]
        faults["wrong shape"] += [
            f"{prefix}{n} {own[n].shape} instead of {shape}"
            for n, shape in expected.items()
            if n in own and own[n].shape != shape
        ]
        if not any(faults.values()):
            module.load_weights(list(own.items()))
    raise_faults(faults, where)


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; nothing is computed."""
    from mlx.utils import tree_flatten

    return {name: array.shape for name, array in dict(tree_flatten(module.parameters())).items()}


def raise_faults(faults: Mapping[str, list[str]], where: str) -> None:
    """Raise one WeightsError that lists every fault, if there is any."""
    lines = [f"{label} ({len(names)}): {', '.join(sorted(names))}" for label, names in faults.items() if names]
    if lines:
        raise WeightsError(f"{where} doesn't fit its config; " + "; ".join(lines))


def _quantize_like(module: nn.Module, tensors: Mapping[str, mx.array]) -> None:
    """Replace the layers whose tensors are packed by quantised layers of the same width."""
    import mlx.nn as nn

    def width(path: str, layer: nn.Module) -> bool | dict[str, int]:
        packed, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if packed is None or scales is None or not isinstance(layer, nn.Linear | nn.Embedding):
            return False
        inputs = layer.weight.shape[-1]
        bits, group = packed.shape[-1] * 32 // inputs, inputs // max(scales.shape[-1], 1)
        if bits not in QUANTIZED_BITS or group not in QUANTIZED_GROUPS:
            return False  # then `assign` reports the shapes
        return {"bits": bits, "group_size": group}

    if any(name.endswith(".scales") for name in tensors):
        nn.quantize(module, class_predicate=width)
