"""How long a model takes to load: the first time, in a new process, and again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx import errors
from fastvlm_mlx.commands import EXIT_FAILED
from fastvlm_mlx.errors import FastVLMError

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

# Ends with a line of its own, whatever else a library prints.
_SCRIPT = """
import json, sys, time
start = time.perf_counter()
try:
    from fastvlm_mlx import load
    load(**json.loads(sys.argv[1]))
    told = {"seconds": time.perf_counter() - start}
except Exception as exc:
    told = {"module": type(exc).__module__, "kind": type(exc).__name__, "text": str(exc)}
print()
print(json.dumps(told))
"""


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Milliseconds.

    Attributes:
        cold_ms: in a new process, imports included, the files read from the disk where the system lets us ask
            for that (Linux); None where it wasn't measured.
        warm_ms: each later time in a process that has everything imported.
    """

    cold_ms: float | None = None
    warm_ms: tuple[float, ...] = ()


def cold_load(arguments: Mapping[str, Any]) -> float:
    """Milliseconds that a new process takes from its first line until a model is loaded.

    Args:
        arguments: of `fastvlm_mlx.load`, as JSON has them; `model` is a folder.

    Raises:
        FastVLMError: it failed; an error of `load` has the class and the text that it has there. The exit code is 1:
            the caller's arguments were read before, what doesn't go here is the machine's affair.
    """
    evict(Path(arguments["model"]))
    path = os.pathsep.join(part for part in sys.path if part)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(dict(arguments))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise _failure(f"loading {arguments['model']} in a new process failed: {last}")
    told = json.loads(done.stdout.splitlines()[-1])
    if "seconds" in told:
        return float(told["seconds"]) * 1e3
    if told["module"] == errors.__name__:
        raise _failure(told["text"], getattr(errors, told["kind"]))
    text = f"{told['text']} ({told['kind']})".strip()
    raise _failure(f"loading {arguments['model']} in a new process failed: {text}")


def _failure(text: str, kind: type[FastVLMError] = FastVLMError) -> FastVLMError:
    error = kind(text)
    error.exit_code = EXIT_FAILED
    return error


def warm_loads(arguments: Mapping[str, Any], repeats: int) -> tuple[tuple[float, ...], FastVLM]:
    """Load a model `repeats` times, one after the other.

    Returns:
        Milliseconds of all but the first, which imports what the others find; and the last model.
    """
    import mlx.core as mx

    from fastvlm_mlx.loading import load

    times: list[float] = []
    for _ in range(repeats):
        model = None  # two don't have to fit
        mx.clear_cache()
        start = time.perf_counter()
        model = load(**arguments)
        times.append((time.perf_counter() - start) * 1e3)
    assert model
    return tuple(times[1:]), model


def evict(folder: Path) -> None:
    """Ask the system to drop a folder's files from its cache; macOS has no such call for other files' pages."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.rglob("*"):
        if file.is_file():
            with contextlib.suppress(OSError), file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
