"""What a training run leaves in its folder: state.pt, to go on from, and curve.csv."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastvlm_mlx.errors import InputError
from nano.settings import NanoConfig, Settings, as_text

STATE, CURVE, TOKENIZER, CHECKPOINT = "state.pt", "curve.csv", "tokenizer.json", "checkpoint"


# What may be other when a run goes on; it is noted all the same.
_FREE = ("device", "workers", "evaluate_every")


def changed_settings(state: Mapping[str, Any], settings: Settings, config: NanoConfig) -> dict[str, tuple[Any, Any]]:
    """Compare what a run has with what it is to go on with.

    Args:
        state: of the run. What it doesn't name counts as None, and may be anything.
        settings: other steps are for stages that haven't ended, and no fewer than were done.
        config: its vocabulary, the tokenizer's, isn't looked at.

    Returns:
        Name -> (before, now) of what differs.

    Raises:
        InputError: it would be another run.
    """
    before = state.get("settings", {}) | state["config"]
    after = asdict(settings) | asdict(config) | {"vocabulary": before["vocabulary"]}
    changed = {name: (before.get(name), now) for name, now in after.items() if before.get(name) != now}
    refused = [name for name in changed if name in before and name not in _FREE]
    if "stage_steps" in refused and _may_change_steps(state, *changed["stage_steps"]):
        refused.remove("stage_steps")
    if refused:
        has, given = (", ".join(f"{name} {as_text(changed[name][i])}" for name in refused) for i in (0, 1))
        where = f"in stage {state['stage'] + 1} after {state['step']} steps"
        raise InputError(f"the run, {where}, has {has}, not {given}; leave that out or choose another folder")
    return changed


def _may_change_steps(state: Mapping[str, Any], before: Sequence[int], now: Sequence[int]) -> bool:
    stage = state["stage"]
    return before[:stage] == now[:stage] and stage < len(now) and now[stage] >= state["step"]


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
