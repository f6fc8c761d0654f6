"""From positions to tokens, computing what is new, once: caches, prefill and decode put together."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fastvlm_mlx.cache import PrefixCache, position_keys, token_keys
from fastvlm_mlx.decoder import Decoder, LayerCache
from fastvlm_mlx.errors import ContextLengthError, InputError
from fastvlm_mlx.generation import generate_tokens
from fastvlm_mlx.mlx_lm_parts import KVCache, RotatingKVCache
from fastvlm_mlx.pictures import Picture, Vision
from fastvlm_mlx.prefill import embed, fill, image_starts, located, prefill
from fastvlm_mlx.prompt import ImageSpan, Span, TextSpan
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import KV_GROUP_SIZES, GenerationOptions, ImageFeatures


@dataclass(slots=True)
class Prefilled:
    """A prompt whose rows are computed.

    Attributes:
        keys: of its positions; see `cache.position_keys`.
        cuts: positions where its images begin and end.
        text_ids: its tokens, without images.
        cache: a row for each position, in each block.
        logits: (1, V) after the last position.
        known: positions that were not computed again.
    """

    keys: np.ndarray
    cuts: list[int]
    text_ids: list[int]
    cache: list[KVCache]
    logits: mx.array
    known: int


class Engine:
    """The decoder with everything that saves it work.

    Args:
        decoder: the language model.
        vision: images to embeddings.
        prefixes: rows of earlier prompts.
    """

    def __init__(self, decoder: Decoder, vision: Vision, prefixes: PrefixCache) -> None:
        self.decoder, self.vision, self.prefixes = decoder, vision, prefixes

    def forget(self) -> None:
        """Forget all that was computed for earlier questions: the next one is a first one again."""
        self.prefixes.clear()
        self.vision.forget()

    def prefill(
        self, spans: Sequence[Span], pictures: Sequence[Picture], options: GenerationOptions, clock: Clock
    ) -> Prefilled:
        """Compute the rows of a prompt that no earlier one had; the times are added to `clock`.

        Images are encoded if their positions are among those. An encoder that runs on other hardware does so while
        the text before the image is prefilled.
        """
        keys = position_keys(spans, [picture.digest for picture in pictures])
        self._check_kv(options, len(keys))
        cache = self.prefixes.take(keys, len(self.decoder.layers))
        known = cache[0].offset
        images = self._see(spans, pictures, cache, clock, options)
        rows = embed(self.decoder, spans, images, cache[0].offset)
        logits = prefill(self.decoder, rows, cache, options.prefill_step_size, options.progress)
        mx.eval(logits)
        clock.prefill += clock.watch.lap()
        assert all(entry.offset == len(keys) for entry in cache), "a row for each position"
        text_ids = [i for span in spans if isinstance(span, TextSpan) for i in span.ids]
        return Prefilled(keys, _cuts(spans), text_ids, cache, logits, known)

    def look(self, spans: Sequence[Span], pictures: Sequence[Picture]) -> None:
        """Compute and keep a prompt's rows, but no logits: what will come after it isn't known yet."""
        keys = position_keys(spans, [picture.digest for picture in pictures])
        if self.prefixes.use(keys) == len(keys):
            return
        cache = self.prefixes.take(keys, len(self.decoder.layers))
        images = self._see(spans, pictures, cache, Clock(), GenerationOptions())
        fill(self.decoder, embed(self.decoder, spans, images, cache[0].offset), cache)
        self.prefixes.put(keys, cache, _cuts(spans))

    def decode(self, prompt: Prefilled, options: GenerationOptions, max_tokens: int) -> Generator[int, None, None]:
        """Tokens after a prompt, one by one; see `generation.generate_tokens`.

        With `kv_bits` or `max_kv_size` the prompt's own rows are given up for those that the options ask for.
        """

        def rows() -> Sequence[LayerCache]:
            return self._traded(prompt, options) if options.kv_bits or options.max_kv_size else prompt.cache

        return generate_tokens(self.decoder, prompt.logits, rows, prompt.text_ids, options, max_tokens)

    def keeping(self, prompt: Prefilled, tokens: Generator[int, None, None]) -> Iterator[int]:
        """Pass tokens on; keep their rows and the prompt's for later, also if the caller stops in the middle."""
        taken: list[int] = []
        try:
            for token in tokens:
                taken.append(token)
                yield token
        finally:
            tokens.close()
            self.keep(prompt, taken)

    def keep(self, prompt: Prefilled, taken: Sequence[int]) -> None:
        """Keep the rows of a prompt, and of those tokens after it that the same cache has."""
        if not prompt.cache:  # given up, and kept before
            return
        rows = min(entry.offset for entry in prompt.cache)  # an interrupt may come between two blocks
        fed = taken[: max(rows - len(prompt.keys), 0)]
        keys = np.concatenate([prompt.keys, token_keys(fed)]) if fed else prompt.keys
        self.prefixes.put(keys, prompt.cache, [*prompt.cuts, len(prompt.keys)])

    def _traded(self, prompt: Prefilled, options: GenerationOptions) -> list[LayerCache]:
        """Rows in fewer bits, or in a cache that forgets, for the prompt's own: block by block, so as not to hold both.

        What the prefix cache has of them stays there; it is bounded for itself.
        """
        self.keep(prompt, [])
        traded: list[LayerCache] = []
        rows, prompt.cache = prompt.cache, []  # at once: an interrupt must not leave some blocks
        while rows:
            entry = rows.pop(0)
            if options.kv_bits:
                traded.append(entry.to_quantized(self._group_size(options), options.kv_bits))
            elif options.max_kv_size:
                traded.append(_rotating(entry, options.max_kv_size))
            mx.eval(traded[-1].keys, traded[-1].values)
        return traded

    def _group_size(self, options: GenerationOptions) -> int:
        """How many values share a scale.

        Raises:
            InputError: what is asked for doesn't divide the head's size, or nothing does.
        """
        config = self.decoder.config
        head_dim = config.hidden_size // config.num_attention_heads
        fitting = [size for size in KV_GROUP_SIZES if head_dim % size == 0]
        if options.kv_group_size in fitting:
            return options.kv_group_size
        if options.kv_group_size or not fitting:
            remedy = f"choose {' or '.join(map(str, fitting))}" if fitting else "leave kv_bits out"
            raise InputError(f"kv_group_size must divide the head's size, {head_dim}; {remedy}")
        return fitting[0]

    def _check_kv(self, options: GenerationOptions, positions: int) -> None:
        """Raise InputError or ContextLengthError unless the cache can be as it is asked for."""
        if options.kv_bits:
            self._group_size(options)
        if options.max_kv_size is not None and options.max_kv_size <= positions:
            raise ContextLengthError(
                f"max_kv_size is {options.max_kv_size}, the prompt has {positions} positions and the answer needs "
                "some; raise it, shorten the text or lower the resolution"
            )

    def _see(
        self,
        spans: Sequence[Span],
        pictures: Sequence[Picture],
        cache: list[KVCache],
        clock: Clock,
        options: GenerationOptions,
    ) -> dict[int, mx.array]:
        """Embeddings of the images whose positions aren't all in the cache."""
        known, starts = cache[0].offset, image_starts(spans)
        needed = [index for index, start in starts.items() if start + pictures[index].tokens > known]
        seen = {index: f for index in needed if (f := self.vision.cache.get(pictures[index].digest))}
        blind = [index for index in needed if index not in seen]
        if blind and self.vision.runs_beside:
            first = {pictures[index].digest: index for index in reversed(blind)}  # of those that come twice
            waiting = [pictures[index] for index in sorted(first.values())]
            self._fill_beside(spans, seen, starts[blind[0]], cache, options, waiting)
        done: dict[bytes, ImageFeatures] = {}  # the cache may be too small for all of them
        for index in blind:
            digest = pictures[index].digest
            done[digest] = done.get(digest) or self.vision.features(pictures[index], clock)
            seen[index] = done[digest]
        return {index: features.embeddings for index, features in seen.items()}

    def _fill_beside(
        self,
        spans: Sequence[Span],
        seen: dict[int, ImageFeatures],
        stop: int,
        cache: list[KVCache],
        options: GenerationOptions,
        pictures: Sequence[Picture],
    ) -> None:
        """Send the positions before `stop` on their way, and the pictures to the encoder.

        A long text takes several passes, of which each waits for the one before: the encoder begins with the first.
        """
        start, step, total = cache[0].offset, options.prefill_step_size, sum(map(len, spans))
        report = options.progress or (lambda *_: None)
        images = {index: features.embeddings for index, features in seen.items()}
        rows = embed(self.decoder, spans, images, start, stop) if stop > start else None
        if rows is not None:
            report(start, total)
            fill(self.decoder, rows[:, :step], cache)
            mx.async_eval([entry.state for entry in cache])
        for picture in pictures:
            self.vision.begin(picture)
        if rows is not None and rows.shape[1] > step:
            fill(self.decoder, rows[:, step:], cache, step, lambda done, _: report(done, total))
            mx.async_eval([entry.state for entry in cache])


def _cuts(spans: Sequence[Span]) -> list[int]:
    return [cut for start, s in located(spans) if isinstance(s, ImageSpan) for cut in (start, start + len(s))]


def _rotating(entry: KVCache, size: int) -> RotatingKVCache:
    """A cache of so many rows that always keeps those of the prompt."""
    kept = entry.offset
    out = RotatingKVCache(size, keep=kept)
    assert entry.keys is not None
    assert entry.values is not None
    out.state = (entry.keys[:, :, :kept], entry.values[:, :, :kept], kept, kept, size, kept)
    return out
