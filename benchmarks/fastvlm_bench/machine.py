"""The machine that the times belong to."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how fast a model runs here.

    Attributes:
        platform: operating system, its version and architecture.
        cpu: name of the processor.
        cores: logical cores that this process may use.
        memory_bytes: of the whole machine; 0 if unknown.
        device: what MLX computes on by default, such as "gpu: Apple M2"; "gpu" where MLX has no name for it.
        python: version.
        mlx: version.
        openblas: OpenBLAS's own description if MLX's matmul finds it, "" if not; None on macOS, where MLX
            uses Accelerate.
    """

    platform: str
    cpu: str
    cores: int
    memory_bytes: int
    device: str
    python: str
    mlx: str
    openblas: str | None


def describe_machine() -> Machine:
    """Describe the machine that this process runs on; imports MLX."""
    import mlx.core as mx

    # As fastvlm_mlx.measurement_cache.device_name, which the rivals' environments haven't got.
    kind, name = mx.default_device().type.name, mx.device_info().get("device_name", "")
    return Machine(
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        device=f"{kind}: {name}" if name else kind,
        python=platform.python_version(),
        mlx=version("mlx"),
        openblas=None if sys.platform == "darwin" else loaded_openblas(),
    )


def usable_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name; on an Arm Linux, whose kernel doesn't tell it, the architecture's."""
    if sys.platform == "darwin":
        found = _sysctl("machdep.cpu.brand_string")
    else:
        found = parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8")) if _CPUINFO.exists() else ""
    return found or platform.processor() or platform.machine()


def parse_cpuinfo(text: str) -> str:
    """The first "model name" of a /proc/cpuinfo, or ""."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return ""


def loaded_openblas() -> str:
    """Describe the OpenBLAS among the process's global symbols, where MLX's matmul looks; "" without one.

    The list of loaded libraries wouldn't tell: NumPy's wheels bring a private OpenBLAS that MLX can't see.
    """
    try:
        function = ctypes.CDLL(None).openblas_get_config
    except (AttributeError, OSError, TypeError):  # no such symbol; TypeError: Windows has no global symbols
        return ""
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode()


def _memory_bytes() -> int:
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def available_bytes() -> int:
    """Memory that a model may take now: on macOS what Metal recommends at most, on Linux what is free; 0 if unknown."""
    if sys.platform == "darwin":
        import mlx.core as mx

        return int(mx.device_info().get("max_recommended_working_set_size", 0))
    return parse_meminfo(_MEMINFO.read_text(encoding="utf-8")) if _MEMINFO.exists() else 0


def parse_meminfo(text: str) -> int:
    """MemAvailable of a /proc/meminfo in bytes, or 0."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _sysctl(name: str) -> str:
    """A value of macOS's sysctl, or "" if it has none."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
