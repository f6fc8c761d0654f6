"""The measurements that are kept of this machine, for `fastvlm-bench plan` and `load(ttft_budget=...)`.

A folder for each machine and versions: `facts.json` says which, `reports` has what `fastvlm-bench` measured, `loads`
what `load(ttft_budget=...)` did.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastvlm_mlx._version import __version__
from fastvlm_mlx.accelerate import finds_openblas
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import cache_dir, write_text
from fastvlm_mlx.measurements import Report, parse_report, read_report

_VERSIONS = ("mlx", "fastvlm-mlx")
_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_USUAL_IMAGE = "synthetic photo"  # of `fastvlm-bench`; a screenshot of 50 megapixels takes other times
_LEAST_RUNS, _LEAST_WARMUP = 10, 1  # what it does by default; of fewer runs the slowest one says little


def device_name() -> str:
    """What MLX computes on by default, such as "gpu: Apple M2", or "gpu" where MLX has no name for it."""
    import mlx.core as mx

    kind, name = mx.default_device().type.name, mx.device_info().get("device_name", "")
    return f"{kind}: {name}" if name else str(kind)


def machine_facts() -> dict[str, object]:
    """What a time that was measured in this process depends on, besides the model; imports MLX.

    The name of the host isn't among it: on a Mac it changes with the network.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        coremltools = version("coremltools")
    except PackageNotFoundError:
        coremltools = ""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "macos": platform.mac_ver()[0],
        "device": device_name(),
        "cores": cores,
        "threads": {name: os.environ.get(name, "") for name in _THREAD_LIMITS},
        "openblas": finds_openblas(),
        "mlx": version("mlx"),
        "coremltools": coremltools,
        "fastvlm-mlx": __version__,
    }


def save_measurements(report: Mapping[str, Any]) -> Path | None:
    """Keep a report; call it in the process that measured.

    One of the same models, resolutions and length of question takes the place of the one before. What other versions
    of MLX or of this library measured is dropped.

    Args:
        report: the data of the JSON, format_version 2.

    Returns:
        The file. None where it isn't kept, which costs no more than measuring again: it has fewer than 10 runs or no
        warm-up, is of another photo than the synthetic one, of another machine or version of MLX, or no whole report;
        or the cache can't be written.
    """
    try:
        parsed, facts = parse_report(report, "the report"), machine_facts()
    except InputError:
        return None
    same = all(parsed.machine.get(name) == facts[name] for name in ("device", "cores", "mlx"))
    if not (same and _is_usual(report)):
        return None
    what = [
        (repr(subject), sorted((p.resolution, p.text_tokens) for p in points))
        for subject, points in zip(parsed.subjects, parsed.points, strict=True)
    ]
    return _keep(facts, f"reports/{_digest(sorted(what))}.json", report)


def _is_usual(report: Mapping[str, Any]) -> bool:
    """Whether a report was measured as `load(ttft_budget=...)` would ask, and often enough for its ends to count."""
    plan = report.get("plan")
    return (
        str(report.get("image", "")).startswith(_USUAL_IMAGE)
        and isinstance(plan, dict)
        and plan.get("runs", 0) >= _LEAST_RUNS
        and plan.get("warmup", 0) >= _LEAST_WARMUP
    )


def saved_measurements() -> list[Report]:
    """The reports that `save_measurements` kept of this machine with these versions, oldest first."""
    found = []
    for path in sorted((_folder(machine_facts()) / "reports").glob("[!.]*.json")):
        try:
            found.append(read_report(path))
        except InputError:
            continue  # damaged: measured again, it is replaced
    return sorted(found, key=lambda report: report.date)


def save_slowest(identity: str, slowest_ms: Mapping[int, float]) -> Path | None:
    """Keep what a model's first token takes at most; call it in the process that measured.

    Args:
        identity: of `FastVLM.identity`.
        slowest_ms: side in pixels -> milliseconds; joins what is kept, and replaces the same side's.

    Returns:
        The file; None where the cache can't be written.
    """
    kept = {str(side): ms for side, ms in sorted((saved_slowest(identity) | dict(slowest_ms)).items())}
    return _keep(machine_facts(), _slowest_file(identity), {"identity": identity, "slowest_ms": kept})


def saved_slowest(identity: str) -> dict[int, float]:
    """What `save_slowest` kept of a model on this machine with these versions: side in pixels -> milliseconds."""
    try:
        data = json.loads((_folder(machine_facts()) / _slowest_file(identity)).read_text(encoding="utf-8"))
        if data["identity"] != identity:
            return {}
        found = {int(side): float(ms) for side, ms in data["slowest_ms"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # none yet, or damaged: measured again, it is replaced
    return {side: ms for side, ms in found.items() if math.isfinite(ms) and ms > 0}


def _slowest_file(identity: str) -> str:
    return f"loads/{_digest(identity)}.json"


def _keep(facts: Mapping[str, object], name: str, data: Mapping[str, Any]) -> Path | None:
    folder = _folder(facts)
    try:
        write_text(folder / "facts.json", json.dumps(facts, indent=2) + "\n")
        write_text(folder / name, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    except OSError:
        return None
    _drop_other_versions(facts)
    return folder / name


def _drop_other_versions(facts: Mapping[str, object]) -> None:
    """Remove the folders of other versions: no process will read them once these are installed."""
    for file in _root().glob("*/facts.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # another process removes it, or it is damaged
            theirs = json.loads(file.read_text(encoding="utf-8"))
            if any(theirs.get(name) != facts[name] for name in _VERSIONS):
                shutil.rmtree(file.parent, ignore_errors=True)


def _root() -> Path:
    return cache_dir() / "measurements"


def _folder(facts: Mapping[str, object]) -> Path:
    return _root() / _digest(facts)


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
