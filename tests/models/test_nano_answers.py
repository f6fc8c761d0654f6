"""What the embedded default knows: sixty fixed questions about pictures that training never showed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the dev extra isn't installed: it has the fonts")

from fastvlm_bench.accuracy import Answer, Question, ask_all
from fastvlm_mlx import load
from nano.scenes import KINDS, make_scene

# Held-out scene -> its questions. The card's table uses scenes 1000 to 1999, and a training's curve those below 192.
QUESTIONS = {
    7000: (0, 1, 2),
    7001: (0, 1, 3),
    7002: (0, 2, 3),
    7003: (0, 1, 2),
    7004: (0, 1, 6),
    7005: (0, 1, 3),
    7006: (1, 2, 3),
    7007: (0, 1, 2),
    7008: (0, 1, 4),
    7009: (0, 1, 4),
    7010: (1, 3, 4),
    7011: (0, 2, 3),
    7012: (0, 1, 2),
    7013: (0, 1, 5),
    7014: (1, 2, 4),
    7017: (1, 2),
    7025: (1,),
    7029: (1,),
    7030: (1,),
    7031: (0,),
    7032: (2, 3),
    7033: (0,),
    7034: (1,),
    7035: (2,),
    7037: (0,),
    7038: (4,),
    7048: (0,),
    7051: (1,),
}
# Below what the weights that are embedded reach, by as much as other fonts and sums in another order may cost.
RIGHT = 56  # of 58
AGREED = {8: 58, 4: 56}  # of 60 that stay the same with a decoder of so many bits; 60 and 58 do
CHECKED = 18  # questions to the Core ML package, about six pictures
CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "nano" / "checkpoint"


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[Question]:
    folder = tmp_path_factory.mktemp("held-out")
    found = []
    for seed, indices in QUESTIONS.items():
        scene, image = make_scene(seed, "held-out"), folder / f"{seed}.png"
        Image.fromarray(scene.image).save(image)
        asked = [scene.questions[index] for index in indices]
        found += [Question(image, question.kind, question.prompt, question.answer) for question in asked]
    return found


def answers_of(questions: list[Question], quantize: int | None = None) -> list[Answer]:
    model = load(vision="mlx", dtype="float32", vision_dtype="float32", quantize=quantize)
    return list(ask_all(model, questions))


@pytest.fixture(scope="module")
def answers(questions: list[Question]) -> list[Answer]:
    return answers_of(questions)


def test_there_are_sixty_of_every_kind(questions):
    counts = Counter(question.kind for question in questions)
    assert counts.total() == 60
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 6


def test_the_default_answers(answers):
    wrong = [f"{a.question.prompt} {a.said!r}, not {a.question.answer!r}" for a in answers if not a.right]
    assert len(answers) - len(wrong) >= RIGHT, "\n".join(wrong)


@pytest.mark.parametrize("bits", AGREED)
def test_fewer_bits_hardly_change_an_answer(questions, answers, bits):
    narrow = answers_of(questions, quantize=bits)
    assert sum(a.said == b.said for a, b in zip(answers, narrow, strict=True)) >= AGREED[bits]


def test_the_core_ml_package_hardly_changes_an_answer(questions, answers):
    """Op by op with each result rounded to float16; on the first pictures, as that takes its time."""
    pytest.importorskip("torch")
    import fastvlm_zoo
    from fastvlm_convert.mil_check.runtime import CheckerRuntime
    from fastvlm_mlx.bundle import Bundle
    from fastvlm_mlx.loading import assemble

    runtime = CheckerRuntime()
    bundle = Bundle.open(fastvlm_zoo.default().path)
    model = assemble(bundle, vision="coreml", dtype="float32", runtime=runtime)
    some = questions[:CHECKED]
    found = list(ask_all(model, some))
    assert runtime.opened
    assert sum(a.said == b.said for a, b in zip(answers, found, strict=False)) >= CHECKED - 1


def test_the_files_are_small_and_belong_together():
    """The bundle is what `make nano` makes of the checkpoint beside it, and neither weighs on a clone."""
    import fastvlm_zoo
    from fastvlm_mlx.bundle import PACKAGE, Bundle, read_tensors
    from fastvlm_mlx.files import sha256

    default = fastvlm_zoo.default()
    bundle = Bundle.open(default.path)
    assert (default.name, bundle.config.name) == ("fastvlm-nano", "fastvlm-nano")
    assert (default.licence, bundle.manifest.licence) == ("MIT", "MIT")
    assert {name: sha256(CHECKPOINT / name) for name in bundle.manifest.source.files} == bundle.manifest.source.files
    assert (bundle.path / PACKAGE).is_dir()
    for folder in (default.path, CHECKPOINT):
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12e6
    tensors = [t for name in ("decoder", "vision") for t in read_tensors(bundle.path / f"{name}.safetensors").values()]
    assert f"{sum(tensor.size for tensor in tensors) / 1e6:.1f}M" == default.parameters


def test_an_answer_ends_where_the_training_ended_it():
    """Checkpoint and bundle, which is made of it, name the same two ids, and those are the tokens that end a turn."""
    import fastvlm_zoo
    from fastvlm_mlx.bundle import TOKENIZER, Bundle

    bundle = Bundle.open(fastvlm_zoo.default().path)
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text("utf-8"))
    for tokenizer, stops in (
        (CHECKPOINT / "tokenizer.json", generation["eos_token_id"]),
        (bundle.path / TOKENIZER, bundle.config.eos_token_ids),
    ):
        tokens = {token["id"]: token["content"] for token in json.loads(tokenizer.read_text("utf-8"))["added_tokens"]}
        assert sorted(tokens[stop] for stop in stops) == ["<|endoftext|>", "<|im_end|>"]
