"""The table of the model's card: a row for each width and encoder, a column for each kind of question."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the dev extra isn't installed: it has the fonts")

import fastvlm_zoo
from fastvlm_bench.accuracy import Answer, Score
from fastvlm_mlx.bundle import DECODER, MANIFEST, Bundle, read_tensors
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import sha256
from nano import table
from nano.scenes import KINDS, write_scenes
from support.plans import planned

CARD = Path(__file__).resolve().parents[2] / "models" / "nano" / "README.md"
WATCHED = 192  # held-out scenes that training's curve is measured on, from 0 on


def test_a_row_for_each_width(tmp_path, capsys):
    default, card = fastvlm_zoo.default().path, tmp_path / "card.md"
    card.write_text(f"# Before\n\n{table.BEGIN}\nof old{table.END}\n\nAfter\n")
    assert table.main([str(default), "--count", "1", "--card", str(card)]) == 0
    text = capsys.readouterr().out
    assert card.read_text() == f"# Before\n\n{table.BEGIN}\n\n{text}\n{table.END}\n\nAfter\n"
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head.startswith("| | overall | ")
    names = [row.split("|")[1].strip() for row in rows]
    assert [name.split()[0] for name in names[:6]] == ["float32", "bfloat16", "float16", "8", "6", "4"]
    assert [name.rpartition(" (")[0] for name in names[-2:]] == [table.KNOWN, table.NEW]
    assert all(row.count("|") == head.count("|") for row in rows)
    assert "Questions: overall " in text
    *_, pictures, bundle = text.splitlines()
    assert pictures == "Pictures: 1 of the held-out split, from seed 1000 on, drawn with 320 px."
    assert bundle == f"Bundle: manifest.json with SHA-256 {sha256(default / MANIFEST)}."


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int, int]]:
    """What the pictures are that the command asks for; a model that says nothing answers."""
    found = []

    def write(folder: Path, split: str, count: int, seed: int) -> int:
        found.append((split, count, seed))
        return write_scenes(folder, split, count, seed, side=32)

    monkeypatch.setattr(table, "write_scenes", write)
    monkeypatch.setattr(table, "rows_of", lambda _: {"a": lambda: None, "b": lambda: None})
    monkeypatch.setattr(table, "ask_all", lambda _, questions, progress: [Answer(q, "") for q in questions])
    return found


@pytest.mark.parametrize(("options", "seed"), [([], table.SEED), (["--seed", "2000"], 2000)])
def test_the_pictures_are_held_out_ones_that_no_training_watched(asked, capsys, options, seed):
    assert table.main([str(fastvlm_zoo.default().path), "--count", "3", *options]) == 0
    assert asked == [("held-out", 3, seed)]
    assert f"Pictures: 3 of the held-out split, from seed {seed} on, drawn with 320 px." in capsys.readouterr().out
    assert table.SEED >= WATCHED


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--count", "0"], "--count must be 1 or more, got 0"), (["--seed", "-4"], "--seed must be 0 or more, got -4")],
)
def test_numbers_out_of_range(asked, capsys, options, message):
    assert table.main([str(fastvlm_zoo.default().path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not asked


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
    for name in (*table.DECODERS, table.KNOWN, table.NEW):
        assert f"\n| {name} " in inside
    assert "decoder, Core ML package (" in inside
    measured = [line.split("|")[2:-1] for line in inside.splitlines() if re.match(r"\| (\w|of the)", line)]
    assert len(measured) == len(table.DECODERS) + 3
    for cells in measured:
        assert len(cells) == 1 + len(KINDS)
        assert all(re.fullmatch(r" \d+\.\d% ", cell) for cell in cells), cells


def test_the_cards_table_is_of_scenes_that_no_training_watched():
    (seed,) = re.findall(
        r"^Pictures: 1000 of the held-out split, from seed (\d+) on, drawn", CARD.read_text("utf-8"), re.M
    )
    assert int(seed) >= WATCHED


def test_the_cards_table_is_of_the_weights_that_are_embedded():
    found = re.findall(r"^Bundle: manifest\.json with SHA-256 ([0-9a-f]{64})\.$", CARD.read_text("utf-8"), re.M)
    assert found == [sha256(fastvlm_zoo.default().path / MANIFEST)], "measure the table again: make nano-card"


def test_the_rows_are_what_they_say(converted_default):
    import mlx.core as mx

    seen = {}
    for name, load in table.rows_of(converted_default).items():
        model = load()
        seen[name] = model.decoder.network.model.layers[0].mlp.up_proj.weight, model.device.split(",")[0]
    weights = [weight for weight, _ in seen.values()]
    assert [weight.dtype for weight in weights] == [mx.float32, mx.bfloat16, mx.float16, *[mx.float32] * 4]
    stored = read_tensors(converted_default.path / DECODER)["model.layers.0.mlp.up_proj.weight"]
    for name, weight in zip(seen, weights, strict=True):
        if " bit " in name:  # unpacked, as on every CPU, to the values that so many bits have
            bits = int(name.split()[0])
            packed, scales, biases = mx.quantize(stored, bits=bits)
            ends = scales.astype(mx.float32), biases.astype(mx.float32)
            assert mx.array_equal(weight, mx.dequantize(packed, *ends, bits=bits)), name
    assert mx.array_equal(weights[0], stored.astype(mx.float32))
    assert [device.startswith("vision: Core ML") for _, device in seen.values()] == [False] * 6 + [True]


def test_the_encoder_of_every_row_is_float32_on_a_gpu_too(monkeypatch):
    given: list[dict[str, object]] = []
    monkeypatch.setattr(table, "assemble", lambda _, **options: given.append(options))
    for load in table.rows_of(Bundle.open(fastvlm_zoo.default().path)).values():
        load()
    assert [options["vision"] for options in given] == ["mlx"] * 6 + ["coreml"]
    assert [options.get("vision_dtype") for options in given[:6]] == ["float32"] * 6
    assert [options.get("quantize") for options in given] == [None, None, None, 8, 6, 4, None]


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


def test_a_part_without_a_kind_has_a_dash():
    rows = [("a", {"colour": Score(1, 4), "overall": Score(1, 4)}), ("b", {"overall": Score(0, 0)})]
    assert table.markdown(rows).splitlines()[2:4] == ["| a | 25.0% | 25.0% |", "| b | - | - |"]


def test_what_is_new_is_told_apart_by_the_seeds_of_the_pictures(tmp_path):
    """Every answer about a scene with something new right, all others wrong."""
    first, count = 40, 30
    answers = []
    for question in table.questions_in(tmp_path / "pictures", count, first):
        plan, _ = planned(first + int(question.image.stem), "held-out")
        answers.append(Answer(question, question.answer if plan.novelties else ""))
    (known, old), (news, new) = table.by_novelty(answers[::-1], first)
    assert old["overall"].count > 20
    assert (old["overall"].share, new["overall"].share) == (0, 1)
    assert old["overall"].count + new["overall"].count == len(answers)
    assert known == f"{table.KNOWN} ({old['overall'].count} questions)"
    assert news == f"{table.NEW} ({new['overall'].count} questions)"


def test_pictures_of_other_seeds_are_not_taken_for_these(tmp_path):
    answers = [Answer(question, "") for question in table.questions_in(tmp_path / "pictures", 2, 7)]
    with pytest.raises(InputError, match=r"0000\.png isn't held-out scene 8; give the seed of the first picture"):
        table.by_novelty(answers, 8)
