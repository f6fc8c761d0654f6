"""`fastvlm-convert`: what a user types and sees."""

from __future__ import annotations

import pytest

from fastvlm_convert.cli import main
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle
from support.seeded import golden_prompt


def test_a_checkpoint_and_nothing_else(checkpoint, tmp_path, monkeypatch, capsys):
    """Says where it wrote; a second run says that nothing is to be done."""
    monkeypatch.chdir(tmp_path)
    assert main([str(checkpoint("tiny"))]) == 0
    out, err = capsys.readouterr()
    assert out == "wrote models/converted/tiny\n"
    assert "no tokenizer" in err
    prompt = golden_prompt("tiny", "one image")
    model = load("models/converted/tiny", vision="mlx")
    answer = model.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == prompt.greedy_ids
    assert main([str(checkpoint("tiny"))]) == 0
    assert capsys.readouterr().out == "models/converted/tiny is up to date\n"


@pytest.mark.parametrize(
    ("flags", "bits", "group"),
    [(["-q"], 4, 64), (["--q-bits", "6"], 6, 64), (["-q", "--q-bits", "8", "--q-group-size", "32"], 8, 32)],
)
def test_quantisation_flags(checkpoint, tmp_path, capsys, flags, bits, group):
    assert main([str(checkpoint("tiny")), "-o", str(tmp_path / "b"), "--no-coreml", *flags]) == 0
    width = Bundle.open(tmp_path / "b").config.quantization
    assert width
    assert (width.bits, width.group_size) == (bits, group)


def test_a_warning_about_the_head(checkpoint, tmp_path, capsys):
    import json
    import shutil

    source = shutil.copytree(checkpoint("tiny-untied"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    assert main([str(source), "-o", str(tmp_path / "b"), "--no-coreml"]) == 0
    assert "warning: " in (err := capsys.readouterr().err)
    assert "tie_word_embeddings=True" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no checkpoint folder at nowhere"),
        (["CKPT", "--q-bits", "7"], "--q-bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        (["CKPT", "--q-bits", "0"], "--q-bits must be one of 2, 3, 4, 5, 6, 8, got 0"),
        (["CKPT", "--quantize-vision"], "needs -q"),
        (["CKPT", "-o", "CKPT"], "is or holds the checkpoint itself"),
        (["CKPT", "--upload-repo", "no slash"], "is no repository name; give ORG/NAME"),
    ],
)
def test_errors_are_one_line_and_exit_2(checkpoint, capsys, argv, message):
    filled = [str(checkpoint("tiny")) if part == "CKPT" else part for part in argv]
    assert main(filled) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("fastvlm-convert: error: ")
    assert message in err


def test_a_bar_per_stage(monkeypatch):
    """What `fastvlm-convert` does with the counts: a bar for each stage, moved by its bytes."""
    import tqdm

    from fastvlm_convert.cli import ProgressBars

    made: list[tuple[str, int, list[int]]] = []

    class Bar:
        def __init__(self, total, desc, **_):
            made.append((desc, total, []))

        def update(self, done):
            made[-1][2].append(done)

        def close(self):
            pass

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with ProgressBars() as bars:
        for stage, done, total in (("checking", 1, 3), ("checking", 2, 3), ("writing", 5, 5)):
            bars(stage, done, total)
    assert made == [("checking", 3, [1, 2]), ("writing", 5, [5])]


def test_progress_bars_count_every_byte(checkpoint, tmp_path):
    from fastvlm_convert.pipeline import convert

    seen: dict[str, list[int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        assert seen.setdefault(stage, [0, total])[1] == total
        seen[stage][0] += done

    convert(checkpoint("tiny"), tmp_path / "b", progress=progress)
    assert list(seen) == ["checking", "writing", "hashing"]
    assert all(done == total for done, total in seen.values())
