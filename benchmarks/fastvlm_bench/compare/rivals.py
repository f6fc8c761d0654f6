"""The libraries that ours can be compared with, as data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvlm_mlx.errors import InputError

OURS = "fastvlm-mlx"
_WORKERS = Path(__file__).resolve().parents[1] / "workers"
ENVIRONMENTS = Path(".venv-compare")  # below the current folder; `make compare` makes it

Kind = Literal["picture", "text"]


@dataclass(frozen=True, slots=True)
class Library:
    """A side of a comparison.

    Attributes:
        module: of `fastvlm_bench.workers`, which runs it.
        kind: what it is asked: about a picture, or to go on from a text; ours can do both.
        packages: whose versions matter.
        does: what a plain user of it gets, for the report.
        command: its command line for one question about a picture, after the interpreter; () if it has none.
    """

    module: str
    kind: Kind
    packages: tuple[str, ...]
    does: str
    command: tuple[str, ...] = ()


LIBRARIES = {
    OURS: Library(
        "our_side",
        "picture",
        ("fastvlm-mlx", "mlx", "mlx-lm", "pillow"),
        "load(vision='mlx') and stream; nothing is known before a first question, and what it keeps by itself may help "
        "the second",
        ("-P", "-m", "fastvlm_mlx", "generate"),
    ),
    "mlx-vlm": Library(
        "mlx_vlm_side",
        "picture",
        ("mlx-vlm", "mlx", "transformers", "pillow"),
        "load, apply_chat_template and stream_generate, which keeps nothing between questions",
        ("-P", str(_WORKERS / "mlx_vlm_cli.py"), "generate"),
    ),
    "transformers": Library(
        "transformers_side",
        "picture",
        ("transformers", "torch", "timm", "pillow"),
        "FastVlmForConditionalGeneration.generate in PyTorch on the CPU, AutoProcessor with Pillow, a streamer; "
        "it keeps nothing between questions",
    ),
    "mlx-lm": Library(
        "mlx_lm_side",
        "text",
        ("mlx-lm", "mlx", "transformers"),
        "load and stream_generate of the decoder alone, on a text of as many tokens as the question about the "
        "picture has positions",
    ),
}
RIVALS = tuple(name for name in LIBRARIES if name != OURS)


def parse_rivals(text: str) -> tuple[str, ...]:
    """Names from "mlx-vlm,transformers".

    Raises:
        InputError: unknown, or named twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in RIVALS:
            raise InputError(f"--against takes {', '.join(RIVALS)}, got {name!r}")
    if len(set(names)) != len(names):
        raise InputError(f"--against must name each library once, got {text}")
    return names


def parse_pythons(texts: Sequence[str]) -> dict[str, Path]:
    """Interpreters from NAME=PATH.

    Raises:
        InputError: not in that form, or an unknown name.
    """
    found = {}
    for text in texts:
        name, _, path = text.partition("=")
        if name not in RIVALS or not path:
            raise InputError(f"--python takes NAME=PATH with a NAME of {', '.join(RIVALS)}, got {text!r}")
        found[name] = Path(path).expanduser()
    return found


def find_pythons(rivals: Sequence[str], given: Mapping[str, Path]) -> dict[str, Path]:
    """The interpreter of each rival's environment.

    Raises:
        InputError: it isn't there.
    """
    found = {}
    for name in rivals:
        path = given.get(name, ENVIRONMENTS / name / "bin" / "python")
        if not os.access(path, os.X_OK) or path.is_dir():
            raise InputError(
                f"{name} has no interpreter at {path}; run `make compare-environments`, or give --python {name}=PATH"
            )
        found[name] = path.absolute()  # not resolved: the link's place says which environment it is
    return found
