"""The prefix cache: what is found, what is kept, what is dropped; no model in sight."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.cache import PrefixCache, common_length, position_keys, token_keys
from fastvlm_mlx.mlx_lm_parts import KVCache
from fastvlm_mlx.prompt import ImageSpan, TextSpan

BLOCKS, HEADS, HEAD_DIM = 2, 2, 4
ROW_BYTES = BLOCKS * 2 * HEADS * HEAD_DIM * 4 + 3 * 8  # keys and values in float32, and the position's key
FIRST, SECOND = b"0123456789abcdef", b"0123456789abcdeX"


def rows_of(ids: list[int]) -> list[KVCache]:
    """Rows that tell the whole prompt up to them, as real ones do: the sum of what came before."""
    sums = np.cumsum([(i + 1) * (n + 1) for n, i in enumerate(ids)]).astype(np.float32)
    caches = []
    for block in range(BLOCKS):
        rows = mx.array(np.broadcast_to(sums[None, None, :, None] + block, (1, HEADS, len(ids), HEAD_DIM)).copy())
        cache = KVCache()
        cache.update_and_fetch(rows, -rows)
        caches.append(cache)
    return caches


def filled(max_bytes: int, *prompts: list[int]) -> PrefixCache:
    cache = PrefixCache(max_bytes)
    for ids in prompts:
        cache.put(token_keys(ids), rows_of(ids))
    return cache


def check(cache: PrefixCache, ids: list[int]) -> int:
    """What is taken is what the prompt's own rows are; returns how many there are."""
    taken, right = cache.take(token_keys(ids), BLOCKS), rows_of(ids)
    count = taken[0].offset
    for found, whole in zip(taken, right, strict=True):
        assert found.offset == count
        if count:
            assert found.keys.shape[2] == count
            assert np.array_equal(np.array(found.keys), np.array(whole.keys[:, :, :count]))
            assert np.array_equal(np.array(found.values), np.array(whole.values[:, :, :count]))
    return count


def sizes(cache: PrefixCache) -> int:
    """The bytes of everything in the tree, added up anew."""
    return sum(node.keys.nbytes + sum(k.nbytes + v.nbytes for k, v in node.rows) for node in cache.nodes())


def test_positions_of_text_and_images_differ():
    spans = (TextSpan((5, 6)), ImageSpan(0, 3), TextSpan((5,)), ImageSpan(1, 2))
    keys = position_keys(spans, [FIRST, SECOND])
    assert keys.shape == (8, 3)
    assert len({row.tobytes() for row in keys}) == 7, "only the two fives are alike"
    assert common_length(keys, position_keys(spans, [FIRST, FIRST])) == 6
    assert common_length(keys, position_keys(spans, [SECOND, SECOND])) == 2
    assert common_length(keys, position_keys(spans[:2], [FIRST])) == 5
    assert np.array_equal(token_keys((5, 6)), position_keys((TextSpan((5, 6)),), []))
    assert position_keys((), []).shape == (0, 3)


def test_the_longest_beginning_is_found_but_never_the_last_position():
    cache = filled(1 << 20, [1, 2, 3, 4, 5], [1, 2, 7])
    assert check(cache, [1, 2, 3, 4, 5]) == 4
    assert check(cache, [1, 2, 3, 4, 5, 6]) == 5
    assert check(cache, [1, 2, 3, 9]) == 3
    assert check(cache, [1, 2]) == 1
    assert check(cache, [1, 2, 7, 7]) == 3
    assert check(cache, [2, 1]) == 0
    assert check(cache, [1]) == 0
    assert cache.match(token_keys([1, 2, 3, 4, 5])) == 5


def test_what_prompts_share_is_kept_once():
    cache = filled(1 << 20, [1, 2, 3, 4])
    assert cache.nbytes == sizes(cache) == 4 * ROW_BYTES
    for ids in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 9]):
        cache.put(token_keys(ids), rows_of(ids))
    assert cache.nbytes == sizes(cache) == 6 * ROW_BYTES
    cache.clear()
    assert (cache.nbytes, sizes(cache), check(cache, [1, 2, 3])) == (0, 0, 0)


def test_what_is_taken_is_the_callers_own():
    cache = filled(1 << 20, [1, 2, 3, 4])
    taken = cache.take(token_keys([1, 2, 3, 4, 5]), BLOCKS)
    for entry in taken:
        entry.update_and_fetch(mx.full((1, HEADS, 3, HEAD_DIM), 7.0), mx.full((1, HEADS, 3, HEAD_DIM), 7.0))
        entry.keys[:, :, 0] = 9.0
    assert check(cache, [1, 2, 3, 4, 5]) == 4


def test_more_rows_than_keys_are_left_out_and_fewer_are_an_error():
    cache = PrefixCache(1 << 20)
    cache.put(token_keys([1, 2]), rows_of([1, 2, 3]))
    assert check(cache, [1, 2, 3, 4]) == 2
    with pytest.raises(AssertionError, match="not computed"):
        cache.put(token_keys([1, 2, 3, 4]), rows_of([1, 2, 3]))


def test_the_least_recently_used_goes_first():
    room = 6 * ROW_BYTES
    cache = filled(room, [1, 1, 1], [2, 2, 2])
    check(cache, [1, 1, 1, 5])  # now the second prompt is the older one
    cache.put(token_keys([3, 3, 3]), rows_of([3, 3, 3]))
    assert cache.nbytes == room
    assert [check(cache, [n] * 4) for n in (1, 2, 3)] == [3, 0, 3]


def test_a_shared_beginning_outlives_its_ends():
    cache = filled(5 * ROW_BYTES, [1, 2, 3, 4], [1, 2, 5])
    assert check(cache, [1, 2, 3, 4, 4]) == 4
    cache.put(token_keys([1, 2, 6, 6]), rows_of([1, 2, 6, 6]))  # 2 + 2 + 1 + 2 rows: the 5 goes, then 3 4
    assert cache.nbytes == sizes(cache) == 4 * ROW_BYTES
    assert [check(cache, ids) for ids in ([1, 2, 3, 4, 4], [1, 2, 5, 5], [1, 2, 6, 6, 6])] == [2, 2, 4]


def test_cuts_let_an_end_go_alone():
    cache = PrefixCache(6 * ROW_BYTES)
    cache.put(token_keys([1, 2, 3, 4, 5]), rows_of([1, 2, 3, 4, 5]), cuts=[2, 4, 5, 9])
    assert check(cache, [1, 2, 3, 4, 5, 6]) == 5
    cache.put(token_keys([8, 8]), rows_of([8, 8]))
    assert check(cache, [1, 2, 3, 4, 5, 6]) == 4


def test_too_large_for_the_room_and_switched_off():
    assert filled(3 * ROW_BYTES, [1, 2, 3, 4]).nbytes == 0
    assert filled(0, [1, 2]).nbytes == 0


def test_what_is_dropped_at_once_is_never_copied(monkeypatch):
    copied, evaluate = [], mx.async_eval

    def watched(nodes: list) -> None:
        copied.extend(rows[0][0].shape[2] for rows in nodes)
        evaluate(nodes)

    monkeypatch.setattr(mx, "async_eval", watched)
    cache = PrefixCache(3 * ROW_BYTES)
    cache.put(token_keys([1, 2, 3, 4, 5, 6]), rows_of([1, 2, 3, 4, 5, 6]), cuts=[2, 5])
    assert copied == [2]
    assert check(cache, [1, 2, 3, 4]) == 2


def test_what_is_forgotten_on_purpose():
    cache = filled(1 << 20, [1, 2, 3, 4], [1, 2, 5], [7])
    cache.drop(token_keys([1, 2, 3, 4]), 4)  # beyond its end
    cache.drop(token_keys([1, 2, 6]), 2)  # which isn't known
    assert [check(cache, [*ids, 0]) for ids in ([1, 2, 3, 4], [1, 2, 5], [7])] == [4, 3, 1]
    cache.drop(token_keys([1, 2, 3, 4]), 3)  # within a piece
    assert [check(cache, [*ids, 0]) for ids in ([1, 2, 3, 4], [1, 2, 5], [7])] == [3, 3, 1]
    cache.drop(token_keys([1, 2, 3]), 1)  # and all that follows
    assert [check(cache, [*ids, 0]) for ids in ([1, 2, 3, 4], [1, 2, 5], [7])] == [1, 1, 1]
    cache.drop(token_keys([1]), 0)
    assert cache.nbytes == sizes(cache) == ROW_BYTES


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_on_purpose_against_a_set_of_all_beginnings(seed):
    dice, cache, known = random.Random(seed), PrefixCache(1 << 30), set()
    for _ in range(80):
        ids = [dice.randrange(3) for _ in range(dice.randrange(1, 10))]
        longest = max((n for n in range(len(ids)) if tuple(ids[:n]) in known), default=0)
        assert check(cache, ids) == longest
        if dice.random() < 0.6:
            cache.put(token_keys(ids), rows_of(ids), cuts=[dice.randrange(10)])
            known |= {tuple(ids[:n]) for n in range(1, len(ids) + 1)}
        else:
            start = dice.randrange(len(ids) + 1)
            cache.drop(token_keys(ids), start)
            gone = tuple(ids[: start + 1])
            known = {old for old in known if len(old) <= start or old[: start + 1] != gone}
        assert cache.nbytes == sizes(cache) == len(known) * ROW_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_random_prompts_against_a_list_of_them(seed):
    """Whatever is put, taken and dropped: rows are right, sizes exact, and without dropping nothing is missed."""
    dice, everything = random.Random(seed), PrefixCache(1 << 30)
    bounded = PrefixCache(dice.randrange(2, 30) * ROW_BYTES)
    known: list[list[int]] = []
    for _ in range(60):
        ids = [dice.randrange(3) for _ in range(dice.randrange(1, 12))]
        longest = max((common_length(token_keys(ids[:-1]), token_keys(old)) for old in known if ids[:-1]), default=0)
        assert check(everything, ids) == longest
        assert check(bounded, ids) <= longest
        for cache in (everything, bounded):
            cache.put(token_keys(ids), rows_of(ids), cuts=[dice.randrange(12)])
            assert cache.nbytes == sizes(cache)
        assert bounded.nbytes <= bounded.max_bytes
        known.append(ids)


def test_who_asked_for_what_and_when():
    """A part of a prompt that somebody asks for is used; what follows on it is as before."""
    cache = filled(1 << 20, [1, 2, 3, 4])
    whole, begun = token_keys([1, 2, 3, 4]), cache.clock
    assert cache.used_since(whole, begun) == 0
    cache.match(whole)
    assert cache.used_since(whole, begun) == 0, "looking is not asking"
    cache.take(token_keys([1, 2, 9, 9]), BLOCKS)
    cache.put(token_keys([1, 2, 9, 9]), rows_of([1, 2, 9, 9]))
    assert cache.used_since(whole, begun) == 2
    assert cache.used_since(token_keys([1, 2, 9, 9]), begun) == 4
    assert (cache.older_than(whole, begun), cache.older_than(token_keys([1, 2, 9, 9]), begun)) == (4, 2)
    now = cache.clock
    assert cache.use(whole) == 4
    assert cache.used_since(whole, now) == 4
    now = cache.clock
    cache.take(whole, BLOCKS)
    assert cache.used_since(whole, now) == 4, "the last position is computed again, and wanted all the same"
