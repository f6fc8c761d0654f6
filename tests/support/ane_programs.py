"""Small programs for the static rules of a package's placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.mil_programs import model_file, quiet, read_specification, save_program

with quiet():
    from coremltools.converters.mil.mil import Builder as mb

MAP = (1, 4, 40, 64)


def zeros(*shape: int) -> np.ndarray:
    """Weights in float16."""
    return np.zeros(shape, np.float16)


def conv(x: Any, kernel: tuple[int, ...], name: str, **options: Any) -> Any:
    """A convolution of four channels to four."""
    return mb.conv(x=x, weight=zeros(4, 4, *kernel), name=name, **options)


def save(folder: Path, build: Callable[..., Any], shapes: Sequence[tuple[int, ...]], half: bool = True) -> Path:
    """Save a program under its function's name."""
    return save_program(folder / f"{build.__name__}.mlpackage", build, shapes, half=half)


def rewrite(package: Path, change: Callable[[Any], object]) -> Path:
    """Change a package's protobuf in place."""
    specification = read_specification(package)
    change(specification)
    model_file(package).write_bytes(specification.SerializeToString())
    return package
