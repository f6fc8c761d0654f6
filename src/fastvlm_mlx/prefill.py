"""From spans of positions to the first row of logits, in one pass over the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx

from fastvlm_mlx.decoder import Decoder, LayerCache
from fastvlm_mlx.prompt import ImageSpan, Span, TextSpan
from fastvlm_mlx.types import PREFILL_STEP

Progress = Callable[[int, int], object]  # positions that are done, and all


def located(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with the position that it begins at."""
    start = 0
    for span in spans:
        yield start, span
        start += len(span)


def embed(
    decoder: Decoder,
    spans: Sequence[Span],
    images: Mapping[int, mx.array] | Sequence[mx.array],
    start: int = 0,
    stop: int | None = None,
) -> mx.array:
    """Embeddings of a prompt, with each image's own in its place.

    Args:
        decoder: gives the embeddings of the text.
        spans: what stands where.
        images: (N, hidden) embeddings of each image that stands there, by its index.
        start: first position.
        stop: position after the last, by default the prompt's length.

    Returns:
        (1, stop - start, hidden) in the decoder's dtype.
    """
    parts: list[mx.array] = []
    dtype = decoder.embed([0]).dtype
    for begin, span in located(spans):
        first, last = max(start - begin, 0), len(span) if stop is None else min(stop - begin, len(span))
        if first >= last:
            continue
        if isinstance(span, TextSpan):
            parts.append(decoder.embed(span.ids[first:last]))
        else:
            parts.append(images[span.index][first:last].astype(dtype))
    return mx.concatenate(parts)[None]


def prefill(
    decoder: Decoder,
    embeddings: mx.array,
    cache: Sequence[LayerCache],
    step_size: int = PREFILL_STEP,
    progress: Progress | None = None,
) -> mx.array:
    """Run the decoder over a prompt; the head sees the last row only.

    Args:
        decoder: the language model.
        embeddings: (1, T, hidden), T >= 1.
        cache: gains T rows.
        step_size: most positions per pass.
        progress: called with the positions in the cache, and with those that it will hold in the end.

    Returns:
        (1, V) logits after the last position, not evaluated yet.
    """
    total = cache[0].offset + embeddings.shape[1]
    logits = decoder.head(fill(decoder, embeddings, cache, step_size, progress)[:, -1])
    if progress:
        mx.eval(logits)
        progress(total, total)
    return logits


def fill(
    decoder: Decoder,
    embeddings: mx.array,
    cache: Sequence[LayerCache],
    step_size: int = PREFILL_STEP,
    progress: Progress | None = None,
) -> mx.array:
    """`prefill` without the head.

    Returns:
        (1, t, hidden) of the last pass, not evaluated yet.
    """
    known, total = cache[0].offset, embeddings.shape[1]
    report = progress or (lambda *_: None)
    report(known, known + total)
    for start in range(0, total, step_size):
        hidden = decoder.hidden(embeddings[:, start : start + step_size], cache)
        if start + step_size < total:
            mx.eval([entry.state for entry in cache])
            report(known + start + step_size, known + total)
    return hidden


def image_starts(spans: Sequence[Span]) -> dict[int, int]:
    """The position that each image begins at, by its index."""
    return {span.index: start for start, span in located(spans) if isinstance(span, ImageSpan)}
