"""The arguments of `fastvlm`'s commands; light, so that `--help` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from fastvlm_mlx.commands import add_common, add_debug
from fastvlm_mlx.types import ASPECTS, FRAMES, SAMPLINGS
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS

DEFAULT_PROMPT = "Describe the image."
Action = Callable[[argparse.Namespace], None]


def build_parser(actions: Mapping[str, Action]) -> argparse.ArgumentParser:
    """All commands' arguments.

    Args:
        actions: what runs each command.
    """
    parser = argparse.ArgumentParser(prog="fastvlm", description="Ask a FastVLM about images, on this machine.")
    add_common(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = {
        "generate": _add_generate,
        "chat": _add_chat,
        "caption": _add_caption,
        "models": _add_models,
        "warmup": _add_warmup,
    }
    for name, (text, description) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=description or text)
        adders[name](command)
        add_debug(command)
        command.set_defaults(action=actions[name])
    for name, text in (("verify", "check a bundle's Core ML package"), ("placement", "where a package may run")):
        commands.add_parser(name, help=text, add_help=False)  # main() hands these over before anything is parsed
    return parser


_COMMANDS = {
    "generate": ("ask one question", "Ask one question; streams the answer."),
    "chat": ("ask several questions", "Ask questions until end of file. /help lists what else can be typed."),
    "caption": (
        "ask the same about every image of a folder",
        "Ask the same about every image of a folder and those below it; a line of JSON for each. Run again, it goes on "
        "where it was stopped. Under mlx.launch each process takes its share.",
    ),
    "models": ("list the models that are known and where they are", ""),
    "warmup": ("compile a model's Core ML package for this Mac, once", ""),
}


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image, - for stdin; may be given several times"
    )
    parser.add_argument("--prompt", help=f"the question; <image> places an image (default: {DEFAULT_PROMPT})")
    _add_video(parser)
    parser.add_argument("--stats", action="store_true", help="print where the time went to stderr")
    parser.add_argument("--json", action="store_true", help="print the whole result as one line of JSON")
    _add_model(parser)
    _add_options(parser)
    _add_cache(parser)
    parser.add_argument("--prefix", metavar="FILE", help="know what earlier runs with this file computed, and keep it")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; may be given several times"
    )
    _add_video(parser)
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument(
        "--overflow",
        choices=("error", "drop"),
        help="when the context is full (default: drop the oldest questions; with --load as it was saved)",
    )
    _add_model(parser)
    _add_options(parser)
    _add_cache(parser)


def _add_caption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where the images are")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f"the question (default: {DEFAULT_PROMPT})")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="lines of JSON go there")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="answers at a time (default: 8)")
    _add_model(parser)
    _add_options(parser)


def _add_video(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "video", "Frames are shown as several images. The published weights were trained on single ones, not on videos."
    )
    group.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a video, an animation or a folder of frames; comes after the images; may be given several times",
    )
    group.add_argument("--frames", type=int, metavar="N", help=f"of each video (default: {FRAMES})")
    group.add_argument("--sampling", choices=SAMPLINGS, help="evenly (default), or where the picture changes")


def _add_models(_: argparse.ArgumentParser) -> None:
    """Nothing but --debug."""


def _add_warmup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="bundle folder, name of `fastvlm models`, or org/name (default: embedded)")
    parser.add_argument(
        "--resolution", type=int, action="append", default=[], metavar="PX", help="only this one; may be repeated"
    )
    parser.add_argument("--compute-units", choices=COMPUTE_UNITS, default="CPU_AND_NE", help="where Core ML may run")


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
    group.add_argument("--resolution", type=int, metavar="PX", help="image side, a multiple of 64 (FastViT: 32)")
    group.add_argument(
        "--aspect", choices=ASPECTS, help="how an image becomes square, or native: its own shape, or anyres: tiles"
    )
    group.add_argument(
        "--grid", metavar="CxR", help="columns and rows of the tiles, such as 2x2 (default: of the model's the best)"
    )
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


def _add_cache(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--kv-bits", type=int, metavar="BITS", help="keys and values in 2, 3, 4, 6 or 8 bits")
    group.add_argument("--kv-group-size", type=int, metavar="N", help="values that share a scale: 32, 64 or 128")
    group.add_argument("--max-kv-size", type=int, metavar="N", help="most positions to keep; the prompt's always are")
    group.add_argument("--prefill-step-size", type=int, default=2048, help="most positions per pass (default: 2048)")
    group.add_argument("--draft-model", metavar="MODEL", help="a smaller model that proposes tokens")
    group.add_argument("--num-draft-tokens", type=int, default=3, metavar="N", help="how many at a time (default: 3)")
