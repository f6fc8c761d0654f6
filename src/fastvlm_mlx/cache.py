"""What the decoder has computed before: keys and values by what stands at each position.

A position is a token's id, or one of an image's: the digest of its pixels and its number within the image. Prompts
that begin alike share those positions' rows, whatever comes after. They are kept as a tree whose branches part
where prompts do, so nothing is kept twice and the size is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from fastvlm_mlx.decoder import LayerCache
from fastvlm_mlx.mlx_lm_parts import KVCache
from fastvlm_mlx.prompt import ImageSpan, Span

DIGEST_BYTES = 16  # of an image's pixels
_TEXT = -1  # in place of a position's number within its image
Rows = list[tuple[mx.array, mx.array]]  # keys and values of each block, (1, heads, T, head_dim)


def position_keys(spans: Sequence[Span], digests: Sequence[bytes]) -> np.ndarray:
    """What stands at each position, comparable row by row.

    Args:
        spans: the prompt.
        digests: DIGEST_BYTES of each image.

    Returns:
        (T, 3) int64: a token's id, 0, -1; or the two halves of an image's digest and the position's number in it.
    """
    parts = []
    for span in spans:
        part = np.zeros((len(span), 3), np.int64)
        if isinstance(span, ImageSpan):
            part[:, :2] = np.frombuffer(digests[span.index], np.int64)
            part[:, 2] = np.arange(len(span))
        else:
            part[:, 0], part[:, 2] = span.ids, _TEXT
        parts.append(part)
    return np.concatenate(parts) if parts else np.zeros((0, 3), np.int64)


def token_keys(ids: Sequence[int]) -> np.ndarray:
    """As `position_keys`, of generated tokens."""
    return np.stack([np.array(ids, np.int64), np.zeros(len(ids), np.int64), np.full(len(ids), _TEXT)], axis=1)


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many positions two prompts begin with in common."""
    length = min(len(first), len(second))
    differ = np.flatnonzero((first[:length] != second[:length]).any(axis=1))
    return int(differ[0]) if len(differ) else length


class Node:
    """Consecutive positions after which prompts part, or end.

    Attributes:
        keys: (T, 3), see `position_keys`.
        rows: keys and values of these positions.
        parent: None for the root, which has no positions.
        children: by the first of their keys.
        used: when it was last asked for; larger is later.
        made: when it was first kept.
    """

    __slots__ = ("children", "keys", "made", "parent", "rows", "used")

    def __init__(self, keys: np.ndarray, rows: Rows, parent: Node | None, used: int, made: int) -> None:
        self.keys, self.rows, self.parent, self.used, self.made = keys, rows, parent, used, made
        self.children: dict[bytes, Node] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its rows and keys."""
        return self.keys.nbytes + sum(k.nbytes + v.nbytes for k, v in self.rows)


class PrefixCache:
    """Rows of earlier prompts and answers, at most so many bytes, the least recently used dropped first.

    Args:
        max_bytes: of all rows and keys; 0 keeps nothing.

    Attributes:
        clock: how often something was asked for or kept; nodes are marked with it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.clock = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._root = Node(np.zeros((0, 3), np.int64), [], None, 0, 0)
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return self._nbytes

    def match(self, keys: np.ndarray) -> int:
        """How many of the first positions are known."""
        return sum(length for _, length in self._walk(keys))

    def use(self, keys: np.ndarray) -> int:
        """As `match`, for somebody who will want them."""
        found = self._walk(keys)
        self._mark(found)
        return sum(length for _, length in found)

    def used_since(self, keys: np.ndarray, clock: int) -> int:
        """How many of the first positions somebody asked for after a moment of `clock`."""
        found = itertools.takewhile(lambda step: step[0].used > clock, self._walk(keys))
        return sum(length for _, length in found)

    def older_than(self, keys: np.ndarray, clock: int) -> int:
        """How many of the first positions were known at a moment of `clock`."""
        found = itertools.takewhile(lambda step: step[0].made <= clock, self._walk(keys))
        return sum(length for _, length in found)

    def take(self, keys: np.ndarray, blocks: int) -> list[KVCache]:
        """A cache that holds the rows of the longest known beginning, without the last position.

        The last position is always left to compute: somebody wants to know what comes after it.

        Args:
            keys: of the whole prompt, at least one.
            blocks: of the decoder.

        Returns:
            A cache for each block, the caller's own: what he appends changes nothing here.
        """
        self._mark(self._walk(keys))
        found = self._walk(keys[:-1])
        caches = [KVCache() for _ in range(blocks)]
        for index, cache in enumerate(caches if found else ()):
            parts = [(node.rows[index], length) for node, length in found]
            cache.keys = _joined([rows[0][:, :, :length] for rows, length in parts])
            cache.values = _joined([rows[1][:, :, :length] for rows, length in parts])
            cache.offset = cache.keys.shape[2]
        return caches

    def put(self, keys: np.ndarray, caches: Sequence[LayerCache], cuts: Sequence[int] = ()) -> None:
        """Keep the rows of a prompt's first positions.

        Args:
            keys: of the positions to keep; the caches hold a row for each, or more.
            caches: plain ones (not quantised, not rotating), one for each block.
            cuts: positions at which what is kept may be cut when room is needed, such as where an image ends.
        """
        if not self.max_bytes or not len(keys):
            return
        assert all(len(node.rows) == len(caches) for node in self._root.children.values()), "rows of all blocks"
        found = self._walk(keys)
        used = self._mark(found)
        start = sum(length for _, length in found)
        node = found[-1][0] if found else self._root
        if found and found[-1][1] < len(node.keys):
            node = self._split(node, found[-1][1])
            node.used = used
        new = []
        for first, last in itertools.pairwise([start, *(c for c in sorted(cuts) if start < c < len(keys)), len(keys)]):
            rows = [_slice(cache, first, last) for cache in caches] if last > first else []
            if rows:
                node = self._attach(node, keys[first:last].copy(), rows, used, used)
                new.append(node)
        self._shrink()
        # Now, or they would hold the caller's whole buffers; what was dropped at once is never copied.
        mx.async_eval([node.rows for node in new if _is_kept(node)])

    def drop(self, keys: np.ndarray, start: int) -> None:
        """Forget the rows of a prompt from a position on, and all that follows on them.

        Args:
            keys: of the prompt, as they were kept.
            start: the first position to forget.
        """
        first = 0
        for node, length in self._walk(keys):
            if first + length <= start:
                first += length
                continue
            if first < start:
                head = self._split(node, start - first)
                (node,) = head.children.values()
            self._nbytes -= sum(gone.nbytes for gone in self._below(node))
            assert node.parent
            del node.parent.children[node.keys[0].tobytes()]
            return

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents before their children."""
        for node in self._root.children.values():
            yield from self._below(node)

    def _below(self, node: Node) -> Iterator[Node]:
        """A node and all that follow on it."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def _walk(self, keys: np.ndarray) -> list[tuple[Node, int]]:
        """The nodes that a prompt runs through, and how many positions of each it shares."""
        found: list[tuple[Node, int]] = []
        node, start = self._root, 0
        while start < len(keys):
            child = node.children.get(keys[start].tobytes())
            if child is None:
                break
            length = common_length(child.keys, keys[start:])
            found.append((child, length))
            start += length
            if length < len(child.keys):
                break
            node = child
        return found

    def _mark(self, found: list[tuple[Node, int]]) -> int:
        """Nodes are used now, and not one of which only a part is: `put` cuts it and marks that part."""
        self.clock += 1
        for node, length in found:
            if length == len(node.keys):
                node.used = self.clock
        return self.clock

    def _attach(self, parent: Node, keys: np.ndarray, rows: Rows, used: int, made: int) -> Node:
        node = Node(keys, rows, parent, used, made)
        parent.children[keys[0].tobytes()] = node
        self._nbytes += node.nbytes
        return node

    def _split(self, node: Node, length: int) -> Node:
        """Cut a node in two; returns the first part, which has its place."""
        assert node.parent
        self._nbytes -= node.nbytes
        times, end = (node.used, node.made), len(node.keys)
        head = self._attach(node.parent, node.keys[:length].copy(), _part(node.rows, 0, length), *times)
        tail = self._attach(head, node.keys[length:].copy(), _part(node.rows, length, end), *times)
        tail.children = node.children
        for child in tail.children.values():
            child.parent = tail
        mx.eval(head.rows, tail.rows)  # or they would hold the whole of what was cut
        return head

    def _shrink(self) -> None:
        """Drop what was used longest ago until the rest fits; what others follow on stays as long as they do."""
        while self._nbytes > self.max_bytes:
            leaf = min((n for n in self.nodes() if not n.children), key=lambda n: n.used)
            assert leaf.parent
            del leaf.parent.children[leaf.keys[0].tobytes()]
            self._nbytes -= leaf.nbytes


def _is_kept(node: Node) -> bool:
    """Whether a node of the tree is still in it; the root isn't asked for."""
    assert node.parent
    return node.parent.children.get(node.keys[0].tobytes()) is node


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _slice(cache: LayerCache, first: int, last: int) -> tuple[mx.array, mx.array]:
    """A copy of some rows: a slice alone would keep the whole buffer alive."""
    assert isinstance(cache, KVCache)
    assert cache.keys is not None
    assert cache.values is not None
    assert last <= cache.offset, "rows that were not computed"
    return _part([(cache.keys, cache.values)], first, last)[0]


def _part(rows: Rows, first: int, last: int) -> Rows:
    return [(mx.contiguous(k[:, :, first:last]), mx.contiguous(v[:, :, first:last])) for k, v in rows]
