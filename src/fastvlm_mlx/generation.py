"""From the first row of logits to tokens: mlx-lm's samplers in a decode loop on our prefilled cache.

The loop is ours since mlx-lm's `generate` module imports transformers, which would cost a short answer more than
everything else; it is the same one: the step after a token is under way before that token is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from fastvlm_mlx.decoder import Decoder, LayerCache
from fastvlm_mlx.mlx_lm_parts import make_logits_processors, make_sampler
from fastvlm_mlx.types import GenerationOptions

Processor = Callable[[mx.array, mx.array], mx.array]
Sampler = Callable[[mx.array], mx.array]

_RELEASE_EVERY = 256  # tokens; a growing cache leaves buffers behind that nothing else fits into
_NEARLY_ALL = 0.9  # of the memory that a Mac's GPU should use


@contextmanager
def resident(decoder: Decoder) -> Iterator[None]:
    """Keep a model that nearly fills a Mac's memory from being paged out while it generates; else a no-op."""
    if not mx.metal.is_available():
        yield
        return
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
    size = sum(array.nbytes for _, array in tree_flatten(decoder.network.parameters()))  # type: ignore[union-attr,str-unpack]
    if size > _NEARLY_ALL * recommended:
        print(
            f"the decoder takes {size >> 20} MB of the {recommended >> 20} MB that this Mac's GPU should use, which "
            "can be slow; convert it with fewer bits (-q)",
            file=sys.stderr,
        )
    before = mx.set_wired_limit(recommended)
    try:
        yield
    finally:
        mx.synchronize()  # the step after the last token may still be running
        mx.set_wired_limit(before)


def generate_tokens(
    decoder: Decoder,
    logits: mx.array,
    rows: Callable[[], Sequence[LayerCache]],
    context_ids: Sequence[int],
    options: GenerationOptions,
    max_tokens: int,
) -> Generator[int, None, None]:
    """Sample tokens one by one; the first comes from the prefill's logits, without another decoder pass.

    The first token is yielded before anything else is started: it is what somebody waits for. When a later one is
    yielded, the step that takes it is under way, so the cache then holds its row, too; the last of `max_tokens` is
    yielded without.

    Args:
        decoder: the language model.
        logits: (1, V) after the prompt.
        rows: gives the cache, which holds the prompt's rows and gains one per token; asked after the first token.
        context_ids: the prompt's text ids, for the repetition penalty.
        options: how to sample.
        max_tokens: most tokens to yield, >= 1.

    Yields:
        Token ids.
    """
    if options.seed is not None:
        mx.random.seed(options.seed)
    choose = make_chooser(decoder, context_ids, options)
    token = choose(logits)
    yield cast(int, token.item())
    cache = rows() if max_tokens > 1 else ()
    for count in range(1, max_tokens):
        following = choose(decoder(token[None], cache)[:, -1])
        mx.async_eval(following)
        if count > 1:
            yield cast(int, token.item())
        if count % _RELEASE_EVERY == 0:
            mx.clear_cache()
        token = following
    if max_tokens > 1:
        yield cast(int, token.item())


def make_chooser(
    decoder: Decoder, context_ids: Sequence[int], options: GenerationOptions
) -> Callable[[mx.array], mx.array]:
    """A function from (1, V) logits to a (1,) token that remembers what it chose, for the repetition penalty."""
    sampler = make_token_sampler(options, decoder.vocab_limit)
    processors = make_processors(options)
    seen = mx.array([i for i in context_ids if i < decoder.vocab_limit], dtype=mx.int32)

    def choose(logits: mx.array) -> mx.array:
        nonlocal seen
        for processor in processors:
            logits = processor(seen, logits)
        token = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        if processors:
            seen = mx.concatenate([seen, token.astype(mx.int32)])
        return token

    return choose


def make_token_sampler(options: GenerationOptions, vocabulary: int) -> Sampler:
    """mlx-lm's sampler; a top_k of the whole vocabulary keeps everything, which is its "off"."""
    return make_sampler(
        temp=options.temperature,
        top_p=options.top_p,
        min_p=options.min_p,
        top_k=options.top_k if options.top_k < vocabulary else 0,
    )


def make_processors(options: GenerationOptions) -> list[Processor]:
    """mlx-lm's logits processors, called with all tokens so far and (1, V) logits."""
    if options.repetition_penalty in (None, 1.0):
        return []
    return list(make_logits_processors(repetition_penalty=options.repetition_penalty))
