"""`fastvlm-convert CKPT`: a published checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.hub import REPOSITORY

if TYPE_CHECKING:
    from fastvlm_convert.records import Progress


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; light, so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-convert",
        description="Convert a FastVLM checkpoint into a bundle. "
        "Reads the layouts of LLaVA, transformers, mlx-vlm and Apple's MLX exports.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and the weights")
    parser.add_argument("-o", "--output", type=Path, help="bundle folder (default: models/converted/NAME)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="decoder and projector (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--vision-dtype",
        choices=("float16", "bfloat16", "float32"),
        help="FastViTHD (default: nothing is rounded: float32 where folding changes values)",
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the decoder")
    parser.add_argument("--q-bits", type=int, help="2, 3, 4, 5, 6 or 8 (default: 4); implies -q")
    parser.add_argument("--q-group-size", type=int, default=64, help="32, 64 or 128 (default: 64)")
    parser.add_argument("--quantize-projector", action="store_true", help="with -q: the projector too")
    parser.add_argument("--quantize-vision", action="store_true", help="with -q: FastViTHD's matrices too")
    parser.add_argument("--source-id", help="name of the source to record, such as apple/FastVLM-0.5B")
    parser.add_argument("--revision", help="commit of the source to record")
    parser.add_argument("--licence", help="short name of the source's terms, such as apple-amlr, where it ships none")
    parser.add_argument("--upload-repo", metavar="ORG/NAME", help="push the bundle to the Hugging Face hub")
    add_common(parser)
    return parser


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
    options = Options(
        dtype=args.dtype,
        vision_dtype=args.vision_dtype,
        q_bits=4 if args.quantize and args.q_bits is None else args.q_bits,
        q_group_size=args.q_group_size,
        quantize_projector=args.quantize_projector,
        quantize_vision=args.quantize_vision,
    )
    with ProgressBars() as bars:
        result = convert(args.checkpoint, args.output, options, args.source_id, args.revision, args.licence, bars)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{result.path} is up to date" if result.up_to_date else f"wrote {result.path}")
    if args.upload_repo:
        from fastvlm_convert.upload import upload

        print(f"uploaded {upload(result.path, args.upload_repo)}")


class ProgressBars:
    """One tqdm bar per stage, on a terminal only."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._new = tqdm
        self._stage = ""
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Advance the stage's bar by `done` bytes."""
        if stage != self._stage:
            self.__exit__()
            self._stage = stage
            self._bar = self._new(total=total, desc=stage, unit="B", unit_scale=True, disable=None)
        if self._bar is not None:
            self._bar.update(done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
