"""Conversations are right at every turn: each equals the same prompt asked from scratch."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm_mlx.errors import InputError, PromptError
from fastvlm_mlx.prompt import Turn, tokenize

RED, BLUE = (np.full((80, 60, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
LENGTH = {"max_tokens": 10, "ignore_eos": True}


def from_scratch(model, images, *turns):
    """The same conversation as one prompt of ids."""
    ids = tokenize([Turn("system", "You are a helpful assistant."), *turns, Turn("assistant", None)], model.tokenizer)
    return model.generate(images, ids, **LENGTH)


def test_three_turns(speaking_model):
    chat = speaking_model.chat(RED)
    first = chat.ask("What colour?", **LENGTH)
    turns = [Turn("user", "<image>\nWhat colour?")]
    assert first.token_ids == from_scratch(speaking_model, RED, *turns).token_ids
    for question in ("Are you sure?", "Why?"):
        turns += [Turn("assistant", chat.turns[-1].text), Turn("user", question)]
        answer = chat.ask(question, **LENGTH)
        assert answer.token_ids == from_scratch(speaking_model, RED, *turns).token_ids
        assert answer.image_tokens == 16
    assert [turn.role for turn in chat.turns] == ["system", *["user", "assistant"] * 3]


def test_the_image_is_encoded_once(speaking_model, monkeypatch):
    encoder = speaking_model._encoder
    calls = []
    real = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda pixels: calls.append(pixels.shape) or real(pixels))
    chat = speaking_model.chat([RED, BLUE])
    for question in ("one", "two", "three"):
        chat.ask(question, max_tokens=2)
    assert calls == [(1, 256, 256, 3)] * 2


def test_two_images_and_placeholders(speaking_model):
    chat = speaking_model.chat([RED, BLUE])
    found = chat.ask("Is <image> like <image>?", **LENGTH)
    turn = Turn("user", "Is <image> like <image>?")
    assert found.token_ids == from_scratch(speaking_model, [RED, BLUE], turn).token_ids


def test_text_only(speaking_model):
    chat = speaking_model.chat()
    found = chat.ask("Hello", **LENGTH)
    assert found.token_ids == from_scratch(speaking_model, None, Turn("user", "Hello")).token_ids
    assert found.image_tokens == 0


def test_bad_turns_change_nothing(speaking_model):
    chat = speaking_model.chat(RED)
    with pytest.raises(PromptError):
        chat.ask("<image> and <image>")
    with pytest.raises(InputError):
        chat.ask("ok", max_tokens=0)
    assert [turn.role for turn in chat.turns] == ["system"]
    chat.ask("ok", **LENGTH)
    with pytest.raises(PromptError, match="has 1 <image> for 0 images"):
        chat.ask("another <image>?")
    assert len(chat.turns) == 3


def test_an_unread_answer_is_no_turn(speaking_model):
    chat = speaking_model.chat(RED)
    stream = chat.stream("What colour?", **LENGTH)
    next(stream)
    stream.close()
    assert len(chat.turns) == 1
    after = chat.ask("What colour?", **LENGTH)
    assert after.token_ids == speaking_model.chat(RED).ask("What colour?", **LENGTH).token_ids


def test_chat_needs_a_tokenizer(model):
    with pytest.raises(PromptError, match="no tokenizer"):
        model("tiny").chat().ask("hi")


def test_system(speaking_model):
    chat = speaking_model.chat(system="Be brief.")
    assert chat.turns == (Turn("system", "Be brief."),)
    assert speaking_model.chat(system="").turns == ()
