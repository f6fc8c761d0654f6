"""Which parts of a conversation a full context does without."""

from __future__ import annotations

from collections.abc import Sequence


def first_to_go(sizes: Sequence[int], illustrated: Sequence[bool], room: int) -> tuple[int, ...]:
    """Which exchanges are left out so that the others fit: the oldest, those with pictures only if they must.

    Args:
        sizes: positions of each exchange.
        illustrated: whether it shows pictures.
        room: positions for all of them; may be negative, then all are left out.
    """
    texts = [number for number, shows in enumerate(illustrated) if not shows]
    pictured = [number for number, shows in enumerate(illustrated) if shows]
    for gone in range(len(pictured) + 1):
        out = pictured[:gone]
        over = sum(sizes) - sum(sizes[number] for number in out) - room
        for number in texts:
            if over <= 0:
                break
            out.append(number)
            over -= sizes[number]
        if over <= 0:
            return tuple(sorted(out))
    return tuple(range(len(sizes)))
