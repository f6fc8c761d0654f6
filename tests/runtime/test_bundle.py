"""Bundles: strict configs, hashes, strict weights, and what load() refuses."""

from __future__ import annotations

import json
import os
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle, assign, verify_files
from fastvlm_mlx.errors import (
    BundleError,
    ConfigError,
    FastVLMError,
    InputError,
    ResolutionError,
    WeightsError,
)


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle that the test may damage."""
    return shutil.copytree(bundle("tiny"), tmp_path / "copy")


def edit_config(folder, **changes):
    """Change config.json, and its record in the manifest as if it had been written so."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite_record(folder, "config.json")


def rewrite_record(folder, name):
    from fastvlm_mlx.files import sha256

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1, "novelty": 2}, "keys unknown novelty, surprise"),
        ({"decoder": ..., "name": ...}, "keys missing name, decoder"),
        ({"context_length": "long"}, "context_length: expected int, found 'long'"),
        ({"image_newline": 1}, "image_newline: expected bool, found 1"),
        ({"eos_token_ids": ["a"]}, "eos_token_ids: expected int, found 'a'"),
        ({"decoder": 3}, "decoder: expected an object, found int"),
    ],
)
def test_config_is_strict(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(ConfigError, match=message):
        load(copy)


def test_unknown_families_are_named(copy):
    config = json.loads((copy / "config.json").read_text())
    edit_config(copy, decoder=config["decoder"] | {"model_type": "mamba"})
    with pytest.raises(ConfigError, match="'mamba'; this version knows qwen2, llama"):
        load(copy)
    edit_config(copy, decoder=config["decoder"], projector=config["projector"] | {"kind": "resampler"})
    with pytest.raises(ConfigError, match="'resampler'; this version knows linear, mlpNx_gelu"):
        load(copy)


def test_a_newer_format(copy):
    edit_config(copy, format_version=99, future_key=True)
    with pytest.raises(BundleError, match=r"format 99, this version reads up to 1; upgrade with: pip install -U"):
        load(copy)


def test_a_damaged_file_is_found_by_its_hash(copy):
    load(copy)
    weights = copy / "vision.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1  # one bit of one weight
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"vision.safetensors is damaged: its SHA-256"):
        load(copy)


def test_truncated_and_missing_files(copy):
    weights = copy / "decoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"has \d+ bytes, the manifest says \d+"):
        load(copy)
    weights.unlink()
    with pytest.raises(BundleError, match="is missing from the bundle"):
        load(copy)


def test_unchanged_files_are_hashed_once(copy, monkeypatch):
    hashed = []
    from fastvlm_mlx import bundle as module

    real = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path, progress=None: hashed.append(path.name) or real(path, progress))
    Bundle.open(copy)
    assert set(hashed) == {"config.json", "decoder.safetensors", "vision.safetensors"}
    hashed.clear()
    Bundle.open(copy)
    assert hashed == []
    os.utime(copy / "config.json")
    Bundle.open(copy)
    assert hashed == ["config.json"]


def test_an_unwritable_cache_is_no_hindrance(copy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "file" / "below"))
    verify_files(copy, Bundle.open(copy).manifest.files)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_no_json(copy, name):
    (copy / name).write_text("{")
    with pytest.raises(BundleError, match=f"can't read .*{name}"):
        load(copy)


def test_weights_that_fit_the_hashes_but_not_the_config(copy):
    """One error lists everything that is wrong."""
    weights = mx.load(str(copy / "decoder.safetensors"))
    moved = weights.pop("model.norm.weight")
    weights["model.layers.7.surprise"] = moved
    weights["projector.linear_1.bias"] = mx.zeros((3,))
    mx.save_safetensors(str(copy / "decoder.safetensors"), weights)
    rewrite_record(copy, "decoder.safetensors")
    with pytest.raises(WeightsError) as caught:
        load(copy)
    text = str(caught.value)
    assert "missing (1): model.norm.weight" in text
    assert "unexpected (1): model.layers.7.surprise" in text
    assert "wrong shape (1): projector.linear_1.bias (3,) instead of (128,)" in text


def test_bad_quantised_shapes_are_reported():
    layer = nn.Linear(64, 8, bias=False)
    wrong = {"weight": mx.zeros((8, 9), mx.uint32), "scales": mx.zeros((8, 1)), "biases": mx.zeros((8, 1))}
    with pytest.raises(WeightsError, match=r"weight \(8, 9\) instead of \(8, 8\)"):
        assign({"": nn.Sequential(layer)}, {f"layers.0.{k}": v for k, v in wrong.items()}, "x")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vision": "cuda"}, InputError, "vision must be auto, coreml or mlx"),
        ({"quantize": 7}, InputError, "quantize must be one of 2, 3, 4, 5, 6, 8"),
        ({"resolution": 1000}, ResolutionError, "multiple of 64"),
        ({"dtype": "int8"}, InputError, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_bad_arguments(bundle, arguments, error, message):
    with pytest.raises(error, match=message):
        load(bundle("tiny"), **arguments)


def test_every_error_has_one_root_and_an_exit_code():
    import fastvlm_mlx.errors as errors

    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) > 10
    assert all(issubclass(e, FastVLMError) and e.exit_code in (1, 2) for e in found)
