"""README's commands and code run as they stand, its answers are the model's, and the `make` targets exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_mlx import load
from nano import demo
from support.adapters import LAYER, factors, pair, write_adapter
from support.seeded import write_checkpoint
from support.tokenizers import with_tokenizer
from support.videos import write_video

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = (
    "".join((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "models/nano/README.md")) + TEXT
)
NETWORK = "# needs the network"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") if not block.startswith(NETWORK) for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What README's examples take for granted: photos, the demo's pictures, a video, a checkpoint and an adapter."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(demo.FOLDER, folder / demo.FOLDER.relative_to(ROOT))
    for name, shown in zip(("photo.jpg", "other.jpg"), demo.PICTURES, strict=False):
        with Image.open(demo.FOLDER / shown.file) as picture:
            picture.save(folder / name)
    (folder / "photos").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "photos" / "one.jpg")
    (folder / "questions").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "questions")
    question = {"image": "photo.jpg", "kind": "colour", "prompt": "What colour is the star?", "answer": "red"}
    (folder / "questions" / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    write_video(folder / "clip.mp4")
    with_tokenizer(write_checkpoint("tiny", folder / "bare"), folder / "ckpt")
    write_adapter(folder / "adapter", pair(LAYER, *factors(LAYER, (128, 128), 4)))
    commands = folder / "bin"
    commands.mkdir()
    paths = os.pathsep.join(str(ROOT / part) for part in ("src", "converters", "benchmarks", "models"))
    for name, module in (
        ("fastvlm", "fastvlm_mlx"),
        ("fastvlm-convert", "fastvlm_convert"),
        ("fastvlm-bench", "fastvlm_bench"),
    ):
        python = f"PYTHONPATH={shlex.quote(paths)} exec {shlex.quote(sys.executable)}"
        (commands / name).write_text(f'#!/bin/sh\n{python} -m {module} "$@"\n')
        (commands / name).chmod(0o755)
    return folder


def test_there_is_something_to_run():
    assert len(commands()) >= 8
    assert len(blocks("python")) == 3


@pytest.mark.parametrize("line", commands())
def test_commands(folder, line):
    environment = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.filterwarnings(
    "ignore:the vision encoder runs in MLX"
)  # on a Mac, at sizes that the default's package lacks
@pytest.mark.parametrize("code", blocks("python"))
def test_code(folder, code, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_answers_beside_the_pictures_are_the_models():
    cells = re.findall(r'<img src="([^"]+)"[^>]*></td>\s*<td>(.*?)</td>', TEXT, re.DOTALL)
    assert len(cells) == 2
    model = load(vision="mlx", dtype="float32", vision_dtype="float32")
    questions = {shown.file: list(shown.questions) for shown in demo.PICTURES}
    for picture, text in cells:
        lines = re.findall(r"^(.+?) <b>(.+?)</b>", text, re.MULTILINE)
        assert [question for question, _ in lines] == questions[Path(picture).name]
        for question, answer in lines:
            assert model.generate(ROOT / picture, question, max_tokens=demo.MOST_TOKENS).text == answer


def test_network_examples_parse():
    """They can't run here; their arguments are at least ones that the command knows."""
    from fastvlm_mlx.cli import make_parser

    lines = [block.splitlines()[1] for block in blocks("sh") if block.startswith(NETWORK)]
    assert lines
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "fastvlm"
        assert make_parser().parse_args(argv).model == "fastvlm-0.5b"


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", TEXTS)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
