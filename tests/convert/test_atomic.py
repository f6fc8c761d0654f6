"""A kill at any moment leaves the old bundle or none, and the next run puts everything right."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastvlm_convert.pipeline import Options, convert
from fastvlm_mlx import files
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
# The converter, slowed down at each step that touches the disk, so that kills hit all of them.
SLOW = """
import sys, time, pathlib, os
sys.path[:0] = {paths!r}
from fastvlm_convert import mlx_weights, pipeline, records
def slow(function, seconds):
    def call(*args, **named):
        time.sleep(seconds)
        return function(*args, **named)
    return call
mlx_weights.raw_bytes = slow(mlx_weights.raw_bytes, 0.002)
pathlib.Path.rename = slow(pathlib.Path.rename, 0.15)
records.sha256 = slow(records.sha256, 0.02)
print("ready", flush=True)
pipeline.convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), pipeline.Options(dtype=sys.argv[3]))
"""


@contextmanager
def slow_converter(source: Path, target: Path, dtype: str) -> Iterator[subprocess.Popen[str]]:
    paths = [str(ROOT / part) for part in ("src", "converters", "models")]
    code = SLOW.format(paths=paths)
    command = [sys.executable, "-c", code, str(source), str(target), dtype]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=target.parent) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process


def dtype_of(target: Path) -> object:
    return Bundle.open(target).manifest.options["dtype"]


def test_killed_at_any_moment(checkpoint, tmp_path):
    source, target = checkpoint("tiny"), tmp_path / "bundle"
    convert(source, target, Options(dtype="float32"))
    with slow_converter(source, target, "float16") as process:
        started = time.monotonic()
        assert process.wait() == 0
        whole = time.monotonic() - started
    convert(source, target, Options(dtype="float32"))
    seen = set()
    moments = 8
    for i in range(moments):
        with slow_converter(source, target, "float16") as process:
            time.sleep(whole * (i + 0.5) / moments)
            process.send_signal(signal.SIGKILL)
        if target.exists():
            seen.add(dtype_of(target))  # opens it: every file is what its hash says
        files.recover_folder(target)
        assert dtype_of(target) in ("float32", "float16")
        convert(source, target, Options(dtype="float32"))
        assert dtype_of(target) == "float32"
        assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]
    assert "float32" in seen  # the kills came while the old one was still to be replaced


def test_between_the_two_renames(checkpoint, tmp_path, monkeypatch):
    """The one moment at which the target is missing: the old bundle waits, and comes back."""
    target = tmp_path / "bundle"
    convert(checkpoint("tiny"), target)
    target.rename(tmp_path / ".bundle.previous")
    files.recover_folder(target)
    Bundle.open(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_another_running_conversion_is_left_alone(tmp_path):
    own, dead, elsewhere = (
        tmp_path / f".bundle.partial-{name}-abc"
        for name in (f"{platform.node()}-{os.getpid()}", f"{platform.node()}-999999999", "other-host-999999999")
    )
    for folder in (own, dead, elsewhere):
        folder.mkdir()
    files.recover_folder(tmp_path / "bundle")
    assert (own.exists(), dead.exists(), elsewhere.exists()) == (True, False, True)


def test_a_link_as_the_target_stays(checkpoint, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "bundle")  # dangling at first
    for dtype in ("float32", "float16"):
        convert(checkpoint("tiny"), link, Options(dtype=dtype))
        assert link.is_symlink()
        assert dtype_of(tmp_path / "real" / "bundle") == dtype
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]


def test_a_second_run_finds_the_bundle(checkpoint, tmp_path):
    source, target = checkpoint("tiny"), tmp_path / "bundle"
    first = convert(source, target)
    stamp = (target / "decoder.safetensors").stat().st_mtime_ns
    second = convert(source, target)
    assert (first.up_to_date, second.up_to_date) == (False, True)
    assert (target / "decoder.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("reason", ["options", "source", "damage", "version"])
def test_what_has_changed_is_made_again(checkpoint, tmp_path, reason, monkeypatch):
    import shutil

    source, target = shutil.copytree(checkpoint("tiny"), tmp_path / "source"), tmp_path / "bundle"
    convert(source, target)
    options = Options()
    if reason == "options":
        options = Options(dtype="float16")
    elif reason == "source":
        (source / "generation_config.json").write_text('{"eos_token_id": 5}')
    elif reason == "damage":
        data = bytearray((target / "decoder.safetensors").read_bytes())
        data[-1] ^= 1
        (target / "decoder.safetensors").write_bytes(data)
    else:
        monkeypatch.setattr("fastvlm_convert.records.__version__", "99")
    assert not convert(source, target, options).up_to_date
    Bundle.open(target)


def test_the_default_place(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(checkpoint("tiny")).path == Path("models/converted/tiny")
    quantised = convert(checkpoint("tiny"), options=Options(q_bits=4)).path
    assert quantised == Path("models/converted/tiny-4bit")
    assert Bundle.open(quantised).config.quantization


def test_the_source_is_only_read(checkpoint, tmp_path):
    source = checkpoint("tiny")
    before = {f.name: (f.stat().st_mtime_ns, f.stat().st_size) for f in source.iterdir()}
    convert(source, tmp_path / "bundle")
    assert {f.name: (f.stat().st_mtime_ns, f.stat().st_size) for f in source.iterdir()} == before


def test_licence_and_change_record(checkpoint, tmp_path):
    import shutil

    source = shutil.copytree(checkpoint("tiny"), tmp_path / "source")
    terms = "Apple Machine Learning Research Model License Agreement\n\nTerms."
    (source / "LICENSE_MODEL").write_text(terms)
    target = convert(source, tmp_path / "bundle", Options(q_bits=8), "apple/FastVLM-0.5B").path
    assert (target / "LICENSE_MODEL").read_text() == terms
    notice = (target / "NOTICE").read_text()
    assert notice.startswith(
        "Apple Machine Learning Research Model is licensed under the "
        "Apple Machine Learning Research Model License Agreement."
    )
    assert "apple/FastVLM-0.5B" in notice
    assert "quantised to 8 bits" in notice
    manifest = Bundle.open(target).manifest
    assert manifest.licence == "apple-amlr"
    assert {"LICENSE_MODEL", "NOTICE"} <= set(manifest.files)


def test_terms_that_only_the_page_of_the_source_names(checkpoint, tmp_path):
    """A repository may say apple-amlr and ship no LICENSE file: the notice is written all the same."""
    target = convert(checkpoint("tiny"), tmp_path / "bundle", source_id="apple/FastVLM-0.5B", licence="apple-amlr").path
    assert (target / "NOTICE").read_text().startswith("Apple Machine Learning Research Model is licensed under")
    assert Bundle.open(target).manifest.licence == "apple-amlr"
    assert convert(checkpoint("tiny"), target, source_id="apple/FastVLM-0.5B", licence="apple-amlr").up_to_date


def test_an_empty_folder_may_be_the_target(checkpoint, tmp_path):
    (tmp_path / "bundle").mkdir()
    convert(checkpoint("tiny"), tmp_path / "bundle")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no bundle"):
        convert(checkpoint("tiny"), tmp_path / "file")
