"""export(): a checkpoint folder in, a folder out that another runtime loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fastvlm_convert.coreml_vision import Attention, PackageOptions, Size
from fastvlm_convert.export_check import check_round_trip
from fastvlm_convert.export_config import make_config, write_json, write_processors
from fastvlm_convert.export_plan import ExportPlan, plan_export
from fastvlm_convert.export_source import earlier_changes, open_any, read_any, read_vision
from fastvlm_convert.export_tokenizer import write_tokenizer
from fastvlm_convert.exports import WEIGHTS, Form, form_of
from fastvlm_convert.gates import Subject, check_package, core_ml
from fastvlm_convert.keymap import Layout
from fastvlm_convert.mlx_weights import write_safetensors
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import DEFAULT_HOME, HEADERS_BYTES, Result
from fastvlm_convert.records import APPLE_PACKAGE, TOOL, Progress, as_json, copy_package, folder_bytes, write_manifest
from fastvlm_convert.schema import vision_shapes
from fastvlm_convert.source import Checkpoint
from fastvlm_convert.vision_package import (
    Gates,
    Request,
    add_package,
    calibration_record,
    raise_failures,
    ranges_of,
    request_package,
)
from fastvlm_mlx import __version__
from fastvlm_mlx.bundle import CONFIG, MANIFEST, verify_files
from fastvlm_mlx.errors import FastVLMError, InputError
from fastvlm_mlx.files import replaced_folder, require_space
from fastvlm_mlx.manifest import CoreMLRecord, Manifest, Source

_TARGET = "macOS13"  # what Apple's own package asks for


@dataclass(frozen=True, slots=True)
class ExportPackage:
    """How the Core ML package of an export is made.

    Attributes:
        size: of its images; None for the model's own.
        attention: its form; None for "batched".
        calibration: a folder of pictures to measure ranges on; None for a built-in set.
    """

    size: Size | None = None
    attention: Attention | None = None
    calibration: Path | None = None


def export(
    source: Path,
    layout: str,
    target: Path | None = None,
    options: Options | None = None,
    package: ExportPackage | None = None,
    source_id: str | None = None,
    revision: str | None = None,
    licence: str | None = None,
    progress: Progress = lambda *_: None,
    gates: Gates | None = None,
    base: Path | None = None,
) -> Result:
    """Convert a checkpoint for another runtime; the folder appears whole, and one that is up to date stays.

    Args:
        source: a folder of a checkpoint, of an adapter or of a bundle; only read.
        layout: "apple-app" for Apple's demo app and mlx-swift, or "mlx-vlm".
        target: the folder to write; default `models/converted/NAME-LAYOUT`.
        options: dtypes and quantisation, of decoder and projector.
        package: how the Core ML package of "apple-app" is made.
        source_id: the name to record, such as "apple/FastVLM-0.5B"; default the folder's name.
        revision: the commit to record.
        licence: short name of the source's terms, where its files don't hold them.
        progress: called with (stage, bytes done, bytes in all); (step, 0, 0) for a step without a size.
        gates: `every_size` reads the folder back as well, and compares it with the source.
        base: what an adapter was trained on; default what its config names.

    Raises:
        CheckpointError, WeightsError, InputError, DiskSpaceError, MissingDependencyError or VerificationError.
    """
    form, options, package, gates = form_of(layout), options or Options(), package or ExportPackage(), gates or Gates()
    _check_options(form, options, package)
    target = target or DEFAULT_HOME / f"{source.resolve().name}-{form.name}{options.suffix}"
    checkpoint, found, origin = open_any(source, target, base, source_id, revision, progress)
    request = _request(form, checkpoint, found, package, gates)
    made_with = _made_with(form, options, package, request)
    current = _is_current(target, origin, made_with, licence, gates.accepts if request else lambda _: True)
    if current and not gates.every_size:
        return Result(target, True, ())
    tensors, config, warnings = read_any(checkpoint, found, origin.name, options)
    plan = plan_export(form, checkpoint, tensors, config, options, package.size.height if package.size else None)
    if current:
        _verify_again(target, plan, request, progress)
        return Result(target, True, ())
    warnings += plan.warnings
    with _folder_for(plan, target) as folder:
        coreml = _write(folder, plan, request, gates, warnings, progress)
        changes = _changes(found, plan, origin, options)
        write_manifest(folder, checkpoint.path, origin, made_with, changes, licence, coreml, progress)
    return Result(target, False, tuple(warnings))


def _made_with(form: Form, options: Options, package: ExportPackage, request: Request | None) -> dict[str, object]:
    """What decides the output besides the source, for the manifest."""
    made = replace(package, attention=package.attention or "batched", calibration=None)
    chosen = asdict(options) | {"layout": form.name, "export_package": asdict(made)}
    return as_json(chosen | ({"calibration": calibration_record(request.pictures)} if request else {}))


@contextmanager
def _folder_for(plan: ExportPlan, target: Path) -> Iterator[Path]:
    """A folder to write in, if there is room for it, that takes the target's place at the end."""
    require_space(target.parent, _tensor_bytes(plan) + _package_bytes(plan) + HEADERS_BYTES)
    with replaced_folder(target) as folder:
        yield folder


def _write(
    folder: Path, plan: ExportPlan, request: Request | None, gates: Gates, warnings: list[str], progress: Progress
) -> CoreMLRecord | None:
    """Write everything but the manifest; read it back where every check is asked for."""
    total = _tensor_bytes(plan)
    write_safetensors(
        folder / WEIGHTS, plan.outputs, plan.checkpoint, plan.tensors, lambda n: progress("writing", n, total)
    )
    record = _add_package(folder, plan, request, warnings, lambda step: progress(step, 0, 0))
    write_json(folder / CONFIG, make_config(plan))
    write_processors(plan.form, folder, plan.side)
    write_tokenizer(plan.checkpoint.path, folder, plan.tokenizer)
    if gates.every_size:
        progress("reading it back", 0, 0)
        check_round_trip(folder, plan)
    return record


def _tensor_bytes(plan: ExportPlan) -> int:
    return sum(spec.nbytes for output in plan.outputs for spec in output.specs)


def _check_options(form: Form, options: Options, package: ExportPackage) -> None:
    """Raise InputError for what a form has no place for."""
    if options.quantize_vision:
        raise InputError(f"--quantize-vision is for bundles; {form.runtime} takes FastViTHD unquantised")
    if not form.package and package != ExportPackage():
        raise InputError(
            f"{form.runtime} takes FastViTHD's weights, not a Core ML package; leave --resolutions, --attention and "
            "--calibration out"
        )
    if form.package and options.vision_dtype:
        raise InputError(f"{form.runtime} takes FastViTHD as a Core ML package in float16; leave --vision-dtype out")
    if form.package and package.attention == "sdpa":
        raise InputError("--attention sdpa needs macOS 15, Apple's package is for macOS 13; give batched or split")
    if options.vision_dtype == "float16":
        raise InputError(f"FastViTHD overflows float16 in {form.runtime}; give --vision-dtype bfloat16 or float32")
    if package.size and package.size.height != package.size.width:
        raise InputError(f"{form.runtime} takes square images; got {package.size.height}x{package.size.width}")


def _request(form: Form, checkpoint: Checkpoint, found: Layout, package: ExportPackage, gates: Gates) -> Request | None:
    """The package that is to be made, its size still open; None where none is.

    Raises:
        InputError: one is described, and the source's own is carried along.
    """
    if not form.package:
        return None
    if not found.has_vision:
        if package != ExportPackage():
            raise InputError(
                f"{checkpoint.path} has no vision weights to make a Core ML package of, its own is carried along as it "
                "is; leave --resolutions, --attention and --calibration out"
            )
        return None
    size = package.size or Size(64, 64)  # the model's own is known when its config is read
    options = PackageOptions((size,), package.attention or "batched", min_target=_TARGET, interface="tensor")
    return request_package(options, package.calibration, gates)


def _is_current(
    target: Path, origin: Source, options: dict[str, object], licence: str | None, accepts: Callable[[Manifest], bool]
) -> bool:
    """Whether `target` is what this export would write; as records.is_up_to_date, for folders that are no bundle."""
    if not (target / MANIFEST).exists():
        return False
    try:
        manifest = Manifest.from_file(target / MANIFEST)
        verify_files(target, manifest.files)
    except FastVLMError:
        return False  # damaged, or written by another version: make it again
    made_by = (manifest.tool, manifest.source, manifest.options)
    same_terms = licence is None or manifest.licence == licence
    return same_terms and accepts(manifest) and made_by == (f"{TOOL} {__version__}", origin, options)


def _package_bytes(plan: ExportPlan) -> int:
    """Room for the Core ML package and coremltools' copy of it, or for the source's own."""
    if not plan.form.package:
        return 0
    if plan.config.vision is None:
        return folder_bytes(plan.checkpoint.path / APPLE_PACKAGE)
    return 2 * 2 * sum(int(np.prod(shape)) for shape in vision_shapes(plan.config.vision).values())


def _add_package(
    folder: Path, plan: ExportPlan, request: Request | None, warnings: list[str], say: Callable[[str], object]
) -> CoreMLRecord | None:
    """Make the package of the vision weights, or carry the source's own along where it has none."""
    if not plan.form.package:
        return None
    if request is None or plan.config.vision is None:
        copy_package(plan.checkpoint.path, folder, APPLE_PACKAGE)
        warnings.append("the source has no vision weights: its own Core ML package is carried along, unchecked")
        return None
    warnings += [*request.pictures.skipped, *([request.pictures.note] if request.pictures.note else [])]
    weights = read_vision(plan.checkpoint, plan.tensors, plan.config.vision)
    return add_package(folder, plan.config.vision, weights, _sized(request, plan), say, APPLE_PACKAGE)


def _verify_again(target: Path, plan: ExportPlan, request: Request | None, progress: Progress) -> None:
    """Check an export that stands as it is: read it back, and run the gates of its package."""
    progress("reading it back", 0, 0)
    check_round_trip(target, plan)
    record = Manifest.from_file(target / MANIFEST).coreml
    if request is None or record is None or plan.config.vision is None:
        return
    weights = read_vision(plan.checkpoint, plan.tensors, plan.config.vision)
    options = _sized(request, plan).options
    subject = Subject(target / APPLE_PACKAGE, plan.config.vision, weights, options, ranges_of(record))
    checks = check_package(subject, runtime=core_ml(), say=lambda step: progress(step, 0, 0))
    if not request.gates.force:
        raise_failures(checks, "convert the checkpoint again")


def _sized(request: Request, plan: ExportPlan) -> Request:
    """The request with the size that the plan found."""
    return replace(request, options=replace(request.options, sizes=(Size(plan.side, plan.side),)))


def _changes(found: Layout, plan: ExportPlan, origin: Source, options: Options) -> tuple[str, ...]:
    """The change record, in words; a bundle's own goes before."""
    form = plan.form
    changes = [
        *earlier_changes(plan.checkpoint, origin),
        f"renamed from the {found.name} layout into that of {form.runtime}",
    ]
    if options.dtype or form.dtype:
        changes.append(f"decoder and projector cast to {options.dtype or form.dtype}")
    if options.vision_dtype:
        changes.append(f"FastViTHD cast to {options.vision_dtype}")
    if plan.folded:
        changes.append("FastViTHD's folded batch norms and layer scales written as ones that change nothing")
    if form.package and plan.config.vision:
        changes.append("FastViTHD folded into a Core ML package: float16 weights, stages scaled by powers of two")
    if options.width:
        changes.append(f"decoder and projector quantised to {options.q_bits} bits, groups of {options.q_group_size}")
    return tuple(changes)
