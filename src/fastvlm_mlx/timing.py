"""Wall-clock time, stage by stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields

from fastvlm_mlx.types import Timings


class Stopwatch:
    """Counts seconds since it was made, and since the last lap."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


@dataclass(slots=True)
class Clock:
    """Seconds of the stages of one answer, filled in as they end; names as in `types.Timings`."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    preprocess: float = 0.0
    tokenize: float = 0.0
    vision: float = 0.0
    projector: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    ttft: float = 0.0
    decode: float = 0.0

    def finish(self) -> Timings:
        """The times as they are handed out."""
        names = (f.name for f in fields(self) if f.name != "watch")
        return Timings(**{name: getattr(self, name) for name in names}, total=self.watch.total)
