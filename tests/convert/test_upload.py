"""A bundle goes to the hub (as `support.fake_hub` plays it), and comes back the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from fastvlm_convert.pipeline import Options, convert
from fastvlm_convert.upload import model_card, upload
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import BundleError, InputError
from fastvlm_mlx.hub_cache import APPLE_NOTICE
from fastvlm_mlx.hub_client import APPLE_LICENCE
from support.client import Client
from support.fake_hub import TOKEN, FakeHub
from support.seeded import golden_prompt

UPLOAD = """
import json, sys
from pathlib import Path
from fastvlm_convert.upload import upload
from fastvlm_mlx.errors import HubError

folder, repo = map(json.loads, sys.argv[1:])
try:
    print(json.dumps(upload(Path(folder), repo)))
except HubError as exc:
    print(json.dumps(f"HubError: {exc}"))
"""


@pytest.fixture
def server():
    with FakeHub() as running:
        yield running


@pytest.fixture
def author(server, tmp_path):
    (tmp_path / "author").mkdir()
    return Client(server, tmp_path / "author", token=TOKEN)


@pytest.fixture
def licensed(checkpoint, tmp_path):
    """A checkpoint under Apple's research licence."""
    folder = shutil.copytree(checkpoint("tiny"), tmp_path / "licensed")
    (folder / "LICENSE").write_text("Apple Machine Learning Research Model License Agreement\n")
    return folder


def test_a_converted_model_goes_up_and_comes_back(server, author, licensed, tmp_path):
    """`fastvlm-convert CKPT --upload-repo ME/MODEL`, then `load("me/model")` on another machine."""
    out = author.home / "out"
    command = ("-m", "fastvlm_convert", str(licensed), "-o", str(out), "--no-coreml", "--upload-repo", "me/model")
    done = author.run(*command, "--source-id", "apple/FastVLM-0.5B")
    commits = list(server.repositories["me/model"].commits.values())
    assert f"uploaded {server.url}/me/model/commit/{list(server.repositories['me/model'].commits)[-1]}" in done.stdout
    assert set(commits[1]) == {".gitattributes", "README.md"}  # the terms are there before the weights
    local = {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert {"LICENSE", "NOTICE", "config.json", "manifest.json", "decoder.safetensors"} <= set(local)
    assert {name: commits[-1][name] for name in local} == local
    assert set(commits[-1]) - set(local) == {".gitattributes", "README.md"}

    server.repositories["me/model"].licence = APPLE_LICENCE  # as the real hub reads it from the card
    (tmp_path / "reader").mkdir()
    answer, log = Client(server, tmp_path / "reader").generate("me/model")
    assert answer == golden_prompt("tiny", "one image").greedy_ids
    assert log.count(APPLE_NOTICE) == 1
    assert not (tmp_path / "reader" / "cache" / "converted").exists()


def test_only_the_bundle_goes_up_and_only_once(server, author, bundle):
    folder = shutil.copytree(bundle("tiny"), author.home / "bundle")
    (folder / "notes.txt").write_text("private")
    (folder / ".DS_Store").touch()
    author.ask(UPLOAD, str(folder), "me/model")
    found = server.repositories["me/model"]
    newest = found.branches["main"]
    assert set(found.commits[newest]) == {f.name for f in bundle("tiny").iterdir()} | {
        "README.md",
        ".gitattributes",
    }
    server.forget()
    address, _ = author.ask(UPLOAD, str(folder), "me/model")
    assert address == f"{server.url}/me/model/commit/{newest}"
    assert not [request for request in server.requests if "PUT" in request or "/commit/" in request]


def test_failures_are_one_sentence(server, author, bundle):
    folder = str(bundle("tiny"))
    answer, _ = Client(server, author.home).ask(UPLOAD, folder, "me/model")
    assert answer.startswith("HubError: you may not write to me/model; log in with `hf auth login` and a token")
    server.faults["PUT /large/"] = 400
    answer, _ = author.ask(UPLOAD, folder, "me/model")
    assert answer == "HubError: can't upload to me/model: the hub answers with status 400; try again later"
    server.faults = {"POST /api/validate-yaml": 400}
    answer, _ = author.ask(UPLOAD, folder, "me/model")
    assert answer.startswith("HubError: can't upload to me/model: Invalid metadata in README.md.")
    server.stop()
    answer, _ = author.ask(UPLOAD, folder, "me/model")
    assert answer.startswith("HubError: can't upload to me/model: ")
    assert "\n" not in answer


def test_what_is_checked_before_the_hub_is_asked(bundle, checkpoint):
    with pytest.raises(InputError, match="'model' is no repository name; give ORG/NAME"):
        upload(bundle("tiny"), "model")
    with pytest.raises(BundleError):
        upload(checkpoint("tiny"), "me/model")


def _metadata(card: str) -> dict[str, str]:
    lines = card.split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def test_card_of_a_licensed_model(licensed, tmp_path):
    path = convert(licensed, tmp_path / "out", Options(q_bits=4), "apple/FastVLM-0.5B", "0" * 40).path
    card = model_card(Bundle.open(path), "me/model-4bit")
    assert _metadata(card) == {
        "library_name": "fastvlm-mlx",
        "pipeline_tag": "image-text-to-text",
        "license": "apple-amlr",
        "base_model": "apple/FastVLM-0.5B",
        "base_model_relation": "quantized",
    }
    assert f"[apple/FastVLM-0.5B](https://huggingface.co/apple/FastVLM-0.5B) at revision {'0' * 40}" in card
    assert APPLE_NOTICE in card
    assert "Model Derivative, for research purposes only; see [LICENSE](LICENSE)" in card
    assert 'load("me/model-4bit")' in card
    for change in json.loads((path / "manifest.json").read_text())["changes"]:
        assert f"- {change}\n" in card
    assert "quantised to 4 bits" in card


def test_card_of_a_model_of_ones_own(bundle):
    """No licence is claimed, and a local folder isn't passed off as a base model on the hub."""
    opened = Bundle.open(bundle("tiny"))
    card = model_card(opened, "me/model")
    assert set(_metadata(card)) == {"library_name", "pipeline_tag"}
    assert "Apple" not in card
    assert "\ntiny, converted for fastvlm-mlx." in card
    local = replace(opened.manifest, source=replace(opened.manifest.source, id="/home/me/tiny"))
    assert "base_model" not in model_card(replace(opened, manifest=local), "me/model")
