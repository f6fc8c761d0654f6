"""Published accuracies: accuracy.toml as data."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Accuracy", "Source", "elsewhere", "published"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where figures were read.

    Attributes:
        title: what the page is, and who quotes it if the page itself wasn't read.
        url: where it is.
        read: the day on which the figures were taken from it; None if they are quoted by others.
    """

    title: str
    url: str
    read: date | None = None

    def __str__(self) -> str:
        return f"{self.title}, {self.url}" + (f", read {self.read}" if self.read else "")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What one model reaches, by the ones who published it.

    Attributes:
        model: its name there.
        resolution: side of the images in pixels.
        scores: percent, 0 to 100, by benchmark.
        source: where that stands.
        size: "0.5b", "1.5b" or "7b" for the published FastVLM models, unquantised; None for other set-ups.
    """

    model: str
    resolution: int
    scores: dict[str, float]
    source: Source
    size: str | None = None


@cache
def published() -> tuple[Accuracy, ...]:
    """The published FastVLM models, smallest first."""
    return _read("published")


@cache
def elsewhere() -> tuple[Accuracy, ...]:
    """Other set-ups with the same encoder: another decoder, another training."""
    return _read("elsewhere")


def _read(key: str) -> tuple[Accuracy, ...]:
    data: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    sources = {name: Source(**table) for name, table in data["sources"].items()}
    return tuple(Accuracy(**table | {"source": sources[table["source"]]}) for table in data[key])
