"""From spans of positions to the first row of logits, in one pass over the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from fastvlm_mlx.decoder import Decoder
from fastvlm_mlx.prompt import ImageSpan, Span

STEP_SIZE = 2048  # positions per pass; longer prompts go in several, so that attention scores stay small


def embed(decoder: Decoder, spans: Sequence[Span], images: Sequence[mx.array]) -> mx.array:
    """Embeddings of a prompt, with each image's own in its place.

    Args:
        decoder: gives the embeddings of the text.
        spans: what stands where.
        images: (N, hidden) embeddings of each image.

    Returns:
        (1, T, hidden) in the decoder's dtype.
    """
    text = [decoder.embed(span.ids) for span in spans if not isinstance(span, ImageSpan)]
    dtype = text[0].dtype if text else decoder.embed([0]).dtype
    rest = iter(text)
    parts = [images[s.index].astype(dtype) if isinstance(s, ImageSpan) else next(rest) for s in spans]
    return mx.concatenate(parts)[None]


def prefill(decoder: Decoder, embeddings: mx.array, cache: list[KVCache], step_size: int = STEP_SIZE) -> mx.array:
    """Run the decoder over a prompt; the head sees the last row only.

    Args:
        decoder: the language model.
        embeddings: (1, T, hidden), T >= 1.
        cache: gains T rows.
        step_size: most positions per pass.

    Returns:
        (1, V) logits after the last position, not evaluated yet.
    """
    total = embeddings.shape[1]
    for start in range(0, total, step_size):
        hidden = decoder.hidden(embeddings[:, start : start + step_size], cache)
        if start + step_size < total:
            mx.eval([entry.state for entry in cache])
    return decoder.head(hidden[:, -1])
