"""The wheel holds what it needs: installed elsewhere, the commands run from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "models" / "fastvlm_zoo" / "nano"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict[str, str]:
    """Environment in which only the unpacked wheel provides the packages; the working folder is elsewhere."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    # -P keeps the working folder out; PYTHONPATH comes before an editable install of the checkout.
    return os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}


def run(installed: dict[str, str], folder: Path, *argv: str) -> str:
    command = [sys.executable, "-m", *argv]
    done = subprocess.run(command, cwd=folder, env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        entry_points = file.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        licences = [name for name in names if name.endswith("licenses/LICENSE")]
    tops = {name.partition("/")[0] for name in names}
    packages = {"fastvlm_mlx", "fastvlm_convert", "fastvlm_bench", "fastvlm_zoo"}
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    for name in (
        *(f"{package}/py.typed" for package in packages),
        "fastvlm_zoo/zoo.toml",
        *(f"fastvlm_zoo/nano/{name}" for name in json.loads((NANO / "manifest.json").read_text())["files"]),
        "fastvlm_zoo/nano/manifest.json",
        "fastvlm_zoo/accuracy.toml",
        "fastvlm_mlx/vision/fastvithd.py",
        *(f"fastvlm_convert/calibration/{name}.jpg" for name in ("astronaut", "chelsea", "coffee", "rocket")),
        "fastvlm_convert/calibration/README.md",  # their authors and licences
    ):
        assert name in names
    assert not [name for name in names if "checkpoint" in name]  # what the default was converted from stays outside
    assert licences
    for command in ("fastvlm = ", "fastvlm-convert = ", "fastvlm-bench = "):
        assert command in entry_points
    assert wheel.stat().st_size < 12e6


def test_the_commands_run_from_the_wheel(installed, tmp_path, checkpoint):
    where = run(installed, tmp_path, "fastvlm_mlx", "models")
    assert "fastvlm-nano" in where
    Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    answer = run(installed, tmp_path, "fastvlm_mlx", "generate", "--image", "photo.png", "--json")
    assert json.loads(answer)["image_tokens"] == 25
    assert run(installed, tmp_path, "fastvlm_convert", str(checkpoint("tiny"))) == "wrote models/converted/tiny\n"
    table = run(installed, tmp_path, "fastvlm_bench", "--resolution", "128", "--runs", "1", "--max-tokens", "2")
    assert "TTFT" in table


def test_the_packages_come_from_the_wheel(installed, tmp_path):
    code = "import fastvlm_mlx, fastvlm_zoo; print(fastvlm_mlx.__file__, fastvlm_zoo.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=True)
    assert all(part.startswith(installed["PYTHONPATH"]) for part in done.stdout.split())
