"""A live source: the newest frame is asked about; those that came while an answer was under way are dropped."""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastvlm_mlx.answer import last_result
from fastvlm_mlx.cache import position_keys, token_keys
from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.image import open_image
from fastvlm_mlx.remains import Remains

if TYPE_CHECKING:
    from PIL import Image

    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import GenerationOptions, GenerationResult, ImageInput, Prompt
    from fastvlm_mlx.views import View

    FramePrompt: TypeAlias = Prompt | Callable[[int], Prompt]

PATIENCE_S = 1.0  # for a source that is waiting for its next frame when nobody wants it any more
MOST_UNREADABLE = 100  # frames in a row: cameras and networks spoil some, a wrong source gives nothing else
_LOG = logging.getLogger("fastvlm_mlx")
now_s = time.perf_counter


@dataclass(frozen=True, slots=True)
class FrameAnswer:
    """An answer of `FastVLM.watch`; `str()` of it is the text.

    Attributes:
        index: the frame's number among all that the source gave, from 0.
        frame: as the source gave it.
        arrived: when it came, in seconds since the watching began.
        dropped: how many frames came between the one that was asked about before it and this one, those that can't be
            decoded among them.
        ttft: seconds from the frame's arrival to the first token of its answer.
        latency: seconds from the frame's arrival to the end of its answer.
        result: the answer; its own timings begin when the frame was asked about.
    """

    index: int
    frame: ImageInput = field(repr=False)
    arrived: float
    dropped: int
    ttft: float
    latency: float
    result: GenerationResult

    def __str__(self) -> str:
        return self.result.text


def watch(
    model: FastVLM,
    frames: Iterable[ImageInput],
    prompt: FramePrompt,
    system: str | None,
    view: View,
    options: GenerationOptions,
) -> Generator[FrameAnswer, None, None]:
    """Answer about the newest frame, again and again; arguments as of `FastVLM.watch`, checked.

    Raises:
        InputError: at once, for what gives no images.
    """
    expected = f"frames to watch come from an iterable of images; got {type(frames).__name__}"
    if isinstance(frames, str | bytes | bytearray | memoryview | os.PathLike | io.IOBase):
        raise InputError(f"{expected}; read_frames has those of a file")
    if not isinstance(frames, Iterable):
        raise InputError(
            f"{expected}; give a generator that reads it and yields RGB images, "
            "for OpenCV's BGR: (camera.read()[1][..., ::-1] for _ in itertools.count())"
        )
    return _answers(frames, _Asker(model, prompt, system, view, options))


def _answers(frames: Iterable[ImageInput], asker: _Asker) -> Generator[FrameAnswer, None, None]:
    began_s, before = now_s(), -1
    with closing(Newest(iter(frames))) as source:
        while arrival := source.take():
            asked_s = now_s()
            result = asker.ask(arrival)
            if result is None:
                continue
            yield FrameAnswer(
                arrival.index,
                arrival.frame,
                arrival.time_s - began_s,
                arrival.index - before - 1,
                asked_s - arrival.time_s + result.timings.ttft,
                now_s() - arrival.time_s,
                result,
            )
            before = arrival.index
    if before < 0 and asker.error:
        raise asker.error


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A frame that the source gave."""

    index: int
    frame: ImageInput
    time_s: float


class Newest:
    """Reads a source in a thread of its own and holds the newest frame, no other.

    Args:
        frames: the source.
    """

    def __init__(self, frames: Iterator[ImageInput]) -> None:
        self._changed = threading.Condition()
        self._newest: _Arrival | None = None
        self._error: BaseException | None = None
        self._ended = self._closed = False
        # A daemon: a source that never gives another frame mustn't keep the process from ending.
        self._thread = threading.Thread(target=self._read, args=(frames,), name="fastvlm-watch", daemon=True)
        self._thread.start()

    def take(self) -> _Arrival | None:
        """Wait for a frame that wasn't taken before; None once the source has ended.

        Raises:
            Whatever the source raised, after the frames that it gave before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._ended)
            arrival, self._newest = self._newest, None
            error, self._error = (None, self._error) if arrival else (self._error, None)
        if error:
            raise error
        return arrival

    def close(self) -> None:
        """Read no further. A source that is waiting then is left to its thread, which ends with the next frame."""
        with self._changed:
            self._closed, self._newest = True, None
        self._thread.join(PATIENCE_S)

    def _read(self, frames: Iterator[ImageInput]) -> None:
        error: BaseException | None = None
        try:
            for index, frame in enumerate(frames):
                with self._changed:
                    if self._closed:
                        return
                    self._newest = _Arrival(index, frame, now_s())
                    self._changed.notify()
        except BaseException as exc:  # the caller has to know, whatever it is
            error = exc
        finally:
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify()


class _Asker:
    """Asks about one frame after another, and leaves in the caches what the latest one needs, not all of them.

    Attributes:
        error: of the latest frame that couldn't be decoded.
    """

    def __init__(
        self, model: FastVLM, prompt: FramePrompt, system: str | None, view: View, options: GenerationOptions
    ) -> None:
        self._model, self._prompt, self._system, self._view, self._options = model, prompt, system, view, options
        engines = [model.engine, *([options.draft.engine] if options.draft else [])]
        self._remains = [Remains(engine) for engine in engines]
        self._unreadable = 0  # frames in a row
        self.error: ImageError | None = None

    def ask(self, arrival: _Arrival) -> GenerationResult | None:
        """The answer; None for a frame that can't be decoded."""
        model, clock = self._model, self._model.start_clock()
        image = self._open(arrival.frame)
        if image is None:
            return None
        prompt = self._prompt(arrival.index) if callable(self._prompt) else self._prompt
        (picture,) = model.open_as([image], self._view, clock)
        spans = model.positions(prompt, [picture.tokens], self._system)
        clock.tokenize = clock.watch.lap()
        keys = position_keys(spans, [picture.digest])
        for remains in self._remains:
            remains.make_way(keys, picture.digest)
        result = last_result(model.answer(spans, [picture], self._options, clock))
        said = np.concatenate([keys, token_keys(result.token_ids)])
        for remains in self._remains:
            remains.note(said)
        return result

    def _open(self, frame: ImageInput) -> Image.Image | None:
        """Decoded here: files and bytes that never come again needn't be known by their bytes.

        Raises:
            ImageError: one too many in a row that can't be.
        """
        try:
            image = open_image(frame)
        except ImageError as exc:
            self._unreadable, self.error = self._unreadable + 1, exc
            if self._unreadable == 1:  # once: a camera that is unplugged would fill the log
                _LOG.warning("a frame is left out: %s", exc)
            if self._unreadable == MOST_UNREADABLE:
                raise ImageError(f"{MOST_UNREADABLE} frames in a row can't be decoded; of the last one: {exc}") from exc
            return None
        self._unreadable = 0
        return image
