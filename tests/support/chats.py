"""What the tests of conversations share: pictures, and the ids of a question by other means than the chat's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from fastvlm_mlx import FastVLM, GenerationResult
from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.chat import Chat, Exchange
from fastvlm_mlx.prompt import Turn, tokenize

RED, BLUE = (np.full((80, 60, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
LENGTH = {"max_tokens": 10, "ignore_eos": True}


def asked(model: FastVLM, question: str) -> list[int]:
    """Ids of a question, up to where the answer begins."""
    return tokenize([Turn("user", question), Turn("assistant", None)], model.tokenizer)


def short_of_context(model: FastVLM, patch: pytest.MonkeyPatch, positions: int) -> None:
    """Give a model a shorter context. Make a `forgetful` one before that, or it keeps it."""
    patch.setattr(model, "config", dataclasses.replace(model.config, context_length=positions))


def size_of(model: FastVLM, exchange: Exchange) -> int:
    """Positions of a question and its answer."""
    ids = [*exchange.asked, *exchange.answered, *prompts.end_of_turn(model.tokenizer)]
    return len(ids) + sum(picture.tokens - 1 for picture in exchange.pictures)


def from_scratch(chat: Chat, scratch: FastVLM, **options: object) -> GenerationResult:
    """The last answer of a chat, of a model that knows nothing but the ids of what wasn't left out."""
    *before, last = chat.exchanges
    shown = [exchange for number, exchange in enumerate(before) if number not in chat.left_out]
    return scratch.generate(pixels_of([*shown, last]), [*ids_of(scratch, chat, shown), *last.asked], **options)


def ids_of(model: FastVLM, chat: Chat, shown: Sequence[Exchange]) -> list[int]:
    """The system turn and some questions with their answers."""
    ids = tokenize(chat.system, model.tokenizer) if chat.system else []
    for exchange in shown:
        ids += [*exchange.asked, *exchange.answered, *prompts.end_of_turn(model.tokenizer)]
    return ids


def pixels_of(exchanges: Sequence[Exchange]) -> list[np.ndarray]:
    """Their pictures, at the encoder's size."""
    return [picture.make_pixels() for exchange in exchanges for picture in exchange.pictures]
