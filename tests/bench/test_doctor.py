"""`fastvlm-bench doctor` as a whole, with stand-ins for Core ML; what it sends to its worker really runs there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime

import pytest

from fastvlm_bench.cli import main
from fastvlm_bench.doctor import coreml_side, diagnosis
from fastvlm_bench.doctor.coreml_side import Apple
from fastvlm_bench.doctor.diagnosis import diagnose
from fastvlm_bench.doctor.plan import Plan
from fastvlm_mlx import hub
from support.doctor import MLXRuntime, SickRuntime, add_package, no_reason, open_deadly_plan, open_fake_plan, too_old
from support.imports import exit_and_heavy

NAMES = [
    "machine",
    "versions",
    "macOS",
    "model",
    "MLX",
    "FastViTHD in MLX",
    "answer",
    "Core ML",
    "parity",
    "placement",
]
UNITS = ["CPU_AND_NE", "ALL", "CPU_AND_GPU", "CPU_ONLY"]
HEAVY = ("mlx", "numpy", "PIL", "coremltools", "huggingface_hub")
APPLES = ["macOS", "Core ML", "parity", "placement"]
ON_LINUX = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has something to check")


@pytest.fixture(scope="module")
def packed(bundle, tmp_path_factory):
    """The tiny bundle with something in the place of a Core ML package for 64 x 64 and 64 x 128 px."""
    return add_package(bundle("tiny"), tmp_path_factory.mktemp("doctor") / "tiny")


def by_name(checks):
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


@ON_LINUX
def test_the_report_on_linux(bundle, tmp_path, capsys):
    target = tmp_path / "new" / "doctor.json"
    argv = ["doctor", "--model", str(bundle("tiny")), "--resolutions", "64,64x128", "--runs", "3"]
    assert main([*argv, "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("## fastvlm-bench doctor ")
    assert out.partition("\n")[0].endswith(": 6 ok, 4 not checked here")
    sections = out.split("\n### ")
    assert [section.partition(":")[0] for section in sections[1:]] == NAMES
    for name, section in zip(NAMES, sections[1:], strict=True):
        status = "not checked here" if name in APPLES else "ok"
        assert section.startswith(f"{name}: {status}\n")
        if name in APPLES:
            assert "\n- needs macOS 15 on Apple silicon, this is Linux on " in section
            assert "\n- it would check " in section
    table = [line.split("|")[1:-1] for line in sections[6].splitlines() if line.startswith("|")][2:]
    assert [(row[0].strip(), row[3].strip()) for row in table] == [("64", "3"), ("64x128", "3")]

    data = json.loads(target.read_text())
    assert datetime.fromisoformat(data["date"]).tzinfo
    checks = {check["name"]: check for check in data["checks"]}
    assert list(checks) == NAMES
    assert [name for name in NAMES if checks[name]["status"] == "skipped"] == APPLES
    assert all((check["reason"] is None) == (check["status"] == "ok") for check in checks.values())
    assert set(checks["MLX"]["matmul"]) == {"float32", "bfloat16", "4 bits"}
    assert [len(row["times_ms"]) for row in checks["FastViTHD in MLX"]["vision"]] == [3, 3]
    answer = checks["answer"]["answer"]
    assert answer["first"] == answer["second"]
    assert len(answer["first"]) == 16
    assert checks["machine"]["machine"]["cores"] >= 1
    assert checks["versions"]["versions"]["mlx"]


@ON_LINUX
def test_one_command_without_a_home_in_its_report(bundle, tmp_path):
    """The module is run as a user does; the home folder and the user's name stay out."""
    home = tmp_path / "ermintrude"
    folder = add_package(bundle("tiny"), home / "models" / "tiny")
    argv = ["doctor", "--model", str(folder), "--runs", "1", "--json", str(tmp_path / "out.json")]
    script = f"import sys, runpy; sys.path[:] = {sys.path!r}; sys.argv[1:] = {argv!r}\n"
    script += "runpy.run_module('fastvlm_bench', run_name='__main__')"
    environment = os.environ | {"HOME": str(home), "LOGNAME": "ermintrude"}
    run = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    for text in (done.stdout, (tmp_path / "out.json").read_text()):
        assert "ermintrude" not in text
        assert "~/models/tiny" in text
    assert "Core ML package: 64, 64x128 px, 16-bit weights" in done.stdout
    assert "\n| 64x128 |" in done.stdout, "all sizes of the package"
    script = script.replace("'--json'", "'--full-paths', '--json'")
    done = subprocess.run([*run[:-1], script], capture_output=True, text=True, env=environment, check=True)
    assert str(folder) in done.stdout


def test_a_healthy_mac(packed, monkeypatch):
    monkeypatch.setattr(coreml_side, "_SLOWER_MS", 1e9)  # the stand-in's units are one: what else runs decides
    said = []
    apple = Apple(MLXRuntime, open_fake_plan, no_reason)
    checks = by_name(diagnose(packed, Plan(runs=2), apple=apple, say=said.append))
    assert [n for n, check in checks.items() if check.failures] == []
    rows = checks["Core ML"].data["core_ml"]
    assert [(row["size"], row["compute_units"]) for row in rows] == [
        (size, units) for size in ([64, 64], [64, 128]) for units in UNITS
    ]
    for row in rows:
        assert row["error"] is None
        assert len(row["times_ms"]) == 2
        assert min(row["load_s"], row["again_s"], row["first_ms"], *row["times_ms"]) > 0
        assert not row["compiled"]
    assert checks["Core ML"].data["compile_s"] is None
    assert checks["Core ML"].notes[0].startswith("the package was compiled for this Mac before; ")
    table = checks["Core ML"].table
    assert [row[:2] for row in table.rows] == [(px, units) for px in ("64", "64x128") for units in UNITS]
    # The same float32 network, rounded to float16 once: 11 bits, at most 2 ** -11 of each value.
    distances = [row["relative_l2"] for row in checks["parity"].data["parity"]]
    assert len(distances) == 8
    assert all(0 < distance < 2**-11 for distance in distances)
    assert checks["parity"].table.headings == ("px", *UNITS)
    assert [row[0] for row in checks["parity"].table.rows] == ["64", "64x128"]
    assert checks["parity"].data["gate"] == 5e-3
    assert [row[:4] for row in checks["placement"].table.rows] == [
        ("r64x64", "100.0% (1)", "-", "-"),
        ("r64x128", "75.0% (1)", "-", "25.0% (1)"),
    ]
    assert checks["placement"].table.rows[1][-1] == "softmax s 25.0%"
    assert "Core ML: 64x128 px on CPU_AND_GPU" in said


def test_one_failing_part_hides_no_other(packed, monkeypatch, capfd, tmp_path):
    """Slow on one compute unit, a crash on another, an error, wrong features; then the plan's own crash."""
    monkeypatch.setattr(diagnosis, "Apple", lambda: Apple(SickRuntime, open_deadly_plan, no_reason))
    target = tmp_path / "out.json"
    argv = ["doctor", "--model", str(packed), "--resolutions", "64,192", "--runs", "1", "--json", str(target)]
    assert main(argv) == 1
    out, err = capfd.readouterr()
    assert err.splitlines()[-1] == (
        "fastvlm-bench doctor: error: 3 of 10 checks failed: Core ML, parity, placement; the report says how"
    )
    failures = [line for line in out.splitlines() if line.startswith("- **failed:** ")]
    crash = "the process was ended by SIGABRT; its last words are on stderr"
    assert failures[:2] == [
        f"- **failed:** 64 px on ALL: {crash}",
        "- **failed:** 64 px on CPU_AND_GPU: Core ML can't load it: no such luck",
    ]
    assert failures[2].startswith("- **failed:** 64 px: CPU_AND_NE takes 1")
    assert failures[2].endswith(": the Neural Engine doesn't help")
    # the features and a 32nd of them
    assert failures[3] == "- **failed:** 64 px, CPU_ONLY: relative L2 3.1e-02, at most 5e-03"
    assert failures[4:] == [f"- **failed:** {crash}"]
    assert "- the package takes images of 64, 64x128 px, not 192" in out
    assert "| 64 | ALL | failed |" in out
    checks = {check["name"]: check for check in json.loads(target.read_text())["checks"]}
    assert [row["size"] for row in checks["FastViTHD in MLX"]["vision"]] == [[64, 64], [192, 192]]
    assert [row["error"] is None for row in checks["Core ML"]["core_ml"]] == [True, False, False, True]
    assert [row["compute_units"] for row in checks["parity"]["parity"]] == ["CPU_AND_NE", "CPU_ONLY"]


def test_rounded_weights_are_no_reference(bundle, tmp_path):
    folder = add_package(bundle("tiny"), tmp_path / "tiny", sizes=((64, 64),), vision_dtype="bfloat16")
    checks = by_name(diagnose(folder, Plan(runs=1), apple=Apple(MLXRuntime, open_fake_plan, too_old)))
    assert checks["parity"].status == "skipped"
    assert "rounded the weights" in checks["parity"].reason
    assert len(checks["parity"].data["parity"]) == 4, "shown, but not judged"
    assert (checks["placement"].status, checks["placement"].reason) == ("skipped", "no plans here")


def test_a_mac_and_a_bundle_without_a_package(bundle, packed, monkeypatch):
    apple = Apple(MLXRuntime, open_fake_plan, no_reason)
    checks = by_name(diagnose(bundle("tiny"), Plan(sizes=((64, 64),), runs=1), apple=apple))
    for name in APPLES[1:]:
        assert checks[name].status == "skipped"
        assert checks[name].reason.startswith(
            "the bundle has no vision.mlpackage; on this machine fastvlm-nano has one: "
        )
    monkeypatch.setattr(hub, "list_models", lambda: [hub.ModelInfo("mine", None, None, "", None, "", packed, 0, None)])
    assert diagnosis._next_step() == "on this machine mine has one: `fastvlm-bench doctor --model mine`"
    checks = by_name(diagnose(packed, Plan(sizes=((192, 192),), runs=1), apple=apple))
    assert checks["Core ML"].reason == "the package takes images of 64, 64x128 px only"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--resolutions", "100"], "multiple of 64 pixels, got 100"),
        (["--resolutions", "64,64x"], "got '64,64x'"),
        (["--resolutions", "64x64x64"], "--resolutions takes SIDE or HEIGHTxWIDTH"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--limit", "0"], "--limit must be above 0"),
        (["--limit", "inf"], "at most 86400 seconds, got inf"),
        (["--limit", "nan"], "got nan"),
        (["--json", "."], "is a folder"),
        (["--json", f"{__file__}/x.json"], "test_doctor.py is no folder; name another file"),
    ],
)
def test_bad_input_is_one_sentence(capsys, argv, part):
    assert main(["doctor", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastvlm-bench doctor: error: ")
    assert len(err.splitlines()) == 1
    assert part in err


@pytest.mark.parametrize(("argv", "code"), [(["doctor", "--help"], 0), (["doctor", "--runs", "0"], 2)])
def test_arguments_are_read_before_anything_heavy_is_imported(argv, code):
    assert exit_and_heavy(argv, HEAVY) == f"{code} []"


def test_a_package_of_the_converters(bundle, checkpoint, tmp_path, monkeypatch):
    """Op by op in float16 by the MIL checker, in the worker: within the gate, but not by float16's output alone."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    pytest.importorskip("coremltools", reason="the convert extra isn't installed")
    from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package
    from fastvlm_convert.mil_check.runtime import CheckerRuntime
    from fastvlm_convert.ranges import Ranges
    from support.folded import folded_vision
    from support.mil_programs import quiet

    monkeypatch.setattr(coreml_side, "_SLOWER_MS", 1e9)  # the checker's units are one: what else runs decides
    folder = shutil.copytree(bundle("tiny"), tmp_path / "tiny")
    with quiet():
        options = PackageOptions(sizes=(Size(128, 128),))
        convert_package(*folded_vision(checkpoint("tiny")), folder / "vision.mlpackage", options, Ranges())
    checks = by_name(diagnose(folder, Plan(runs=1), apple=Apple(CheckerRuntime, open_fake_plan, no_reason)))
    assert (checks["Core ML"].status, checks["parity"].status) == ("ok", "ok")
    distances = [row["relative_l2"] for row in checks["parity"].data["parity"]]
    assert len(distances) == 4
    assert all(1e-3 < distance <= 5e-3 for distance in distances)
    assert "lacks function" in checks["placement"].failures[0], "the plan is another package's"


@pytest.mark.apple
def test_core_ml_itself(checkpoint, tmp_path, capsys):
    """On a Mac: the package that the converter makes runs on every compute unit, and computes what MLX does."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    from fastvlm_convert.coreml_vision import PackageOptions, Size
    from fastvlm_convert.options import Options
    from fastvlm_convert.pipeline import convert

    package = PackageOptions(sizes=(Size(128, 128), Size(256, 256)))
    folder = convert(checkpoint("tiny"), tmp_path / "b", Options(package=package)).path
    target = tmp_path / "out.json"
    code = main(["doctor", "--model", str(folder), "--runs", "3", "--json", str(target)])
    checks = {check["name"]: check for check in json.loads(target.read_text())["checks"]}
    failed = {name: check["failures"] for name, check in checks.items() if check["status"] != "ok"}
    # What the Neural Engine rounds inside an op isn't in the doctor's gate; `fastvlm verify` allows 2e-2 for it.
    assert set(failed) <= {"parity"}, capsys.readouterr().out
    assert code == len(failed)
    assert all(row["relative_l2"] <= 2e-2 for row in checks["parity"]["parity"]), failed
    assert len(checks["Core ML"]["core_ml"]) == len(checks["parity"]["parity"]) == 2 * 4
    assert checks["FastViTHD in MLX"]["gpu_relative_l2"] <= 1e-4  # the tolerance of tests/runtime/test_apple.py
    assert sum(checks["placement"]["placement"][0]["cost_share"].values()) == pytest.approx(1.0, abs=1e-6)
    assert checks["macOS"]["macos"]["apple_silicon"]
    assert not checks["macOS"]["macos"]["rosetta"]
