#!/usr/bin/env python3
"""Train fastvlm-nano: a FastVLM of 3.8 M parameters that sees shapes, words and charts.

    train.py OUT                       # on a CPU: many hours
    train.py OUT --device cuda --batch 128 --workers 12   # not tried on a GPU
    train.py OUT --resume              # go on where OUT/state.pt is, with its own settings
    train.py OUT --start CHECKPOINT    # the last three stages alone, with the weights of a checkpoint
    train.py OUT --export CHECKPOINT   # write the published LLaVA layout of OUT/state.pt, and stop

OUT gets state.pt (every few minutes, and at Ctrl-C or the time limit), curve.csv, tokenizer.json, and at the
end checkpoint/, which fastvlm-convert reads.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # From a checkout: the packages stand beside each other, and this folder itself is none.
    sys.path[:1] = [str(ROOT / "models"), str(ROOT / "src")]

# Read when torch is imported. Threads that spin at a barrier keep the workers that make pictures off the cores:
# with two cores and one other process, a step took five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


from fastvlm_mlx.errors import InputError  # noqa: E402
from nano.settings import STAGE_COUNT, NanoConfig, Settings, as_text  # noqa: E402


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs whole numbers with commas between them, not {text!r}") from None


def make_parser() -> argparse.ArgumentParser:
    """The command line; what isn't given is None, as a run that is gone on with has its own."""
    settings, sizes = Settings(), NanoConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(option: str, convert: Callable[[str], object], text: str, default: object, **more: Any) -> None:
        parser.add_argument(option, type=convert, help=f"{text} (default {as_text(default)})", **more)

    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the run")
    parser.add_argument("--minutes", type=float, help="stop after this long (default: at the end)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt, if it is there")
    add("--seed", int, "of the weights and the pictures", settings.seed)
    add(
        "--stage-steps",
        _numbers,
        "steps of the encoder alone, of projector and decoder, of everything, of what reads features, of everything "
        "with more signs, and with more shapes; 0 leaves a stage out, as --start does the first three, and with "
        "--resume stages that haven't ended may get others",
        settings.stage_steps,
        metavar="A,B,C,D,E,F",
    )
    add("--rate", float, "factor of all learning rates, below 1 to train on what is nearly done", settings.rate)
    add("--batch", int, "pictures of a step", settings.batch)
    add("--questions", int, "of a picture in a step, at most", settings.questions)
    add(
        "--side",
        int,
        "of the model's pictures, pixels, a multiple of 64; early stages see smaller ones",
        sizes.side,
    )
    add(
        "--dims",
        _numbers,
        "channels of the encoder's stages, each a multiple of the one before",
        sizes.dims,
        metavar="A,B,C,D,E",
    )
    add("--depths", _numbers, "blocks of the encoder's stages", sizes.depths, metavar="A,B,C,D,E")
    add("--device", str, "cpu, cuda or mps", settings.device)
    add("--workers", int, "processes that make pictures", settings.workers)
    add("--evaluate-every", int, "steps", settings.evaluate_every)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="CHECKPOINT",
        help="begin with its weights, sizes, tokenizer, in the last three stages; --side and --depths change its own",
    )
    parser.add_argument("--export", type=Path, metavar="CHECKPOINT", help="only write OUT/state.pt's checkpoint")
    return parser


def _given(args: argparse.Namespace, kind: type[Settings] | type[NanoConfig]) -> dict[str, Any]:
    """The options that were given, of those that a dataclass has a field for."""
    return {f.name: getattr(args, f.name) for f in fields(kind) if getattr(args, f.name, None) is not None}


def _for_these_stages(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings; one from before a stage was added can still be exported, and has no steps of that."""
    steps = settings.get("stage_steps")
    if steps is None or len(steps) >= STAGE_COUNT:
        return settings
    return settings | {"stage_steps": (*steps, *[0] * (STAGE_COUNT - len(steps)))}


def _check_folder(out: Path, resume: bool, exports: bool) -> bool:
    """Whether the folder holds a run.

    Raises:
        InputError: it does, but wasn't asked to go on, or it doesn't, and there is nothing to export.
    """
    has_state = (out / "state.pt").exists()
    if exports and not has_state:
        raise InputError(f"{out} has no state.pt to export; train first")
    if has_state and not resume and not exports:
        raise InputError(f"{out} holds a run; add --resume to go on with it, or choose another folder")
    return has_state


def _check_device(name: str) -> None:
    """Use it once.

    Raises:
        InputError: torch doesn't know it, or hasn't got it here.
    """
    import torch

    try:
        torch.zeros(1, device=name).item()
    except Exception as exc:  # each of torch's backends has its own way to say so
        reason = str(exc).strip().partition("\n")[0]
        raise InputError(f"torch can't use the device {name!r} here ({reason}); give another --device") from exc


def stopper(minutes: float | None) -> Callable[[], bool]:
    """True after that long, or after Ctrl-C or a termination signal; a second signal ends at once."""
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    asked = []

    def note(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: bool(asked) or time.monotonic() > end


def train(args: argparse.Namespace) -> None:
    """Train, go on, or export.

    Raises:
        InputError: an option can't be, or not for the run that is gone on with; nothing was written.
    """
    settings, config = Settings(**_given(args, Settings)), NanoConfig(**_given(args, NanoConfig))
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"minutes needs a number above 0, not {args.minutes:g}; leave it out to train to the end")
    if args.start and args.dims:
        raise InputError("--start takes the sizes of its checkpoint; leave --dims out")
    has_state = _check_folder(args.out, args.resume, bool(args.export))
    # Heavy imports after the arguments, so that --help and mistakes answer at once.
    import torch

    from nano import scenes
    from nano.export import export
    from nano.record import CHECKPOINT, load_state
    from nano.schedule import STARTED
    from nano.starting import read_config
    from nano.trainer import Trainer

    if has_state:
        state = load_state(args.out, "cpu")
        settings = Settings(**_for_these_stages(state.get("settings", {})) | _given(args, Settings))
        config = replace(NanoConfig(**state["config"]), **_given(args, NanoConfig))
    elif args.start:
        if not any(settings.stage_steps[STARTED:]):
            raise InputError(f"--start leaves the first {STARTED} stages out; give one of the others steps")
        config = read_config(args.start, args.side, args.depths)
        print(f"{args.start}: goes on with stages of {as_text(config.depths)} blocks and {config.side} px", flush=True)
    _check_device(settings.device)
    torch.set_flush_denormal(True)  # Adam's averages of weights that hardly move are slow on a CPU otherwise
    trainer = Trainer(args.out, config, settings, scenes, lambda line: print(line, flush=True), args.start)
    if not args.export:
        trainer.run(stopper(args.minutes))
    target = args.export or args.out / CHECKPOINT
    if args.export or trainer.finished:
        export(trainer.model, trainer.tokenizer, target)
        print(f"wrote {target}; convert it with: fastvlm-convert {target} -o BUNDLE")
    else:
        print(f"stopped in stage {trainer.stage + 1} after {trainer.step} steps; go on with --resume")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = make_parser()
    try:
        train(parser.parse_args(argv))
    except InputError as exc:  # all else keeps its traceback: of hours of training, it may be the only trace
        print(f"{parser.prog}: error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
