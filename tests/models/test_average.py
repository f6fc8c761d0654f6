"""The mean of two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from nano.average import ALIKE, WEIGHTS, main
from nano.export import export
from nano.network import NanoVLM
from nano.starting import read_config
from support.nano_run import CONFIG


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints with weights of their own."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        network = NanoVLM(CONFIG)
        for tensor in network.state_dict().values():  # what starts as ones or zeros, such as norms' statistics, too
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.full((), 1 + seed))
        export(network, tokenizer, tmp_path / name)
    return tmp_path / "first", tmp_path / "second"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_every_weight_is_the_mean(pair, tmp_path, share):
    out = tmp_path / "out"
    assert main([*map(str, pair), str(out), "--share", str(share)]) == 0
    first, second, mean = (load_file(folder / WEIGHTS) for folder in (*pair, out))
    assert list(mean) == list(first)
    floating = {name for name, tensor in first.items() if tensor.is_floating_point()}
    assert len(floating) > 100
    for name, tensor in mean.items():
        assert tensor.dtype == first[name].dtype
        right = (1 - share) * first[name].double() + share * second[name].double() if name in floating else first[name]
        torch.testing.assert_close(tensor.double(), right.double(), atol=1e-6, rtol=1e-3)  # float16's steps
        assert not torch.equal(first[name], second[name]), name
    assert {file.name for file in out.iterdir()} == {WEIGHTS, *ALIKE}
    for name in ALIKE:
        assert (out / name).read_bytes() == (pair[0] / name).read_bytes()
    assert read_config(out) == read_config(pair[0])


def test_half_of_each_without_a_share(pair, tmp_path):
    for share in ((), ("--share", "0.5")):
        assert main([*map(str, pair), str(tmp_path / f"out{len(share)}"), *share]) == 0
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("out0", "out2"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def _other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1}))


def _other_words(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def _lost_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _damaged_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def _other_tensors(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(next(iter(weights)))
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_sizes, "differ in config.json; give one that was trained on from the other"),
        (_other_words, "differ in tokenizer.json; give one"),
        (_lost_weights, "lacks model.safetensors; give a folder that train.py exported"),
        (_damaged_weights, "holds no weights"),
        (_other_tensors, "hold other tensors; give one"),
    ],
)
def test_what_has_no_mean_is_one_sentence_and_writes_nothing(pair, tmp_path, capsys, change, message):
    change(pair[1])
    assert main([*map(str, pair), str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(pair, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (*pair, tmp_path, tmp_path / "file"):
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        assert main([*map(str, pair), str(out)]) == 2
        assert f"{out} is there already; give a new folder" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("share", ["-0.1", "1.1", "nan"])
def test_a_share_is_one(pair, tmp_path, capsys, share):
    assert main([*map(str, pair), str(tmp_path / "out"), f"--share={share}"]) == 2
    assert "share needs a number from 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
