"""A child process that does one piece of work after another, and is replaced when it dies.

Core ML and Metal can end a process without an exception: coremltools 2757 aborts while a compute plan is loaded, MLX
when a command buffer fails. What can't be caught must happen to somebody else.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast

from fastvlm_bench.doctor.check import one_line
from fastvlm_mlx.accelerate import prepare_cpu
from fastvlm_mlx.errors import FastVLMError

State = TypeVar("State")
Result = TypeVar("Result")
P = ParamSpec("P")

_END_S = 10.0  # a process whose pipe is closed is given this long to be gone


class WorkError(FastVLMError):
    """Work failed, crashed or took too long; the message says what happened."""

    exit_code = 1


class Worker(Generic[State]):
    """Runs functions in a child process, which is started when it is first needed.

    Args:
        make: makes the state that each function gets first, in the child, once; must be picklable.
        limit_s: seconds that a piece of work may take.
        debug: the child shows tracebacks on stderr.
    """

    def __init__(self, make: Callable[[], State], limit_s: float, debug: bool = False) -> None:
        self._make, self._debug = make, debug
        self.limit_s = limit_s
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def do(self, function: Callable[Concatenate[State, P], Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Run `function(state, *args, **kwargs)` in the child; all of them and the result must be picklable.

        Raises:
            WorkError: it raised an exception, the child died, or it took too long. The next call works again.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send((function, args, kwargs))
            if not pipe.poll(self.limit_s):
                self.close()
                raise WorkError(f"took longer than {self.limit_s:g} s and was stopped; --limit allows more")
            done, answer = pipe.recv()
        except (EOFError, ConnectionError) as exc:
            raise WorkError(self._death()) from exc
        if not done:
            raise WorkError(answer)
        return cast(Result, answer)

    def close(self) -> None:
        """End the child."""
        if self._process and self._pipe:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> Worker[State]:
        """The worker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()

    def _start(self) -> Connection:
        context = get_context("spawn")  # a fork of a process with Metal or threads in it isn't safe
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._make, self._debug), daemon=True)
        process.start()
        theirs.close()  # so that its death ends the pipe
        self._process, self._pipe = process, ours
        return ours

    def _death(self) -> str:
        assert self._process
        self._process.join(_END_S)
        code = self._process.exitcode
        self.close()
        if code is not None and code < 0:
            return f"the process was ended by {signal.Signals(-code).name}; its last words are on stderr"
        return f"the process ended with exit code {code}; its last words are on stderr"


def _serve(pipe: Connection, make: Callable[[], State], debug: bool) -> None:
    """The child: work until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then ends this process
    os.dup2(2, 1)  # stdout is for the report
    prepare_cpu()
    state: State | None = None
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            if state is None:
                state = make()
            pipe.send((True, function(state, *args, **kwargs)))
        except Exception as exc:  # whatever it is, the parent reports it
            if debug:
                traceback.print_exc(file=sys.stderr)
            pipe.send((False, one_line(exc)))
