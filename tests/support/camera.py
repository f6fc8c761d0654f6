"""A camera that shows what a test gives it, and tells when that is taken: nothing depends on how fast threads are."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

PATIENCE_S = 30  # against a test that hangs


class Camera:
    """An endless source of images; iterate over it once.

    Attributes:
        reads: how often it was asked for a frame.
        thread: that asks.
    """

    def __init__(self) -> None:
        self._frames: queue.Queue[object] = queue.Queue()
        self._asked = threading.Condition()
        self._given = self.reads = 0
        self.thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        with self._asked:
            self.reads += 1
            self.thread = threading.current_thread()
            self._asked.notify_all()
        frame = self._frames.get(timeout=PATIENCE_S)
        if isinstance(frame, BaseException):
            raise frame
        return frame

    def put(self, *frames: object) -> None:
        """Frames for whoever will ask; an exception is raised there."""
        for frame in frames:
            self._given += 1
            self._frames.put(frame)

    def settle(self) -> None:
        """Wait until every frame is taken: until another one is asked for."""
        with self._asked:
            assert self._asked.wait_for(lambda: self.reads > self._given, timeout=PATIENCE_S)

    def show(self, *frames: object) -> None:
        """Show frames, each until it is taken."""
        for frame in frames:
            self.put(frame)
            self.settle()

    def end(self, error: BaseException | None = None) -> None:
        """Have no more frames, or fail; wait until nobody reads any more."""
        self.put(error or StopIteration())
        self.join()

    def join(self) -> None:
        """Wait for the end of the thread that asks."""
        assert self.thread
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
