"""The compute plan, read from a stand-in for coremltools' object."""

from __future__ import annotations

import json
import platform
from types import SimpleNamespace

import pytest

from support.mil_programs import quiet, save_functions

pytest.importorskip("coremltools", reason="the convert extra isn't installed")

import coremltools as ct

from fastvlm_convert.compute_plan import PlacedOp, read_placement
from fastvlm_mlx.errors import BundleError, EncoderError
from fastvlm_mlx.vision import compute_plan
from support.ane_programs import mb, save, zeros
from support.fake_plan import CPU, HAS_PLANS, NE, R8, R16, op, opener_of, plan


def build(x):
    return mb.conv(x=x, weight=zeros(8, 3, 3, 3).astype("float32"), name="y")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return save_functions(tmp_path_factory.mktemp("package"), (8, 16), build)


def test_placement_of_each_function(package):
    seen = []
    small, large = read_placement(package, compute_units="ALL", opener=opener_of(plan(r16=R16, r8=R8), seen))[::-1]
    assert seen == [(package, "ALL")]
    assert (small.function, large.function, small.compute_units) == ("r8", "r16", "ALL")
    assert small.ops == {"Neural Engine": 2, "CPU": 1, "GPU": 1, "unknown": 1}
    assert small.cost_share == pytest.approx({"Neural Engine": 0.7, "CPU": 0.1, "GPU": 0.2, "unknown": 0.0})
    assert [(o.type, o.name, o.device) for o in small.elsewhere] == [
        ("softmax", "s", "GPU"),
        ("cast", "in", "CPU"),
        ("reshape", "odd", "unknown"),
    ]
    assert [o.cost for o in small.elsewhere] == pytest.approx([0.2, 0.1, 0.0])
    assert (large.ops, large.cost_share, large.elsewhere) == ({"Neural Engine": 1}, {"Neural Engine": 1.0}, ())


def test_one_function_alone(package):
    (found,) = read_placement(package, "r8", opener=opener_of(plan(r16=R16, r8=R8)))
    assert (found.function, found.compute_units) == ("r8", "CPU_AND_NE")


def test_a_decompression_that_core_ml_places_counts(package):
    ops = [op("w8", "ios18.constexpr_lut_to_dense", CPU, 0.0), *R16]
    (found,) = read_placement(package, "r8", opener=opener_of(plan(r8=ops)))
    assert found.elsewhere == (PlacedOp("constexpr_lut_to_dense", "w8", "CPU", 0.0),)


def test_a_plan_without_costs(package):
    (found,) = read_placement(package, "r8", opener=opener_of(plan(r8=[op("y", "ios18.conv", NE)])))
    assert (found.cost_share, found.ops) == ({"Neural Engine": 0.0}, {"Neural Engine": 1})


def test_text_and_json(package):
    (found,) = read_placement(package, "r8", opener=opener_of(plan(r8=R8)))
    assert found.to_text().splitlines() == [
        "r8: 70.0% of the estimated cost on the Neural Engine (Core ML's plan for CPU_AND_NE)",
        "  Neural Engine: 70.0%, 2 ops",
        "  CPU: 10.0%, 1 ops",
        "  GPU: 20.0%, 1 ops",
        "  unknown: 0.0%, 1 ops",
        "  GPU: softmax s: 20.00%",
        "  CPU: cast in: 10.00%",
        "  unknown: reshape odd: 0.00%",
    ]
    data = json.loads(found.to_json())
    assert data["heuristic"] is False
    assert data["elsewhere"][0] == {"type": "softmax", "name": "s", "device": "GPU", "cost": pytest.approx(0.2)}
    (found,) = read_placement(
        package, "r8", opener=opener_of(plan(r8=[op(f"c{i}", "cast", CPU, 1) for i in range(12)]))
    )
    assert found.to_text().splitlines()[-2:] == ["  CPU: cast c9: 8.33%", "  and 2 more"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (plan(r16=R16), "lacks function r8"),
        (SimpleNamespace(model_structure=SimpleNamespace(program=None)), "lacks function r8"),
        (plan(r8=[op("y", "ios18.conv"), op("w", "const")]), "no device for any op of function r8"),
    ],
)
def test_plans_that_say_nothing(package, found, message):
    with pytest.raises(EncoderError, match=message):
        read_placement(package, "r8", opener=opener_of(found))


def test_the_package_is_checked_first(package, tmp_path):
    with pytest.raises(BundleError, match="has no function r512; it has r16, r8"):
        read_placement(package, "r512", opener=None)
    with pytest.raises(BundleError, match="no readable Core ML package"):
        read_placement(tmp_path, opener=None)


def pretend(monkeypatch, release):
    """A Mac, as far as the module can see."""
    monkeypatch.setattr(compute_plan, "sys", SimpleNamespace(platform="darwin"))
    version = SimpleNamespace(mac_ver=lambda: (release, ("", "", ""), "arm64"), system=lambda: "Darwin")
    monkeypatch.setattr(compute_plan, "platform", version)


@pytest.mark.parametrize("release", ["13.6.1", "14", "14.3.1"])
def test_older_systems(package, monkeypatch, release):
    pretend(monkeypatch, release)
    with pytest.raises(EncoderError, match=f"needs macOS 14.4 or newer, this is macOS {release}$"):
        read_placement(package)


@pytest.mark.skipif(HAS_PLANS, reason="there is a plan here")
def test_other_systems(package):
    with pytest.raises(EncoderError, match=f"needs macOS 14.4 or newer, this is {platform.system()}"):
        read_placement(package)


@pytest.mark.parametrize("release", ["14.4", "15", "26.1"])
def test_the_package_is_compiled_and_planned(package, monkeypatch, release):
    from coremltools.models.compute_plan import MLComputePlan

    pretend(monkeypatch, release)
    calls = {}

    def compile_model(source, target):
        calls.update(source=source, target=target)
        return target

    def load(path, compute_units):
        assert path == calls["target"]
        calls.update(units=compute_units)
        return plan(r8=R8)

    monkeypatch.setattr(ct.models.utils, "compile_model", compile_model)
    monkeypatch.setattr(MLComputePlan, "load_from_path", load)
    (found,) = read_placement(package, "r8", "CPU_AND_GPU")
    assert found.ops["Neural Engine"] == 2
    assert (calls["source"], calls["units"]) == (str(package), ct.ComputeUnit.CPU_AND_GPU)
    assert calls["target"].endswith(".mlmodelc")

    def refuse(source, target):
        raise RuntimeError("compiler error")

    monkeypatch.setattr(ct.models.utils, "compile_model", refuse)
    with pytest.raises(EncoderError, match=r"Core ML can't plan .*functions.mlpackage: compiler error"):
        read_placement(package)


@pytest.mark.apple
def test_the_real_plan(tmp_path):
    """On a Mac: every op has a device, and the shares make a whole."""
    with quiet():
        (found,) = read_placement(save(tmp_path, build, [(1, 3, 8, 8)], half=False), compute_units="CPU_ONLY")
    assert found.ops.get("CPU", 0) >= 1
    assert set(found.ops) <= {"CPU", "unknown"}
    assert sum(found.cost_share.values()) == pytest.approx(1.0)
