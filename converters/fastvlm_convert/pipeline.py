"""convert(): a checkpoint folder in, a bundle out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fastvlm_convert.configs import image_warning, read_config
from fastvlm_convert.families import FAMILIES
from fastvlm_convert.folding import describe_folding
from fastvlm_convert.keymap import Layout, Tensor, map_tensors
from fastvlm_convert.mlx_weights import (
    Output,
    check_tensors,
    plan_decoder,
    plan_vision,
    raw_bytes,
    write_safetensors,
)
from fastvlm_convert.options import DTYPES, Options
from fastvlm_convert.origin import merge_record, open_source
from fastvlm_convert.records import (
    APPLE_PACKAGE,
    Progress,
    as_json,
    copy_package,
    folder_bytes,
    is_up_to_date,
    write_manifest,
)
from fastvlm_convert.source import Checkpoint, read_json
from fastvlm_convert.tokenizer import with_tokenizer
from fastvlm_convert.verify import verify_bundle
from fastvlm_convert.vision_package import (
    REMEDY,
    Gates,
    Request,
    add_package,
    calibration_record,
    check_sizes,
    raise_failures,
    request_package,
)
from fastvlm_convert.vision_weights import from_checkpoint
from fastvlm_mlx.bundle import CONFIG, DECODER, PACKAGE, TOKENIZER, VISION
from fastvlm_mlx.config import ModelConfig, QuantizationConfig, from_dict
from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError
from fastvlm_mlx.files import replaced_folder, require_space
from fastvlm_mlx.manifest import CoreMLRecord
from fastvlm_mlx.views import view_of

DEFAULT_HOME = Path("models") / "converted"
HEADERS_BYTES = 32 << 20  # room for the files' headers, the tokenizer and small things


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
    licence: str | None = None,
    progress: Progress = lambda *_: None,
    calibration: Path | None = None,
    gates: Gates | None = None,
    base: Path | None = None,
) -> Result:
    """Convert a published FastVLM checkpoint into a bundle, which appears whole; one that is up to date stays.

    Args:
        source: a folder, only read, in LLaVA's, transformers', mlx-vlm's or Apple's MLX layout; or a LoRA adapter's.
        target: the bundle's folder; default `models/converted/NAME`.
        options: dtypes and quantisation.
        source_id: the name to record, such as "apple/FastVLM-0.5B"; default the folder's name.
        revision: the commit to record.
        licence: short name of the source's terms, where its files don't hold them.
        progress: called with (stage, bytes done, bytes in all); (step, 0, 0) for a step without a size.
        calibration: a folder of pictures to measure the Core ML package's ranges on; default a built-in set.
        gates: how the package is checked; default at one telling size, and a failure is an error.
        base: what an adapter was trained on; default what its config names.

    Raises:
        CheckpointError, WeightsError, InputError, ResolutionError, DiskSpaceError, MissingDependencyError or
        VerificationError.
    """
    options, gates = options or Options(), gates or Gates()
    target = target or default_target(source, options)
    request = request_package(options.package, calibration, gates)
    checkpoint, layout, origin = open_source(source, target, base, source_id, revision, progress)
    made_with = as_json(asdict(options) | ({"calibration": calibration_record(request.pictures)} if request else {}))
    if is_up_to_date(target, origin, made_with, licence, gates.accepts if request else lambda _: True):
        _verify_again(target, source, base, request, progress)
        return Result(target, True, ())
    tensors, config, warnings = read_model(checkpoint, layout, origin.name, options)
    tokenizer, config, odd = with_tokenizer(checkpoint.path, config, options.template is not None)
    warnings += odd
    plan = _plan(tensors, config, options)
    total = _require_room(target, checkpoint.path, plan, options)
    with replaced_folder(target) as folder:
        for name, outputs in plan.items():
            write_safetensors(folder / name, outputs, checkpoint, tensors, lambda n: progress("writing", n, total))
        coreml = _make_package(folder, checkpoint, tensors, config, request, progress, warnings)
        _write_texts(folder, config, tokenizer, warnings)
        changes = merge_record(origin) + _changes(layout, config, options, tensors)
        write_manifest(folder, checkpoint.path, origin, made_with, changes, licence, coreml, progress)
    return Result(target, False, tuple(warnings))


def _verify_again(target: Path, source: Path, base: Path | None, request: Request | None, progress: Progress) -> None:
    """Run the gates of a bundle that stands as it is, where all of them are asked for."""
    if request is None or not request.gates.every_size:
        return
    checks = verify_bundle(target, checkpoint=source, base=base, say=lambda step: progress(step, 0, 0))
    if not request.gates.force:
        raise_failures(checks, REMEDY)


def _require_room(target: Path, source: Path, plan: Mapping[str, list[Output]], options: Options) -> int:
    """Raise DiskSpaceError unless the bundle fits; gives the bytes of its tensors."""
    total = sum(spec.nbytes for outputs in plan.values() for output in outputs for spec in output.specs)
    require_space(target.parent, total + _package_bytes(source, plan, options) + HEADERS_BYTES)
    return total


def _write_texts(folder: Path, config: ModelConfig, tokenizer: Tokenizer | None, warnings: list[str]) -> None:
    """Write config.json and, where the checkpoint has one, the tokenizer."""
    (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
    if tokenizer:
        tokenizer.save(str(folder / TOKENIZER))
    else:
        warnings.append("the checkpoint has no tokenizer: the bundle takes prompts as ids only")


def read_model(
    checkpoint: Checkpoint, layout: Layout, name: str, options: Options
) -> tuple[dict[str, Tensor], ModelConfig, list[str]]:
    """A checkpoint's tensors, checked, its config with what the tensors decide, and warnings.

    Raises:
        CheckpointError, ConfigError or WeightsError: it can't be used; says why.
    """
    generation_file = checkpoint.path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    where = str(checkpoint.config_file)
    config = read_config(checkpoint.config, layout, name, where, generation)
    tensors, unknown = map_tensors(checkpoint, layout)
    if config.quantization and options.width:
        raise CheckpointError(
            f"{checkpoint.path} is quantised already ({config.quantization.bits} bits); convert it without -q"
        )
    odd = image_warning(checkpoint.config, where)
    warnings = [odd] if odd else []
    tied = _head_is_tied(checkpoint, tensors)
    # "Not tied" is true of a file that holds the head besides the embedding, also where both are the same.
    if tied != config.decoder.tie_word_embeddings and not (tied and "lm_head.weight" in tensors):
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
        template=options.template or config.template,
    )
    # What the run time will read: a value of another type is found now, not when the bundle is loaded.
    config = from_dict(ModelConfig, json.loads(config.to_json()), where)
    check_tensors(tensors, unknown, config, str(checkpoint.path))
    return tensors, _with_tiles_that_can_be_made(config, where, warnings), warnings


def _with_tiles_that_can_be_made(config: ModelConfig, where: str, warnings: list[str]) -> ModelConfig:
    """The config, padding images by default where its AnyRes can't be run."""
    try:
        view_of(config, config.image_size)
    except ConfigError as exc:
        warnings.append(f"images are padded, not cut into tiles, as {where} asks for what can't be made: {exc}")
        return dataclasses.replace(config, aspect="pad")
    return config


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
        if options.package:
            check_sizes(options.package.sizes, config.vision)
        vision_dtype = DTYPES[options.vision_dtype] if options.vision_dtype else None
        plan[VISION] = plan_vision(tensors, config.vision, vision_dtype, width if options.quantize_vision else None)
    return plan


def _make_package(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    request: Request | None,
    progress: Progress,
    warnings: list[str],
) -> CoreMLRecord | None:
    """The Core ML package of the vision weights, or the source's own where it has no weights."""
    if config.vision is None or request is None:
        if request and not request.gates.optional:
            warnings.append("the checkpoint has no vision weights to make a Core ML package of")
        copy_package(checkpoint.path, folder)
        return None
    warnings += [*request.pictures.skipped, *([request.pictures.note] if request.pictures.note else [])]
    weights = from_checkpoint(checkpoint, tensors, config.vision)
    try:
        return add_package(folder, config.vision, weights, request, lambda step: progress(step, 0, 0))
    except Exception as exc:  # whatever it is: what nobody asked for doesn't cost the rest of the bundle
        if not request.gates.optional:
            raise
        kind = "" if isinstance(exc, FastVLMError) else f"{type(exc).__name__}: "
        warnings.append(f"the bundle has no Core ML package: {kind}{exc}")
        shutil.rmtree(folder / PACKAGE, ignore_errors=True)
        return None


def _package_bytes(source: Path, plan: Mapping[str, list[Output]], options: Options) -> int:
    """Room for the Core ML package, and for those of single sizes that it is joined from."""
    if options.package is None or VISION not in plan:
        return folder_bytes(source / APPLE_PACKAGE)
    elements = sum(int(np.prod(spec.shape)) for output in plan[VISION] for spec in output.specs)
    return 2 * elements * (len(options.package.sizes) + 1)


def _changes(layout: Layout, config: ModelConfig, options: Options, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The change record, in words."""
    encoder = FAMILIES[config.vision.family].title if config.vision else ""
    changes = [f"renamed from the {layout.name} layout into a fastvlm-mlx bundle"]
    if config.vision:
        changes.append(describe_folding(config.vision, tensors))
    if config.vision and options.package:
        changes.append(
            f"{encoder} as a Core ML package: {options.package.bits}-bit weights, stages scaled by powers of two"
        )
    if options.dtype:
        changes.append(f"decoder and projector cast to {options.dtype}")
    if options.vision_dtype:
        changes.append(f"{encoder} cast to {options.vision_dtype}")
    if options.width:
        parts = ["decoder", *(["projector"] if options.quantize_projector else [])]
        parts += [f"{encoder}'s matrices"] if options.quantize_vision else []
        changes.append(f"{', '.join(parts)} quantised to {options.q_bits} bits, groups of {options.q_group_size}")
    return tuple(changes)
