"""`fastvlm-bench`: where the time to first token goes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastvlm_bench import accuracy, batching
from fastvlm_bench.arguments import add_model
from fastvlm_bench.compare import cli as compare
from fastvlm_bench.doctor import cli as doctor
from fastvlm_bench.machine import describe_machine
from fastvlm_bench.report import Report, format_report, to_json
from fastvlm_bench.runner import PHOTO_SIZE, Plan, precision, question, run_plan, sample_photo
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import write_text


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; light, so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench",
        description="Measure the time to first token, stage by stage, on this machine. "
        "`fastvlm-bench accuracy` counts right answers instead; `fastvlm-bench batch` measures answers that are "
        "decoded together; `fastvlm-bench compare` measures other libraries too; `fastvlm-bench doctor` checks "
        "everything that only this machine can show.",
    )
    parser.add_argument(
        "--resolution",
        metavar="PX[,PX...]",
        help="image sides, multiples of 64, run in turn (default: the model's own)",
    )
    add_model(parser)
    parser.add_argument("--image", metavar="FILE", help="a photo of yours (default: a synthetic one)")
    usual = Plan()
    for name, count, text in (
        ("--runs", usual.runs, "measured calls per resolution"),
        ("--warmup", usual.warmup, "calls per resolution before those"),
        ("--prompt-tokens", usual.prompt_tokens, "text tokens around the image"),
        ("--max-tokens", usual.max_tokens, "tokens to generate"),
    ):
        parser.add_argument(name, type=int, default=count, metavar="N", help=f"{text} (default: {count})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs, their medians and the machine there")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    others = {"accuracy": accuracy.main, "batch": batching.main, "compare": compare.main, "doctor": doctor.main}
    if arguments and arguments[0] in others:
        return others[arguments[0]](arguments[1:])
    return run(build_parser(), _bench, arguments)


def _bench(args: argparse.Namespace) -> None:
    plan = Plan(
        resolutions=_resolutions(args.resolution),
        runs=args.runs,
        warmup=args.warmup,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
    )
    if args.json and args.json.is_dir():  # known before minutes of work are lost
        raise InputError(f"--json {args.json} is a folder; name a file")
    report = _measure(args, plan)
    print(format_report(report))
    if args.json:
        write_text(args.json, to_json(report))


def _measure(args: argparse.Namespace, plan: Plan) -> Report:
    """Load the model and run the plan; everything heavy is imported here."""
    from fastvlm_mlx.accelerate import prepare_cpu

    prepare_cpu()  # before anything below imports MLX
    from tqdm import tqdm

    from fastvlm_mlx.loading import load

    # Every run is a first question: what the run before has computed would hide the stages that are to be measured.
    model = load(args.model, vision=args.vision, quantize=args.quantize, prefix_cache_bytes=0, feature_cache_bytes=0)
    if not plan.resolutions:
        plan = dataclasses.replace(plan, resolutions=(model.resolution,))
    ask = question(model, args.image or sample_photo(), plan)
    calls = (plan.warmup + plan.runs) * len(plan.resolutions)
    with tqdm(total=calls, unit="call", leave=False, disable=None) as bar:
        runs = run_plan(ask, plan, bar.update)
    return Report(
        model=model.config.name,
        precision=precision(model, args.quantize),
        image=args.image or "synthetic photo, {} x {} px JPEG".format(*PHOTO_SIZE),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=plan,
        machine=describe_machine(),
        runs=runs,
    )


def _resolutions(text: str | None) -> tuple[int, ...]:
    """Read the text of --resolution; none gives ()."""
    return () if text is None else compare.parse_sides(text)
