"""`fastvlm-bench`: where the time to first token goes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvlm_bench import accuracy, batching, planner
from fastvlm_bench.arguments import check_target, parse_bits, parse_list
from fastvlm_bench.compare import cli as compare
from fastvlm_bench.doctor import cli as doctor
from fastvlm_bench.plots import cli as plots
from fastvlm_bench.runner import Plan
from fastvlm_bench.sizes import SIZES
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.files import write_text
from fastvlm_mlx.types import ASPECTS

OTHERS = {
    "accuracy": accuracy.main,
    "batch": batching.main,
    "compare": compare.main,
    "doctor": doctor.main,
    "plan": planner.main,
    "plot": plots.main,
}


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; light, so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench",
        description="Measure the time to first token, stage by stage, on this machine, and how near each stage is to "
        "what the machine can do. Of --size, --q-bits, --vision and --compute-units several values, separated by "
        "commas, are measured in turn and compared.",
        epilog="Other commands: `fastvlm-bench accuracy` counts right answers; `batch` measures answers that are "
        "decoded together; `compare` measures other libraries too; `plan` names what is within a time budget; `doctor` "
        "checks everything that only this machine can show; `plot` draws saved reports.",
    )
    parser.add_argument(
        "--resolution",
        metavar="PX[,PX...]",
        help="image sides, multiples of 64 (FastViT: 32), run in turn (default: the model's own)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="bundle folder, name of `fastvlm models`, or org/name (default: embedded)")
    which.add_argument(
        "--size",
        help=f"random weights of these shapes instead, of which tiny is for trying: {', '.join(SIZES)}; "
        "0.5b+mci2 has FastViT as its encoder, 0.5b+average and 0.5b+depthwise multi-scale features",
    )
    parser.add_argument(
        "--q-bits",
        "--quantize",
        default="none",
        metavar="BITS",
        help="quantise the decoder after loading: 2, 3, 4, 5, 6, 8 or none (default: none, as stored)",
    )
    parser.add_argument("--vision", default="auto", help="what runs the encoder: auto, mlx, coreml (default: auto)")
    parser.add_argument(
        "--compute-units",
        default="CPU_AND_NE",
        metavar="UNITS",
        help="where Core ML may run: CPU_AND_NE (default), ALL, CPU_AND_GPU, CPU_ONLY",
    )
    parser.add_argument("--aspect", help=f"{', '.join(ASPECTS)} (default: a square, as the model makes it)")
    parser.add_argument("--grid", metavar="CxR", help="columns and rows of anyres' tiles (default: the model's best)")
    parser.add_argument("--image", metavar="FILE", help="a photo of yours (default: a synthetic one)")
    _add_counts(parser)
    _add_results(parser)
    add_common(parser)
    return parser


def _add_counts(parser: argparse.ArgumentParser) -> None:
    usual = Plan()
    for name, count, text in (
        ("--runs", usual.runs, "measured rounds"),
        ("--warmup", usual.warmup, "rounds before those"),
        ("--prompt-tokens", usual.prompt_tokens, "text tokens around the image"),
        ("--max-tokens", usual.max_tokens, "tokens to generate"),
    ):
        parser.add_argument(name, type=int, default=count, metavar="N", help=f"{text} (default: {count})")


def _add_results(parser: argparse.ArgumentParser) -> None:
    """What is measured besides, compared and written."""
    parser.add_argument("--no-load", action="store_true", help="don't measure how long loading takes")
    parser.add_argument("--no-roofline", action="store_true", help="don't measure what the machine can do")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="compare with that earlier --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each run there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the figures there, as PNG and SVG")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in OTHERS:
        return OTHERS[arguments[0]](arguments[1:])
    return run(build_parser(), _bench, arguments)


def _bench(args: argparse.Namespace) -> None:
    """Check all that can be checked, measure, and only then write."""
    plan = Plan(
        resolutions=compare.parse_sides(args.resolution) if args.resolution is not None else (),
        runs=args.runs,
        warmup=args.warmup,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        aspect=args.aspect,
        grid=args.grid,
    )
    for option, path in (("--json", args.json), ("--csv", args.csv)):
        if path:
            check_target(option, path)  # known before minutes of work are lost
    if args.plot:
        plots.check(args.plot, "--plot")
    sizes = parse_list(args.size, "--size") if args.size is not None else ()
    bits = parse_bits(args.q_bits, "--q-bits", "none")
    visions, units = parse_list(args.vision, "--vision"), parse_list(args.compute_units, "--compute-units")

    from fastvlm_bench.subjects import choices

    wanted = choices(args.model, sizes, bits, visions, units)

    from fastvlm_bench.measure import describe_image, measure
    from fastvlm_bench.report import read_baseline, to_csv, to_json
    from fastvlm_bench.tables import format_report
    from fastvlm_mlx.measurement_cache import save_measurements

    baseline = read_baseline(args.baseline, plan, describe_image(args.image, plan)) if args.baseline else None
    report = measure(wanted, plan, args.image, load=not args.no_load, roofline=not args.no_roofline)
    if args.json:
        write_text(args.json, to_json(report))
    if args.csv:
        write_text(args.csv, to_csv(report))
    print(format_report(report, baseline))
    data = json.loads(to_json(report))
    save_measurements(data)
    if args.plot:
        print(f"\n{plots.plot([('the report', data)], args.plot)}")
