"""Keys and values in fewer bits, and in a cache that forgets."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.errors import ContextLengthError, InputError
from fastvlm_mlx.mlx_lm_parts import KVCache, QuantizedKVCache
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import GenerationOptions

RED = np.full((64, 48, 3), (255, 0, 0), np.uint8)
GREEDY = {"max_tokens": 5, "ignore_eos": True, "resolution": 128}  # 4 tokens an image
BEFORE, AFTER = [5, 6, 7], [8, 9]


def caches_of(model, monkeypatch):
    """The caches of the decoder's passes over single tokens, as they come."""
    seen = []
    original = type(model.decoder).__call__

    def watched(self, ids, cache=None):
        seen.extend(cache)
        return original(self, ids, cache)

    monkeypatch.setattr(type(model.decoder), "__call__", watched)
    return seen


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_keys_and_values(tiny, bits, monkeypatch):
    """The first token is that of full width; later ones are those that rows rounded to the width give."""
    ids, most = [*BEFORE, -200, *AFTER], 12
    plain = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most})
    seen = caches_of(tiny, monkeypatch)
    result = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most, "kv_bits": bits})
    assert {type(entry) for entry in seen} == {QuantizedKVCache}
    assert {(entry.bits, entry.group_size) for entry in seen} == {(bits, 32)}
    assert result.token_ids[0] == plain.token_ids[0]
    assert result.token_ids == decoded(tiny, ids, most, lambda entry: Rounded(entry, bits))
    again = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most, "kv_bits": bits})
    assert again.token_ids == result.token_ids
    assert again.cached_tokens == 8


def test_group_sizes(tiny, speaking_model, monkeypatch):
    """Left out it fits the head; one that doesn't is refused with those that do."""
    for asked, expected in ((None, 32), (32, 32)):
        seen = caches_of(speaking_model, monkeypatch)
        speaking_model.generate(RED, "Hi", max_tokens=3, ignore_eos=True, kv_bits=8, kv_group_size=asked)
        assert {entry.group_size for entry in seen} == {expected}
    with pytest.raises(InputError, match="must divide the head's size, 32; choose 32"):
        tiny.generate(RED, [1, -200], **GREEDY | {"kv_bits": 4, "kv_group_size": 128})
    for wrong in ({"kv_bits": 5}, {"kv_group_size": 7}, {"max_kv_size": 0}, {"kv_bits": 4, "max_kv_size": 50}):
        with pytest.raises(InputError):
            tiny.generate(RED, [1, -200], **GREEDY | wrong)


def test_fewer_bits_take_less_memory(bundle):
    """While it decodes nothing holds the full width, without a prefix cache; a bounded one is no larger than plain."""
    model = load(bundle("tiny"), prefix_cache_bytes=0)
    ids = [1 + i % 50 for i in range(1500)]

    def memory(**options):
        stream = model.stream(None, ids, max_tokens=4, ignore_eos=True, **options)
        next(stream), next(stream)
        mx.synchronize()  # a step under way holds rows from before it, too
        held = mx.get_active_memory()
        stream.close()
        return held

    weights = mx.get_active_memory()
    plain = memory() - weights
    assert plain > 500_000, "the rows are what is measured"
    assert memory(kv_bits=8) - weights < 0.5 * plain
    assert memory(kv_bits=4) - weights < 0.3 * plain
    assert memory(max_kv_size=1504) - weights < 1.1 * plain


class Rounded(KVCache):
    """The same, slowly: every row as `mx.dequantize` gives it back."""

    def __init__(self, entry, bits):
        super().__init__()
        self.width = bits
        self.update_and_fetch(*(rows[:, :, : entry.offset] for rows in (entry.keys, entry.values)))

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(self._rounded(keys), self._rounded(values))

    def _rounded(self, rows):
        return mx.dequantize(*mx.quantize(rows, group_size=32, bits=self.width), group_size=32, bits=self.width)


def test_a_bounded_cache_keeps_the_prompt_and_the_latest_tokens(tiny):
    ids, most = [*BEFORE, -200, *AFTER], 30
    plain = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most})
    enough = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most, "max_kv_size": 9 + most})
    assert enough.token_ids == plain.token_ids
    tight = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most, "max_kv_size": 16})
    assert tight.token_ids[:8] == plain.token_ids[:8]
    assert tight.token_ids == decoded(tiny, ids, most, lambda entry: Windowed(entry, 16))
    with pytest.raises(ContextLengthError, match="max_kv_size is 9"):
        tiny.generate(RED, ids, **GREEDY | {"max_kv_size": 9})


class Windowed(KVCache):
    """The same, slowly: before a row comes that is too many, the oldest one after the prompt is cut out."""

    def __init__(self, entry, size):
        super().__init__()
        self.offset, self.kept, self.most = entry.offset, entry.offset, size
        self.keys, self.values = (rows[:, :, : entry.offset] for rows in (entry.keys, entry.values))

    def update_and_fetch(self, keys, values):
        self.keys, self.values = self._with(self.keys, keys), self._with(self.values, values)
        self.offset += 1
        return self.keys, self.values

    def _with(self, rows, new):
        if rows.shape[2] == self.most:
            rows = mx.concatenate([rows[:, :, : self.kept], rows[:, :, self.kept + 1 :]], axis=2)
        return mx.concatenate([rows, new], axis=2)


def decoded(model, ids, most, cache_of):
    """Greedy ids on caches that are made of the prompt's."""
    spans = model.expand(ids, [4])
    prompt = model.engine.prefill(spans, model.open_images([RED], 128, "pad", Clock()), GenerationOptions(), Clock())
    cache = [cache_of(entry) for entry in prompt.cache]
    taken = [int(mx.argmax(prompt.logits).item())]
    while len(taken) < most:
        taken.append(int(mx.argmax(model.decoder(mx.array([taken[-1:]]), cache)).item()))
    return tuple(taken)
