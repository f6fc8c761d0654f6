"""Rates from known work and a clock that ticks as told; no time of this machine's is asserted."""

from __future__ import annotations

import json
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_bench import peaks
from fastvlm_bench.layers import Storage
from fastvlm_bench.peaks import PLAIN, Peaks, best_rate, measure_peaks
from fastvlm_mlx.errors import InputError

SMALL = {"seconds": 0.05, "memory_bytes": 1 << 20}


class Machine:
    """Runs jobs whose seconds are told by their size, and keeps their sizes; its own clock."""

    def __init__(self, seconds) -> None:
        self.seconds, self.now, self.ran = seconds, 0.0, []

    def clock(self):
        return self.now

    def job(self, size):
        def run():
            self.ran.append(size)
            seconds = self.seconds[size]
            self.now += seconds.pop(0) if isinstance(seconds, list) else seconds

        return run, 1000.0 * size


def test_the_fastest_repeat_of_the_best_size_counts():
    machine = Machine({1: 1.0, 2: [9.0, 4.0, 1.25, 2.0], 4: 8.0})
    assert best_rate(machine.job, (1, 2, 4), 2, 30, machine.clock) == 1600.0  # 2000 / 1.25, not 1000 / 1, not 4000 / 8
    assert machine.ran[:9] == [1] * 4 + [2] * 4 + [4]


def test_a_size_that_would_not_fit_is_left_out_and_its_time_goes_to_repeats():
    machine = Machine({1: 1.0, 2: 8.0})
    # After three repeats of 1 s, size 2 would need 3 x 8 s more than the 26 s; size 1 has them instead.
    assert best_rate(machine.job, (1, 2), 8, 26, machine.clock) == 1000.0
    assert machine.ran == [1] * 27  # the first is the warm-up
    machine = Machine({1: 1.0, 2: 8.0})
    best_rate(machine.job, (1, 2), 8, 27, machine.clock)
    assert machine.ran == [1] * 4 + [2] * 4


def test_the_least_size_always_runs():
    machine = Machine({1: 50.0})
    assert best_rate(machine.job, (1, 2), 8, 0.1, machine.clock) == 20.0
    assert machine.ran == [1] * 4


def test_exact_rates_from_a_clock_that_ticks_seconds():
    """Every run takes one tick of 4 s, too long for a second size: the least work by that."""
    ticks = iter(range(0, 10**6, 4))
    kinds = (Storage("float32"), Storage("bfloat16"), Storage("float32", bits=4))
    found = measure_peaks(kinds, seconds=1, memory_bytes=1 << 20, clock=lambda: next(ticks))
    matmul = 2 * 128**3 / 4
    assert found.matmul_flops == {"float32": matmul, "bfloat16": matmul, "4 bits, float32": matmul}
    assert found.bandwidth == 2 * 2**20 / 4  # read and written; the matrix times a vector reads half as much


def test_this_machine():
    found = measure_peaks(**SMALL)
    assert list(found.matmul_flops) == ["float32", "float16", "bfloat16"] == [kind.name for kind in PLAIN]
    assert all(rate > 0 for rate in found.matmul_flops.values())
    assert found.bandwidth > 0
    assert Peaks(**json.loads(json.dumps(asdict(found)))) == found


@pytest.fixture
def evaluated(monkeypatch):
    """What each call of `mx.eval` was given; it still computes."""
    calls, compute = [], mx.eval

    def evaluate(*arrays):
        calls.append(arrays)
        compute(*arrays)

    monkeypatch.setattr(mx, "eval", evaluate)
    return calls


def as_numpy(array):
    return np.array(array.astype(mx.float32), np.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_each_run_computes_a_product(evaluated, dtype, tolerance):
    run, work = peaks._matmul(Storage(dtype), 64)
    ((left, right),) = evaluated
    assert str(left.dtype) == str(right.dtype) == f"mlx.core.{dtype}"
    assert as_numpy(left).std() > 0.2, "uniform in [0, 1): 0.29"
    assert work == 2 * 64 * 64 * 64
    for runs in (1, 2):
        run()
        assert len(evaluated) == 1 + runs
        (product,) = evaluated[-1]
        np.testing.assert_allclose(as_numpy(product), as_numpy(left) @ as_numpy(right), rtol=tolerance)
    assert evaluated[1][0] is not evaluated[2][0], "what is kept would cost nothing"


def test_each_run_computes_a_product_with_packed_weights(evaluated):
    run, work = peaks._matmul(Storage("float32", bits=4), 64)
    ((left, *packed),) = evaluated
    run()
    (product,) = evaluated[1]
    right = mx.dequantize(*packed, group_size=64, bits=4)
    np.testing.assert_allclose(as_numpy(product), as_numpy(left) @ as_numpy(right).T, rtol=1e-5)
    assert work == 2 * 64 * 64 * 64


def test_each_pass_adds_one_in_place(evaluated):
    job = peaks._in_place(1 << 22)
    run, work = job(3)
    assert work == 3 * 2 * 2**22  # each pass reads it and writes it
    run()
    run()
    assert [np.unique(as_numpy(array)).tolist() for (array,) in evaluated] == [[4.0], [7.0]]
    assert evaluated[0][0].nbytes == 2**22
    evaluated.clear()  # nobody else holds it from here on
    run, _ = job(64)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    assert mx.get_peak_memory() - before < 2**22, "a second array would be traffic that isn't counted"
    assert np.unique(as_numpy(evaluated[0][0])).tolist() == [71.0]


def test_each_pass_multiplies_by_the_matrix(evaluated):
    job = peaks._reading(1 << 20)
    ((matrix,),) = evaluated
    assert matrix.nbytes == 2**20
    for passes in (1, 5):
        run, work = job(passes)
        assert work == passes * 2**20
        run()
        (vector,) = evaluated[-1]
        assert vector.shape == (512, 1)
        np.testing.assert_allclose(as_numpy(vector), 2.0**passes, rtol=1e-4)


def test_the_same_kind_is_measured_once():
    ticks = iter(range(10**6))
    measure_peaks([Storage("float32")] * 5, **SMALL, clock=lambda: next(ticks))
    assert next(ticks) == 3 * 3 * 2  # one matmul and two ways through memory, three repeats, two looks at the clock


@pytest.mark.parametrize(
    ("storage", "rate"),
    [
        (Storage("float32"), 3.0),
        (Storage("bfloat16"), 5.0),
        (Storage("bfloat16", bits=4), 5.0),  # unpacked first
        (Storage("float32", bits=4), 7.0),
        (Storage("float16", bits=4), 2.0),  # never measured plain
        (Storage("float32", bits=8), 3.0),  # never measured quantised
    ],
)
def test_rate(storage, rate):
    measured = {
        "float32": 3.0,
        "bfloat16": 5.0,
        "4 bits, bfloat16": 4.0,
        "4 bits, float32": 7.0,
        "4 bits, float16": 2.0,
    }
    assert Peaks(measured, 1.0).rate(storage) == rate


def test_a_rate_that_was_not_measured():
    with pytest.raises(InputError, match=r"rate of float16, they have float32; measure it too"):
        Peaks({"float32": 1.0}, 1.0).rate(Storage("float16"))
