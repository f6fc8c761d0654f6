"""`fastvlm-bench batch`: the same answers both ways, in turn, each from scratch."""

from __future__ import annotations

import json
import re

import pytest

from fastvlm_bench.batching import Round, format_rounds, measure
from fastvlm_bench.cli import main
from fastvlm_mlx import load
from fastvlm_mlx.errors import FastVLMError
from support.work import counted


@pytest.fixture(scope="module")
def forgetful_tiny(bundle):
    return load(bundle("tiny"), resolution=128, prefix_cache_bytes=0, feature_cache_bytes=0)


def test_both_ways_do_the_whole_work(forgetful_tiny):
    calls = []
    with counted(forgetful_tiny) as work:
        rounds = measure(forgetful_tiny, 3, 5, 2, lambda: calls.append(work.images))
    assert calls == [3, 6, 9, 12, 15, 18], "three rounds, two ways, three pictures each, nothing kept"
    assert [r.tokens for r in rounds] == [15, 15]
    for r in rounds:
        assert 0 < r.alone_decode_s < r.alone_s
        assert 0 < r.together_decode_s < r.together_s


def test_ratios():
    text = format_rounds([Round(8.0, 4.0, 6.0, 2.0, 80), Round(10.0, 4.0, 6.0, 1.5, 80), Round(6, 6, 3, 3, 80)], 8)
    assert text.splitlines()[0] == "8 questions, 10 tokens each; tokens per second"
    assert re.findall(r"[\d.]+", text.splitlines()[1]) == ["10.0", "20.0", "2.00", "1.00", "2.50"]
    assert re.findall(r"[\d.]+", text.splitlines()[2]) == ["13.3", "40.0", "3.00", "1.00", "4.00"]


def test_other_answers_have_no_times(forgetful_tiny, monkeypatch):
    original = type(forgetful_tiny).batch
    monkeypatch.setattr(type(forgetful_tiny), "batch", lambda *args, **options: original(*args, **options)[::-1])
    with pytest.raises(FastVLMError, match="differ from those one by one"):
        measure(forgetful_tiny, 2, 4, 1)


def test_the_command(bundle, tmp_path, capsys):
    argv = ["batch", "--model", str(bundle("tiny")), "--resolution", "64", "--batch-size", "2", "--max-tokens", "4"]
    assert main([*argv, "--runs", "1", "--json", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out.startswith("2 questions, 4 tokens each")
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["batch_size"], len(data["rounds"])) == (2, 1)
    assert main([*argv, "--runs", "0"]) == 2
    assert "--runs must be at least 1, got 0" in capsys.readouterr().err
