"""The table of the model's card: a row for each width and encoder, a column for each kind of question."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the dev extra isn't installed: it has the fonts")

import fastvlm_zoo
from fastvlm_bench.accuracy import Score
from fastvlm_mlx.bundle import Bundle
from nano import table

CARD = Path(__file__).resolve().parents[2] / "models" / "nano" / "README.md"


def test_a_row_for_each_width(tmp_path, capsys):
    default, card = fastvlm_zoo.default().path, tmp_path / "card.md"
    card.write_text(f"# Before\n\n{table.BEGIN}\nof old{table.END}\n\nAfter\n")
    assert table.main([str(default), "--count", "1", "--card", str(card)]) == 0
    text = capsys.readouterr().out
    assert card.read_text() == f"# Before\n\n{table.BEGIN}\n\n{text}\n{table.END}\n\nAfter\n"
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.startswith("| | overall | ")
    names = [row.split("|")[1].split()[0] for row in rows]
    assert names[:5] == ["float32", "bfloat16", "8", "6", "4"]
    assert all(row.count("|") == head.count("|") for row in rows)
    assert "Questions: overall " in text
    assert text.endswith("Pictures: 1 of the held-out split, from seed 0 on.\n")


@pytest.mark.parametrize("text", [None, "", table.BEGIN, table.END + table.BEGIN, 2 * (table.BEGIN + table.END)])
def test_a_card_without_its_marks_is_found_before_anything_is_asked(tmp_path, capsys, monkeypatch, text):
    card = tmp_path / "card.md"
    if text is not None:
        card.write_text(text)
    monkeypatch.setattr(table, "write_scenes", lambda *_: pytest.fail("pictures were made"))
    assert table.main(["bundle", "--card", str(card)]) == 2
    assert str(card) in capsys.readouterr().err
    assert not card.exists() if text is None else card.read_text() == text


def test_the_cards_table_has_every_row():
    """The whole card stays as it is, but for the table."""
    text = CARD.read_text(encoding="utf-8")
    inside = text.partition(table.BEGIN)[2].partition(table.END)[0]
    assert table.put(CARD, inside.strip("\n") + "\n") == text
    for name in (*table.DECODERS, "Core ML package"):
        assert name in inside


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
