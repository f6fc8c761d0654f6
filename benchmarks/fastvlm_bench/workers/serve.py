"""What all sides share: requests and replies, one JSON object a line, and the clock.

    stdout  {"device": ..., ...}                                             once, when the model is loaded
    stdin   {"image": F, "questions": [...], "tokens": [...], "resolution": PX}
            {"ids": [...], "tokens": [N]}                                    a prompt of text alone
    stdout  {"answers": [{"ttft_s", "decode_s", "ids", "positions"}, ...], "peak_rss_bytes"}

The side ends when stdin does. What a library prints to stdout goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Emit = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a side needs to know before it loads its model.

    Attributes:
        model: folder of the model, in the side's own layout.
        dtype: "float32" or "bfloat16".
        threads: for the side's linear algebra.
        openblas: library to load before MLX, where MLX would find no fast BLAS by itself; None for none.
    """

    model: str
    dtype: str
    threads: int
    openblas: str | None = None


class Side:
    """A loaded model. Each method calls `emit` with an id as soon as that id is on the host."""

    def facts(self) -> dict[str, Any]:
        """What is worth telling, such as the device."""
        return {}

    def ask(self, image: str, question: str, resolution: int, tokens: int, emit: Emit) -> int | None:
        """Answer a question about an image file greedily, past any end of sequence; may tell the prompt's length."""
        raise NotImplementedError

    def complete(self, ids: list[int], tokens: int, emit: Emit) -> None:
        """Go on from the ids of a text."""
        raise NotImplementedError

    def forget(self) -> None:
        """Begin anew: the question that follows is the first one, of which nothing is known."""

    def settle(self) -> None:
        """Wait for what is still being computed, such as a token that nobody asked for."""


def serve(load: Callable[[Setup], Side]) -> None:
    """Load the model, then answer requests until there are no more."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setup = Setup(**json.loads(sys.argv[1]))
    if setup.openblas:
        with contextlib.suppress(OSError):  # not installed: then no side has it
            ctypes.CDLL(setup.openblas, ctypes.RTLD_GLOBAL)
    side = load(setup)
    for reply in _replies(side):
        out.write(json.dumps(reply) + "\n")
        out.flush()


def _replies(side: Side) -> Iterator[dict[str, Any]]:
    yield side.facts()
    for line in sys.stdin:
        request = json.loads(line)
        answers = [_answer(side, request, index) for index in range(len(request["tokens"]))]
        yield {"answers": answers, "peak_rss_bytes": peak_rss_bytes()}


def _answer(side: Side, request: dict[str, Any], index: int) -> dict[str, Any]:
    """Ask one of the request's questions, with nothing left over from the request before."""
    if not index:
        side.forget()
    side.settle()
    gc.collect()
    tokens, times, ids = request["tokens"][index], [], []

    def emit(token: int) -> None:
        times.append(time.perf_counter())
        ids.append(token)

    positions = None
    start = time.perf_counter()
    if "ids" in request:
        side.complete(request["ids"], tokens, emit)
    else:
        positions = side.ask(request["image"], request["questions"][index], request["resolution"], tokens, emit)
    side.settle()
    if len(ids) != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {len(ids)}")
    return {"ttft_s": times[0] - start, "decode_s": times[-1] - times[0], "ids": ids, "positions": positions}


def peak_rss_bytes() -> int:
    """Most memory that this process ever held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
