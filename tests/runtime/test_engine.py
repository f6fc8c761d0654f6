"""Work is counted, not timed: what an earlier prompt had isn't computed again, and nothing else changes."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import load, pictures
from fastvlm_mlx.cache import PrefixCache
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.model import FastVLM
from fastvlm_mlx.pictures import Vision
from support.seeded import golden_prompt, relative_l2
from support.work import counted

RED, BLUE = (np.full((64, 48, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
GREEDY = {"max_tokens": 5, "ignore_eos": True, "resolution": 128}  # 4 tokens an image
LOGITS = 1e-4  # relative: float32, rows of one pass against those of several; measured <= 4e-6
BEFORE, AFTER = [5, 6, 7], [8, 9]


def test_a_first_question_is_one_encode_one_pass_and_one_row_of_the_head(tiny):
    with counted(tiny) as work:
        result = tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY)
    assert (work.images, work.passes, work.head_rows) == (1, [9], 1)
    assert (result.prompt_tokens, result.image_tokens, result.cached_tokens) == (9, 4, 0)


def test_a_second_question_is_its_own_positions(tiny, forgetful):
    tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY)
    for ids, new in (([8, 7, 7], 2), ([11], 1), ([*AFTER, 3], 1), (AFTER, 1)):
        with counted(tiny) as work:
            result = tiny.generate(RED, [*BEFORE, -200, *ids], **GREEDY)
        right = forgetful(tiny).generate(RED, [*BEFORE, -200, *ids], **GREEDY)
        assert result.token_ids == right.token_ids
        assert (work.images, work.rows, work.head_rows) == (0, new, 1)
        assert result.cached_tokens == result.prompt_tokens - work.rows


def test_an_answer_is_part_of_what_is_known(tiny):
    first = tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY)
    with counted(tiny) as work:
        tiny.generate(RED, [*BEFORE, -200, *AFTER, *first.token_ids[:4], 12], **GREEDY)
    assert (work.images, work.passes) == (0, [1])


def test_another_picture_shares_the_text_before_it(tiny):
    tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY)
    with counted(tiny) as work:
        tiny.generate(BLUE, [*BEFORE, -200, *AFTER], **GREEDY)
    assert (work.images, work.passes) == (1, [6])


def test_a_known_picture_in_another_place_is_not_encoded_again(tiny, forgetful):
    tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY)
    with counted(tiny) as work:
        result = tiny.generate([BLUE, RED], [4, -200, -200, *AFTER], **GREEDY)
    assert (work.images, work.passes) == (1, [11])
    assert result.token_ids == forgetful(tiny).generate([BLUE, RED], [4, -200, -200, *AFTER], **GREEDY).token_ids


def test_the_same_picture_twice_is_encoded_once(tiny):
    with counted(tiny) as work:
        tiny.generate([RED, RED], [4, -200, 5, -200], **GREEDY)
    assert (work.images, work.passes) == (1, [10])


@pytest.mark.parametrize("change", [{"resolution": 192}, {"aspect": "stretch"}, {"aspect": "crop"}])
def test_another_view_of_a_picture_is_another_picture(tiny, change):
    photo = np.random.default_rng(0).integers(0, 256, (90, 64, 3), np.uint8)
    tiny.generate(photo, [*BEFORE, -200, *AFTER], **GREEDY)
    with counted(tiny) as work:
        result = tiny.generate(photo, [*BEFORE, -200, *AFTER], **GREEDY | change)
    assert work.images == 1
    assert result.cached_tokens == len(BEFORE)


def test_pictures_are_known_by_their_content(tiny, tmp_path):
    path = tmp_path / "red.png"
    Image.fromarray(RED).save(path)
    tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY)
    with counted(tiny) as work:
        for same in (path, str(path), path.read_bytes(), Image.open(path)):
            tiny.generate(same, [*BEFORE, -200, *AFTER], **GREEDY)
    assert work.images == 0
    Image.fromarray(BLUE).save(path)  # another picture under the same name
    with counted(tiny) as work:
        tiny.generate(path, [*BEFORE, -200, *AFTER], **GREEDY)
    assert work.images == 1


def test_a_file_that_is_known_is_not_decoded_again(tiny, tmp_path, monkeypatch):
    path = tmp_path / "red.png"
    Image.fromarray(RED).save(path)
    tiny.generate(path, [*BEFORE, -200, *AFTER], **GREEDY)
    monkeypatch.setattr(pictures, "open_bytes", None)
    assert tiny.generate(path, [*BEFORE, -200, 3], **GREEDY).timings.vision == 0


def test_a_huge_file_is_not_read_whole(tiny, tmp_path, monkeypatch):
    path = tmp_path / "red.png"
    Image.fromarray(RED).save(path)
    right = tiny.generate(path, [*BEFORE, -200, *AFTER], **GREEDY)
    monkeypatch.setattr(pictures, "_LARGEST_FILE", 10)
    monkeypatch.setattr(Path, "read_bytes", None)
    with counted(tiny) as work:
        assert tiny.generate(path, [*BEFORE, -200, *AFTER], **GREEDY).token_ids == right.token_ids
    assert work.images == 0, "its pixels tell that it is known"


def test_golden_ids_through_the_caches(tiny):
    for kind in ("one image", "two images", "text", "two images", "one image"):
        prompt = golden_prompt("tiny", kind)
        for _ in range(2):
            with counted(tiny) as work:
                result = tiny.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
            assert list(result.token_ids) == prompt.greedy_ids
            assert relative_l2(work.logits[0][0], prompt.first_logits) <= LOGITS
        assert work.rows == 1


def test_prefill_in_steps_reports_its_progress(tiny):
    for step, said in ((4, [(0, 9), (4, 9), (8, 9), (9, 9)]), (100, [(0, 9), (9, 9)])):
        tiny.clear_cache()
        seen: list[tuple[int, int]] = []
        options = GREEDY | {"prefill_step_size": step, "progress": lambda done, of, seen=seen: seen.append((done, of))}
        ids = tiny.generate(RED, [*BEFORE, -200, *AFTER], **options).token_ids
        assert seen == said
        seen.clear()
        again = tiny.generate(RED, [*BEFORE, -200, 3], **options)
        assert seen == [(7, 8), (8, 8)]
        assert again.cached_tokens == 7
    tiny.clear_cache()
    assert tiny.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY).token_ids == ids


def test_switched_off(bundle):
    bare = load(bundle("tiny"), prefix_cache_bytes=0, feature_cache_bytes=0)
    for _ in range(2):
        with counted(bare) as work:
            assert bare.generate(RED, [*BEFORE, -200, *AFTER], **GREEDY).cached_tokens == 0
        assert (work.images, work.passes) == (1, [9])
    assert (bare.engine.prefixes.nbytes, bare.engine.vision.cache.nbytes) == (0, 0)
    for wrong in ({"prefix_cache_bytes": -1}, {"feature_cache_bytes": -1}):
        with pytest.raises(InputError, match="must be 0"):
            load(bundle("tiny"), **wrong)


def test_warm_at_load(bundle, monkeypatch):
    work = []
    from_file = FastVLM.generate

    def watched(self, image, ids, **options):
        work.append((image.shape, ids))
        return from_file(self, image, ids, **options)

    monkeypatch.setattr(FastVLM, "generate", watched)
    warm = load(bundle("tiny"), resolution=128, warm=True)
    assert work == [((128, 128, 3), [-200, 0])]
    assert (warm.engine.prefixes.nbytes, warm.engine.vision.cache.nbytes) == (0, 0)


def test_features_are_kept_within_their_bound(tiny):
    one = tiny.encode_image(RED, resolution=128)
    size = one.features.nbytes + one.embeddings.nbytes
    vision = Vision(tiny.engine.vision.encoder, tiny.engine.vision.projector, 2 * size)
    small = FastVLM(tiny.config, Engine(tiny.decoder, vision, PrefixCache(0)), None, 128)
    green = np.full((64, 48, 3), (0, 255, 0), np.uint8)
    with counted(small) as work:
        for image in (RED, BLUE, RED, green, RED, BLUE):  # BLUE was used longest ago when green came
            small.encode_image(image)
            assert vision.cache.nbytes <= 2 * size
    assert work.images == 4


def test_a_stopped_answer_leaves_right_rows(tiny, forgetful):
    stream = tiny.stream(RED, [*BEFORE, -200, *AFTER], **GREEDY | {"max_tokens": 20})
    said = [next(stream).token_id for _ in range(3)]
    stream.close()
    with counted(tiny) as work:
        result = tiny.generate(RED, [*BEFORE, -200, *AFTER, *said, 1], **GREEDY)
    assert work.rows == 1
    assert result.token_ids == forgetful(tiny).generate(RED, [*BEFORE, -200, *AFTER, *said, 1], **GREEDY).token_ids


def test_two_answers_at_a_time(tiny, forgetful):
    prompts = ([*BEFORE, -200, *AFTER], [*BEFORE, -200, 3, 3])
    streams = [tiny.stream(RED, ids, **GREEDY) for ids in prompts]
    pieces = [[next(stream) for stream in streams] for _ in range(6)][-1]
    for piece, ids in zip(pieces, prompts, strict=True):
        assert piece.result.token_ids == forgetful(tiny).generate(RED, ids, **GREEDY).token_ids


class Beside:
    """An encoder on hardware of its own: works in a thread, once it may."""

    device, runs_beside = "a machine beside", True

    def __init__(self, encoder):
        self._encoder, self.log, self.go = encoder, [], threading.Event()

    def begin(self, pixels):
        self.log.append("begin")
        return lambda: self.encode(pixels)

    def encode(self, pixels):
        self.log.append("encode")
        return self._encoder.encode(pixels)


def test_text_before_an_image_is_prefilled_while_it_is_encoded(tiny, forgetful, monkeypatch):
    encoder = Beside(tiny.engine.vision.encoder)
    vision = Vision(encoder, tiny.engine.vision.projector, 1 << 20)
    beside = FastVLM(tiny.config, Engine(tiny.decoder, vision, PrefixCache(1 << 20)), None, 128)
    hidden = tiny.decoder.hidden
    monkeypatch.setattr(
        tiny.decoder, "hidden", lambda rows, cache: encoder.log.append(rows.shape[1]) or hidden(rows, cache)
    )
    ids = [*BEFORE, -200, 4, -200, *AFTER]
    result = beside.generate([RED, BLUE], ids, **GREEDY)
    assert encoder.log == [3, "begin", "begin", "encode", "encode", 11]
    encoder.log.clear()
    again = beside.generate([RED, BLUE, RED], [*ids, -200], **GREEDY)
    assert encoder.log == [4 + 5 - 5]
    assert again.cached_tokens == 14
    encoder.log.clear()
    beside.generate([RED, np.zeros_like(RED)], [1, -200, 2, -200], **GREEDY)
    assert encoder.log == [6, "begin", "encode", 4], "known pictures before the new one are prefilled, too"
    encoder.log.clear()
    seen = []
    text = [*range(9, 0, -1), 3, 2, 1]
    options = GREEDY | {"prefill_step_size": 5, "progress": lambda done, total: seen.append((done, total))}
    long = beside.generate(np.full_like(RED, 7), [*text, -200, 4], **options)
    assert encoder.log == [5, "begin", 5, 2, "encode", 5], "the encoder begins while a long text is prefilled"
    assert (seen[0], seen[-1]) == ((0, 17), (17, 17))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {17}
    monkeypatch.undo()
    assert result.token_ids == forgetful(tiny).generate([RED, BLUE], ids, **GREEDY).token_ids
    assert long.token_ids == forgetful(tiny).generate(np.full_like(RED, 7), [*text, -200, 4], **GREEDY).token_ids


@pytest.mark.parametrize("seed", range(100))
def test_random_questions_equal_those_from_scratch(model, forgetful, seed):
    """Questions, one picture or two, anywhere, in any order, with caches so small that much is dropped."""
    dice, tiny = random.Random(seed), model("tiny")
    rows = 2 * sum(k.nbytes for k, _ in _some_rows(tiny))
    vision = Vision(tiny.engine.vision.encoder, tiny.engine.vision.projector, dice.choice((0, 20_000, 1 << 20)))
    prefixes = PrefixCache(dice.choice((0, 10, 25, 60, 10_000)) * rows)
    cached = FastVLM(tiny.config, Engine(tiny.decoder, vision, prefixes), None, 128)
    several = [RED, BLUE, np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)]
    history: list[tuple[list[int], list[int]]] = [([], [])]
    for _ in range(4):
        shown, ids = map(list, dice.choice(history))
        ids = ids[: dice.randrange(len(ids) + 1)] if dice.random() < 0.3 else ids
        shown = shown[: ids.count(-200)]
        for _ in range(dice.randrange(3 if len(shown) < 2 else 1)):
            shown.append(dice.randrange(3))
            ids += [dice.randrange(10) for _ in range(dice.randrange(3))] + [-200]
        ids += [dice.randrange(10) for _ in range(dice.randrange(1, 5))]
        images, options = [several[index] for index in shown], {"max_tokens": 3, "ignore_eos": True}
        with counted(cached) as found:
            result = cached.generate(images, ids, **options)
        with counted(forgetful(tiny)) as scratch:
            right = forgetful(tiny).generate(images, ids, **options | {"resolution": 128})
        assert result.token_ids == right.token_ids
        assert relative_l2(found.logits[0], np.array(scratch.logits[0], np.float64)) <= LOGITS
        assert prefixes.nbytes <= prefixes.max_bytes
        history.append((shown, [*ids, *result.token_ids[: dice.randrange(4)]]))


def _some_rows(model):
    cache = model.decoder.new_cache()
    model.decoder.hidden(model.decoder.embed([1])[None], cache)
    return [(entry.keys[:, :, :1], entry.values) for entry in cache]
