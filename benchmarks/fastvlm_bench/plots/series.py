"""What figures show, out of the data of reports: checked, and one series for each model that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_bench.peaks import Peaks
from fastvlm_bench.runner import STAGES
from fastvlm_bench.stats import Spread
from fastvlm_mlx.errors import InputError

ROOFLINE_STAGES = ("vision", "projector", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Reached:
    """What a stage did.

    Attributes:
        intensity: floating-point operations for each byte that must be moved.
        flops: operations per second.
        share: of the machine's limit; 1 is all of it.
    """

    intensity: float
    flops: float
    share: float


@dataclass(frozen=True, slots=True)
class Point:
    """A model's measured questions about pictures of one size.

    Attributes:
        resolution: image side in pixels.
        image_tokens: positions that the image takes.
        stages: median milliseconds by name, in order, of `STAGES`.
        ttft: of the first question, milliseconds.
        second_ms: median TTFT of the second question about the same picture.
        reached: by name of `ROOFLINE_STAGES`; empty where the report has no peaks, without a stage that Core ML ran.
    """

    resolution: int
    image_tokens: int
    stages: dict[str, float]
    ttft: Spread
    second_ms: float
    reached: dict[str, Reached]


@dataclass(frozen=True, slots=True)
class Series:
    """One model of one report.

    Attributes:
        label: as `fastvlm_bench.subjects.Subject.label`, and how images were brought to it where that isn't a square.
        precision: how the decoder's weights lay in memory.
        device: what ran which part.
        seeded: random weights.
        machine: as text: processor, cores, memory, and what MLX computed on, such as "on the GPU".
        mlx: its version.
        date: UTC, ISO 8601.
        source: the report's file, or another name for it.
        image: what the picture was.
        text_tokens: of the prompt, around the image.
        runs: measured rounds.
        peaks: the machine's.
        points: by ascending resolution; at least one.
    """

    label: str
    precision: str
    device: str
    seeded: bool
    machine: tuple[str, ...]
    mlx: str
    date: str
    source: str
    image: str
    text_tokens: int
    runs: int
    peaks: Peaks | None
    points: tuple[Point, ...]


def read_series(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Series, ...]:
    """All models of all reports, in order.

    Args:
        reports: (name for messages, data of `fastvlm_bench.report.to_data`).

    Raises:
        InputError: a report without measurements, or one that isn't whole; says which.
    """
    return tuple(series for source, data in reports for series in _of_report(source, data))


def _of_report(source: str, data: Mapping[str, Any]) -> list[Series]:
    try:
        peaks = _peaks(data["peaks"]) if data["peaks"] else None
        points: dict[int, list[Point]] = {number: [] for number in range(len(data["subjects"]))}
        for case in data["summary"]:
            if case["subject"] not in points:
                raise ValueError(f"there is no subject {case['subject']}")
            points[case["subject"]].append(_point(case))
        machine, plan = _machine(data["machine"]), data["plan"]
        shape = _shape(plan.get("aspect"), plan.get("grid"))
        found = [
            Series(
                label=_text(subject["label"] + shape),
                precision=_text(subject["precision"]),
                device=_text(subject["device"]),
                seeded=bool(subject["seeded"]),
                machine=machine,
                mlx=_text(data["machine"]["mlx"]),
                date=_text(data["date"]),
                source=source,
                image=_text(Path(data["image"]).name),  # without its folders
                text_tokens=int(plan["prompt_tokens"]),
                runs=int(plan["runs"]),
                peaks=peaks,
                points=tuple(sorted(points[number], key=lambda point: point.resolution)),
            )
            for number, subject in enumerate(data["subjects"])
            if points[number]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        said = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
        raise InputError(
            f"{source} isn't a whole report of fastvlm-bench ({said}); make it anew with: fastvlm-bench --json FILE"
        ) from exc
    if not found:
        raise InputError(f"{source} holds no measured resolution; measure again with: fastvlm-bench --json FILE")
    return found


def _shape(aspect: str | None, grid: str | None) -> str:
    """What a label says of them; a square of whatever kind takes the same time."""
    shapes = {"native": ", native", "anyres": f", {grid} tiles" if grid else ", tiles"}
    return shapes.get(aspect or "", "")


def _point(case: Mapping[str, Any]) -> Point:
    figures, roofline = case["figures"], case["roofline"] or {}
    return Point(
        resolution=int(_above_zero("resolution", case["resolution"])),
        image_tokens=int(_above_zero("image_tokens", case["image_tokens"])),
        stages={stage: _spread(f"{stage}_ms", figures).median for stage in STAGES},
        ttft=_spread("ttft_ms", figures, least=1e-6),
        second_ms=_spread("second_ttft_ms", figures).median,
        reached={stage: _reached(roofline[stage]) for stage in ROOFLINE_STAGES if stage in roofline},
    )


def _reached(limit: Mapping[str, Any]) -> Reached:
    """The report has the limit and the share of it, which give the time: limit by share."""
    flops, moved, least_ms, share = (_above_zero(name, limit[name]) for name in ("flops", "bytes", "limit_ms", "share"))
    return Reached(flops / moved, flops * share / (least_ms / 1e3), share)


def _peaks(data: Mapping[str, Any]) -> Peaks:
    rates = {_text(name): _above_zero(name, rate) for name, rate in data["matmul_flops"].items()}
    if not rates:
        raise ValueError("matmul_flops is empty")
    return Peaks(rates, _above_zero("bandwidth", data["bandwidth"]))


def _machine(data: Mapping[str, Any]) -> tuple[str, ...]:
    memory = f"{data['memory_bytes'] / 2**30:.1f} GiB" if data["memory_bytes"] else "memory unknown"
    kind = _text(data["device"]).partition(":")[0].upper()
    return _text(data["cpu"]), f"{data['cores']} cores", memory, f"on the {kind}"


def _text(value: str) -> str:
    """Without what can't be drawn, and what an SVG mustn't hold: control characters, halves of a pair."""
    return "".join(letter if letter.isprintable() else " " for letter in value)


def _spread(name: str, figures: Mapping[str, Any], least: float = 0.0) -> Spread:
    found = Spread(*(float(figures[name][part]) for part in ("median", "low", "high")))
    if not (least <= found.low <= found.median <= found.high < math.inf):
        raise ValueError(f"{name}: expected {least:g} <= low <= median <= high, found {figures[name]}")
    return found


def _above_zero(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, found {value}")
    return value
