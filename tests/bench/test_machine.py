"""What is said about a machine."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from fastvlm_bench import machine

ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n"
X86 = "processor\t: 0\nmodel name\t: Some(R)  CPU @ 2.80GHz\n\nprocessor\t: 1\nmodel name\t: Other\n"


@pytest.mark.parametrize(("text", "name"), [(X86, "Some(R) CPU @ 2.80GHz"), (ARM, ""), ("", "")])
def test_parse_cpuinfo(text, name):
    assert machine.parse_cpuinfo(text) == name


def test_describe_this_machine():
    found = machine.describe_machine()
    assert found.cpu
    assert found.platform
    assert 1 <= found.cores <= os.cpu_count()
    assert found.memory_bytes > 2**28
    assert found.device.partition(": ")[0] in ("cpu", "gpu")
    assert (found.openblas is None) == (sys.platform == "darwin")


def test_a_mac_is_asked_by_sysctl(monkeypatch):
    asked = {"machdep.cpu.brand_string": "Apple M2\n", "hw.memsize": "17179869184\n"}

    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout=asked[command[-1]])

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.cpu_name() == "Apple M2"
    assert machine._memory_bytes() == 16 * 2**30


def test_a_mac_without_sysctl_still_has_a_name(monkeypatch):
    def run(*_, **__):
        raise FileNotFoundError("sysctl")

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.cpu_name()
    assert machine._memory_bytes() == 0


MEMINFO = "MemTotal:       16000000 kB\nMemFree:          500000 kB\nMemAvailable:    8000000 kB\n"


def test_memory_for_people():
    assert machine.memory_text(3 * 2**29) == "1.5 GiB"
    assert machine.memory_text(0) == "memory unknown"


def test_parse_meminfo():
    assert machine.parse_meminfo(MEMINFO) == 8_192_000_000  # kB are KiB there
    assert machine.parse_meminfo("MemTotal: 1 kB\n") == 0


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """A Linux with 8 192 000 000 bytes available; called with the group of this process and the groups' files."""

    def make(own="", **files):
        for name, text in files.items():
            path = tmp_path / "groups" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "meminfo").write_text(MEMINFO)
        (tmp_path / "own").write_text(own)

    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    return make


LIMIT = {"memory_max": "3000000000\n", "memory_current": "1000000000\n"}


@pytest.mark.parametrize(
    ("own", "files", "available"),
    [
        ("0::/\n", {}, 8_192_000_000),
        ("", LIMIT, 8_192_000_000),
        ("9:name=systemd:/\n4:memory:/a\n", LIMIT, 8_192_000_000),  # version 1
        ("0::/\n", LIMIT, 2_000_000_000),
        ("4:memory:/a\n0::/a/b\n", LIMIT, 2_000_000_000),  # two groups above
        ("0::/\n", LIMIT | {"memory_stat": "anon 5\nfile 9\ninactive_file 400000000\n"}, 2_400_000_000),
        ("0::/\n", LIMIT | {"memory_max": "max\n"}, 8_192_000_000),
        ("0::/\n", LIMIT | {"memory_max": "900000000000\n"}, 8_192_000_000),
        ("0::/\n", LIMIT | {"memory_max": "900000000\n"}, 1),  # lowered afterwards; 0 would be unknown
        ("0::/a\n", LIMIT | {"a__memory_max": "1500000000", "a__memory_current": "1"}, 1_499_999_999),
        ("0::/b\n", LIMIT | {"a__memory_max": "1500000000", "a__memory_current": "1"}, 2_000_000_000),
    ],
)
def test_a_control_group_may_have_less(linux, own, files, available):
    linux(own, **files)
    assert machine.available_bytes() == available


def test_a_linux_that_says_nothing(linux):
    linux("0::/\n", **LIMIT)
    machine._MEMINFO.unlink()
    assert machine.available_bytes() == 0


@pytest.mark.parametrize(
    ("told", "available"),
    [
        ({"device_name": "H", "total_memory": 300, "free_memory": 200}, 200),
        ({"device_name": "H", "total_memory": 300}, 300),
        ({"device_name": "H", "memory_size": 400}, 400),
        ({"device_name": "H", "total_memory": "many"}, 8_192_000_000),
        ({}, 8_192_000_000),
    ],
)
def test_a_gpu_has_memory_of_its_own(linux, monkeypatch, told, available):
    linux()
    monkeypatch.setattr(mx, "device_info", lambda *_: told)
    assert machine.available_bytes() == 8_192_000_000, "MLX computes on the CPU"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert machine.available_bytes() == available


def test_a_macs_memory_is_what_metal_recommends(monkeypatch):
    told = {"memory_size": 16 * 2**30, "max_recommended_working_set_size": 11 * 2**30}
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(mx, "device_info", lambda *_: told)
    assert machine.available_bytes() == 11 * 2**30


@pytest.mark.skipif(sys.platform != "linux", reason="MLX takes its matmul from OpenBLAS on Linux only")
def test_numpys_private_openblas_does_not_count():
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import numpy; numpy.ones((2, 2)) @ numpy.ones((2, 2))\n"
        "from fastvlm_bench.machine import loaded_openblas; print(repr(loaded_openblas()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "''"
