"""The measurements that are kept of this machine, for `fastvlm-bench plan` and `load(ttft_budget=...)`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm_mlx._version import __version__
from fastvlm_mlx.accelerate import finds_openblas
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import cache_dir, write_text
from fastvlm_mlx.measurements import Report, parse_report, read_report


def machine_facts() -> dict[str, object]:
    """What a time that was measured in this process depends on, besides the model; imports MLX.

    The name of the host isn't among it: on a Mac it changes with the network.
    """
    import mlx.core as mx

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    name = mx.device_info().get("device_name", "")
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{mx.default_device().type.name}: {name}",
        "cores": cores,
        "openblas": finds_openblas(),
        "mlx": version("mlx"),
        "fastvlm-mlx": __version__,
    }


def save_measurements(report: Mapping[str, Any]) -> Path | None:
    """Keep a report; call it in the process that measured.

    One of the same models, resolutions and length of question takes the place of the one before.

    Args:
        report: the data of the JSON, format_version 2.

    Returns:
        The file; None where the cache can't be written, which costs no more than measuring again.

    Raises:
        InputError: it is no such report, or was measured on another machine or with another version of MLX.
    """
    parsed, facts = parse_report(report, "the report"), machine_facts()
    for name in ("device", "cores", "mlx"):
        if parsed.machine.get(name) != facts[name]:
            raise InputError(
                f"the report was measured with {name} {parsed.machine.get(name)!r}, here it is {facts[name]!r}; "
                "read it with `fastvlm-bench plan --from FILE` instead"
            )
    what = [
        (repr(subject), sorted((p.resolution, p.text_tokens) for p in points))
        for subject, points in zip(parsed.subjects, parsed.points, strict=True)
    ]
    path = _folder(facts) / f"{_digest(sorted(what))}.json"
    try:
        write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError:
        return None
    return path


def saved_measurements() -> list[Report]:
    """The reports that `save_measurements` kept of this machine with these versions, oldest first."""
    found = []
    for path in sorted(_folder(machine_facts()).glob("[!.]*.json")):
        try:
            found.append(read_report(path))
        except InputError:
            continue  # of a newer version, or damaged: measured again, it is replaced
    return sorted(found, key=lambda report: report.date)


def _folder(facts: Mapping[str, object]) -> Path:
    return cache_dir() / "measurements" / _digest(facts)


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
