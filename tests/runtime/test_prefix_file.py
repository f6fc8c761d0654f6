"""What one process has computed, another knows: the same ids, and only new work."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import InputError
from support.work import counted

PHOTO = np.random.default_rng(5).integers(0, 256, (70, 60, 3), np.uint8)
OPTIONS = {"max_tokens": 6, "ignore_eos": True, "resolution": 128}


@pytest.fixture
def saved(bundle, tmp_path):
    first = load(bundle("tiny"))
    answers = [first.generate(PHOTO, [1, 2, -200, *ids], **OPTIONS) for ids in ([3], [4, 5], [3, 6])]
    assert first.save_prefix(tmp_path / "known.safetensors") == sum(len(n.keys) for n in first.engine.prefixes.nodes())
    return tmp_path / "known.safetensors", answers, first.engine.prefixes.nbytes


def test_another_process_goes_on_from_there(saved, bundle):
    path, answers, size = saved
    other = load(bundle("tiny"))
    assert other.load_prefix(path) * 56 < other.engine.prefixes.nbytes == size
    with counted(other) as work:
        again = [other.generate(PHOTO, [1, 2, -200, *ids], **OPTIONS) for ids in ([3], [4, 5], [3, 6])]
    assert [r.token_ids for r in again] == [r.token_ids for r in answers]
    assert (work.images, work.rows) == (0, 3)
    assert other.load_prefix(path) > 0
    assert other.engine.prefixes.nbytes < 1.5 * size, "it is known already, all but the new answers"


def test_the_bound_holds_for_what_is_read(saved, bundle):
    path, _, size = saved
    small = load(bundle("tiny"), prefix_cache_bytes=size // 2)
    small.load_prefix(path)
    assert 0 < small.engine.prefixes.nbytes <= size // 2


def test_an_empty_cache_is_a_file_too(bundle, tmp_path):
    model = load(bundle("tiny"))
    assert model.save_prefix(tmp_path / "none") == 0
    assert model.load_prefix(tmp_path / "none") == 0


def test_other_models_and_damage_are_told(saved, bundle, tmp_path):
    path, _, _ = saved
    for other in (
        load(bundle("tiny-untied")),
        load(bundle("tiny"), quantize=8),
        load(bundle("tiny"), dtype="bfloat16"),
        load(bundle("tiny"), vision_dtype="bfloat16"),
    ):
        with pytest.raises(InputError, match="computed by another model"):
            other.load_prefix(path)
    model = load(bundle("tiny"))
    with pytest.raises(InputError, match="there is no prefix file"):
        model.load_prefix(tmp_path / "nothing")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for wrong in (
        whole[: header + 900] + bytes([whole[header + 900] ^ 1]) + whole[header + 901 :],  # a bit of a row
        whole.replace(b"[-1", b"[00"),  # a parent
        b"",
        b"{}",
        whole[: len(whole) // 2],
        whole.replace(b"fastvlm-mlx prefix 2", b"fastvlm-mlx prefix 3"),
    ):
        assert wrong != whole
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=r"damaged|no prefix file of this version"):
            model.load_prefix(path)
    assert model.engine.prefixes.nbytes == 0
    for nowhere in (tmp_path, path / "below" / "a file"):
        with pytest.raises(InputError, match="can't be written"):
            model.save_prefix(nowhere)


def test_the_command_finds_it_at_home(monkeypatch, tmp_path, capsys):
    """A shell leaves the ~ of `--prefix=~/known` alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = []
    for _ in range(2):
        assert main(["generate", "--prompt", "Hi", "--max-tokens", "2", "--json", "--prefix=~/known"]) == 0
        cached.append(json.loads(capsys.readouterr().out)["cached_tokens"])
    assert cached[0] == 0 < cached[1]
    assert (tmp_path / "known").is_file()
    model = load()
    with pytest.raises(InputError, match="there is no prefix file"):
        model.load_prefix("~nobody-of-that-name/known")
