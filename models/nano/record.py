"""What a training run leaves in its folder: state.pt, to go on from, and curve.csv."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

STATE, CURVE, TOKENIZER, CHECKPOINT = "state.pt", "curve.csv", "tokenizer.json", "checkpoint"


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write state.pt; a run that is killed in the middle keeps the one before."""
    partial = folder / f"{STATE}.partial"
    torch.save(dict(state), partial)
    partial.replace(folder / STATE)


def load_state(folder: Path, device: str) -> dict[str, Any]:
    """Read state.pt."""
    state: dict[str, Any] = torch.load(folder / STATE, map_location=device, weights_only=True)
    return state


class Curve:
    """curve.csv: one line per evaluation, appended; columns that a stage doesn't measure stay empty."""

    def __init__(self, folder: Path, measures: Sequence[str], elapsed: float = 0.0) -> None:
        self.path = folder / CURVE
        self.columns = ["minutes", "stage", "step", "loss", "pictures_per_s", *measures]
        self._start = time.monotonic() - elapsed
        if not self.path.exists():
            self._append(self.columns)

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return time.monotonic() - self._start

    def add(self, stage: str, step: int, loss: float, rate: float, measured: Mapping[str, float]) -> None:
        """Append a line."""
        row = {"minutes": f"{self.elapsed / 60:.1f}", "stage": stage, "step": str(step), "loss": f"{loss:.4f}"}
        row |= {"pictures_per_s": f"{rate:.1f}"} | {name: f"{value:.4f}" for name, value in measured.items()}
        self._append([row.get(column, "") for column in self.columns])

    def _append(self, row: Sequence[str]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)
