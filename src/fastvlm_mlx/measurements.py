"""What `fastvlm-bench` measured: its reports, read and checked."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import file_at
from fastvlm_mlx.vision_config import DOWNSAMPLING

FORMAT_VERSION = 2  # of the reports that this reads
_NUMBER = (int, float)
_TEXT_OR_NONE = (str, type(None))


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds: the median of some runs, the least and the greatest."""

    median: float
    low: float
    high: float

    def __add__(self, other: Times) -> Times:
        return Times(self.median + other.median, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Times:
        return Times(self.median * factor, self.low * factor, self.high * factor)

    def __sub__(self, other: Times) -> Times:
        """Each figure less the other's: of a whole and its part, not a spread of anything by itself."""
        return self + other * -1

    def at_least(self, other: Times) -> Times:
        """The greater of each figure."""
        return Times(max(self.median, other.median), max(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True, slots=True)
class Point:
    """The measured questions of one length about pictures of one size.

    Attributes:
        resolution: image side in pixels.
        image_tokens: positions that the image takes.
        positions: of the whole prompt.
        ttft: from the call to the first token.
        vision: the vision encoder's part of that.
        prefill: the decoder's.
        peak_bytes: most memory that MLX held; None where the report doesn't say, as of models that were loaded
            together.
    """

    resolution: int
    image_tokens: int
    positions: int
    ttft: Times
    vision: Times
    prefill: Times
    peak_bytes: int | None

    @property
    def text_tokens(self) -> int:
        """Positions around the image."""
        return self.positions - self.image_tokens


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model that was measured.

    Attributes:
        name: of its config.
        size: "0.5b", "1.5b" or "7b" if its decoder has that shape, else None.
        seeded: random weights: as fast as trained ones, without their accuracy.
        bits: of the decoder's matrices; None if they aren't quantised.
        precision: the same in words, types included.
        vision: "mlx" or "coreml".
        device: what ran which part.
        identity: of `FastVLM.identity`; None where the report doesn't say, and then `load` doesn't use it.
        image_size: side in pixels that it was trained at; None where the report doesn't say.
        grid_pinpoints: AnyRes: (width, height) in pixels of the grids that it was trained for.
        patch_merge_type: AnyRes: how tiles become positions.
        downsampling: pixels per side of a position.
    """

    name: str
    size: str | None
    seeded: bool
    bits: int | None
    precision: str
    vision: str
    device: str
    identity: str | None = None
    image_size: int | None = None
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    patch_merge_type: str = "flat"
    downsampling: int = DOWNSAMPLING


@dataclass(frozen=True, slots=True)
class Report:
    """What the planner needs of a report of `fastvlm-bench`.

    Attributes:
        where: the file that it was read from.
        date: UTC, ISO 8601.
        machine: as `fastvlm_bench.machine.Machine`, by field.
        subjects: what was measured.
        points: of each subject, in the same order.
    """

    where: str
    date: str
    machine: dict[str, Any]
    subjects: tuple[Subject, ...]
    points: tuple[tuple[Point, ...], ...]


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a file that `fastvlm-bench --json` wrote.

    Raises:
        InputError: missing, unreadable, of another format, or not whole; says which and what to do.
    """
    try:
        data = json.loads(file_at(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"can't read {path} ({exc}); name a file that `fastvlm-bench --json FILE` wrote") from exc
    return parse_report(data, os.fspath(path))


def parse_report(data: object, where: str) -> Report:
    """Check a report's data; keys that aren't needed here may be there or not.

    Args:
        data: of the JSON.
        where: for the message.

    Raises:
        InputError: of another format, or not whole.
    """
    found = data.get("format_version") if isinstance(data, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(
            f"{where}: expected a report of fastvlm-bench with format_version {FORMAT_VERSION}, found {found!r}; "
            "measure again with `fastvlm-bench --json FILE`"
        )
    report = _Table(data, where)
    subjects = tuple(_subject(table) for table in report.tables("subjects"))
    points: list[list[Point]] = [[] for _ in subjects]
    peaks = _peaks(report)
    for table in report.tables("summary"):
        index = table.whole("subject")
        if index >= len(subjects):
            raise InputError(f"{table.where}: there is no subject {index}; measure again")
        points[index].append(_point(table, peaks.get((index, table.whole("resolution")))))
    machine: dict[str, Any] = report.get("machine", dict)
    return Report(where, report.get("date", str), machine, subjects, tuple(map(tuple, points)))


class _Table:
    """An object of the JSON; a value that is missing or of another type raises InputError."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise InputError(f"{where}: expected an object, found {type(data).__name__}; measure again")
        self._data, self.where = data, where

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        if name not in self._data:
            raise InputError(f"{self.where} has no {name}, which fastvlm-bench writes; measure again")
        value = self._data[name]
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            kinds = " or ".join(k.__name__ for k in allowed)
            raise InputError(f"{self.where}: {name} must be {kinds}, found {value!r}; measure again")
        return value

    def has(self, name: str) -> bool:
        return self._data.get(name) is not None

    def whole(self, name: str) -> int:
        value: int = self.get(name, int)
        if value < 0:
            raise InputError(f"{self.where}: {name} must be 0 or more, found {value}; measure again")
        return value

    def times(self, name: str) -> Times:
        table = _Table(self.get(name, dict), f"{self.where}, {name}")
        median, low, high = (float(table.get(part, _NUMBER)) for part in ("median", "low", "high"))
        if not (0 <= low <= median <= high and math.isfinite(high)):
            raise InputError(
                f"{table.where}: expected 0 <= low <= median <= high, found {low}, {median}, {high}; measure again"
            )
        return Times(median, low, high)

    def tables(self, name: str) -> list[_Table]:
        return [_Table(entry, f"{self.where}, {name}[{i}]") for i, entry in enumerate(self.get(name, list))]


def _subject(table: _Table) -> Subject:
    more: dict[str, Any] = {}
    if table.has("identity"):
        more["identity"] = table.get("identity", str)
    if table.has("image_size"):
        more["image_size"] = table.whole("image_size")
    if table.has("downsampling"):  # older reports are of FastViTHD
        more["downsampling"] = table.whole("downsampling") or DOWNSAMPLING
    if table.has("patch_merge_type"):
        more["patch_merge_type"] = table.get("patch_merge_type", str)
    if table.has("grid_pinpoints"):
        more["grid_pinpoints"] = tuple(map(_pair, table.get("grid_pinpoints", list)))
    return Subject(
        name=table.get("name", str),
        size=table.get("size", _TEXT_OR_NONE),
        seeded=table.get("seeded", bool),
        bits=table.get("bits", (int, type(None))),
        precision=table.get("precision", str),
        vision=table.get("vision", str),
        device=table.get("device", str),
        **more,
    )


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    raise InputError(f"a report's grid_pinpoints are pairs of pixels, found {value!r}; measure again")


def _peaks(report: _Table) -> dict[tuple[int, int], int | None]:
    """The most memory of any run, by subject and resolution; None if a run doesn't say, as its own may be the most."""
    peaks: dict[tuple[int, int], int | None] = {}
    for run in report.tables("runs"):
        key = run.whole("subject"), run.whole("resolution")
        peak = run.whole("peak_bytes") if run.has("peak_bytes") else None
        before = peaks.get(key, 0)
        peaks[key] = None if peak is None or before is None else max(before, peak)
    return peaks


def _point(table: _Table, peak_bytes: int | None) -> Point:
    figures = _Table(table.get("figures", dict), f"{table.where}, figures")
    if table.whole("prompt_tokens") <= table.whole("image_tokens"):
        raise InputError(f"{table.where}: a prompt has more positions than its image; measure again")
    return Point(
        resolution=table.whole("resolution"),
        image_tokens=table.whole("image_tokens"),
        positions=table.whole("prompt_tokens"),
        ttft=figures.times("ttft_ms"),
        vision=figures.times("vision_ms"),
        prefill=figures.times("prefill_ms"),
        peak_bytes=peak_bytes,
    )
