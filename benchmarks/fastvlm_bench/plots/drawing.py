"""All figures of some reports, as files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_bench.plots.series import read_series
from fastvlm_bench.plots.style import PALETTES, applied
from fastvlm_mlx.errors import InputError, MissingDependencyError
from fastvlm_mlx.files import replaced_file


@dataclass(frozen=True, slots=True)
class Drawn:
    """Figures, not yet on disk.

    Attributes:
        files: contents by name: FIGURE.png, FIGURE.svg, and FIGURE-dark.* of the same.
        skipped: why a figure isn't among them, by its name.
    """

    files: dict[str, bytes]
    skipped: dict[str, str]


def require_matplotlib() -> None:
    """Raise MissingDependencyError where it isn't installed; to be called before anything takes long."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError("figures need matplotlib: pip install 'fastvlm-mlx[bench]'") from exc


def check_folder(folder: Path, option: str) -> None:
    """Raise InputError where figures can't be written; to be called before anything takes long.

    Args:
        folder: where they are to be; needn't exist.
        option: that named it, for the message.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        found = "is a file" if nearest == folder.absolute() else f"can't be made, {nearest} is a file"
        raise InputError(f"{option} {folder} {found}; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option} {folder}: no right to write in {nearest}; name another folder")


def draw(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> Drawn:
    """Draw every figure, for a light and a dark page; the same reports give the same bytes.

    Args:
        reports: (name for messages, data of `fastvlm_bench.report.to_data`), of one machine or several.

    Raises:
        InputError: a report without measurements, or one that isn't whole. MissingDependencyError: no matplotlib.
    """
    require_matplotlib()
    from fastvlm_bench.plots import breakdown, roofline, ttft
    from fastvlm_bench.plots.sheet import render

    series = read_series(reports)
    wanted = {
        "breakdown": (breakdown.draw_breakdown, breakdown.TITLE),
        "ttft": (ttft.draw_ttft, ttft.TITLE),
        "roofline": (roofline.draw_roofline, roofline.TITLE),
    }
    skipped = {}
    if not any(map(roofline.drawable, series)):
        del wanted["roofline"]
        skipped["roofline"] = "the machine's limits weren't measured; measure without --no-roofline"
    files = {}
    with applied():
        for palette in PALETTES:
            for name, (make, title) in wanted.items():
                for kind, content in render(make(series, palette), title).items():
                    files[f"{name}{palette.suffix}.{kind}"] = content
    return Drawn(files, skipped)


def write(drawn: Drawn, folder: Path) -> None:
    """Put all files into a folder, which is made; none of them takes its place before all are written."""
    with ExitStack() as stack:
        for name, content in drawn.files.items():
            stack.enter_context(replaced_file(folder / name)).write(content)


def said(drawn: Drawn, folder: Path) -> str:
    """What was written where, and what not and why."""
    names = sorted({name.partition(".")[0] for name in drawn.files if "-dark" not in name})
    lines = [f"figures: {', '.join(names)} in {folder}, as PNG and SVG, each for a light and a dark page"]
    return "\n".join((*lines, *(f"no {name}: {why}" for name, why in drawn.skipped.items())))
