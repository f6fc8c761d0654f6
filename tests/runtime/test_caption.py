"""`fastvlm caption`: every image once, whatever happens in between."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_mlx import load, loading
from fastvlm_mlx.caption import Job, answer_images
from fastvlm_mlx.cli import main
from fastvlm_mlx.cli_caption import beginning_bytes
from fastvlm_mlx.errors import ContextLengthError
from fastvlm_mlx.prompt import count
from fastvlm_mlx.types import GenerationOptions
from support.captions import OPTIONS, damaged_avif, entries, write_images
from support.work import counted

LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 6)


def test_answers_are_those_of_generate(folder, tmp_path, default_model, capsys):
    (folder / "below").mkdir()
    shutil.copy(folder / "000.png", folder / "below" / "again.PNG")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    out = tmp_path / "out" / "answers.jsonl"
    assert main(["caption", str(folder), "--prompt", "What is it?", "-o", str(out), "--batch-size", "3", *OPTIONS]) == 0
    found = entries(out)
    assert sorted(found) == [*(f"00{n}.png" for n in range(6)), "below/again.PNG"]
    for name, text in found.items():
        right = default_model.generate(folder / name, "What is it?", max_tokens=4, resolution=64)
        assert text == right.text
    line = json.loads(out.read_text().splitlines()[0])
    assert (line["prompt"], line["resolution"], line["max_tokens"]) == ("What is it?", 64, 4)
    assert line["finish_reason"] in ("stop", "length")
    assert "7 images answered, 0 were before" in capsys.readouterr().out


def test_unreadable_images_are_told_and_skipped(folder, tmp_path, capsys):
    (folder / "002.png").write_bytes(b"no picture")
    (folder / "004.png").write_bytes((folder / "004.png").read_bytes()[:100])
    out = tmp_path / "answers.jsonl"
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 1
    said = capsys.readouterr().err
    assert sorted(entries(out)) == [f"00{n}.png" for n in (0, 1, 3, 5)]
    assert "002.png is skipped" in said
    assert "004.png is skipped" in said
    assert "2 of 6 images are left out" in said
    Image.new("RGB", (9, 9)).save(folder / "002.png")
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 1
    assert "1 images answered, 4 were before" in capsys.readouterr().out


def test_a_picture_that_fills_the_context_is_skipped(folder, default_model):
    """With native shapes the picture decides how many positions it takes; the others are answered all the same."""
    text, _ = count(default_model.positions("Hi", [0], None))
    small = copy.copy(default_model)
    small.config = dataclasses.replace(default_model.config, context_length=text + 10)
    sizes = {"000.png": (64, 16), "001.png": (64, 64), "002.png": (16, 64)}  # 4, 16 and 4 positions at 256 px
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(folder / name)
    told = {}
    job = Job("Hi", "", "", resolution=256, aspect="native", options=GenerationOptions(max_tokens=2, ignore_eos=True))
    found = dict(answer_images(small, folder, list(sizes), job, lambda name, error: told.update({name: str(error)}), 2))
    assert sorted(found) == ["000.png", "002.png"]
    assert list(told) == ["001.png"]
    assert f"the prompt has {text + 16} positions (16 of them image tokens), the model's context" in told["001.png"]
    long = dataclasses.replace(job, prompt="Hi " * 30)
    with pytest.raises(ContextLengthError, match="1 of them image tokens"):
        next(answer_images(small, folder, list(sizes), long, lambda *_: pytest.fail("one image after another")))


def test_a_picture_whose_decoder_breaks_is_skipped(folder, tmp_path, capsys):
    """AVIF's decoder raises RuntimeError on damaged data."""
    (folder / "001.avif").write_bytes(damaged_avif())
    out = tmp_path / "answers.jsonl"
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 1
    assert "001.avif is skipped: " in capsys.readouterr().err
    assert len(entries(out)) == 6


def test_a_name_that_is_not_utf8_is_answered_and_resumed(folder, tmp_path, capsys):
    name = os.fsdecode(b"b\xff.png")
    try:
        shutil.copy(folder / "000.png", folder / name)
    except OSError:
        pytest.skip("this file system has no such names")
    out = tmp_path / "answers.jsonl"
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 0
    assert name in entries(out)
    out.read_bytes().decode()
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 0
    assert "0 images answered, 7 were before" in capsys.readouterr().out


def test_each_image_computes_its_own_positions_and_leaves_nothing(folder, tmp_path, monkeypatch):
    """The beginning is computed once; neither rows nor features of an image stay, nor are they copied."""
    loaded, works = [], []
    with ExitStack() as stack:

        def watched(*args, **kwargs):
            loaded.append(load(*args, **kwargs))
            works.append(stack.enter_context(counted(loaded[-1])))
            return loaded[-1]

        monkeypatch.setattr(loading, "load", watched)
        arguments = ["--resolution", "768", "--max-tokens", "2", "--batch-size", "2"]
        assert main(["caption", str(folder), "-o", str(tmp_path / "answers.jsonl"), *arguments]) == 0
    (model,), (work,) = loaded, works
    spans = model.positions("Describe the image.", [144], None)
    beginning, total = len(spans[0]), sum(map(len, spans))
    assert work.images == 6
    assert work.passes == [total] + [total - beginning] * 5
    assert [len(node.keys) for node in model.engine.prefixes.nodes()] == [beginning]
    assert model.engine.vision.cache.nbytes == 0


@pytest.mark.parametrize("prompt", ["What is it?", "Here is a long question, and then what it is about: <image>"])
@pytest.mark.parametrize("system", [None, "", "Be brief. " * 40])
def test_the_beginning_fits_whatever_the_texts_are(default_model, prompt, system):
    job, decoder = Job(prompt, "default", "", system=system), default_model.config.decoder
    beginning = len(default_model.positions(prompt, [1], system)[0])
    row = decoder.num_hidden_layers * 2 * decoder.num_key_value_heads * 4
    row *= decoder.hidden_size // decoder.num_attention_heads
    assert beginning * (row + 24) <= beginning_bytes(decoder, job) < 700 * (row + 24)


def test_bad_input(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = ["-o", str(tmp_path / "a.jsonl")]
    for arguments, message in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path / "empty")], "has no image"),
        ([str(folder), "--batch-size", "0"], "--batch-size must be at least 1"),
        ([str(folder), "--quantize", "7"], "--quantize must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ([str(folder), "--max-tokens", "0"], "max_tokens must be at least 1"),
        ([str(folder), "--resolution", "100"], "multiple of 64"),
    ):
        assert main(["caption", *arguments, *out]) == 2
        assert message in capsys.readouterr().err


def command(folder: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "fastvlm_mlx", "caption", str(folder), "-o", str(out), *OPTIONS]


def test_killed_three_times_and_still_every_image_once(tmp_path):
    """200 images, SIGKILL at random moments; the answers are those of a run that nobody killed."""
    folder, out, dice = write_images(tmp_path / "images", 200), tmp_path / "killed.jsonl", random.Random(0)
    kills, left = 0, []
    while kills < 3:
        before = out.read_bytes().count(b"\n") if out.exists() else 0
        process = subprocess.Popen(command(folder, out), stderr=subprocess.PIPE)
        more = dice.randrange(5, 50)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < before + more):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was killed in the middle"
        kills += 1
        left.append(out.read_bytes().count(b"\n"))
    assert left == sorted(left)
    assert left[-1] < 200
    assert subprocess.run(command(folder, out), check=False, capture_output=True).returncode == 0
    whole = tmp_path / "whole.jsonl"
    assert subprocess.run(command(folder, whole), check=False, capture_output=True).returncode == 0
    assert len(entries(whole)) == 200
    assert entries(out) == entries(whole)


@pytest.mark.skipif(LAUNCH is None, reason="mlx.launch isn't beside this Python")
def test_two_processes_share_the_images(folder, tmp_path):
    out, alone = tmp_path / "two.jsonl", tmp_path / "one.jsonl"
    env = {**os.environ, "FASTVLM_OPENBLAS": "0"}
    port = str(random.randrange(20_000, 50_000))
    launch = [LAUNCH, "-n", "2", "--starting-port", port, "--python", sys.executable, "--"]
    done = subprocess.run(
        [*launch, *command(folder, out)[1:]], check=False, capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 images answered") + done.stdout.count("3 images answered") == 2
    assert subprocess.run(command(folder, alone), check=False, capture_output=True, env=env).returncode == 0
    assert entries(out) == entries(alone)
    assert not list(tmp_path.glob("*.rank*"))
