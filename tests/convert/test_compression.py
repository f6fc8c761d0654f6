"""8-bit weights: what coremltools packs and leaves of them, against what the converter says it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_convert.compression import BLOCK, LEAST_ELEMENTS, add_to, fits, packed
from support.mil_programs import operations, quiet, read_specification, save_program, weight_file

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.mil_check import execute, open_package

RANDOM = np.random.default_rng(11)


def normal(outputs: int, inputs: int, scale: Any = 1.0) -> np.ndarray:
    return (RANDOM.normal(size=(outputs, inputs)) * scale).astype(np.float32)


def blocks_of(scales: np.ndarray, outputs: int = 128) -> np.ndarray:
    """Weights whose blocks have these scales, cycled through."""
    scales = np.resize(scales, (outputs, 3))
    return normal(outputs, 3 * BLOCK, np.repeat(scales, BLOCK, axis=1))


def halves(outputs: int, inputs: int) -> np.ndarray:
    """Levels of 0.5, and weights in the middle between two of them, but for the peak of each block."""
    weights = (RANDOM.integers(-127, 127, (outputs, inputs)) + 0.5) / 2
    weights[:, ::BLOCK] = 63.5
    return weights.astype(np.float32)


MATRICES = {
    "as few as are packed": normal(313, 32),
    "two blocks a row": normal(160, 64),
    "wide": normal(24, 512),
    "no block like another": blocks_of(10.0 ** np.arange(-4, 3)),
    "all zero": np.zeros((128, 96), np.float32),
    "some blocks zero": blocks_of(np.array([1, 0, 0.1, 0, 0])),
    "mostly zero": normal(128, 96) * (RANDOM.random((128, 96)) < 0.05),
    "one sign": np.abs(normal(128, 96)),
    # Twice the peak must stay within float16, or the scale is infinite, in coremltools as here.
    "huge": np.clip(normal(128, 96, 2e4), -32000, 32000),
    "small": blocks_of(np.array([1e-2, 1e-3, 3e-4])),
    "subnormal scales": blocks_of(np.array([3e-5, 1e-5, 5e-6])),
    "scales that vanish": blocks_of(np.array([1e-6, 1e-7])),
    "halfway between two levels": halves(128, 96),
}
KEPT = {
    "too few": normal(312, 32),
    "odd inputs": normal(160, 80),
    "fewer inputs than a block": normal(800, 16),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Name of a matrix -> its package with 16 bits, and with 8."""
    folder, made = tmp_path_factory.mktemp("packed"), {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            weight = {**MATRICES, **KEPT}[name].astype(np.float16)[..., None, None]
            plain, small = (folder / f"{len(made)} {bits}.mlpackage" for bits in (16, 8))

            def build(x: Any) -> Any:
                from coremltools.converters.mil.mil import Builder as mb

                return mb.conv(x=x, weight=weight, name="y")

            shapes = [(1, weight.shape[1], 1, weight.shape[1])]
            save_program(plain, build, shapes, half=True)
            save_program(small, build, shapes, half=True, passes=add_to)
            made[name] = plain, small
        return made[name]

    return get


def decoded(package: Path, inputs: int) -> np.ndarray:
    """The weights that the checker multiplies with: a unit matrix through the convolution."""
    unit = np.eye(inputs, dtype=np.float32)[None, :, None]
    with quiet():
        found = execute(open_package(package).program(), {"x": unit}, "float32").outputs["y"]
    return found[0, :, 0]


def is_packed(package: Path) -> bool:
    with quiet():
        return "constexpr_blockwise_shift_scale" in {op.type for op in operations(read_specification(package))}


@pytest.mark.parametrize("name", MATRICES)
def test_what_is_left_is_what_coremltools_packs(packages, name):
    weights, package = MATRICES[name], packages(name)[1]
    assert fits(weights)
    assert is_packed(package)
    left = packed(weights)
    assert (left.shape, left.dtype) == (weights.shape, np.float32)
    np.testing.assert_array_equal(decoded(package, weights.shape[1]), left)


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_fit_is_left_alone(packages, name):
    weights, (plain, package) = KEPT[name], packages(name)
    assert not fits(weights)
    assert not is_packed(package)
    np.testing.assert_array_equal(decoded(package, weights.shape[1]), weights.astype(np.float16))
    assert weight_file(package).stat().st_size == weight_file(plain).stat().st_size


def test_only_big_matrices_fit():
    """Of 10,000 elements: no matrix with whole blocks has just as many, 9,984 and 10,016 are the nearest."""
    assert (BLOCK, LEAST_ELEMENTS, LEAST_ELEMENTS % BLOCK) == (32, 10_000, 16)
    assert [fits(np.zeros(shape)) for shape in ((312, 32), (313, 32), (625, 16), (100, 100))] == [0, 1, 0, 0]
    assert not fits(np.zeros((512, 7, 7, 1)))  # a depthwise convolution
    assert not fits(np.zeros((16, 7, 7, 32)))
    assert not fits(np.zeros(20_480))  # a bias


@pytest.mark.parametrize("name", ["two blocks a row", "wide", "one sign", "huge", "halfway between two levels"])
def test_no_weight_moves_by_more_than_half_a_level(name):
    weights = MATRICES[name].astype(np.float16).astype(np.float64).reshape(-1, BLOCK)
    level = np.abs(weights).max(axis=1, keepdims=True) / 127
    moved = np.abs(packed(MATRICES[name]).astype(np.float64).reshape(-1, BLOCK) - weights)
    # Scale and product are rounded to float16: at the outermost level a 2048th of 127 levels each.
    assert (moved <= level * (0.5 + 2 * 127 / 2048)).all()


def test_zero_stays_zero():
    weights = MATRICES["some blocks zero"]
    assert (packed(weights)[weights == 0] == 0).all()
    assert not packed(MATRICES["all zero"]).any()


def test_half_the_size(packages):
    """A byte a weight instead of two, and two bytes for the scale of 32 weights."""
    plain, small = (weight_file(package).stat().st_size for package in packages("wide"))
    assert small / plain == pytest.approx((1 + 2 / BLOCK) / 2, rel=0.02)
