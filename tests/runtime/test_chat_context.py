"""A conversation that no longer fits the context: what a question does without, and that nothing is forgotten."""

from __future__ import annotations

import pytest

from fastvlm_mlx.errors import ContextLengthError
from support.chats import BLUE, LENGTH, RED, from_scratch, short_of_context, size_of

CONTEXT = 160
ROOM = CONTEXT - LENGTH["max_tokens"]  # for a prompt


@pytest.fixture
def plain(speaking_model, forgetful):
    forgetful(speaking_model)  # made before anything shortens the context
    speaking_model.clear_cache()
    return speaking_model


def check_choice(model, chat, answer, most):
    """What the last question did without is the oldest, pictures last, and no more than had to go.

    Args:
        answer: to that question.
        most: positions that its prompt may take.
    """
    before, out = chat.exchanges[:-1], chat.left_out
    sizes = [size_of(model, exchange) for exchange in before]
    own = answer.prompt_tokens - sum(size for number, size in enumerate(sizes) if number not in out)
    texts = [number for number, exchange in enumerate(before) if not exchange.pictures]
    pictured = [number for number, exchange in enumerate(before) if exchange.pictures]
    gone_texts, gone_pictured = ([n for n in kind if n in out] for kind in (texts, pictured))
    assert answer.prompt_tokens <= most
    assert gone_texts == texts[: len(gone_texts)], "the oldest"
    assert gone_pictured == pictured[: len(gone_pictured)], "the oldest"
    if gone_texts:
        assert answer.prompt_tokens + sizes[gone_texts[-1]] > most, "one question more would fit"
    if gone_pictured:
        assert own + sum(sizes[n] for n in [*pictured[len(gone_pictured) - 1 :]]) > most, "questions without go first"


def add_images(chat, count):
    for _ in range(count):
        chat.add_image(BLUE)


def test_a_full_context_is_an_error(plain, monkeypatch):
    chat = plain.chat(RED)
    positions = chat.ask("One?", **LENGTH).prompt_tokens
    short_of_context(plain, monkeypatch, positions + 12)
    with pytest.raises(ContextLengthError):
        chat.ask("And then?", **LENGTH)
    with pytest.raises(ContextLengthError):
        chat.add_image(BLUE)
    assert len(chat.turns) == 3


def test_drop_does_without_the_oldest_questions_that_show_no_image(plain, forgetful, monkeypatch):
    chat, left_out = plain.chat(RED, overflow="drop"), []
    short_of_context(plain, monkeypatch, CONTEXT)
    for number in range(9):
        answer = chat.ask(f"Question {number}?", **LENGTH)
        assert answer.token_ids == from_scratch(chat, forgetful(plain), **LENGTH).token_ids
        check_choice(plain, chat, answer, ROOM)
        assert answer.image_tokens == 16, "the picture stays"
        assert len(answer.token_ids) == 10
        left_out.append(len(chat.left_out))
    assert left_out[0] == 0
    assert left_out[-1] >= 3
    assert [exchange.question for exchange in chat.exchanges[1:]] == [f"Question {n}?" for n in range(1, 9)]
    before = (chat.exchanges, chat.left_out)
    with pytest.raises(ContextLengthError):
        chat.ask("word " * 200, **LENGTH)
    assert (chat.exchanges, chat.left_out) == before


def test_an_answer_of_any_length_keeps_a_quarter_of_the_context_at_most(plain, forgetful, monkeypatch):
    chat = plain.chat(overflow="drop")
    chat.ask("One?", **LENGTH)
    used = chat.ask("Two?", **LENGTH).prompt_tokens
    context = 4 * used
    short_of_context(plain, monkeypatch, context)
    long = {"max_tokens": context, "ignore_eos": True}
    answer = chat.ask("Three?", **long)
    assert chat.left_out == (), "there was room"
    assert answer.generation_tokens == context - answer.prompt_tokens
    right = from_scratch(chat, forgetful(plain), max_tokens=20, ignore_eos=True)
    assert answer.token_ids[:20] == right.token_ids
    chat.undo()
    while not chat.left_out:
        answer = chat.ask("And?", **LENGTH)
    check_choice(plain, chat, answer, context - 10)
    chat.undo()
    answer = chat.ask("And?", **long)
    check_choice(plain, chat, answer, context - context // 4)


def test_max_kv_size_counts_like_the_context(plain, forgetful):
    chat, options = plain.chat(overflow="drop"), {**LENGTH, "max_kv_size": 100}
    for _ in range(6):
        answer = chat.ask("And?", **options)
        check_choice(plain, chat, answer, 90)
        assert answer.token_ids == from_scratch(chat, forgetful(plain), **options).token_ids
    assert chat.left_out


def test_an_image_makes_room_for_itself(plain, forgetful, monkeypatch):
    chat = plain.chat(overflow="drop")
    short_of_context(plain, monkeypatch, CONTEXT)
    while not chat.left_out:
        chat.ask("And?", **LENGTH)
    chat.add_image(RED)
    assert len(chat.left_out) >= 1
    answer = chat.ask("And this?", **LENGTH)
    assert answer.image_tokens == 16
    assert answer.token_ids == from_scratch(chat, forgetful(plain), **LENGTH).token_ids
    check_choice(plain, chat, answer, ROOM)
    with pytest.raises(ContextLengthError):
        add_images(chat, 9)  # all of them are for the next question
    assert len(chat.unseen) in range(1, 9)


def test_an_image_with_every_question(plain, forgetful, monkeypatch):
    chat, left_out = plain.chat(overflow="drop"), set()
    short_of_context(plain, monkeypatch, CONTEXT)
    for number in range(9):
        if number % 3:
            chat.add_image((RED, BLUE)[number % 2])
        answer = chat.ask(f"Question {number}?", **LENGTH)
        assert answer.token_ids == from_scratch(chat, forgetful(plain), **LENGTH).token_ids
        check_choice(plain, chat, answer, ROOM)
        left_out |= {bool(chat.exchanges[n].pictures) for n in chat.left_out}
    assert left_out == {True, False}
    assert len(chat.pictures) == 6


def test_nothing_that_is_left_out_is_forgotten(plain, monkeypatch, tmp_path):
    chat, states = plain.chat(RED, overflow="drop"), []
    short_of_context(plain, monkeypatch, CONTEXT)
    for number in range(7):
        states.append((chat.exchanges, chat.unseen, chat.token_ids))
        if number == 3:
            chat.add_image(BLUE)
        chat.ask(f"Question {number}?", **LENGTH)
    assert chat.left_out
    chat.save(tmp_path / "talk.json")
    assert len(chat.token_ids) > CONTEXT
    other = plain.load_chat(tmp_path / "talk.json")
    assert (other.turns, other.token_ids) == (chat.turns, chat.token_ids)
    for exchanges, unseen, ids in reversed(states):
        chat.undo()
        if len(states) > len(chat.exchanges) == 3:
            chat.undo()  # its picture
        assert (chat.exchanges, chat.unseen, chat.token_ids) == (exchanges, unseen, ids)
        assert chat.left_out == ()
