"""Keys and values in fewer bits, and in a cache that forgets."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.engine import _kept_as_asked
from fastvlm_mlx.errors import ContextLengthError, InputError
from fastvlm_mlx.mlx_lm_parts import KVCache
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import GenerationOptions
from support.seeded import relative_l2

RED = np.full((64, 48, 3), (255, 0, 0), np.uint8)
GREEDY = {"max_tokens": 5, "ignore_eos": True, "resolution": 128}  # 4 tokens an image
BEFORE, AFTER = [5, 6, 7], [8, 9]


@pytest.fixture
def tiny(model):
    fresh = model("tiny")
    fresh.clear_cache()
    return fresh


def test_quantised_keys_and_values(tiny):
    """The first token is that of full width; later ones see rows that are off by the width's rounding."""
    plain = tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY)
    for bits in (8, 4):
        options = GREEDY | {"kv_bits": bits, "kv_group_size": 32}
        result = tiny.generate(RED, [*BEFORE, -200, *AFTER], **options)
        assert result.token_ids[0] == plain.token_ids[0]
        again = tiny.generate(RED, [*BEFORE, -200, *AFTER], **options)
        assert again.token_ids == result.token_ids
        assert again.cached_tokens == 8
    with pytest.raises(InputError, match="doesn't divide"):
        tiny.generate(RED, [1, -200], **GREEDY | {"kv_bits": 4, "kv_group_size": 128})
    for wrong in ({"kv_bits": 5}, {"kv_group_size": 7}, {"max_kv_size": 0}, {"kv_bits": 4, "max_kv_size": 50}):
        with pytest.raises(InputError):
            tiny.generate(RED, [1, -200], **GREEDY | wrong)


def test_quantised_rows_are_the_rows_rounded(tiny):
    """One decode step on 8 bits against the same step on the rows as `mx.dequantize` gives them."""
    keys = tiny.decoder.embed(range(40))[None]
    cache = tiny.decoder.new_cache()
    tiny.decoder.hidden(keys, cache)
    options = GenerationOptions(kv_bits=8, kv_group_size=32)
    rounded = []
    for entry in _kept_as_asked(cache, options):
        plain = KVCache()
        plain.update_and_fetch(
            *(mx.dequantize(*rows, group_size=32, bits=8)[:, :, :40] for rows in (entry.keys, entry.values))
        )
        rounded.append(plain)
    token = mx.array([[7]])
    full = tiny.decoder(token, cache)
    found, right = tiny.decoder(token, _kept_as_asked(_trimmed(cache), options)), tiny.decoder(token, rounded)
    assert relative_l2(found, np.array(full)) <= 5e-2
    assert relative_l2(found, np.array(full)) > 1e-5, "it isn't full width"
    # the new row itself is rounded in one and not in the other
    assert relative_l2(found, np.array(right)) <= 2e-2


def _trimmed(cache):
    for entry in cache:
        entry.trim(1)
    return cache


def test_a_bounded_cache_keeps_the_prompt_and_the_latest_tokens(tiny):
    ids, most = [*BEFORE, -200, *AFTER], 30
    plain = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most})
    enough = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most, "max_kv_size": 9 + most})
    assert enough.token_ids == plain.token_ids
    tight = tiny.generate(RED, ids, **GREEDY | {"max_tokens": most, "max_kv_size": 16})
    assert tight.token_ids[:8] == plain.token_ids[:8]
    assert tight.token_ids == windowed(tiny, ids, most, 16)
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


def windowed(model, ids, most, size):
    spans = model.expand(ids, [4])
    prompt = model.engine.prefill(spans, model.open_images([RED], 128, "pad", Clock()), GenerationOptions(), Clock())
    cache = [Windowed(entry, size) for entry in prompt.cache]
    taken = [int(mx.argmax(prompt.logits).item())]
    while len(taken) < most:
        taken.append(int(mx.argmax(model.decoder(mx.array([taken[-1:]]), cache)).item()))
    return tuple(taken)
