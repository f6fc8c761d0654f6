"""The gate that Core ML itself is, with another runtime in its place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.gates import CORE_ML_GATES, ORIGINAL, check_package, core_ml, describe_checks
from fastvlm_convert.mil_check.runtime import CheckerRuntime
from fastvlm_convert.vision_package import raise_failures
from fastvlm_mlx.errors import EncoderError, VerificationError
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS, Function, Predict
from support.wrong_packages import FLOAT16, SQUARE, failing, noises


class Broken(CheckerRuntime):
    """Gives a function's features in another form than it should."""

    def __init__(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self._change = change

    def open(self, package: Path, function: Function, compute_units: str) -> Predict:
        predict = super().open(package, function, compute_units)
        return lambda inputs: {name: self._change(value) for name, value in predict(inputs).items()}


class NoNeuralEngine(CheckerRuntime):
    """Can't compile for the Neural Engine."""

    def open(self, package: Path, function: Function, compute_units: str) -> Predict:
        if compute_units == "CPU_AND_NE":
            raise EncoderError("Core ML can't load it: no such luck")
        return super().open(package, function, compute_units)


def by_core_ml(records):
    """What it said, or the runtime in its place."""
    return [record for record in records if record.executor.startswith("Core ML")]


def test_there_is_no_core_ml_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert core_ml() is None


def test_core_ml_runs_on_each_of_its_units(subject):
    runtime = CheckerRuntime()
    records = check_package(subject(), runtime=runtime)
    assert not failing(records)
    ran = [(record.function, record.picture, record.executor) for record in by_core_ml(records)]
    assert ran == [
        (function, picture, f"Core ML, {units}")
        for function in ("r128", "r128x192")
        for picture in ("1", "2")
        for units in COMPUTE_UNITS
    ]
    assert len(ran) == 2 * 2 * 4
    assert sorted(runtime.opened) == sorted(
        (function, units) for function in ("r128", "r128x192") for units in COMPUTE_UNITS for _ in range(2)
    )
    simulated = {(r.function, r.picture): r for r in records if r.executor == FLOAT16}
    for record in by_core_ml(records):
        assert (record.reference, record.gate) == (ORIGINAL, CORE_ML_GATES[16])
        # The same program in the same arithmetic: its own picture, function and reference.
        assert record.relative_l2 == simulated[record.function, record.picture].relative_l2


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        (lambda x: np.full_like(x, np.nan), None),
        (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.inf, x), None),
        (np.zeros_like, 1.0),
        (lambda x: x[:, ::-1], pytest.approx(1, abs=0.95)),
        (lambda x: x * 1.03, pytest.approx(0.03, abs=5e-3)),
    ],
    ids=["NaN", "one infinity", "zeros", "tokens backwards", "3 percent off"],
)
def test_garbage_from_core_ml_fails(subject, change, measured):
    records = check_package(subject(), [SQUARE], noises(1), Broken(change))
    assert failing(records) == {f"Core ML, {units}" for units in COMPUTE_UNITS}
    for record in by_core_ml(records):
        assert not record.passed
        assert record.relative_l2 == measured
        assert (record.max_abs is None) == (measured is None)


def test_another_shape_from_core_ml_fails(subject):
    records = check_package(subject(), [SQUARE], noises(1), Broken(lambda x: x.transpose(0, 2, 1)))
    assert {record.error for record in by_core_ml(records)} == {"made shape (1, 512, 4), expected (1, 4, 512)"}
    assert failing(records) == {f"Core ML, {units}" for units in COMPUTE_UNITS}


def test_units_that_cannot_load_it_fail_alone(subject):
    records = check_package(subject(), [SQUARE], runtime=NoNeuralEngine())
    assert len(records) == 3 + 2 * 4
    assert failing(records) == {"Core ML, CPU_AND_NE"}
    for record in by_core_ml(records):
        if not record.passed:
            assert record.error == "Core ML can't load it: no such luck"
            assert (record.relative_l2, record.max_abs, record.first_overflow) == (None, None, None)
            assert "relative L2" in describe_checks([record])
            assert "no such luck" in describe_checks([record])
    with pytest.raises(VerificationError, match=r"fails 2 of 11 gates .*Core ML, CPU_AND_NE.*no such luck"):
        raise_failures(records, "")
