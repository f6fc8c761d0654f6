"""Whole processes, in turn: from the start of the command to the first token on its stdout."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlm_bench.compare.plan import QUESTIONS
from fastvlm_bench.compare.process import SideError, environment, last_line, openblas
from fastvlm_bench.compare.rivals import LIBRARIES, OURS, RIVALS
from fastvlm_mlx.errors import InputError


@dataclass(frozen=True, slots=True)
class Command:
    """A side's command line, which prints one token, and its environment variables."""

    side: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ColdRun:
    """One process: seconds from its start to its first line, and that line."""

    side: str
    resolution: int
    round: int
    place: int
    seconds: float
    text: str


def check_rivals(rivals: Sequence[str]) -> None:
    """Raise InputError for one without a command line."""
    for name in rivals:
        if not LIBRARIES[name].command:
            able = ", ".join(other for other in RIVALS if LIBRARIES[other].command)
            raise InputError(f"{name} has no command line that answers about a picture; --cold takes {able}")


def command(
    side: str, python: str | Path, model: Path, image: Path, resolution: int, dtype: str, threads: int
) -> Command:
    """A side's own command line for the first token of an answer.

    A rival's resolution and dtype are those of its files. All write unbuffered: an answer that waits for the
    end of its process would come with the end.
    """
    variables = environment(side, threads) | {"PYTHONUNBUFFERED": "1"}
    options = ["--model", str(model), "--image", str(image), "--prompt", QUESTIONS[0]]
    options += ["--max-tokens", "1", "--temperature", "0"]
    if side == OURS:
        options += ["--vision", "mlx", "--dtype", dtype, "--vision-dtype", dtype, "--resolution", str(resolution)]
    elif library := openblas():
        variables["LD_PRELOAD"] = library
    return Command(side, (str(python), *LIBRARIES[side].command, *options), variables)


def run_cold(
    commands: Sequence[Command], resolution: int, runs: int, progress: Callable[[], object] = lambda: None
) -> list[ColdRun]:
    """Run the commands in turn, once to fill the system's file cache and `runs` times to measure.

    Raises:
        SideError: a command failed, or printed another token than ours.
    """
    found = []
    for index in range(-1, runs):
        start = max(index, 0) % len(commands)
        for place, command in enumerate([*commands[start:], *commands[:start]]):
            seconds, text = first_line(command)
            found.append(ColdRun(command.side, resolution, index, place, seconds, text))
            progress()
        _check(found[-len(commands) :])
    return [run for run in found if run.round >= 0]


def first_line(command: Command) -> tuple[float, str]:
    """Start a command; seconds until its first line is there, and that line.

    Raises:
        SideError: it failed.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(command.environment),
            encoding="utf-8",
        )
        with process:
            assert process.stdout
            text = process.stdout.readline()
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode or not text:
            errors.seek(0)
            raise SideError(f"{command.side} ended with exit code {process.returncode}: {last_line(errors.read())}")
    return seconds, text.strip()


def _check(runs: Sequence[ColdRun]) -> None:
    right = next(run.text for run in runs if run.side == OURS)
    for run in runs:
        if run.text != right:
            raise SideError(
                f"{run.side} prints {run.text!r} at {run.resolution} px where {OURS} prints {right!r}; "
                "times of different answers can't be compared"
            )
