"""The doctor's look at a bundle's files and at what its manifest says."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from fastvlm_bench.doctor import model as model_check
from fastvlm_bench.doctor.model import check_model, package_bits, recorded_sizes
from fastvlm_mlx.bundle import Bundle


def test_a_damaged_file_is_found_whatever_its_date(bundle, tmp_path):
    folder = shutil.copytree(bundle("tiny"), tmp_path / "tiny")
    found, opened = check_model(folder)
    assert (found.status, opened.path) == ("ok", folder)
    assert found.data["source"]["layout"] == "llava"
    path = folder / "vision.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    Bundle.open(folder)  # size and date are what they were
    found, opened = check_model(folder)
    assert opened
    assert len(found.failures) == 1
    assert found.failures[0].startswith(f"{path} is damaged: its SHA-256 is ")
    (folder / "decoder.safetensors").unlink()
    found, opened = check_model(folder)
    assert opened is None
    assert "decoder.safetensors is missing" in found.failures[0]


def test_gates_that_failed_at_conversion(bundle, tmp_path):
    folder = shutil.copytree(bundle("tiny"), tmp_path / "tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    gate = {"reference": "", "picture": "1", "relative_l2": 1.0, "max_abs": 1.0, "gate": 5e-3, "first_overflow": None}
    checks = [
        gate | {"function": f"r{px}", "executor": "checker, float16", "passed": px == 64} for px in (64, 128, 192)
    ]
    manifest["coreml"] = {"calibration": "", "exponents": {}, "headroom": {}, "checks": checks}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found, _ = check_model(folder)
    assert found.failures == (
        "the Core ML package failed gates when it was made (r128, checker, float16; r192, checker, float16); "
        "convert again",
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"package": {"sizes": [256]}}, "options.package.sizes must be a list such as"),
        ({"package": {"sizes": 256}}, "multiples of 64, got 256;"),
        ({"package": {"sizes": [{"height": 256}]}}, "multiples of 64, got"),
        ({"package": {"sizes": [{"height": 256, "width": 100}]}}, "multiples of 64, got"),
        ({"package": {"sizes": [{"height": 256, "width": 256.0}]}}, "multiples of 64, got"),
        ({"package": {"sizes": [{"height": 256, "width": 256}], "bits": None}}, "bits must be a number above 0"),
        ({"package": [16]}, "options.package must be an object, got [16]; convert again"),
    ],
)
def test_an_odd_record_of_a_package(bundle, tmp_path, options, part):
    folder = shutil.copytree(bundle("tiny"), tmp_path / "tiny")
    (folder / "vision.mlpackage").mkdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["options"] |= options
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found, opened = check_model(folder)
    assert opened
    assert len(found.failures) == 1
    assert part in found.failures[0]
    assert len(found.notes) == 3
    assert found.data["options"]["package"] == options["package"]
    assert package_bits(opened) == 16
    assert recorded_sizes(opened) == (((256, 256),) if "bits" in part else ())


def test_any_part_of_the_model_s_check_may_fail(bundle, monkeypatch):
    def fail(*_):
        raise KeyError("odd")

    for name in ("_file_faults", "_record_faults", "_gate_faults", "_notes", "_data"):
        with monkeypatch.context() as patch:
            patch.setattr(model_check, name, fail)
            found, opened = check_model(bundle("tiny"))
        assert opened
        assert found.failures == ("'odd' (KeyError)",)
        assert (found.data["path"], len(found.notes) >= 1) == (str(bundle("tiny")), True)
