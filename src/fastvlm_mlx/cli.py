"""`fastvlm generate | chat | caption | models | warmup | verify | placement`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.arguments import DEFAULT_PROMPT, build_parser
from fastvlm_mlx.commands import run
from fastvlm_mlx.converter import FORWARDED, run_converter
from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.files import file_at
from fastvlm_mlx.types import FRAMES

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import Frame, GenerationResult, ImageInput, OptionArgs

_CACHE_OPTIONS = ("kv_bits", "kv_group_size", "max_kv_size", "prefill_step_size", "num_draft_tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    forwarded = [index for index, argument in enumerate(arguments) if argument in FORWARDED]
    if forwarded and all(argument == "--debug" for argument in arguments[: forwarded[0]]):
        command = arguments.pop(forwarded[0])
        return run_converter(arguments, FORWARDED[command])
    return run(make_parser(), lambda args: args.action(args), arguments)


def make_parser() -> argparse.ArgumentParser:
    """The command line, with what runs each command."""
    actions = {"generate": _generate, "chat": _chat, "caption": _caption, "models": _models, "warmup": _warmup}
    return build_parser(actions)


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
        **{name: getattr(args, name) for name in _CACHE_OPTIONS if hasattr(args, name)},  # type: ignore[typeddict-item]
    }


def _add_draft(args: argparse.Namespace, options: OptionArgs) -> None:
    """Load the draft, if one is named."""
    if args.draft_model:
        from fastvlm_mlx.loading import load

        options["draft"] = load(args.draft_model, local_files_only=args.local_files_only)


def _check_grid(args: argparse.Namespace) -> None:
    """Raise InputError for a grid that no model could have."""
    if args.grid is not None:
        from fastvlm_mlx.vision.anyres import parse_grid

        parse_grid(args.grid)


def _images(names: Sequence[str]) -> list[ImageInput]:
    if names.count("-") > 1:
        raise InputError("--image - reads stdin to its end, so it can be given once only")
    for name in names:  # before a model is downloaded or loaded for nothing
        if not name:
            raise InputError("--image has an empty name; give a file")
        if name != "-" and not Path(name).expanduser().exists():
            raise ImageError(f"image {name} doesn't exist; check the path")
    return [sys.stdin.buffer.read() if name == "-" else name for name in names]


def _frames(args: argparse.Namespace) -> list[Frame]:
    """Of all videos; before a model is downloaded or loaded for nothing."""
    if not args.video:
        return []
    from fastvlm_mlx.video import MAX_PIXELS, read_frames

    frames, sampling = _choice(args)
    share = MAX_PIXELS // len(args.video)  # or several would take several times the memory
    return [frame for name in args.video for frame in read_frames(name, frames, sampling, share)]


def _choice(args: argparse.Namespace) -> tuple[int, str]:
    """How many frames of a video, and which."""
    return FRAMES if args.frames is None else args.frames, args.sampling or "uniform"


def _generate(args: argparse.Namespace) -> None:
    from fastvlm_mlx.answer import last_result
    from fastvlm_mlx.types import GenerationOptions

    if not args.image and not args.video and args.prompt is None:
        raise InputError("give --image FILE, --prompt TEXT, or both; --video FILE for frames of a video")
    if not args.video and (args.frames, args.sampling) != (None, None):
        raise InputError("--frames and --sampling choose frames of a video; give --video FILE, too, or leave them out")
    options = _options(args)
    GenerationOptions(**options)  # before a model is loaded for nothing
    _check_grid(args)
    images = [*_images(args.image), *_frames(args)]
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    model = _load(args)
    _add_draft(args, options)
    if args.prefix and file_at(args.prefix).exists():
        model.load_prefix(args.prefix)
    pieces = model.stream(images, prompt, system=args.system, aspect=args.aspect, grid=args.grid, **options)
    if args.json:
        print(last_result(pieces).to_json())
    else:
        result = last_result(pieces, _show)
        print()
        if args.stats:
            print(format_stats(result), file=sys.stderr)
    if args.prefix:
        model.save_prefix(args.prefix)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _chat(args: argparse.Namespace) -> None:
    from fastvlm_mlx.cli_chat import Terminal, read_lines
    from fastvlm_mlx.types import GenerationOptions
    from fastvlm_mlx.video import read_frames

    options = _options(args)
    GenerationOptions(**options)  # before a model is loaded for nothing
    _check_grid(args)
    if args.load and (args.image or args.video):
        raise InputError("--load goes on with the images of that conversation; add others with /image or /video")
    if args.load and args.system is not None:
        raise InputError("--load goes on with the system prompt of that conversation; leave --system out")
    images = [*_images(args.image), *_frames(args)]
    model = _load(args)
    _add_draft(args, options)
    view = {name: getattr(args, name) for name in ("resolution", "aspect", "grid")}
    if args.load:
        chat = model.load_chat(args.load, **view, overflow=args.overflow)
    else:
        chat = model.chat(images, system=args.system, **view, overflow=args.overflow or "drop")
    frames, sampling = _choice(args)
    read_video = partial(read_frames, frames=frames, sampling=sampling)
    Terminal(chat, options, format_stats, _show, read_video).run(read_lines())


def _caption(args: argparse.Namespace) -> None:
    from fastvlm_mlx.cli_caption import caption
    from fastvlm_mlx.types import GenerationOptions

    _check_grid(args)
    caption(args, GenerationOptions(**_options(args)))


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
            f"prompt: {result.prompt_tokens} positions ({result.image_tokens} image, {result.cached_tokens} known), "
            f"{result.prompt_tps:.1f} per second",
            f"answer: {result.generation_tokens} tokens, {result.generation_tps:.1f} per second, "
            f"ended by {result.finish_reason}",
            f"time (ms): {times}",
            f"memory: {result.peak_memory / 1e6:.0f} MB peak",
            f"device: {result.device}",
        )
    )
