"""The doctor where a model, its manifest or what is around it is broken: there is a report all the same."""

from __future__ import annotations

import json

import pytest

from fastvlm_bench.cli import main
from fastvlm_bench.doctor import diagnosis
from fastvlm_bench.doctor.coreml_side import Apple
from fastvlm_bench.doctor.diagnosis import diagnose
from fastvlm_bench.doctor.plan import Plan
from fastvlm_mlx import hub
from fastvlm_mlx.errors import HubError
from support.doctor import MLXRuntime, add_package, no_reason, open_fake_plan


@pytest.fixture(scope="module")
def packed(bundle, tmp_path_factory):
    """The tiny bundle with something in the place of a Core ML package for 64 x 64 and 64 x 128 px."""
    return add_package(bundle("tiny"), tmp_path_factory.mktemp("doctor") / "tiny")


def by_name(checks):
    return {check.name: check for check in checks}


def change_options(folder, **options):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["options"] |= options
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_odd_manifest_hides_nothing_else(bundle, tmp_path):
    folder = add_package(bundle("tiny"), tmp_path / "tiny")
    change_options(folder, package={"sizes": [256], "bits": "few"})
    checks = by_name(diagnose(folder, Plan(runs=1), apple=Apple(MLXRuntime, open_fake_plan, no_reason)))
    assert {name for name, check in checks.items() if check.failures} - {"Core ML"} == {"model"}
    assert [row["error"] for row in checks["Core ML"].data["core_ml"]] == [None] * 8, "its times are this machine's"
    name = f"{folder}/manifest.json: options.package"
    assert checks["model"].failures == (
        f'{name}.sizes must be a list such as [{{"height": 256, "width": 256}}], multiples of 64, got [256]; '
        "convert again",
        f'{name}.bits must be a number above 0, got "few"; convert again',
    )
    assert "Core ML package: unknown sizes px, 16-bit weights" in checks["model"].notes[2]
    assert [row[0] for row in checks["parity"].table.rows] == ["64", "64x128"], "the package tells its sizes itself"


def test_runtimes_and_caches_that_break(packed, monkeypatch):
    def fail():
        raise AttributeError("half a coremltools")

    checks = by_name(diagnose(packed, Plan(sizes=((64, 64),), runs=1), apple=Apple(fail)))
    assert [name for name, check in checks.items() if check.failures] == ["Core ML"]
    assert checks["Core ML"].failures == ("half a coremltools (AttributeError)",)

    def unreadable():
        raise PermissionError("cache")

    monkeypatch.setattr(hub, "list_models", unreadable)
    assert diagnosis._next_step().startswith("`fastvlm-convert CHECKPOINT -o OUT` writes one")


@pytest.mark.parametrize("model", ["./nowhere", "no-such-model", "org/name@x:y"])
def test_a_model_that_cannot_be_found(capsys, model):
    assert main(["doctor", "--model", model]) == 1
    out, err = capsys.readouterr()
    assert "### machine: ok" in out
    assert "### versions: ok" in out
    section = next(part for part in out.split("\n### ") if part.startswith("model: FAILED"))
    assert model.removeprefix("./") in section
    assert err == "fastvlm-bench doctor: error: 1 of 9 checks failed: model; the report says how\n"


def test_whatever_finding_a_model_raises(monkeypatch, capsys):
    def fail(model):
        raise PermissionError("not yours")

    monkeypatch.setattr(hub, "resolve", fail)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "### model: FAILED\n\n- **failed:** not yours (PermissionError)" in out
    assert "Traceback" not in err


def test_a_model_that_cannot_be_had(monkeypatch, capsys):
    def fail(model):
        raise HubError("the hub can't be reached")

    monkeypatch.setattr(hub, "resolve", fail)
    assert main(["doctor", "--model", "org/name"]) == 1
    out, err = capsys.readouterr()
    assert "### model: FAILED\n\n- **failed:** the hub can't be reached" in out
    assert "### machine: ok" in out
    assert out.count("- the model can't be opened") == 5
    assert "1 of 9 checks failed: model;" in err


def test_a_package_that_cannot_be_read(packed, bundle, tmp_path):
    folder = add_package(bundle("tiny"), tmp_path / "tiny")
    (folder / "vision.mlpackage" / "sizes.json").write_text("{")
    checks = by_name(diagnose(folder, Plan(sizes=((64, 64),), runs=1), apple=Apple(MLXRuntime)))
    assert checks["Core ML"].status == "failed"
    assert "JSONDecodeError" in checks["Core ML"].failures[0]
    assert [checks[name].status for name in ("parity", "placement")] == ["skipped"] * 2
    assert checks["answer"].status == "ok"
