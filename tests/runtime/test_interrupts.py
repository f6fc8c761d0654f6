"""Ctrl-C at the wrong moment: the caller sees it, and what is kept stays whole."""

from __future__ import annotations

import pytest

from fastvlm_mlx import load
from fastvlm_mlx.mlx_lm_parts import KVCache


def test_an_interrupt_between_two_blocks(model, forgetful, monkeypatch):
    """Of a decode step that only the first block took, nothing is kept; the interrupt is what the caller sees."""
    tiny = model("tiny")
    tiny.clear_cache()
    last, original = tiny.decoder.layers[-1], type(tiny.decoder.layers[-1]).__call__

    def interrupted(self, rows, *rest):
        if self is last and rows.shape[1] == 1:
            raise KeyboardInterrupt
        return original(self, rows, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(last), "__call__", interrupted)
        stream = tiny.stream(None, [4, 5, 6], max_tokens=4, ignore_eos=True)
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    right = forgetful(tiny).generate(None, [4, 5, 6], max_tokens=4, ignore_eos=True)
    assert tiny.generate(None, [4, 5, 6], max_tokens=4, ignore_eos=True).token_ids == right.token_ids


def test_an_interrupt_while_rows_are_traded_leaves_the_cache_whole(bundle, monkeypatch):
    """The prefix cache has room for the rows of one block of two, which must not get there."""
    model = load(bundle("tiny"))
    ids = [1 + i % 50 for i in range(200)]
    right = model.generate(None, ids, max_tokens=3, ignore_eos=True).token_ids
    model.clear_cache()
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "to_quantized", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(model.engine.prefixes, "max_bytes", 150_000)
        stream = model.stream(None, ids, max_tokens=3, ignore_eos=True, kv_bits=8)
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert all(len(node.rows) == 2 for node in model.engine.prefixes.nodes())
    assert model.generate(None, ids, max_tokens=3, ignore_eos=True).token_ids == right
