"""Loading in a new process: what is timed, what is dropped from the system's cache before, what an error says."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from fastvlm_bench import loads
from fastvlm_bench.loads import cold_load
from fastvlm_mlx import load
from fastvlm_mlx.errors import EncoderError, FastVLMError, InputError


def test_a_new_process_takes_no_longer_than_all_of_it(bundle):
    begin = time.perf_counter()
    found = cold_load({"model": str(bundle("tiny")), "vision": "mlx"})
    wall_ms = (time.perf_counter() - begin) * 1e3
    assert 20 < found < wall_ms, "importing MLX alone takes longer"


def test_seconds_become_milliseconds(monkeypatch, tmp_path):
    monkeypatch.setattr(loads, "_SCRIPT", "print('chatter'); print('{\"seconds\": 1.5}')")
    assert cold_load({"model": str(tmp_path)}) == 1500.0


def test_the_files_are_dropped_from_the_cache_before(monkeypatch, tmp_path):
    """All of each file, those in folders below too; then the process starts."""
    (tmp_path / "vision.mlpackage").mkdir()
    files = [tmp_path / "config.json", tmp_path / "vision.mlpackage" / "weights.bin"]
    for file in files:
        file.write_text("x")
    events, start = [], subprocess.run

    def advise(descriptor, offset, length, advice):
        events.append((os.fstat(descriptor).st_ino, offset, length, advice))

    def run(*args, **kwargs):
        events.append("process")
        return start(*args, **kwargs)

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(loads.subprocess, "run", run)
    monkeypatch.setattr(loads, "_SCRIPT", "print('{\"seconds\": 1}')")
    cold_load({"model": str(tmp_path)})
    assert events.pop() == "process"
    assert sorted(events) == sorted((file.stat().st_ino, 0, 0, 4) for file in files)


def test_a_system_without_such_a_call(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("x")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    loads.evict(tmp_path)  # not an error: the files are as they were
    assert (tmp_path / "config.json").read_text() == "x"


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs there")
@pytest.mark.parametrize(
    ("arguments", "kind"), [({"vision": "coreml"}, EncoderError), ({"quantize": 17, "vision": "mlx"}, InputError)]
)
def test_an_error_is_the_one_of_load(bundle, arguments, kind):
    arguments = arguments | {"model": str(bundle("tiny"))}
    with pytest.raises(kind) as here:
        load(**arguments)
    with pytest.raises(kind) as there:
        cold_load(arguments)
    assert (type(there.value), str(there.value)) == (type(here.value), str(here.value))
    assert there.value.exit_code == 1
    assert kind("").exit_code == here.value.exit_code, "of that one error only"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (loads._SCRIPT.replace("load(**", "raise ValueError('odd'); load(**"), "odd (ValueError)"),
        ("import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(7)", "last words"),
        ("import os; os._exit(7)", "exit code 7"),
    ],
)
def test_other_failures(monkeypatch, tmp_path, script, text):
    monkeypatch.setattr(loads, "_SCRIPT", script)
    with pytest.raises(FastVLMError) as caught:
        cold_load({"model": str(tmp_path)})
    assert str(caught.value) == f"loading {tmp_path} in a new process failed: {text}"
    assert caught.value.exit_code == 1
