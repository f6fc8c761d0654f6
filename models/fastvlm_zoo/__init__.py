"""The models that have a name: zoo.toml as data, and the default bundle that comes with the package."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent

__all__ = ["Entry", "default", "entries"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One named model: either `embedded` in this package or a `repo` on the Hugging Face hub.

    Attributes:
        name: what `--model` takes.
        parameters: for people, such as "0.5B".
        licence: short name of the weights' terms.
        repo: "org/name" on the hub.
        revision: commit or branch there.
        layout: how the checkpoint's tensors are named.
        download_bytes: what loading fetches, roughly.
        embedded: folder of a bundle inside this package.
        note: what a user must know before he trusts an answer.
    """

    name: str
    parameters: str
    licence: str
    repo: str | None = None
    revision: str | None = None
    layout: str | None = None
    download_bytes: int = 0
    embedded: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an entry that leads nowhere."""
        if (self.repo is None) == (self.embedded is None) or (self.repo is None) != (self.revision is None):
            raise ValueError(f"zoo.toml: {self.name} needs repo and revision, or embedded")

    @property
    def path(self) -> Path | None:
        """The embedded bundle's folder, None for a model of the hub."""
        return None if self.embedded is None else _HERE / self.embedded


@cache
def entries() -> tuple[Entry, ...]:
    """All named models, in the order of zoo.toml."""
    return tuple(Entry(**table) for table in _read()["model"])


def default() -> Entry:
    """The model that is used where none is named."""
    name = _read()["default"]
    return next(entry for entry in entries() if entry.name == name)


@cache
def _read() -> dict[str, Any]:
    return tomllib.loads((_HERE / "zoo.toml").read_text(encoding="utf-8"))
