"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_model(parser: argparse.ArgumentParser, vision: Sequence[str] = ("auto", "mlx")) -> None:
    """--model, --vision and --quantize, as `fastvlm_mlx.load` takes them."""
    parser.add_argument("--model", help="bundle folder, name of `fastvlm models`, or org/name (default: embedded)")
    parser.add_argument("--vision", choices=vision, default="auto", help="what runs the vision encoder")
    parser.add_argument("--quantize", type=int, metavar="BITS", help="quantise the decoder after loading")
