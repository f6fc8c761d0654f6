"""The table of the model's card: a row for each width and encoder, a column for each kind of question."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="the dev extra isn't installed: it has the fonts")

import fastvlm_zoo
from fastvlm_bench.accuracy import Score
from fastvlm_mlx.bundle import Bundle
from nano import table


def test_a_row_for_each_width(tmp_path, capsys):
    default = fastvlm_zoo.default().path
    assert table.main([str(default), "--count", "1", "--markdown", str(tmp_path / "t.md")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text() == text
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.startswith("| | overall | ")
    names = [row.split("|")[1].split()[0] for row in rows]
    assert names[:5] == ["float32", "bfloat16", "8", "6", "4"]
    assert all(row.count("|") == head.count("|") for row in rows)
    assert "Questions: overall " in text


def test_the_rows_are_what_they_say(converted_default):
    import mlx.core as mx

    seen = {}
    for name, model in table.models(converted_default):
        layer = model.decoder.network.model.layers[0].mlp.up_proj
        seen[name] = (layer.weight.dtype, len(set(layer.weight.reshape(-1).tolist())), model.device.split(",")[0])
    kinds = list(seen.values())
    assert [kind[0] for kind in kinds] == [mx.float32, mx.bfloat16, *[mx.float32] * 4]
    levels = [kind[1] for kind in kinds[2:5]]
    assert levels == sorted(levels, reverse=True)  # fewer bits, fewer values
    assert levels[-1] < levels[0]
    assert [kind[2].startswith("vision: Core ML") for kind in kinds] == [False] * 5 + [True]


@pytest.fixture
def converted_default(tmp_path, checkpoint):
    """The default's shapes with a Core ML package beside them."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    pytest.importorskip("coremltools", reason="the convert extra isn't installed")
    from fastvlm_convert.coreml_vision import PackageOptions, Size
    from fastvlm_convert.options import Options
    from fastvlm_convert.pipeline import convert

    package = PackageOptions(sizes=(Size(128, 128),))
    return Bundle.open(convert(checkpoint("tiny"), tmp_path / "b", Options(package=package)).path)


def test_shares_and_counts():
    scores = {"colour": Score(1, 4), "reading": Score(2, 2), "overall": Score(3, 6)}
    assert table.markdown([("a", scores)]).splitlines() == [
        "| | overall | colour | reading |",
        "|---|---|---|---|",
        "| a | 50.0% | 25.0% | 100.0% |",
        "",
        "Questions: overall 6, colour 4, reading 2.",
    ]
