"""`fastvlm verify`: the gates of a bundle's Core ML package, run again."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from fastvlm_convert.coreml_vision import PackageOptions, Size
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_mlx.manifest import Manifest
from support.adapters import VISION, deltas, write_adapter
from support.layouts import to_apple_mlx

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert import verify

SMALL = PackageOptions(sizes=(Size(128, 128),))


def test_the_command_verify(converted, tmp_path, capsys):
    folder = shutil.copytree(converted, tmp_path / "copy")
    assert verify.main([str(folder), "--resolutions", "128", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert [check["executor"] for check in checks] == ["checker, float32", *["checker, float16"] * 2]
    assert all(check["passed"] for check in checks)
    assert verify.main([str(folder), "--resolutions", "512"]) == 2
    assert "has no function r512; it has r128, r256, r128x192" in capsys.readouterr().err


def test_verify_keeps_the_manifest_open_and_right(converted, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(converted, tmp_path / "copy")
    manifest = folder / "manifest.json"
    manifest.chmod(0o664)
    before = manifest.read_text()
    assert verify.main([str(folder), "--resolutions", "128"]) == 0
    assert manifest.stat().st_mode & 0o777 == 0o664

    def unwritable(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(verify, "write_text", unwritable)
        assert verify.main([str(folder), "--resolutions", "128"]) == 0
    out, err = capsys.readouterr()
    assert "passed  r128, checker, float32" in out
    assert "the outcome isn't in" in err

    def replaced_meanwhile(*_, **__):
        data = json.loads(before)
        data["files"]["config.json"]["sha256"] = "0" * 64
        manifest.write_text(json.dumps(data))
        return ()

    monkeypatch.setattr(verify, "check_package", replaced_meanwhile)
    assert verify.main([str(folder)]) == 2
    assert "was made anew while it was checked" in capsys.readouterr().err
    assert "0" * 64 in manifest.read_text()


def test_verify_finds_what_the_hashes_cannot(converted, tmp_path, capsys):
    """A package that was swapped for another one, hashes and all."""
    folder = shutil.copytree(converted, tmp_path / "copy")
    data = json.loads((folder / "manifest.json").read_text())
    file = next(folder.glob("vision.mlpackage/Data/*/weights/weight.bin"))
    values = bytearray(file.read_bytes())
    values[-4000:-2000:2] = bytes(1000)  # the low bytes of 1,000 float16 weights
    file.write_bytes(values)
    data["files"][file.relative_to(folder).as_posix()]["sha256"] = hashlib.sha256(values).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(data))
    assert verify.main([str(folder), "--resolutions", "128"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED  r128, checker, float32" in out
    assert "fails" in err.splitlines()[-1]
    record = Manifest.from_file(folder / "manifest.json").coreml
    assert record
    assert not next(check.passed for check in record.checks if check.function == "r128")


def test_rounded_vision_weights_are_no_reference(checkpoint, tmp_path, capsys):
    options = Options(vision_dtype="bfloat16", package=SMALL)
    folder = convert(checkpoint("tiny"), tmp_path / "b", options).path
    assert verify.main([str(folder)]) == 2
    assert "rounded weights, which are no reference; give the source with --checkpoint" in capsys.readouterr().err
    assert verify.main([str(folder), "--checkpoint", str(checkpoint("tiny"))]) == 0
    assert verify.main([str(folder), "--checkpoint", str(checkpoint("tiny-untied"))]) == 2
    assert "isn't what" in capsys.readouterr().err


def test_an_adapter_as_the_source(checkpoint, tmp_path, capsys):
    """Each error's next step is one that there is."""
    base = checkpoint("tiny")
    tensors, _ = deltas(base, [VISION + "network.0.0.convffn.fc1"])
    adapter = write_adapter(tmp_path / "adapter", tensors, "org/somewhere")
    folder = str(convert(adapter, tmp_path / "b", Options(vision_dtype="bfloat16", package=SMALL), base=base).path)
    assert verify.main([folder]) == 2
    assert "give the source with --checkpoint" in capsys.readouterr().err
    assert verify.main([folder, "--checkpoint", str(adapter)]) == 2
    assert "give its base's folder with --base" in capsys.readouterr().err
    assert verify.main([folder, "--checkpoint", str(adapter), "--base", str(base)]) == 0
    assert "passed  r128" in capsys.readouterr().out
    assert verify.main([folder, "--checkpoint", str(adapter), "--base", str(checkpoint("tiny-untied"))]) == 2
    assert "isn't what" in capsys.readouterr().err
    assert verify.main([folder, "--base", str(base)]) == 2
    assert "give both, or leave --base out" in capsys.readouterr().err


def test_nothing_to_verify(bundle, checkpoint, tmp_path, capsys):
    assert verify.main([str(bundle("tiny"))]) == 2
    assert "has no vision.mlpackage" in capsys.readouterr().err
    source = to_apple_mlx(checkpoint("tiny"), tmp_path / "source")
    folder = convert(source, tmp_path / "apple", Options(package=SMALL)).path
    assert (folder / "vision.mlpackage").is_dir()
    assert verify.main([str(folder)]) == 2
    assert "carried along from the source" in capsys.readouterr().err
