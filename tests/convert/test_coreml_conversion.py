"""`fastvlm-convert` with its Core ML half, then answers from the package; the MIL checker stands for Core ML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert import vision_package
from fastvlm_convert.cli import main
from fastvlm_convert.coreml_vision import PackageOptions, Size, build_network
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_convert.vision_package import Gates, telling_size
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import MissingDependencyError, ResolutionError, VerificationError
from fastvlm_mlx.loading import assemble, warm_up
from fastvlm_mlx.manifest import Manifest
from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder
from support.folded import folded_vision
from support.layouts import to_mlx_vlm, to_transformers
from support.seeded import golden, golden_prompt, relative_l2

torch = pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert import verify  # noqa: E402
from fastvlm_convert.mil_check.runtime import CheckerRuntime  # noqa: E402

SMALL = PackageOptions(sizes=(Size(128, 128),))


@pytest.mark.parametrize("kind", ["one image", "two images"])
def test_the_package_answers_as_mlx_does(converted, kind):
    prompt = golden_prompt("tiny", kind)
    for vision in ("coreml", "mlx"):
        model = assemble(Bundle.open(converted), vision=vision, runtime=CheckerRuntime())
        answer = model.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
        assert list(answer.token_ids) == prompt.greedy_ids
        assert ("Core ML" in answer.device) == (vision == "coreml")


def test_rectangles_are_a_function_of_their_own(converted, checkpoint):
    encoder = CoreMLVisionEncoder(converted / "vision.mlpackage", CheckerRuntime())
    pixels = golden("tiny")["pixels_128x128"]
    wide = np.concatenate([pixels, pixels[:, :64]], axis=1)
    config, weights = folded_vision(checkpoint("tiny"))
    with torch.inference_mode():
        right = build_network(config, weights)(torch.from_numpy(wide).permute(2, 0, 1)[None].float())
    assert right.shape == (1, 2 * 3, 512)
    assert relative_l2(encoder.encode(wide[None]), right.numpy()) <= 5e-3


def test_what_the_manifest_says_of_the_package(converted):
    manifest = Manifest.from_file(converted / "manifest.json")
    record = manifest.coreml
    assert record
    assert record.calibration.startswith("built-in, 7 pictures, ")
    assert record.exponents["streams"] == {}  # this checkpoint stays within float16
    assert min(record.headroom.values()) > 0
    assert {"stages.4.stream", "expand"} <= set(record.headroom)
    ran = [(check.function, check.executor) for check in record.checks]
    for function in ("r128", "r256", "r128x192"):
        assert ran.count((function, "checker, float32")) == 1
        assert ran.count((function, "checker, float16")) == 2  # two pictures
    assert all(check.passed and check.relative_l2 <= check.gate for check in record.checks)
    assert any("Core ML package: 16-bit" in change for change in manifest.changes)
    assert any(name.startswith("vision.mlpackage/") for name in manifest.files)


def test_a_second_run_finds_it_done(converted, checkpoint, capsys):
    argv = [str(checkpoint("tiny")), "-o", str(converted), "--resolutions", "128,256,128x192"]
    assert main(argv) == 0
    assert "is up to date" in capsys.readouterr().out
    before = (converted / "manifest.json").read_text()
    assert main([*argv, "--verify"]) == 0  # runs the gates again
    assert json.loads((converted / "manifest.json").read_text()) == json.loads(before)


def test_other_pictures_are_another_conversion(checkpoint, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    from PIL import Image

    Image.fromarray(golden("tiny")["pixels_128x128"]).save(folder / "one.png")
    (folder / "broken.png").write_bytes(b"no image")
    source, target = checkpoint("tiny"), tmp_path / "b"
    first = convert(source, target, Options(package=SMALL), calibration=folder)
    assert any("broken.png" in warning for warning in first.warnings)
    record = Manifest.from_file(target / "manifest.json").coreml
    assert record
    assert record.calibration.startswith("pictures, 1 pictures, ")
    assert convert(source, target, Options(package=SMALL), calibration=folder).up_to_date
    Image.fromarray(golden("tiny")["pixels_128x128"][::-1]).save(folder / "two.png")
    assert not convert(source, target, Options(package=SMALL), calibration=folder).up_to_date


def test_one_size_is_checked_unless_asked(checkpoint, tmp_path):
    sizes = (Size(192, 128), Size(128, 128))
    target = convert(checkpoint("tiny"), tmp_path / "b", Options(package=PackageOptions(sizes=sizes))).path
    record = Manifest.from_file(target / "manifest.json").coreml
    assert record
    assert {check.function for check in record.checks} == {"r192x128"}
    verify.verify_bundle(target, [sizes[1]])
    record = Manifest.from_file(target / "manifest.json").coreml
    assert record
    assert {check.function for check in record.checks} == {"r128", "r192x128"}  # the first ones are kept


def test_the_size_that_tells_most():
    """The smallest where stage 5's map is 4 x 4 or more: there a 7x7 kernel uses its outer taps."""
    sizes = {side: Size(side, side) for side in (64, 128, 256, 512)} | {0: Size(192, 1024), 1: Size(320, 256)}
    assert telling_size(list(sizes.values())) == sizes[256]
    assert telling_size([sizes[512], sizes[1], sizes[0]]) == sizes[1]
    assert telling_size([sizes[64], sizes[0], sizes[128]]) == sizes[0]


def test_a_package_that_fails_is_not_written(checkpoint, tmp_path):
    """tiny-hot without its powers of two overflows float16."""
    unsafe, target = Options(package=replace(SMALL, range_safety=False)), tmp_path / "b"
    old = convert(checkpoint("tiny-hot"), target, Options()).path / "manifest.json"
    before = old.read_text()
    with pytest.raises(VerificationError, match=r"fails 3 of 3 gates \(FAILED  r128, checker, .*first overflow at"):
        convert(checkpoint("tiny-hot"), target, unsafe)
    assert old.read_text() == before
    assert [f.name for f in tmp_path.iterdir()] == ["b"]
    forced = convert(checkpoint("tiny-hot"), target, unsafe, gates=Gates(force=True))
    record = Manifest.from_file(forced.path / "manifest.json").coreml
    assert record
    assert not all(check.passed for check in record.checks)
    assert convert(checkpoint("tiny-hot"), target, unsafe, gates=Gates(force=True)).up_to_date
    with pytest.raises(VerificationError):  # what was forced isn't taken for good
        convert(checkpoint("tiny-hot"), target, unsafe)


def test_a_failing_package_that_nobody_asked_for_is_left_out(checkpoint, tmp_path, capsys):
    """An MLX bundle and a warning: at its smallest size tiny-hot misses the gate on one picture or the other."""
    source, target = checkpoint("tiny-hot"), tmp_path / "b"
    unsafe = Options(package=replace(SMALL, range_safety=False))
    result = convert(source, target, unsafe, gates=Gates(optional=True))
    assert any(warning.startswith("the bundle has no Core ML package: ") for warning in result.warnings)
    assert not (target / "vision.mlpackage").exists()
    assert Bundle.open(target).manifest.coreml is None
    assert convert(source, target, unsafe, gates=Gates(optional=True)).up_to_date
    assert not convert(source, target, unsafe, gates=Gates(force=True)).up_to_date


@pytest.mark.parametrize(
    ("passed", "gates", "accepted"),
    [
        ([True, True], Gates(), True),
        ([True, False], Gates(), False),
        ([True, False], Gates(force=True), True),
        (None, Gates(), False),
        (None, Gates(optional=True), True),
        (None, Gates(optional=True, force=True), False),
    ],
)
def test_which_outcomes_stand(converted, passed, gates, accepted):
    manifest = Bundle.open(converted).manifest
    assert manifest.coreml
    checks = [replace(check, passed=good) for check, good in zip(manifest.coreml.checks, passed or [], strict=False)]
    record = None if passed is None else replace(manifest.coreml, checks=tuple(checks))
    assert gates.accepts(replace(manifest, coreml=record)) == accepted


def test_broken_tools_cost_the_package_only(checkpoint, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ImportError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(vision_package, "convert_package", broken)
    with pytest.raises(ImportError):
        convert(checkpoint("tiny"), tmp_path / "b", Options(package=SMALL))
    result = convert(checkpoint("tiny"), tmp_path / "b", Options(package=SMALL), gates=Gates(optional=True))
    assert any("has no Core ML package: ImportError: libtorch_cpu.so" in warning for warning in result.warnings)
    assert Bundle.open(tmp_path / "b").manifest.coreml is None


def test_forced_twice_with_every_gate(checkpoint, tmp_path):
    unsafe, gates = Options(package=replace(SMALL, range_safety=False)), Gates(every_size=True, force=True)
    for again in (False, True):
        assert convert(checkpoint("tiny-hot"), tmp_path / "b", unsafe, gates=gates).up_to_date == again


def test_temporary_files_lie_beside_the_bundle(checkpoint, tmp_path, monkeypatch):
    """On the disk that was asked for room; nothing of them is left."""
    import tempfile

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o500)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    seen = []
    original = tempfile.mkdtemp

    def noted(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    convert(checkpoint("tiny"), tmp_path / "out" / "b", Options(package=SMALL))
    assert len(seen) > 2
    assert all(Path(folder).is_relative_to(tmp_path / "out") for folder in seen)
    assert tempfile.tempdir == str(elsewhere)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["b"]


def test_what_no_power_of_two_helps_is_said_before_the_package_is_made(checkpoint, tmp_path, monkeypatch):
    """Features beyond float16: measured, named, and nothing is written."""
    _, weights = folded_vision(checkpoint("tiny"))
    hot = weights | {name: weights[name] * np.float32(1e6) for name in weights if name.startswith("expand.depthwise")}
    monkeypatch.setattr("fastvlm_convert.pipeline.from_checkpoint", lambda *_: hot)
    with pytest.raises(VerificationError, match=r"would overflow float16: features reaches .* the limit is 65504"):
        convert(checkpoint("tiny"), tmp_path / "b", Options(package=SMALL))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("layout", [to_transformers, to_mlx_vlm])
def test_every_layout_gives_the_same_weights(checkpoint, tmp_path, layout):
    found, right = (folded_vision(path)[1] for path in (layout(checkpoint("tiny"), tmp_path / "s"), checkpoint("tiny")))
    assert found.keys() == right.keys()
    assert all(np.array_equal(found[name], right[name]) for name in right)


def test_warm_up_runs_each_function_once(converted):
    runtime = CheckerRuntime()
    done = list(warm_up(Bundle.open(converted), compute_units="ALL", runtime=runtime))
    assert [(height, width) for height, width, *_ in done] == [(128, 128), (128, 192), (256, 256)]
    assert all(load >= 0 and run > 0 for *_, load, run in done)
    assert runtime.opened == [("r128", "ALL"), ("r128x192", "ALL"), ("r256", "ALL")]
    with pytest.raises(ResolutionError, match="not 512 x 512"):
        list(warm_up(Bundle.open(converted), [(512, 512)], runtime=CheckerRuntime()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-coreml", "--resolutions", "256"], "--no-coreml leaves out the package"),
        (["--no-coreml", "--verify"], "--no-coreml leaves out the package"),
        (["--resolutions", "300"], "multiple of 64"),
        (["--resolutions", "256,256"], "none twice"),
        (["--resolutions", ""], "SIDE or HEIGHTxWIDTH"),
        (["--min-target", "macOS14"], "need --min-target macOS15"),
        (["--min-target", "macOS14", "--resolutions", "256", "--vision-bits", "8"], "needs --min-target macOS15"),
        (["--calibration", "nowhere"], "nowhere doesn't exist"),
    ],
)
def test_bad_flags(checkpoint, tmp_path, capsys, flags, message):
    assert main([str(checkpoint("tiny")), "-o", str(tmp_path / "b"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_without_the_extra(checkpoint, tmp_path, monkeypatch, capsys):
    """No package and a warning; an error where one was asked for."""
    monkeypatch.setattr(vision_package, "missing_dependencies", lambda: ["coremltools"])
    target = tmp_path / "b"
    assert main([str(checkpoint("tiny")), "-o", str(target)]) == 0
    assert "no Core ML package without coremltools: pip install" in capsys.readouterr().err
    assert not (target / "vision.mlpackage").exists()
    with pytest.raises(MissingDependencyError, match="a Core ML package needs coremltools"):
        convert(checkpoint("tiny"), tmp_path / "c", Options(package=SMALL))
