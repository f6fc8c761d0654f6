"""The real 0.5B shapes, seeded: conversion within its memory bound, an answer at 1024 px (`make slow`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvlm_convert.source import Checkpoint
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle
from support.layouts import to_bin_shards, to_sharded
from support.qwen_files import write_qwen_files
from support.seeded import write_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 300_000_000
# VmHWM is of this process only; getrusage would inherit the peak of the test that starts it (Linux, vfork).
PEAK = """
import resource, sys
{work}
if sys.platform == "darwin":
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The seeded 0.5b checkpoint in shards, with Qwen2's tokenizer files."""
    folder = tmp_path_factory.mktemp("full")
    whole = write_checkpoint("0.5b", folder / "whole")
    sharded = to_sharded(whole, folder / "half", SHARD_BYTES)
    (whole / "model.safetensors").unlink()
    return write_qwen_files(sharded)


def peak_bytes(code: str) -> int:
    """Most memory that a fresh interpreter held while it ran some code, by the kernel's count."""
    paths = [str(ROOT / part) for part in ("src", "converters", "models")]
    script = PEAK.format(work=f"sys.path[:0] = {paths!r}\n{code}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("flags", [[], ["-q"], ["--dtype", "float32"]])
def test_memory_is_bounded_by_the_largest_shard(source, tmp_path, flags):
    shards = Checkpoint(source).shards
    assert len(shards) >= 4
    largest = max(shard.stat().st_size for shard in shards)
    argv = [str(source), "-o", str(tmp_path / "bundle"), "--no-coreml", *flags]
    peak = peak_bytes(f"from fastvlm_convert.cli import main\nassert main({argv!r}) == 0")
    assert peak <= 1.2 * largest + 1e9, f"{peak / 1e6:.0f} MB for shards of {largest / 1e6:.0f} MB"
    Bundle.open(tmp_path / "bundle")


def test_memory_of_a_bin_checkpoint(tmp_path):
    """One `.bin` of all weights: mapped from the file, and copied tensor by tensor."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    whole = to_bin_shards(write_checkpoint("0.5b", tmp_path / "seeded"), tmp_path / "bin", 10**12)
    largest = max(shard.stat().st_size for shard in Checkpoint(whole).shards)
    argv = [str(whole), "-o", str(tmp_path / "bundle"), "--no-coreml"]
    peak = peak_bytes(f"from fastvlm_convert.cli import main\nassert main({argv!r}) == 0")
    assert peak <= 1.2 * largest + 1e9, f"{peak / 1e6:.0f} MB for a file of {largest / 1e6:.0f} MB"


def test_five_sizes_in_one_package(source, tmp_path):
    """Weights stored once; nothing in it that keeps work off the Neural Engine, by the static rules."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    from fastvlm_convert.ane_report import report
    from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package
    from fastvlm_convert.ranges import Ranges
    from support.folded import folded_vision
    from support.mil_programs import quiet

    sizes = Size.parse_list("256,512,768,1024,1536")
    package = tmp_path / "vision.mlpackage"
    with quiet():
        convert_package(*folded_vision(source), package, PackageOptions(sizes=sizes), Ranges())
        reports = {found.function: found for found in report(package)}
    assert sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) <= 250e6
    assert reports.keys() == {size.function for size in sizes}
    assert sum(reports["r1024"].macs.values()) == pytest.approx(243.4e9, rel=1e-3)
    for found in reports.values():
        assert found.eligible_share == 1.0
        assert not [finding for finding in found.findings if finding.blocks]
        assert not {"linear", "layer_norm", "batch_norm", "avg_pool", "max_pool"} & set(found.ops)
        assert {finding.rule for finding in found.findings} <= {"large activation", "last-axis transpose"}


def test_an_answer_at_1024_px(source, tmp_path):
    from fastvlm_convert.pipeline import convert

    result = convert(source, tmp_path / "bundle")
    assert any("differs from the embedding" in warning for warning in result.warnings)
    model = load(result.path)
    photo = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    answer = model.generate(photo, "Describe the image.", max_tokens=4, ignore_eos=True)
    assert (answer.prompt_tokens, answer.image_tokens) == (280, 256)  # facts of the official code
    assert answer.generation_tokens == 4
    features = model.encode_image(photo, resolution=256)
    assert features.features.shape == (16, 3072)
    assert features.embeddings.shape == (16, 896)
    assert np.isfinite(np.array(features.embeddings)).all()
