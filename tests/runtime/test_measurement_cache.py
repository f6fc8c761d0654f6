"""What is kept of this machine is found again; what is of another one isn't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import pytest

from fastvlm_bench.machine import describe_machine, loaded_openblas
from fastvlm_mlx import measurement_cache
from fastvlm_mlx.measurement_cache import (
    machine_facts,
    save_measurements,
    save_slowest,
    saved_measurements,
    saved_slowest,
)
from support.reports import MACHINE, point, report, subject


@pytest.fixture(autouse=True)
def _empty(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))


def here(points, date="2026-01-01T00:00:00+00:00", more=None, **machine):
    facts = machine_facts()
    own = {name: facts[name] for name in ("device", "cores", "mlx")}
    return report([subject()], points, date=date, machine=MACHINE | own | machine, **(more or {}))


def test_kept_and_found(tmp_path):
    assert saved_measurements() == []
    path = save_measurements(here([point(0, 256, 1, 2)]))
    assert path.is_relative_to(tmp_path / "cache" / "measurements")
    (found,) = saved_measurements()
    assert found.where == str(path)
    assert found.points[0][0].ttft.median == 3


def test_the_same_question_again_takes_its_place_and_others_stay():
    save_measurements(here([point(0, 256, 1, 2)], "2026-01-02T00:00:00+00:00"))
    save_measurements(here([point(0, 512, 5, 5)], "2026-01-01T00:00:00+00:00"))
    save_measurements(here([point(0, 256, 1, 8)], "2026-01-03T00:00:00+00:00"))
    save_measurements(here([point(0, 256, 1, 4, text_tokens=50)], "2026-01-04T00:00:00+00:00"))
    assert [[p.ttft.median for p in r.points[0]] for r in saved_measurements()] == [[10], [9], [5]], "oldest first"


@pytest.mark.parametrize(
    "fact", ["platform", "macos", "device", "cores", "threads", "openblas", "mlx", "coremltools", "fastvlm-mlx"]
)
def test_another_machines_are_not_taken(monkeypatch, fact):
    assert save_measurements(here([point(0, 256, 1, 2)]))
    assert save_slowest("me", {256: 9.0})
    here_facts = machine_facts()
    assert fact in here_facts
    monkeypatch.setattr(measurement_cache, "machine_facts", lambda: here_facts | {fact: "another"})
    assert saved_measurements() == []
    assert saved_slowest("me") == {}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"])
def test_times_with_other_limits_of_threads_are_other_times(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    save_measurements(here([point(0, 256, 1, 2)]))
    assert len(saved_measurements()) == 1
    monkeypatch.setenv(name, "3")
    assert saved_measurements() == []


def test_times_of_another_macos_are_other_times(monkeypatch):
    save_measurements(here([point(0, 256, 1, 2)]))
    monkeypatch.setattr(measurement_cache.platform, "mac_ver", lambda: ("99.1", ("", "", ""), "arm64"))
    assert saved_measurements() == []


@pytest.mark.parametrize("installed", ["99.0", None])
def test_times_with_another_coremltools_are_other_times(monkeypatch, installed):
    def of(name):
        if name != "coremltools":
            return version(name)
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(measurement_cache, "version", lambda name: "98.0" if name == "coremltools" else version(name))
    save_measurements(here([point(0, 256, 1, 2)]))
    monkeypatch.setattr(measurement_cache, "version", of)
    assert saved_measurements() == []
    assert machine_facts()["coremltools"] == (installed or "")


@pytest.mark.parametrize("other", [{"device": "gpu: Apple M9"}, {"cores": 4096}, {"mlx": "0.1"}])
def test_another_machines_are_not_kept(other):
    assert save_measurements(here([point(0, 256, 1, 2)], **other)) is None
    assert saved_measurements() == []


@pytest.mark.parametrize(
    "more",
    [
        {"image": "/home/me/synthetic photo.png"},
        {"image": "screenshot.png"},
        {"plan": {"runs": 9, "warmup": 1}},
        {"plan": {"runs": 10, "warmup": 0}},
        {"plan": None},
    ],
)
def test_unusual_measurements_are_not_kept(more):
    assert save_measurements(here([point(0, 256, 1, 2)], more=more)) is None
    assert saved_measurements() == []
    assert save_measurements(here([point(0, 256, 1, 2)], more={"plan": {"runs": 10, "warmup": 1}}))


@pytest.mark.parametrize("info", [None, {}])
def test_what_fastvlm_bench_says_of_this_machine_is_taken(monkeypatch, info):
    if info is not None:  # an MLX that has no name for its device
        monkeypatch.setattr("mlx.core.device_info", lambda *_: info)
    assert save_measurements(here([point(0, 256, 1, 2)], **asdict(describe_machine())))
    machine = describe_machine()
    facts = machine_facts()
    assert (machine.device, machine.cores, machine.mlx) == (facts["device"], facts["cores"], facts["mlx"])
    assert facts["openblas"] == bool(loaded_openblas())


@pytest.mark.skipif(sys.platform != "linux", reason="MLX takes its matmul from OpenBLAS on Linux only")
def test_times_without_openblas_are_other_times():
    code = "from fastvlm_mlx.measurement_cache import machine_facts as f; print(f()['openblas'])"
    code = f"import sys; sys.path[:] = {sys.path!r}; import fastvlm_mlx.accelerate as a; a.prepare_cpu(); {code}"
    environment = os.environ | {"FASTVLM_OPENBLAS": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_report_is_kept():
    assert save_measurements({"format_version": 1}) is None


def test_damaged_files_are_passed_over():
    path = save_measurements(here([point(0, 256, 1, 2)]))
    (path.parent / "0000.json").write_text("{")
    assert len(saved_measurements()) == 1


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "file"))
    assert save_measurements(here([point(0, 256, 1, 2)])) is None
    assert saved_measurements() == []
    assert save_slowest("me", {256: 9.0}) is None


def test_slow_ends_are_kept_by_model():
    assert saved_slowest("me") == {}
    save_slowest("me", {256: 9.5, 512: 20.0})
    save_slowest("me", {512: 21.0, 1024: 80.0})
    save_slowest("another", {256: 1.0})
    assert saved_slowest("me") == {256: 9.5, 512: 21.0, 1024: 80.0}
    assert saved_slowest("another") == {256: 1.0}
    assert saved_measurements() == [], "they are no reports"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"identity": "me", "slowest_ms": {"a": 1}}',
        '{"identity": "me", "slowest_ms": {"64": null}}',
        '{"identity": "me", "slowest_ms": {"64": NaN}}',
        '{"identity": "another", "slowest_ms": {"64": 1}}',
    ],
)
def test_damaged_slow_ends_are_passed_over(text):
    path = save_slowest("me", {256: 9.5})
    path.write_text(text)
    assert saved_slowest("me") == {}
    save_slowest("me", {256: 9.5})
    assert saved_slowest("me") == {256: 9.5}


@pytest.mark.parametrize("name", ["mlx", "fastvlm-mlx"])
@pytest.mark.parametrize(
    "save", [lambda: save_measurements(here([point(0, 256, 1, 2)])), lambda: save_slowest("me", {64: 1})]
)
def test_what_other_versions_measured_is_dropped(monkeypatch, tmp_path, name, save):
    facts = machine_facts()
    folders = []
    for other in ({name: "0.0.1"}, {"cores": 4096}):
        with monkeypatch.context() as patch:
            patch.setattr(measurement_cache, "machine_facts", lambda other=other: facts | other)
            path = save_slowest("me", {256: 9.5})
            folders.append(path.parent.parent)
    damaged = tmp_path / "cache" / "measurements" / "damaged"
    damaged.mkdir()
    (damaged / "facts.json").write_text("[")
    assert save()
    assert [folder.exists() for folder in folders] == [False, True], "the same machine with other cores comes back"
    assert damaged.exists()
    assert json.loads((folders[1] / "facts.json").read_text())["cores"] == 4096
