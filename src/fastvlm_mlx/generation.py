"""From the first row of logits to tokens: mlx-lm's samplers and its decode loop, on our prefilled cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from fastvlm_mlx.decoder import Decoder
from fastvlm_mlx.types import GenerationOptions

Processor = Callable[[mx.array, mx.array], mx.array]
Sampler = Callable[[mx.array], mx.array]


@contextmanager
def resident(decoder: Decoder) -> Iterator[None]:
    """Keep a model that nearly fills a Mac's memory from being paged out while it generates; else a no-op."""
    with ExitStack() as stack:
        with redirect_stdout(sys.stderr):  # where mlx-lm prints its warning; stdout is for answers
            # The step after the last token may still be running on mlx-lm's stream when the answer ends.
            stack.enter_context(wired_limit(decoder.network, [cast(mx.Stream, generation_stream)]))
        yield


def generate_tokens(
    decoder: Decoder,
    logits: mx.array,
    cache: list[KVCache],
    context_ids: Sequence[int],
    options: GenerationOptions,
    max_tokens: int,
) -> Iterator[int]:
    """Sample tokens one by one; the first comes from the prefill's logits, without another decoder pass.

    The step after a token is under way when that token is yielded, so the cache may hold one row more than
    the tokens that were taken.

    Args:
        decoder: the language model.
        logits: (1, V) after the prompt.
        cache: holds the prompt's rows; gains one per token.
        context_ids: the prompt's text ids, for the repetition penalty.
        options: how to sample.
        max_tokens: most tokens to yield, >= 1.

    Yields:
        Token ids.
    """
    if options.seed is not None:
        mx.random.seed(options.seed)
    sampler = _sampler(options, decoder.vocab_limit)
    processors = _processors(options, [i for i in context_ids if i < decoder.vocab_limit])
    for processor in processors:
        logits = processor(mx.array([], dtype=mx.int32), logits)
    token = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    yield cast(int, token.item())
    if max_tokens > 1:
        steps = generate_step(
            token,
            cast(nn.Module, decoder),  # it is called like one, and is no more than that here
            max_tokens=max_tokens - 1,
            sampler=sampler,
            logits_processors=processors,
            prompt_cache=cache,
        )
        for token_id, _ in steps:
            yield cast(int, token_id)


def _sampler(options: GenerationOptions, vocabulary: int) -> Sampler:
    """mlx-lm's sampler; a top_k of the whole vocabulary keeps everything, which is its "off"."""
    return make_sampler(
        temp=options.temperature,
        top_p=options.top_p,
        min_p=options.min_p,
        top_k=options.top_k if options.top_k < vocabulary else 0,
    )


def _processors(options: GenerationOptions, context_ids: Sequence[int]) -> list[Processor]:
    """mlx-lm's logits processors, which then see the prompt's text before what was generated."""
    if options.repetition_penalty in (None, 1.0):
        return []
    before = mx.array(list(context_ids), dtype=mx.int32)

    def with_prompt(processor: Processor) -> Processor:
        return lambda tokens, logits: processor(mx.concatenate([before, tokens.astype(mx.int32)]), logits)

    return [with_prompt(p) for p in make_logits_processors(repetition_penalty=options.repetition_penalty)]
