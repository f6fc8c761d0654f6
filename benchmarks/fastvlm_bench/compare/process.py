"""A side's process, from outside: requests in, replies out, and its last words if it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvlm_bench.compare.rivals import LIBRARIES, OURS
from fastvlm_bench.workers.serve import Setup
from fastvlm_mlx.accelerate import OPENBLAS
from fastvlm_mlx.errors import FastVLMError

_BOOTSTRAP = Path(__file__).resolve().parents[1] / "workers" / "bootstrap.py"
_QUIET_S = 0.05  # idle threads of OpenBLAS and OpenMP spin for up to 25 ms before they sleep
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class SideError(FastVLMError):
    """A side failed; the message says whose process, and its last line."""

    exit_code = 1


class Worker:
    """A process that answers requests; see `workers.serve`.

    Args:
        name: of the side.
        command: starts it.
        environment: of the process.

    Raises:
        SideError: it ended before it was ready.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see close)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=dict(environment),
            encoding="utf-8",
        )
        try:
            self.facts = self._read()
        except BaseException:
            self.close()
            raise

    def request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request, once the side before has come to rest, and wait for the reply.

        Raises:
            SideError: the process ended first.
        """
        assert self._process.stdin
        time.sleep(_QUIET_S)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _death(self) -> SideError:
        code = self._process.wait()
        self._errors.seek(0)
        return SideError(f"{self.name} ended with exit code {code}: {last_line(self._errors.read())}")


def last_line(text: str) -> str:
    """The last line that isn't blank: what Python's tracebacks end with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def start(name: str, python: str | Path, model: Path, dtype: str, threads: int) -> Worker:
    """Start a side.

    Args:
        name: OURS, or a rival's.
        python: interpreter of its environment.
        model: in its layout.
        dtype: "float32" or "bfloat16".
        threads: for its linear algebra.
    """
    setup = Setup(str(model), dtype, threads, openblas())
    command = [str(python), "-P", str(_BOOTSTRAP), LIBRARIES[name].module, json.dumps(asdict(setup))]
    return Worker(name, command, environment(name, threads))


def environment(name: str, threads: int) -> dict[str, str]:
    """A side's environment variables: as many threads for each, no network, and none of our packages for a rival."""
    variables = os.environ | dict.fromkeys(_THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    if name != OURS:
        variables.pop("PYTHONPATH", None)
    return variables


def openblas() -> str | None:
    """The library that ours loads on Linux before MLX, for the rivals to have too; None where there's none."""
    library = os.environ.get("FASTVLM_OPENBLAS", OPENBLAS)
    return library if sys.platform == "linux" and library != "0" else None


def versions(name: str, python: str | Path) -> dict[str, str]:
    """Of the packages that matter to a side, in its environment.

    Raises:
        SideError: one of them isn't installed there.
    """
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"
    )
    command = [str(python), "-P", "-c", code, *LIBRARIES[name].packages]
    done = subprocess.run(command, env=environment(name, 1), capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SideError(f"{name}'s environment isn't complete: {last_line(done.stderr)}")
    found: dict[str, str] = json.loads(done.stdout)
    return found
