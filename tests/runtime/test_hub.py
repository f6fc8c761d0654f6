"""A name on the hub becomes a bundle; `support.fake_hub` plays the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fastvlm_zoo
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.hub_cache import APPLE_NOTICE
from support.client import RESOLVE, Client
from support.fake_hub import TOKEN, FakeHub
from support.seeded import golden_prompt

UNNEEDED = (
    "README.md",
    "llava_qwen.py",
    "figure.png",
    "onnx/model.onnx",
    ".gitattributes",
    "pytorch_model.bin",
)


@pytest.fixture
def server():
    with FakeHub() as running:
        yield running


@pytest.fixture
def user(server, tmp_path):
    (tmp_path / "home").mkdir()
    return Client(server, tmp_path / "home")


@pytest.fixture
def published(checkpoint, tmp_path):
    """A checkpoint with everything that a repository has besides."""
    folder = shutil.copytree(checkpoint("tiny"), tmp_path / "published")
    (folder / "LICENSE").write_text("Apple Machine Learning Research Model License Agreement\n")
    for name in UNNEEDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    return folder


def answers_right(path: str) -> bool:
    """Whether the bundle answers the golden prompt as the official code does."""
    prompt = golden_prompt("tiny", "one image")
    result = load(path).generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    return list(result.token_ids) == prompt.greedy_ids


def test_bundle_on_the_hub(server, user, bundle):
    """It is used as it is: nothing is converted. The second start downloads nothing."""
    commit = server.add("org/bundle", bundle("tiny"))
    path, log = user.resolve("org/bundle")
    assert log == ""
    assert answers_right(path)
    assert sorted(server.downloads) == sorted(f.name for f in bundle("tiny").iterdir())
    assert not (user.home / "cache" / "converted").exists()
    server.forget()
    assert path.startswith(str(user.home / "hf"))
    assert Path(path).name == commit
    assert user.resolve("org/bundle") == (path, "")
    assert server.downloads == []


def test_checkpoint_on_the_hub(server, user, published):
    """Downloaded and converted on first use, found afterwards, even if all but the outcome is gone."""
    commit = server.add("org/model", published, licence="apple-amlr")
    (user.home / "json.py").write_text("raise ImportError('a module was taken from the current folder')")
    path, log = user.resolve("org/model")
    assert answers_right(path)
    assert sorted(server.downloads) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert log.count(APPLE_NOTICE) == 1
    assert "research purposes only" in log
    assert "https://huggingface.co/org/model/blob/main/LICENSE" in log

    server.forget()
    written = (Path(path) / "manifest.json").stat().st_mtime_ns
    assert user.resolve("org/model") == (path, "")  # neither the terms nor the conversion a second time
    shutil.rmtree(user.home / "hf")
    assert user.resolve("org/model") == (path, "")
    assert server.downloads == []
    assert (Path(path) / "manifest.json").stat().st_mtime_ns == written
    assert Path(path) == user.home / "cache" / "converted" / "org--model" / commit
    made = Bundle.open(Path(path))
    assert (made.manifest.source.id, made.manifest.source.revision) == ("org/model", commit)
    assert made.manifest.licence == "apple-amlr"
    assert (Path(path) / "LICENSE").read_bytes() == (published / "LICENSE").read_bytes()

    server.stop()
    assert user.resolve("org/model", local_files_only=True) == (path, "")
    assert user.resolve("org/model") == (path, "")  # pinned: the hub isn't asked
    assert user.resolve("org/model", revision="main") == (
        path,
        "the hub can't be reached; using what was downloaded of org/model\n",
    )
    shutil.rmtree(user.home / "cache" / "hub")
    assert user.resolve("org/model", local_files_only=True) == (path, "")


def test_terms_are_shown_once_per_repository(server, user, bundle):
    """Also for bundles that somebody converted, by the card's licence; no others show any."""
    for repo in ("org/one", "org/two"):
        server.add(repo, bundle("tiny"), licence="apple-amlr")
    server.add("org/free", bundle("tiny"), licence="mit")
    _, log = user.ask(RESOLVE, [("org/one", {}), ("org/one", {}), ("org/two", {}), ("org/free", {})])
    assert [line.split()[0] for line in log.splitlines() if "research purposes" in line] == [
        "org/one",
        "org/two",
    ]
    assert user.resolve("org/two")[1] == ""


def test_the_revision_asked_is_served(server, user, checkpoint, bundle):
    old = server.add("org/model", bundle("tiny"), branch="v1")
    new = server.add("org/model", checkpoint("tiny-untied"))
    asked = [("org/model", {"revision": r}) for r in ("v1", "main", old, new)]
    paths, _ = user.ask(RESOLVE, asked)
    assert [Path(path).name for path in paths] == [old, new, old, new]
    assert Bundle.open(Path(paths[0])).config.decoder.tie_word_embeddings
    assert not Bundle.open(Path(paths[1])).config.decoder.tie_word_embeddings
    server.stop()
    assert user.ask(RESOLVE, [(m, o | {"local_files_only": True}) for m, o in asked])[0] == paths
    assert user.resolve("org/model", revision="v2", local_files_only=True)[0].startswith("HubError")


def test_the_terms_come_before_the_download(server, user, published):
    """Shown even where not one file of the model can be had."""
    server.add("org/model", published, licence="apple-amlr")
    server.faults["/resolve/"] = 503
    answer, log = user.resolve("org/model")
    assert answer.startswith("HubError")
    assert server.downloads == []
    assert log.count(APPLE_NOTICE) == 1


def test_the_first_download_pins_the_commit(server, user, bundle):
    """A branch that moves changes nothing, and isn't asked after, unless the revision is asked for."""
    old = server.add("org/model", bundle("tiny"))
    user.resolve("org/model")
    new = server.add("org/model", bundle("tiny-untied"))
    server.forget()
    assert Path(user.resolve("org/model")[0]).name == old
    assert server.requests == []
    assert Path(user.resolve("org/model", revision="main")[0]).name == new
    assert "decoder.safetensors" in server.downloads


def test_zoo_names_lead_to_their_repository(server, user, bundle):
    server.add("apple/FastVLM-0.5B", bundle("tiny"))  # the terms are the zoo's, whatever the card says
    names = ["fastvlm-0.5b", "apple/FastVLM-0.5B", "Apple/fastvlm-0.5b"]
    paths, log = user.ask(RESOLVE, [(name, {}) for name in names])
    assert {Path(path).is_dir() for path in paths} == {True}
    assert len(set(paths)) == 1
    assert "GET /api/models/apple/FastVLM-0.5B/revision/main" in server.requests
    assert not any("fastvlm-0.5b" in request for request in server.requests)
    assert log.count(APPLE_NOTICE) == 1


def test_refusals_are_one_sentence(server, user, bundle, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").touch()
    server.add("org/private", bundle("tiny"), private=True)
    server.add("org/gated", bundle("tiny"), gated=True)
    server.add("org/model", bundle("tiny"))
    server.add("org/other", tmp_path / "other")
    expected = {
        "org/none@main": "HubError: the hub has no org/none, or it is private; check the name, or log in",
        "org/private@main": "HubError: the hub has no org/private, or it is private; check the name",
        "org/gated@main": "HubError: org/gated is gated: ask for access at https://huggingface.co/org/gated,",
        "org/model@v9": "HubError: org/model has no revision 'v9'; see https://huggingface.co/org/model/commits",
        "org/other@main": "HubError: org/other holds no FastVLM: config.json and weights are expected, found",
        "org/a--b@main": "BundleError: 'org/a--b' can't be the name of a repository; give ORG/NAME",
    }
    asked = [(name.partition("@")[0], {"revision": name.partition("@")[2]}) for name in expected]
    answers, log = user.ask(RESOLVE, asked)
    for answer, start in zip(answers, expected.values(), strict=True):
        assert answer.startswith(start)
        assert "\n" not in answer
    assert "`hf auth login`" in answers[0]
    assert "`hf auth login`" in answers[2]
    assert log == ""
    known = Client(server, user.home, token=TOKEN)
    answers, _ = known.ask(RESOLVE, [("org/private", {}), ("org/gated", {}), ("org/none", {})])
    assert [Path(path).is_dir() for path in answers] == [True, True, False]
    assert answers[2].startswith("HubError: the hub has no org/none")


def test_no_answer_is_one_sentence(server, user, bundle):
    server.add("org/model", bundle("tiny"))
    answer, _ = user.resolve("org/model", local_files_only=True)
    assert answer == "HubError: org/model (main) isn't, or not completely, on this disk; load it once with the network"
    assert [request for request in server.requests if "agent" not in request] == []
    server.faults["/api/models/"] = 503
    answer, _ = user.resolve("org/model")
    assert answer == "HubError: the hub answers org/model with status 503; try again later"
    server.stop()
    answer, log = user.resolve("org/model")
    assert answer.startswith("HubError: can't reach the Hugging Face hub for org/model (")
    assert answer.endswith("check the network, or the path if a folder was meant")
    assert (answer.count("\n"), log) == (0, "")


def test_interrupted_download_is_not_taken_for_a_model(server, user, checkpoint):
    server.add("org/model", checkpoint("tiny"))
    server.faults["/generation_config.json"] = 403
    answer, _ = user.resolve("org/model")
    assert answer == "HubError: the hub refuses org/model with status 403; log in with `hf auth login`"
    assert list((user.home / "hf").rglob("config.json"))
    assert "isn't, or not completely, on this disk" in user.resolve("org/model", local_files_only=True)[0]
    shutil.rmtree(next((user.home / "hf").rglob("trees")))  # older clients keep no list of a commit's files
    assert "isn't, or not completely, on this disk" in user.resolve("org/model", local_files_only=True)[0]
    server.faults.clear()
    path, _ = user.resolve("org/model")
    assert Path(path).is_dir()
    shutil.rmtree(user.home / "cache" / "hub")  # what another program downloaded isn't converted twice either
    assert user.resolve("org/model", local_files_only=True) == (path, "")


def test_checkpoint_that_is_no_fastvlm(server, user, checkpoint, tmp_path):
    """The converter says why, the error that it didn't work; nothing is left, stdout stays clean."""
    folder = shutil.copytree(checkpoint("tiny"), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    server.add("org/other", folder)
    answer, log = user.resolve("org/other")
    assert answer.startswith("HubError: org/other can't be converted (exit code 2); `fastvlm-convert ")
    assert "fastvlm-convert: error: " in log
    assert not list((user.home / "cache").glob("converted/*/[!.]*"))


def test_models_are_listed_with_where_they_are(server, user, bundle, checkpoint):
    server.add("org/bundle", bundle("tiny"), licence="mit")
    server.add("apple/FastVLM-1.5B", checkpoint("tiny"))
    paths, _ = user.ask(RESOLVE, [("org/bundle", {}), ("fastvlm-1.5b", {})])
    server.stop()
    code = "import json; from fastvlm_mlx.hub import list_models\n"
    code += "print(json.dumps([[m.name, m.where, str(m.path), m.bytes, m.licence] for m in list_models()]))"
    rows = {name: rest for name, *rest in user.ask(code)[0]}
    size = sum(file.stat().st_size for file in bundle("tiny").iterdir())
    assert list(rows) == [entry.name for entry in fastvlm_zoo.entries()] + ["org/bundle"]
    assert rows["org/bundle"] == ["downloaded", paths[0], size, "mit"]
    assert rows["fastvlm-1.5b"][:2] == ["converted", paths[1]]
    assert rows["fastvlm-7b"] == ["not downloaded", "None", 15_500_000_000, "apple-amlr"]
    assert rows["fastvlm-nano"][0] == "embedded"
