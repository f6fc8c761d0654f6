"""`fastvlm caption`: every image once, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import load
from fastvlm_mlx.caption import AnswerFile, Job, answer_images, find_images, merge_parts, part_of
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.types import GenerationOptions

OPTIONS = ["--resolution", "64", "--max-tokens", "4"]
LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:03}.png")
    return folder


def entries(path: Path) -> dict[str, str]:
    """Answers by image; each image once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["image"] for line in lines}) == len(lines)
    return {line["image"]: line["text"] for line in lines}


@pytest.fixture(scope="module")
def default_model():
    """What the command uses where none is named."""
    return load(vision="mlx")


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
    assert "2 of 6 images can't be read" in said
    Image.new("RGB", (9, 9)).save(folder / "002.png")
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 1
    assert "1 images answered, 4 were before" in capsys.readouterr().out


def test_a_half_written_line_is_done_again_and_nothing_else(folder, tmp_path, default_model):
    out, job = (
        tmp_path / "answers.jsonl",
        Job("What?", "default", resolution=64, options=GenerationOptions(max_tokens=3)),
    )
    answers = AnswerFile(out, job)
    for name, answer in answer_images(default_model, folder, find_images(folder)[:3], job, print):
        answers.add(name, answer)
    answers.close()
    whole = out.read_bytes()
    out.write_bytes(whole[:-7])
    again = AnswerFile(out, job)
    assert len(again.done) == 2
    assert out.read_bytes() == whole[: whole.rstrip(b"\n").rfind(b"\n") + 1]
    with pytest.raises(InputError, match="another process writes"):
        AnswerFile(out, job)
    again.close()


def test_files_about_something_else_are_left_alone(folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 0
    before = out.read_bytes() + b'{"half'
    out.write_bytes(before)
    assert main(["caption", str(folder), "-o", str(out), "--prompt", "Other?", *OPTIONS]) == 2
    assert out.read_bytes() == before
    for text in ("a diary\n", '["list"]\n', '{"no": "image"}\n'):
        out.write_text(text)
        assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 2
        assert out.read_text() == text


def test_bad_input(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = ["-o", str(tmp_path / "a.jsonl")]
    for arguments, message in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path / "empty")], "has no image"),
        ([str(folder), "--batch-size", "0"], "--batch-size must be at least 1"),
        ([str(folder), "--max-tokens", "0"], "max_tokens must be at least 1"),
        ([str(folder), "--resolution", "100"], "multiple of 64"),
    ):
        assert main(["caption", *arguments, *out]) == 2
        assert message in capsys.readouterr().err


def test_shares_of_several_processes_come_together(tmp_path):
    job, out = Job("What?", "default"), tmp_path / "answers.jsonl"
    for path, names in ((out, "ab"), (part_of(out, 0), "bc"), (part_of(out, 1), "d")):
        answers = AnswerFile(path, job)
        for name in names:
            answers.add(name, {"text": name.upper()})
        answers.close()
    merge_parts(out, job)
    assert entries(out) == {name: name.upper() for name in "abcd"}
    assert list(tmp_path.iterdir()) == [out]


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
        [*launch, *command(folder, out)[1:]], check=False, capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 images answered") + done.stdout.count("3 images answered") == 2
    assert subprocess.run(command(folder, alone), check=False, capture_output=True, env=env).returncode == 0
    assert entries(out) == entries(alone)
    assert not list(tmp_path.glob("*.rank*"))
