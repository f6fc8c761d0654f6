"""Names that need no hub: the embedded default, folders, the zoo; and what is kept of downloads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_zoo
from fastvlm_mlx import hub, hub_cache
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import BundleError, HubError, InputError
from fastvlm_mlx.hub_client import select_files


def test_default_is_embedded_and_says_once_what_it_sees(monkeypatch, capsys):
    monkeypatch.setattr(hub, "_noted", set())
    assert hub.resolve() == fastvlm_zoo.default().path == hub.resolve()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("sees only shapes, words and charts") == 1
    assert "try --model fastvlm-0.5b" in printed.err
    Bundle.open(hub.resolve("fastvlm-nano"))


def test_zoo_is_complete():
    entries = {entry.name: entry for entry in fastvlm_zoo.entries()}
    assert {"fastvlm-0.5b", "fastvlm-1.5b", "fastvlm-7b"} <= set(entries)
    assert all(e.path.is_dir() for e in entries.values() if e.path)
    for entry in entries.values():
        assert bool(entry.repo) != bool(entry.embedded)
        if entry.repo:
            assert entry.licence == "apple-amlr"
            assert entry.download_bytes > 1e9
    for name in ("fastvlm-0.5b-fp16", "fastvlm-1.5b-int8", "fastvlm-7b-int4"):
        assert "Core ML package only" in entries[name].note


def test_import_is_light():
    code = "import sys, fastvlm_mlx.hub; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"huggingface_hub", "mlx.core", "numpy", "fastvlm_convert"} & set(loaded)


def test_a_folder_is_itself(bundle, monkeypatch):
    folder = bundle("tiny")
    assert hub.resolve(folder) == folder
    assert hub.resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert hub.resolve("./tiny") == Path("tiny") == hub.resolve("tiny")


def test_unconverted_checkpoint(checkpoint):
    folder = checkpoint("tiny")
    with pytest.raises(BundleError, match=f"run `fastvlm-convert {folder}`"):
        hub.resolve(folder)


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~nobody/none", "a/b/c", Path("none")])
def test_missing_folder(name):
    with pytest.raises(BundleError, match=r"there is no (.*none|a/b/c); give"):
        hub.resolve(name)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        hub.resolve(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="is no bundle"):
        hub.resolve(tmp_path / "file")


@pytest.mark.parametrize("name", ["fastvlm-9b", "", "org/", "org/na me", "FastVLM"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(BundleError, match="no model is called") as caught:
        hub.resolve(name)
    assert all(entry.name in str(caught.value) for entry in fastvlm_zoo.entries())


def test_revision_of_a_folder(bundle):
    with pytest.raises(InputError, match="is for models on the hub"):
        hub.resolve(bundle("tiny"), revision="main")


def test_files_are_selected():
    others = ["README.md", "llava_qwen.py", "figure.png", "onnx/model.onnx", "pytorch_model.bin"]
    names = [
        "config.json",
        "model.safetensors",
        "merges.txt",
        "tokenizer.model",
        "LICENSE",
        "notice.txt",
        "added_tokens.json",
    ]
    package = ["fastvithd.mlpackage/Manifest.json", "fastvithd.mlpackage/Data/weights/weight.bin"]
    assert select_files([*names, *package, *others, "old/model.safetensors"]) == [*names, *package]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert select_files(["config.json", *shards, "training_args.bin"]) == ["config.json", *shards]


def test_damaged_record_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    record = hub_cache.Record({"main": "0" * 40}, {}, "mit")
    hub_cache.write_record("org/model", record)
    assert hub_cache.read_record("org/model") == record
    next((tmp_path / "hub").iterdir()).write_text("{")
    assert hub_cache.read_record("org/model") == hub_cache.Record()


def test_offline_mode_of_the_hubs_client_is_heeded(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="on this disk; load it once with the network"):
        hub.resolve("org/surely-not-there")
