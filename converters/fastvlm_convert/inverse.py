"""A layout's rules the other way round: from the LLaVA names to the layout's own, so that it can be written.

Rules are data (fastvlm_convert.keymap), so one list serves both ways. A rule is turned round by taking its two
sides apart into fixed text and groups: each group keeps what it matches, an optional part is left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import mlx.core as mx

from fastvlm_convert.keymap import DROP, VISION, Layout, Rule

Piece = str | int  # fixed text, or the number of a group
_GROUP_OF_TEMPLATE = re.compile(r"\\(\d)|\\g<(\d+)>")


def invert(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Turn rules round; those that drop a tensor have nothing to turn.

    Raises:
        ValueError: a rule isn't made of fixed text, groups and optional parts.
    """
    return tuple(_invert(rule) for rule in rules if rule.replacement != DROP)


def own_name(name: str, layout: Layout) -> str | None:
    """What a layout calls the tensor of a LLaVA name; None where it has no place for it."""
    for pattern, replacement in _compiled(layout):
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return None


def own_shape(name: str, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape that a layout gives a tensor which PyTorch lays out as `shape`."""
    axes = _axes(name, len(shape), layout)
    return tuple(shape[axis] for axis in axes) if axes else shape


def own_order(name: str, rank: int, layout: Layout) -> Callable[[mx.array], mx.array]:
    """How a tensor of `rank` axes gets from PyTorch's order into a layout's."""
    axes = _axes(name, rank, layout)
    return (lambda value: mx.contiguous(value.transpose(axes))) if axes else lambda value: value


def _axes(name: str, rank: int, layout: Layout) -> tuple[int, ...]:
    """(O, I, H, W) -> (O, H, W, I), and (C, 1, 1) -> (1, 1, C); () where nothing moves."""
    if not (layout.channels_last and name.startswith(VISION)):
        return ()
    return {4: (0, 2, 3, 1), 3: (2, 1, 0)}.get(rank, ())


@functools.cache
def _compiled(layout: Layout) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(rule.pattern), rule.replacement) for rule in invert(layout.rules))


def _invert(rule: Rule) -> Rule:
    pieces, groups = _take_apart(rule.pattern)
    order: list[int] = []  # of the groups in the new pattern
    pattern = ""
    for piece in _template(rule.replacement):
        if isinstance(piece, int):
            order.append(piece)
        pattern += f"({groups[piece]})" if isinstance(piece, int) else re.escape(piece)
    if sorted(order) != sorted(groups):
        raise ValueError(f"{rule.pattern} can't be turned round: {rule.replacement} doesn't have each group once")
    return Rule(pattern, "".join(p if isinstance(p, str) else rf"\g<{order.index(p) + 1}>" for p in pieces))


def _template(text: str) -> list[Piece]:
    """A replacement's fixed text and groups."""
    pieces: list[Piece] = []
    end = 0
    for match in _GROUP_OF_TEMPLATE.finditer(text):
        pieces += [text[end : match.start()], int(match[1] or match[2])]
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece != ""]


def _take_apart(pattern: str) -> tuple[list[Piece], dict[int, str]]:
    """A pattern's fixed text and groups, and what each group matches."""
    pieces: list[Piece] = []
    groups: dict[int, str] = {}
    place = 0
    while place < len(pattern):
        letter = pattern[place]
        if letter == "(":
            end = _closing(pattern, place)
            inside = pattern[place + 1 : end]
            optional = inside.startswith("?:") and pattern[end + 1 : end + 2] == "?"
            if not optional and ("?:" in inside[:2] or re.search(r"\((?!\?:)", inside)):
                raise ValueError(f"{pattern} can't be turned round at {pattern[place : end + 1]}")
            if not optional:
                groups[len(groups) + 1] = inside
                pieces.append(len(groups))
            place = end + 1 + optional
            continue
        escaped = letter == "\\"
        place += 1 + escaped
        letter = pattern[place - 1]
        if letter.isalnum() == escaped and letter not in "_-":
            raise ValueError(f"{pattern} can't be turned round at {pattern[place - 1 :]}")
        pieces.append(letter)
    return pieces, groups


def _closing(pattern: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(pattern)):
        if pattern[place - 1 : place] != "\\":
            depth += {"(": 1, ")": -1}.get(pattern[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"{pattern} has a bracket that isn't closed")
