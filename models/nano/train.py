#!/usr/bin/env python3
"""Train fastvlm-nano: a FastVLM of 3.6 M parameters that sees shapes, words and charts.

    train.py OUT                       # on a CPU: hours
    train.py OUT --device cuda --batch 128 --workers 12
    train.py OUT --resume              # go on where OUT/state.pt is
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
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # From a checkout: the packages stand beside each other, and this folder itself is none.
    sys.path[:1] = [str(ROOT / "models"), str(ROOT / "src")]

# Read when torch is imported. Threads that spin at a barrier keep the workers that make pictures off the cores:
# with two cores and one other process, a step took five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the run")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt, if it is there")
    parser.add_argument(
        "--stage-steps",
        type=_numbers,
        default=(13000, 6000, 6000),
        metavar="A,B,C",
        help="steps of the encoder alone, of projector and decoder, of everything (default 13000,6000,6000)",
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures of a step (default 16)")
    parser.add_argument("--questions", type=int, default=8, help="of a picture in a step, at most (default 8)")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, pixels (default 256)")
    parser.add_argument(
        "--dims",
        type=_numbers,
        metavar="A,B,C,D,E",
        help="channels of the encoder's stages, each a multiple of the one before (default 16,48,96,192,192)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    parser.add_argument("--workers", type=int, default=1, help="processes that make pictures (default 1)")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps (default 500)")
    parser.add_argument("--export", type=Path, metavar="CHECKPOINT", help="only write OUT/state.pt's checkpoint")
    args = parser.parse_args(argv)
    if len(args.stage_steps) != 3 or min(args.stage_steps) < 1:
        parser.error("--stage-steps needs three positive numbers, such as 3000,1000,8000")
    if args.dims and (len(args.dims) != 5 or any(b % a for a, b in pairwise(args.dims)) or args.dims[3] % 32):
        parser.error("--dims needs five numbers, each a multiple of the one before, from the fourth on of 32, too")
    has_state = (args.out / "state.pt").exists()
    if args.export and not has_state:
        parser.error(f"{args.out} has no state.pt to export; train first")
    if has_state and not args.resume and not args.export:
        parser.error(f"{args.out} holds a run; add --resume to go on with it, or choose another folder")
    return args


def stopper(minutes: float) -> Callable[[], bool]:
    """True after that long, or after Ctrl-C or a termination signal; a second signal ends at once."""
    end = time.monotonic() + 60 * minutes
    asked = []

    def note(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: bool(asked) or time.monotonic() > end


def main(argv: list[str] | None = None) -> None:
    """Train, go on, or export."""
    args = parse(argv)
    # Heavy imports after the arguments, so that --help and mistakes answer at once.
    import torch

    from nano import scenes
    from nano.export import export
    from nano.network import NanoConfig
    from nano.record import CHECKPOINT
    from nano.trainer import Settings, Trainer

    torch.set_flush_denormal(True)  # Adam's averages of weights that hardly move are slow on a CPU otherwise
    settings = Settings(
        seed=args.seed,
        stage_steps=args.stage_steps,
        batch=args.batch,
        device=args.device,
        workers=args.workers,
        questions=args.questions,
        evaluate_every=args.evaluate_every,
    )
    config = NanoConfig(side=args.side, **({"dims": args.dims} if args.dims else {}))
    trainer = Trainer(args.out, config, settings, scenes, lambda line: print(line, flush=True))
    if not args.export:
        trainer.run(stopper(args.minutes))
    target = args.export or args.out / CHECKPOINT
    if args.export or trainer.finished:
        export(trainer.model, trainer.tokenizer, target)
        print(f"wrote {target}; convert it with: fastvlm-convert {target} -o BUNDLE")
    else:
        print(f"stopped in stage {trainer.stage + 1} after {trainer.step} steps; go on with --resume")


if __name__ == "__main__":
    main()
