"""A conversation: every turn is computed once, and every question sees all turns before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, get_args

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.answer import last_result
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.prompt import Turn
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import IMAGE_TOKEN_ID, GenerationOptions, GenerationResult, OptionArgs, Piece

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.pictures import Picture
    from fastvlm_mlx.types import ImageInput

Overflow = Literal["error", "drop"]
OVERFLOWS: tuple[str, ...] = get_args(Overflow)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: with `<image>` for each picture.
        pictures: that it shows, in order.
        asked: ids from the beginning of the user's turn to where the answer begins, -200 for each picture.
        answer: the text.
        answered: the answer's ids as they were generated, without the one that ended it.
    """

    question: str
    pictures: tuple[Picture, ...]
    asked: tuple[int, ...]
    answer: str
    answered: tuple[int, ...]


class Chat:
    """Made by `FastVLM.chat`. A turn counts once it is answered to the end.

    Attributes:
        exchanges: questions and answers so far; replaced, never changed.
        unseen: pictures that the next question shows.
        first: those that it began with.
    """

    def __init__(
        self,
        model: FastVLM,
        images: Sequence[ImageInput] = (),
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        overflow: str = "error",
    ) -> None:
        if overflow not in OVERFLOWS:
            raise InputError(f"overflow must be {' or '.join(OVERFLOWS)}, got {overflow!r}")
        self._model, self._view, self.overflow = model, (resolution, aspect), overflow
        self.system = prompts.system_turn(system)
        self._tokenizer = model.required_tokenizer()
        self._opening = model.tokenize(self.system) if self.system else []
        self._turn_end = prompts.end_of_turn(self._tokenizer)
        self.exchanges: tuple[Exchange, ...] = ()
        self.unseen: tuple[Picture, ...] = ()
        for image in images:
            self.add_image(image)
        self.first: tuple[Picture, ...] = self.unseen

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said so far, the system turn included."""
        said = [t for e in self.exchanges for t in (Turn("user", e.question), Turn("assistant", e.answer))]
        return (*self.system, *said)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The conversation as ids, -200 for each picture: answers as they were generated, not tokenised again."""
        return tuple(self._ids(self.exchanges))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures that were shown so far, in order."""
        return tuple(_pictures(self.exchanges))

    @property
    def tokenizer_digest(self) -> str:
        """Of the tokenizer whose ids these are."""
        return self._tokenizer.digest

    def add_image(self, image: ImageInput) -> None:
        """Add an image, which the next question shows; it is encoded now, while that one is being thought of.

        Raises:
            ImageError: as `FastVLM.generate`. EncoderError: the bundle has no vision weights.
        """
        self.show(self._model.open_images([image], *self._view, Clock())[0])

    def show(self, picture: Picture) -> None:
        """Add a picture of `FastVLM.open_images`; see `add_image`."""
        unseen = (*self.unseen, picture)
        opening = prompts.place_images("", len(unseen)).removesuffix("\n")
        ids = [*self._ids(self.exchanges), *self._model.tokenize([Turn("user", opening)])]
        after_last = len(ids) - ids[::-1].index(IMAGE_TOKEN_ID)
        pictures = (*self.pictures, *unseen)
        spans = self._model.expand(ids[:after_last], [p.tokens for p in pictures])
        self._model.look(spans, pictures)
        self.unseen = unseen

    def ask(self, question: str, **options: Unpack[OptionArgs]) -> GenerationResult:
        """Ask, and wait for the whole answer.

        Args:
            question: shows the images that no question has shown yet, where `<image>` stands or before its text.
            **options: as in `FastVLM.generate`.

        Raises:
            PromptError: placeholders and images differ. ContextLengthError: the conversation is too long;
                InputError: an option is out of range. The conversation is then as before.
        """
        return last_result(self.stream(question, **options))

    def stream(self, question: str, **options: Unpack[OptionArgs]) -> Iterator[Piece]:
        """`ask`, piece by piece. An answer that isn't read to its end leaves the conversation as it was."""
        chosen = GenerationOptions(**options)
        clock = self._model.start_clock()
        question = prompts.place_images(question, len(self.unseen))
        asked = self._model.tokenize([Turn("user", question), Turn("assistant", None)])
        kept, unseen = self._fitting(asked, chosen.max_tokens), self.unseen
        pictures = [*_pictures(kept), *unseen]
        spans = self._model.expand([*self._ids(kept), *asked], [p.tokens for p in pictures])
        clock.tokenize = clock.watch.lap()
        for piece in self._model.answer(spans, pictures, chosen, clock):
            if piece.result:
                answered = self._answered(piece.result, chosen)
                new = Exchange(question, unseen, tuple(asked), piece.result.text, answered)
                self.exchanges, self.unseen = (*kept, new), ()
            yield piece

    def undo(self) -> Exchange:
        """Take the last question and its answer back; its images are shown by the next question.

        Raises:
            InputError: nothing was said yet.
        """
        if not self.exchanges:
            raise InputError("there is nothing to undo: nothing was said yet")
        *before, last = self.exchanges
        self.exchanges, self.unseen = tuple(before), (*last.pictures, *self.unseen)
        return last

    def reset(self) -> None:
        """Begin anew, with the images that the conversation began with."""
        self.exchanges, self.unseen = (), self.first

    def save(self, path: str | PathLike[str]) -> None:
        """Write the conversation, with the pictures as the model sees them, for `FastVLM.load_chat`."""
        from fastvlm_mlx.chat_file import write_chat

        write_chat(Path(path), self)

    def _ids(self, exchanges: Sequence[Exchange]) -> list[int]:
        ids = list(self._opening)
        for exchange in exchanges:
            ids += [*exchange.asked, *exchange.answered, *self._turn_end]
        return ids

    def _fitting(self, asked: Sequence[int], max_tokens: int) -> tuple[Exchange, ...]:
        """The exchanges that go before a question: all, or without the oldest that show no picture."""
        kept = list(self.exchanges)
        room = self._model.config.context_length - max_tokens - self._positions(asked, self.unseen)
        while self.overflow == "drop" and self._positions(self._ids(kept), _pictures(kept)) > room:
            oldest = next((index for index, exchange in enumerate(kept) if not exchange.pictures), None)
            if oldest is None:
                break
            del kept[oldest]
        return tuple(kept)

    def _answered(self, result: GenerationResult, options: GenerationOptions) -> tuple[int, ...]:
        """An answer's ids as they were generated, or of its text where a stop string cut it."""
        ids = result.token_ids
        if not options.ignore_eos and ids[-1] in self._model.stop_ids:
            return ids[:-1]
        cut = options.stop and self._tokenizer.decode(ids) != result.text
        return tuple(self._tokenizer.encode(result.text)) if cut else ids

    @staticmethod
    def _positions(ids: Sequence[int], pictures: Sequence[Picture]) -> int:
        return len(ids) + sum(picture.tokens - 1 for picture in pictures)


def _pictures(exchanges: Sequence[Exchange]) -> list[Picture]:
    return [picture for exchange in exchanges for picture in exchange.pictures]
