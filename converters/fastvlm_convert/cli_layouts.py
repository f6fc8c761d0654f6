"""`fastvlm-convert --layout`: what of the command's options another runtime's folder takes."""

from __future__ import annotations

import argparse

from fastvlm_convert.coreml_vision import Size
from fastvlm_convert.export import ExportPackage, export
from fastvlm_convert.exports import form_of
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import Result
from fastvlm_convert.records import Progress
from fastvlm_convert.vision_package import Gates
from fastvlm_mlx.errors import InputError


def export_as_asked(args: argparse.Namespace, options: Options, progress: Progress) -> Result:
    """Run `export` with a command line's options.

    Args:
        args: of `fastvlm_convert.cli.build_parser`.
        options: dtypes and quantisation.
        progress: as `export` calls it.

    Raises:
        InputError: an option that the layout has no place for; besides, what `export` raises.
    """
    form = form_of(args.layout)
    if form.package and args.no_coreml:
        raise InputError(f"{form.runtime} runs FastViTHD as a Core ML package; leave --no-coreml out")
    bundle_only = {
        "--min-target": args.min_target,
        "--vision-bits": args.vision_bits,
        "--upload-repo": args.upload_repo,
        "--force": args.force and not form.package,
        "--template": args.template,
    }
    if given := [flag for flag, value in bundle_only.items() if value]:
        raise InputError(f"{given[0]} is for bundles; leave it out with --layout {form.name}")
    return export(
        args.checkpoint,
        form.name,
        args.output,
        options,
        ExportPackage(_size(args.resolutions, form.runtime), args.attention, args.calibration),
        args.source_id,
        args.revision,
        args.licence,
        progress,
        Gates(every_size=args.verify, force=args.force),
        args.base,
    )


def _size(resolutions: str | None, runtime: str) -> Size | None:
    """The one size that was asked for."""
    sizes = Size.parse_list(resolutions) if resolutions is not None else ()
    if len(sizes) > 1:
        raise InputError(f"{runtime} takes images of one size, --resolutions names {len(sizes)}; give one of them")
    return sizes[0] if sizes else None
