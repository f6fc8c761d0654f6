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
from fastvlm_mlx.types import GenerationOptions, ImageFeatures


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
        images = self._see(spans, pictures, cache, clock)
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
        if self.prefixes.match(keys) == len(keys):
            return
        cache = self.prefixes.take(keys, len(self.decoder.layers))
        images = self._see(spans, pictures, cache, Clock())
        fill(self.decoder, embed(self.decoder, spans, images, cache[0].offset), cache)
        self.prefixes.put(keys, cache, _cuts(spans))

    def decode(self, prompt: Prefilled, options: GenerationOptions, max_tokens: int) -> Generator[int, None, None]:
        """Tokens after a prompt, one by one; see `generation.generate_tokens`."""
        cache = _kept_as_asked(prompt.cache, options)
        return generate_tokens(self.decoder, prompt.logits, cache, prompt.text_ids, options, max_tokens)

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
        fed = taken[: prompt.cache[0].offset - len(prompt.keys)]
        keys = np.concatenate([prompt.keys, token_keys(fed)]) if fed else prompt.keys
        self.prefixes.put(keys, prompt.cache, [*prompt.cuts, len(prompt.keys)])

    def _check_kv(self, options: GenerationOptions, positions: int) -> None:
        """Raise InputError or ContextLengthError unless the cache can be as it is asked for."""
        config = self.decoder.config
        head_dim = config.hidden_size // config.num_attention_heads
        if options.kv_bits and head_dim % options.kv_group_size:
            raise InputError(f"kv_group_size {options.kv_group_size} doesn't divide the head's size, {head_dim}")
        if options.max_kv_size is not None and options.max_kv_size <= positions:
            raise ContextLengthError(
                f"max_kv_size is {options.max_kv_size}, the prompt has {positions} positions and the answer needs "
                "some; raise it, shorten the text or lower the resolution"
            )

    def _see(
        self, spans: Sequence[Span], pictures: Sequence[Picture], cache: list[KVCache], clock: Clock
    ) -> dict[int, mx.array]:
        """Embeddings of the images whose positions aren't all in the cache."""
        known, starts = cache[0].offset, image_starts(spans)
        needed = [index for index, start in starts.items() if start + pictures[index].tokens > known]
        seen = {index: f for index in needed if (f := self.vision.cache.get(pictures[index].digest))}
        blind = [index for index in needed if index not in seen]
        if blind and self.vision.runs_beside:
            self._fill(spans, seen, starts[blind[0]], cache)
            first = {pictures[index].digest: index for index in reversed(blind)}  # of those that come twice
            for index in sorted(first.values()):
                self.vision.begin(pictures[index])
        done: dict[bytes, ImageFeatures] = {}  # the cache may be too small for all of them
        for index in blind:
            digest = pictures[index].digest
            done[digest] = done.get(digest) or self.vision.features(pictures[index], clock)
            seen[index] = done[digest]
        return {index: features.embeddings for index, features in seen.items()}

    def _fill(self, spans: Sequence[Span], seen: dict[int, ImageFeatures], stop: int, cache: list[KVCache]) -> None:
        """Send the positions before `stop` on their way, without waiting."""
        if stop > cache[0].offset:
            images = {index: features.embeddings for index, features in seen.items()}
            fill(self.decoder, embed(self.decoder, spans, images, cache[0].offset, stop), cache)
            mx.async_eval([entry.state for entry in cache])


def _cuts(spans: Sequence[Span]) -> list[int]:
    return [cut for start, s in located(spans) if isinstance(s, ImageSpan) for cut in (start, start + len(s))]


def _kept_as_asked(cache: list[KVCache], options: GenerationOptions) -> list[LayerCache]:
    """The prompt's rows, in fewer bits or in a cache that forgets; others than the prompt's own, which is kept."""
    if options.kv_bits:
        return [entry.to_quantized(options.kv_group_size, options.kv_bits) for entry in cache]
    if options.max_kv_size is not None:
        return [_rotating(entry, options.max_kv_size) for entry in cache]
    return list(cache)


def _rotating(entry: KVCache, size: int) -> RotatingKVCache:
    """A cache of so many rows that always keeps those of the prompt."""
    kept = entry.offset
    out = RotatingKVCache(size, keep=kept)
    assert entry.keys is not None
    assert entry.values is not None
    out.state = (entry.keys[:, :, :kept], entry.values[:, :, :kept], kept, kept, size, kept)
    return out
