"""`fastvlm-bench doctor`: the command."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastvlm_bench.arguments import check_target
from fastvlm_bench.doctor.plan import Plan, parse_sizes
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.files import write_text


class DiagnosisError(FastVLMError):
    """A check failed; the report says how."""

    exit_code = 1


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; light, so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench doctor",
        description="Check everything that only this machine can show, and write one report to paste into a bug "
        "report: versions, the model's files, MLX, and on a Mac Core ML's times on each compute unit, its features "
        "beside MLX's, and where its plan puts the work. Elsewhere it says what it can't check.",
    )
    usual = Plan()
    parser.add_argument("--model", help="bundle folder, name of `fastvlm models`, or org/name (default: embedded)")
    parser.add_argument(
        "--resolutions",
        metavar="LIST",
        help="such as 256,1024x576 (default: all that the model's Core ML package has)",
    )
    parser.add_argument("--runs", type=int, default=usual.runs, metavar="N", help="measured calls (default: 10)")
    parser.add_argument(
        "--limit",
        type=float,
        default=usual.limit_s,
        metavar="SECONDS",
        help="stop a step that takes longer (default: %(default)g; a first load on the Neural Engine can take minutes)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--full-paths", action="store_true", help="leave your home folder and user name in the report")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 1 if a check failed."""
    return run(build_parser(), _doctor, argv)


def _doctor(args: argparse.Namespace) -> None:
    sizes = parse_sizes(args.resolutions) if args.resolutions is not None else ()
    plan = Plan(sizes, args.runs, limit_s=args.limit, debug=args.debug)
    if args.json:
        check_target("--json", args.json)

    from tqdm import tqdm

    from fastvlm_bench.doctor.diagnosis import diagnose
    from fastvlm_bench.doctor.report import redact, to_json, to_markdown

    path, problem = _find(args.model, args.debug)
    with tqdm(bar_format="{desc} ({elapsed})", leave=False, disable=None) as bar:
        checks = diagnose(path, plan, problem, say=bar.set_description_str)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    clean = (lambda text: text) if args.full_paths else redact
    print(clean(to_markdown(checks, date)))
    if args.json:
        write_text(args.json, clean(to_json(checks, date)))
    if failed := [check.name for check in checks if check.failures]:
        raise DiagnosisError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; the report says how")


def _find(model: str | None, debug: bool) -> tuple[Path | None, str | None]:
    """The bundle's folder, or why there is none: the machine can be checked without."""
    from fastvlm_bench.doctor.check import one_line
    from fastvlm_mlx import hub

    try:
        return hub.resolve(model), None
    except Exception as exc:  # whatever it is: a wrong name, no network, a cache that can't be read
        if debug:
            traceback.print_exc(file=sys.stderr)
        return None, one_line(exc)
