"""`fastvlm placement`: the compute plan where there is one, the static rules elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest

from support.mil_programs import save_functions

pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert import compute_plan, placement
from fastvlm_convert.compute_plan import read_placement
from fastvlm_mlx.errors import EncoderError
from support.ane_programs import mb, zeros
from support.fake_plan import HAS_PLANS, R8, R16, opener_of, plan


def build(x):
    return mb.conv(x=x, weight=zeros(8, 3, 3, 3).astype("float32"), name="y")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return save_functions(tmp_path_factory.mktemp("package"), (8, 16), build)


@pytest.fixture
def no_plan(monkeypatch):
    @contextmanager
    def opener(package, compute_units):
        raise EncoderError("no plan here")
        yield

    monkeypatch.setattr(compute_plan, "read_placement", partial(read_placement, opener=opener))


def command(capsys, *arguments):
    code = placement.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command_falls_back_and_says_so(package, capsys, no_plan):
    code, out, err = command(capsys, package)
    assert (code, err) == (0, "fastvlm placement: no plan here; the static rules follow\n")
    assert out.startswith("r16: 0.0% of ")
    assert "\nr8: 0.0% of " in out
    assert "(a heuristic: static rules, nothing was run)" in out
    assert "fp32, off the Neural Engine (1): conv y: " in out
    data = json.loads(command(capsys, package, "--json")[1])
    assert (data["package"], data["heuristic"]) == (str(package), True)
    assert data["note"] == "no plan here; the static rules follow"
    assert [f["function"] for f in data["functions"]] == ["r16", "r8"]


def test_the_command_shows_the_plan(package, capsys, monkeypatch):
    seen = []
    fake = partial(read_placement, opener=opener_of(plan(r8=R8, r16=R16), seen))
    monkeypatch.setattr(compute_plan, "read_placement", fake)
    code, out, err = command(capsys, package, "--function", "r8", "--compute-units", "ALL")
    assert (code, err) == (0, "")
    assert out.startswith("r8: 70.0% of the estimated cost on the Neural Engine (Core ML's plan for ALL)\n")
    assert "r16" not in out
    data = json.loads(command(capsys, package, "--json")[1])
    assert (data["heuristic"], data["note"]) == (False, None)
    assert [f["heuristic"] for f in data["functions"]] == [False, False]
    assert [units for _, units in seen] == ["ALL", "CPU_AND_NE"]
    code, out, err = command(capsys, package, "--static", "--json", "--function", "r16")
    assert (code, err, len(seen)) == (0, "", 2)
    data = json.loads(out)
    assert (data["heuristic"], data["note"], len(data["functions"])) == (True, None, 1)


def test_a_bundle_means_its_package(package, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    code, out, err = command(capsys, tmp_path, "--static")
    assert (code, out) == (2, "")
    assert err == (
        f"fastvlm placement: error: the bundle {tmp_path} has no vision.mlpackage; "
        "convert the checkpoint again, with a Core ML package\n"
    )
    shutil.copytree(package, tmp_path / "vision.mlpackage")
    code, out, err = command(capsys, tmp_path, "--static", "--json")
    assert (code, json.loads(out)["package"]) == (0, str(tmp_path / "vision.mlpackage"))


def test_errors_of_the_command(package, tmp_path, capsys):
    for arguments, message in (
        ([tmp_path / "none"], "none doesn't exist; give an .mlpackage or the folder of a bundle"),
        ([tmp_path], "is no readable Core ML package"),
        ([package, "--function", "r1"], "has no function r1; it has r16, r8"),
    ):
        code, out, err = command(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("fastvlm placement: error: ")
        assert message in err
    for usage in ([], [package, "--compute-units", "TPU"]):
        with pytest.raises(SystemExit, match="2"):
            command(capsys, *usage)


def test_errors_of_core_ml_itself_are_no_fallback(package, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(compute_plan, "read_placement", fail)
    assert command(capsys, package)[::2] == (
        1,
        "fastvlm placement: error: broken (RuntimeError; --debug shows where)\n",
    )


@pytest.mark.skipif(HAS_PLANS, reason="there is a plan here")
def test_as_a_process(package):
    """Quiet but for its one line."""
    arguments = [sys.executable, "-m", "fastvlm_convert.placement", str(package)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("; the static rules follow\n")
    assert done.stdout.startswith("r16: ")


def test_help_is_light():
    code = (
        "import sys; from fastvlm_convert.placement import build_parser; build_parser().format_help();"
        "assert not {'coremltools', 'torch', 'mlx.core'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
