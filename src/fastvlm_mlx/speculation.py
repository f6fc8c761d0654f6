"""Speculative decoding: a smaller model proposes tokens, one pass of the larger one accepts or replaces them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.errors import ConfigError, EncoderError, InputError
from fastvlm_mlx.generation import make_chooser, make_token_sampler
from fastvlm_mlx.prompt import TextSpan, check_context
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.vision.anyres import NO_NEWLINE

if TYPE_CHECKING:
    from fastvlm_mlx.core import Core
    from fastvlm_mlx.engine import Engine, Prefilled
    from fastvlm_mlx.pictures import Picture
    from fastvlm_mlx.prompt import Span
    from fastvlm_mlx.types import Draft, GenerationOptions


def check_draft(model: Core, draft: Draft, spans: Sequence[Span], pictures: Sequence[Picture]) -> None:
    """Check that a draft can propose, before anything is computed.

    Args:
        model: decides.
        draft: proposes.
        spans: the prompt.
        pictures: its images.

    Raises:
        InputError: the two mean different things by an id, or make other positions of an image. EncoderError: there
            are images and the draft has no encoder. ContextLengthError: the prompt is too long for the draft.
            ConfigError: images are in tiles that it can't merge.
    """
    if model.tokenizer is None or draft.tokenizer is None or not model.tokenizer.same_as(draft.tokenizer):
        raise InputError("a draft needs the same tokenizer as the model; choose a smaller model of the same family")
    if pictures and draft.engine.vision.encoder is None:
        raise EncoderError(
            "the draft has no vision weights for MLX and the prompt shows an image; convert the draft from its "
            "PyTorch checkpoint, or leave it out"
        )
    if pictures and draft.config.downsampling != model.config.downsampling:
        raise InputError(
            f"the draft makes a position of {draft.config.downsampling} pixels a side, the model of "
            f"{model.config.downsampling}; choose a draft with the same kind of vision encoder"
        )
    if any(picture.needs_newline for picture in pictures) and draft.engine.vision.projector.newline is None:
        raise ConfigError(f"the draft can't see these images: {NO_NEWLINE}; or leave the draft out")
    check_context(spans, draft.config.context_length)
    known = draft.config.decoder.vocab_size
    largest = max((token for span in spans if isinstance(span, TextSpan) for token in span.ids), default=0)
    if largest >= known:
        raise InputError(f"the prompt has the id {largest}, the draft knows {known}; choose another draft")


def speculate(
    engine: Engine,
    prompt: Prefilled,
    drafts: Engine,
    spans: Sequence[Span],
    pictures: Sequence[Picture],
    options: GenerationOptions,
    max_tokens: int,
) -> Generator[int, None, None]:
    """Sample tokens as `generation.generate_tokens` does, the first before the draft sees the prompt.

    Args:
        engine: of the model that decides.
        prompt: what it has seen.
        drafts: of the model that proposes.
        spans: the prompt, for the draft to see too.
        pictures: its images.
        options: how to sample, and how many tokens to propose at a time.
        max_tokens: most tokens to yield, >= 1.

    Yields:
        Token ids. When it ends or is closed, the caches hold no row of a token that was not yielded.
    """
    if options.seed is not None:
        mx.random.seed(options.seed)
    first = make_chooser(engine.decoder, prompt.text_ids, options)(prompt.logits)
    taken = [cast(int, first.item())]
    yield taken[0]
    if max_tokens == 1:
        return
    from mlx_lm.generate import speculative_generate_step  # imports transformers, a second or more

    seen = drafts.prefill(spans, pictures, replace(options, progress=None), Clock())
    steps = speculative_generate_step(
        first,
        cast(nn.Module, engine.decoder),
        cast(nn.Module, drafts.decoder),
        num_draft_tokens=options.num_draft_tokens,
        max_tokens=max_tokens - 1,
        sampler=make_token_sampler(options, engine.decoder.vocab_limit),
        prompt_cache=[*prompt.cache, *seen.cache],
    )
    try:
        for token, _, _ in steps:
            taken.append(int(token))
            yield taken[-1]
    finally:
        steps.close()  # trims the rows of proposals that were not accepted
        drafts.keep(seen, taken)
