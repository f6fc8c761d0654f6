"""What all commands share: one line for an error, `--debug` for the traceback, the exit codes."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from fastvlm_mlx._version import __version__
from fastvlm_mlx.accelerate import prepare_cpu
from fastvlm_mlx.converter import EXIT_INTERRUPTED
from fastvlm_mlx.errors import FastVLMError

EXIT_FAILED = 1


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add `--debug` and `--version`."""
    add_debug(parser, default=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def add_debug(parser: argparse.ArgumentParser, default: bool | str = argparse.SUPPRESS) -> None:
    """Add `--debug`; a sub-command leaves the default to its parent, so that it works in either place."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def run(
    parser: argparse.ArgumentParser,
    action: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Parse, act, and turn an error into one line on stderr.

    Returns:
        0; 2 for bad usage or input, 1 for anything else that failed, 130 after Ctrl-C.
    """
    args = parser.parse_args(argv)
    prepare_cpu()  # before the action imports MLX, as almost everything does
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, *_: print(f"{parser.prog}: warning: {text}", file=sys.stderr)
            action(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has gone; nothing is left to say to it
        sys.stderr.close()
        return EXIT_FAILED
    except Exception as exc:  # whatever it is: one line, and the exit code; --debug has the rest
        if args.debug:
            raise
        known = isinstance(exc, FastVLMError)
        text = " ".join(str(exc).split()) or type(exc).__name__
        hint = "" if known else f" ({type(exc).__name__}; --debug shows where)"
        print(f"{parser.prog}: error: {text}{hint}", file=sys.stderr)
        return exc.exit_code if isinstance(exc, FastVLMError) else EXIT_FAILED
    return 0
