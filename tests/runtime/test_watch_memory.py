"""A watch computes what its frames share once, and keeps nothing of frames that have gone."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from fastvlm_mlx import FastVLM, watch
from fastvlm_mlx.cache import PrefixCache
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.pictures import Vision
from support.camera import Camera
from support.chats import BLUE, RED
from support.work import counted

PROMPT = [5, 6, 7, -200, 8, 9]
SHORT = {"max_tokens": 3, "ignore_eos": True, "resolution": 128}  # 4 tokens an image
GREY = [np.full((40, 40, 3), value, np.uint8) for value in range(0, 240, 12)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(watch, "PATIENCE_S", 0.0)


def answers(model, frames, prompt=PROMPT, **options):
    """Answers to all frames, each shown when the one before it is answered."""
    camera = Camera()
    camera.put(frames[0])
    watching = model.watch(camera, prompt, **SHORT | options)
    for frame in frames[1:]:
        yield next(watching)
        camera.show(frame)
    yield next(watching)
    camera.end()
    assert list(watching) == []


def kept(model):
    """Positions, pieces of prompts, pictures, bytes of rows and of features that are kept."""
    prefixes, features = model.engine.prefixes, model.engine.vision.cache
    nodes = list(prefixes.nodes())
    assert prefixes.nbytes == sum(node.nbytes for node in nodes)
    return sum(len(node.keys) for node in nodes), len(nodes), len(features._kept), prefixes.nbytes, features.nbytes


def test_what_frames_share_is_computed_once_and_nothing_else_is_kept(tiny):
    sizes, cached = [], []
    with counted(tiny) as work:
        for answer in answers(tiny, GREY):
            sizes.append(kept(tiny))
            cached.append(answer.result.cached_tokens)
    assert cached == [0] + [3] * 19  # what stands before the image
    assert work.passes == [9] + [6] * 19
    assert work.images == 20
    # 9 positions of the prompt and 2 of 3 tokens; in four pieces: before the image, it, after it, the answer.
    assert {size[:3] for size in sizes} == {(11, 4, 1)}
    assert len(set(sizes)) == 1


def test_files_are_not_remembered(tiny, tmp_path):
    from PIL import Image

    files = []
    for number, frame in enumerate(GREY[:4]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(frame).save(files[-1])
    assert len(list(answers(tiny, [*files, files[0].read_bytes()]))) == 5
    assert len(tiny.engine.vision._sources) == 0


def test_a_scene_that_stands_still(tiny):
    with counted(tiny) as work:
        found = list(answers(tiny, [RED, RED.copy(), RED.copy(), BLUE, RED]))
    assert work.passes == [9, 1, 1, 6, 6]
    assert work.images == 3
    assert len({answer.result.token_ids for answer in found if answer.frame is not BLUE}) == 1
    assert kept(tiny)[:3] == (11, 4, 1)


def test_answers_that_are_drawn_by_lot_do_not_pile_up(tiny):
    sizes = []
    found = []
    for answer in answers(tiny, [RED] * 12, temperature=2.0, seed=None):
        found.append(answer.result.token_ids)
        sizes.append(kept(tiny)[0])
    assert len(set(found)) > 3
    assert set(sizes) == {11}


def test_nothing_piles_up_under_questions_that_change(tiny):
    for change in ([5, 6, 7, -200, None, 9], [5, None, 7, -200, 8, 9]):
        tiny.clear_cache()
        sizes = []
        for answer in answers(tiny, [RED] * 8, lambda index, ids=change: [i or index + 10 for i in ids]):
            sizes.append(kept(tiny))
            assert answer.result.cached_tokens == ((7 if change[4] is None else 1) if answer.index else 0)
        assert {(size[0], size[2]) for size in sizes} == {(11, 1)}


def test_what_was_known_before_stays(tiny):
    """Of a picture that was asked about before, and of a text with the same beginning."""
    said = tiny.generate(RED, PROMPT, **SHORT).token_ids
    tiny.generate(None, [5, 6, 1, 2], **SHORT)
    list(answers(tiny, [GREY[0], RED, GREY[1], BLUE]))
    # The first question and two of its answer's tokens, what the second has beside it, and of the last frame likewise.
    assert kept(tiny)[0] == 11 + 4 + 8
    with counted(tiny) as work:
        tiny.generate(RED, [*PROMPT, *said[:2], 1], **SHORT)
        tiny.generate(None, [5, 6, 1, 2], **SHORT)
        tiny.generate(BLUE, [4, -200], **SHORT)  # the last frame's features are there
        tiny.generate(GREY[1], [4, -200], **SHORT)
    assert work.passes == [1, 1, 5, 4]
    assert work.images == 1


def test_features_that_were_known_before_stay(tiny):
    tiny.encode_image(RED, resolution=128)
    list(answers(tiny, [RED, BLUE]))
    with counted(tiny) as work:
        tiny.encode_image(RED, resolution=128)
    assert work.images == 0


def test_without_caches(tiny, forgetful):
    bare = forgetful(tiny)
    found = [answer.result.token_ids for answer in answers(bare, [RED, BLUE])]
    assert found == [bare.generate(image, PROMPT, **SHORT).token_ids for image in (RED, BLUE)]
    assert kept(bare)[:3] == (0, 0, 0)


def _import_speculation():
    """Ahead: it may take longer than a camera waits."""
    importlib.import_module("mlx_lm.generate")


def test_a_draft_keeps_nothing_of_frames_either(default_model):
    model = default_model
    model.clear_cache()
    engine = model.engine
    vision = Vision(engine.vision.encoder, engine.vision.projector, 1 << 26)
    draft = FastVLM(model.config, Engine(engine.decoder, vision, PrefixCache(1 << 26)), model.tokenizer, 128)
    _import_speculation()
    sizes = []
    for _ in answers(model, GREY[:6], "What is this?", draft=draft):
        sizes.append((kept(model)[:3], kept(draft)[:3]))
    assert len(set(sizes)) == 1
    assert sizes[0][1][2] == 1
    assert sizes[0][1][0] > 20, "what its latest frame needs is there"


def test_a_model_that_is_its_own_draft(default_model):
    default_model.clear_cache()
    _import_speculation()
    sizes = {kept(default_model)[:3] for _ in answers(default_model, GREY[:5], "What is this?", draft=default_model)}
    assert len(sizes) == 1


@pytest.mark.parametrize("asked", [True, False])
def test_a_chat_about_a_frame_goes_on(default_model, asked):
    """As if nobody watched."""
    model, work = default_model, {}
    for watched in (False, True):
        model.clear_cache()
        seen = answers(model, GREY[:3], "What is this?") if watched else iter([None] * 3)
        next(seen)
        chat = model.chat(GREY[0], resolution=128)
        if asked:
            chat.ask("What is it exactly?", max_tokens=3)
        next(seen)
        with counted(model) as count:
            found = chat.ask("And why?", max_tokens=3)
        work[watched] = count.images, found.cached_tokens
        assert len(list(seen)) == 1
    assert work[True] == work[False]
    assert work[True][0] == 0


def test_what_others_ask_about_stays_and_no_more(tiny):
    """Another question about a picture, up to its last word the watch's, and the picture's features."""
    seen = answers(tiny, [RED, BLUE, *GREY[:3]])
    next(seen)
    said = tiny.generate(RED, [*PROMPT[:-1], 1], **SHORT).token_ids
    next(seen)
    # Its 9 positions and 2 tokens; of BLUE what comes after the beginning: the picture, 2 positions and 2 tokens.
    assert kept(tiny)[0] == 11 + 8
    assert len(list(seen)) == 3
    assert kept(tiny)[0] == 11 + 8
    with counted(tiny) as work:
        tiny.generate(RED, [*PROMPT[:-1], 1, *said[:2], 2], **SHORT)
        tiny.generate(RED, [4, -200], **SHORT)
        tiny.generate(BLUE, [4, -200], **SHORT)
    assert work.passes == [1, 5, 4]  # the id before BLUE is that before RED
    assert work.images == 1, "BLUE's features are gone, RED's are not"


def test_features_that_others_ask_for_stay(tiny):
    seen = answers(tiny, [RED, BLUE, GREY[0]])
    next(seen)
    tiny.encode_image(RED, resolution=128)
    assert len(list(seen)) == 2
    with counted(tiny) as work:
        tiny.encode_image(RED, resolution=128)
        tiny.encode_image(BLUE, resolution=128)
    assert work.images == 1


def test_a_frame_that_others_ask_about_comes_again(tiny):
    """It is theirs from then on, also under the same question."""
    seen = answers(tiny, [RED, RED.copy(), BLUE, GREY[0]])
    next(seen)
    tiny.generate(RED, PROMPT, **SHORT)
    assert len(list(seen)) == 3
    assert kept(tiny)[:3] == (11 + 8, 7, 2)


def test_an_answer_to_a_question_that_others_asked_goes(tiny):
    """What was known is their question; what is drawn by lot is the watch's."""
    tiny.generate(RED, PROMPT, **SHORT | {"max_tokens": 1})
    assert kept(tiny)[0] == 9
    for _ in answers(tiny, [RED, BLUE], temperature=2.0, seed=None):
        pass
    assert kept(tiny)[0] == 9 + 8
