"""The machine, the versions, and macOS."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from fastvlm_bench.doctor.check import Check, skipped
from fastvlm_bench.doctor.mac import Mac, Read, describe_mac, elsewhere, read_command
from fastvlm_mlx import __version__

_NEEDED = ("mlx", "mlx-lm", "numpy", "pillow", "tokenizers", "huggingface_hub", "safetensors")
_OPTIONAL = ("coremltools", "torch")  # coremltools is needed on a Mac
_OLD_MACOS = 15  # a package with several functions needs it


def check_machine() -> Check:
    """Processor, memory, operating system and MLX's device."""
    from fastvlm_bench.machine import describe_machine, memory_text

    machine = describe_machine()
    notes = (
        f"{machine.cpu}, {machine.cores} cores, {memory_text(machine.memory_bytes)}",
        f"{machine.platform}; MLX computes on {machine.device}",
    )
    return Check("machine", notes, data={"machine": asdict(machine)})


def check_versions(system: str = sys.platform) -> Check:
    """Whether everything that is needed is installed, and which versions.

    Args:
        system: as `sys.platform`.
    """
    needed = (*_NEEDED, "coremltools") if system == "darwin" else _NEEDED
    found = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    missing = [name for name in needed if found[name] is None]
    listed = ", ".join(f"{name} {number or '-'}" for name, number in found.items())
    return Check(
        "versions",
        (f"Python {platform.python_version()}, fastvlm-mlx {__version__}, {listed}",),
        tuple(f"{name} isn't installed; pip install --upgrade fastvlm-mlx installs it" for name in missing),
        data={"versions": {"python": platform.python_version(), "fastvlm-mlx": __version__, **found}},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_macos(read: Read = read_command, reason: str | None = None, architecture: str | None = None) -> Check:
    """macOS, the Mac's model, and what slows it down at this moment.

    Args:
        read: runs a command.
        reason: why this can't be checked; default nothing on a Mac.
        architecture: of this Python; default what it says itself.
    """
    if reason := reason or (elsewhere() if read is read_command else None):
        return skipped("macOS", reason, "the build of macOS, Rosetta, power and thermal pressure")
    mac = describe_mac(read, architecture)
    notes = [f"macOS {mac.release or '?'} ({mac.build or '?'}), {mac.model or 'unknown model'}{_cores(mac)}"]
    notes.append(
        f"power: {mac.power_source or 'unknown'}, mode {mac.power_mode or 'unknown'}; "
        f"thermal pressure {mac.thermal_pressure or 'unknown'}"
    )
    if mac.power_mode == "low power" or mac.thermal_pressure not in ("", "nominal"):
        notes.append("the times below are slower than this Mac can be")
    if mac.release.partition(".")[0].isdecimal() and int(mac.release.partition(".")[0]) < _OLD_MACOS:
        notes.append(f"a Core ML package with several resolutions needs macOS {_OLD_MACOS}")
    return Check("macOS", tuple(notes), tuple(_faults(mac)), data={"macos": asdict(mac)})


def _cores(mac: Mac) -> str:
    known = ((mac.performance_cores, "performance"), (mac.efficiency_cores, "efficiency"))
    return "".join(f", {count} {kind} cores" for count, kind in known if count is not None)


def _faults(mac: Mac) -> list[str]:
    if mac.rosetta:
        return [
            "Python runs under Rosetta, where there is neither MLX nor Core ML's Neural Engine; install it for arm64"
        ]
    if not mac.apple_silicon:
        return ["this Mac has no Apple silicon, which MLX and the Neural Engine need"]
    return []
