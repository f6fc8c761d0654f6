"""Counts what a model computes: images encoded, decoder passes and rows, rows of the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import pytest

from fastvlm_mlx import FastVLM


@dataclass
class Work:
    """What was computed since it was made."""

    images: int = 0
    passes: list[int] = field(default_factory=list)  # the rows of each pass over embeddings; not the decode steps
    head_rows: int = 0
    logits: list[mx.array] = field(default_factory=list)  # of the prefills

    @property
    def rows(self) -> int:
        return sum(self.passes)


@contextmanager
def counted(model: FastVLM) -> Iterator[Work]:
    """Count the work of a model; decode steps of generated tokens are left out."""
    work, decoder, encoder = Work(), model.decoder, model.engine.vision.encoder
    assert encoder
    encode, hidden, head = encoder.encode, decoder.hidden, decoder.head
    prefilling = [False]

    def watched_encode(pixels):
        work.images += len(pixels)
        return encode(pixels)

    def watched_hidden(embeddings, cache):
        work.passes.append(embeddings.shape[1])
        prefilling[0] = True
        return hidden(embeddings, cache)

    def watched_head(rows):
        logits = head(rows)
        if prefilling[0]:  # the decode steps don't go through `hidden`
            work.head_rows += rows.size // rows.shape[-1]
            work.logits.append(logits)
            prefilling[0] = False
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "encode", watched_encode)
        patch.setattr(decoder, "hidden", watched_hidden)
        patch.setattr(decoder, "head", watched_head)
        yield work
