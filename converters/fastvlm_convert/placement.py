"""`fastvlm placement PACKAGE_OR_BUNDLE`: where the vision encoder runs, from Core ML or else by rules."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle import CONFIG, PACKAGE
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import BundleError, EncoderError
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; light, so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="fastvlm placement",
        description="Say where a Core ML package runs: Core ML's own plan on macOS 14.4 or newer, "
        "a heuristic of static rules elsewhere.",
    )
    parser.add_argument("path", type=Path, metavar="PACKAGE_OR_BUNDLE", help="an .mlpackage, or a bundle that has one")
    parser.add_argument("--function", metavar="NAME", help="only this one, such as r1024 (default: all)")
    parser.add_argument(
        "--compute-units",
        choices=COMPUTE_UNITS,
        default="CPU_AND_NE",
        help="what Core ML may use (default: %(default)s)",
    )
    parser.add_argument("--static", action="store_true", help="the static rules, on a Mac too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(build_parser(), _show, argv)


def find_package(path: Path) -> Path:
    """The package that is meant by a package or a bundle's folder.

    Raises:
        BundleError: there is nothing, or the bundle has no package.
    """
    if not path.exists():
        raise BundleError(f"{path} doesn't exist; give an .mlpackage or the folder of a bundle")
    # By what only a bundle has: on a Mac its manifest.json is also found as a package's Manifest.json.
    if (path / PACKAGE).is_dir():
        return path / PACKAGE
    if (path / CONFIG).is_file():
        raise BundleError(f"the bundle {path} has no {PACKAGE}; convert the checkpoint again, with a Core ML package")
    return path


def _show(args: argparse.Namespace) -> None:
    package = find_package(args.path)
    found, note = _read(package, args)
    if note:
        print(f"fastvlm placement: {note}", file=sys.stderr)
    if args.json:
        heading = {"package": str(package), "heuristic": bool(args.static or note), "note": note}
        print(json.dumps({**heading, "functions": [one.to_dict() for one in found]}, indent=2))
    else:
        print("\n".join(one.to_text() for one in found))


def _read(package: Path, args: argparse.Namespace) -> tuple[Sequence[Any], str | None]:
    """A report or a placement for each function, and why it isn't what was asked for."""
    from fastvlm_convert.ane_report import report
    from fastvlm_convert.compute_plan import read_placement

    if args.static:
        return report(package, args.function), None
    try:
        return read_placement(package, args.function, args.compute_units), None
    except EncoderError as exc:
        return report(package, args.function), f"{exc}; the static rules follow"


if __name__ == "__main__":
    sys.exit(main())
