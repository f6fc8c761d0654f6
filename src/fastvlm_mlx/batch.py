"""Several answers at a time: mlx-lm's continuous batching, fed with prompts that our prefill has read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.generation import make_chooser, make_processors, make_token_sampler, resident
from fastvlm_mlx.image import image_list, name_of, open_image
from fastvlm_mlx.pictures import picture_as
from fastvlm_mlx.prompt import check_context
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import BATCH_SIZE

if TYPE_CHECKING:
    from fastvlm_mlx.answer import AnswerReader
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.pictures import Picture
    from fastvlm_mlx.prompt import Span
    from fastvlm_mlx.types import GenerationOptions, GenerationResult, ImageInput, ImageInputs, Prompt
    from fastvlm_mlx.views import View


@dataclass(frozen=True, slots=True)
class Request:
    """A question that is ready to be computed.

    Attributes:
        spans: its positions.
        pictures: its images.
        preprocess: seconds that it took to read them.
    """

    spans: tuple[Span, ...]
    pictures: list[Picture]
    preprocess: float = 0.0


def read_requests(
    model: FastVLM,
    images: Sequence[ImageInputs],
    prompts: Prompt | Sequence[Prompt],
    system: str | None,
    view: View,
    batch_size: int = BATCH_SIZE,
) -> list[Request]:
    """Check all questions and identify their images, before anything is computed.

    Args:
        model: which they are for.
        images: of each question.
        prompts: each, or one for all: a text, or token ids.
        system: replaces the default system prompt.
        view: the size and the shape of the images.
        batch_size: files of later questions are read again when their turn comes; a thousand images of 1024 px
            would hold 3 GB.

    Raises:
        InputError: no list of images or prompts, not as many prompts as images, or what `FastVLM.generate` raises.
    """
    if not isinstance(images, list | tuple):
        raise InputError(
            f"images must be a list with an entry for each question, got {type(images).__name__}; "
            "put a single one in a list, or use generate"
        )
    each = _prompts(prompts, len(images))
    if len(each) != len(images):
        raise InputError(
            f"there are {len(images)} entries of images and {len(each)} prompts; give a prompt for each, or one for all"
        )
    requests = []
    for number, (shown, prompt) in enumerate(zip(images, each, strict=True)):
        inputs = image_list(shown)
        clock = Clock()
        pictures = model.open_as(inputs, view, clock)
        for picture, image in zip(pictures, inputs, strict=True):
            if number >= batch_size and isinstance(image, str | PathLike) and Path(image).is_file():
                picture.make_pixels = partial(_read_again, image, view, picture.digest)
        spans = model.positions(prompt, [p.tokens for p in pictures], system)
        requests.append(Request(spans, pictures, clock.preprocess))
    return requests


def _prompts(prompts: Prompt | Sequence[Prompt], count: int) -> list[Prompt]:
    """A prompt for each of `count` questions."""
    if isinstance(prompts, str):
        return [prompts] * count
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise InputError(f"prompts must be a list with one for each question, or one for all, got {prompts!r}")
    each = list(prompts)
    if each and all(isinstance(token, int | np.integer) for token in each):
        return [cast("list[int]", each)] * count
    return cast("list[Prompt]", each)


def _read_again(image: ImageInput, view: View, digest: bytes) -> np.ndarray:
    """Pixels of a file that was read before.

    Raises:
        ImageError: it can't be read any more, or shows something else: it would be taken for the first one.
    """
    picture = picture_as(open_image(image), view)
    if picture.digest != digest:
        raise ImageError(f"{name_of(image)} has changed since the batch began; ask about it again")
    return picture.make_pixels()


def decode_together(
    model: FastVLM, requests: Iterator[Request], options: GenerationOptions, batch_size: int
) -> Iterator[tuple[int, GenerationResult]]:
    """Answer requests as they come, at most `batch_size` at a time; who is done makes room for the next.

    Args:
        model: answers.
        requests: taken one by one, when there is room.
        options: how to decode, the same for all.
        batch_size: most answers that are decoded together.

    Yields:
        The number of a request, from 0, and its result; in the order in which they end.

    Raises:
        InputError: a batch size below 1, or options that only single answers have.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if options.kv_bits or options.max_kv_size or options.draft:
        raise InputError("kv_bits, max_kv_size and draft are for single answers; leave them out, or use generate")
    with resident(model.decoder):
        yield from _Batch(model, options, batch_size).run(requests)


class _Batch:
    """The answers that are under way."""

    def __init__(self, model: FastVLM, options: GenerationOptions, size: int) -> None:
        from mlx_lm.generate import BatchGenerator  # imports transformers, a second or more

        self._model, self._options, self._size = model, options, size
        self._sampler = make_token_sampler(options, model.decoder.vocab_limit)
        self._generator = BatchGenerator(
            cast(nn.Module, model.decoder),
            sampler=self._sampler,
            completion_batch_size=size,
            prefill_batch_size=size,
        )
        self._open: dict[int, tuple[int, AnswerReader]] = {}  # by mlx-lm's number: ours, and what reads it

    def run(self, requests: Iterator[Request]) -> Iterator[tuple[int, GenerationResult]]:
        """See `decode_together`."""
        mx.reset_peak_memory()  # of all answers together
        if self._options.seed is not None:
            mx.random.seed(self._options.seed)
        numbered = enumerate(requests)
        try:
            while True:
                while len(self._open) < self._size and (following := next(numbered, None)):
                    yield from self._begin(*following)
                if not self._open:
                    return
                yield from self._step()
        finally:
            self._generator.close()

    def _begin(self, number: int, request: Request) -> Iterator[tuple[int, GenerationResult]]:
        """Prefill a request and sample its first token; yields its result if that was the last."""
        model, options, clock = self._model, self._options, Clock(preprocess=request.preprocess)
        room = check_context(request.spans, model.config.context_length)
        prompt = model.engine.prefill(request.spans, request.pictures, options, clock)
        model.engine.keep(prompt, [])
        reader = model.reader(request.spans, prompt.known, options, clock)
        token = cast(int, make_chooser(model.decoder, prompt.text_ids, options)(prompt.logits).item())
        reader.add(token)
        most = min(options.max_tokens, room)
        if reader.ended or most == 1:
            yield number, _finished(reader)
            return
        (uid,) = self._generator.insert(
            [[token]],
            max_tokens=[most - 1],
            caches=[prompt.cache],
            all_tokens=[[i for i in prompt.text_ids if i < model.decoder.vocab_limit]],
            samplers=[self._sampler],
            logits_processors=[make_processors(options)],
        )
        self._open[uid] = number, reader

    def _step(self) -> Iterator[tuple[int, GenerationResult]]:
        """One decoder step for all; yields the results of those that end."""
        for response in self._generator.next_generated():
            number, reader = self._open[response.uid]
            reader.add(response.token)
            if not reader.ended and not response.finish_reason:
                continue
            if not response.finish_reason:  # it is still in mlx-lm's batch
                self._generator.remove([response.uid])
            del self._open[response.uid]
            yield number, _finished(reader)


def _finished(reader: AnswerReader) -> GenerationResult:
    result = reader.finish().result
    assert result
    return result
