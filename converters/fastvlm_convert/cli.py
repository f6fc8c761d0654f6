"""`fastvlm-convert CKPT`: a published checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.hub import REPOSITORY
from fastvlm_mlx.template import TEMPLATES

if TYPE_CHECKING:
    from fastvlm_convert.coreml_vision import PackageOptions
    from fastvlm_convert.records import Progress
    from fastvlm_convert.vision_package import Gates


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; light, so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-convert",
        description="Convert a FastVLM checkpoint into a bundle, or for another runtime. "
        "Reads the layouts of LLaVA, transformers, mlx-vlm and Apple's MLX exports, and merges LoRA adapters.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder with config.json and the weights, or a LoRA adapter's (adapter_config.json)",
    )
    parser.add_argument("-o", "--output", type=Path, help="folder to write (default: models/converted/NAME)")
    parser.add_argument(
        "--layout",
        choices=("bundle", "apple-app", "mlx-vlm"),
        default="bundle",
        help="whom it is for: this library, Apple's demo app and mlx-swift, or mlx-vlm (default: bundle)",
    )
    parser.add_argument(
        "--base", type=Path, metavar="CKPT", help="what an adapter was trained on (default: the folder that it names)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="decoder and projector (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--vision-dtype",
        choices=("float16", "bfloat16", "float32"),
        help="the vision encoder (default: nothing is rounded: float32 where folding changes values)",
    )
    parser.add_argument("--template", choices=tuple(TEMPLATES), help="of prompts (default: by the decoder's family)")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the decoder")
    parser.add_argument("--q-bits", type=int, help="2, 3, 4, 5, 6 or 8 (default: 4); implies -q")
    parser.add_argument("--q-group-size", type=int, default=64, help="32, 64 or 128 (default: 64)")
    parser.add_argument("--quantize-projector", action="store_true", help="with -q: the projector too")
    parser.add_argument("--quantize-vision", action="store_true", help="with -q: the vision encoder's matrices too")
    _add_package(parser)
    parser.add_argument("--source-id", help="name of the source to record, such as apple/FastVLM-0.5B")
    parser.add_argument("--revision", help="commit of the source to record")
    parser.add_argument("--licence", help="short name of the source's terms, such as apple-amlr, where it ships none")
    parser.add_argument("--upload-repo", metavar="ORG/NAME", help="push the bundle to the Hugging Face hub")
    add_common(parser)
    return parser


def _add_package(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Core ML package, for the Neural Engine")
    group.add_argument("--no-coreml", action="store_true", help="leave the package out")
    group.add_argument(
        "--resolutions",
        metavar="LIST",
        help="one function for each image size in pixels, up to 1536: SIDE or HEIGHTxWIDTH (default: 256,512,768,1024)",
    )
    group.add_argument("--attention", choices=("batched", "split", "sdpa"), help="its form (default: batched)")
    group.add_argument("--vision-bits", type=int, choices=(16, 8), help="float16 or int8 weights (default: 16)")
    group.add_argument("--min-target", choices=("macOS14", "macOS15"), help="macOS14 takes one resolution")
    group.add_argument(
        "--calibration", type=Path, metavar="FOLDER", help="pictures to measure ranges on (default: a built-in set)"
    )
    group.add_argument("--verify", action="store_true", help="run the gates at every resolution, not only one")
    group.add_argument("--force", action="store_true", help="keep a package that fails a gate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(build_parser(), _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    from fastvlm_mlx.accelerate import prepare_cpu

    prepare_cpu()
    from fastvlm_convert.options import Options
    from fastvlm_convert.pipeline import convert

    if args.upload_repo and not REPOSITORY.fullmatch(args.upload_repo):  # now, not after the conversion
        raise InputError(f"{args.upload_repo!r} is no repository name; give ORG/NAME")
    package, gates = _package(args) if args.layout == "bundle" else (None, None)
    options = Options(
        dtype=args.dtype,
        vision_dtype=args.vision_dtype,
        q_bits=4 if args.quantize and args.q_bits is None else args.q_bits,
        q_group_size=args.q_group_size,
        quantize_projector=args.quantize_projector,
        quantize_vision=args.quantize_vision,
        package=package,
        template=args.template,
    )
    with ProgressBars() as bars:
        if args.layout == "bundle":
            result = convert(
                args.checkpoint,
                args.output,
                options,
                args.source_id,
                args.revision,
                args.licence,
                bars,
                args.calibration,
                gates,
                args.base,
            )
        else:
            from fastvlm_convert.cli_layouts import export_as_asked

            result = export_as_asked(args, options, bars)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{result.path} is up to date" if result.up_to_date else f"wrote {result.path}")
    if args.upload_repo:
        from fastvlm_convert.upload import upload

        print(f"uploaded {upload(result.path, args.upload_repo)}")


def _package(args: argparse.Namespace) -> tuple[PackageOptions | None, Gates]:
    """How the Core ML package is made and checked; without options where it is left out.

    What nobody asked for isn't an error: without its dependencies, or if it fails a gate, there is a warning.
    """
    from fastvlm_convert.coreml_vision import PackageOptions, Size
    from fastvlm_convert.vision_package import Gates, missing_dependencies

    given = {"attention": args.attention, "bits": args.vision_bits, "min_target": args.min_target}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if args.resolutions is not None:
        chosen["sizes"] = Size.parse_list(args.resolutions)
    asked = bool(chosen) or args.calibration is not None or args.verify
    gates = Gates(every_size=args.verify, force=args.force, optional=not asked)
    if args.no_coreml and (asked or args.force):
        raise InputError("--no-coreml leaves out the package that the other options describe; give one or the other")
    if not (args.no_coreml or asked) and (missing := missing_dependencies()):
        print(
            f"warning: no Core ML package without {' and '.join(missing)}: pip install 'fastvlm-mlx[convert]'; "
            "--no-coreml leaves it out without a warning",
            file=sys.stderr,
        )
        return None, gates
    return None if args.no_coreml else PackageOptions(**chosen), gates


class ProgressBars:
    """One tqdm bar per stage; a line for a step without a size. On a terminal only."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._new = tqdm
        self._stage = ""
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Advance the stage's bar by `done` bytes; a stage without a size is named."""
        if stage != self._stage:
            self.__exit__()
            self._stage = stage
            if total == 0 and sys.stderr.isatty():
                print(stage, file=sys.stderr)
        if total == 0:
            return
        if self._bar is None:
            self._bar = self._new(total=total, desc=stage, unit="B", unit_scale=True, disable=None)
        if self._bar is not None:
            self._bar.update(done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
