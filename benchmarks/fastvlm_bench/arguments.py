"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastvlm_mlx.errors import InputError


def add_model(parser: argparse.ArgumentParser, vision: Sequence[str] = ("auto", "mlx")) -> None:
    """--model, --vision and --quantize, as `fastvlm_mlx.load` takes them."""
    parser.add_argument("--model", help="bundle folder, name of `fastvlm models`, or org/name (default: embedded)")
    parser.add_argument("--vision", choices=vision, default="auto", help="what runs the vision encoder")
    parser.add_argument("--quantize", type=int, metavar="BITS", help="quantise the decoder after loading")


def parse_list(text: str, option: str) -> tuple[str, ...]:
    """Read "a,b,c".

    Raises:
        InputError: an empty item, or one that is there twice.
    """
    items = tuple(part.strip() for part in text.split(","))
    if not all(items) or len(set(items)) != len(items):
        raise InputError(f"{option} must be a list such as A,B, each once, got {text!r}")
    return items


def parse_bits(text: str, option: str, plain: str) -> tuple[int | None, ...]:
    """Read "4,8,none"; `plain` stands for weights as they are stored.

    Raises:
        InputError: an item that is neither that nor a number.
    """
    items = parse_list(text, option)
    if wrong := [item for item in items if item != plain and not item.isdecimal()]:
        raise InputError(f"{option} must be numbers of bits or {plain}, got {wrong[0]!r}")
    return tuple(None if item == plain else int(item) for item in items)
