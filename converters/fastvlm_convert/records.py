"""What makes a bundle trustworthy: hashes of its source and its files, and what may be replaced by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastvlm_convert.licence import copy_licence
from fastvlm_convert.source import read_json
from fastvlm_mlx import __version__
from fastvlm_mlx.bundle import MANIFEST, PACKAGE, Bundle
from fastvlm_mlx.errors import FastVLMError, InputError
from fastvlm_mlx.files import sha256
from fastvlm_mlx.manifest import CoreMLRecord, FileRecord, Manifest, Source

APPLE_PACKAGE = "fastvithd.mlpackage"
TOOL = "fastvlm-mlx"
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)

Progress = Callable[[str, int, int], object]  # stage, bytes done since the last call, total bytes


def check_target(source: Path, target: Path) -> None:
    """Refuse to put a bundle in the place of anything that isn't one.

    Raises:
        InputError: `target` holds something else, or holds the source.
    """
    place, origin = target.resolve(), source.resolve()
    if place == origin or place in origin.parents:
        raise InputError(f"the output {target} is or holds the checkpoint itself; choose another place with -o")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        ours = str(read_json(place / MANIFEST).get("tool")).startswith(f"{TOOL} ")
    except FastVLMError:
        ours = False
    if not ours:
        raise InputError(f"{target} exists and is no bundle; choose another place with -o")


def hash_source(source: Path, shards: Sequence[Path], progress: Progress) -> dict[str, str]:
    """SHA-256 of every file that the bundle depends on, by its name."""
    files = [*shards, *(source / name for name in _SMALL if (source / name).exists())]
    files += sorted(f for f in source.iterdir() if f.is_file() and f.name.upper().startswith(("LICEN", "NOTICE")))
    files += sorted(f for f in (source / APPLE_PACKAGE).rglob("*") if f.is_file())
    total = sum(file.stat().st_size for file in files)
    return {str(f.relative_to(source)): sha256(f, lambda n: progress("checking", n, total)) for f in files}


def is_up_to_date(
    target: Path,
    origin: Source,
    options: Mapping[str, object],
    licence: str | None,
    accepts: Callable[[Manifest], bool] = lambda _: True,
) -> bool:
    """Whether `target` is what converting this source with these options would write; `accepts` may object."""
    if not (target / MANIFEST).exists():
        return False
    try:
        manifest = Bundle.open(target).manifest
    except FastVLMError:
        return False  # damaged, or written by another version: make it again
    made_by = (manifest.tool, manifest.source, manifest.options)
    same_terms = licence is None or manifest.licence == licence
    return same_terms and accepts(manifest) and made_by == (f"{TOOL} {__version__}", origin, dict(options))


def as_json(options: Mapping[str, object]) -> dict[str, object]:
    """Options as a manifest gives them back: JSON has lists for tuples."""
    read: dict[str, object] = json.loads(json.dumps(options))
    return read


def write_manifest(
    folder: Path,
    source: Path,
    origin: Source,
    options: dict[str, object],
    changes: tuple[str, ...],
    licence: str | None,
    coreml: CoreMLRecord | None,
    progress: Progress,
) -> None:
    """Copy the terms, hash what was written, and say where it came from; the last step of a conversion."""
    terms = copy_licence(source, folder, origin.id, changes, licence)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    total = sum(file.stat().st_size for file in files)
    records = {
        f.relative_to(folder).as_posix(): FileRecord(
            sha256(f, lambda n: progress("hashing", n, total)), f.stat().st_size
        )
        for f in files
    }
    manifest = Manifest(f"{TOOL} {__version__}", origin, options, changes, records, terms, coreml)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def copy_package(source: Path, folder: Path, name: str = PACKAGE) -> None:
    """Carry Apple's Core ML package along, where the source has one."""
    if (source / APPLE_PACKAGE).is_dir():
        shutil.copytree(source / APPLE_PACKAGE, folder / name)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
