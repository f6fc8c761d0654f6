"""`fastvlm verify BUNDLE`: run the gates of a bundle's Core ML package, write the outcome into its manifest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fastvlm_convert.coreml_vision import PackageOptions, Size
from fastvlm_convert.gates import Subject, check_package, core_ml, describe_checks
from fastvlm_convert.keymap import detect_layout, map_tensors
from fastvlm_convert.lora import open_checkpoint
from fastvlm_convert.records import hash_source
from fastvlm_convert.vision_package import raise_failures, ranges_of
from fastvlm_convert.vision_weights import from_bundle, from_checkpoint
from fastvlm_mlx import hub
from fastvlm_mlx.bundle import MANIFEST, PACKAGE, Bundle
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.config import from_dict
from fastvlm_mlx.errors import BundleError, InputError
from fastvlm_mlx.files import write_text
from fastvlm_mlx.manifest import CheckRecord, Manifest


def verify_bundle(
    path: Path,
    sizes: Sequence[Size] | None = None,
    checkpoint: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
    base: Path | None = None,
) -> tuple[CheckRecord, ...]:
    """Run the gates of a bundle's package and write the outcome into the manifest; see fastvlm_convert.gates.

    Args:
        path: the bundle's folder.
        sizes: of these functions; default all of the package.
        checkpoint: the bundle's source, to compare with where the bundle's own vision weights are rounded.
        say: called with what is being done.
        base: where the source is an adapter: what it was trained on, if its config doesn't lead there.

    Raises:
        BundleError: no bundle, no package in it, or nothing to compare with.
        InputError: `checkpoint` isn't the bundle's source. ResolutionError: the package lacks one of `sizes`.
    """
    bundle = Bundle.open(path)
    if not bundle.has(PACKAGE):
        raise BundleError(f"{path} has no {PACKAGE}; convert the checkpoint again without --no-coreml")
    record, vision = bundle.manifest.coreml, bundle.config.vision
    if record is None or vision is None:
        raise BundleError(
            f"{path / PACKAGE} was carried along from the source, without weights to compare it with; "
            "convert the PyTorch checkpoint for a package that can be checked"
        )
    options = from_dict(PackageOptions, bundle.manifest.options.get("package"), str(path / MANIFEST))
    weights = _weights_of_source(bundle, checkpoint, base) if checkpoint else from_bundle(bundle)
    subject = Subject(path / PACKAGE, vision, weights, options, ranges_of(record))
    checks = check_package(subject, sizes, runtime=core_ml(), say=say)
    _record(path, bundle.manifest, checks, say)
    return checks


def _record(path: Path, checked: Manifest, checks: Sequence[CheckRecord], say: Callable[[str], object]) -> None:
    """Put the outcome into the manifest, as it is now: another run may have written to it meanwhile."""
    now = Manifest.from_file(path / MANIFEST)
    if now.coreml is None or now.files != checked.files:
        raise BundleError(f"{path} was made anew while it was checked; run the check again")
    done = {check.function for check in checks}
    kept = [check for check in now.coreml.checks if check.function not in done]
    record = dataclasses.replace(now.coreml, checks=(*kept, *checks))
    try:
        write_text(path / MANIFEST, dataclasses.replace(now, coreml=record).to_json())
    except OSError as exc:  # the outcome is worth more than its record
        say(f"the outcome isn't in {path / MANIFEST}, which can't be written: {exc.strerror}")


def _weights_of_source(bundle: Bundle, folder: Path, base: Path | None) -> dict[str, np.ndarray]:
    """The vision weights of the checkpoint that a bundle was made from."""
    assert bundle.config.vision
    checkpoint, source = open_checkpoint(folder, base), bundle.manifest.source
    found, recorded = hash_source(checkpoint.path, checkpoint.shards, lambda *_: None), source.files
    if other := [name for name in recorded if found.get(name) != recorded[name]]:
        raise InputError(f"{folder} isn't what {bundle.path} was made from: {other[0]} differs; give its source")
    if checkpoint.adapter != source.adapter:
        raise InputError(f"{folder} isn't what {bundle.path} was made from: that is {source.name}; give its source")
    tensors, _ = map_tensors(checkpoint, detect_layout(checkpoint.tensors, folder))
    return from_checkpoint(checkpoint, tensors, bundle.config.vision)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm verify",
        description="Run a bundle's Core ML package op by op, compare it with PyTorch, and write the outcome into "
        "its manifest. On a Mac, run it with Core ML on each compute unit as well.",
    )
    parser.add_argument("bundle", help="bundle folder, or a name of `fastvlm models` that is on this machine")
    parser.add_argument("--resolutions", metavar="LIST", help="such as 256,1024x576 (default: all in the package)")
    parser.add_argument("--checkpoint", type=Path, help="the bundle's source, where its own vision weights are rounded")
    parser.add_argument(
        "--base", type=Path, metavar="CKPT", help="with an adapter as --checkpoint: what it was trained on"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(build_parser(), _verify, argv)


def _verify(args: argparse.Namespace) -> None:
    from fastvlm_mlx.accelerate import prepare_cpu

    prepare_cpu()
    if args.base is not None and args.checkpoint is None:
        raise InputError("--base is what the adapter at --checkpoint was trained on; give both, or leave --base out")
    sizes = Size.parse_list(args.resolutions) if args.resolutions is not None else None
    path = hub.resolve(args.bundle, local_files_only=True)
    checks = verify_bundle(path, sizes, args.checkpoint, say=lambda step: print(step, file=sys.stderr), base=args.base)
    print(json.dumps([dataclasses.asdict(c) for c in checks], indent=2) if args.json else describe_checks(checks))
    raise_failures(checks, "convert the checkpoint again")


if __name__ == "__main__":
    raise SystemExit(main())
