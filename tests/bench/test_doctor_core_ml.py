"""What the doctor times of Core ML, with runtimes and a clock of known times."""

from __future__ import annotations

import json
import pickle
import shutil
import time

import numpy as np
import pytest

from fastvlm_bench.doctor.coreml_side import (
    Apple,
    Compiler,
    CoreMLState,
    Measured,
    Row,
    check_core_ml,
    compile_first,
    compile_package,
    measure,
    measure_all,
)
from fastvlm_bench.doctor.plan import Plan
from fastvlm_bench.doctor.worker import WorkError
from fastvlm_mlx.vision.compute_plan import open_plan
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS, AppleRuntime, Function
from support.doctor import Told

SIZE = (64, 128)


def row(units, *times_ms, size=SIZE, features=None):
    return Row(size, units, Measured(1.5, 0.25, 30.0, times_ms, np.zeros((2, 4)) if features is None else features))


class Clock:
    """Seconds that pass only as told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class SlowRuntime:
    """100 s to describe the package, 5 s and then 3 s to open it, 0.25 s to predict."""

    def __init__(self, clock):
        self.clock, self.opens = clock, [5.0, 3.0]

    def functions(self, package):
        self.clock.now += 100
        return [Function("r", "image", True, *SIZE, "features")]

    def open(self, package, function, compute_units):
        self.clock.now += self.opens.pop(0)

        def predict(inputs):
            self.clock.now += 0.25
            return {"features": np.ones((1, 2, 4), np.float16)}

        return predict


class CompilingRuntime(SlowRuntime):
    """It takes 40 s to compile, or 1 s to see that it needn't."""

    needed = True

    def compile(self, package):
        self.clock.now += 40 if self.needed else 1
        return self.needed


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def test_what_is_timed(clock, tmp_path):
    state = CoreMLState(tmp_path, Apple(lambda: SlowRuntime(clock)))
    found = measure(state, SIZE, "ALL", 3, 60.0)
    assert (found.load_s, found.again_s, found.first_ms) == (5.0, 3.0, 250.0)
    assert found.times_ms == (250.0, 250.0, 250.0)
    assert not found.compiled


def test_compiling_is_timed_apart_where_it_can_be(clock, tmp_path):
    state = CoreMLState(tmp_path, Apple(lambda: CompilingRuntime(clock)))
    assert compile_package(state) == 40.0
    state.runtime.needed = False
    assert compile_package(state) is None
    assert compile_package(CoreMLState(tmp_path, Apple(lambda: SlowRuntime(clock)))) is None
    assert issubclass(AppleRuntime, Compiler)


@pytest.mark.parametrize("name", ["new", "damaged"])
def test_a_row_says_that_it_was_compiled_in_it(clock, tmp_path, monkeypatch, name):
    """Also where a compiled form that was there has been made again."""
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "cache" / "coreml" / f"{name}.mlmodelc"
    if name == "damaged":
        target.mkdir(parents=True)
        (tmp_path / "cache" / "coreml" / "other.mlmodelc").mkdir()

    class Remade(SlowRuntime):
        def open(self, *args):
            made = super().open(*args)
            other = target.with_name("next")
            other.mkdir(parents=True)
            shutil.rmtree(target, ignore_errors=True)
            other.rename(target)
            return made

    found = measure(CoreMLState(tmp_path, Apple(lambda: Remade(clock))), SIZE, "ALL", 1, 60.0)
    assert found.compiled
    check = check_core_ml([Row(SIZE, "ALL", found), row("CPU_ONLY", 4.0)])
    assert [cells[2] for cells in check.table.rows] == ["5.00, compiled in this run", "1.50"]
    assert check.notes[0].startswith("the package was compiled in this run, in the time of the row that says so; ")
    assert [one["compiled"] for one in check.data["core_ml"]] == [True, False]


def test_what_is_said_of_compiling():
    rows = [row("ALL", 1.0)]
    found = check_core_ml(rows, compiled=compile_first(Told(compile_package=12.345)))
    assert found.notes[0].startswith("the package was compiled in this run, which took 12.35 s and is in no row; ")
    assert (found.data["compile_s"], found.status) == (12.345, "ok")
    assert check_core_ml(rows).notes[0].startswith("the package was compiled for this Mac before; ")

    def fail():
        raise WorkError("the process was ended by SIGABRT")

    found = check_core_ml([Row(SIZE, "ALL", None, "boom")], compiled=compile_first(Told(compile_package=fail)))
    assert found.failures == ("compiling: the process was ended by SIGABRT", "64x128 px on ALL: boom")
    assert found.notes[0].startswith("the package was not compiled; ")


def test_whatever_is_raised_becomes_a_row():
    def tell(size, units, runs, seconds):
        if units == "ALL":
            raise ValueError("odd")
        return (size, units, runs, seconds)

    rows = measure_all(Told(measure=tell), [(64, 64), SIZE], Plan(runs=3, seconds=4.0))
    assert [(row.size, row.units) for row in rows] == [(s, u) for s in ((64, 64), SIZE) for u in COMPUTE_UNITS]
    assert {row.error for row in rows if row.units == "ALL"} == {"odd (ValueError)"}
    assert rows[0].measured == ((64, 64), "CPU_AND_NE", 3, 4.0)


def test_a_worker_can_be_told_of_core_ml_itself():
    found = pickle.loads(pickle.dumps(Apple()))
    assert (found.make_runtime, found.open_plan) == (AppleRuntime, open_plan)


def test_core_mls_times():
    rows = [
        row("CPU_AND_NE", 5.0, 1.0, 3.0),
        Row(SIZE, "ALL", None, "boom"),
        Row((64, 64), "ALL", None, "boom"),
        row("CPU_ONLY", 4.0),
    ]
    found = check_core_ml(rows, ["a note"])
    assert found.failures == ("64x128 px on ALL, 64 px on ALL: boom",)
    assert found.table.rows == (
        ("64x128", "CPU_AND_NE", "1.50", "0.25", "30.0", "3.0 (1.0-5.0)", "3"),
        ("64x128", "ALL", "failed", "", "", "", ""),
        ("64", "ALL", "failed", "", "", "", ""),
        ("64x128", "CPU_ONLY", "1.50", "0.25", "30.0", "4.0 (4.0-4.0)", "1"),
    )
    assert found.notes[1:] == ("a note",)
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("engine", "processor", "slow"),
    [(31.0, 20.0, True), (29.0, 20.0, False), (6.0, 1.5, False), (7.0, 1.5, True), (5.0, 90.0, False)],
)
def test_a_neural_engine_slower_than_the_cpu(engine, processor, slow):
    """By half as much again, and by more than 5 ms."""
    failures = check_core_ml([row("CPU_AND_NE", engine), row("CPU_ONLY", processor)]).failures
    assert bool(failures) == slow
    assert all("64x128 px: CPU_AND_NE takes" in text for text in failures)
