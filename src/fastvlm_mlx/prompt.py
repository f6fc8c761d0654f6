"""From a question to positions: its template, image placeholders, and what each position of the decoder holds.

An image is expanded to its tokens before anything else looks at the prompt, so that lengths, caches and
counts all speak of positions.
Source of how texts around images are tokenised: apple/ml-fastvlm 592b4ad, llava/mm_utils.py (`tokenizer_image_token`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fastvlm_mlx.errors import ContextLengthError, PromptError
from fastvlm_mlx.template import CHATML, Part, Special, Template
from fastvlm_mlx.tokenizer import Place, Tokenizer
from fastvlm_mlx.types import IMAGE_TOKEN_ID

PLACEHOLDER = "<image>"


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


def ask(question: str, images: int, system: str | None = None, template: Template = CHATML) -> list[Turn]:
    """The turns of a single question.

    Args:
        question: the user's text; `<image>` places an image. Without any, the images come first, each on a
            line of its own.
        images: how many images there are.
        system: replaces the default system prompt; "" leaves the system turn out.
        template: has the default.

    Raises:
        PromptError: as many `<image>` as images are needed, or none.
    """
    return [*system_turn(system, template), Turn("user", place_images(question, images)), Turn("assistant", None)]


def system_turn(system: str | None, template: Template = CHATML) -> list[Turn]:
    """The system turn, if there is to be one."""
    text = template.system if system is None else system
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


def tokenize(
    turns: Sequence[Turn], tokenizer: Tokenizer, template: Template = CHATML, after: Sequence[Turn] | None = None
) -> list[int]:
    """Ids of a conversation, or of its next turns, -200 for each image.

    Special tokens come from the template only: text that spells one is tokenised as text. Text between them and
    between images is tokenised in one piece with what the template puts around it, as the official code does, so that
    merges are the same.

    Args:
        turns: what is said.
        tokenizer: of the model.
        template: how it is written.
        after: the turns before these, whose ids are known; none of them where only the template's beginning is known.
            None begins a prompt.
    """
    writer = _Writer(tokenizer)
    if after is None:
        writer.begin(template.begin)
    elif after:
        writer.go_on(template.turns[after[-1].role].after, template.turns[after[-1].role].then)
    for turn in turns:
        style = template.turns[turn.role]
        writer.write(style.before)
        if turn.text is not None:
            writer.say(style.lead * bool(turn.text) + turn.text, images=turn.role == "user")
            writer.write(style.after)
            writer.join(style.then)
    return writer.finish()


class _Writer:
    """Collects text until a special token or an image ends it, and turns it into ids then."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._pending = ""  # text since then
        self._place: Place = "start"  # where that stands
        self._joint = ""  # before further text

    def begin(self, parts: Sequence[Special]) -> None:
        """Before everything; a text behind it still begins the prompt."""
        self._ids += [self._tokenizer.special_id(part.token) for part in parts]

    def go_on(self, parts: Sequence[Part], joint: str) -> None:
        """Behind a turn that ended with these parts."""
        self._place = "special" if parts and isinstance(parts[-1], Special) else "text"
        self._joint = joint

    def write(self, parts: Sequence[Part]) -> None:
        """What the template puts somewhere."""
        for part in parts:
            if isinstance(part, Special):
                self._flush("special")
                self._ids.append(self._tokenizer.special_id(part.token))
            else:
                self._add(part)

    def say(self, text: str, images: bool) -> None:
        """What somebody says; an answer that spells <image> shows none."""
        first, *rest = text.split(PLACEHOLDER) if images else [text]
        self._add(first)
        for chunk in rest:
            self._flush("start")
            self._ids.append(IMAGE_TOKEN_ID)
            self._add(chunk)

    def join(self, text: str) -> None:
        """Put text before whatever comes next, if anything does."""
        self._joint = text

    def finish(self) -> list[int]:
        """All ids; what would join another turn is left out."""
        self._joint = ""
        self._flush("start")
        return self._ids

    def _add(self, text: str) -> None:
        self._pending, self._joint = self._pending + self._joint + text, ""

    def _flush(self, place: Place) -> None:
        self._add("")
        if self._pending:
            self._ids += self._tokenizer.encode(self._pending, self._place)
        self._pending, self._place = "", place


def end_of_turn(tokenizer: Tokenizer, template: Template = CHATML) -> list[int]:
    """Ids between an answer's text and the next turn."""
    writer = _Writer(tokenizer)
    writer.go_on((), "")
    writer.write(template.turns["assistant"].after)
    return writer.finish()


def answer_ids(text: str, tokenizer: Tokenizer, template: Template = CHATML) -> list[int]:
    """Ids of an answer's text behind its question."""
    lead = template.turns["assistant"].lead if text else ""
    return tokenizer.encode(lead + text, "text")


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
