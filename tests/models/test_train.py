"""The training of models/nano, at sizes that mean nothing: stages, resuming, and the way to a bundle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from fastvlm_convert.pipeline import convert
from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.prefill import embed, prefill
from fastvlm_mlx.prompt import ask
from fastvlm_mlx.types import IMAGE_TOKEN_ID
from nano import scenes
from nano.export import export
from nano.network import NanoVLM
from nano.objectives import (
    DENSE_TARGETS,
    TARGETS,
    answer_logits,
    answer_loss,
    exact_matches,
)
from nano.record import CURVE
from nano.schedule import STAGES, Stage
from nano.targets import IGNORE, Batch, pack
from nano.tokenizer import Prompts
from nano.trainer import Trainer
from support.nano_run import SETTINGS, SIDE, make_trainer, stop_after
from support.seeded import relative_l2

# float32 on both sides, sums in another order.
TOLERANCE = 1e-4
# The bundle rounds to float16 once more, when norms are folded into kernels; 0.003 was seen.
STORED_TOLERANCE = 5e-3


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sizes this small only wait for each other on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("nano") / "run")
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def prompts(trained: Trainer) -> Prompts:
    return Prompts(trained.tokenizer)


@pytest.fixture(scope="module")
def network(trained: Trainer) -> NanoVLM:
    """The trained model with statistics and scales that no fold may get wrong unseen."""
    generator = torch.Generator().manual_seed(1)
    network = NanoVLM(trained.model.config)
    network.load_state_dict(trained.model.state_dict())
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("bias") or any(part in name for part in ("running", "norm", "layer_scale", ".bn.weight")):
                tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
                tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="module")
def bundle(trained: Trainer, network: NanoVLM, tmp_path_factory: pytest.TempPathFactory) -> FastVLM:
    folder = tmp_path_factory.mktemp("exported")
    export(network, trained.tokenizer, folder / "checkpoint", torch.float32)
    result = convert(folder / "checkpoint", folder / "bundle")
    assert not result.warnings
    return load(folder / "bundle")


def packed(prompts: Prompts, seeds: range) -> tuple[Batch, list[scenes.Scene]]:
    made = [scenes.make_scene(seed, side=SIDE) for seed in seeds]
    batch = pack([scene.questions for scene in made], prompts, (SIDE // 64) ** 2, scenes.KINDS)
    return batch | {"pixels": torch.from_numpy(np.stack([s.image.transpose(2, 0, 1) for s in made]))}, made


def test_the_prompts_ids_are_those_of_inference(bundle: FastVLM, prompts: Prompts):
    for seed in range(20):
        for question in scenes.make_scene(seed, side=SIDE).questions:
            before, after = prompts.question(question.prompt)
            assert [*before, IMAGE_TOKEN_ID, *after] == bundle.tokenize(ask(question.prompt, images=1))
            assert before == prompts.question("")[0], "the packed beginning is common to all questions"


def test_answers_end_where_inference_stops_and_read_as_they_are_written(bundle: FastVLM, prompts: Prompts):
    for seed in range(20):
        for question in scenes.make_scene(seed, side=SIDE).questions:
            ids = prompts.answer(question.answer)
            assert ids[-1] in bundle.config.eos_token_ids
            assert prompts.tokenizer.decode(ids) == question.answer


def test_what_pictures_show_is_spelled_in_letters(prompts: Prompts):
    assert len(prompts.answer("quartz")) == len("quartz") + 1
    assert len(prompts.answer("1907")) == len("1907") + 1
    assert len(prompts.tokenizer.encode("What colour is the")) == 4


def test_a_packed_sequence_computes_what_one_pass_per_question_does(network: NanoVLM, prompts: Prompts):
    batch, made = packed(prompts, range(3))
    features = network.encode(batch["pixels"])
    found, labels = answer_logits(network, features, batch)
    alone, right = [], []
    for index, scene in enumerate(made):
        for question in scene.questions:
            single = pack([[question]], prompts, (SIDE // 64) ** 2, scenes.KINDS)
            logits, label = answer_logits(network, features[index : index + 1], single)
            alone.append(logits)
            right.append(label)
    assert torch.equal(labels, torch.cat(right))
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_exact_matches_are_per_question(prompts: Prompts):
    batch, made = packed(prompts, range(2))
    labels = batch["label"][batch["label"] != IGNORE]
    logits = torch.nn.functional.one_hot(labels, prompts.size).float()
    assert exact_matches(logits, labels, batch).tolist() == [True] * sum(len(s.questions) for s in made)
    logits[0] = 0.0
    logits[0, (labels[0] + 1) % prompts.size] = 1.0
    assert exact_matches(logits, labels, batch).tolist() == [False] + [True] * (len(batch["kind"]) - 1)


def test_every_question_weighs_the_same(prompts: Prompts):
    asked = [scenes.Question("colour", "What colour is it?", "red"), scenes.Question("reading", "Read it.", "marble")]
    lengths = [len(prompts.answer(question.answer)) for question in asked]
    assert lengths[0] < lengths[1]
    batch = pack([asked[:1], asked[1:]], prompts, (SIDE // 64) ** 2, scenes.KINDS)
    labels = batch["label"][batch["label"] != IGNORE]
    for right, wrong in ((0, 1), (1, 0)):  # the one is certain; the other's tokens cost log(classes) each
        logits = torch.zeros(len(labels), prompts.size)
        own = slice(0, lengths[0]) if right == 0 else slice(lengths[0], None)
        logits[own] = 1e4 * torch.nn.functional.one_hot(labels[own], prompts.size).float()
        assert float(answer_loss(logits, labels, batch)) == pytest.approx(np.log(prompts.size) / 2), wrong


def test_a_page_changes_no_answer(network: NanoVLM, prompts: Prompts):
    batch, made = packed(prompts, range(2))
    features = network.encode(batch["pixels"])
    expected, labels = answer_logits(network, features, batch)
    beside = pack([made[0].questions, [], made[1].questions], prompts, (SIDE // 64) ** 2, scenes.KINDS)
    found, same = answer_logits(network, features[[0, 0, 1]], beside)
    assert torch.equal(labels, same)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_bundle_computes_what_the_network_does(bundle: FastVLM, network: NanoVLM, prompts: Prompts):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    question = scenes.make_scene(0, side=SIDE).questions[0]
    batch = pack([[question]], prompts, (SIDE // 64) ** 2, scenes.KINDS)
    with torch.no_grad():
        features = network.encode(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])
        logits, _ = answer_logits(network, features, batch)
    assert relative_l2(bundle.encode_image(pixels).features, features[0].numpy()) <= TOLERANCE
    # The first logits predict the answer's first token; rows beyond the tokenizer are never generated.
    found = first_logits(bundle, pixels, question.prompt)
    assert relative_l2(found, logits[0, : prompts.size].numpy()) <= TOLERANCE


def first_logits(model: FastVLM, image: np.ndarray, prompt: str) -> mx.array:
    encoded = model.encode_image(image)
    spans = model.expand(model.tokenize(ask(prompt, images=1)), [len(encoded.embeddings)])
    return mx.array(
        prefill(model.decoder, embed(model.decoder, spans, [encoded.embeddings]), model.decoder.new_cache())[0]
    )


def test_the_exported_checkpoint_answers_as_the_network_does(network: NanoVLM, trained: Trainer, tmp_path: Path):
    """With the weights as they are stored, in float16, and all sums in float32."""
    export(network, trained.tokenizer, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "bundle")
    model = load(tmp_path / "bundle", dtype="float32")
    assert model.resolution == SIDE
    stored = copy.deepcopy(network).half().float()
    answers = set()
    for seed in range(4):
        scene = scenes.make_scene(seed, side=SIDE)
        for question in scene.questions[:2]:
            found = model.generate(scene.image, question.prompt, max_tokens=6).token_ids
            expected, logits = greedy(stored, Prompts(trained.tokenizer), scene.image, question.prompt, 6)
            assert list(found) == expected
            assert relative_l2(first_logits(model, scene.image, question.prompt), logits.numpy()) <= STORED_TOLERANCE
            answers.add(found)
    assert len(answers) > 1, "the network must look at something"


@torch.no_grad()
def greedy(
    network: NanoVLM, prompts: Prompts, image: np.ndarray, prompt: str, most: int
) -> tuple[list[int], torch.Tensor]:
    """The likeliest tokens one after another, up to one that ends the answer, and the logits of the first."""
    decoder, image_features = network.decoder, network.encode(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    before, after = prompts.question(prompt)
    out: list[int] = []
    seen: list[torch.Tensor] = []
    while len(out) < most and (not out or out[-1] not in (prompts.end, prompts.pad)):
        texts = [decoder.model.embed_tokens(torch.tensor([ids])) for ids in (before, [*after, *out])]
        logits = decoder(inputs_embeds=torch.cat([texts[0], network.projector(image_features), texts[1]], dim=1)).logits
        seen.append(logits[0, -1, : prompts.size])
        out.append(int(seen[-1].argmax()))
    return out, seen[0]


def test_export_refuses_what_the_dtype_does_not_hold(trained: Trainer, tmp_path: Path):
    network = NanoVLM(trained.model.config)
    with torch.no_grad():
        network.projector[0].bias[0] = 1e6
    with pytest.raises(ValueError, match=r"mm_projector.0.bias.*float16"):
        export(network, trained.tokenizer, tmp_path)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_changes_what_it_names_and_nothing_else(stage: Stage, tmp_path: Path):
    index = STAGES.index(stage)
    steps = tuple(1 if i <= index else 10 for i in range(len(STAGES)))
    trainer = make_trainer(tmp_path, replace(SETTINGS, stage_steps=steps))
    trainer.run(lambda: len(trainer.losses) >= index)
    assert (trainer.stage, trainer.step) == (index, 0)
    before = {p: {n: t.clone() for n, t in m.state_dict().items()} for p, m in trainer.parts.items()}
    trainer.run(lambda: len(trainer.losses) >= index + 1)
    for part, module in trainer.parts.items():
        changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[part][name])}
        starts = part == "projector" and stage is STAGES[0]  # the next stage's beginning sets it
        assert bool(changed) == (stage.trains(part) or starts), part
        statistics = {name for name in changed if "running" in name}
        assert bool(statistics) == (part in ("early", "late") and stage is STAGES[0])


def test_a_resumed_run_equals_an_uninterrupted_one(trained: Trainer, tmp_path: Path):
    for steps in (2, 3, 2, 3, 100):  # within stage 1, at the end of stage 2, within stage 3, within the last
        part = make_trainer(tmp_path)
        part.run(stop_after(part, steps))
    assert part.finished
    for (name, tensor), other in zip(part.model.state_dict().items(), trained.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_the_same_seed_gives_the_same_losses(tmp_path: Path):
    """Twenty steps, of all stages, on the same machine."""
    settings = replace(SETTINGS, stage_steps=(4, 4, 4, 3, 3, 2), evaluate_every=100)

    def losses(name: str, seed: int, steps: int) -> list[float]:
        trainer = make_trainer(tmp_path / name, replace(settings, seed=seed))
        trainer.run(stop_after(trainer, steps))
        return trainer.losses

    first = losses("first", seed=0, steps=20)
    assert len(first) == 20
    assert losses("again", seed=0, steps=20) == first
    assert losses("other", seed=1, steps=1) != first[:1]


def test_workers_change_nothing(trained: Trainer, tmp_path: Path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, workers=1))
    trainer.run(stop_after(trainer, 2))
    assert trainer.losses == trained.losses[:2]


def test_the_curve_has_a_line_per_evaluation(trained: Trainer):
    header, *rows = [line.split(",") for line in (trained.folder / CURVE).read_text().splitlines()]
    assert len(set(header)) == len(header)
    assert {"exact", *scenes.KINDS, *(f"cell {name}" for name in TARGETS)} <= set(header)
    assert {f"dense {name}" for name in DENSE_TARGETS} <= set(header)
    with_heads = {row[1] for row in rows if row[header.index("cell shape")] and row[header.index("dense letter")]}
    assert with_heads == {stage.name for stage in STAGES if stage.heads}  # the others' would say nothing
    assert [" ".join(row[1:3]) for row in rows] == [
        "encoder 2",
        "encoder 3",
        "projector 2",
        "everything 2",
        "everything 3",
        "readers 1",
        "signs 2",
        "shapes 1",
    ]
