"""Answers that are decoded together are those of one by one, and each stops on its own."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.batch import Request, decode_together, read_requests
from fastvlm_mlx.errors import ContextLengthError, ImageError, InputError, PromptError
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import GenerationOptions
from fastvlm_mlx.views import View
from support.work import counted

PICTURES = [np.random.default_rng(seed).integers(0, 256, (50, 60, 3), np.uint8) for seed in range(4)]
# Ragged: no image, one, two, several lengths.
IMAGES = [[PICTURES[0]], None, [PICTURES[1], PICTURES[2]], PICTURES[3], [PICTURES[0]], None, [PICTURES[2]], PICTURES[1]]
PROMPTS = [
    [1, -200, 2],
    [4, 5, 6, 7, 8, 9, 10],
    [-200, 3, -200],
    [-200, 9],
    [1, -200],
    [12],
    [*range(30), -200, 5],
    [2, -200, 7],
]
OPTIONS = {"ignore_eos": True, "resolution": 128}


def one_by_one(model, **options):
    return [model.generate(i, p, **OPTIONS | options) for i, p in zip(IMAGES, PROMPTS, strict=True)]


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_ragged_prompts(tiny, forgetful, size):
    right = one_by_one(forgetful(tiny), max_tokens=12)
    found = tiny.batch(IMAGES, PROMPTS, batch_size=size, max_tokens=12, **OPTIONS)
    assert [r.token_ids for r in found] == [r.token_ids for r in right]
    assert [(r.prompt_tokens, r.image_tokens, r.finish_reason) for r in found] == [
        (r.prompt_tokens, r.image_tokens, r.finish_reason) for r in right
    ]
    assert all(r.timings.ttft > 0 and r.generation_tps > 0 for r in found)


def test_early_finishers_leave_and_others_take_their_place(tiny, forgetful, monkeypatch):
    """A stop id that only some answers contain ends those; the decoder's batches say who was there."""
    whole = one_by_one(forgetful(tiny), max_tokens=12)
    stop = max(
        {t for r in whole for t in r.token_ids[:-1]}, key=lambda t: sum(t in r.token_ids[:-1] for r in whole) == 2
    )
    monkeypatch.setattr(tiny, "stop_ids", {stop})
    monkeypatch.setattr(forgetful(tiny), "stop_ids", {stop})
    options = OPTIONS | {"ignore_eos": False}
    right = [forgetful(tiny).generate(i, p, max_tokens=12, **options) for i, p in zip(IMAGES, PROMPTS, strict=True)]
    assert {r.finish_reason for r in right} == {"stop", "length"}
    found = tiny.batch(IMAGES, PROMPTS, batch_size=3, max_tokens=12, **options)
    assert [(r.token_ids, r.finish_reason) for r in found] == [(r.token_ids, r.finish_reason) for r in right]


def test_requests_are_taken_when_there_is_room(tiny):
    taken = []

    def requests():
        for number in range(5):
            taken.append(number)
            pictures = tiny.open_images([PICTURES[0]], 128, "pad", Clock())
            yield Request(tiny.positions([1, -200, number], [4], None), pictures)

    done = []
    for number, result in decode_together(tiny, requests(), GenerationOptions(max_tokens=4, ignore_eos=True), 2):
        assert len(taken) <= len(done) + 2
        assert len(result.token_ids) == 4
        done.append(number)
    assert sorted(done) == list(range(5))


def test_several_tokens_a_step(tiny, monkeypatch):
    """What a batch is for: one pass of the decoder for all who are in it."""
    rows = []
    backbone = type(tiny.decoder).__call__
    monkeypatch.setattr(
        type(tiny.decoder),
        "__call__",
        lambda self, ids, cache=None: rows.append(ids.shape) or backbone(self, ids, cache),
    )
    tiny.batch(IMAGES, PROMPTS, batch_size=8, max_tokens=6, **OPTIONS)
    assert len(rows) <= 2 * 6
    assert max(shape[0] for shape in rows) == 8
    assert {shape[1] for shape in rows} == {1}


def test_the_same_picture_is_encoded_once(tiny):
    with counted(tiny) as work:
        tiny.batch([PICTURES[0]] * 5, [[1, -200, n] for n in range(5)], max_tokens=2, **OPTIONS)
    assert work.images == 1
    assert sorted(work.passes) == [1, 1, 1, 1, 6]


def test_repetition_penalty(tiny, forgetful):
    options = {"max_tokens": 8, "repetition_penalty": 1e6}
    found = tiny.batch(IMAGES, PROMPTS, **OPTIONS | options)
    assert [r.token_ids for r in found] == [r.token_ids for r in one_by_one(forgetful(tiny), **options)]


def test_texts(speaking_model, forgetful):
    found = speaking_model.batch(PICTURES, "What is this?", max_tokens=6, system="Be brief.")
    right = [forgetful(speaking_model).generate(p, "What is this?", max_tokens=6, system="Be brief.") for p in PICTURES]
    assert [r.text for r in found] == [r.text for r in right]
    assert speaking_model.batch([], "What is this?") == []


def test_a_seed_repeats_itself(tiny):
    options = OPTIONS | {"max_tokens": 6, "temperature": 1.0}
    first, again, other = (tiny.batch(IMAGES, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.token_ids for r in first] != [r.token_ids for r in other]


def test_bad_input_is_told_before_anything_is_computed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.engine.vision.encoder, "encode", None)
    with pytest.raises(InputError, match="3 entries of images and 2 prompts"):
        tiny.batch(PICTURES[:3], [[1, -200]] * 2)
    with pytest.raises(PromptError):
        tiny.batch(PICTURES[:2], [[1, -200], [1]])
    with pytest.raises(ImageError, match="doesn't exist"):
        tiny.batch([PICTURES[0], tmp_path / "none.png"], [[1, -200]] * 2)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        tiny.batch(PICTURES[:1], [[1, -200]], batch_size=0)
    with pytest.raises(InputError, match="single answers"):
        tiny.batch(PICTURES[:1], [[1, -200]], kv_bits=8)
    with pytest.raises(ContextLengthError):
        tiny.batch([None], [[1] * 40_000])


def test_one_prompt_for_all(tiny):
    pictures = PICTURES[:3]
    right = [tiny.generate(picture, [1, -200, 2], max_tokens=4, **OPTIONS).token_ids for picture in pictures]
    for prompt in ([1, -200, 2], (1, -200, 2), np.array([1, -200, 2]), [[1, -200, 2]] * 3):
        found = tiny.batch(pictures, prompt, max_tokens=4, **OPTIONS)
        assert [r.token_ids for r in found] == right


@pytest.mark.parametrize("images", ["photo.jpg", b"bytes", PICTURES[0], None])
def test_images_that_are_no_list_are_refused(tiny, images):
    with pytest.raises(InputError, match="images must be a list with an entry for each question, got"):
        tiny.batch(images, "Hi")


def test_files_far_ahead_are_not_held(tiny, tmp_path):
    """All are checked first; those of the first batch keep their pixels, later ones are read when they are needed."""
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((64, 64, 3), 40 * number, np.uint8)).save(files[-1])
    right = [tiny.generate(file, [1, -200, 2], max_tokens=4, **OPTIONS).token_ids for file in files]
    tiny.clear_cache()
    requests = read_requests(tiny, files, [1, -200, 2], None, View(128, "pad"), 2)
    held = [isinstance(request.pictures[0].make_pixels, partial) for request in requests]
    assert held == [False, False, True, True, True]
    assert [r.token_ids for r in tiny.batch(files, [1, -200, 2], batch_size=2, max_tokens=4, **OPTIONS)] == right


def test_a_file_that_changes_before_its_turn(tiny, tmp_path):
    """Its new pixels must not be kept as those of the old ones."""
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((64, 64, 3), 80 * number, np.uint8)).save(files[-1])
    right = tiny.generate(files[2], [1, -200, 2], max_tokens=4, **OPTIONS).token_ids
    tiny.clear_cache()
    before = files[2].read_bytes()
    requests = read_requests(tiny, files, [1, -200, 2], None, View(128, "pad"), 1)
    assert all(request.preprocess > 0 for request in requests)
    Image.fromarray(np.full((64, 64, 3), 250, np.uint8)).save(files[2])
    with pytest.raises(ImageError, match=r"2\.png.* has changed since the batch began"):
        list(decode_together(tiny, iter(requests), GenerationOptions(max_tokens=4, ignore_eos=True), 1))
    files[2].write_bytes(before)
    assert tiny.generate(files[2], [1, -200, 2], max_tokens=4, **OPTIONS).token_ids == right


@pytest.mark.parametrize("prompts", [None, 7, b"Hi"])
def test_prompts_that_are_none_are_refused(tiny, prompts):
    with pytest.raises(InputError, match="prompts must be a list with one for each question, or one for all"):
        tiny.batch([PICTURES[0]], prompts)
    pictures = PICTURES[:2]
    found = tiny.batch(pictures, ([1, -200, token] for token in (2, 3)), max_tokens=2, **OPTIONS)
    assert [r.prompt_tokens for r in found] == [6, 6]
