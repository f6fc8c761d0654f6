"""convert(): a checkpoint folder in, a bundle out."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fastvlm_convert.configs import check_model_type, read_config
from fastvlm_convert.keymap import Layout, Tensor, detect_layout, map_tensors
from fastvlm_convert.licence import copy_licence
from fastvlm_convert.mlx_weights import (
    Output,
    check_tensors,
    plan_decoder,
    plan_vision,
    raw_bytes,
    write_safetensors,
)
from fastvlm_convert.options import DTYPES, Options
from fastvlm_convert.source import Checkpoint, read_json
from fastvlm_convert.tokenizer import read_tokenizer
from fastvlm_mlx import __version__
from fastvlm_mlx.bundle import (
    CONFIG,
    DECODER,
    MANIFEST,
    PACKAGE,
    TOKENIZER,
    VISION,
    Bundle,
    FileRecord,
    Manifest,
    Source,
)
from fastvlm_mlx.config import ModelConfig, QuantizationConfig
from fastvlm_mlx.errors import CheckpointError, FastVLMError, InputError
from fastvlm_mlx.files import replaced_folder, require_space, sha256

APPLE_PACKAGE = "fastvithd.mlpackage"
DEFAULT_HOME = Path("models") / "converted"
_HEADERS_BYTES = 32 << 20  # room for the files' headers, the tokenizer and small things

Progress = Callable[[str, int, int], object]  # stage, bytes done since the last call, total bytes


@dataclass(frozen=True, slots=True)
class Result:
    """Where the bundle is; `up_to_date` says that it was there already; `warnings` are for the user."""

    path: Path
    up_to_date: bool
    warnings: tuple[str, ...]


def default_target(source: Path, options: Options) -> Path:
    """`models/converted/NAME` below the current folder, with the width in the name."""
    return DEFAULT_HOME / (source.resolve().name + options.suffix)


def convert(
    source: Path,
    target: Path | None = None,
    options: Options | None = None,
    source_id: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda *_: None,
) -> Result:
    """Convert a published FastVLM checkpoint into a bundle.

    The source is only read. The bundle is written beside `target` and renamed at the end. Where `target`
    already holds the outcome of the same bytes, options and version, nothing is written.

    Args:
        source: a folder in LLaVA's, transformers', mlx-vlm's or Apple's MLX layout.
        target: the bundle's folder; default `models/converted/NAME`.
        options: dtypes and quantisation.
        source_id: the name to record, such as "apple/FastVLM-0.5B"; default the folder's name.
        revision: the commit to record.
        progress: called with (stage, bytes done, bytes in all).

    Raises:
        CheckpointError, WeightsError, InputError, DiskSpaceError: with what to do about it.
    """
    options = options or Options()
    target = target or default_target(source, options)
    checkpoint = Checkpoint(source)
    check_model_type(checkpoint.config, str(source / CONFIG))
    layout = detect_layout(checkpoint.tensors, source)
    _check_target(source, target)
    origin = Source(
        source_id or source.resolve().name, layout.name, _hash_files(source, checkpoint, progress), revision
    )
    recorded = asdict(options)
    if _is_up_to_date(target, origin, recorded):
        return Result(target, True, ())
    tensors, config, warnings = _read_model(checkpoint, layout, origin.id, options)
    plan = _plan(tensors, config, options)
    package = source / APPLE_PACKAGE
    total = sum(spec.nbytes for outputs in plan.values() for output in outputs for spec in output.specs)
    require_space(target.parent, total + _folder_bytes(package) + _HEADERS_BYTES)
    with replaced_folder(target) as folder:
        for name, outputs in plan.items():
            write_safetensors(
                folder / name, outputs, checkpoint, tensors, lambda n: progress("writing", n, total)
            )
        if package.is_dir():
            shutil.copytree(package, folder / PACKAGE)
        (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
        tokenizer = read_tokenizer(source)
        if tokenizer is None:
            warnings.append("the checkpoint has no tokenizer: the bundle takes prompts as ids only")
        else:
            tokenizer.save(str(folder / TOKENIZER))
        changes = _changes(layout, config, options)
        licence = copy_licence(source, folder, origin.id, changes)
        records = _record_files(folder, progress)
        manifest = Manifest(f"fastvlm-mlx {__version__}", origin, recorded, changes, records, licence)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Result(target, False, tuple(warnings))


def _check_target(source: Path, target: Path) -> None:
    """Refuse to put a bundle in the place of anything that isn't one."""
    if target.exists() and target.resolve() == source.resolve():
        raise InputError(f"the output {target} is the checkpoint itself; choose another place with -o")
    if (
        target.exists()
        and not (target / MANIFEST).exists()
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise InputError(f"{target} exists and is no bundle; choose another place with -o")


def _hash_files(source: Path, checkpoint: Checkpoint, progress: Progress) -> dict[str, str]:
    """SHA-256 of every file that the bundle depends on."""
    small = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
    )
    files = [*checkpoint.shards, *(source / name for name in small if (source / name).exists())]
    files += sorted(
        f for f in source.iterdir() if f.is_file() and f.name.upper().startswith(("LICEN", "NOTICE"))
    )
    files += sorted(f for f in (source / APPLE_PACKAGE).rglob("*") if f.is_file())
    total = sum(file.stat().st_size for file in files)
    return {str(f.relative_to(source)): sha256(f, lambda n: progress("checking", n, total)) for f in files}


def _is_up_to_date(target: Path, origin: Source, options: Mapping[str, object]) -> bool:
    if not (target / MANIFEST).exists():
        return False
    try:
        manifest = Bundle.open(target).manifest
    except FastVLMError:
        return False  # damaged, or written by another version: make it again
    made_by = (manifest.tool, manifest.source, manifest.options)
    return made_by == (f"fastvlm-mlx {__version__}", origin, dict(options))


def _read_model(
    checkpoint: Checkpoint, layout: Layout, name: str, options: Options
) -> tuple[dict[str, Tensor], ModelConfig, list[str]]:
    """The checkpoint's tensors, checked, and its config with what the tensors decide."""
    generation_file = checkpoint.path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    where = str(checkpoint.path / CONFIG)
    config = read_config(checkpoint.config, layout, name, where, generation)
    tensors, unknown = map_tensors(checkpoint, layout)
    if config.quantization and options.width:
        raise CheckpointError(
            f"{checkpoint.path} is quantised already ({config.quantization.bits} bits); convert it without -q"
        )
    warnings = []
    tied = _head_is_tied(checkpoint, tensors)
    if tied != config.decoder.tie_word_embeddings:
        found = "has no head besides the embedding" if tied else "has a head that differs from the embedding"
        warnings.append(
            f"{where} says tie_word_embeddings={not tied}, but the checkpoint {found}; going by the tensors"
        )
    if tied:
        tensors = {n: t for n, t in tensors.items() if not n.startswith("lm_head.")}
    width = options.width
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, tie_word_embeddings=tied),
        image_newline="model.image_newline" in tensors,
        quantization=QuantizationConfig(width.bits, width.group_size) if width else config.quantization,
    )
    check_tensors(tensors, unknown, config, str(checkpoint.path))
    return tensors, config, warnings


def _head_is_tied(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the decoder's head is its embedding: there is none, or it holds the same bytes."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return head is None
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    parts = ("weight", "scales", "biases") if head.dtype == "U32" else ("weight",)
    names = [(f"lm_head.{part}", f"model.embed_tokens.{part}") for part in parts]
    if not all(name in tensors for pair in names for name in pair):
        return False  # the check that follows says what is missing
    return all(_digest(checkpoint, tensors[a]) == _digest(checkpoint, tensors[b]) for a, b in names)


def _digest(checkpoint: Checkpoint, tensor: Tensor) -> bytes:
    """One tensor is in memory at a time, so two big ones are compared by their hashes."""
    return hashlib.sha256(raw_bytes(checkpoint.read(tensor.source))).digest()


def _plan(tensors: Mapping[str, Tensor], config: ModelConfig, options: Options) -> dict[str, list[Output]]:
    width = options.width
    dtype = DTYPES[options.dtype] if options.dtype else None
    plan = {DECODER: plan_decoder(tensors, config, dtype, width, options.quantize_projector)}
    if config.vision:
        vision_dtype = DTYPES[options.vision_dtype] if options.vision_dtype else None
        plan[VISION] = plan_vision(
            tensors, config.vision, vision_dtype, width if options.quantize_vision else None
        )
    return plan


def _changes(layout: Layout, config: ModelConfig, options: Options) -> tuple[str, ...]:
    """The change record, in words."""
    changes = [f"renamed from the {layout.name} layout into a fastvlm-mlx bundle"]
    if config.vision:
        changes.append(
            "FastViTHD folded: batch norm, layer scale, LayerNorm affine, 1/255; convolutions channels last"
        )
    if options.dtype:
        changes.append(f"decoder and projector cast to {options.dtype}")
    if options.vision_dtype:
        changes.append(f"FastViTHD cast to {options.vision_dtype}")
    if options.width:
        parts = ["decoder", *(["projector"] if options.quantize_projector else [])]
        parts += ["FastViTHD's matrices"] if options.quantize_vision else []
        changes.append(
            f"{', '.join(parts)} quantised to {options.q_bits} bits, groups of {options.q_group_size}"
        )
    return tuple(changes)


def _record_files(folder: Path, progress: Progress) -> dict[str, FileRecord]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    total = sum(file.stat().st_size for file in files)
    return {
        f.relative_to(folder).as_posix(): FileRecord(
            sha256(f, lambda n: progress("hashing", n, total)), f.stat().st_size
        )
        for f in files
    }


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
