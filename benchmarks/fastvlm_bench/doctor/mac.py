"""What macOS says of itself and of the Mac, by its own commands; all of them are quick and need no rights."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Read = Callable[[Sequence[str]], str]  # a command -> its output, "" if it failed

_SECONDS = 10.0
# OSThermalNotification.h; what thermald publishes, and powermetrics shows as "pressure level"
_PRESSURES = ("nominal", "moderate", "heavy", "trapping", "sleeping")
_POWER_MODES = {"0": "automatic", "1": "low power", "2": "high power"}


@dataclass(frozen=True, slots=True)
class Mac:
    """A Mac at this moment; None or "" is what it didn't say.

    Attributes:
        release: of macOS, such as "15.5".
        build: such as "24F74".
        model: such as "Mac15,6".
        apple_silicon: whether its processor is Apple's.
        rosetta: whether Python is an Intel program that is translated.
        performance_cores: physical ones.
        efficiency_cores: physical ones.
        power_source: such as "AC Power".
        power_mode: "automatic", "low power" or "high power".
        thermal_pressure: "nominal", "moderate", "heavy", "trapping" or "sleeping".
    """

    release: str
    build: str
    model: str
    apple_silicon: bool
    rosetta: bool
    performance_cores: int | None
    efficiency_cores: int | None
    power_source: str
    power_mode: str
    thermal_pressure: str


def elsewhere() -> str | None:
    """Why nothing of Apple's can be checked here; None on a Mac."""
    if sys.platform == "darwin":
        return None
    return f"needs macOS 15 on Apple silicon, this is {platform.system()} on {platform.machine()}"


def read_command(command: Sequence[str]) -> str:
    """A command's output, or "" where it fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_mac(read: Read = read_command, architecture: str | None = None) -> Mac:
    """Ask macOS.

    Args:
        read: runs a command.
        architecture: of this Python; default what it says itself.
    """
    apple_silicon = _sysctl(read, "hw.optional.arm64") == "1"
    settings = read(("/usr/bin/pmset", "-g"))
    return Mac(
        release=read(("/usr/bin/sw_vers", "-productVersion")),
        build=read(("/usr/bin/sw_vers", "-buildVersion")),
        model=_sysctl(read, "hw.model"),
        apple_silicon=apple_silicon,
        rosetta=apple_silicon and (architecture or platform.machine()) != "arm64",
        performance_cores=_number(_sysctl(read, "hw.perflevel0.physicalcpu")),
        efficiency_cores=_number(_sysctl(read, "hw.perflevel1.physicalcpu")),
        power_source=_found(r"drawing from '(.+)'", read(("/usr/bin/pmset", "-g", "batt"))),
        power_mode=_POWER_MODES.get(_found(r"^\s*(?:low)?powermode\s+(\d)", settings), ""),
        thermal_pressure=thermal_pressure(read),
    )


def thermal_pressure(read: Read = read_command) -> str:
    """How much macOS slows the chip down for heat, or "" where it doesn't say."""
    level = _number(_found(r"(\d+)$", read(("/usr/bin/notifyutil", "-g", "com.apple.system.thermalpressurelevel"))))
    return _PRESSURES[level] if level is not None and level < len(_PRESSURES) else ""


def _sysctl(read: Read, name: str) -> str:
    return read(("/usr/sbin/sysctl", "-n", name))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else ""


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
