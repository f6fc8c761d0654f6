"""What is said about a machine."""

from __future__ import annotations

import os
import subprocess
import sys

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


@pytest.mark.skipif(sys.platform != "linux", reason="MLX takes its matmul from OpenBLAS on Linux only")
def test_numpys_private_openblas_does_not_count():
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import numpy; numpy.ones((2, 2)) @ numpy.ones((2, 2))\n"
        "from fastvlm_bench.machine import loaded_openblas; print(repr(loaded_openblas()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "''"
