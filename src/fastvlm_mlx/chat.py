"""A conversation: every turn is computed once, and every question sees all turns before it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Literal, Unpack, get_args

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.answer import last_result
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.overflow import first_to_go
from fastvlm_mlx.prompt import Span, Turn
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import IMAGE_TOKEN_ID, GenerationOptions, GenerationResult, OptionArgs, Piece

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.pictures import Picture
    from fastvlm_mlx.types import ImageInput

Overflow = Literal["error", "drop"]
OVERFLOWS: tuple[str, ...] = get_args(Overflow)
ANSWER_SHARE = 4  # "drop" keeps at most this part of the context free for an answer


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

    While an answer is being streamed nothing else may change the conversation: `add_image`, `undo`, `reset` and
    another question raise InputError until that stream is read to its end, closed or forgotten.

    Attributes:
        exchanges: questions and answers so far, those that no longer fit included; replaced, never changed.
        unseen: pictures that the next question shows.
        first: those that it began with.
        overflow: "error" or "drop"; see `FastVLM.chat`.
        left_out: which of the exchanges, counted from 0, the latest question or picture did without, as all of them
            didn't fit; none after `undo`, `reset` and loading.
        view: resolution, aspect and grid of its pictures, as they were given; None is the model's.
    """

    def __init__(
        self,
        model: FastVLM,
        images: Sequence[ImageInput] = (),
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        overflow: str = "error",
        grid: str | None = None,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise InputError(f"overflow must be {' or '.join(OVERFLOWS)}, got {overflow!r}")
        model.view(resolution, aspect, grid)  # now, not with the first picture
        self._model, self.overflow = model, overflow
        self.view = None if resolution is None else int(resolution), aspect, grid
        self.system = prompts.system_turn(system, model.template)
        self._tokenizer = model.required_tokenizer()
        self._opening = model.tokenize(self.system)
        self._turn_end = prompts.end_of_turn(self._tokenizer, model.template)
        self.exchanges: tuple[Exchange, ...] = ()
        self.unseen: tuple[Picture, ...] = ()
        self.left_out: tuple[int, ...] = ()
        self._streaming = False
        self._latest = GenerationOptions()  # of the latest question: what is added before the next one is fitted alike
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

    @property
    def template(self) -> str:
        """Name of the template that the turns are written in."""
        return self._model.config.template

    def add_image(self, *images: ImageInput) -> None:
        """Add an image, or several such as the frames of a video, which the next question shows.

        They are encoded and prefilled now, while that question is being thought of; under `load(prefix_cache_bytes=0)`
        they are only read now, as there is nowhere to keep their rows.

        Raises:
            ImageError: as `FastVLM.generate`. EncoderError: the bundle has no vision weights. ContextLengthError: they
                don't fit. InputError: an answer is being streamed. The conversation is then as before.
        """
        self._check_idle()
        resolution, aspect, grid = self.view
        self.show(*self._model.open_images(images, resolution, aspect, Clock(), grid))

    def show(self, *pictures: Picture) -> None:
        """Add pictures of `FastVLM.open_images`; see `add_image`."""
        self._check_idle()
        if not pictures:
            return
        unseen = (*self.unseen, *pictures)
        opening = prompts.place_images("", len(unseen)).removesuffix("\n")
        _, left_out, spans, shown = self._prompt([Turn("user", opening)], unseen, self._latest)
        self._model.look(spans, shown)
        self.unseen, self.left_out = unseen, left_out

    def ask(self, question: str, **options: Unpack[OptionArgs]) -> GenerationResult:
        """Ask, and wait for the whole answer.

        Args:
            question: shows the images that no question has shown yet, where `<image>` stands or before its text.
            **options: as in `FastVLM.generate`.

        Raises:
            PromptError: placeholders and images differ. ContextLengthError: the conversation is too long;
                InputError: an option is out of range, or another answer is being streamed. The conversation is then
                as before.
        """
        # Closed here: a traceback that is kept, as that of Ctrl-C in an interactive session, would hold it open.
        with closing(self.stream(question, **options)) as pieces:
            return last_result(pieces)

    def stream(self, question: str, **options: Unpack[OptionArgs]) -> Generator[Piece, None, None]:
        """`ask`, piece by piece. An answer that isn't read to its end leaves the conversation as it was."""
        self._check_idle()
        chosen = GenerationOptions(**options)
        clock = self._model.start_clock()
        question, unseen = prompts.place_images(question, len(self.unseen)), self.unseen
        asked, left_out, spans, pictures = self._prompt(_turns(question), unseen, chosen)
        clock.tokenize = clock.watch.lap()
        self._streaming, self._latest = True, chosen
        try:
            for piece in self._model.answer(spans, pictures, chosen, clock):
                if not piece.result:
                    yield piece
        finally:
            self._streaming = False
        assert piece.result
        answered = self._answered(piece.result, chosen)
        new = Exchange(question, unseen, tuple(asked), piece.result.text, answered)
        self.exchanges, self.unseen, self.left_out = (*self.exchanges, new), (), left_out
        yield piece  # last of all: whoever stops here needn't close anything

    def undo(self) -> Exchange | None:
        """Take back the images that were added since the last question, or else that question and its answer.

        The images of a question that is taken back are shown by the next one, or taken back by the next `undo`.
        Those that the conversation began with stay.

        Returns:
            The question and its answer; None where images were taken back.

        Raises:
            InputError: nothing was said or added yet, or an answer is being streamed.
        """
        self._check_idle()
        kept = () if self.exchanges else self.first
        if len(self.unseen) > len(kept):
            self.unseen, self.left_out = kept, ()
            return None
        if not self.exchanges:
            raise InputError("there is nothing to undo: nothing was said or added yet")
        *before, last = self.exchanges
        self.exchanges, self.unseen, self.left_out = tuple(before), last.pictures, ()
        return last

    def reset(self) -> None:
        """Begin anew, with the images that the conversation began with.

        Raises:
            InputError: an answer is being streamed.
        """
        self._check_idle()
        self.exchanges, self.unseen, self.left_out = (), self.first, ()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the conversation, with the pictures as the model sees them, for `FastVLM.load_chat`.

        Args:
            path: of the file; `~` is the home folder, folders that are missing are made.

        Raises:
            InputError: it can't be written there.
        """
        from fastvlm_mlx.chat_file import write_chat
        from fastvlm_mlx.files import file_at

        write_chat(file_at(path), self)

    def _check_idle(self) -> None:
        if self._streaming:
            raise InputError("an answer of this chat is being streamed; read that stream to its end or close it first")

    def _prompt(
        self, turns: Sequence[Turn], unseen: Sequence[Picture], options: GenerationOptions
    ) -> tuple[list[int], tuple[int, ...], tuple[Span, ...], list[Picture]]:
        """What a question is asked with: its ids, the exchanges that are left out, the positions, their pictures.

        Args:
            turns: the question, or its beginning up to its last image.
            unseen: the pictures that it shows.
            options: say how much the answer needs.
        """
        asked = here = self._tokenize(turns, first=not self.exchanges)
        left_out = self._overflowing(self._positions(asked, unseen), options)
        shown = [exchange for number, exchange in enumerate(self.exchanges) if number not in set(left_out)]
        if self.exchanges and not shown:
            here = self._tokenize(turns, first=True)
        pictures = [*_pictures(shown), *unseen]
        return asked, left_out, self._model.expand([*self._ids(shown), *here], [p.tokens for p in pictures]), pictures

    def _tokenize(self, turns: Sequence[Turn], first: bool) -> list[int]:
        """Ids of a question, or of its beginning up to its last image, as the first one or behind an answer."""
        ids = self._model.tokenize(turns, self.system if first else [Turn("assistant", "")])
        return ids if turns[-1].text is None else ids[: len(ids) - ids[::-1].index(IMAGE_TOKEN_ID)]

    def _ids(self, exchanges: Sequence[Exchange]) -> list[int]:
        ids = list(self._opening)
        for number, exchange in enumerate(exchanges):
            moved = number == 0 and exchange is not self.exchanges[0]  # what was before it is left out
            asked = self._tokenize(_turns(exchange.question), first=True) if moved else exchange.asked
            ids += [*asked, *exchange.answered, *self._turn_end]
        return ids

    def _overflowing(self, positions: int, options: GenerationOptions) -> tuple[int, ...]:
        """Numbers of the exchanges that have to be left out of a question that takes so many positions."""
        if self.overflow != "drop":
            return ()
        context = self._model.config.context_length
        length = min(context, options.max_kv_size or context)
        room = length - min(options.max_tokens, max(length // ANSWER_SHARE, 1))
        ends = len(self._turn_end)
        sizes = [self._positions(e.asked, e.pictures) + len(e.answered) + ends for e in self.exchanges]
        illustrated = [bool(exchange.pictures) for exchange in self.exchanges]
        return first_to_go(sizes, illustrated, room - positions - len(self._opening))

    def _answered(self, result: GenerationResult, options: GenerationOptions) -> tuple[int, ...]:
        """An answer's ids as they were generated, or of its text where a stop string cut it."""
        ids = result.token_ids
        if not options.ignore_eos and ids[-1] in self._model.stop_ids:
            return ids[:-1]
        cut = options.stop and self._tokenizer.decode(ids) != result.text
        return tuple(prompts.answer_ids(result.text, self._tokenizer, self._model.template)) if cut else ids

    @staticmethod
    def _positions(ids: Sequence[int], pictures: Sequence[Picture]) -> int:
        return len(ids) + sum(picture.tokens - 1 for picture in pictures)


def _pictures(exchanges: Sequence[Exchange]) -> list[Picture]:
    return [picture for exchange in exchanges for picture in exchange.pictures]


def _turns(question: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", None)]
