"""`fastvlm-bench plot`: the command."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm_bench.plots.drawing import check_folder, draw, require_matplotlib, said, write
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench plot",
        description="Draw the time to first token by stage and by resolution, and the roofline, from saved reports: "
        "PNG and SVG, each for a light and a dark page. Models of several reports stand beside each other; those of "
        "several machines have the machine's name.",
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json", help="of `fastvlm-bench --json`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the figures")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(build_parser(), _plot, argv)


def _plot(args: argparse.Namespace) -> None:
    from fastvlm_bench.report import read_report

    check(args.output, "-o")
    files = [file.resolve() for file in args.reports]
    for place, file in enumerate(files):
        if file in files[:place]:
            raise InputError(f"{args.reports[place]} is named twice; name each report once")
    print(plot([(str(file), read_report(file)) for file in args.reports], args.output))


def check(folder: Path, option: str) -> None:
    """What can be known before anything is measured.

    Args:
        folder: where the figures are to be; needn't exist.
        option: that named it, for the message.

    Raises:
        InputError: figures can't be written there. MissingDependencyError: matplotlib isn't installed.
    """
    require_matplotlib()
    check_folder(folder, option)


def plot(reports: Sequence[tuple[str, Mapping[str, Any]]], folder: Path) -> str:
    """Draw, write, and say what was written where, and what wasn't and why.

    Args:
        reports: (name for messages, data of `fastvlm_bench.report.to_data`).
        folder: for the files; made if it isn't there.

    Raises:
        InputError: a report without measurements, or one that isn't whole.
    """
    drawn = draw(reports)
    write(drawn, folder)
    return said(drawn, folder)
