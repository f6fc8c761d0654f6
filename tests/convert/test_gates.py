"""The gates of a Core ML package: what is right passes, and of each thing that can be wrong, which of them says so.

A wrong package is a right one whose files were changed: nothing in our network knows of the fault.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.coreml_vision import Size
from fastvlm_convert.gates import EXACT_GATE, HALF_GATES, ORIGINAL, STORED, check_package, describe_checks
from fastvlm_convert.mil_check import open_package
from fastvlm_convert.vision_package import raise_failures
from fastvlm_mlx.errors import BundleError, ResolutionError, VerificationError
from support.mil_programs import operations, quiet, read_specification, weight_file
from support.wrong_packages import (
    FLOAT16,
    FLOAT32,
    SQUARE,
    WIDE,
    Fault,
    by_columns,
    colour_space,
    failing,
    flip,
    noises,
    one_step,
    parameter,
    spoilt,
    swap_channels,
    weights,
    without_bias,
    without_means,
)

EARLY, LARGEST = "stages_0_blocks_0_ffn_depthwise", "stages_4_blocks_0_ffn_fc2"
FIRST, LAST, SECOND = slice(1), slice(-1, None), slice(1, 2)
TANH, SIGMOID = "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"
BOTH, ALONE, NEITHER = {FLOAT32, FLOAT16}, {FLOAT32}, set()
# What is wrong, and which gates say so. Behind it what was measured: relative L2 in float32 (1e-5 at most), and in
# float16 on each of the two pictures (5e-3 at most on both).
CONTROLS: dict[str, tuple[Fault, set[str]]] = {
    "nothing": (lambda *_: None, NEITHER),  # 1.0e-06; 1.6e-03, 2.0e-03
    "red and blue swapped in the image": (colour_space, BOTH),  # 4.8e-01; 4.8e-01, 4.1e-01
    "red and blue swapped in the weights": (weights("stem_conv", swap_channels), BOTH),  # 4.8e-01; 4.8e-01, 4.1e-01
    "the first softmax over queries": (parameter("softmax", "axis", -2, FIRST), BOTH),  # 9.3e-01; 9.3e-01, 3.0e-01
    "the last softmax over queries": (parameter("softmax", "axis", -2, LAST), BOTH),  # 6.6e-01; 6.6e-01, 2.1e-01
    "softmax over queries": (parameter("softmax", "axis", -2), BOTH),  # 1.0e+00; 1.0e+00, 3.6e-01
    "a softmax over heads": (parameter("softmax", "axis", 1, FIRST), BOTH),  # 5.4e+00; 5.4e+00, 1.4e+00
    "attention transposed": (parameter("matmul", "transpose_y", False, SECOND), BOTH),  # 8.9e-01; 8.9e-01, 2.7e-01
    "the first LayerNorm without mean": (without_means(FIRST), BOTH),  # 2.8e-01; 2.8e-01, 1.7e-01
    "LayerNorm without mean": (without_means(), BOTH),  # 4.2e-01; 4.2e-01, 2.3e-01
    "epsilon 1e-3 in stage 4": (parameter("add", "y", 1e-3, FIRST), BOTH),  # 3.7e-02; 3.7e-02, 2.0e-03
    "epsilon 1e-3 in stage 5": (parameter("add", "y", 1e-3, LAST), BOTH),  # 2.0e-02; 2.0e-02, 2.0e-03
    "tanh in the first GELU": (parameter("gelu", "mode", TANH, FIRST), ALONE),  # 2.7e-04; 1.7e-03, 1.9e-03
    "tanh in the last GELU": (parameter("gelu", "mode", TANH, LAST), ALONE),  # 1.7e-04; 1.7e-03, 2.0e-03
    "tanh in every GELU": (parameter("gelu", "mode", TANH), ALONE),  # 1.1e-03; 2.0e-03, 2.3e-03
    "sigmoid in every GELU": (parameter("gelu", "mode", SIGMOID), BOTH),  # 1.2e-01; 1.2e-01, 3.7e-02
    "padding at the end only": (parameter("conv", "pad", [0, 1, 0, 1], FIRST), BOTH),  # 2.1e-01; 2.1e-01, 5.9e-01
    "a bias forgotten": (without_bias("stages_4_blocks_0_ffn_fc2"), BOTH),  # 1.5e-02; 1.5e-02, 5.9e-03
    "tokens by columns": (by_columns, BOTH),  # 8.1e-01; 8.1e-01, 8.7e-01
    # How small a fault may be: no block of 32 of any matrix escapes in float32, a last place of one weight does.
    "a block's sign": (weights("stages_3_blocks_0_ffn_fc1", flip(32)), BOTH),  # 2.1e-02; 2.1e-02, 7.0e-03
    "a faint block's sign": (weights(LARGEST, flip(32, 4096)), ALONE),  # 5.8e-04; 1.7e-03, 2.5e-03
    "one weight's sign": (weights(LARGEST, flip(1)), ALONE),  # 2.9e-04; 1.7e-03, 2.2e-03
    "an early weight's last place": (weights(EARLY, one_step), ALONE),  # 2.4e-05; 1.6e-03, 1.8e-03
    "a late weight's last place": (weights(LARGEST, one_step), NEITHER),  # 1.0e-06; 1.6e-03, 2.0e-03
}


@pytest.mark.parametrize("name", CONTROLS)
def test_which_gate_catches_it(subject, tmp_path, name):
    fault, catching = CONTROLS[name]
    records = check_package(spoilt(subject(), fault, tmp_path), [WIDE])
    assert [record.executor for record in records] == [FLOAT32, FLOAT16, FLOAT16]
    assert failing(records) == catching, describe_checks(records)


# The same with int8 weights, whose own error the gate in float16 leaves room for: 3e-2 at most.
PACKED_CONTROLS: dict[str, tuple[Fault, set[str]]] = {
    "nothing": (lambda *_: None, NEITHER),  # 9.5e-07; 1.8e-02, 1.2e-02
    "a block's sign": (weights("stages_3_downsample_pointwise", flip(32)), BOTH),  # 9.0e-02; 8.8e-02, 9.1e-02
    "a faint block's sign": (weights(LARGEST, flip(32)), ALONE),  # 8.3e-04; 1.8e-02, 1.4e-02
    "a step of one weight": (weights("stages_2_blocks_0_ffn_fc1", one_step), ALONE),  # 5.8e-05; 1.8e-02, 1.3e-02
    "tanh in every GELU": (parameter("gelu", "mode", TANH), ALONE),  # 1.1e-03; 1.9e-02, 1.3e-02
}


@pytest.mark.parametrize("name", PACKED_CONTROLS)
def test_which_gate_catches_it_in_int8(subject, tmp_path, name):
    fault, catching = PACKED_CONTROLS[name]
    records = check_package(spoilt(subject(bits=8, sizes=(WIDE,)), fault, tmp_path))
    assert {record.gate for record in records} == {EXACT_GATE, HALF_GATES[8]}
    assert failing(records) == catching, describe_checks(records)


def test_int8_is_the_same_program_in_little_more_than_half(subject):
    both = subject(), subject(bits=8, sizes=(WIDE,))
    half, packed = (weight_file(s.package).stat().st_size for s in both)  # functions share their weights
    assert 0.5 < packed / half < 0.6
    with quiet():
        half, packed = (open_package(s.package).program(WIDE.function).operations for s in both)
    assert [op.type for op in half] == [op.type for op in packed]


def test_what_cannot_run_is_an_error(subject, tmp_path):
    """A stride that leaves another map than the program says."""
    wrong = spoilt(subject(), parameter("conv", "strides", [1, 1], FIRST), tmp_path)
    with pytest.raises(BundleError, match=r"conv conv2d_cast_fp16 makes shape \(1, 16, 128, 192\), and the program"):
        check_package(wrong, [WIDE])
    assert not failing(check_package(wrong, [SQUARE]))  # this function is as it was


def test_a_right_package_passes_at_every_size(subject):
    right, said = subject(), []
    records = check_package(right, say=said.append)
    half = [(FLOAT16, ORIGINAL, picture, HALF_GATES[16]) for picture in ("1", "2")]
    assert [(r.function, r.executor, r.reference, r.picture, r.gate) for r in records] == [
        (size.function, *run) for size in (SQUARE, WIDE) for run in [(FLOAT32, STORED, "1", EXACT_GATE), *half]
    ]
    for record in records:
        assert record.passed
        assert 0 < record.relative_l2 <= record.gate
        assert 0 < record.max_abs < 1
        assert (record.first_overflow, record.error) == (None, None)
    assert said == [f"checking {size.function} on picture {i}" for size in (SQUARE, WIDE) for i in (1, 2)]
    assert describe_checks(records).count("passed") == len(records) == 6
    raise_failures(records, "never said")


def test_a_fault_shows_in_the_function_that_has_it(subject, tmp_path):
    """Functions share weights, not ops: only a check of all of them sees every fault."""
    wrong = spoilt(subject(), parameter("gelu", "mode", SIGMOID), tmp_path)
    records = check_package(wrong)
    assert {record.function for record in records if not record.passed} == {WIDE.function}
    assert not failing(check_package(wrong, [SQUARE]))
    wrong = spoilt(subject(), weights("stages_3_blocks_0_ffn_fc1", flip(32)), tmp_path / "weights")
    assert {record.function for record in check_package(wrong) if not record.passed} == {"r128", "r128x192"}


def test_the_pictures_are_those_asked_for(subject):
    """Each is a measurement of its own; float32 looks at the first."""
    records = check_package(subject(), [SQUARE], noises(3))
    assert [(record.executor, record.picture) for record in records] == [
        (FLOAT32, "1"), (FLOAT16, "1"), (FLOAT16, "2"), (FLOAT16, "3"),
    ]  # fmt: skip
    assert len({record.relative_l2 for record in records}) == 4
    assert not failing(records)


def test_a_size_that_is_not_there(subject):
    with pytest.raises(ResolutionError, match=r"has no function r192x128; it has r128, r128x192$"):
        check_package(subject(), [SQUARE, Size(192, 128)])


def test_the_first_overflow_is_named(subject):
    """tiny-hot without range safety: right in float32, beyond float16 in the residual stream of stage 5."""
    hot = subject("tiny-hot", sizes=(SQUARE,))
    records = check_package(hot)
    ops = [(op.type, op.outputs[0].name) for op in operations(read_specification(hot.package), "r128")]
    assert not any(record.passed for record in records)
    for record in records:
        assert record.first_overflow
        assert tuple(record.first_overflow.split(" ")) in ops
        assert f"first overflow at {record.first_overflow}" in describe_checks([record])
    exact, *half = records
    assert exact.relative_l2 <= EXACT_GATE  # float32 has room; the overflow alone fails it
    assert {(record.relative_l2, record.max_abs) for record in half} == {(None, None)}
    assert "relative L2 not finite" in describe_checks(half)


def test_failures_are_raised_with_what_helps(subject, tmp_path):
    records = check_package(spoilt(subject(), CONTROLS["tanh in every GELU"][0], tmp_path), [WIDE])
    with pytest.raises(VerificationError) as error:
        raise_failures(records, "--no-coreml leaves it out")
    assert re.search(
        r"fails 1 of 3 gates \(FAILED  r128x192, checker, float32, picture 1: relative L2 [\d.]+e-03 "
        r"\(at most 1e-05\)\); --no-coreml leaves it out$",
        str(error.value),
    )


def rename(specification: Any, _: Path) -> None:
    """A function that goes by another size's name, in the description and in the program."""
    functions = specification.mlProgram.functions
    functions["r64"].CopyFrom(functions["r128"])
    del functions["r128"]
    next(f for f in specification.description.functions if f.name == "r128").name = "r64"


def test_a_function_that_goes_by_another_name(subject, tmp_path):
    with pytest.raises(BundleError, match=r"has a function r64 for 128 x 128 px"):
        check_package(spoilt(subject(), rename, tmp_path))


def test_nothing_checked_is_no_pass(subject):
    with pytest.raises(VerificationError, match="nothing of the Core ML package was checked"):
        raise_failures(check_package(subject(), [SQUARE], noises(0)), "")
