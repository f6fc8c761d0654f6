"""`fastvlm generate | chat | models | warmup | verify | placement`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.commands import add_common, add_debug, run
from fastvlm_mlx.converter import FORWARDED, run_converter
from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import GenerationResult, ImageInput, OptionArgs

DEFAULT_PROMPT = "Describe the image."


def build_parser() -> argparse.ArgumentParser:
    """All commands' arguments; light, so that `--help` is quick."""
    parser = argparse.ArgumentParser(prog="fastvlm", description="Ask a FastVLM about images, on this machine.")
    add_common(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate", help="ask one question", description="Ask one question; streams the answer."
    )
    generate.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image, - for stdin; may be given several times",
    )
    generate.add_argument("--prompt", help=f"the question; <image> places an image (default: {DEFAULT_PROMPT})")
    generate.add_argument("--stats", action="store_true", help="print where the time went to stderr")
    generate.add_argument("--json", action="store_true", help="print the whole result as one line of JSON")
    generate.set_defaults(action=_generate)
    chat = commands.add_parser("chat", help="ask several questions", description="Ask questions until end of file.")
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; may be given several times"
    )
    chat.set_defaults(action=_chat)
    for command in (generate, chat):
        _add_model(command)
        _add_options(command)
    models = commands.add_parser("models", help="list the models that are known and where they are")
    models.set_defaults(action=_models)
    warmup = commands.add_parser("warmup", help="compile a model's Core ML package for this Mac, once")
    warmup.add_argument("--model", help="bundle folder, name of `fastvlm models`, or org/name (default: embedded)")
    warmup.add_argument(
        "--resolution", type=int, action="append", default=[], metavar="PX", help="only this one; may be repeated"
    )
    warmup.add_argument("--compute-units", choices=COMPUTE_UNITS, default="CPU_AND_NE", help="where Core ML may run")
    warmup.set_defaults(action=_warmup)
    for command in (generate, chat, models, warmup):
        add_debug(command)
    for name, text in (("verify", "check a bundle's Core ML package"), ("placement", "where a package may run")):
        commands.add_parser(name, help=text, add_help=False)  # main() hands these over before anything is parsed
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="bundle folder, name of `fastvlm models`, or org/name (default: embedded)")
    group.add_argument("--revision", help="commit or branch on the hub")
    group.add_argument("--local-files-only", action="store_true", help="never go to the network")
    group.add_argument("--vision", choices=("auto", "coreml", "mlx"), default="auto", help="what runs the encoder")
    group.add_argument("--compute-units", choices=COMPUTE_UNITS, default="CPU_AND_NE", help="where Core ML may run")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="decoder and projector")
    group.add_argument("--vision-dtype", choices=("float32", "bfloat16"), help="vision encoder")
    group.add_argument("--quantize", type=int, metavar="BITS", help="quantise the decoder after loading")
    group.add_argument("--resolution", type=int, metavar="PX", help="image side, a multiple of 64")
    group.add_argument("--aspect", choices=("pad", "crop", "stretch"), help="how an image becomes square")
    group.add_argument("--system", help="replaces the system prompt")


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-tokens", type=int, default=256, help="default: 256")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", default=[], help="string that ends the answer; may be repeated")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    forwarded = [index for index, argument in enumerate(arguments) if argument in FORWARDED]
    if forwarded and all(argument == "--debug" for argument in arguments[: forwarded[0]]):
        command = arguments.pop(forwarded[0])
        return run_converter(arguments, FORWARDED[command])
    return run(build_parser(), lambda args: args.action(args), arguments)


def _load(args: argparse.Namespace) -> FastVLM:
    from fastvlm_mlx.loading import load

    return load(
        args.model,
        vision=args.vision,
        resolution=args.resolution,
        quantize=args.quantize,
        dtype=args.dtype,
        vision_dtype=args.vision_dtype,
        compute_units=args.compute_units,
        revision=args.revision,
        local_files_only=args.local_files_only,
    )


def _options(args: argparse.Namespace) -> OptionArgs:
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": args.stop,
    }


def _images(names: Sequence[str]) -> list[ImageInput]:
    if names.count("-") > 1:
        raise InputError("--image - reads stdin to its end, so it can be given once only")
    for name in names:  # before a model is downloaded or loaded for nothing
        if name != "-" and not Path(name).expanduser().exists():
            raise ImageError(f"image {name} doesn't exist; check the path")
    return [sys.stdin.buffer.read() if name == "-" else name for name in names]


def _generate(args: argparse.Namespace) -> None:
    from fastvlm_mlx.answer import last_result
    from fastvlm_mlx.types import GenerationOptions

    if not args.image and args.prompt is None:
        raise InputError("give --image FILE, --prompt TEXT, or both")
    options = _options(args)
    GenerationOptions(**options)  # before a model is loaded for nothing
    images = _images(args.image)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    pieces = _load(args).stream(images, prompt, system=args.system, aspect=args.aspect, **options)
    if args.json:
        print(last_result(pieces).to_json())
        return
    result = last_result(pieces, _show)
    print()
    if args.stats:
        print(format_stats(result), file=sys.stderr)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _chat(args: argparse.Namespace) -> None:
    from fastvlm_mlx.answer import last_result
    from fastvlm_mlx.types import GenerationOptions

    options = _options(args)
    GenerationOptions(**options)  # before a model is loaded for nothing
    chat = _load(args).chat(_images(args.image), system=args.system, aspect=args.aspect)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            continue
        try:
            last_result(chat.stream(question, **options), _show)
        except InputError as exc:  # a question too many or misplaced: the conversation is as before
            print(f"fastvlm: {exc}", file=sys.stderr)
            continue
        print()


def _warmup(args: argparse.Namespace) -> None:
    from fastvlm_mlx.bundle import Bundle
    from fastvlm_mlx.hub import resolve
    from fastvlm_mlx.loading import warm_up

    sizes = [(side, side) for side in args.resolution]
    for height, width, load_s, run_s in warm_up(Bundle.open(resolve(args.model)), sizes, args.compute_units):
        print(
            f"{height} x {width}: compiled and loaded in {load_s:.1f} s, first image {run_s * 1e3:.0f} ms", flush=True
        )


def _models(_: argparse.Namespace) -> None:
    from fastvlm_mlx.hub import list_models

    rows = [("NAME", "REPOSITORY", "PARAMETERS", "LICENCE", "WHERE", "NOTE")]
    rows += [
        (m.name, m.repo or "", m.parameters, m.licence or "", str(m.path or m.where), m.note or "")
        for m in list_models()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def format_stats(result: GenerationResult) -> str:
    """Counts and milliseconds per stage, for people."""
    stages = dataclasses.asdict(result.timings)
    times = "  ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in stages.items())
    return "\n".join(
        (
            f"prompt: {result.prompt_tokens} positions ({result.image_tokens} image), "
            f"{result.prompt_tps:.1f} per second",
            f"answer: {result.generation_tokens} tokens, {result.generation_tps:.1f} per second, "
            f"ended by {result.finish_reason}",
            f"time (ms): {times}",
            f"memory: {result.peak_memory / 1e6:.0f} MB peak",
            f"device: {result.device}",
        )
    )
