"""From a question to positions: ChatML, image placeholders, and what each position of the decoder holds.

An image is expanded to its tokens before anything else looks at the prompt, so that lengths, caches and
counts all speak of positions.
Source of the template: apple/ml-fastvlm 592b4ad, llava/conversation.py (`qwen_2`) and llava/mm_utils.py
(`tokenizer_image_token`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fastvlm_mlx.errors import ContextLengthError, PromptError
from fastvlm_mlx.tokenizer import Tokenizer
from fastvlm_mlx.types import IMAGE_TOKEN_ID

DEFAULT_SYSTEM = "You are a helpful assistant."
PLACEHOLDER = "<image>"
START, END = "<|im_start|>", "<|im_end|>"
STOP_TOKENS = (END, "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `text` is None for the answer that is to be generated."""

    role: str  # "system", "user" or "assistant"
    text: str | None


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Consecutive positions that hold tokens."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Consecutive positions that hold the tokens of one image."""

    index: int  # which of the prompt's images
    tokens: int

    def __len__(self) -> int:
        return self.tokens


Span: TypeAlias = TextSpan | ImageSpan


def ask(question: str, images: int, system: str | None = None) -> list[Turn]:
    """The turns of a single question.

    Args:
        question: the user's text; `<image>` places an image. Without any, the images come first, each on a
            line of its own.
        images: how many images there are.
        system: replaces the default system prompt; "" leaves the system turn out.

    Raises:
        PromptError: as many `<image>` as images are needed, or none.
    """
    return [*system_turn(system), Turn("user", place_images(question, images)), Turn("assistant", None)]


def system_turn(system: str | None) -> list[Turn]:
    """The system turn, if there is to be one."""
    text = DEFAULT_SYSTEM if system is None else system
    return [Turn("system", text)] if text else []


def place_images(text: str, images: int) -> str:
    """Put the missing placeholders before the text, each on a line of its own."""
    found = text.count(PLACEHOLDER)
    if found == images:
        return text
    if found == 0:
        return f"{PLACEHOLDER}\n" * images + text
    raise PromptError(_count_message(found, images))


def _count_message(found: int, images: int) -> str:
    return (
        f"the prompt has {found} {PLACEHOLDER} for {images} image{'s' * (images != 1)}; "
        f"write one {PLACEHOLDER} for each, or none to put the images first"
    )


def tokenize(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation in ChatML, -200 for each image.

    Special tokens come from the template only: text that spells one is tokenised as text. Text between them
    is tokenised in one piece with the role line, as the official code does, so that merges are the same.
    """
    start, end = tokenizer.special_id(START), tokenizer.special_id(END)
    ids: list[int] = []
    pending = ""  # text since the last special token

    def flush(images: bool = False) -> None:
        nonlocal pending
        chunks = pending.split(PLACEHOLDER) if images else [pending]
        for i, chunk in enumerate(chunks):
            ids.extend(([IMAGE_TOKEN_ID] if i else []) + (tokenizer.encode(chunk) if chunk else []))
        pending = ""

    for turn in turns:
        flush()
        ids.append(start)
        pending = f"{turn.role}\n"
        if turn.text is not None:
            pending += turn.text
            flush(images=turn.role == "user")  # an answer that spells <image> shows none
            ids.append(end)
            pending = "\n"
    flush()
    return ids


def end_of_turn(tokenizer: Tokenizer) -> list[int]:
    """Ids between a turn's text and the next turn."""
    return [tokenizer.special_id(END), *tokenizer.encode("\n")]


def expand(ids: Sequence[int], image_tokens: Sequence[int], vocab_size: int) -> tuple[Span, ...]:
    """Turn ids with -200 for images into spans of positions.

    Args:
        ids: token ids in [0, vocab_size) and -200 for images, in order.
        image_tokens: the number of tokens of each image.
        vocab_size: rows of the decoder's embedding.

    Raises:
        PromptError: another number of -200 than images, an id out of range, or nothing at all.
    """
    found = sum(1 for token in ids if token == IMAGE_TOKEN_ID)
    if found != len(image_tokens):
        raise PromptError(
            f"the prompt's ids have {found} image sentinels ({IMAGE_TOKEN_ID}) "
            f"for {len(image_tokens)} images; put one for each image"
        )
    if not ids:
        raise PromptError("the prompt is empty; give a question or at least one token id")
    for token in ids:
        if token != IMAGE_TOKEN_ID and not 0 <= token < vocab_size:
            raise PromptError(f"token id {token} is out of range; expected 0 to {vocab_size - 1}, or {IMAGE_TOKEN_ID}")
    spans: list[Span] = []
    run: list[int] = []
    image = 0
    for token in ids:
        if token != IMAGE_TOKEN_ID:
            run.append(int(token))
            continue
        if run:
            spans.append(TextSpan(tuple(run)))
            run = []
        spans.append(ImageSpan(image, image_tokens[image]))
        image += 1
    if run:
        spans.append(TextSpan(tuple(run)))
    return tuple(spans)


def count(spans: Sequence[Span]) -> tuple[int, int]:
    """Positions in all, and how many of them are image positions."""
    images = sum(len(span) for span in spans if isinstance(span, ImageSpan))
    return sum(len(span) for span in spans), images


def check_context(spans: Sequence[Span], context_length: int) -> int:
    """Positions that are left for the answer.

    Raises:
        ContextLengthError: none is left.
    """
    total, images = count(spans)
    if total >= context_length:
        raise ContextLengthError(
            f"the prompt has {total} positions ({images} of them image tokens), the model's context is "
            f"{context_length} and the answer needs some; shorten the text or lower the resolution"
        )
    return context_length - total
