"""Conversations are right at every turn: each equals the same ids asked from scratch, and computes only what is new."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.errors import ImageError, InputError, PromptError
from fastvlm_mlx.prompt import Turn
from support.chats import BLUE, LENGTH, RED, asked, from_scratch, short_of_context
from support.work import counted


@pytest.fixture
def plain(speaking_model):
    speaking_model.clear_cache()
    return speaking_model


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


def test_undo_takes_back_images_that_no_question_has_shown(plain, forgetful):
    chat = plain.chat(RED)
    chat.add_image(BLUE)
    assert chat.undo() is None
    assert len(chat.unseen) == 1, "what it began with stays"
    with pytest.raises(InputError, match="nothing to undo"):
        chat.undo()
    chat.ask("One?", **LENGTH)
    chat.add_image(BLUE)
    chat.add_image(BLUE)
    assert chat.undo() is None
    assert (chat.unseen, len(chat.exchanges)) == ((), 1)
    chat.add_image(BLUE)
    chat.ask("Two?", **LENGTH)
    assert chat.undo().question == "<image>\nTwo?"
    assert chat.undo() is None, "the picture that it brought back can go as well"
    assert chat.ask("Two?", **LENGTH).token_ids == from_scratch(chat, forgetful(plain), **LENGTH).token_ids
    assert chat.pictures == chat.first
    for question in ("Two?", "<image>\nOne?"):
        assert chat.undo().question == question
    assert chat.unseen == chat.first


def test_an_image_is_only_read_where_no_rows_are_kept(plain, forgetful):
    bare = forgetful(plain)
    chat = bare.chat()
    with counted(bare) as work:
        chat.add_image(RED)
    assert (work.images, work.rows) == (0, 0)


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


def test_nothing_else_changes_while_an_answer_is_streamed(plain):
    chat = plain.chat(RED)
    chat.ask("One?", **LENGTH)
    stream, waiting = chat.stream("Two?", **LENGTH), chat.stream("Three?", **LENGTH)
    next(stream)
    before = (chat.exchanges, chat.unseen)
    changes = [lambda: chat.add_image(BLUE), chat.undo, chat.reset, lambda: chat.ask("Four?"), lambda: next(waiting)]
    for change in changes:
        with pytest.raises(InputError, match="is being streamed; read that stream to its end or close it first"):
            change()
        assert (chat.exchanges, chat.unseen) == before
    right = plain.chat(RED)
    right.ask("One?", **LENGTH)
    assert [*stream][-1].result.token_ids == right.ask("Two?", **LENGTH).token_ids
    assert [exchange.question for exchange in chat.exchanges] == ["<image>\nOne?", "Two?"]
    chat.add_image(BLUE)


def test_a_stream_that_is_given_up_is_no_longer_open(plain, monkeypatch):
    chat = plain.chat(RED)
    stream = chat.stream("One?", **LENGTH)
    chat.add_image(BLUE)  # it hasn't begun
    next(stream)
    stream.close()
    chat.undo()
    stream = chat.stream("One?", **LENGTH)
    next(stream)
    del stream
    gc.collect()
    chat.reset()
    for piece in (stream := chat.stream("One?", **LENGTH)):
        if piece.result:
            break  # the last piece: nothing is left to close
    chat.ask("Two?", **LENGTH)
    stream.close()

    def interrupted(pieces):
        next(pieces)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastvlm_mlx.chat.last_result", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:
            chat.ask("Three?", **LENGTH)
    assert chat.ask("Three?", **LENGTH), f"{kept} has the frame that read it"
    assert len(chat.exchanges) == 3


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


@pytest.mark.parametrize("seed", range(100))
def test_random_conversations_equal_those_from_scratch(speaking_model, forgetful, seed, monkeypatch, tmp_path):
    """Questions, images, undo, reset, forgotten caches, a full context and files, in any order."""
    dice, scratch, overflow = random.Random(seed), forgetful(speaking_model), "error"
    images = [RED, BLUE, np.random.default_rng(1).integers(0, 256, (40, 70, 3), np.uint8)]
    if seed % 2:
        short_of_context(speaking_model, monkeypatch, dice.randrange(80, 140))
        overflow = "drop"
    chat = speaking_model.chat(dice.sample(images, dice.randrange(3)), resolution=128, overflow=overflow)
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
        elif what < 0.6:
            chat.save(tmp_path / "talk.json")
            chat = speaking_model.load_chat(tmp_path / "talk.json")
        places = "<image> " * len(chat.unseen) if dice.random() < 0.5 else ""
        question, before = f"{dice.choice('abc')}? {places}{dice.randrange(3)}", (*chat.exchanges,)
        text = question if places else "<image>\n" * len(chat.unseen) + question
        ids = asked(speaking_model, text)
        found = chat.ask(question, max_tokens=3, ignore_eos=True)
        assert chat.exchanges[:-1] == before
        assert chat.exchanges[-1].asked == tuple(ids)
        assert overflow == "drop" or chat.left_out == ()
        right = from_scratch(chat, scratch, max_tokens=3, ignore_eos=True, resolution=128)
        assert found.token_ids == right.token_ids
