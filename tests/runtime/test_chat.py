"""Conversations are right at every turn: each equals the same ids asked from scratch, and computes only what is new."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.errors import ContextLengthError, ImageError, InputError, PromptError
from fastvlm_mlx.prompt import Turn, tokenize
from support.work import counted

RED, BLUE = (np.full((80, 60, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
LENGTH = {"max_tokens": 10, "ignore_eos": True}


@pytest.fixture
def plain(speaking_model):
    speaking_model.clear_cache()
    return speaking_model


def asked(model, question):
    return tokenize([Turn("user", question), Turn("assistant", None)], model.tokenizer)


def test_three_turns(plain, forgetful):
    chat, scratch = plain.chat(RED), forgetful(plain)
    for number, question in enumerate(("What colour?", "Are you sure?", "Why?")):
        ids = [*chat.token_ids, *asked(plain, question if number else f"<image>\n{question}")]
        answer = chat.ask(question, **LENGTH)
        assert answer.token_ids == scratch.generate(RED, ids, **LENGTH).token_ids
        assert answer.image_tokens == 16
    assert [turn.role for turn in chat.turns] == ["system", *["user", "assistant"] * 3]
    assert chat.turns[1] == Turn("user", "<image>\nWhat colour?")


def test_the_first_turn_is_that_of_generate(plain, forgetful):
    right = forgetful(plain).generate(RED, "What colour?", **LENGTH)
    assert plain.chat(RED).ask("What colour?", **LENGTH).token_ids == right.token_ids
    assert forgetful(plain).chat(RED).ask("What colour?", **LENGTH).token_ids == right.token_ids


def test_every_turn_computes_its_own_positions(plain):
    with counted(plain) as work:
        chat = plain.chat([RED, BLUE])
    assert (work.images, work.head_rows) == (2, 0)
    positions = len(chat.token_ids) + work.rows - len(chat.token_ids)
    for number, question in enumerate(("one", "and two", "three")):
        known = len(chat.token_ids) + sum(p.tokens - 1 for p in chat.pictures) if number else positions
        with counted(plain) as work:
            answer = chat.ask(question, max_tokens=6, ignore_eos=True)
        # of the answer before, the last token has no row yet; the end of its turn is new as well
        fresh = answer.prompt_tokens - known + (number > 0) * (1 + len(prompts.end_of_turn(plain.tokenizer)))
        assert (work.images, work.rows, work.head_rows) == (0, fresh, 1)
        assert answer.cached_tokens == answer.prompt_tokens - fresh


def test_two_images_and_placeholders(plain, forgetful):
    chat = plain.chat([RED, BLUE])
    ids = [*chat.token_ids, *asked(plain, "Is <image> like <image>?")]
    found = chat.ask("Is <image> like <image>?", **LENGTH)
    assert found.token_ids == forgetful(plain).generate([RED, BLUE], ids, **LENGTH).token_ids


def test_an_image_later(plain, forgetful):
    chat = plain.chat(RED)
    chat.ask("What is this?", **LENGTH)
    chat.add_image(BLUE)
    assert len(chat.unseen) == 1
    ids = [*chat.token_ids, *asked(plain, "<image>\nAnd this?")]
    with counted(plain) as work:
        found = chat.ask("And this?", **LENGTH)
    assert work.images == 0, "it was encoded when it was added"
    assert found.token_ids == forgetful(plain).generate([RED, BLUE], ids, **LENGTH).token_ids
    assert chat.unseen == ()
    with pytest.raises(ImageError):
        chat.add_image("no such file.png")
    assert len(chat.pictures) == 2


def test_undo_and_reset(plain, forgetful):
    chat = plain.chat(RED)
    with pytest.raises(InputError, match="nothing to undo"):
        chat.undo()
    first = chat.ask("One?", **LENGTH)
    chat.add_image(BLUE)
    chat.ask("Two?", **LENGTH)
    gone = chat.undo()
    assert gone.question == "<image>\nTwo?"
    assert len(chat.unseen) == 1
    ids = [*chat.token_ids, *asked(plain, "<image>\nThree?")]
    assert chat.ask("Three?", **LENGTH).token_ids == forgetful(plain).generate([RED, BLUE], ids, **LENGTH).token_ids
    chat.reset()
    assert len(chat.turns) == 1
    with counted(plain) as work:
        assert chat.ask("One?", **LENGTH).token_ids == first.token_ids
    assert (work.images, work.rows) == (0, 1)


def test_text_only(plain, forgetful):
    found = plain.chat().ask("Hello", **LENGTH)
    assert found.token_ids == forgetful(plain).generate(None, "Hello", **LENGTH).token_ids
    assert found.image_tokens == 0


def test_bad_turns_change_nothing(plain):
    chat = plain.chat(RED)
    with pytest.raises(PromptError):
        chat.ask("<image> and <image>")
    with pytest.raises(InputError):
        chat.ask("ok", max_tokens=0)
    assert [turn.role for turn in chat.turns] == ["system"]
    chat.ask("ok", **LENGTH)
    with pytest.raises(PromptError, match="has 1 <image> for 0 images"):
        chat.ask("another <image>?")
    assert len(chat.turns) == 3
    with pytest.raises(InputError, match="overflow must be error or drop"):
        plain.chat(overflow="forget")


def test_an_unread_answer_is_no_turn(plain):
    chat = plain.chat(RED)
    stream = chat.stream("What colour?", **LENGTH)
    next(stream)
    stream.close()
    assert len(chat.turns) == 1
    after = chat.ask("What colour?", **LENGTH)
    assert after.token_ids == plain.chat(RED).ask("What colour?", **LENGTH).token_ids


def test_an_answer_that_a_stop_string_ends_goes_on_as_it_is_shown(plain, forgetful):
    whole = plain.chat(RED).ask("What colour?", **LENGTH).text
    stop = whole[3:6]
    chat = plain.chat(RED)
    assert chat.ask("What colour?", stop=stop, **LENGTH).text == whole[: whole.index(stop)]
    assert plain.tokenizer.decode(chat.exchanges[0].answered) == whole[: whole.index(stop)]
    ids = [*chat.token_ids, *asked(plain, "Why?")]
    assert chat.ask("Why?", **LENGTH).token_ids == forgetful(plain).generate(RED, ids, **LENGTH).token_ids


def test_chat_needs_a_tokenizer(model):
    with pytest.raises(PromptError, match="no tokenizer"):
        model("tiny").chat()


def test_system(plain):
    chat = plain.chat(system="Be brief.")
    assert chat.turns == (Turn("system", "Be brief."),)
    assert plain.chat(system="").turns == ()
    assert plain.chat(system="").ask("hi", max_tokens=1).prompt_tokens < chat.ask("hi", max_tokens=1).prompt_tokens


def short_of_context(model, monkeypatch, positions):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, context_length=positions))


def test_a_full_context_is_an_error(plain, monkeypatch):
    chat = plain.chat(RED)
    positions = chat.ask("One?", **LENGTH).prompt_tokens
    short_of_context(plain, monkeypatch, positions + 12)
    with pytest.raises(ContextLengthError):
        chat.ask("And then?", **LENGTH)
    assert len(chat.turns) == 3


def test_a_full_context_drops_the_oldest_turns_without_images(plain, forgetful, monkeypatch):
    chat = plain.chat(RED, overflow="drop")
    short_of_context(plain, monkeypatch, 130)
    for number in range(8):
        ids_before = chat.exchanges
        answer = chat.ask(f"Question {number}?", **LENGTH)
        assert answer.prompt_tokens + 10 <= 130
        assert answer.image_tokens == 16, "the picture stays"
        assert answer.finish_reason == "length"
        assert len(answer.token_ids) == 10
    assert len(ids_before) < 8
    said = [exchange.question for exchange in chat.exchanges]
    assert said[0] == "<image>\nQuestion 0?"
    assert said[1:] == [f"Question {n}?" for n in range(9 - len(said), 8)]
    ids = [*chat.token_ids, *asked(plain, "Last?")]
    room = len(ids) + 15 + 10 <= 130
    found = chat.ask("Last?", **LENGTH)
    if room:
        assert found.token_ids == forgetful(plain).generate(RED, ids, **LENGTH).token_ids
    with pytest.raises(ContextLengthError):
        chat.ask("word " * 200, **LENGTH)


def test_saved_and_loaded(plain, tmp_path):
    chat, path = plain.chat(RED, system="Be brief.", overflow="drop"), tmp_path / "talk.json"
    chat.ask("One?", **LENGTH)
    chat.add_image(BLUE)
    chat.save(path)
    plain.clear_cache()
    other = plain.load_chat(path)
    assert (other.turns, other.token_ids, other.overflow) == (chat.turns, chat.token_ids, "drop")
    assert [p.digest for p in other.unseen] == [p.digest for p in chat.unseen]
    assert other.ask("Two?", **LENGTH).token_ids == chat.ask("Two?", **LENGTH).token_ids
    other.reset()
    assert [p.digest for p in other.unseen] == [p.digest for p in chat.first]


def test_bad_files_are_told(plain, tmp_path):
    path = tmp_path / "talk.json"
    chat = plain.chat(RED)
    chat.ask("One?", max_tokens=2)
    chat.save(path)
    right = json.loads(path.read_text())
    name = next(iter(right["png"]))
    wrong = {
        "no conversation": {"fastvlm_chat": 2},
        "another tokenizer": {"tokenizer": "0"},
        "damaged": {"exchanges": [{}]},
        "is damaged .*cannot identify": {"png": {name: right["png"][name][:40]}},
        "is damaged": {"png": {}},
    }
    for message, change in wrong.items():
        path.write_text(json.dumps(right | change))
        with pytest.raises(InputError, match=message):
            plain.load_chat(path)
    path.write_text("{")
    with pytest.raises(InputError, match="can't read"):
        plain.load_chat(path)
    with pytest.raises(InputError, match="there is no conversation"):
        plain.load_chat(tmp_path / "none.json")


@pytest.mark.parametrize("seed", range(100))
def test_random_conversations_equal_those_from_scratch(speaking_model, forgetful, seed):
    """Questions, images, undo, reset and forgotten caches, in any order."""
    dice, scratch = random.Random(seed), forgetful(speaking_model)
    images = [RED, BLUE, np.random.default_rng(1).integers(0, 256, (40, 70, 3), np.uint8)]
    chat = speaking_model.chat(dice.sample(images, dice.randrange(3)), resolution=128)
    for _ in range(5):
        what = dice.random()
        if what < 0.15 and chat.exchanges:
            chat.undo()
        elif what < 0.25:
            chat.reset()
        elif what < 0.4 and len(chat.pictures) + len(chat.unseen) < 3:
            chat.add_image(dice.choice(images))
        elif what < 0.5:
            speaking_model.clear_cache()
        places = "<image> " * len(chat.unseen) if dice.random() < 0.5 else ""
        question = f"{dice.choice('abc')}? {places}{dice.randrange(3)}"
        shown = [*chat.pictures, *chat.unseen]
        text = question if places else "<image>\n" * len(chat.unseen) + question
        ids = [*chat.token_ids, *asked(speaking_model, text)]
        found = chat.ask(question, max_tokens=3, ignore_eos=True)
        right = scratch.generate([p.make_pixels() for p in shown], ids, max_tokens=3, ignore_eos=True, resolution=128)
        assert found.token_ids == right.token_ids
