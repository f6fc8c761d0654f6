"""What is kept of this machine is found again; what is of another one isn't."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastvlm_bench.machine import describe_machine, loaded_openblas
from fastvlm_mlx import measurement_cache
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.measurement_cache import machine_facts, save_measurements, saved_measurements
from support.reports import MACHINE, point, report, subject


@pytest.fixture(autouse=True)
def _empty(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))


def here(points, date="2026-01-01T00:00:00+00:00", **machine):
    facts = machine_facts()
    own = {name: facts[name] for name in ("device", "cores", "mlx")}
    return report([subject()], points, date=date, machine=MACHINE | own | machine)


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


@pytest.mark.parametrize("fact", ["platform", "device", "cores", "openblas", "mlx", "fastvlm-mlx"])
def test_another_machines_are_not_taken(monkeypatch, fact):
    save_measurements(here([point(0, 256, 1, 2)]))
    monkeypatch.setattr(measurement_cache, "machine_facts", lambda: machine_facts() | {fact: "another"})
    assert saved_measurements() == []


@pytest.mark.parametrize("other", [{"device": "gpu: Apple M9"}, {"cores": 4096}, {"mlx": "0.1"}])
def test_another_machines_are_not_kept(other):
    with pytest.raises(InputError, match=r"measured with .*plan --from FILE"):
        save_measurements(here([point(0, 256, 1, 2)], **other))
    assert saved_measurements() == []


def test_what_fastvlm_bench_says_of_this_machine_is_taken():
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
    with pytest.raises(InputError, match="format_version 2"):
        save_measurements({"format_version": 1})


def test_damaged_files_are_passed_over():
    path = save_measurements(here([point(0, 256, 1, 2)]))
    (path.parent / "0000.json").write_text("{")
    assert len(saved_measurements()) == 1


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "file"))
    assert save_measurements(here([point(0, 256, 1, 2)])) is None
    assert saved_measurements() == []
