"""The converter from the run time's side: a process of its own, since it imports what the run time never does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

EXIT_INTERRUPTED = 130

# Sub-command of `fastvlm` -> module of the converter that is it.
FORWARDED = {"verify": "fastvlm_convert.verify", "placement": "fastvlm_convert.placement"}


def run_converter(arguments: Sequence[str], module: str = "fastvlm_convert", silent: bool = False) -> int:
    """Run a module of the converter.

    Args:
        arguments: of its command line.
        module: which one; default `fastvlm-convert`.
        silent: keep its stdout away, and give it no stdin.

    Returns:
        Its exit code.

    Raises:
        OSError: the interpreter can't be started.
    """
    # -P: no file of the current folder may stand in for a module.
    command = [sys.executable, "-P", "-m", module, *arguments]
    nothing = subprocess.DEVNULL if silent else None
    try:
        return subprocess.run(command, stdin=nothing, stdout=nothing, check=False).returncode
    except KeyboardInterrupt:  # it got the signal too, and has said so
        return EXIT_INTERRUPTED
