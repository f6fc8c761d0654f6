"""`fastvlm-bench compare`: the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_bench.compare.plan import Plan
from fastvlm_bench.compare.process import SideError
from fastvlm_bench.compare.rivals import OURS, RIVALS, find_pythons, parse_pythons, parse_rivals
from fastvlm_bench.machine import usable_cores
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import write_text

if TYPE_CHECKING:
    from fastvlm_bench.compare.job import Job


_SIZES = ("0.5b", "tiny")  # the others need more memory, four times over, than a usual machine has


def say(text: str) -> None:
    """What goes on, for the one who waits; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench compare",
        description="Measure the time to first token beside that of other libraries: same weights, same picture, "
        "same question, in turn. A library whose answer differs from ours is not timed.",
    )
    usual = Plan()
    parser.add_argument("--against", metavar="NAME[,NAME...]", help=f"of {', '.join(RIVALS)} (default: all that can)")
    parser.add_argument("--model", type=Path, metavar="BUNDLE", help="bundle folder (default: made of the checkpoint)")
    parser.add_argument("--checkpoint", type=Path, help="its source in LLaVA's layout (default: a seeded one)")
    parser.add_argument("--size", choices=_SIZES, default="0.5b", help="shapes of the seeded one (default: 0.5b)")
    parser.add_argument(
        "--resolution",
        metavar="PX[,PX...]",
        default=",".join(map(str, usual.resolutions)),
        help="image sides, multiples of 64 (default: %(default)s)",
    )
    parser.add_argument("--runs", type=int, default=usual.runs, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=usual.max_tokens, metavar="N", help="of the first answer (default: 32)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="for all (default: float32)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for each side (default: the cores)")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a rival")
    parser.add_argument("--cold", action="store_true", help="time whole processes, from start to first token")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs, versions and the machine there")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(build_parser(), _compare, argv)


def _compare(args: argparse.Namespace) -> None:
    from fastvlm_bench.compare.cold import check_rivals
    from fastvlm_bench.compare.job import run_cold_job, run_job
    from fastvlm_bench.compare.report import format_report, to_json

    default = "mlx-vlm" if args.cold else ",".join(RIVALS)
    rivals = parse_rivals(args.against or default)
    if args.cold:
        check_rivals(rivals)
    plan = Plan(parse_sides(args.resolution), args.runs, args.max_tokens)
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads must be at least 1, got {args.threads}")
    if args.model and not args.checkpoint:
        raise InputError("--model needs --checkpoint, the same weights in the form that the rivals can be given")
    if args.json and args.json.is_dir():  # known before minutes of work are lost
        raise InputError(f"--json {args.json} is a folder; name a file")
    pythons = find_pythons(rivals, parse_pythons(args.python))
    job = _prepare(args, rivals, pythons, plan)
    report = (run_cold_job if args.cold else run_job)(job, say)
    print(format_report(report))
    if args.json:
        write_text(args.json, to_json(report))
    if report.failures:
        raise SideError("; ".join(report.failures.values()))


def parse_sides(text: str) -> tuple[int, ...]:
    """Image sides from "256,512"; InputError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as exc:
        raise InputError(
            f"--resolution takes one number of pixels or several with commas between, got {text!r}"
        ) from exc


def _prepare(args: argparse.Namespace, rivals: Sequence[str], pythons: Mapping[str, Path], plan: Plan) -> Job:
    """One model in every form, made where it isn't there from another time."""
    from fastvlm_mlx.accelerate import prepare_cpu

    prepare_cpu()  # before anything below imports MLX
    from fastvlm_bench.compare.job import Job
    from fastvlm_bench.compare.prepare import our_bundle, rival_models, seeded_checkpoint

    name = args.checkpoint.name if args.checkpoint else f"seeded random weights of the {args.size} shapes"
    checkpoint = args.checkpoint or seeded_checkpoint(args.size, say)
    bundle = args.model or our_bundle(checkpoint, say)
    models = rival_models(checkpoint, bundle, rivals, args.dtype, say)
    return Job(
        name,
        {OURS: bundle, **models},
        {OURS: Path(sys.executable), **pythons},
        plan,
        args.dtype,
        args.threads or usable_cores(),
    )
