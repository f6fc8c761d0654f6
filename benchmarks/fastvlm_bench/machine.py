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
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_DEVICE_MEMORY = ("free_memory", "total_memory", "memory_size")  # as MLX's back-ends name it; the first is CUDA's


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
        found = parse_cpuinfo(_text(_CPUINFO))
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


def memory_text(memory_bytes: int) -> str:
    """Bytes of memory for people; 0 is an unknown number."""
    return f"{memory_bytes / 2**30:.1f} GiB" if memory_bytes else "memory unknown"


def available_bytes() -> int:
    """Memory that a model may take on MLX's default device; imports MLX.

    Returns:
        On macOS what Metal recommends as the most at a time, whatever is free of it. On a GPU elsewhere its free
        memory, or all of it where MLX doesn't tell that. Else what the kernel calls available, which is what is
        free and what it could free, and no more than this process's control group leaves. 0 if unknown.
    """
    import mlx.core as mx

    if sys.platform == "darwin":
        return int(mx.device_info(mx.gpu).get("max_recommended_working_set_size", 0))
    if mx.default_device().type == mx.DeviceType.gpu:
        told = mx.device_info()
        for key in _DEVICE_MEMORY:
            if isinstance(value := told.get(key), int) and value:
                return value
    available = parse_meminfo(_text(_MEMINFO))
    left = _group_bytes(_text(_OWN_GROUPS), _GROUPS)
    return min(available, left) if available and left is not None else available


def _group_bytes(own: str, root: Path) -> int | None:
    """Bytes that the control groups (version 2) of a process leave it; None without a limit.

    Args:
        own: its /proc/PID/cgroup.
        root: where the groups are mounted.
    """
    path = next((line.removeprefix("0::") for line in own.splitlines() if line.startswith("0::")), None)
    if path is None:
        return None
    group = root / path.strip("/")
    left = []
    for folder in (group, *group.parents):  # the limit of any group above counts for those below
        if not folder.is_relative_to(root):
            break
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            left.append(int(limit) - int(used) + _reclaimable(_text(folder / "memory.stat")))
    return max(min(left), 1) if left else None  # 0 would be unknown


def _reclaimable(stat: str) -> int:
    """Bytes of a group's memory that are only pages of files not in use, such as those of a model read before."""
    for line in stat.splitlines():
        key, _, value = line.partition(" ")
        if key == "inactive_file":
            return int(value)
    return 0


def parse_meminfo(text: str) -> int:
    """MemAvailable of a /proc/meminfo in bytes, or 0."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _text(path: Path) -> str:
    """A file of the kernel's, or "" where it has none or doesn't let us read it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    """A value of macOS's sysctl, or "" if it has none."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
