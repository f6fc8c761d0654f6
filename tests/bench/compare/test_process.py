"""A side's process from outside: what it is started with, what it replies, what is told of its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_bench.compare import process
from fastvlm_bench.compare.process import SideError, Worker, environment, last_line, openblas, start, versions
from fastvlm_bench.compare.rivals import OURS
from fastvlm_bench.workers import bootstrap
from fastvlm_bench.workers.our_side import OurSide
from fastvlm_bench.workers.serve import Setup, _answer
from support.fake_side import POSITIONS, right_ids, write_interpreter, write_model
from support.work import counted

REQUEST = {"image": "a.jpg", "questions": ["What?", "Why?"], "tokens": [4, 2], "resolution": 256}


@pytest.fixture
def fake(tmp_path):
    """Start a fake side."""
    workers = []

    def make(**behaviour) -> Worker:
        model = write_model(tmp_path / "model", **behaviour)
        workers.append(start("mlx-vlm", write_interpreter(tmp_path), model, "float32", 3))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_requests_and_replies(fake):
    worker = fake(ttft_s=[0.5, 0.25], second_ttft_s=[0.125])
    assert worker.facts == {"device": "a fake", "threads": 3}
    first, again = worker.request(REQUEST), worker.request(REQUEST)
    assert [answer["ids"] for answer in first["answers"]] == [right_ids(REQUEST, 0), right_ids(REQUEST, 1)]
    assert [answer["ttft_s"] for answer in first["answers"]] == [0.5, 0.125]
    assert again["answers"][0]["ttft_s"] == 0.25
    assert first["answers"][0]["positions"] == POSITIONS


@pytest.mark.parametrize("requests_before", [0, 2])
def test_the_last_words_of_one_that_dies(fake, requests_before):
    worker = fake(dies_at=requests_before)
    for _ in range(requests_before):
        worker.request(REQUEST)
    with pytest.raises(SideError, match=r"^mlx-vlm ended with exit code 1: MemoryError: all gone$"):
        worker.request(REQUEST)


def test_one_that_has_died_already(fake):
    worker = fake(dies_at=0)
    for _ in range(2):  # the second time nobody reads the request
        with pytest.raises(SideError, match="MemoryError: all gone"):
            worker.request(REQUEST)


def test_one_that_does_not_start(fake):
    with pytest.raises(SideError, match="ended with exit code 1: ImportError: no such library"):
        fake(dies_at="start")


@pytest.mark.parametrize(("text", "last"), [("a\nb\n\n  \n", "b"), ("", "it said nothing")])
def test_last_line(text, last):
    assert last_line(text) == last


def test_versions(tmp_path):
    assert versions("mlx-lm", write_interpreter(tmp_path)) == {
        "python": "3.0",
        "mlx-lm": "1.2",
        "mlx": "1.2",
        "transformers": "1.2",
    }


def test_a_package_that_is_missing(monkeypatch):
    library = process.LIBRARIES["mlx-lm"]
    missing = type(library)(library.module, library.kind, ("no-such-package",), library.does)
    monkeypatch.setitem(process.LIBRARIES, "mlx-lm", missing)
    with pytest.raises(SideError, match=r"mlx-lm's environment isn't complete: .*no-such-package"):
        versions("mlx-lm", sys.executable)


def test_all_have_as_many_threads_and_rivals_none_of_our_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    ours, rival = environment(OURS, 3), environment("mlx-vlm", 3)
    assert ours.pop("PYTHONPATH") == "/ours"
    assert ours == rival
    assert {ours[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}


@pytest.mark.parametrize(
    ("platform", "value", "found"),
    [
        ("linux", None, "libopenblas.so.0"),
        ("linux", "/opt/libblas.so", "/opt/libblas.so"),
        ("linux", "0", None),
        ("darwin", None, None),
    ],
)
def test_the_rivals_get_our_openblas(monkeypatch, platform, value, found):
    monkeypatch.setattr(process.sys, "platform", platform)
    monkeypatch.delenv("FASTVLM_OPENBLAS", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTVLM_OPENBLAS", value)
    assert openblas() == found


def test_our_side_answers_as_the_library_does(tmp_path):
    """The real process, with the embedded model."""
    import fastvlm_zoo
    from fastvlm_bench.photo import sample_photo
    from fastvlm_mlx import load

    picture = tmp_path / "a.jpg"
    picture.write_bytes(sample_photo(1, (96, 96)))
    folder = fastvlm_zoo.default().path
    worker = start(OURS, sys.executable, folder, "float32", 1)
    try:
        reply = worker.request(REQUEST | {"image": str(picture), "resolution": 128})
        text = worker.request({"ids": [5, 6, 7], "tokens": [3]})
    finally:
        worker.close()
    ours = load(folder, vision="mlx")
    for question, tokens, answer in zip(REQUEST["questions"], REQUEST["tokens"], reply["answers"], strict=True):
        right = ours.generate(picture, question, resolution=128, max_tokens=tokens, ignore_eos=True)
        assert answer["ids"] == list(right.token_ids)
        assert answer["positions"] == right.prompt_tokens
        assert answer["ttft_s"] > 0
        assert answer["decode_s"] > 0
    right = ours.generate(None, [5, 6, 7], max_tokens=3, ignore_eos=True)
    assert text["answers"][0]["ids"] == list(right.token_ids)
    assert reply["peak_rss_bytes"] > 2**24
    assert worker.facts["device"] == ours.device


SIDE = """
import os, sys
sys.path[:0] = {path!r}
from fastvlm_bench.workers.serve import Side, serve
class Noisy(Side):
    def __init__(self, setup):
        print("loading", setup.model)
    def ask(self, image, question, resolution, tokens, emit):
        print("asked", question)
        os.system("echo from a child")
        for token in range(tokens - {missing}):
            emit(token)
        return 7
serve(Noisy)
"""


@pytest.mark.parametrize("missing", [0, 1])
def test_what_a_library_prints_is_no_reply(missing):
    code = SIDE.format(path=sys.path, missing=missing)
    setup = json.dumps({"model": "m", "dtype": "float32", "threads": 1})
    command = [sys.executable, "-c", code, setup]
    done = subprocess.run(command, input=json.dumps(REQUEST), capture_output=True, text=True, check=False)
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies[0] == {}
    assert "loading m" in done.stderr
    if missing:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "RuntimeError: asked for 4 tokens, got 3"
        return
    assert [answer["ids"] for answer in replies[1]["answers"]] == [[0, 1, 2, 3], [0, 1]]
    assert all(answer["ttft_s"] > 0 and answer["positions"] == 7 for answer in replies[1]["answers"])


def test_a_side_needs_no_package_of_ours_but_its_own(tmp_path):
    """Without site-packages: the bootstrap alone makes the side importable, and nothing else."""
    command = [sys.executable, "-P", "-S", bootstrap.__file__, "torchvision_operators"]
    assert subprocess.run(command, cwd=tmp_path, env={}, check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-P", "-S", bootstrap.__file__, "mlx_lm_side", '{"model": "", "dtype": "", "threads": 1}'],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'mlx_lm'"
    assert Path(bootstrap.__file__).parent.name == "workers"


def test_nothing_is_known_before_a_first_question(bundle, tmp_path):
    """Ours may use for the second question what the first left, and nothing else."""
    picture = tmp_path / "photo.png"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(picture)
    side = OurSide(Setup(str(bundle("tiny")), "float32", 1))
    seen = []

    def ask(image, question, resolution, tokens, emit):
        with counted(side.model) as work:
            for piece in side.model.stream(image, question, resolution=resolution, max_tokens=tokens, ignore_eos=True):
                emit(piece.token_id) if piece.token_id is not None else None
        seen.append((work.images, work.rows))
        return work.rows

    side.ask = ask
    request = {"image": str(picture), "questions": [[1, -200, 2], [1, -200, 3]], "resolution": 128, "tokens": [3, 2]}
    for _ in range(2):
        for index in range(2):
            _answer(side, request, index)
    assert seen == [(1, 6), (0, 1)] * 2
