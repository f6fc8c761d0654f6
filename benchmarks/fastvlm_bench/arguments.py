"""Arguments that several commands have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

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


def check_target(option: str, path: Path) -> None:
    """Find out before minutes of measuring whether a report can be written.

    Args:
        option: that names the file, such as "--json".
        path: the file; folders above it may be missing, `fastvlm_mlx.files.write_text` makes them.

    Raises:
        InputError: it is there and is no ordinary file, what is above it is no folder, or we may not write there.
    """
    parent = path.parent
    try:
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path} is no ordinary file; name another")
        while not parent.exists():
            parent = parent.parent
    except OSError as exc:  # a folder that we may not look into, a name that is too long
        raise InputError(f"{option} {path} can't be written: {exc.strerror}; name another file") from exc
    if not parent.is_dir():
        raise InputError(f"{option} {path} can't be written: {parent} is no folder; name another file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path} can't be written: no right to write to {parent}; name another file")
