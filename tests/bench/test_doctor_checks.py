"""The doctor's checks one by one, on values made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm_bench import machine as bench_machine
from fastvlm_bench.doctor import machine as machine_check
from fastvlm_bench.doctor.check import Table
from fastvlm_bench.doctor.coreml_side import (
    Measured,
    Row,
)
from fastvlm_bench.doctor.mac import Mac, describe_mac
from fastvlm_bench.doctor.machine import check_macos, check_versions
from fastvlm_bench.doctor.mlx_checks import check_answer, check_encoder, check_products, judge_products
from fastvlm_bench.doctor.mlx_side import Answers, Encoded, MlxState, answer, encode, reference
from fastvlm_bench.doctor.parity import check_parity, relative_l2
from fastvlm_bench.doctor.placement import judge_placement
from fastvlm_bench.doctor.plan import Plan, sample_pixels
from fastvlm_bench.doctor.worker import WorkError
from fastvlm_bench.machine import Machine
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.vision.compute_plan import PlacedOp, Placement
from support.doctor import Told

SIZE = (64, 128)

SAID = {
    "/usr/bin/sw_vers -productVersion": "15.5",
    "/usr/bin/sw_vers -buildVersion": "24F74",
    "/usr/sbin/sysctl -n hw.model": "Mac15,6",
    "/usr/sbin/sysctl -n hw.optional.arm64": "1",
    "/usr/sbin/sysctl -n hw.perflevel0.physicalcpu": "6",
    "/usr/sbin/sysctl -n hw.perflevel1.physicalcpu": "5",
    "/usr/bin/pmset -g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t80%; discharging; 4:00",
    "/usr/bin/pmset -g": "System-wide settings:\nCurrently in use:\n standby   1\n lowpowermode    1\n sleep 1",
    "/usr/bin/notifyutil -g com.apple.system.thermalpressurelevel": "com.apple.system.thermalpressurelevel 2",
}


def test_what_a_mac_says():
    found = describe_mac(lambda command: SAID[" ".join(command)], "arm64")
    assert found == Mac("15.5", "24F74", "Mac15,6", True, False, 6, 5, "Battery Power", "low power", "heavy")
    check = check_macos(lambda command: SAID[" ".join(command)], architecture="arm64")
    assert check.status == "ok"
    assert check.notes == (
        "macOS 15.5 (24F74), Mac15,6, 6 performance cores, 5 efficiency cores",
        "power: Battery Power, mode low power; thermal pressure heavy",
        "the times below are slower than this Mac can be",
    )
    assert check.data["macos"]["thermal_pressure"] == "heavy"


def test_macs_that_cannot_run_it():
    check = check_macos(lambda command: SAID[" ".join(command)], architecture="x86_64")
    assert check.status == "failed"
    assert "under Rosetta" in check.failures[0]
    check = check_macos(lambda _: "", architecture="x86_64")
    assert check.failures == ("this Mac has no Apple silicon, which MLX and the Neural Engine need",)
    assert check.notes == (
        "macOS ? (?), unknown model",
        "power: unknown, mode unknown; thermal pressure unknown",
    )
    older = SAID | {"/usr/bin/sw_vers -productVersion": "14.6.1", "/usr/bin/pmset -g": " powermode 2"}
    check = check_macos(lambda command: older[" ".join(command)], architecture="arm64")
    assert check.notes[-1] == "a Core ML package with several resolutions needs macOS 15"
    assert "mode high power" in check.notes[1]


def test_versions(monkeypatch):
    monkeypatch.setattr(machine_check, "_version", lambda name: None if name in ("coremltools", "torch") else "1.0")
    found = check_versions("linux")
    assert (found.status, found.data["versions"]["coremltools"]) == ("ok", None)
    assert "mlx 1.0" in found.notes[0]
    assert check_versions("darwin").failures == (
        "coremltools isn't installed; pip install --upgrade fastvlm-mlx installs it",
    )


def test_products():
    right = {"float32": 1e-3, "bfloat16": 1e-2, "4 bits": 1e-3}
    assert judge_products(right) == []
    assert judge_products(right | {"4 bits": 2e-3}) == [
        "matmul in 4 bits is off by 2.0e-03 (relative L2), at most 1e-03"
    ]
    assert len(judge_products(right | {"float32": float("nan")})) == 1


def test_products_that_are_no_number():
    found = check_products(Told(multiply={"float32": float("nan"), "bfloat16": 0.0, "4 bits": 0.0}))
    assert found.status == "failed"
    assert found.data["matmul"]["float32"] is None, "JSON has no NaN"


def test_a_gpu_is_compared_with_the_cpu(bundle):
    opened = Bundle.open(bundle("tiny"))
    sizes = ((128, 128), (64, 64))

    def features(error):
        def make(size, on_cpu=False):
            assert size == (64, 64), "the smallest"
            return np.full((1, 4), 1.0 if on_cpu else 1.0 + error, np.float32)

        return make

    def encoded(size, runs, seconds):
        if size == (128, 128):
            raise WorkError("out of memory")
        return Encoded("MLX (gpu)", "bfloat16", 9.0, (2.0, 4.0, 3.0), finite=True)

    found = check_encoder(Told(encode=encoded, reference=features(1e-3)), opened, sizes, Plan())
    assert found.failures == ("128 px: out of memory",)
    assert found.table.rows == (("64", "9.0", "3.0 (2.0-4.0)", "3"),)
    assert found.data["gpu_relative_l2"] == pytest.approx(1e-3, rel=1e-3)
    wrong = Encoded("MLX (gpu)", "bfloat16", 9.0, (2.0,), finite=False)
    found = check_encoder(Told(encode=wrong, reference=features(6e-3)), opened, ((64, 64),), Plan())
    assert found.failures == ("64 px: the features aren't finite", "the GPU's features aren't the CPU's; at most 5e-03")


def test_two_answers_must_be_one():
    same = Answers((1, 2), (1, 2), "a `b`\nc", 12.0, 3.0, "device", "float32")
    found = check_answer(Told(answer=same), ((128, 64),))
    assert (found.status, found.notes[1]) == ("ok", "`a 'b' c`")
    other = Answers((1, 2), (1, 3), None, 12.0, 3.0, "device", "float32")
    found = check_answer(Told(answer=other), ((128, 64),))
    assert found.failures == ("greedy answers differ: (1, 2) and (1, 3)",)
    assert found.notes[1] == "`1 2`"


def test_the_worker_of_mlx(bundle):
    """Its functions, in this process."""
    state = MlxState(bundle("tiny"))
    features = reference(state, (64, 128))
    assert (features.shape, features.dtype) == ((2, 512), np.float32)
    found = encode(state, (64, 128), 2, 60)
    assert found.finite
    assert len(found.times_ms) == 2
    made = np.array(state.model.engine.vision.encoder.encode(sample_pixels((64, 128))[None])[0])
    assert relative_l2(features, made) <= 1e-5
    said = answer(state, 64)
    assert said.first == said.second
    assert said.text is None, "tiny has no tokenizer"


def row(units, *times_ms, size=SIZE, features=None):
    return Row(size, units, Measured(1.5, 0.25, 30.0, times_ms, np.zeros((2, 4)) if features is None else features))


def test_a_machine_of_unknown_memory(monkeypatch):
    made = Machine("OS", "chip", 4, 0, "cpu: chip", "3.13", "0.32", None)
    monkeypatch.setattr(bench_machine, "describe_machine", lambda: made)
    assert machine_check.check_machine().notes[0] == "chip, 4 cores, memory unknown"


def test_parity():
    right = np.array([[3.0, 4.0]], np.float32)
    assert relative_l2(np.array([[3.0, 4.5]], np.float16), right) == pytest.approx(0.1)
    assert relative_l2(np.array([[3.0, np.inf]], np.float16), right) is None
    rows = [
        row("CPU_AND_NE", 1.0, features=np.array([[3.0, 4.02]], np.float32)),  # 4e-3
        row("ALL", 1.0, features=np.array([[3.0, 4.03]], np.float32)),  # 6e-3
        row("CPU_AND_GPU", 1.0, features=np.array([[np.nan, 4.0]], np.float32)),
        row("CPU_ONLY", 1.0, features=np.zeros((2, 1), np.float32)),
        Row((64, 64), "ALL", None, "boom"),
    ]
    found = check_parity(rows, {SIZE: right}, 16)
    assert found.failures == (
        "64x128 px, ALL: relative L2 6.0e-03, at most 5e-03",
        "64x128 px, CPU_AND_GPU: the features aren't finite",
        "64x128 px, CPU_ONLY: made shape (2, 1), expected (1, 2)",
    )
    assert found.table == Table(
        ("px", "CPU_AND_NE", "ALL", "CPU_AND_GPU"), (("64x128", "4.0e-03", "6.0e-03", "not finite"),)
    )
    assert len(check_parity(rows, {SIZE: right}, 8).failures) == 2, "8-bit weights: at most 3e-2"
    assert check_parity(rows[-1:], {}, 16).reason == "nothing ran that could be compared"
    judged = check_parity(rows[:2], {SIZE: right}, 16, "rounded", ["64 px: boom"])
    assert (judged.reason, judged.failures) == ("rounded", ("64 px: boom",))


def test_placement_of_a_large_package():
    half = Placement("r256", "CPU_AND_NE", {"Neural Engine": 0.5, "CPU": 0.5}, {"Neural Engine": 1, "CPU": 1}, ())
    less = Placement("r512", "CPU_AND_NE", {"GPU": 0.6, "Neural Engine": 0.4}, {"GPU": 1, "Neural Engine": 9}, ())
    uncosted = Placement(
        "r768",
        "CPU_AND_NE",
        {"CPU": 0.0, "Neural Engine": 0.0},
        {"CPU": 3, "Neural Engine": 1},
        (PlacedOp("softmax", "s", "CPU", 0.0),),
    )
    found = judge_placement([half, less, uncosted], 246_000_000)
    assert found.failures == (
        "r512: 40% of the work on the Neural Engine, expected 50% or more",
        "r768: 25% of the work on the Neural Engine, expected 50% or more",
    )
    assert found.table.rows[1] == ("r512", "40.0% (9)", "60.0% (1)", "-", "-", "-")
    assert judge_placement([less], 4_000_000).status == "ok", "Core ML may leave a small one to the CPU"
