"""`fastvlm-bench accuracy`: exact matches by kind of question."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastvlm_bench.accuracy import Answer, Question, Score, ask_all, format_scores, read_questions, score
from fastvlm_bench.cli import main
from fastvlm_mlx import FastVLM
from fastvlm_mlx.errors import InputError
from support.seeded import SPEAKING


@pytest.fixture
def folder(tmp_path, speaking_model):
    """Two pictures with two questions each; one of the answers is what the model says."""
    lines = []
    for name, seed in (("a.png", 1), ("b.png", 2)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name)
        for kind, prompt in (("colour", "What colour is it?"), ("count", "How many?")):
            lines.append({"image": name, "kind": kind, "prompt": prompt, "answer": "no such answer"})
    said = speaking_model.generate(tmp_path / "a.png", "How many?", max_tokens=64).text
    lines[1]["answer"] = f" {said.strip()} "  # blanks around an answer don't count
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def test_scores(folder, capsys, tmp_path, bundle):
    out = tmp_path / "out.json"
    argv = ["accuracy", str(folder), "--model", str(bundle(SPEAKING)), "--vision", "mlx", "--json", str(out)]
    assert main(argv) == 0
    text = capsys.readouterr().out.splitlines()
    assert [line.split() for line in text] == [
        ["colour", "0.0%", "0", "of", "2"],
        ["count", "50.0%", "1", "of", "2"],
        ["overall", "25.0%", "1", "of", "4"],
    ]
    data = json.loads(out.read_text())
    assert data["scores"]["overall"] == {"right": 1, "count": 4}
    assert [answer["image"] for answer in data["answers"]] == ["a.png", "a.png", "b.png", "b.png"]
    assert data["answers"][1]["said"].strip() == data["answers"][1]["answer"].strip()


def test_answers_are_those_of_generate_and_each_image_is_encoded_once(folder, speaking_model, monkeypatch):
    speaking_model.clear_cache()
    encoder, encoded = speaking_model.engine.vision.encoder, []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    questions, done = read_questions(folder), []
    answers = list(ask_all(speaking_model, questions, done.append))
    assert encoded == [1, 1]
    assert sum(done) == 4
    for answer in answers:
        right = speaking_model.generate(answer.question.image, answer.question.prompt, max_tokens=64)
        assert answer.said == right.text


def test_another_view_of_the_images(folder, default_model, tmp_path):
    """Wide ones in their own shape."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 128, 3), np.uint8)).save(folder / name)
    out = tmp_path / "out.json"
    options = ["--resolution", "128", "--aspect", "native", "--limit", "1", "--vision", "mlx"]
    assert main(["accuracy", str(folder), *options, "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    assert (data["resolution"], data["aspect"]) == (128, "native")
    right = default_model.generate(
        folder / "a.png", "What colour is it?", resolution=128, aspect="native", max_tokens=64
    )
    assert data["answers"][0]["said"] == right.text
    assert right.image_tokens == 2


def test_tiles_of_the_images(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(FastVLM, "generate", lambda *_, **options: asked.append(options) or SimpleNamespace(text=""))
    options = ["--aspect", "anyres", "--grid", "2x1", "--limit", "1", "--vision", "mlx", "--json", str(folder / "o")]
    assert main(["accuracy", str(folder), *options]) == 0
    assert (asked[0]["aspect"], asked[0]["grid"], asked[0]["resolution"]) == ("anyres", "2x1", None)
    assert json.loads((folder / "o").read_text())["grid"] == "2x1"


def test_exact_match_by_kind():
    def answer(kind, right, said):
        return Answer(Question(None, kind, "?", right), said)

    scores = score(
        [answer("b", "red", "red"), answer("a", "2", "3"), answer("b", "red", "Red"), answer("a", "2", "2 ")]
    )
    assert scores == {"b": Score(1, 2), "a": Score(1, 2), "overall": Score(2, 4)}
    assert format_scores(scores).splitlines()[-1] == "overall   50.0%  2 of 4"


@pytest.mark.parametrize(("right", "said"), [("red", "red circle"), ("2", "20"), ("circle", "red circle"), ("20", "2")])
def test_a_part_of_an_answer_is_wrong_and_so_is_more_than_it(right, said):
    assert not Answer(Question(None, "a", "?", right), said).right


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't read .*questions.jsonl"),
        ("\n", "has no question"),
        ("{", r"questions.jsonl:1: expected an object with image, kind, prompt, answer, found '{'"),
        ('{"image": "a.png"}', "questions.jsonl:1: expected an object"),
        ('{"image": "a.png", "kind": "k", "prompt": "p", "answer": 2}', "must be texts"),
        ('{"image": "a.png", "kind": "k", "prompt": "p", "answer": "2"}', "there is no image"),
    ],
)
def test_bad_questions(tmp_path, text, message):
    if text is not None:
        (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path)


def test_a_bad_limit(folder, capsys):
    assert main(["accuracy", str(folder), "--limit", "0"]) == 2
    assert "--limit must be 1 or more, got 0" in capsys.readouterr().err
